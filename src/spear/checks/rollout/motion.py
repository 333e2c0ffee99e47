"""Does the arm go where it is commanded? Several readings of the commands compete to explain it.

A *move* is what the arm did between two observations: its displacement and rotation, and the
actions that were commanded meanwhile. A *reading* says how the robot may have understood these
actions: along which axes, with which signs, and how many of them. Each reading is fitted with one
factor, the *gain*, and its error is the mean distance between fitted and achieved displacement,
divided by the mean achieved displacement.

Thresholds are chosen on rollouts of nano in the simulator (replan intervals 1, 2 and 4). Some of
them were moved after runs of the bench of planted faults (docs/results/diagnose.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from spear.checks.rollout.arm_lag import NO_LAG, ArmLag, measure_displacements, measure_turns
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.orientation import (
    EULER_VARIANTS,
    QUATERNION_VARIANTS,
    apply_euler_variant,
    undo_variant,
)
from spear.geometry import (
    quat_canonical,
    quat_conjugate,
    quat_distance,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_rotate,
)
from spear.types import CONTROL_RATE_HZ, Array

MIN_MOVES = 20  # with fewer commanded moves there is no verdict
MIN_COMMAND_M = 0.004  # a shorter commanded displacement has no reliable direction
MIN_COMMAND_RAD = np.radians(1.0)  # the same for rotations
# This quantile of (achieved length / commanded length) is what the arm does if nothing blocks it. A
# move that achieves a smaller share of it than MIN_FREE_SHARE was blocked.
FREE_QUANTILE = 0.9
MIN_FREE_SHARE = 0.5
SMALL_COMMAND_QUANTILE = 0.33  # the shortest third of the commands is not cut by limits
MIN_BASE_ANGLE_RAD = np.radians(15)  # a base that is turned by less is not turned (nano: 1°)
ROTATED_PENALTY = 0.05  # share of the motion that a turned base must explain more than others
MAX_READING_ERROR = 0.5  # a reading that leaves more of the motion unexplained is not believed
MIN_READING_ADVANTAGE = 0.2  # share of the motion that a reading must explain beyond the plain one
# A move is exactly as a reading predicts it if it differs by less than this share of its length.
MAX_EXACT_ERROR = 0.1
# So many moves must be exactly as another reading predicts them, and not as the plain one does; and
# so many times more of them than of the opposite. Robots without faults have at most 2.
MIN_EXACT_MOVES = 10
MIN_EXACT_RATIO = 4
MIN_TIMING_ADVANTAGE = 0.1  # share of the motion that other actions must explain more
# The arm rotates about the axes of another reading if the median angle to them is at most the first
# limit, and to those of its commands at least the second one (nano: 1° to its commands).
MAX_TURN_AXIS_RAD = np.radians(20)
MIN_WRONG_TURN_AXIS_RAD = np.radians(60)
# An action lasts for another time than in training if its rate differs by more than this factor.
MIN_RATE_RATIO = 1.4
CERTAIN_RATE_RATIO = 1.8
MAX_SECONDS_SPREAD = 0.25  # times of a steady rate vary by less (quartiles, as a share)
MAX_PLAUSIBLE_SPEED_M_S = 1.0  # no arm is mostly faster: then a simulator does not run in real time
# The arm may have executed a number of actions if the displacement that it achieved is between
# these multiples of the one that this number of actions commands.
MIN_COUNT_GAIN = 0.85
MAX_COUNT_GAIN = 1.15
# Share of the motion that another number of actions must explain more than the one that the times
# of the observations suggest.
MIN_COUNT_ADVANTAGE = 0.05
NUM_RESAMPLES = 200  # draws of the bootstrap over moves
SMALL_QUANTILE = 0.05  # the end of the bootstrap's interval that must exceed the limit

COMMANDS = "commands:"
STATES = "states:"
"""How names of readings of rotations begin, of which a variant of orientations follows."""

SIGNS: dict[str, tuple[float, float, float]] = {}
"""Signs of x, y and z, such as "+-+" → the factors 1 or -1 of the three numbers."""
for _x, _y, _z in product((1.0, -1.0), repeat=3):
    SIGNS["".join("+" if factor > 0 else "-" for factor in (_x, _y, _z))] = (_x, _y, _z)


class Reading(NamedTuple):
    """How a robot may understand the translation of an action.

    frame  "base", "tool", "inverse tool" (base axes rotated by the inverse orientation), or
           "base turned by N°" about the vertical axis.
    signs  signs of x, y and z, such as "+-+".
    """

    frame: str
    signs: str

    @property
    def is_rotated(self) -> bool:
        """Whether the base is turned by an angle that is fitted to the moves."""
        return self.frame.startswith("base turned")


PLAIN = Reading(frame="base", signs="+++")


class OtherRate(NamedTuple):
    """A rate at which actions are executed that is not the one of training.

    num_actions  how many actions the arm executes between two observations.
    seconds      from an answer to the next observation, while they execute: median of the moves.
    rate_hz      actions per second.
    confidence   how sure this is.
    """

    num_actions: int
    seconds: float
    rate_hz: float
    confidence: float


@dataclass(frozen=True)
class ReadingFit:
    """How well a reading explains the moves.

    gain   achieved displacement per commanded displacement.
    error  share of the motion that it leaves unexplained.
    """

    reading: Reading
    gain: float
    error: float


class TimingFit(NamedTuple):
    """How well other actions than those that should be executed explain the moves.

    error        share of the motion that stays unexplained.
    plain_error  the same for the actions that should be executed.
    num_moves    how many moves were compared.
    """

    error: float
    plain_error: float
    num_moves: int


@dataclass(frozen=True)
class RolloutMotion:
    """The commanded and the achieved motion of a rollout, in N moves.

    If the arm lags behind its commands in training, too (`arm_lag`), the achieved motions are those
    of an arm that follows at once.

    position     [N, 3] position at the first of the two observations, base frame, m.
    achieved     [N, 3] displacement between two observations, base frame, m.
    commanded    [N, H, 3] displacement of the first 1, 2, … H actions, base frame, m.
    orientation  [N, 4] orientation at the first of the two observations.
    turn         [N, 3] achieved rotation vector, end-effector frame, rad.
    turn_quats   [N, H, 4] rotation of the first 1, 2, … H actions, end-effector frame.
    opening      [N] gripper opening at the second observation.
    seconds      [N] time from the answer to the second observation; NaN if unknown.
    num_executed [N] how many actions were executed by these times.
    episode      [N] the index of the episode.
    """

    position: Array
    achieved: Array
    commanded: Array
    orientation: Array
    turn: Array
    turn_quats: Array
    opening: Array
    seconds: Array
    num_executed: Array
    episode: Array

    @staticmethod
    def from_episodes(episodes: Sequence[RecordedEpisode], lag: ArmLag = NO_LAG) -> "RolloutMotion":
        """Collect the moves of some episodes.

        Args:
            episodes: the episodes.
            lag: how the arm lags behind its commands in training.
        """
        horizon = min((_get_horizon(episode) for episode in episodes), default=1)
        moves_of_episodes = []
        for number, episode in enumerate(episodes):
            if len(episode) > 1 and not _moves_while_waiting(episode):
                moves_of_episodes.append(
                    _collect_commanded_and_achieved_moves(episode, number, horizon, lag)
                )
        if not moves_of_episodes:
            return RolloutMotion(
                position=np.zeros((0, 3)),
                achieved=np.zeros((0, 3)),
                commanded=np.zeros((0, 1, 3)),
                orientation=np.zeros((0, 4)),
                turn=np.zeros((0, 3)),
                turn_quats=np.zeros((0, 1, 4)),
                opening=np.zeros(0),
                seconds=np.zeros(0),
                num_executed=np.zeros(0, int),
                episode=np.zeros(0, int),
            )
        joined = {}
        for name in RolloutMotion.__dataclass_fields__:
            joined[name] = np.concatenate([getattr(moves, name) for moves in moves_of_episodes])
        return RolloutMotion(**joined)

    @cached_property
    def typical_num_executed(self) -> int:
        """How many actions the robot mostly executes between observations, by their times."""
        return int(np.median(self.num_executed)) if len(self.num_executed) else 1

    @cached_property
    def commanded_displacement(self) -> Array:
        """[N, 3] commanded displacement of the actions that were executed, m."""
        return self.commanded[:, self._assumed_num_executed - 1]

    @property
    def _assumed_num_executed(self) -> int:
        """How many actions are taken to be executed: by the motion, or else by the times."""
        return self.num_executed_by_motion or self.typical_num_executed

    @cached_property
    def is_move_commanded(self) -> Array:
        """[N] whether a displacement was commanded that is long enough to judge."""
        return np.linalg.norm(self.commanded_displacement, axis=1) > MIN_COMMAND_M

    @property
    def num_commanded_moves(self) -> int:
        """How many moves can be judged."""
        return int(self.is_move_commanded.sum())

    @cached_property
    def is_free(self) -> Array:
        """[N] whether the arm moved about as far as it mostly can, and so was not blocked.

        An arm that goes the wrong way soon stands at the border of its reach. What it does there
        says nothing about the axes of its commands.
        """
        lengths = np.linalg.norm(self.achieved, axis=1)
        ratios = lengths / np.maximum(np.linalg.norm(self.commanded_displacement, axis=1), 1e-9)
        if not self.is_move_commanded.any():
            return self.is_move_commanded
        usual_ratio = np.quantile(ratios[self.is_move_commanded], FREE_QUANTILE)
        return self.is_move_commanded & (ratios > MIN_FREE_SHARE * usual_ratio)

    @cached_property
    def fits(self) -> list[ReadingFit]:
        """The fit of every reading, the best one first."""
        fits = []
        for reading in self._displacements_by_reading:
            achieved, predicted = self._select_free_achieved_and_predicted(reading)
            gain = _fit_nonnegative_median_gain(achieved, predicted)
            error = _measure_prediction_errors_m(
                achieved, gain * predicted
            ).mean() / _measure_mean_length(achieved)
            fits.append(ReadingFit(reading, gain, float(error)))
        # A rotated base explains what the others do, too, so it must do it better.
        return sorted(fits, key=lambda fit: fit.error + ROTATED_PENALTY * fit.reading.is_rotated)

    def fit_of(self, reading: Reading) -> ReadingFit:
        """Return the fit of one reading."""
        return next(fit for fit in self.fits if fit.reading == reading)

    @cached_property
    def better_reading(self) -> ReadingFit | None:
        """The reading that explains the motion surely better than the plain one; None if none does.

        Its advantage must exceed `MIN_READING_ADVANTAGE` in 95 % of the draws of a bootstrap.
        """
        if self.is_free.sum() < MIN_MOVES:
            return None
        best = self.fits[0]
        if best.reading == PLAIN or best.error > MAX_READING_ERROR:
            return None
        plain_fit = self.fit_of(PLAIN)
        achieved, plain_predicted = self._select_free_achieved_and_predicted(PLAIN)
        _, best_predicted = self._select_free_achieved_and_predicted(best.reading)
        plain_error = _measure_prediction_errors_m(achieved, plain_fit.gain * plain_predicted)
        best_error = _measure_prediction_errors_m(achieved, best.gain * best_predicted)
        lengths = np.linalg.norm(achieved, axis=1)
        if is_other_surely_better(plain_error, best_error, lengths, MIN_READING_ADVANTAGE):
            return best
        # Frames that differ little predict most moves alike. Then the others tell them apart.
        return best if is_other_often_exact_instead(plain_error, best_error, lengths) else None

    @cached_property
    def likely_reading(self) -> ReadingFit:
        """The better reading, or else the plain one."""
        return self.better_reading or self.fit_of(PLAIN)

    @cached_property
    def with_late_actions(self) -> "RolloutMotion":
        """The moves with the actions of the answer before the last one.

        So the arm moves if an answer arrives only after the next observation.
        """
        has_previous = self.episode[1:] == self.episode[:-1]
        later = self._select(np.flatnonzero(has_previous) + 1)
        earlier = self._select(np.flatnonzero(has_previous))
        return replace(later, commanded=earlier.commanded, turn_quats=earlier.turn_quats)

    @cached_property
    def with_repeated_actions(self) -> "RolloutMotion":
        """The moves with the first action of each answer, executed as often as there was time."""
        first_turns = torch.as_tensor(self.turn_quats[:, 0])
        repeats = torch.as_tensor(self.num_executed)[:, None]
        turns = quat_exp(repeats * quat_log(quat_canonical(first_turns)))
        return replace(
            self,
            commanded=(self.num_executed[:, None] * self.commanded[:, 0])[:, None],
            turn_quats=turns[:, None].numpy(),
            num_executed=np.ones(len(self.achieved), int),
        )

    @cached_property
    def late_fit(self) -> TimingFit | None:
        """The fit of the answer before the last one, if it surely explains the moves better."""
        has_previous = np.flatnonzero(self.episode[1:] == self.episode[:-1]) + 1
        return _fit_other_if_surely_better(self._select(has_previous), self.with_late_actions)

    @cached_property
    def repeated_fit(self) -> TimingFit | None:
        """The fit of first actions that are executed twice, if they surely explain moves better.

        Only moves that take two actions' time tell it.
        """
        if self.commanded.shape[1] < 2 or not np.isfinite(self.seconds).all():
            return None
        is_double = np.flatnonzero(self.num_executed == 2)
        return _fit_other_if_surely_better(
            self._select(is_double), self.with_repeated_actions._select(is_double)
        )

    @cached_property
    def with_likely_actions(self) -> "RolloutMotion":
        """The moves with the actions that explain them: late or repeated ones, if these do."""
        if self.late_fit is not None:
            return self.with_late_actions
        return self if self.repeated_fit is None else self.with_repeated_actions

    @cached_property
    def turn_errors_rad(self) -> dict[str, Array]:
        """How far each reading of the rotations is off: name → [M] rad, for M turning moves.

        "plain" is the right reading. By "about the base" the robot rotates about the axes of its
        base; by "x y z w" it takes the quaternion's first number for x. Names of variants (module
        `orientation`) begin with "commands" if the robot executes rotations so, and with "states"
        if it measures its orientation so.
        """
        command = torch.as_tensor(
            self.turn_quats[:, self._assumed_num_executed - 1][self.is_turn_commanded]
        )
        orientation = torch.as_tensor(self.orientation[self.is_turn_commanded])
        achieved = quat_exp(torch.as_tensor(self.turn[self.is_turn_commanded]))
        next_orientation = quat_multiply(orientation, achieved)
        about_base = quat_multiply(quat_conjugate(orientation), quat_multiply(command, orientation))
        readings = {
            "plain": command,
            "about the base": about_base,
            "x y z w": command.roll(1, dims=-1),
        }
        for name, signs in SIGNS.items():
            if name != PLAIN.signs:
                readings[name] = command * torch.tensor([1.0, *signs])  # of w, x, y and z
        errors = {name: quat_distance(quats, achieved).numpy() for name, quats in readings.items()}
        for variant in EULER_VARIANTS:
            executed = torch.as_tensor(apply_euler_variant(command.numpy(), variant))
            errors[f"{COMMANDS} {variant}"] = quat_distance(executed, achieved).numpy()
        for variant in (*QUATERNION_VARIANTS, *EULER_VARIANTS):
            start_quats = torch.as_tensor(undo_variant(orientation.numpy(), variant))
            end_quats = torch.as_tensor(undo_variant(next_orientation.numpy(), variant))
            turned = quat_multiply(quat_conjugate(start_quats), end_quats)
            errors[f"{STATES} {variant}"] = quat_distance(command, turned).numpy()
        return errors

    @cached_property
    def better_turn_reading(self) -> str | None:
        """The reading of the rotations that surely fits better than the plain one, if any."""
        if self.is_turn_commanded.sum() < MIN_MOVES:
            return None
        errors = self.turn_errors_rad
        best = min(errors, key=lambda name: errors[name].mean())
        lengths = np.linalg.norm(self.turn[self.is_turn_commanded], axis=1)
        if self.executes_quaternions_as_xyzw:
            return "x y z w"
        if best == "plain" or errors[best].mean() > MAX_READING_ERROR * lengths.mean():
            return None
        is_better = is_other_surely_better(
            errors["plain"], errors[best], lengths, MIN_READING_ADVANTAGE
        )
        return best if is_better else None

    @cached_property
    def turn_axis_errors_rad(self) -> dict[str, float]:
        """The median angle, rad, from achieved axes of rotation to those of two readings.

        The readings are "plain" and "x y z w". A robot that limits its rotations still rotates
        about the axes that it was commanded.
        """
        command = torch.as_tensor(
            self.turn_quats[:, self._assumed_num_executed - 1][self.is_turn_commanded]
        )
        achieved = self.turn[self.is_turn_commanded]
        achieved_lengths = np.linalg.norm(achieved, axis=1)
        errors = {}
        for name, quats in {"plain": command, "x y z w": command.roll(1, dims=-1)}.items():
            turns = quat_log(quat_canonical(quats)).numpy()
            lengths = achieved_lengths * np.linalg.norm(turns, axis=1)
            cosines = (turns * achieved).sum(1) / np.maximum(lengths, 1e-12)
            errors[name] = float(np.median(np.arccos(np.clip(cosines, -1, 1))))
        return errors

    @property
    def executes_quaternions_as_xyzw(self) -> bool:
        """Whether the arm rotates about axes of commands that are read as x y z w."""
        achieved = np.linalg.norm(self.turn[self.is_turn_commanded], axis=1)
        if len(achieved) < MIN_MOVES or np.median(achieved) < MIN_COMMAND_RAD:
            return False
        errors = self.turn_axis_errors_rad
        is_reordered = errors["x y z w"] < MAX_TURN_AXIS_RAD
        return is_reordered and errors["plain"] > MIN_WRONG_TURN_AXIS_RAD

    @cached_property
    def turn_gain(self) -> float:
        """The median achieved rotation along the command, per commanded rotation."""
        command = self.commanded_turn[self.is_turn_commanded]
        return _fit_nonnegative_median_gain(self.turn[self.is_turn_commanded], command)

    @cached_property
    def move_gains(self) -> Array:
        """[N] achieved displacement along the command, per commanded length; NaN if not moving.

        The command is read as the likely reading does.
        """
        command = self._displacements_by_reading[self.likely_reading.reading]
        squared_length = (command**2).sum(1)
        gains = (self.achieved * command).sum(1) / np.maximum(squared_length, 1e-12)
        return np.where(self.is_move_commanded, gains, np.nan)

    @cached_property
    def num_executed_by_motion(self) -> int | None:
        """How many actions the arm executed between observations, by its motion alone.

        None if no number explains the motion with a gain near 1.
        """
        lengths = np.linalg.norm(self.commanded[:, self.typical_num_executed - 1], axis=1)
        is_moving = lengths > MIN_COMMAND_M
        achieved = self.achieved[is_moving]
        if len(achieved) < MIN_MOVES:
            return None
        errors = {}
        gains = {}
        for count in range(1, self.commanded.shape[1] + 1):
            predicted = self.commanded[is_moving, count - 1]
            gains[count] = _fit_nonnegative_median_gain(achieved, predicted)
            unexplained = _measure_prediction_errors_m(achieved, gains[count] * predicted)
            errors[count] = unexplained.mean() / _measure_mean_length(achieved)
        candidates = [
            count for count, gain in gains.items() if MIN_COUNT_GAIN < gain < MAX_COUNT_GAIN
        ]
        if not candidates:
            return None
        best = min(candidates, key=lambda count: errors[count])
        typical = self.typical_num_executed
        # Without a clear advantage, the number that the times tell is believed, with its gain.
        if errors[typical] < errors[best] + MIN_COUNT_ADVANTAGE:
            return typical if typical in candidates else None
        return best if errors[best] < MAX_READING_ERROR else None

    @cached_property
    def num_executed_by_exact_moves(self) -> int | None:
        """How many actions the arm executed between observations, by its exact moves.

        None if too few moves tell it. Rotations tell it if translations are in another unit, and
        the reverse; a blocked arm has at least some free moves.
        """
        turns = quat_log(quat_canonical(torch.as_tensor(self.turn_quats))).numpy()
        for achieved, commanded, min_length in (
            (self.turn, turns, MIN_COMMAND_RAD),
            (self.achieved, self.commanded, MIN_COMMAND_M),
        ):
            is_long = np.linalg.norm(commanded, axis=2).min(1) > min_length
            errors = np.linalg.norm(achieved[is_long, None] - commanded[is_long], axis=2)
            limits = MAX_EXACT_ERROR * np.linalg.norm(commanded[is_long], axis=2)
            num_exact = (errors < limits).sum(0)  # [H] moves of each number of actions
            count = int(num_exact.argmax())
            num_others = np.delete(num_exact, count).max(initial=0)
            if num_exact[count] >= max(MIN_MOVES, MIN_EXACT_RATIO * num_others):
                return count + 1
        return None

    @cached_property
    def other_rate(self) -> OtherRate | None:
        """The rate at which actions are executed; None if it is the one of training, or unknown."""
        count = self.num_executed_by_motion or self.num_executed_by_exact_moves
        if count is None or not np.isfinite(self.seconds).all():
            return None
        low, median, high = np.quantile(self.seconds, [0.25, 0.5, 0.75])
        if median <= 0 or (high - low) / median > MAX_SECONDS_SPREAD:
            return None
        achieved_m = np.linalg.norm(self.achieved[self.is_move_commanded], axis=1)
        speed_m_s = np.median(achieved_m) / median
        if speed_m_s > MAX_PLAUSIBLE_SPEED_M_S:
            return None
        rate_hz = count / median
        ratio = max(rate_hz / CONTROL_RATE_HZ, CONTROL_RATE_HZ / rate_hz)
        if ratio < MIN_RATE_RATIO:
            return None
        fraction = (ratio - MIN_RATE_RATIO) / (CERTAIN_RATE_RATIO - MIN_RATE_RATIO)
        confidence = 0.5 + 0.45 * min(fraction, 1.0)
        return OtherRate(count, float(median), float(rate_hz), round(float(confidence), 3))

    @cached_property
    def gain_of_short_commands(self) -> float:
        """The gain of the shorter commands, which a robot's limits cut least (upper quartile)."""
        lengths = np.linalg.norm(self.commanded_displacement, axis=1)
        limit = np.quantile(lengths[self.is_free], SMALL_COMMAND_QUANTILE)
        is_small = self.is_free & (lengths <= limit)
        return float(np.quantile(self.move_gains[is_small], 0.75))

    @cached_property
    def commanded_turn(self) -> Array:
        """[N, 3] commanded rotation vector of the executed actions, end-effector frame, rad."""
        quats = torch.as_tensor(self.turn_quats[:, self._assumed_num_executed - 1])
        return quat_log(quat_canonical(quats)).numpy()

    @cached_property
    def is_turn_commanded(self) -> Array:
        """[N] whether a rotation was commanded that is large enough to judge."""
        return np.linalg.norm(self.commanded_turn, axis=1) > MIN_COMMAND_RAD

    @cached_property
    def _displacements_by_reading(self) -> dict[Reading, Array]:
        """Reading → [N, 3] the displacement that it makes of the commands, before the gain."""
        orientation = torch.as_tensor(self.orientation)
        command = torch.as_tensor(self.commanded_displacement)
        in_frames = {
            "base": self.commanded_displacement,
            "tool": quat_rotate(orientation, command).numpy(),
            "inverse tool": quat_rotate(quat_conjugate(orientation), command).numpy(),
        }
        predictions = {}
        angle_rad = self._base_angle_rad
        if abs(angle_rad) > MIN_BASE_ANGLE_RAD:
            cos = np.cos(angle_rad)
            sin = np.sin(angle_rad)
            turned = command.numpy() @ np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
            frame = f"base turned by {np.degrees(angle_rad):.0f}°"
            predictions[Reading(frame, PLAIN.signs)] = turned
        for frame, displacement in in_frames.items():
            for name, signs in SIGNS.items():
                # Signs apply to the robot's own axes: those of the base.
                predictions[Reading(frame, name)] = displacement * np.array(signs)
        return predictions

    @property
    def _base_angle_rad(self) -> float:
        """The angle about the vertical axis that turns commands best into free moves, rad."""
        x, y = self.commanded_displacement[self.is_free, :2].T
        moved_x, moved_y = self.achieved[self.is_free, :2].T
        cosine_sum = (x * moved_x + y * moved_y).sum()
        sine_sum = (x * moved_y - y * moved_x).sum()
        return float(np.arctan2(sine_sum, cosine_sum))

    def _select(self, indices: Array) -> "RolloutMotion":
        """Return only some of the moves."""
        selected = {name: getattr(self, name)[indices] for name in self.__dataclass_fields__}
        return RolloutMotion(**selected)

    def _select_free_achieved_and_predicted(self, reading: Reading) -> tuple[Array, Array]:
        """Return achieved and predicted displacements of the free moves."""
        return self.achieved[self.is_free], self._displacements_by_reading[reading][self.is_free]


