"""The robot takes rotations in another unit."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Curve, Doubt, Figure, Finding, Result, RolloutCheck
from spear.checks.rollout.motion import MIN_MOVES

MIN_UNIT_GAIN = 8.0  # degrees taken for radians are 57 times too large (nano: 0.99 … 1.02)
MAX_UNIT_GAIN = 0.06  # radians taken for degrees are 57 times too small
MIN_TRANSLATION_GAIN = 0.3  # an arm that hardly moves at all is another fault


class AngleUnitCheck(RolloutCheck):
    """Finds rotations that are executed many times too far, or hardly at all."""

    fault = "angle-unit"
    title = "the robot takes rotations in another unit"
    causes: ClassVar[frozenset[str]] = frozenset({"action-frame", "quaternion-order"})

    def examine(self, case: Case) -> Result:
        motion = case.motion
        num_turning = int(motion.is_turning.sum())
        if num_turning < MIN_MOVES:
            return Doubt(f"only {num_turning} moves rotate far enough")
        gain = motion.turn_gain
        translation_gain = float(np.nan_to_num(np.nanmedian(motion.step_gains)))
        if MAX_UNIT_GAIN < gain < MIN_UNIT_GAIN or translation_gain < MIN_TRANSLATION_GAIN:
            return None
        commanded = np.degrees(np.linalg.norm(motion.command_turn[motion.is_turning], axis=1))
        achieved = np.degrees(np.linalg.norm(motion.turn[motion.is_turning], axis=1))
        if gain <= MAX_UNIT_GAIN and np.median(achieved) > 0.5 * np.median(commanded):
            return None  # it rotates, but otherwise
        moves = np.arange(num_turning)
        return Finding(
            confidence=0.9,
            evidence=(
                f"the arm rotates {gain:.3g} times as far as commanded (median of {num_turning} "
                f"moves: {np.median(achieved):.2g}° for {np.median(commanded):.2g}°)"
            ),
            cure="convert radians to the unit of the robot's controller, once",
            file=ROBOT_FILE,
            figure=Figure(
                "rotation per move, degrees",
                "move",
                [Curve("commanded", moves, commanded), Curve("achieved", moves, achieved)],
            ),
        )
