"""Computes gripper commands, 0 (close) or 1 (open), from measured or commanded openings in 0 … 1.

The paper does not say how it binarizes grippers, so all thresholds are our choice.
"""

from typing import NamedTuple

import numpy as np

from spear.types import CONTROL_RATE_HZ, Array

CLOSED_BELOW = 0.4  # a lower opening counts as closed
OPEN_ABOVE = 0.6  # a higher opening counts as open; in between, the last command stays (hysteresis)
MIN_SPEED_PER_S = 0.1  # a faster change of the opening, per second, counts as a motion
MIN_STROKE = 0.15  # a change of the opening that is at least so large follows from a command
MAX_STILL_CHANGE = 0.02  # a smaller change of the opening is noise, no motion
MIN_REST_S = 0.4  # if the gripper does not move for this time, it rests

CLOSE = 0
OPEN = 1


class _Stroke(NamedTuple):
    """A motion of the gripper that follows from one command.

    Attributes:
        start: The step at which the motion starts.
        command: The command, `CLOSE` or `OPEN`.
        size: By how much the opening has changed where the stroke is detected.
    """

    start: int
    command: int
    size: float


def binarize_gripper(opening: Array) -> Array:
    """Binarize openings with hysteresis.

    An opening above 0.6 gives the command to open, and an opening below 0.4 the command to close.
    At openings in between, the last command stays in force. If the first opening is in between, it
    gives the nearer command.

    Args:
        opening: [T] openings, 0 closed to 1 open.

    Returns:
        [T] commands 0 or 1, float32.
    """
    # NaN marks steps whose own opening does not decide.
    command = np.full(len(opening), np.nan, np.float32)
    command[opening > OPEN_ABOVE] = OPEN
    command[opening < CLOSED_BELOW] = CLOSE
    if np.isnan(command[0]):
        command[0] = float(opening[0] >= 0.5)

    # Fill each undecided step with the command of the last decided step before it.
    steps = np.arange(len(command))
    decided_steps = np.where(np.isnan(command), 0, steps)  # [T]; 0 where undecided
    last_decided_step = np.maximum.accumulate(decided_steps)  # [T]
    return command[last_decided_step]


def infer_commands_between_openings(opening: Array, rate_hz: float) -> Array:
    """Infer the commands that a gripper obeyed from its measured motion.

    If the gripper moves by at least `MIN_STROKE`, a command caused this stroke, and it is in force
    from the first step of the stroke until the next stroke. So if the gripper closes on a wide
    object and rests half open, the command is to close. If the gripper rests while closing and then
    closes further, the command to close starts only after the last such rest. Before, the gripper
    only narrowed, in order to reach for something.

    Args:
        opening: [T + 1] measured openings, 0 closed to 1 open.
        rate_hz: Steps per second.

    Returns:
        [T] commands 0 or 1, float32. Command t is in force between openings t and t + 1.
    """
    strokes = _find_strokes(opening)
    if strokes:
        initial_command = 1 - strokes[0].command  # strokes alternate
    else:
        initial_command = int(opening[0] >= 0.5)
    commands = np.full(len(opening) - 1, initial_command, np.float32)

    for index, stroke in enumerate(strokes):
        is_last_stroke = index == len(strokes) - 1
        end = len(opening) if is_last_stroke else strokes[index + 1].start
        last_rest_step = _find_last_rest_while_closing(opening[stroke.start : end], rate_hz)
        # The commands of later strokes overwrite this one.
        commands[stroke.start + (last_rest_step or 0) :] = stroke.command
    return commands


def _find_strokes(opening: Array) -> list[_Stroke]:
    """Find the motions of a gripper by at least `MIN_STROKE`, with alternating commands.

    Args:
        opening: [T] openings, 0 closed to 1 open.
    """
    strokes: list[_Stroke] = []
    # The largest and the smallest opening since the last stroke, and the last step at which the
    # opening was as large, or as small, up to noise.
    top = opening[0]
    bottom = opening[0]
    last_step_at_top = 0
    last_step_at_bottom = 0
    for step, current_opening in enumerate(opening):
        top = max(top, current_opening)
        bottom = min(bottom, current_opening)
        if current_opening > top - MAX_STILL_CHANGE:
            last_step_at_top = step
        if current_opening < bottom + MAX_STILL_CHANGE:
            last_step_at_bottom = step

        closing_stroke = _Stroke(last_step_at_top, CLOSE, size=top - current_opening)
        opening_stroke = _Stroke(last_step_at_bottom, OPEN, size=current_opening - bottom)
        for stroke in (closing_stroke, opening_stroke):
            changes_command = not strokes or strokes[-1].command != stroke.command
            if stroke.size >= MIN_STROKE and changes_command:
                strokes.append(stroke)
                top = current_opening
                bottom = current_opening
                last_step_at_top = step
                last_step_at_bottom = step
                break  # the other stroke's size is relative to the old top and bottom
    return strokes


