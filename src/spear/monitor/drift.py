"""The drift monitor of one policy: it checks each robot and reports each finding once.

One policy may serve several robots. Each has its own `RobotMonitor`, and findings are reported once
per robot.
"""

import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch

from spear.errors import notice, to_sentence
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.motion import MAX_OPPOSITE_SHARE, FrozenCameraCheck, MotionChecks
from spear.monitor.observations import Finding, examine_first_opening, examine_observations
from spear.types import Array

NUM_FIRST_OBSERVATIONS = 64  # first observations of each robot that are compared with training
OBSERVATION_INTERVAL = 16  # of the later observations, one in this many is compared with training
MAX_ROBOTS = 1024  # with more, the robot whose last observation is oldest is forgotten
# Clients that connect again and again count as new robots, and would fill the log.
MAX_NOTICES = 50  # about robots, within the following time
NOTICE_PERIOD_S = 600.0


class RobotMonitor:
    """What the monitor remembers of one robot.

    Args:
        number: counts robots from 1. Only messages about a second or later robot name the robot.
    """

    def __init__(self, number: int = 1) -> None:
        self.message_prefix = f"robot {number}: " if number > 1 else ""
        self.num_observations = 0
        self.is_first_state = True  # whether no state of the robot was checked yet
        self.reported_keys: set[str] = set()
        self.motion = MotionChecks()
        self.frozen_cameras = FrozenCameraCheck()


class NoticeLimit:
    """Prints notices about robots, but not more than `MAX_NOTICES` in `NOTICE_PERIOD_S`.

    Args:
        read_time_s: returns the time, s, from any fixed moment on.
    """

    def __init__(self, read_time_s: Callable[[], float] = time.monotonic) -> None:
        self._read_time_s = read_time_s
        self._times_s: deque[float] = deque()  # of the notices of the last period

    def print_or_drop_unless_suppressed(self, message: str) -> bool:
        """Print a notice, or drop it if there were too many.

        Returns:
            Whether it did either of them. False if notices are suppressed, so that the caller may
            try again later.
        """
        now_s = self._read_time_s()
        while self._times_s and now_s - self._times_s[0] > NOTICE_PERIOD_S:
            self._times_s.popleft()
        if len(self._times_s) > MAX_NOTICES:  # the last of these said that others are left out
            return True
        if len(self._times_s) == MAX_NOTICES:
            message = (
                f"more than {MAX_NOTICES} notices about robots within {NOTICE_PERIOD_S / 60:.0f}"
                " minutes. Further ones are left out for a while."
            )
        is_printed = notice(message)
        if is_printed:
            self._times_s.append(now_s)
        return is_printed


