"""Do gripper openings and commands mean what the layout says? All thresholds are our choice.

Two signs show which end of the gripper's range is open. First, a gripper that closes on objects
comes to rest at different openings, because the objects differ in size, while an opened gripper
always rests at the same opening. Second, demonstrations begin with an open gripper. The layout is
called wrong only if both signs contradict it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spear.checks.recording import Recording
from spear.checks.result import Check, Verdict
from spear.errors import format_count
from spear.gripper import CLOSED_BELOW, OPEN_ABOVE, binarize_commands
from spear.types import Array

# Openings run from 0 (closed) to 1 (open).
MIN_MOTION = 0.1  # in an episode whose opening changes by more, the gripper counts as moving
MAX_REST_CHANGE = 0.02  # an opening that changes by less from step to step is at rest
MIN_CORRELATION = 0.6  # an opening follows the command if they correlate at least this much
MAX_DELAY_S = 0.8  # longest time between a command and the opening that follows it
MIN_EPISODES = 3  # in which the gripper moves; with fewer, there is no verdict
MIN_SPREAD_RATIO = 3.0  # spread of closed resting openings divided by the spread of open ones
MIN_SHARE = 0.8  # share of episodes, or of command changes, that must agree for a verdict
OPPOSITE_OPENING = 0.75  # openings that differ by more are opposite: one is open, one closed


class Following(NamedTuple):
    """Correlation of openings with the commands that were given `delay_steps` before."""

    delay_steps: int
    correlation: float


class CommandedGripper(NamedTuple):
    """A gripper in one episode.

    opening  [T] measured openings.
    command  [T] commanded openings.
    rate_hz  steps per second.
    """

    opening: Array
    command: Array
    rate_hz: float


def judge_gripper(recordings: Sequence[Recording]) -> list[Check]:
    """Judge whether openings and commands are what the layout says; also "agrees" is a result.

    Only episodes in which the gripper moves are compared. If the layout says that the gripper never
    moves, no recording has openings, and there is nothing to check.
    """
    if all(recording.opening is None for recording in recordings):
        return []
    moving = []
    for recording in recordings:
        if recording.opening is not None and np.ptp(recording.opening) > MIN_MOTION:
            moving.append(recording)
    if len(moving) < MIN_EPISODES:
        num_episodes = format_count(len(recordings), "episodes")
        words = f"the gripper moves in {len(moving)} of {num_episodes}"
        return [Check("gripper", "cannot tell", words)]

    openings = [np.asarray(recording.opening) for recording in moving]
    verdict, words = judge_whether_high_is_open(openings)
    commanded = []
    for recording in moving:
        if recording.command is not None:
            opening = np.asarray(recording.opening)
            commanded.append(CommandedGripper(opening, recording.command, recording.rate_hz))
    range_problem = examine_range(openings, [episode.command for episode in commanded])
    if not commanded:
        return [range_problem or Check("gripper", verdict, words)]
    return _judge_commands(commanded, openings, Check("gripper", verdict, words), range_problem)


def _judge_commands(
    commanded: Sequence[CommandedGripper],
    openings: Sequence[Array],
    open_end: Check,
    range_problem: Check | None,
) -> list[Check]:
    """Judge whether the opening follows the command, opposes it, or has nothing to do with it.

    Args:
        commanded: the episodes with a moving gripper and with commands.
        openings: [T] of every episode with a moving gripper.
        open_end: the check of which end of the range is open.
        range_problem: the problem that `examine_range` found, if any.
    """
    strongest = max(
        correlate_commands_by_delay(commanded), key=lambda result: abs(result.correlation)
    )
    delay = format_count(strongest.delay_steps, "steps")
    evidence = (
        f"the correlation of command and opening, {delay} later, is {strongest.correlation:.2f}"
    )

    if strongest.correlation >= MIN_CORRELATION:
        problem = range_problem or examine_late_commands(
            [episode.opening for episode in commanded],
            [binarize_commands(episode.command, episode.rate_hz) for episode in commanded],
        )
        checks = [open_end, problem or Check("gripper command", "agrees", evidence)]
        smallest_opening = min(opening.min() for opening in openings)
        if smallest_opening >= 0.5:
            words = (
                f"the gripper never closes further than to {smallest_opening:.2f}, "
                "either around large objects, or because the range is wrong"
            )
            checks.append(Check("gripper_range", "cannot tell", words))
        return checks

    if strongest.correlation <= -MIN_CORRELATION:
        # The two readings of one of the ranges are exchanged; `open_end` may tell in which.
        if open_end.verdict == "wrong":
            range_keys = "gripper_range"
        elif open_end.verdict == "agrees":
            range_keys = "command_range"
        else:
            range_keys = "command_range, or in gripper_range"
        words = f"{evidence}; exchange the two readings in {range_keys}"
        return [Check("gripper command", "wrong", words)]

    # `correlate_commands_by_delay` returns exactly 0 if the commands never change.
    is_command_constant = strongest.correlation == 0
    if range_problem and is_command_constant:
        return [range_problem]
    words = f"{evidence} at best; name another column as command"
    return [Check("gripper command", "wrong", words)]


def examine_range(openings: Sequence[Array], commands: Sequence[Array]) -> Check | None:
    """Report a moving gripper that is never open, or never commanded to open and to close.

    Args:
        openings: measured openings [T] of each episode.
        commands: commanded openings [T] of each episode that has commands.
    """
    measured = np.concatenate(openings)
    # A gripper that closes on large objects need not reach 0. If it opens and has commands, these
    # must span the range instead.
    judges_commands = bool(commands) and measured.max() > OPEN_ABOVE
    values = np.concatenate(commands) if judges_commands else measured
    if values.min() < CLOSED_BELOW and values.max() > OPEN_ABOVE:
        return None

    # Something is wrong. If the measured openings do not reach the closed end, they are the ones to
    # report, not the commands.
    if judges_commands and measured.min() < CLOSED_BELOW:
        name = "gripper command"
        key = "command_range"
    else:
        values = measured
        name = "gripper"
        key = "gripper_range"
    words = (
        f"it runs from {values.min():.2f} to {values.max():.2f} of 0 (closed) … 1 (open): "
        f"correct {key}"
    )
    return Check(name, "wrong", words)


def examine_late_commands(
    openings: Sequence[Array], binary_commands: Sequence[Array]
) -> Check | None:
    """Report a gripper that has mostly moved already when its command changes.

    Such commands were computed from the openings, or recorded too late.

    Args:
        openings: measured openings [T] of each episode.
        binary_commands: commanded openings [T] of the same episodes, each 0 or 1.
    """
    has_moved_by_episode = []
    for opening, command in zip(openings, binary_commands, strict=True):
        is_change = np.diff(command) != 0  # [T - 1]
        # [T - 1] how far the opening is from the command at the step after each possible change
        distance_to_new_command = np.abs(opening - command)[1:]
        has_moved_by_episode.append(distance_to_new_command[is_change] < 0.5)
    has_moved = np.concatenate(has_moved_by_episode)  # one entry per change of a command
    if len(has_moved) < MIN_EPISODES or has_moved.mean() < MIN_SHARE:
        return None
    num_changes = format_count(len(has_moved), "changes")
    words = (
        f"{has_moved.mean():.0%} of {num_changes} come when the gripper has moved already; "
        "leave command out, the opening tells it better"
    )
    return Check("gripper command", "wrong", words)


def are_opposite(openings: Array | float, others: Array | float) -> Array:
    """Return whether openings (0 closed … 1 open) are the opposite of others, or of commands."""
    return np.abs(np.asarray(openings) - others) > OPPOSITE_OPENING


def correlate_commands_by_delay(
    episodes: Sequence[CommandedGripper], max_delay_s: float = MAX_DELAY_S
) -> list[Following]:
    """Correlate commands with the openings some steps later, for every delay up to a longest one.

    Args:
        episodes: the gripper in each episode, all at the same rate.
        max_delay_s: the longest delay.

    Returns:
        One result per delay, from 0 steps on. The correlation is 0 if commands or openings never
        change.
    """
    results = []
    max_delay_steps = round(max_delay_s * episodes[0].rate_hz)
    for delay in range(max_delay_steps + 1):
        pairs = []  # [2, T - delay] of each episode: commands, and openings `delay` steps later
        for episode in episodes:
            num_pairs = len(episode.opening) - delay
            if num_pairs > 0:
                pairs.append(np.stack([episode.command[:num_pairs], episode.opening[delay:]]))
        if not pairs:
            break
        commands, openings = np.concatenate(pairs, axis=1)
        correlation = 0.0
        if commands.std() > 0 and openings.std() > 0:
            correlation = float(np.corrcoef(commands, openings)[0, 1])
        results.append(Following(delay, correlation))
    return results


class Judgment(NamedTuple):
    """A verdict, and its reasons in words."""

    verdict: Verdict
    reasons: str


def judge_whether_high_is_open(openings: Sequence[Array]) -> Judgment:
    """Judge whether the gripper is open at the high end of its openings, as the layout says.

    Args:
        openings: [T] by the layout, of each episode, in each of which the gripper moves.
    """
    middles = [(opening.min() + opening.max()) / 2 for opening in openings]
    begins_open = [opening[0] > middle for opening, middle in zip(openings, middles, strict=True)]
    share_begins_open = float(np.mean(begins_open))

    # At which openings the gripper rests in each episode: when closed, and when open.
    resting_closed: list[float] = []
    resting_open: list[float] = []
    for opening, middle in zip(openings, middles, strict=True):
        # [T - 1] at each step but the first
        is_at_rest = np.abs(np.diff(opening)) < MAX_REST_CHANGE
        resting = opening[1:][is_at_rest]
        resting_above = resting[resting > middle]
        resting_below = resting[resting <= middle]
        if len(resting_above):
            resting_open.append(float(np.median(resting_above)))
        if len(resting_below):
            resting_closed.append(float(np.median(resting_below)))
    spread_closed = _measure_range_or_zero(resting_closed)
    spread_open = _measure_range_or_zero(resting_open)

    # Two independent signs: +1 speaks for the layout, -1 against it, 0 says nothing. A closed
    # gripper holds objects, and therefore rests at differing openings.
    holds_when_closed = spread_closed > MIN_SPREAD_RATIO * max(spread_open, MAX_REST_CHANGE)
    holds_when_open = spread_open > MIN_SPREAD_RATIO * max(spread_closed, MAX_REST_CHANGE)
    contact_sign = int(holds_when_closed) - int(holds_when_open)
    start_sign = int(share_begins_open >= MIN_SHARE) - int(share_begins_open <= 1 - MIN_SHARE)

    words = (
        f"{share_begins_open:.0%} of {len(openings)} episodes begin open; "
        f"it rests at openings that differ by {spread_closed:.2f} when closed, "
        f"{spread_open:.2f} when open"
    )
    if contact_sign < 0 and start_sign < 0:
        return Judgment("wrong", f"{words}; exchange the two readings in gripper_range")
    if max(contact_sign, start_sign) > 0 and min(contact_sign, start_sign) >= 0:
        return Judgment("agrees", words)
    return Judgment("cannot tell", words)


def _measure_range_or_zero(values: Sequence[float]) -> float:
    """Return the largest minus the smallest value; 0 if there are too few values to compare."""
    return float(np.ptp(values)) if len(values) >= MIN_EPISODES else 0.0
