"""The motion jumps from one chunk to the next."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spear.checks.rollout.case import (
    Case,
    Curve,
    Doubt,
    Figure,
    Finding,
    Result,
    RolloutCheck,
    compute_confidence_of_margin,
)
from spear.checks.rollout.motion import MIN_MOVES, RolloutMotion, is_other_surely_better
from spear.checks.rollout.motion_figures import draw_unexplained_shares
from spear.types import Array

# Mean difference of a chunk's first action from what the chunk before it planned for that time,
# divided by the mean difference of neighboring actions within chunks. In rollouts of nano it is
# 0.6, 0.8 and 1.6 for the replan intervals 1, 2 and 4.
MIN_JUMP_RATIO = 3.0
CERTAIN_JUMP_RATIO = 5.0
# With each chunk, an arm may first go back by what the last actions of the chunk before commanded,
# times a factor: at -1 it goes back all of it. A factor in this range is a return.
MIN_RETURN_FACTOR = -2.0
MAX_RETURN_FACTOR = -0.4
# Share of the motion that chunks with a return must explain more than chunks alone.
MIN_RETURN_ADVANTAGE = 0.1
# Achieved displacement divided by commanded displacement, without the return. An arm with a smaller
# quotient has another fault.
MIN_RETURN_GAIN = 0.5
MAX_DRAWN_SEAMS = 150  # seams that the figure shows


class SeamJumpsCheck(RolloutCheck):
    """Finds chunks that do not continue the ones before them."""

    fault = "seam-jumps"
    title = "the motion jumps from chunk to chunk"

    def examine(self, case: Case) -> Result:
        return self._examine_returns(case.motion) or self._examine_continuity_of_chunks(case)

    def _examine_returns(self, motion: RolloutMotion) -> Finding | None:
        """Look for an arm that goes back at the beginning of each chunk."""
        # If the arm follows another reading of the commands, `action_frame` or `translation_unit`
        # names that fault, and a fit of the right reading would mean nothing.
        if motion.num_commanded_moves < MIN_MOVES or motion.better_reading is not None:
            return None
        best_return = find_return_at_seams(motion)
        if best_return is None:
            return None
        return Finding(
            confidence=0.85,
            evidence=(
                f"with each chunk the arm goes back {-best_return.factor:.0%} of what the last "
                f"{best_return.num_actions} actions of the chunk before it commanded: that "
                f"explains all but {best_return.error:.0%} of the motion, the chunks alone all but "
                f"{best_return.plain_error:.0%}"
            ),
            cure="add each chunk to the pose of its own observation, not to an older one",
            file="where your robot's client turns actions into target poses",
            figure=draw_unexplained_shares(
                {"chunks alone": best_return.plain_error, "with a return": best_return.error}
            ),
        )

    def _examine_continuity_of_chunks(self, case: Case) -> Result:
        """Look for answers that do not continue the ones before them."""
        num_executed = case.motion.num_executed_by_motion or case.motion.typical_num_executed
        jumps_m: list[Array] = []  # of each episode, at the seam between answers
        changes_m: list[Array] = []  # of each episode, from one action of an answer to its next
        for episode in case.rollout:
            if episode.served is None or episode.served.chunks.shape[1] < 2:
                continue
            translation = episode.served.chunks[:, :, :3].astype(np.float64)
            planned_step = min(num_executed, translation.shape[1] - 1)
            jump = translation[1:, 0] - translation[:-1, planned_step]
            jumps_m.append(np.linalg.norm(jump, axis=1))
            change = np.diff(translation, axis=1)
            changes_m.append(np.linalg.norm(change, axis=2).ravel())
        if sum(map(len, jumps_m)) < MIN_MOVES:
            return Doubt("the rollout has too few chunks of several actions")
        jump_m = float(np.concatenate(jumps_m).mean())
        change_m = float(np.concatenate(changes_m).mean())
        ratio = jump_m / max(change_m, 1e-6)
        if ratio < MIN_JUMP_RATIO:
            return None
        all_jumps_mm = 1000 * np.concatenate(jumps_m)[:MAX_DRAWN_SEAMS]
        seams = np.arange(len(all_jumps_mm))
        return Finding(
            confidence=compute_confidence_of_margin(ratio, MIN_JUMP_RATIO, CERTAIN_JUMP_RATIO),
            evidence=(
                f"a chunk begins {1000 * jump_m:.1f} mm per action away from what the chunk before "
                f"planned; within chunks, neighboring actions differ by {1000 * change_m:.1f} mm"
            ),
            cure="execute in the mode rtc or async, replan earlier, or send no seed that changes",
            file="the execution mode and the replan interval of your robot's client",
            figure=Figure(
                "jump at each seam, mm per action",
                "seam",
                [
                    Curve("jump", seams, all_jumps_mm),
                    Curve("within chunks", seams, np.full(len(seams), 1000 * change_m)),
                ],
            ),
        )


class ReturnFit(NamedTuple):
    """How well a return at the beginning of each chunk explains the moves.

    num_actions  how many of the last actions of the chunk before are undone.
    factor       displacement of the return divided by what these actions commanded; at -1 the arm
                 goes back all of it.
    error        share of the motion that stays unexplained.
    plain_error  the same without a return.
    """

    num_actions: int
    factor: float
    error: float
    plain_error: float


def find_return_at_seams(motion: RolloutMotion) -> ReturnFit | None:
    """Find how the arm goes back at the beginning of each chunk; None if it surely does not.

    A return must explain the moves surely better than the chunks alone.
    """
    num_executed = motion.typical_num_executed
    # Compare each move with the chunk of the move before it, in the same episode: M pairs.
    is_pair = motion.episode[1:] == motion.episode[:-1]
    if is_pair.sum() < MIN_MOVES:
        return None
    commanded = motion.commanded[1:, num_executed - 1][is_pair]  # [M, 3]
    achieved = motion.achieved[1:][is_pair]  # [M, 3]
    # [M, H, 3] displacement of the first 1, 2, … H actions of the chunk before
    previous = motion.commanded[:-1][is_pair]
    lengths_m = np.linalg.norm(achieved, axis=1)
    _, plain_m = _fit_factors_and_errors(achieved, [commanded])
    best = None
    for num_actions in range(1, num_executed + 1):
        # The displacement of the last `num_actions` executed actions: that of all executed ones,
        # without that of the earlier ones.
        last_actions = previous[:, num_executed - 1]
        num_earlier = num_executed - num_actions
        if num_earlier > 0:
            last_actions = last_actions - previous[:, num_earlier - 1]
        (gain, factor), errors_m = _fit_factors_and_errors(achieved, [commanded, last_actions])
        error = float(errors_m.mean() / max(lengths_m.mean(), 1e-9))
        if best is not None and error >= best.error:
            continue
        is_return = MIN_RETURN_FACTOR < factor < MAX_RETURN_FACTOR and gain > MIN_RETURN_GAIN
        if is_return and is_other_surely_better(plain_m, errors_m, lengths_m, MIN_RETURN_ADVANTAGE):
            plain_error = float(plain_m.mean() / max(lengths_m.mean(), 1e-9))
            best = ReturnFit(num_actions, float(factor), error, plain_error)
    return best


def _fit_factors_and_errors(achieved: Array, components: Sequence[Array]) -> tuple[Array, Array]:
    """Fit one factor to each component [N, 3] of a motion [N, 3].

    Returns:
        The factors, and [N] the distances between the fitted and the achieved motion.
    """
    columns = np.stack([component.ravel() for component in components], axis=1)
    factors = np.linalg.lstsq(columns, achieved.ravel(), rcond=None)[0]
    errors = np.linalg.norm(achieved - (columns @ factors).reshape(-1, 3), axis=1)
    return factors, errors