def is_other_surely_better(
    plain_errors: Array, other_errors: Array, lengths: Array, min_advantage: float
) -> bool:
    """Return whether the other errors are surely smaller, by a share of the motion.

    Args:
        plain_errors: [N] error of each move by the plain reading.
        other_errors: [N] error of each move by the other reading.
        lengths: [N] size of each move.
        min_advantage: the share of the motion by which the errors must differ, in 95 % of the draws
            of a bootstrap over moves.
    """
    draws = np.random.default_rng(0).integers(0, len(lengths), (NUM_RESAMPLES, len(lengths)))
    advantages = (plain_errors - other_errors)[draws].sum(1) / np.maximum(
        lengths[draws].sum(1), 1e-9
    )
    return bool(np.quantile(advantages, SMALL_QUANTILE) > min_advantage)


def _fit_other_if_surely_better(plain: RolloutMotion, other: RolloutMotion) -> TimingFit | None:
    """Compare the actions that should be executed with others, both in their best reading.

    Returns:
        The fit of the others; None unless they surely explain the same moves better.
    """
    is_compared = plain.is_move_commanded & other.is_move_commanded
    if is_compared.sum() < MIN_MOVES:
        return None
    achieved = plain.achieved[is_compared]
    lengths = np.linalg.norm(achieved, axis=1)
    best_errors = []
    for motion in (other, plain):
        errors = []
        for displacements in motion._displacements_by_reading.values():
            predicted = displacements[is_compared]
            gain = _fit_nonnegative_median_gain(achieved, predicted)
            errors.append(_measure_prediction_errors_m(achieved, gain * predicted))
        best_errors.append(min(errors, key=lambda error: float(error.mean())))
    other_error, plain_error = best_errors
    mean_length = _measure_mean_length(achieved)
    share = float(other_error.mean() / mean_length)
    is_better = is_other_surely_better(plain_error, other_error, lengths, MIN_TIMING_ADVANTAGE)
    is_better = is_better or is_other_often_exact_instead(plain_error, other_error, lengths)
    if not is_better or share > MAX_READING_ERROR:
        return None
    return TimingFit(share, float(plain_error.mean() / mean_length), int(is_compared.sum()))


