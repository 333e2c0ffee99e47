"""The controller does not reach what it is commanded."""

import numpy as np

from spear.checks.rollout.action_frame import ROBOT_FILE
from spear.checks.rollout.case import (
    Doubt,
    Finding,
    Result,
    compute_confidence_of_margin,
)
from spear.checks.rollout.motion import RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import draw_move_gains
from spear.checks.rollout.translation_unit import MAX_UNIT_GAIN

# The median share of commanded displacements that the arm achieves. In rollouts of nano in the
# simulator it is 0.98 to 1.01.
MAX_SHORT_GAIN = 0.85  # below it, the controller is short
CERTAIN_SHORT_GAIN = 0.6  # at this and below it, the controller is surely short
MAX_DOUBTFUL_GAIN = 0.92  # between this and `MAX_SHORT_GAIN` there is no verdict
MIN_TYPICAL_SHARE = 0.4  # share of moves that must be short; otherwise single actions are lost
MAX_QUARTILE_RANGE = 0.35  # of the achieved shares; an arm that is blocked at times has more
FULL_GAIN = 0.9  # a move that achieves more than this is not short


class ControllerShortCheck(MotionCheck):
    """Finds arms that move in the commanded direction, but less far."""

    fault = "controller-short"
    title = "the controller does not reach what it is commanded"

    def examine_motion(self, motion: RolloutMotion) -> Result:
        gains = motion.move_gains[motion.is_move_commanded]
        gain = float(np.median(gains))
        if motion.better_reading is not None or gain > MAX_DOUBTFUL_GAIN or gain < MAX_UNIT_GAIN:
            return None
        if np.mean(gains < FULL_GAIN) < MIN_TYPICAL_SHARE:
            return None
        low, high = np.quantile(gains, [0.25, 0.75])
        if high - low > MAX_QUARTILE_RANGE:
            return Doubt("the arm is blocked in some moves, so its controller cannot be judged")
        if gain > MAX_SHORT_GAIN:
            return Doubt(f"the arm achieves {gain:.0%} of the commands", is_suspicion=True)
        return Finding(
            confidence=compute_confidence_of_margin(-gain, -MAX_SHORT_GAIN, -CERTAIN_SHORT_GAIN),
            evidence=(
                f"the arm achieves {gain:.0%} of the commanded displacements (half of the "
                f"{len(gains)} moves between {low:.0%} and {high:.0%})"
            ),
            cure=(
                "send targets that are relative to the last target instead of the measured pose; "
                "if they are, give the controller more time per action, or make it stiffer"
            ),
            file=ROBOT_FILE,
            figure=draw_move_gains(motion),
        )
