"""The robot takes rotations in another unit."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import Case, Curve, Doubt, Figure, Finding, Result, RolloutCheck
from spear.checks.rollout.motion import MAX_TURN_AXIS_RAD, MIN_MOVES, SMALL_COMMAND_QUANTILE

# Median achieved rotation, as a multiple of the median commanded one (nano: 0.99 … 1.02).
MIN_TURN_RATIO = 2.5  # degrees taken for radians are 57 times too large, before limits of the robot
MAX_UNIT_GAIN = 0.06  # radians taken for degrees are 57 times too small
MIN_TRANSLATION_GAIN = 0.3  # an arm that hardly moves at all is another fault


class AngleUnitCheck(RolloutCheck):
    """Finds rotations that are executed many times too far, or hardly at all."""

    fault = "angle-unit"
    title = "the robot takes rotations in another unit"
    causes: ClassVar[frozenset[str]] = frozenset({"action-frame", "quaternion-order"})

    def examine(self, case: Case) -> Result:
        motion = case.motion
        num_turning = int(motion.is_turn_commanded.sum())
        if num_turning < MIN_MOVES:
            return Doubt(f"only {num_turning} moves rotate far enough")
        gain = motion.turn_gain
        translation_gain = float(np.nan_to_num(np.nanquantile(motion.move_gains, 0.75)))
        if translation_gain < MIN_TRANSLATION_GAIN:
            return Doubt("the arm hardly moves along its commands")
        commanded = np.degrees(
            np.linalg.norm(motion.commanded_turn[motion.is_turn_commanded], axis=1)
        )
        achieved = np.degrees(np.linalg.norm(motion.turn[motion.is_turn_commanded], axis=1))
        ratio = float(np.median(achieved) / np.median(commanded))
        # Single actions may be lost, so nearly all rotations must be small.
        is_too_near = np.quantile(achieved, 0.8) < MAX_UNIT_GAIN * np.median(commanded)
        # A robot that limits its turns, or one that turns by more than half a turn, does not turn
        # along its commands, but too far.
        is_small = commanded <= np.quantile(commanded, SMALL_COMMAND_QUANTILE)
        small_ratio = float(np.median(achieved[is_small]) / np.median(commanded[is_small]))
        is_along = motion.turn_axis_errors_rad["plain"] < MAX_TURN_AXIS_RAD
        is_far = ratio > MIN_TURN_RATIO or (is_along and small_ratio > MIN_TURN_RATIO)
        is_too_far = is_far and motion.better_turn_reading is None
        if not is_too_near and not is_too_far:
            return None
        moves = np.arange(num_turning)
        return Finding(
            confidence=0.9 if is_too_near else 0.75,
            evidence=(
                f"the arm rotates by {np.median(achieved):.2g}° where {np.median(commanded):.2g}° "
                f"are commanded (medians of {num_turning} moves), {gain:.2g} of it along them"
            ),
            cure=(
                "convert radians to the unit of the robot's controller, once; if the state is "
                "computed from joint angles, check their signs, zeros and unit first"
            ),
            file=ROBOT_FILE,
            figure=Figure(
                "rotation per move, degrees",
                "move",
                [Curve("commanded", moves, commanded), Curve("achieved", moves, achieved)],
            ),
        )