def _find_last_rest_while_closing(stroke_opening: Array, rate_hz: float) -> int | None:
    """Find the last step of a stroke at which the gripper rests before it closes further.

    Args:
        stroke_opening: [T] the openings of the stroke.
        rate_hz: Steps per second.

    Returns:
        The step, counted from the start of the stroke. None if there is no such rest, as in a
        stroke that opens.
    """
    num_rest_steps = max(1, round(MIN_REST_S * rate_hz))
    last_rest_step = None
    for step in range(num_rest_steps, len(stroke_opening)):
        recent_openings = stroke_opening[step - num_rest_steps : step + 1]
        is_resting = np.ptp(recent_openings) < MAX_STILL_CHANGE
        narrowing_before = stroke_opening[0] - stroke_opening[step]
        narrowing_after = stroke_opening[step] - stroke_opening[step:].min()
        if is_resting and min(narrowing_before, narrowing_after) >= MIN_STROKE:
            last_rest_step = step
    return last_rest_step


def binarize_commands(command: Array, rate_hz: float) -> Array:
    """Binarize commanded openings, which may be any number in 0 … 1.

    Operators command a gripper by a trigger or a leader arm, so a command to close passes through
    all openings in between. All steps of such a motion get the binary command that the motion leads
    to. A step belongs to a motion if the commanded opening changes at more than `MIN_SPEED_PER_S`,
    and in the same direction as at the step before. The change is measured over 0.2 s, which is one
    step at 5 Hz.

    A gripper that closes around a wide object may never get below 0.4, and one that opens a little
    may never get above 0.6. If the commands change by at least `MIN_STROKE` without reaching both
    sides, `infer_commands_between_openings` decides.

    Args:
        command: [T] commanded openings, 0 closed to 1 open.
        rate_hz: Steps per second.

    Returns:
        [T] commands 0 or 1, float32.
    """
    passes_both_thresholds = command.min() < CLOSED_BELOW and command.max() > OPEN_ABOVE
    if np.ptp(command) >= MIN_STROKE and not passes_both_thresholds:
        openings = np.append(command[:1], command)  # [T + 1], as if each step reached its command
        return infer_commands_between_openings(openings, rate_hz)

    # The speed [T], which is 0 unless the opening changes in the direction of the step before.
    window_steps = max(1, round(rate_hz / CONTROL_RATE_HZ))
    change = _compute_past_change(command, window_steps, lag_steps=0)  # [T]
    change_before = _compute_past_change(command, window_steps, lag_steps=1)  # [T]
    is_continued = change * change_before > 0  # [T]
    speed_per_s = is_continued * change * rate_hz / window_steps

    # From the end to the start, extend each new command over the motion that leads to it.
    binary = binarize_gripper(command)
    for step in reversed(range(len(binary) - 1)):
        next_change = binary[step + 1] - binary[step]  # -1, 0 or 1
        if speed_per_s[step] * next_change > MIN_SPEED_PER_S:
            binary[step] = binary[step + 1]
    return binary


def _compute_past_change(opening: Array, window_steps: int, lag_steps: int) -> Array:
    """Compute by how much openings [T] change over the time before each step, [T].

    The time ends `lag_steps` steps before the step, and takes `window_steps` steps. Before the
    first opening, openings are taken to be constant.
    """
    end_steps = np.arange(len(opening)) - lag_steps
    start_steps = end_steps - window_steps
    return opening[np.maximum(end_steps, 0)] - opening[np.maximum(start_steps, 0)]


def delay_openings_logged_from_commands(measured: Array, command: Array) -> Array:
    """Return measured openings, one step later if they are commands: what a policy may observe.

    If measured and commanded openings agree but for rounding, the dataset logged its commands as
    measurements. The observed opening of a step is then the command of the step before. Otherwise
    the state would contain the action, and a policy would only learn to copy the observed opening.

    Args:
        measured: [T] openings that the dataset calls measured.
        command: [T] commanded openings.

    Returns:
        [T] openings.
    """
    are_commands = np.allclose(measured, command, atol=1e-3)
    if are_commands:
        return np.append(measured[:1], measured[:-1])
    return measured