class DriftMonitor:
    """Reports how observations and motions of a policy's robots differ from the training data."""

    def __init__(self) -> None:
        self._limit = NoticeLimit()
        self._reported_keys: set[str] = set()
        # Ordered by each robot's latest observation, the most recent one last.
        self._robots: dict[Hashable, RobotMonitor] = {}

    def begin_run(self) -> None:
        """Begin a new run: the robots' last commands, and numbers of observations, no longer count.

        What was reported before is not reported again.
        """
        for monitor in self._robots.values():
            monitor.motion.set_chunk(None)
            monitor.num_observations = 0

    def report_findings_in_batch(
        self,
        expected: TrainingDistribution | None,
        observations: Sequence[Mapping[str, Any]],
        states: Array,
        pixels: Mapping[str, torch.Tensor],
        is_present: Mapping[str, Sequence[bool]],
    ) -> None:
        """Check a batch of observations, which may come from several robots, and report findings.

        Args:
            expected: the summary of the training data, if the policy has one.
            observations: B observations. Those that a server received have an attribute `robot`.
            states: [B, 8] states as `spear.types.Policy` has them.
            pixels: camera → [B, 3, h, w] uint8 images as the model sees them.
            is_present: camera → [B], whether each observation has that camera's image.
        """
        robots = _get_robot_of_each_observation(observations)
        monitors = {}
        for robot, state in zip(robots, states, strict=True):
            monitor = self._get_or_add_monitor(robot)
            self._report_findings_in_state(expected, monitor, state)
            monitors[robot] = monitor

        for robot, monitor in monitors.items():
            rows = [row for row, sender in enumerate(robots) if sender == robot]
            images = {}
            for camera in pixels:
                if all(is_present[camera][row] for row in rows):
                    images[camera] = pixels[camera][rows].numpy()
            # This check compares a single observation with the robot's previous one.
            if len(rows) == 1:
                for finding in monitor.frozen_cameras.examine(states[rows[0]], images):
                    self._report_finding(finding, monitor)
            monitor.num_observations += len(rows)
            if expected and _is_comparison_due(monitor.num_observations, len(rows)):
                for finding in examine_observations(expected, states[rows], images):
                    self._report_unlike_training(finding, monitor)

    def record_commands(self, observations: Sequence[Mapping[str, Any]], chunks: Array) -> None:
        """Remember the action chunks [B, H, 8] that answer a batch of observations."""
        robots = _get_robot_of_each_observation(observations)
        for robot, chunk in zip(robots, chunks, strict=True):
            monitor = self._robots.get(robot)
            if monitor is not None:
                # Of several chunks, the robot may execute any, so none of them can be checked.
                is_only_chunk = robots.count(robot) == 1
                monitor.motion.set_chunk(chunk if is_only_chunk else None)

    def report(self, key: str, message: str) -> None:
        """Print a message about the policy, unless one with that key was printed before."""
        if key not in self._reported_keys and notice(message):
            self._reported_keys.add(key)

    def _report_finding(self, finding: Finding, monitor: RobotMonitor) -> None:
        """Print a finding, unless one with its key was printed for that robot before."""
        if finding.key in monitor.reported_keys:
            return
        message = monitor.message_prefix + finding.message
        if self._limit.print_or_drop_unless_suppressed(message):
            monitor.reported_keys.add(finding.key)

    def _report_unlike_training(self, finding: Finding, monitor: RobotMonitor) -> None:
        """Print a finding as `_report_finding` does, as a difference from the training data."""
        message = f"the observations are unlike those of training. {to_sentence(finding.message)}"
        self._report_finding(Finding(finding.key, message), monitor)

    def _report_findings_in_state(
        self, expected: TrainingDistribution | None, monitor: RobotMonitor, state: Array
    ) -> None:
        """Check the state [8] of a monitor's robot, and report findings.

        The first state is compared with training, every later state with the actions that the robot
        was sent before.
        """
        if monitor.is_first_state and expected:
            for finding in examine_first_opening(expected, state[7]):
                self._report_unlike_training(finding, monitor)

        # If the grippers in the training data often do the opposite of their commands, the robot's
        # gripper may do so, too, and is not reported.
        is_gripper_checked = (
            expected is not None and expected.opposite_gripper_share < MAX_OPPOSITE_SHARE / 2
        )
        # A motion check does not repeat its finding at every step, so each finding is reported.
        for finding in monitor.motion.examine_next_state(state):
            if finding.key != "gripper" or is_gripper_checked:
                message = monitor.message_prefix + finding.message
                self._limit.print_or_drop_unless_suppressed(message)
        monitor.is_first_state = False

    def _get_or_add_monitor(self, robot: Hashable) -> RobotMonitor:
        """Return a robot's monitor, and move it to the end of the order by latest observation."""
        monitor = self._robots.pop(robot, None)
        if monitor is None:
            # None stands for the example that a server infers at its start. It is not counted.
            num_named_robots = len(self._robots.keys() - {None})
            monitor = RobotMonitor(num_named_robots + 1)
        self._robots[robot] = monitor
        if len(self._robots) > MAX_ROBOTS:
            oldest_robot = next(iter(self._robots))
            del self._robots[oldest_robot]
        return monitor


def _is_comparison_due(num_observations: int, num_new: int) -> bool:
    """Return whether the newest observations of a robot are compared with training.

    Args:
        num_observations: how many observations the robot sent in all.
        num_new: how many of them are new.
    """
    if num_observations <= NUM_FIRST_OBSERVATIONS:
        return True
    # One of the new observations is due if their numbers include a multiple of the interval. The
    # number of observations since that multiple is then smaller than `num_new`.
    num_since_multiple = num_observations % OBSERVATION_INTERVAL
    return num_since_multiple < num_new


def _get_robot_of_each_observation(observations: Sequence[Mapping[str, Any]]) -> list[Hashable]:
    """Return which robot sent each observation; None for an observation that names no robot."""
    return [getattr(observation, "robot", None) for observation in observations]
