"""How soon a gripper moves after its command changes, in a rollout and in the demonstrations.

A gripper that is so late that an episode ends before it moves shows no opening that correlates with
its commands. But if training grippers always move within some steps, one that has not moved for
longer is late.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.odds import PRIOR, compute_fault_log_ratio
from spear.types import Array

MIN_COMMANDED_MOTION = 0.5  # of the opening; a command that asks for less shows no reaction
MIN_PROGRESS = 0.1  # share of the way to the commanded opening; beyond it, the gripper moves
OPEN_COMMAND = 0.5  # a command above it opens
LATE_SHARE = 0.98  # of the episodes of a late gripper; an earlier command may move it in others


class Reaction(NamedTuple):
    """What a gripper does after one change of its command.

    delay_s    from the change of the command until the gripper moves. If it does not move while
               this command lasts, the first time at which it might have.
    has_moved  whether the gripper moved.
    """

    delay_s: float
    has_moved: bool


def collect_reactions(episode: RecordedEpisode) -> list[Reaction]:
    """Collect the reactions of an episode to all changes of the command that ask for a motion."""
    is_open = np.asarray(episode.action[:, 7]) > OPEN_COMMAND
    opening = np.asarray(episode.opening, np.float64)
    changes = np.flatnonzero(np.diff(is_open.astype(int))) + 1
    ends = np.append(changes, len(episode))[1:]
    reactions = []
    for change, end in zip(changes, ends, strict=True):
        # The opening before the change, and from the change to the end of the command.
        openings = opening[change - 1 : end]
        reaction = _measure_reaction(openings, float(is_open[change]), episode.rate_hz)
        if reaction is not None:
            reactions.append(reaction)
    return reactions


def _measure_reaction(openings: Array, command: float, rate_hz: float) -> Reaction | None:
    """Measure a reaction; None if the gripper is where the command wants it, or nothing follows.

    Args:
        openings: [K + 1] the opening before the change of the command, and in the K steps from it.
        command: the new command, 0 or 1.
        rate_hz: steps per second.
    """
    way = command - openings[0]
    num_following = len(openings) - 2  # after the step of the change
    if abs(way) < MIN_COMMANDED_MOTION or num_following < 1:
        return None
    has_moved = (openings[1:] - openings[0]) / way > MIN_PROGRESS
    if has_moved.any():
        return Reaction(int(has_moved.argmax()) / rate_hz, has_moved=True)
    return Reaction((num_following + 1) / rate_hz, has_moved=False)


class ReactionOdds(NamedTuple):
    """How likely a gripper is late, by its reactions.

    log_odds      logarithm of the probability that it is late, over that it is not.
    num_late      episodes of the rollout with late reactions.
    num_compared  episodes of the rollout whose reactions can be judged.
    usual_s       median delay of training.
    """

    log_odds: float
    num_late: int
    num_compared: int
    usual_s: float


def compare_reactions(
    rollout: Sequence[Sequence[Reaction]],
    training: Sequence[Sequence[Reaction]],
    min_extra_s: float,
    step_s: float,
) -> ReactionOdds | None:
    """Compare the reactions of a rollout with those of training.

    Args:
        rollout: the reactions of each episode of the rollout.
        training: the reactions of each episode of training.
        min_extra_s: a reaction is late if its delay exceeds the usual one by at least so much.
        step_s: seconds from one observation of the rollout to the next; a reaction within one step
            is never late.

    Returns:
        The odds; None if no reaction of the rollout, or none of training, can be judged.
    """
    usual_delays_s = []
    for reactions in training:
        usual_delays_s += [reaction.delay_s for reaction in reactions if reaction.has_moved]
    if not usual_delays_s:
        return None
    usual_s = max(float(np.median(usual_delays_s)), step_s)
    is_late = _mark_late_among_judgeable_episodes(rollout, usual_s + min_extra_s)
    is_late_in_training = _mark_late_among_judgeable_episodes(training, usual_s + min_extra_s)
    if not len(is_late) or not len(is_late_in_training):
        return None
    log_odds = compute_fault_log_ratio(is_late, is_late_in_training, LATE_SHARE) + float(
        np.log(PRIOR)
    )
    return ReactionOdds(log_odds, int(is_late.sum()), len(is_late), usual_s)


def _mark_late_among_judgeable_episodes(
    reactions_by_episode: Sequence[Sequence[Reaction]], late_delay_s: float
) -> Array:
    """Return whether each episode has late reactions only, of the episodes that can be judged.

    Episodes are counted instead of reactions, because an object that blocks the gripper blocks it
    again and again. A reaction cannot be judged if the gripper has not moved, but is not late yet.
    """
    is_late_episode = []
    for reactions in reactions_by_episode:
        is_late = []
        for reaction in reactions:
            if reaction.has_moved or reaction.delay_s >= late_delay_s:
                is_late.append(reaction.delay_s >= late_delay_s)
        if is_late:
            is_late_episode.append(all(is_late))
    return np.array(is_late_episode, bool)