def is_other_often_exact_instead(plain_errors: Array, other_errors: Array, lengths: Array) -> bool:
    """Return whether many moves are exactly as another reading predicts, but not as the plain one.

    Blocked moves, which no reading predicts, do not count.

    Args:
        plain_errors: [N] error of each move by the plain reading.
        other_errors: [N] error of each move by the other reading.
        lengths: [N] size of each move.
    """
    is_exact_by_plain = plain_errors < MAX_EXACT_ERROR * lengths
    is_exact_by_other = other_errors < MAX_EXACT_ERROR * lengths
    num_by_other = int((is_exact_by_other & ~is_exact_by_plain).sum())
    num_by_plain = int((is_exact_by_plain & ~is_exact_by_other).sum())
    return num_by_other >= max(MIN_EXACT_MOVES, MIN_EXACT_RATIO * num_by_plain)


def _moves_while_waiting(episode: RecordedEpisode) -> bool:
    """Return whether a robot executes earlier actions while it waits for its answers.

    Then it observes again as soon as it has an answer, although waiting took several actions'
    time. Which actions it executed between two observations is unknown.
    """
    if episode.served is None:
        return False
    pauses_s = episode.served.arrival_s[1:] - episode.served.answer_s[:-1]
    cycles_s = np.diff(episode.served.arrival_s)
    action_s = 1 / CONTROL_RATE_HZ
    return bool(np.median(pauses_s) < 0.5 * action_s and np.median(cycles_s) > 1.5 * action_s)


