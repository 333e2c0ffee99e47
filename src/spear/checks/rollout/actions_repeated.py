"""Some or all actions are executed twice."""

from typing import ClassVar

import numpy as np

from spear.checks.rollout.case import (
    Doubt,
    Finding,
    Result,
    confidence_of_margin,
)
from spear.checks.rollout.motion import (
    MAX_READING_ERROR,
    MIN_COMMAND_M,
    MIN_MOVES,
    CommandedMotion,
    is_surely_better,
)
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import draw_step_gains

# A move that achieves between these multiples of its command was executed twice.
MIN_TWICE_GAIN = 1.7
MAX_TWICE_GAIN = 2.3
# A move that achieves between these multiples was executed once.
MIN_ONCE_GAIN = 0.8
MAX_ONCE_GAIN = 1.2
# Share of the moves that are executed twice; below 0.01 in rollouts of nano.
MIN_REPEATED_SHARE = 0.08
CERTAIN_REPEATED_SHARE = 0.2
# In a move that takes two actions' time, the arm executes the first two actions, or the first one
# twice. The latter must explain this share of the motion more than the former. (The first two
# actions of robots without faults leave a share of 0.06 unexplained.)
MIN_TWICE_ADVANTAGE = 0.1
MIN_EXPLAINED_SHARE = 0.7  # share of the moves that are executed once or twice


class ActionsRepeatedCheck(MotionCheck):
    """Finds moves that go twice as far as commanded."""

    fault = "actions-repeated"
    title = "actions are executed twice"
    causes: ClassVar[frozenset[str]] = frozenset({"seam-jumps", "gripper-late"})

    def examine_motion(self, motion: CommandedMotion) -> Result:
        by_times = self._examine_two_action_moves(motion)
        if by_times is not None:
            return by_times
        if motion.typical_num_executed > 1:
            return Doubt("the robot executes several actions per observation")
        if motion.better_reading is not None or motion.other_rate is not None:
            return None
        if motion.small_gain > MAX_TWICE_GAIN:
            return None  # another unit, whose longer moves the robot cuts
        gains = motion.step_gains[motion.is_moving]
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
            confidence=confidence_of_margin(
                float(repeated_share), MIN_REPEATED_SHARE, CERTAIN_REPEATED_SHARE
            ),
            evidence=(
                f"{repeated_share:.0%} of {len(gains)} moves go twice as far as commanded, "
                f"{once_share:.0%} once"
            ),
            cure="send each action once: two threads, or a retry after a timeout, send it again",
            file="the control loop of your robot",
            figure=draw_step_gains(motion),
        )

    @staticmethod
    def _examine_two_action_moves(motion: CommandedMotion) -> Finding | None:
        """Look for moves of two actions' time in which the arm executes the first action twice."""
        if motion.commanded.shape[1] < 2:
            return None
        first = motion.commanded[:, 0]
        is_double = (motion.num_executed == 2) & (np.linalg.norm(first, axis=1) > MIN_COMMAND_M)
        if is_double.sum() < MIN_MOVES or not np.isfinite(motion.seconds).all():
            return None
        achieved = motion.achieved[is_double]
        lengths_m = np.linalg.norm(achieved, axis=1)
        # How far each move is from the first two actions, and from the first action twice
        two_errors_m = np.linalg.norm(achieved - motion.commanded[is_double, 1], axis=1)
        twice_errors_m = np.linalg.norm(achieved - 2 * first[is_double], axis=1)
        twice_error = twice_errors_m.mean() / max(lengths_m.mean(), 1e-9)
        is_twice = is_surely_better(two_errors_m, twice_errors_m, lengths_m, MIN_TWICE_ADVANTAGE)
        if not is_twice or twice_error > MAX_READING_ERROR:
            return None
        two_error = two_errors_m.mean() / max(lengths_m.mean(), 1e-9)
        return Finding(
            confidence=0.95,
            evidence=(
                f"{is_double.sum()} of {len(is_double)} moves take two actions' time. The first "
                f"action, twice, explains all but {twice_error:.0%} of them; the first two "
                f"actions, all but {two_error:.0%}"
            ),
            cure="send each action once: two threads, or a retry after a timeout, send it again",
            file="the control loop of your robot",
            figure=draw_step_gains(motion),
        )
