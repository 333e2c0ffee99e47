"""How well every plausible meaning of logged actions leads from recorded state to recorded state.

A dataset has recorded states (positions and orientations of the end effector) and logged actions
(translations and rotations). A *hypothesis* says what the logged numbers mean: whether they are
changes per step, velocities or targets, along which axes, in which unit and with which signs, how a
rotation is written, and how many steps later the robot executes an action.

Episodes are cut into *stretches* of at most 20 steps. Under a hypothesis, the logged actions are
integrated from the first recorded state of a stretch. The error is the mean distance to the
recorded states, divided by the mean distance that the robot moved from the first state. An error of
0 is perfect, and an error of 1 is as bad as predicting that the robot stands still. The method is
our own.

Confidence intervals come from a bootstrap. It draws *units of resampling*, which are whole
episodes, or stretches if there are only few episodes.

Dimensions in shapes: N recorded steps of all episodes, n stretches of L = 20 steps, U units of
resampling, S formats of recorded orientations, K hypotheses.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from spear.checks.recording import Recording, are_degrees
from spear.data.readers.dataset_layout import RECORDED_ONLY
from spear.data.readers.rotation_formats import ROTATION_FORMATS
from spear.geometry import quat_conjugate, quat_multiply, quat_normalize, quat_rotate
from spear.types import Array
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS, name_unit

DELAYS = (-1, 0, 1, 2)  # steps; with a delay d, action t - d leads from state t to state t + 1
MAX_STRETCH_STEPS = 20  # over longer stretches, small errors add up and hide the large ones
MIN_EPISODES_TO_RESAMPLE = 8  # with fewer, the bootstrap draws stretches instead of episodes
MAX_NEAR_UNIT_OCTAVES = 0.5  # a fitted unit within a factor of 2^0.5 of a known unit is that unit
# Two formats turn the gripper differently if their rotations differ by this fraction of a rotation.
MIN_TURN_DIFFERENCE = 0.1

SIGNS: dict[str, Array] = {}
"""Signs of the x, y and z components, such as "+-+" → their factors, such as (1, -1, 1)."""
for _factors in itertools.product((1.0, -1.0), repeat=3):
    SIGNS["".join("+" if factor > 0 else "-" for factor in _factors)] = np.array(_factors)
SIGN_FACTORS = np.stack(list(SIGNS.values()))  # [8, 3]

NO_INFLUENCE = "-"
"""The answer of hypotheses to a question that does not matter for them, such as how rotations are
written for a translation."""
UNIT_QUATERNION = "unit quaternion"
"""The unit that hypotheses name for rotations that are written without angles."""
TESTED_FORMATS = tuple(name for name in ROTATION_FORMATS if name not in RECORDED_ONLY)
"""Rotation formats that hypotheses try."""


class Scale(NamedTuple):
    """One kind ("delta", "velocity" or "absolute") and unit of logged numbers.

    factor  what a logged number is multiplied with to be meters or radians (per step, except for
            kind "absolute").
    """

    kind: str
    unit: str
    factor: float


class Hypothesis(NamedTuple):
    """What logged numbers mean.

    kind           "delta" (change per step), "velocity" or "absolute" (target).
    frame          "base" or "ee" for displacements and rotations about the axes of that frame;
                   "angles" if logged angles are added to the recorded angles one by one.
    unit           for example "m", "mm", "rad/s".
    signs          signs of the x, y and z components, for example "+-+".
    delay_steps    how many steps after its state an action is executed, see `DELAYS`.
    state_format   how recorded orientations are written; `NO_INFLUENCE` where their format does
                   not matter.
    action_format  how a logged rotation is written; `NO_INFLUENCE` for translations.
    """

    kind: str
    frame: str
    unit: str
    signs: str
    delay_steps: int
    state_format: str
    action_format: str


@dataclass(frozen=True)
class Fit:
    """How well a hypothesis explains the data.

    error           [U] distance between integrated and recorded states, summed over the steps of
                    each unit of resampling; meters or radians.
    motion          [U] distance of the recorded states from the first state of their stretch,
                    summed over the steps of each unit of resampling; meters or radians.
    relative_error  all of the error as a fraction of all of the motion.
    num_steps       how many states were compared.
    factor          converts logged translations to meters; not used for rotations.
    """

    hypothesis: Hypothesis
    error: Array
    motion: Array
    relative_error: float
    num_steps: int
    factor: float = 1.0

    @property
    def mean_error(self) -> float:
        """Mean distance between integrated and recorded states, m or rad."""
        return float(self.error.sum() / self.num_steps)


def _compute_pooled_relative_errors(errors: Array, motions: Array) -> Array:
    """Compute the relative errors [...] of many fits, over all units of resampling, see `Fit`.

    Args:
        errors: [..., U] error of each fit in each unit of resampling.
        motions: [..., U] motion of each fit in each unit of resampling.
    """
    return errors.sum(-1) / np.maximum(motions.sum(-1), 1e-12)


class Stretches:
    """Stretches of at most `MAX_STRETCH_STEPS` steps, cut from some recordings.

    The arrays of all recordings are concatenated, and a *row* is an index into the result. For
    every step of a stretch, the actions of all `DELAYS` are valid.

    num                 how many stretches there are; 0 if no episode is long enough.
    rows                [n, L + 1] the row of each state of each stretch. Shorter stretches are
                        padded by repeating their last row.
    is_step             [n, L] whether a step is real, and not padding.
    resampling_unit     [n] index of the unit of resampling to which each stretch belongs.
    are_units_episodes  whether the units of resampling are episodes. If there are few episodes,
                        each stretch is a unit.
    """

    def __init__(self, recordings: Sequence[Recording]) -> None:
        # One entry per stretch; see the attributes `rows` and `is_step`
        rows: list[Array] = []
        is_step: list[Array] = []
        episodes: list[int] = []  # the index of the stretch's episode
        first_row = 0  # of the current episode, in the concatenation of all episodes
        for number, recording in enumerate(recordings):
            for run_first, run_end in _find_runs_valid_for_all_delays(recording.valid):
                for start in range(run_first, run_end, MAX_STRETCH_STEPS):
                    states = start + np.arange(MAX_STRETCH_STEPS + 1)
                    padded_states = np.minimum(states, run_end)
                    rows.append(first_row + padded_states)
                    is_step.append(states[:-1] < run_end)
                    episodes.append(number)
            first_row += len(recording.position)

        self.num = len(rows)
        self.rows = np.array(rows, int).reshape(-1, MAX_STRETCH_STEPS + 1)
        self.is_step = np.array(is_step, bool).reshape(-1, MAX_STRETCH_STEPS)
        self.are_units_episodes = len(set(episodes)) >= MIN_EPISODES_TO_RESAMPLE
        if self.are_units_episodes:
            # Number the episodes that have stretches from 0, without gaps.
            _, self.resampling_unit = np.unique(episodes, return_inverse=True)
        else:
            self.resampling_unit = np.arange(self.num)
        num_units = self.resampling_unit.max(initial=-1) + 1
        # [n, U] bool: a product with it sums over the stretches of each unit of resampling.
        self._membership = self.resampling_unit[:, None] == np.arange(num_units)

    def action_rows(self, delay: int) -> Array:
        """Return the row of the action that leads from each state to the next, [n, L].

        Args:
            delay: how many steps after its state the robot executes an action. The action that is
                executed in a state was then logged this many rows before the state.
        """
        return self.rows[:, :-1] - delay

    def select_actions(self, logged: Array) -> Array:
        """Select the logged actions [number of real steps, d] of all real steps, without delay.

        Args:
            logged: [N, d] the logged actions of all rows.
        """
        logged_by_stretch = logged[self.action_rows(delay=0)]  # [n, L, d]
        return logged_by_stretch[self.is_step]

    def sum_per_resampling_unit(self, distances: Array) -> Array:
        """Sum distances [..., n, L] over the real steps of each unit of resampling: [..., U]."""
        sum_per_stretch = np.where(self.is_step, distances, 0).sum(-1)  # [..., n]
        return sum_per_stretch @ self._membership


def _find_runs_valid_for_all_delays(valid: Array) -> Iterator[tuple[int, int]]:
    """Find the runs of steps in which the actions of all delays are valid.

    Args:
        valid: [T] bool, whether each step's action is valid.

    Yields:
        (first, end) of each run: steps first ≤ t < end, the last of which leads to state `end`.
    """
    max_delay = max(DELAYS)
    max_lead = -min(DELAYS)
    is_good = []  # 1 or 0 for each step t from max_delay on: its index is t - max_delay
    # Every delay needs a valid action. The last action, len(valid) - 1, is not among these actions,
    # because without delay it leads to a state after the end of the recording.
    for t in range(max_delay, len(valid) - max_lead - 1):
        actions_of_all_delays = valid[t - max_delay : t + max_lead + 1]
        is_good.append(int(actions_of_all_delays.all()))
    # With a zero added at both ends, the changes are by turns the begin and the end of a run.
    changes = np.flatnonzero(np.diff([0, *is_good, 0]))
    for first, end in zip(changes[::2], changes[1::2], strict=True):
        yield max_delay + int(first), max_delay + int(end)


def _to_tensor(values: Array) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, np.float64))


def _to_quaternions(rotation_format: str, values: torch.Tensor) -> torch.Tensor:
    """Convert rotations [..., d] in a format to unit quaternions [..., 4]."""
    return quat_normalize(ROTATION_FORMATS[rotation_format].to_quaternion(values))


def _list_possible_formats(values: Array) -> list[str]:
    """Return the formats in which numbers [N, d] may be rotations: those of d numbers."""
    num_components = values.shape[1]
    return [
        name for name in TESTED_FORMATS if ROTATION_FORMATS[name].num_components == num_components
    ]


def list_tested_state_formats(values: Array) -> list[str]:
    """Return the formats that are tried for recorded orientations [N, d]: those of d numbers.

    Yaw, pitch, roll ("euler_ZYX") is not among them. If states and actions are both written as yaw,
    pitch, roll, then they fit as well as roll, pitch, yaw ("euler_xyz") with base and end-effector
    frame exchanged, because the one is the mirror image of the other. Rotations alone cannot tell
    these two apart (see `find_formats_that_turn_otherwise`). If only the actions are written as
    yaw, pitch, roll, their `action_format` says so.
    """
    return [name for name in _list_possible_formats(values) if name != "euler_ZYX"]


def guess_recorded_unit(rotation: Array) -> str:
    """Find the unit of recorded orientations [N, d]: "deg", "rad" or `UNIT_QUATERNION`.

    Three numbers may be angles. They are taken for degrees if some go beyond a whole turn in
    radians (2π), and for radians otherwise. More numbers have no unit, like unit quaternions.
    """
    if rotation.shape[1] != 3:
        return UNIT_QUATERNION
    return "deg" if are_degrees(rotation) else "rad"


def convert_to_quaternions_by_format(rotation: Array) -> dict[str, Array]:
    """Convert recorded orientations [N, d] to quaternions in every format that is possible.

    Returns:
        Format → quaternions [N, 4].
    """
    unit = guess_recorded_unit(rotation)
    values = _to_tensor(rotation * ANGLE_UNITS.get(unit, 1.0))
    quaternions = {}
    for name in _list_possible_formats(rotation):
        quaternions[name] = _to_quaternions(name, values).numpy()
    return quaternions


def can_tell_euler_order(translation: Hypothesis | None, rotation: Hypothesis | None) -> bool:
    """Return whether the actions tell roll, pitch, yaw from yaw, pitch, roll.

    With the wrong order of angles, rotations fit in the wrong frame (see
    `list_tested_state_formats`). This shows if translations and rotations fit in the same frame,
    because the other order would put them in two frames. Rotations that are targets have no such
    frame, so they tell nothing.

    Args:
        translation: the best hypothesis about logged translations; None if they tell nothing.
        rotation: the best hypothesis about logged rotations; None if they tell nothing.
    """
    if translation is None or rotation is None:
        return False
    if rotation.kind == "absolute":
        return False
    is_translation_in_ee = translation.frame == "ee"
    is_rotation_in_ee = rotation.frame == "ee"
    return is_translation_in_ee == is_rotation_in_ee


def find_formats_that_turn_otherwise(
    rotations: Sequence[Array],
    layout_format: str,
    tied_formats: Iterable[str],
    translation: Hypothesis | None,
    rotation: Hypothesis | None,
) -> list[str]:
    """Find formats that fit as well as the layout's, but by which the gripper rotates differently.

    Args:
        rotations: each episode's recorded orientations [T, d].
        layout_format: the format that the layout names.
        tied_formats: formats that fit as well as the layout's.
        translation: the best hypothesis about logged translations; None if they tell nothing.
        rotation: the best hypothesis about logged rotations; None if they tell nothing.
    """
    other_formats = sorted({*tied_formats} - {layout_format})
    # Yaw, pitch, roll ("euler_ZYX") is never tried by itself, so it is not among the tied formats.
    # But with both states and actions written so, it fits as well as "euler_xyz".
    is_euler_possible = "euler_xyz" in {layout_format, *other_formats}
    if is_euler_possible and not can_tell_euler_order(translation, rotation):
        other_formats.append("euler_ZYX")

    quaternions = convert_to_quaternions_by_format(np.concatenate(rotations))
    episode_ends = np.cumsum([len(values) for values in rotations])[:-1]
    layout_turns = _compute_turns_within_episodes(quaternions[layout_format], episode_ends)
    # The scalar part of a rotation's quaternion is its scalar product with "no rotation".
    mean_turn_rad = _compute_angle_rad(layout_turns[:, 0]).mean()
    # The 1e-6 rad are rounding errors, which differ by format even if nothing rotates.
    min_difference_rad = MIN_TURN_DIFFERENCE * mean_turn_rad + 1e-6

    differing_formats = []
    for name in other_formats:
        turns = _compute_turns_within_episodes(quaternions[name], episode_ends)
        difference_rad = _compute_angle_rad((layout_turns * turns).sum(-1))  # one per pair of steps
        if difference_rad.mean() > min_difference_rad:
            differing_formats.append(name)
    return differing_formats


def _compute_turns_within_episodes(quaternions: Array, episode_ends: Array) -> Array:
    """Compute the rotations from step to step.

    Args:
        quaternions: [N, 4] orientations of all episodes, one after another.
        episode_ends: the row behind each episode but the last.

    Returns:
        [N - number of episodes, 4], without the rotations from one episode to the next.
    """
    orientation = _to_tensor(quaternions)
    turns = quat_multiply(quat_conjugate(orientation[:-1]), orientation[1:]).numpy()
    return np.delete(turns, episode_ends - 1, axis=0)


def _list_possible_scales(
    logged: Array, rms_step: float, units: Mapping[str, float], step_s: float
) -> list[Scale]:
    """List the known units of changes and velocities, and a fitted unit if none of them is near.

    The fitted unit makes the logged numbers as large as the recorded steps.

    Args:
        logged: [number of steps, 3] logged numbers.
        rms_step: root mean square of the recorded steps, m or rad.
        units: unit → factor to meters or radians.
        step_s: duration of a step, s.
    """
    scales = [Scale("delta", name, factor) for name, factor in units.items()]
    scales += [Scale("velocity", f"{name}/s", factor * step_s) for name, factor in units.items()]
    rms_logged = float(np.sqrt((logged**2).sum(-1).mean()))
    can_fit = rms_logged > 0 and rms_step > 0
    if not can_fit:
        return scales
    fitted_factor = rms_step / rms_logged
    octaves = [abs(np.log2(fitted_factor / scale.factor)) for scale in scales]
    if min(octaves) > MAX_NEAR_UNIT_OCTAVES:
        scales.append(Scale("delta", name_unit(fitted_factor, units), fitted_factor))
    return scales


def round_to_known_unit_if_near(factor: float, units: Mapping[str, float]) -> float:
    """Return the known unit that is near a measured one; the measured one if none is.

    Args:
        factor: the measured unit, as its factor to meters or radians.
        units: known unit → factor to meters or radians.

    Returns:
        A factor to meters or radians.
    """
    for known_factor in units.values():
        if abs(np.log2(factor / known_factor)) <= MAX_NEAR_UNIT_OCTAVES:
            return known_factor
    return factor


def _concatenate_logged(values: Iterable[Array | None]) -> Array:
    """Concatenate the logged numbers [T, d] of all recordings that have them: [N, d] float64."""
    logged = [numbers for numbers in values if numbers is not None]
    return np.concatenate(logged).astype(np.float64)


def _measure_rms_step_m(position: Array, stretches: Stretches) -> float:
    """Compute the root mean square of the recorded displacements from step to step.

    Args:
        position: [N, 3] recorded positions, m.
        stretches: the stretches in which displacements are taken.
    """
    displacements = np.diff(position[stretches.rows], axis=1)  # [n, L, 3]
    squared_components = displacements[stretches.is_step] ** 2  # [number of real steps, 3]
    return float(np.sqrt(squared_components.sum(-1).mean()))


def fit_translations(
    recordings: Sequence[Recording],
    stretches: Stretches,
    units: Mapping[str, float] = LENGTH_UNITS,
) -> list[Fit]:
    """Compute the fit of every hypothesis about the logged translations.

    Args:
        recordings: The episodes.
        stretches: The stretches into which these episodes are cut.
        units: Units to try → factor to meters.
    """
    position = np.concatenate([r.position for r in recordings]).astype(np.float64)
    rotation = np.concatenate([r.rotation for r in recordings])
    quaternions = convert_to_quaternions_by_format(rotation)
    logged = _concatenate_logged(r.translation for r in recordings)
    recorded = _arrange_recorded_positions(position, stretches)

    rms_step_m = _measure_rms_step_m(position, stretches)
    step_s = 1 / recordings[0].rate_hz
    relative_scales = _list_possible_scales(
        stretches.select_actions(logged), rms_step_m, units, step_s
    )
    target_scales = [Scale("absolute", unit, factor) for unit, factor in units.items()]
    origin = np.zeros(3)

    fits: list[Fit] = []
    for delay in DELAYS:
        is_step = stretches.is_step[..., None]  # [n, L, 1]
        actions = logged[stretches.action_rows(delay)] * is_step  # [n, L, 3]
        # An action (x, y, z) is split into (x, 0, 0), (0, y, 0) and (0, 0, z), so that scales and
        # signs can be chosen for each part.
        diagonal = actions[..., None] * np.eye(3)  # [n, L, 3, 3]
        in_base = _TranslationReading("base", state_format=NO_INFLUENCE, delay_steps=delay)

        # Displacements along base axes, which add up from the start of each stretch.
        sums = diagonal.cumsum(1)
        fits += _fit_scales_and_signs(sums, origin, recorded, relative_scales, in_base, stretches)
        # Targets, which are compared with positions: the start plus the recorded displacement.
        fits += _fit_scales_and_signs(
            diagonal, recorded.start, recorded, target_scales, in_base, stretches
        )
        # Displacements along the axes of the end effector, for every format of its orientations.
        for state_format in list_tested_state_formats(rotation):
            orientation = quaternions[state_format][stretches.rows[:, :-1]]  # [n, L, 4]
            sums = _rotate_components_into_base_frame(orientation, diagonal).cumsum(1)
            in_ee = _TranslationReading("ee", state_format, delay)
            fits += _fit_scales_and_signs(sums, origin, recorded, relative_scales, in_ee, stretches)
    return fits


class _RecordedTranslations(NamedTuple):
    """Recorded positions, arranged by stretch.

    start         [n, 1, 3] position at the start of each stretch, m.
    displacement  [n, L, 3] displacement since the start of the stretch, m.
    motion        [U] lengths of these displacements, summed per unit of resampling, m.
    """

    start: Array
    displacement: Array
    motion: Array


def _arrange_recorded_positions(position: Array, stretches: Stretches) -> _RecordedTranslations:
    """Arrange recorded positions [N, 3] (m) by stretch."""
    start = position[stretches.rows[:, :1]]  # [n, 1, 3]
    displacement = position[stretches.rows[:, 1:]] - start  # [n, L, 3]
    motion = stretches.sum_per_resampling_unit(np.linalg.norm(displacement, axis=-1))
    return _RecordedTranslations(start, displacement, motion)


class _TranslationReading(NamedTuple):
    """What some hypotheses about translations have in common, which differ in scale and signs only.

    The fields are those of `Hypothesis`.
    """

    frame: str
    state_format: str
    delay_steps: int


def _fit_scales_and_signs(
    components: Array,
    offset: Array,
    recorded: _RecordedTranslations,
    scales: Sequence[Scale],
    reading: _TranslationReading,
    stretches: Stretches,
) -> Iterator[Fit]:
    """Compute the fits of K hypotheses, one for each scale and choice of signs.

    The hypotheses multiply the three logged components with different factors.

    Args:
        components: [n, L, 3, 3] column c is the displacement that the component c predicts if its
            factor is 1.
        offset: [3] or [n, 1, 3] is added to recorded displacements.
        recorded: the recorded positions.
        scales: the kinds and units to try.
        reading: what the hypotheses have in common.
        stretches: the stretches into which the episodes are cut.
    """
    factors = np.concatenate([SIGN_FACTORS * scale.factor for scale in scales])  # [K, 3]
    predicted = components @ factors.T  # [n, L, 3, K]
    target = offset + recorded.displacement  # [n, L, 3]
    distances = np.linalg.norm(predicted - target[..., None], axis=-2)  # [n, L, K]
    errors = stretches.sum_per_resampling_unit(np.moveaxis(distances, -1, 0))  # [K, U]

    relative_errors = _compute_pooled_relative_errors(errors, recorded.motion).tolist()

    num_steps = int(stretches.is_step.sum())
    cases = itertools.product(scales, SIGNS)
    for (scale, signs), error, relative_error in zip(cases, errors, relative_errors, strict=True):
        hypothesis = Hypothesis(
            kind=scale.kind,
            frame=reading.frame,
            unit=scale.unit,
            signs=signs,
            delay_steps=reading.delay_steps,
            state_format=reading.state_format,
            action_format=NO_INFLUENCE,
        )
        yield Fit(hypothesis, error, recorded.motion, relative_error, num_steps, scale.factor)


def _rotate_components_into_base_frame(orientation: Array, diagonal: Array) -> Array:
    """Rotate the components of actions, each on its own, from the end-effector to the base frame.

    Args:
        orientation: [n, L, 4] quaternions of the end effector.
        diagonal: [n, L, 3, 3] row c is the component c of an action along its own axis.

    Returns:
        [n, L, 3, 3], with the rotated component c in column c.
    """
    rotated_rows = quat_rotate(_to_tensor(orientation[:, :, None]), _to_tensor(diagonal))
    return rotated_rows.numpy().swapaxes(-1, -2)


def integrate_translations(recording: Recording, fit: Fit) -> Array:
    """Integrate the logged translations of a whole episode from its first state.

    Args:
        recording: The episode.
        fit: The hypothesis about the translations, with its factor.

    Returns:
        [T, 3] positions, m. For an unknown action, a target is replaced by the recorded position
        and a displacement by zero.
    """
    hypothesis = fit.hypothesis
    assert recording.translation is not None
    num_steps = len(recording.position)
    # A delay shifts the first or last actions out of the episode: these are unknown.
    action_rows = np.arange(num_steps - 1) - hypothesis.delay_steps  # [T - 1]
    is_known = (action_rows >= 0) & (action_rows < num_steps)
    existing_rows = np.where(is_known, action_rows, 0)
    logged = recording.translation[existing_rows]
    logged = logged * SIGNS[hypothesis.signs] * fit.factor  # [T - 1, 3] m

    path = np.array(recording.position, np.float64)
    if hypothesis.kind == "absolute":
        path[1:] = np.where(is_known[:, None], logged, path[1:])
        return path
    if hypothesis.frame == "ee":
        quaternions = convert_to_quaternions_by_format(recording.rotation)
        orientation = _to_tensor(quaternions[hypothesis.state_format][:-1])
        logged = quat_rotate(orientation, _to_tensor(logged)).numpy()
    known_displacements = logged * is_known[:, None]
    path[1:] = path[0] + known_displacements.cumsum(0)
    return path


class _RecordedRotations(NamedTuple):
    """Recorded orientations in every possible format of the states.

    formats       [S] names of the formats.
    orientation   [S, n, L + 1, 4] orientations along each stretch.
    motion_ee     [S, n, L, 4] rotation since the start of the stretch, in the end-effector frame.
    motion_base   [S, n, L, 4] the same rotation in the base frame.
    motion_size   [S, U] angles of these rotations, summed per unit of resampling, rad.
    rms_step_rad  root mean square of the angles from step to step.
    """

    formats: list[str]
    orientation: torch.Tensor
    motion_ee: torch.Tensor
    motion_base: torch.Tensor
    motion_size: Array
    rms_step_rad: float


def _summarize_recorded_rotations(rotation: Array, stretches: Stretches) -> _RecordedRotations:
    """Read recorded orientations [N, d] in every possible format, and arrange them by stretch."""
    quaternions = convert_to_quaternions_by_format(rotation)
    formats = list_tested_state_formats(rotation)
    orientation = torch.stack([_to_tensor(quaternions[name][stretches.rows]) for name in formats])
    inverse_start = quat_conjugate(orientation[:, :, :1])
    motion_ee = quat_multiply(inverse_start, orientation[:, :, 1:])
    motion_base = quat_multiply(orientation[:, :, 1:], inverse_start)
    # The scalar part of a rotation's quaternion is its scalar product with "no rotation".
    motion_size = stretches.sum_per_resampling_unit(_compute_angle_rad(motion_ee[..., 0].numpy()))

    single_steps = quat_multiply(quat_conjugate(orientation[:, :, :-1]), orientation[:, :, 1:])
    step_sizes = []  # one per format
    for scalar_parts in single_steps[..., 0].numpy():
        angles = _compute_angle_rad(scalar_parts)[stretches.is_step]
        step_sizes.append(np.sqrt((angles**2).mean()))
    # A wrong format makes the motion rough, so the format with the smallest steps is believed.
    rms_step_rad = float(min(step_sizes))
    return _RecordedRotations(
        formats, orientation, motion_ee, motion_base, motion_size, rms_step_rad
    )


def fit_rotations(
    recordings: Sequence[Recording],
    stretches: Stretches,
    units: Mapping[str, float] = ANGLE_UNITS,
) -> list[Fit]:
    """Compute the fit of every hypothesis about the logged rotations.

    Args:
        recordings: The episodes.
        stretches: The stretches into which these episodes are cut.
        units: Units of angles to try → factor to radians.
    """
    rotation = np.concatenate([r.rotation for r in recordings]).astype(np.float64)
    logged = _concatenate_logged(r.turn for r in recordings)
    recorded = _summarize_recorded_rotations(rotation, stretches)
    num_steps = int(stretches.is_step.sum())
    step_s = 1 / recordings[0].rate_hz
    scales = _list_rotation_scales(logged, recorded.rms_step_rad, stretches, step_s, units)
    hypotheses, logged_quaternions = _interpret_logged_rotations(logged, scales)
    fits: list[Fit] = []

    def add_fits(
        predicted: torch.Tensor,
        observed: torch.Tensor,
        frame: str,
        indices: list[int],
        delay: int,
    ) -> None:
        """Add the fits of K hypotheses in every state format to `fits`.

        Args:
            predicted: [K, n, L, 4] rotations that the hypotheses predict.
            observed: [S, n, L, 4] recorded rotations in each state format.
            frame: `Hypothesis.frame` of the fits.
            indices: [K] which of `hypotheses` these are.
            delay: `Hypothesis.delay_steps` of the fits.
        """
        # The scalar product of two quaternions gives the angle between the rotations.
        angles = _compute_angle_rad(torch.einsum("knlc,snlc->sknl", predicted, observed).numpy())
        errors = stretches.sum_per_resampling_unit(angles)  # [S, K, U] rad
        for s, state_format in enumerate(recorded.formats):
            motion = recorded.motion_size[s]
            relative_errors = _compute_pooled_relative_errors(errors[s], motion).tolist()
            for k, index in enumerate(indices):
                hypothesis = hypotheses[index]._replace(
                    frame=frame, delay_steps=delay, state_format=state_format
                )
                fits.append(Fit(hypothesis, errors[s, k], motion, relative_errors[k], num_steps))

    # Indices in `hypotheses`: by which logged rotations are changes, and by which they are targets.
    change_indices: list[int] = []
    target_indices: list[int] = []
    for index, hypothesis in enumerate(hypotheses):
        indices = target_indices if hypothesis.kind == "absolute" else change_indices
        indices.append(index)
    for delay in DELAYS:
        action_rows = stretches.action_rows(delay)
        deltas = logged_quaternions[change_indices][:, action_rows]  # [K, n, L, 4]
        about_ee, about_base = _integrate_about_ee_and_base(deltas)
        add_fits(about_ee, recorded.motion_ee, "ee", change_indices, delay)
        add_fits(about_base, recorded.motion_base, "base", change_indices, delay)
        target = logged_quaternions[target_indices][:, action_rows]  # [K, n, L, 4]
        add_fits(target, recorded.orientation[:, :, 1:], "base", target_indices, delay)
        has_angles = rotation.shape[1] == 3 and logged.shape[1] == 3
        if has_angles:
            fits += _fit_added_angles(rotation, logged, recorded, scales, stretches, delay)
    return fits


def _list_rotation_scales(
    logged: Array,
    rms_step_rad: float,
    stretches: Stretches,
    step_s: float,
    units: Mapping[str, float],
) -> list[Scale]:
    """List the kinds and units that logged rotations [N, d] may have.

    Args:
        logged: [N, d] logged rotations.
        rms_step_rad: root mean square of the recorded rotations from step to step.
        stretches: the stretches whose steps are compared.
        step_s: duration of a step, s.
        units: units of angles to try → factor to radians.
    """
    if logged.shape[1] != 3:
        return [Scale("delta", UNIT_QUATERNION, 1.0), Scale("absolute", UNIT_QUATERNION, 1.0)]
    logged_in_steps = stretches.select_actions(logged)
    scales = _list_possible_scales(logged_in_steps, rms_step_rad, units, step_s)
    scales += [Scale("absolute", unit, factor) for unit, factor in units.items()]
    return scales


def _integrate_about_ee_and_base(deltas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compose rotations along each stretch.

    Args:
        deltas: [K, n, L, 4] rotation of each step.

    Returns:
        Rotations since the start of the stretch, twice [K, n, L, 4]: if each step rotates about
        the axes of the end effector, and if it rotates about the axes of the base.
    """
    about_ee = [deltas[:, :, 0]]
    about_base = [deltas[:, :, 0]]
    for step in range(1, MAX_STRETCH_STEPS):
        about_ee.append(quat_multiply(about_ee[-1], deltas[:, :, step]))
        about_base.append(quat_multiply(deltas[:, :, step], about_base[-1]))
    return torch.stack(about_ee, 2), torch.stack(about_base, 2)


