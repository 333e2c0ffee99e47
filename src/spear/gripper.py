"""Gripper commands, 0 (close) or 1 (open), from measured or commanded openings in 0 … 1.

All thresholds are departures from the paper, which does not say how it binarizes grippers.
"""

from typing import NamedTuple

import numpy as np

from spear.types import CONTROL_RATE_HZ, Array

CLOSED_BELOW = 0.4  # hysteresis: a lower opening is closed
OPEN_ABOVE = 0.6  # hysteresis: a higher opening is open
MIN_SPEED_PER_S = 0.1  # change of opening per second that is a motion
MIN_STROKE = 0.15  # change of opening that only a command explains
MAX_STILL_CHANGE = 0.02  # change of opening that is noise, no motion
MIN_REST_S = 0.4  # time without motion that is a rest

CLOSE = 0
OPEN = 1


class _Stroke(NamedTuple):
    """A motion of the gripper: the step at which it starts, its command, its size in openings."""

    start: int
    command: int
    size: float


def binarize_gripper(opening: Array) -> Array:
    """Binarize openings with hysteresis.

    An opening above 0.6 is open and one below 0.4 is closed. Between them the last command stays
    in force; before any command, the nearer one is taken.

    Args:
        opening: [T] openings, 0 closed to 1 open.

    Returns:
        [T] commands 0 or 1, float32.
    """
    command = np.full(len(opening), np.nan, np.float32)
    command[opening > OPEN_ABOVE] = OPEN
    command[opening < CLOSED_BELOW] = CLOSE
    if np.isnan(command[0]):
        command[0] = float(opening[0] >= 0.5)

    steps = np.arange(len(command))
    last_decided_step = np.maximum.accumulate(np.where(np.isnan(command), 0, steps))
    return command[last_decided_step]


def commands_from_motion(opening: Array, rate_hz: float) -> Array:
    """Infer the commands that a gripper obeyed from its measured motion.

    A gripper that moves by `MIN_STROKE` obeys a command from the first step of that motion on, so
    one that closes on a wide object and rests half open is closed. Where a closing contains rests,
    the command starts at the last one: before it the gripper only narrowed, to reach for something.

    Args:
        opening: [T + 1] measured openings, 0 closed to 1 open.
        rate_hz: Steps per second.

    Returns:
        [T] commands 0 or 1, float32, of the steps between the openings.
    """
    strokes = _find_strokes(opening)
    initial_command = 1 - strokes[0].command if strokes else opening[0] >= 0.5
    commands = np.full(len(opening) - 1, initial_command, np.float32)

    ends = [stroke.start for stroke in strokes[1:]] + [len(opening)]
    for stroke, end in zip(strokes, ends, strict=False):
        rest_step = _last_rest_while_closing(opening[stroke.start : end], rate_hz)
        commands[stroke.start + rest_step :] = stroke.command
    return commands


def _find_strokes(opening: Array) -> list[_Stroke]:
    """Find the motions of a gripper by at least `MIN_STROKE`, with alternating commands."""
    strokes: list[_Stroke] = []
    top = opening[0]
    bottom = opening[0]
    last_step_at_top = 0
    last_step_at_bottom = 0
    for step, current in enumerate(opening):
        top = max(top, current)
        bottom = min(bottom, current)
        if current > top - MAX_STILL_CHANGE:
            last_step_at_top = step
        if current < bottom + MAX_STILL_CHANGE:
            last_step_at_bottom = step

        closing = _Stroke(last_step_at_top, CLOSE, top - current)
        opening_stroke = _Stroke(last_step_at_bottom, OPEN, current - bottom)
        for stroke in (closing, opening_stroke):
            changes_command = not strokes or strokes[-1].command != stroke.command
            if stroke.size >= MIN_STROKE and changes_command:
                strokes.append(stroke)
                top = current
                bottom = current
                last_step_at_top = step
                last_step_at_bottom = step
    return strokes


def _last_rest_while_closing(opening: Array, rate_hz: float) -> int:
    """Find the step that ends the last rest of a closing [T], after which it closes further.

    Returns 0 if there is none, as in every motion that opens.
    """
    rest_steps = max(1, round(MIN_REST_S * rate_hz))
    last_rest = 0
    for step in range(rest_steps, len(opening)):
        is_resting = np.ptp(opening[step - rest_steps : step + 1]) < MAX_STILL_CHANGE
        closed_before = opening[0] - opening[step]
        closes_after = opening[step] - opening[step:].min()
        if is_resting and min(closed_before, closes_after) >= MIN_STROKE:
            last_rest = step
    return last_rest


def binarize_commands(command: Array, rate_hz: float) -> Array:
    """Binarize commanded openings, of which a trigger or a leader's hand passes through many.

    Steps of a motion get the command that the motion leads to. A motion begins at its second step,
    and its speed is measured over 0.2 s, which is one step at 5 Hz. If the openings move but never
    pass both 0.4 and 0.6, as they do around a wide object, `commands_from_motion` decides.

    Args:
        command: [T] commanded openings, 0 closed to 1 open.
        rate_hz: Steps per second.

    Returns:
        [T] commands 0 or 1, float32.
    """
    passes_both_thresholds = command.min() < CLOSED_BELOW and command.max() > OPEN_ABOVE
    if np.ptp(command) >= MIN_STROKE and not passes_both_thresholds:
        return commands_from_motion(np.append(command[:1], command), rate_hz)

    # Speed, where this step and the one before move the same way.
    window = max(1, round(rate_hz / CONTROL_RATE_HZ))
    change = _change_over(command, window, lag=0)
    change_before = _change_over(command, window, lag=1)
    speed_per_s = (change * change_before > 0) * change * rate_hz / window

    binary = binarize_gripper(command)
    for step in reversed(range(len(binary) - 1)):
        next_change = binary[step + 1] - binary[step]
        if speed_per_s[step] * next_change > MIN_SPEED_PER_S:
            binary[step] = binary[step + 1]
    return binary


def _change_over(opening: Array, window: int, lag: int) -> Array:
    """[T] change of openings over the `window` steps that end `lag` steps before each step."""
    ends = np.arange(len(opening)) - lag
    return opening[np.maximum(ends, 0)] - opening[np.maximum(ends - window, 0)]


def observed_openings(measured: Array, command: Array) -> Array:
    """Return the openings [T] that each step observes, given its commands [T].

    If measured and commanded openings agree but for rounding, the dataset logged its commands as
    measurements. A step then observes the command of the step before: otherwise the state would
    contain the action, and a policy would learn to keep its gripper as it is.
    """
    if np.allclose(measured, command, atol=1e-3):
        return np.append(measured[:1], measured[:-1])
    return measured
