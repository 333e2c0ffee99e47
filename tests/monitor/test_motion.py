"""Checks of whether a robot executes its actions: inverted grippers, other axes, stuck states."""

import numpy as np
import pytest

from spear.monitor.motion import MotionChecks
from spear.types import Array

STATE = np.array([0.45, 0, 0.2, 0, 1, 0, 0, 1], np.float32)
"""Position (m), quaternion (w x y z), and opening."""

COMMANDS = np.repeat([1.0, 0.0] * 5, 13)
"""Gripper commands at 5 Hz: open for 13 steps (2.6 s), then closed for 13 steps, five times."""
SLOW_OPENINGS = np.convolve(np.concatenate([np.ones(7), COMMANDS]), np.ones(8) / 8, "valid")
"""Openings of a gripper that takes 8 steps (1.6 s) to open or to close: the mean of the last eight
commands."""


# Columns: measured openings; how many of a chunk's last commands are the opposite of the first;
# distance between the positions of even and odd steps; and the number of expected findings.
@pytest.mark.parametrize(
    ("openings", "num_late_commands", "distance_m", "num_findings"),
    [
        pytest.param(SLOW_OPENINGS, 0, 0, 0, id="slow"),
        pytest.param(1 - SLOW_OPENINGS, 0, 0, 1, id="inverted"),
        pytest.param(np.full_like(SLOW_OPENINGS, 0.5), 0, 0, 0, id="half open"),
        pytest.param(1 - SLOW_OPENINGS, 2, 0, 0, id="inverted, but unknown which command counts"),
        pytest.param(1 - SLOW_OPENINGS, 0, 0.3, 0, id="states of two arms by turns, 0.3 m apart"),
    ],
)
def test_only_a_gripper_that_does_the_opposite_is_found(
    openings: Array, num_late_commands: int, distance_m: float, num_findings: int
) -> None:
    checks = MotionChecks()
    findings = []
    chunk = np.zeros((5, 8), np.float32)

    for step, (opening, command) in enumerate(zip(openings, COMMANDS, strict=True)):
        x = step % 2 * distance_m
        state = np.array([x, *np.zeros(6), opening])
        findings += checks.examine_next_state(state)
        chunk[:, 7] = command
        chunk[5 - num_late_commands :, 7] = 1 - command
        checks.set_chunk(chunk)
        # A robot's program for the other convention (0 is open) may change the chunk in place. That
        # must not matter.
        chunk[:, 7] = 1 - chunk[:, 7]

    assert len(findings) == num_findings


def test_a_state_that_no_longer_changes_is_found_once() -> None:
    checks = MotionChecks()
    findings = []

    for step in range(9):
        state = STATE + 1e-6 * min(step, 3)  # the same from step 3 on
        findings += checks.examine_next_state(state)
        checks.set_chunk(np.full((5, 8), 0.02))  # 2 cm along each axis per action

    assert [finding.key for finding in findings] == ["state"]


# The arm moves by the commanded x, y, z with these signs, in this order.
@pytest.mark.parametrize(
    ("expected_axes", "order", "signs"),
    [
        (None, [0, 1, 2], [1, 1, 1]),
        ("-x -y z", [0, 1, 2], [-1, -1, 1]),
        ("y -z x", [2, 0, 1], [1, -1, 1]),
    ],
)
def test_an_arm_that_goes_along_other_axes_is_found(
    expected_axes: str | None, order: list[int], signs: list[int]
) -> None:
    rng = np.random.default_rng(0)
    checks = MotionChecks()
    findings = []
    state = STATE.copy()
    chunk = np.ones((5, 8))

    for step in range(80):
        findings += checks.examine_next_state(state)
        # The actions of a chunk have nearly the same direction, with some noise.
        chunk[:, :3] = rng.normal(0, 0.02, 3) + rng.normal(0, 0.004, (5, 3))
        checks.set_chunk(chunk)
        num_executed = 1 + step % 3  # by turns 1, 2 and 3 actions
        commanded = chunk[:num_executed, :3].sum(0)
        executed = (commanded * signs)[order]
        state[:3] += executed + rng.normal(0, 0.004, 3)

    if expected_axes is None:
        assert not findings
    else:
        [finding] = findings
        assert f"along {expected_axes} where" in finding.message
