"""The robot takes translations in another unit."""

from dataclasses import replace
from typing import ClassVar

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Finding, Result
from spear.checks.rollout.motion import MAX_READING_ERROR, RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import draw_move_gains
from spear.checks.rollout.targets import SCALES, find_changed_targets
from spear.checks.states import explain_implausible_positions

# Factors between commanded and achieved displacements. In rollouts of nano they are 0.98 to 1.03.
MIN_UNIT_GAIN = 2.6  # actions that are executed twice have 2
MIN_TYPICAL_GAIN = 1.5  # of the median move
MAX_UNIT_GAIN = 0.2  # a controller that is short achieves more
UPPER_QUANTILE = 0.8  # of the gains, which must be small for an arm that hardly moves


class TranslationUnitCheck(MotionCheck):
    """Finds translations that are executed many times too far, or hardly at all."""

    fault = "translation-unit"
    title = "the robot takes translations in another unit"
    causes: ClassVar[frozenset[str]] = frozenset(
        {
            "controller-short",
            "gripper-late",
            "seam-jumps",
            "start-outside",
        }
    )

    def examine(self, case: Case) -> Result:
        result = super().examine(case)
        if not isinstance(result, Finding):
            return result
        remark = explain_implausible_positions([episode.position for episode in case.rollout])
        if remark is None:
            return result
        return replace(
            result,
            evidence=f"{result.evidence}; {remark}",
            cure="send positions in meters as the state",
            file=f"observe in your robot's file, and {ROBOT_FILE}",
        )

    def examine_motion(self, motion: RolloutMotion) -> Result:
        targets = find_changed_targets(motion)
        if targets is not None and targets.change in SCALES:
            return Finding(
                confidence=0.95,
                evidence=(
                    f"in {targets.share:.0%} of {targets.num_moves} moves the arm goes to points "
                    f"that are {targets.change}, and in {targets.plain_share:.0%} to its targets"
                ),
                cure="convert meters to the unit of the robot's controller, and nothing else",
                file=ROBOT_FILE,
                figure=draw_move_gains(motion),
            )
        motion = motion.with_likely_actions
        # Does the arm hardly move, both along its commands and in any direction?
        is_too_near = np.nanquantile(motion.move_gains, UPPER_QUANTILE) < MAX_UNIT_GAIN
        achieved_m = np.linalg.norm(motion.achieved[motion.is_move_commanded], axis=1)
        commanded_m = np.linalg.norm(
            motion.commanded_displacement[motion.is_move_commanded], axis=1
        )
        is_still = np.quantile(achieved_m / commanded_m, UPPER_QUANTILE) < MAX_UNIT_GAIN

        # Or does it move too far? Limits cut moves, but another unit still makes most of them too
        # long.
        fit = motion.likely_reading
        gain = motion.gain_of_short_commands
        is_free = motion.is_free
        is_mostly_too_far = np.median(motion.move_gains[is_free]) > MIN_TYPICAL_GAIN
        is_explained = fit.error < MAX_READING_ERROR
        is_too_far = is_explained and is_mostly_too_far and gain > MIN_UNIT_GAIN
        if not is_too_far and not (is_too_near and is_still):
            return None
        return Finding(
            confidence=0.95 if is_too_far else 0.85,
            evidence=(
                f"the arm moves {gain:.3g} times as far as commanded (median of "
                f"{motion.num_commanded_moves} moves)"
            ),
            cure="convert meters to the unit of the robot's controller, and nothing else",
            file=ROBOT_FILE,
            figure=draw_move_gains(motion),
        )