def _compute_angle_rad(scalar_product: Array) -> Array:
    """Compute the angle between two orientations from their quaternions' scalar product."""
    return 2 * np.arccos(np.minimum(np.abs(scalar_product), 1))


def _interpret_logged_rotations(
    logged: Array, scales: Sequence[Scale]
) -> tuple[list[Hypothesis], torch.Tensor]:
    """List the hypotheses about logged rotations and convert the rotations by each of them.

    The hypotheses differ in scale, format of the actions, and signs. Frame, delay and state format
    are placeholders.

    Args:
        logged: [N, d] logged rotations.
        scales: the kinds and units to try.

    Returns:
        K hypotheses, and [K, N, 4], the quaternions of the logged rotations by each hypothesis.
    """
    hypotheses: list[Hypothesis] = []
    quaternions: list[torch.Tensor] = []  # [8, N, 4] each: one row per choice of signs
    for scale, action_format in itertools.product(scales, _list_possible_formats(logged)):
        if logged.shape[1] == 3:
            signed = logged * scale.factor * SIGN_FACTORS[:, None]  # [8, N, 3]
            rotations = _to_quaternions(action_format, _to_tensor(signed))
        else:
            # These formats have no unit (their factor is 1), so nothing is scaled. The signs apply
            # to the vector part of the quaternions; the scalar part is kept.
            signs_of_quaternion = np.insert(SIGN_FACTORS, 0, 1, axis=1)  # [8, 4]
            rotations = _to_quaternions(action_format, _to_tensor(logged))  # [N, 4]
            rotations = rotations * _to_tensor(signs_of_quaternion[:, None])  # [8, N, 4]
        for signs in SIGNS:
            hypotheses.append(
                Hypothesis(
                    kind=scale.kind,
                    frame="base",
                    unit=scale.unit,
                    signs=signs,
                    delay_steps=0,
                    state_format=NO_INFLUENCE,
                    action_format=action_format,
                )
            )
        quaternions.append(rotations)
    return hypotheses, torch.cat(quaternions)


