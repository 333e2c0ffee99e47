"""Gripper commands (1 opens, 0 closes) are found in measured and in commanded openings (0 to 1)."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from spear.data.actions import get_or_derive_actions
from spear.data.readers.formats import read_episodes
from spear.gripper import (
    binarize_commands,
    binarize_gripper,
    delay_openings_logged_from_commands,
    infer_commands_between_openings,
)

TRIGGER = np.array([1, 1, 0.9, 0.7, 0.5, 0.3, 0, 0, 0.2, 0.4, 0.6, 1])
"""Openings commanded by a trigger that is pressed and released slowly."""


def test_openings_are_binarized_with_hysteresis() -> None:
    """The command changes to 0 below 0.4, and to 1 above 0.6."""
    opening = np.array([0.55, 0.45, 0.7, 0.5, 0.41, 0.39, 0.5, 0.59, 0.61, 0.45])

    np.testing.assert_array_equal(binarize_gripper(opening), [1, 1, 1, 1, 1, 0, 0, 0, 1, 1])


def test_before_any_threshold_the_nearer_command_is_taken() -> None:
    np.testing.assert_array_equal(binarize_gripper(np.array([0.45, 0.55])), [0, 0])


# Case -> measured openings at 5 Hz, and the commands that the gripper obeyed.
MOTIONS = {
    "fast closing": ([1, 1, 0.1, 0.1], [1, 0, 0, 0]),
    "slow motion, commanded before it begins": (
        [1, 1, 0.9, 0.6, 0.3, 0.3, 0.6, 1],
        [1, 0, 0, 0, 0, 1, 1, 1],
    ),
    "around a wide object, half open": (
        [1, 1, 0.8, 0.56, 0.55, 0.55, 0.8, 1],
        [1, 0, 0, 0, 0, 1, 1, 1],
    ),
    "first narrower, then closed": (
        [1, 0.7, 0.7, 0.71, 0.7, 0.7, 0.4, 0.41],
        [1, 1, 1, 1, 1, 0, 0, 0],
    ),
    "opened slowly, then closed slowly": (
        [0, 0, 0.33, 0.67, 1, 1, 0.67, 0.33, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0, 0, 0],
    ),
    "at rest, then opened": ([0.7, 0.72, 0.7, 1], [0, 0, 1, 1]),
    "never moves": ([0.6] * 4, [1] * 4),
}


@pytest.mark.parametrize(("opening", "expected"), MOTIONS.values(), ids=MOTIONS)
def test_motion_tells_the_command(opening: list[float], expected: list[int]) -> None:
    # A command is inferred for each step between two openings, so the last one is repeated.
    openings_and_end = np.array([*opening, opening[-1]], np.float32)

    commands = infer_commands_between_openings(openings_and_end, rate_hz=5.0)

    np.testing.assert_array_equal(commands, expected)


@pytest.mark.parametrize(("opening", "expected"), MOTIONS.values(), ids=MOTIONS)
def test_motion_tells_the_same_command_at_a_higher_rate(
    opening: list[float], expected: list[int]
) -> None:
    steps = np.arange(len(opening))
    steps_at_30_hz = np.arange(6 * len(opening) - 5) / 6  # 0, 1/6, … up to the last step
    openings_at_30_hz = np.interp(steps_at_30_hz, steps, opening)

    commands = infer_commands_between_openings(openings_at_30_hz, rate_hz=30.0)

    # The command in the middle of each step of 5 Hz.
    commands_between_steps = commands[3::6]
    np.testing.assert_array_equal(commands_between_steps, expected[:-1])


def test_motion_tells_what_real_grippers_were_commanded(shared: Path) -> None:
    """It finds 220 of 225 commands. Binarizing the openings would find only 190."""
    num_right = 0
    num_commands = 0
    for episode in read_episodes(shared / "data" / "bridge_v2_sample"):
        inferred, _ = get_or_derive_actions(dataclasses.replace(episode, action=None))
        is_right = inferred[:-1, 7] == episode.action[:-1, 7]
        num_right += int(is_right.sum())
        num_commands += len(is_right)

    assert num_right / num_commands > 0.95


def test_steps_of_a_commanded_motion_have_the_command_that_it_leads_to() -> None:
    """A motion counts from its second step: closing from step 3 on, opening from step 9 on."""
    commands = binarize_commands(TRIGGER, rate_hz=10.0)

    np.testing.assert_array_equal(commands, [1] * 3 + [0] * 6 + [1] * 3)


# The first trigger is never below 0.4, and the second one never above 0.6.
@pytest.mark.parametrize("trigger", [0.46 + 0.54 * TRIGGER, 0.1 + 0.48 * TRIGGER])
def test_commands_that_pass_only_one_threshold_count_by_their_motion(trigger: np.ndarray) -> None:
    commands = binarize_commands(trigger, rate_hz=10.0)

    np.testing.assert_array_equal(commands, [1] * 2 + [0] * 6 + [1] * 4)


def test_binary_commands_stay_unchanged() -> None:
    pulses = np.array([1, 0, 1, 0, 0, 1])

    np.testing.assert_array_equal(binarize_commands(pulses, rate_hz=30.0), pulses)


def test_openings_that_are_the_commands_are_observed_one_step_later() -> None:
    """If recorded openings equal the commands of the same step, the robot cannot have seen them."""
    command = np.array([1.0, 0.0, 0.5])
    recorded_openings = command + 1e-4

    observed = delay_openings_logged_from_commands(recorded_openings, command)

    np.testing.assert_array_equal(observed, [1.0001, 1.0001, 1e-4])


def test_measured_openings_are_observed_at_once() -> None:
    measured = np.array([1.0, 0.8, 0.5])
    command = np.array([1.0, 0, 0])

    np.testing.assert_array_equal(delay_openings_logged_from_commands(measured, command), measured)
