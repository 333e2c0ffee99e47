"""Some or all actions are executed twice."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Doubt,
    Finding,
    Result,
    compute_confidence_of_margin,
)
from spear.checks.rollout.motion import RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import draw_move_gains

# A move that achieves between these multiples of its command was executed twice.
MIN_TWICE_GAIN = 1.7
MAX_TWICE_GAIN = 2.3
# A move that achieves between these multiples was executed once.
MIN_ONCE_GAIN = 0.8
MAX_ONCE_GAIN = 1.2
# Share of the moves that are executed twice; below 0.01 in rollouts of nano.
MIN_REPEATED_SHARE = 0.08
CERTAIN_REPEATED_SHARE = 0.2
MIN_EXPLAINED_SHARE = 0.7  # share of the moves that are executed once or twice


class ActionsRepeatedCheck(MotionCheck):
    """Finds moves that go twice as far as commanded."""

    fault = "actions-repeated"
    title = "actions are executed twice"
    causes: ClassVar[frozenset[str]] = frozenset({"seam-jumps", "gripper-late"})

    def examine_motion(self, motion: RolloutMotion) -> Result:
        by_times = self._examine_two_action_moves(motion)
        if by_times is not None:
            return by_times
        if motion.typical_num_executed > 1:
            return Doubt("the robot executes several actions per observation")
        if motion.other_rate is not None:
            return None
        if motion.gain_of_short_commands > MAX_TWICE_GAIN:
            return None  # another unit, whose longer moves the robot cuts
        gains = motion.move_gains[motion.is_move_commanded]
        repeated_share = np.mean((gains > MIN_TWICE_GAIN) & (gains < MAX_TWICE_GAIN))
        once_share = np.mean((gains > MIN_ONCE_GAIN) & (gains < MAX_ONCE_GAIN))
        if repeated_share < MIN_REPEATED_SHARE:
            return None
        if repeated_share + once_share < MIN_EXPLAINED_SHARE:
            return Doubt(
                f"{repeated_share:.0%} of the moves go twice as far as commanded, but many others "
                "neither once nor twice",
                is_suspicion=True,
            )
        return Finding(
            confidence=compute_confidence_of_margin(
                float(repeated_share), MIN_REPEATED_SHARE, CERTAIN_REPEATED_SHARE
            ),
            evidence=(
                f"{repeated_share:.0%} of {len(gains)} moves go twice as far as commanded, "
                f"{once_share:.0%} once"
            ),
            cure="send each action once: two threads, or a retry after a timeout, send it again",
            file="the control loop of your robot",
            figure=draw_move_gains(motion),
        )

    @staticmethod
    def _examine_two_action_moves(motion: RolloutMotion) -> Finding | None:
        """Look for moves of two actions' time in which the arm executes the first action twice."""
        fit = motion.repeated_fit
        if fit is None:
            return None
        return Finding(
            confidence=0.95,
            evidence=(
                f"{fit.num_moves} of {len(motion.achieved)} moves take two actions' time. The "
                f"first action, twice, explains all but {fit.error:.0%} of them; the first two "
                f"actions, all but {fit.plain_error:.0%}"
            ),
            cure="send each action once: two threads, or a retry after a timeout, send it again",
            file="the control loop of your robot",
            figure=draw_move_gains(motion),
        )