def _fit_added_angles(
    rotation: Array,
    logged: Array,
    recorded: _RecordedRotations,
    scales: Sequence[Scale],
    stretches: Stretches,
    delay: int,
) -> Iterator[Fit]:
    """Fit the hypotheses by which logged angles are added to the recorded angles one by one.

    Args:
        rotation: [N, 3] recorded angles.
        logged: [N, 3] logged angles.
        recorded: the recorded orientations.
        scales: the kinds and units to try; targets ("absolute") are left out.
        stretches: the stretches into which the episodes are cut.
        delay: `Hypothesis.delay_steps` of the fits.

    Yields:
        One fit per scale, state format and choice of signs.
    """
    state_unit = guess_recorded_unit(rotation)
    angles = rotation * ANGLE_UNITS[state_unit]  # [N, 3] rad
    start = angles[stretches.rows[:, :1]]  # [n, 1, 3]
    steps = logged[stretches.action_rows(delay)] * stretches.is_step[..., None]  # [n, L, 3]
    total = steps.cumsum(1)  # [n, L, 3], in the logged unit
    tested_scales = [scale for scale in scales if scale.kind != "absolute"]
    scale_factors = np.array([scale.factor for scale in tested_scales])
    factors = SIGN_FACTORS * scale_factors[:, None, None]  # [scales, 8, 3]
    reached = _to_tensor(start + total * factors[:, :, None, None])  # [scales, 8, n, L, 3] rad

    scalar_products = []  # per state format: [scales, 8, n, L]
    for name, orientation in zip(recorded.formats, recorded.orientation, strict=True):
        predicted = _to_quaternions(name, reached)  # [scales, 8, n, L, 4]
        scalar_products.append((predicted * orientation[:, 1:]).sum(-1))
    angles_rad = _compute_angle_rad(torch.stack(scalar_products, 1).numpy())  # [scales, S, 8, n, L]
    errors = stretches.sum_per_resampling_unit(angles_rad)  # [scales, S, 8, U]
    relative_errors = _compute_pooled_relative_errors(errors, recorded.motion_size[:, None])

    num_steps = int(stretches.is_step.sum())
    cases = itertools.product(
        enumerate(tested_scales), enumerate(recorded.formats), enumerate(SIGNS)
    )
    for (k, scale), (s, name), (i, signs) in cases:
        hypothesis = Hypothesis(
            kind=scale.kind,
            frame="angles",
            unit=scale.unit,
            signs=signs,
            delay_steps=delay,
            state_format=name,
            action_format=name,
        )
        error = errors[k, s, i]
        relative_error = float(relative_errors[k, s, i])
        yield Fit(hypothesis, error, recorded.motion_size[s], relative_error, num_steps)
