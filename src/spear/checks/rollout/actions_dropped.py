"""Some actions are never executed."""

from typing import ClassVar

from spear.checks.rollout.case import (
    Doubt,
    Finding,
    Result,
    compute_confidence_of_margin,
)
from spear.checks.rollout.motion import RolloutMotion
from spear.checks.rollout.motion_check import MotionCheck
from spear.checks.rollout.motion_figures import draw_move_gains
from spear.types import Array

MAX_DROPPED_GAIN = 0.15  # a move that achieves less than this share was not executed
FULL_GAIN = 0.8  # a move that achieves more than this share was executed
# How often the arm stops and goes on (`_count_stops_between_full_moves`), divided by the number of
# moves. In rollouts of nano it is below 0.03.
MIN_DROPPED_SHARE = 0.08
CERTAIN_DROPPED_SHARE = 0.2
MIN_FULL_SHARE = 0.25  # at least this share of the moves must have been executed
MAX_PARTIAL_SHARE = 0.3  # at most this share may be neither executed nor dropped


class ActionsDroppedCheck(MotionCheck):
    """Finds single moves in which the arm stands still although it is commanded to move."""

    fault = "actions-dropped"
    title = "some actions are not executed"
    causes: ClassVar[frozenset[str]] = frozenset({"controller-short", "gripper-late"})

    def examine_motion(self, motion: RolloutMotion) -> Result:
        if motion.typical_num_executed > 1:
            return Doubt("the robot executes several actions per observation")
        gains = motion.move_gains
        is_dropped = gains < MAX_DROPPED_GAIN  # False for NaN
        is_full = gains > FULL_GAIN
        # An arm that drops actions stops and goes on again and again. A blocked one stops once.
        num_stops = _count_stops_between_full_moves(is_full, is_dropped, motion.episode)
        share = num_stops / motion.num_commanded_moves
        full_share = is_full.sum() / motion.num_commanded_moves
        partial_share = 1 - full_share - is_dropped.sum() / motion.num_commanded_moves
        if share < MIN_DROPPED_SHARE or full_share < MIN_FULL_SHARE:
            return None
        if partial_share > MAX_PARTIAL_SHARE:
            return None
        return Finding(
            confidence=compute_confidence_of_margin(
                share, MIN_DROPPED_SHARE, CERTAIN_DROPPED_SHARE
            ),
            evidence=(
                f"in {is_dropped.sum()} of {motion.num_commanded_moves} moves the arm stands "
                f"still, and in {full_share:.0%} it achieves the whole command; it stops and "
                f"goes on {num_stops} times"
            ),
            cure="find where commands are lost: a full queue, a timeout, or two clients at once",
            file="the control loop of your robot",
            figure=draw_move_gains(motion),
        )


def _count_stops_between_full_moves(is_full: Array, is_dropped: Array, episode_index: Array) -> int:
    """Count the runs of dropped moves between two full ones of the same episode.

    Args:
        is_full: [N] whether a move is executed fully.
        is_dropped: [N] whether a move is not executed.
        episode_index: [N] the index of the episode.
    """
    num_stops = 0
    can_be_stop = False  # whether a full move came, and since then only dropped ones
    num_dropped = 0  # since the full move
    for index in range(len(episode_index)):
        is_new_episode = index > 0 and episode_index[index] != episode_index[index - 1]
        if is_new_episode:
            can_be_stop = False
        if is_full[index]:
            num_stops += can_be_stop and num_dropped > 0
            can_be_stop = True
            num_dropped = 0
        elif is_dropped[index]:
            num_dropped += 1
        else:
            can_be_stop = False
    return num_stops
