"""Some actions are never executed."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Case,
    Doubt,
    Finding,
    Result,
    RolloutCheck,
    confidence_of_margin,
)
from spear.checks.rollout.motion import MIN_MOVES
from spear.checks.rollout.motion_figures import draw_step_gains

MAX_DROPPED_GAIN = 0.15  # a move that achieves less than this share was not executed
FULL_GAIN = 0.8  # a move that achieves more than this share was executed
# Share of the moves that are not executed and lie between two that are. In rollouts of nano it is
# below 0.03.
MIN_DROPPED_SHARE = 0.08
CERTAIN_DROPPED_SHARE = 0.2
MIN_FULL_SHARE = 0.4  # share of the moves that must be executed fully


class ActionsDroppedCheck(RolloutCheck):
    """Finds single moves in which the arm stands still although it is commanded to move."""

    fault = "actions-dropped"
    title = "some actions are not executed"
    causes: ClassVar[frozenset[str]] = frozenset({"controller-short", "gripper-late"})

    def examine(self, case: Case) -> Result:
        motion = case.motion
        if motion.num_moving < MIN_MOVES:
            return Doubt(f"only {motion.num_moving} moves are long enough")
        if motion.typical_executed > 1:
            return Doubt("the robot executes several actions per observation")
        if motion.better_reading is not None:
            return None
        gains = motion.step_gains
        is_dropped = gains < MAX_DROPPED_GAIN  # False for NaN
        is_full = gains > FULL_GAIN
        # A dropped action lies between two executed ones. A blocked arm stands still for longer.
        is_between = np.zeros(len(gains), bool)
        is_between[1:-1] = is_full[:-2] & is_full[2:]
        num_dropped = int((is_dropped & is_between).sum())
        share = num_dropped / motion.num_moving
        full_share = is_full.sum() / motion.num_moving
        if share < MIN_DROPPED_SHARE or full_share < MIN_FULL_SHARE:
            return None
        return Finding(
            confidence=confidence_of_margin(share, MIN_DROPPED_SHARE, CERTAIN_DROPPED_SHARE),
            evidence=(
                f"in {num_dropped} of {motion.num_moving} moves the arm stands still, and in "
                f"{full_share:.0%} it achieves the whole command"
            ),
            cure="find where commands are lost: a full queue, a timeout, or two clients at once",
            file="the control loop of your robot",
            figure=draw_step_gains(motion),
        )