def _get_horizon(episode: RecordedEpisode) -> int:
    """Return how many actions a recorded answer has; 1 if no answers were recorded."""
    return 1 if episode.served is None else episode.served.chunks.shape[1]


def _collect_commanded_and_achieved_moves(
    episode: RecordedEpisode, episode_number: int, horizon: int, lag: ArmLag
) -> RolloutMotion:
    """Collect the moves of one episode of at least two steps."""
    orientation = np.asarray(episode.rotation, np.float64)
    displacements = measure_displacements(episode)
    turns = measure_turns(episode)
    if episode.served is None:
        chunks = episode.action[:-1, None].astype(np.float64)
        seconds = np.full(len(episode) - 1, np.nan)
        num_executed = np.ones(len(episode) - 1, int)
    else:
        chunks = episode.served.chunks[:-1, :horizon].astype(np.float64)
        seconds = episode.served.arrival_s[1:] - episode.served.answer_s[:-1]
        rounded = np.round(seconds * CONTROL_RATE_HZ)
        num_executed = np.clip(rounded, 1, horizon).astype(int)
    rotations = [torch.as_tensor(chunks[:, 0, 3:7])]  # of the first 1, 2, … H actions
    for step in range(1, chunks.shape[1]):
        rotations.append(quat_multiply(rotations[-1], torch.as_tensor(chunks[:, step, 3:7])))
    if np.median(num_executed) == 1:  # the lag is known for steps of one action
        displacements = lag.translation.remove(displacements)
        turns = lag.rotation.remove(turns)
    is_known = episode.is_known[:-1]
    return RolloutMotion(
        position=np.asarray(episode.position[:-1], np.float64)[is_known],
        achieved=displacements[is_known],
        commanded=chunks[:, :, :3].cumsum(1)[is_known],
        orientation=orientation[:-1][is_known],
        turn=turns[is_known],
        turn_quats=torch.stack(rotations, 1).numpy()[is_known],
        opening=np.asarray(episode.opening, np.float64)[1:][is_known],
        seconds=seconds[is_known],
        num_executed=num_executed[is_known],
        episode=np.full(len(episode) - 1, episode_number)[is_known],
    )


def _fit_nonnegative_median_gain(achieved: Array, predicted: Array) -> float:
    """Fit the factor from predicted to achieved displacements [N, 3]: the median over moves.

    The median is used because a few moves are stopped by contacts. A negative factor becomes 0:
    signs belong to the reading.
    """
    if not len(achieved):
        return 0.0
    squared_length = np.maximum((predicted**2).sum(1), 1e-12)
    return max(float(np.median((achieved * predicted).sum(1) / squared_length)), 0.0)


def _measure_prediction_errors_m(achieved: Array, predicted: Array) -> Array:
    """Return the distances [N] between achieved and predicted displacements [N, 3]."""
    return np.linalg.norm(achieved - predicted, axis=1)


def _measure_mean_length(displacements: Array) -> float:
    if not len(displacements):
        return 1e-9
    return max(float(np.linalg.norm(displacements, axis=1).mean()), 1e-9)
