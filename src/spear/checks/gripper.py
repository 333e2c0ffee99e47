"""Do gripper openings and commands mean what the layout says? All thresholds are our choice.

Which end of the range is open shows in two ways. A gripper that closes on objects comes to rest at
different openings, one that opens always at the same; and demonstrations begin with an open
gripper. Only if both contradict the layout is it called wrong.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spear.checks.recording import Recording
from spear.checks.result import Check, Verdict
from spear.errors import format_count
from spear.gripper import CLOSED_BELOW, OPEN_ABOVE, binarize_commands
from spear.types import Array

MIN_MOTION = 0.1  # change of opening in an episode that counts as moving
MAX_REST_CHANGE = 0.02  # change of opening from step to step that counts as rest
MIN_CORRELATION = 0.6  # of command and opening, from which one follows the other
MAX_DELAY_S = 0.8  # by which the opening may follow its command
MIN_EPISODES = 3  # in which the gripper moves; with fewer nothing is said
MIN_SPREAD_RATIO = 3.0  # how much more resting openings differ on objects than when open
MIN_SHARE = 0.8  # of episodes, or of changes, that must say the same


class Following(NamedTuple):
    """How strongly openings follow commands that were given `delay_steps` before."""

    delay_steps: int
    correlation: float


class _Commanded(NamedTuple):
    """A moving gripper in one episode: measured openings [T], commands [T], and steps per
    second."""

    opening: Array
    command: Array
    rate_hz: float


def check_gripper(recordings: Sequence[Recording]) -> list[Check]:
    """Whether openings and commands are what the layout says, as far as the gripper moves at
    all; nothing to check if the layout says that it never moves."""
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
    verdict, words = judge_open_end(openings)
    commanded = []
    for recording in moving:
        if recording.command is not None:
            opening = np.asarray(recording.opening)
            commanded.append(_Commanded(opening, recording.command, recording.rate_hz))
    range_problem = check_range(openings, [episode.command for episode in commanded])
    if not commanded:
        return [range_problem or Check("gripper", verdict, words)]
    return _check_commands(commanded, openings, Check("gripper", verdict, words), range_problem)


def _check_commands(
    commanded: Sequence[_Commanded],
    openings: Sequence[Array],
    open_end: Check,
    range_problem: Check | None,
) -> list[Check]:
    """Whether the opening follows the command, opposes it, or has nothing to do with it."""
    strongest = max(correlate_commands(commanded), key=lambda result: abs(result.correlation))
    delay = format_count(strongest.delay_steps, "steps")
    evidence = (
        f"the correlation of command and opening, {delay} later, is {strongest.correlation:.2f}"
    )

    if strongest.correlation >= MIN_CORRELATION:
        binary = []
        for episode in commanded:
            binary.append((episode.opening, binarize_commands(episode.command, episode.rate_hz)))
        problem = range_problem or check_command_timing(binary)
        checks = [open_end, problem or Check("gripper command", "agrees", evidence)]
        smallest_opening = min(opening.min() for opening in openings)
        if smallest_opening >= 0.5:
            words = (
                f"it never closes further than to {smallest_opening:.2f}: "
                "around large objects, or it is wrong"
            )
            checks.append(Check("gripper_range", "cannot tell", words))
        return checks

    if strongest.correlation <= -MIN_CORRELATION:
        keys = {"wrong": "gripper_range", "agrees": "command_range"}
        key = keys.get(open_end.verdict, "command_range, or in gripper_range")
        words = f"{evidence}: exchange the two readings in {key}"
        return [Check("gripper command", "wrong", words)]

    is_command_constant = strongest.correlation == 0  # it then follows nothing
    if range_problem and is_command_constant:
        return [range_problem]
    words = f"{evidence} at best: command names another column"
    return [Check("gripper command", "wrong", words)]


def check_range(openings: Sequence[Array], commands: Sequence[Array]) -> Check | None:
    """Report a moving gripper that is never open, or never commanded to open and to close."""
    measured = np.concatenate(openings)
    values = measured
    if commands and measured.max() > OPEN_ABOVE:
        values = np.concatenate(commands)
    if values.min() < CLOSED_BELOW and values.max() > OPEN_ABOVE:
        return None
    if measured.min() >= CLOSED_BELOW:
        values = measured
    name = "gripper" if values is measured else "gripper command"
    key = "gripper_range" if values is measured else "command_range"
    words = (
        f"it runs from {values.min():.2f} to {values.max():.2f} of 0 (closed) … 1 (open): "
        f"correct {key}"
    )
    return Check(name, "wrong", words)


def check_command_timing(episodes: Sequence[tuple[Array, Array]]) -> Check | None:
    """Report a gripper that has mostly moved already when its command changes.

    Args:
        episodes: (openings [T], commands [T], each 0 or 1) of each episode.
    """
    has_moved = []
    for opening, command in episodes:
        distance = np.abs(opening - command)[1:]
        has_moved.append(distance[np.diff(command) != 0] < 0.5)
    all_changes = np.concatenate(has_moved)
    if len(all_changes) < MIN_EPISODES or all_changes.mean() < MIN_SHARE:
        return None
    num_changes = format_count(len(all_changes), "changes")
    words = (
        f"{all_changes.mean():.0%} of {num_changes} come when the gripper has moved already: "
        "leave command out, the opening tells it better"
    )
    return Check("gripper command", "wrong", words)


def correlate_commands(episodes: Sequence[tuple[Array, Array, float]]) -> list[Following]:
    """Correlate commands with the openings some steps later, for every delay up to `MAX_DELAY_S`.

    Args:
        episodes: (openings [T], commands [T], steps per second) of each episode.
    """
    rate_hz = episodes[0][2]
    results = []
    for delay in range(1 + round(MAX_DELAY_S * rate_hz)):
        pairs = []
        for opening, command, _ in episodes:
            if len(opening) > delay:
                pairs.append(np.stack([command[: len(opening) - delay], opening[delay:]]))
        if not pairs:
            break
        commands, openings = np.concatenate(pairs, axis=1)
        correlation = 0.0
        if commands.std() > 0 and openings.std() > 0:
            correlation = float(np.corrcoef(commands, openings)[0, 1])
        results.append(Following(delay, correlation))
    return results


def judge_open_end(openings: Sequence[Array]) -> tuple[Verdict, str]:
    """Whether what the layout calls open is open: the verdict and its reasons in words."""
    middles = [(opening.min() + opening.max()) / 2 for opening in openings]
    begins_open = [o[0] > middle for o, middle in zip(openings, middles, strict=True)]
    share_begins_open = float(np.mean(begins_open))

    resting_closed: list[float] = []
    resting_open: list[float] = []
    for opening, middle in zip(openings, middles, strict=True):
        resting = opening[1:][np.abs(np.diff(opening)) < MAX_REST_CHANGE]
        if (resting > middle).any():
            resting_open.append(float(np.median(resting[resting > middle])))
        if (resting <= middle).any():
            resting_closed.append(float(np.median(resting[resting <= middle])))
    spread_closed = _spread(resting_closed)
    spread_open = _spread(resting_open)

    # Two independent signs: +1 speaks for the layout, -1 against it, 0 says nothing.
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
        return "wrong", f"{words}: exchange the two readings in gripper_range"
    if max(contact_sign, start_sign) > 0 and min(contact_sign, start_sign) >= 0:
        return "agrees", words
    return "cannot tell", words


def _spread(values: Sequence[float]) -> float:
    """How far values lie apart; 0 if there are too few to say."""
    return float(np.ptp(values)) if len(values) >= MIN_EPISODES else 0.0
