"""SIMPLER without ManiSkill: the oracle on an ideal robot, conversions of poses, and starts.

Poses and frames have known values, which are computed by hand.
"""

import dataclasses
import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import refuses
from spear import embodiments
from spear.embodiments.simpler_widowx import POSE_KEY
from spear.evaluate.simpler import oracle, record
from spear.evaluate.simpler.tasks import (
    MIN_START_OFFSET_M,
    MIN_START_TURN_RAD,
    TASKS,
    Start,
    Truth,
    is_near_official_start,
    sample_off_grid_start,
)
from spear.evaluate.simpler.world import _to_ee_pose, compute_opening, is_arm_at_rest, to_base_frame
from spear.types import Array

# Orientation of ManiSkill's gripper link when the gripper points down.
DOWN = Rotation.from_matrix([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
OBJECT_SIZES_M = {  # task → sizes of the object to move, and of the goal
    "PutCarrotOnPlateInScene-v1": ([0.115, 0.032, 0.038], [0.11, 0.11, 0.006]),
    "PutEggplantInBasketScene-v1": ([0.078, 0.037, 0.038], [0.13, 0.08, 0.002]),
    "PutSpoonOnTableClothInScene-v1": ([0.14, 0.035, 0.026], [0.1, 0.1, 0.01]),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": ([0.03, 0.03, 0.03], [0.03, 0.03, 0.03]),
}
MAX_HELD_OFFSET_M = 0.035  # closing fingers hold an object that is nearer
GOAL_HALF_WIDTH_M = 0.04


class IdealRobot:
    """A robot whose arm is at its target at once, and to whose closed fingers objects stick.

    Args:
        task: The task, which the oracle knows.
        object_xy: Position of the object to move, m.
        yaw: Rotation of this object about the vertical, rad.

    idle_flags       for each step, whether arm and gripper command stayed as they were.
    held_offset      [3] position of a held object relative to the end effector; None without one.
    grasp_alignment  cosine of the angle between the axis along which the fingers close and the
                     object's long axis, at the last grasp.
    """

    def __init__(self, task: str, object_xy: tuple[float, float], yaw: float) -> None:
        self.task = task
        self.embodiment = embodiments.load("simpler_widowx")
        object_size, goal_size = OBJECT_SIZES_M[task]
        self.object_size = np.array(object_size)
        self.goal_size = np.array(goal_size)
        self.object_position = np.array([*object_xy, object_size[2] / 2])
        self.object_rotation = Rotation.from_euler("z", yaw)
        self.goal_position = np.array([0.32, -0.08, goal_size[2] / 2])
        self.ee_position = np.array([0.29, 0.0, 0.13])
        # The gripper points 3° off the vertical, so that the oracle cannot rely on its direction.
        self.link_rotation = Rotation.from_euler("y", 3, degrees=True) * DOWN
        self.is_open = True
        self.has_gripper_changed = False
        self.idle_flags = [False]
        self.held_offset: Array | None = None
        self.grasp_alignment = 0.0

    def truth(self) -> Truth:
        """Return the true state for the oracle."""
        ee_rotation = (self.link_rotation * DOWN.inv()).as_quat(scalar_first=True)
        pose = np.concatenate([self.ee_position, ee_rotation])
        object_rotation = self.object_rotation.as_quat(scalar_first=True)
        return Truth(
            commanded=pose,
            measured=pose,
            opening=self.opening(),
            is_commanded_open=self.is_open,
            is_still=self.idle_flags[-1],
            is_closing=self.has_gripper_changed and not self.is_open,
            source=np.concatenate([self.object_position, object_rotation]),
            source_size=self.object_size,
            goal=np.concatenate([self.goal_position, [1, 0, 0, 0]]),
            goal_size=self.goal_size,
        )

    def opening(self) -> float:
        """Return the gripper opening. With an object between the fingers it is 0.6."""
        if self.is_open:
            return 1.0
        return 0.0 if self.held_offset is None else 0.6

    def act(self) -> None:
        """Let the oracle choose an action, convert it with the robot's adapter, and execute it."""
        truth = self.truth()
        link_rotation = self.link_rotation.as_quat(scalar_first=True)
        observation = {
            "observation/image": np.zeros((48, 64, 3), np.uint8),
            POSE_KEY: np.concatenate([self.ee_position, link_rotation, [truth.opening]]),
            "prompt": "go",
        }
        state = self.embodiment.read(observation)["observation/state"]
        action = oracle.choose_action(self.task, truth)
        _, control = self.embodiment.select_control(None)
        (command,) = control.convert(action[None], state, observation)
        self.execute(command)

    def execute(self, command: Array) -> None:
        """Execute a command [7]: translation, rotation (Euler angles), gripper (1 is open)."""
        assert np.linalg.norm(command[:3]) <= oracle.MAX_STEP_M + 1e-6
        self.ee_position = self.ee_position + command[:3]
        self.link_rotation = Rotation.from_euler("XYZ", command[3:6]) * self.link_rotation
        opens = bool(command[6] > 0)
        self.has_gripper_changed = opens != self.is_open
        self.is_open = opens
        has_moved = np.abs(command[:6]).max() >= 1e-4
        self.idle_flags.append(not self.has_gripper_changed and not has_moved)
        if self.is_open:
            self._release()
        elif self.has_gripper_changed:
            self._grasp()
        if self.held_offset is not None:
            self.object_position = self.ee_position + self.held_offset

    def _grasp(self) -> None:
        """Hold the object if it is near enough."""
        offset = self.object_position - self.ee_position
        if np.linalg.norm(offset) < MAX_HELD_OFFSET_M:
            self.held_offset = offset
            # The fingers close along the y axis of the end-effector frame.
            ee_rotation = self.link_rotation * DOWN.inv()
            finger_axis = ee_rotation.as_matrix()[:, 1]
            long_axis = self.object_rotation.as_matrix()[:, 0]
            self.grasp_alignment = abs(float(finger_axis @ long_axis))

    def _release(self) -> None:
        """Let a held object fall onto the goal, or onto the table."""
        if self.held_offset is None:
            return
        self.held_offset = None
        goal_offset = np.abs(self.object_position - self.goal_position)[:2].max()
        is_over_goal = goal_offset < GOAL_HALF_WIDTH_M
        goal_top = self.goal_position[2] + self.goal_size[2] / 2
        support = goal_top if is_over_goal else 0
        self.object_position[2] = self.object_size[2] / 2 + support


# ---- The oracle.


@pytest.fixture(params=[((0.38, 0.1), 0.3), ((0.24, 0.06), -1.4)], ids=["far", "near"])
def start(request: pytest.FixtureRequest) -> tuple[tuple[float, float], float]:
    """Position (m) and rotation about the vertical (rad) of the object to move."""
    return request.param


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_brings_the_object(task: str, start: tuple[tuple[float, float], float]) -> None:
    object_xy, yaw = start
    robot = IdealRobot(task, object_xy, yaw)
    robot.is_open = False  # as if the fingers had closed on nothing, so that the oracle tries again

    for _ in range(TASKS[task].max_steps):
        robot.act()

    assert robot.is_open
    offset = robot.object_position[:2] - robot.goal_position[:2]
    assert np.linalg.norm(offset) < 0.006  # m
    # The gripper has retreated by at least 8 cm.
    assert robot.ee_position[2] > robot.object_position[2] + 0.08


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_waits_only_while_its_fingers_close(
    task: str, start: tuple[tuple[float, float], float]
) -> None:
    object_xy, yaw = start
    robot = IdealRobot(task, object_xy, yaw)
    robot.is_open = False

    for _ in range(TASKS[task].max_steps):
        robot.act()

    while robot.idle_flags[-1]:  # the steps at the end, when the task is fulfilled, do not count
        robot.idle_flags.pop()
    assert sum(robot.idle_flags) == 1  # the step in which the fingers close


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_grasps_across_the_object(
    task: str, start: tuple[tuple[float, float], float]
) -> None:
    object_xy, yaw = start
    robot = IdealRobot(task, object_xy, yaw)

    for _ in range(TASKS[task].max_steps):
        robot.act()

    is_across = robot.grasp_alignment < 0.1
    is_along = robot.grasp_alignment > 0.99
    is_cube = "Cube" in task  # a cube has no long side
    assert is_across or (is_cube and is_along)


# ---- Poses.


def test_a_pose_in_the_world_is_converted_to_the_base_frame() -> None:
    base = np.array([0.147, 0.028, 0.870, 0, 0, 0, 1])  # rotated by half a turn about z
    rotation = Rotation.from_euler("z", 90, degrees=True)
    pose = np.array([-0.235, -0.075, 0.8875, *rotation.as_quat(scalar_first=True)])

    converted = to_base_frame(base, pose)

    # x and y of pose - base, with opposite signs; z of pose - base.
    np.testing.assert_allclose(converted[:3], [0.382, 0.103, 0.0175], atol=1e-9)
    # 90° minus half a turn is -90°, the inverse rotation.
    converted_rotation = Rotation.from_quat(converted[3:], scalar_first=True)
    assert (converted_rotation * rotation).magnitude() < 1e-9


def test_the_end_effector_is_parallel_to_the_base_when_the_gripper_points_down() -> None:
    link = np.array([0.3, 0.0, 0.1, *DOWN.as_quat(scalar_first=True)])

    np.testing.assert_allclose(_to_ee_pose(link), [0.3, 0.0, 0.1, 1, 0, 0, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("joint_m", "opening"), [(0.014, 0), (0.015, 0), (0.026, 0.5), (0.037, 1), (0.038, 1)]
)
def test_the_opening_is_a_fraction_of_the_fingers_travel(joint_m: float, opening: float) -> None:
    """The fingers travel from 0.015 m (closed) to 0.037 m (open), and 1 mm beyond either end."""
    assert compute_opening(np.full(2, joint_m)) == pytest.approx(opening)


@pytest.mark.parametrize(
    ("moved_m", "opening_change", "at_rest"),
    [
        (1e-4, 0.0, True),  # joints that press on something tremble, but the pose hardly moves
        (2e-3, 0.0, False),  # the arm moves
        (0.0, -0.1, False),  # the fingers close
    ],
)
def test_rest_is_judged_by_the_pose_and_the_opening(
    moved_m: float, opening_change: float, at_rest: bool
) -> None:
    robot = IdealRobot("PutEggplantInBasketScene-v1", object_xy=(0.3, 0.1), yaw=0.0)
    truth = robot.truth()
    measured = truth.measured + np.array([moved_m, 0, 0, 0, 0, 0, 0])

    assert is_arm_at_rest(truth, measured, truth.opening + opening_change) == at_rest


# ---- Starts off the grid. The official starts are ManiSkill's of the carrot: carrot and plate lie
# at two of four corners, and the carrot has one of two orientations.

CARROT = TASKS["PutCarrotOnPlateInScene-v1"]
X_Y_OF_CORNERS = itertools.product((-0.235, -0.085), (-0.075, 0.075))
CORNERS = np.array([[x, y, 0.88] for x, y in X_Y_OF_CORNERS])  # [4, 3]
POSITIONS = np.array(list(itertools.permutations(CORNERS, 2)))  # [12, 2, 3]
UPRIGHT = [1.0, 0, 0, 0]
TURNED_BY_90_DEG = [0.5**0.5, 0, 0, 0.5**0.5]
ORIENTATIONS = np.array([[UPRIGHT, UPRIGHT], [TURNED_BY_90_DEG, UPRIGHT]])  # [2, 2, 4]


@pytest.fixture(scope="module")
def starts() -> list[Start]:
    """300 starts off the grid, with the seeds 0 to 299."""
    return [sample_off_grid_start(CARROT, seed, POSITIONS, ORIENTATIONS) for seed in range(300)]


def smallest_turn(start: Start) -> float:
    """Return the angle from the nearest official orientation of the object to move, rad."""
    official = Rotation.from_quat(ORIENTATIONS[:, 0], scalar_first=True)
    turn = official.inv() * Rotation.from_quat(start.orientations[0], scalar_first=True)
    return float(turn.magnitude().min())


def test_starts_off_the_grid_are_none_of_the_official_ones(starts: list[Start]) -> None:
    for start in starts:
        distances = np.linalg.norm(POSITIONS[:, :, :2] - start.positions[:, :2], axis=-1)
        # From each official start, the farther of the two objects counts.
        smallest_offset = distances.max(axis=1).min()
        is_elsewhere = smallest_offset >= MIN_START_OFFSET_M
        assert is_elsewhere or smallest_turn(start) >= MIN_START_TURN_RAD


def test_starts_off_the_grid_keep_to_the_tasks_limits(starts: list[Start]) -> None:
    for start in starts:
        distance = np.linalg.norm(start.positions[0] - start.positions[1])
        assert distance >= CARROT.min_distance_m
        offset_from_middle = start.positions[:, :2] - CORNERS[:, :2].mean(0)
        assert (abs(offset_from_middle) <= CARROT.max_offset_m).all()
        assert smallest_turn(start) <= np.pi / 4 + 1e-9


def test_a_start_close_to_an_official_one_is_official(starts: list[Start]) -> None:
    for start in starts:
        close_positions = POSITIONS[3] + 0.5 * MIN_START_OFFSET_M  # along each axis
        close = dataclasses.replace(start, positions=close_positions, orientations=ORIENTATIONS[1])
        assert is_near_official_start(close, POSITIONS, ORIENTATIONS)


def test_a_start_follows_from_its_seed(starts: list[Start]) -> None:
    resampled = sample_off_grid_start(CARROT, 7, POSITIONS, ORIENTATIONS)

    np.testing.assert_array_equal(resampled.positions, starts[7].positions)
    assert len({start.positions.tobytes() for start in starts}) == 300


def test_objects_that_the_official_starts_do_not_move_stay() -> None:
    """Three objects: the first is on each corner in turn, the others always on corners 2 and 1."""
    fixed_positions = np.broadcast_to(CORNERS[[2, 1]], (4, 2, 3))
    positions = np.concatenate([CORNERS[:, None], fixed_positions], axis=1)  # [4, 3 objects, 3]
    orientations = ORIENTATIONS[:, [0, 1, 1]]  # [2, 3 objects, 4]

    start = sample_off_grid_start(CARROT, 0, positions, orientations)

    np.testing.assert_array_equal(start.positions[1:], CORNERS[[2, 1]])


def test_a_task_without_room_is_refused() -> None:
    crowded = dataclasses.replace(CARROT, min_distance_m=0.6)  # more than the table has

    refuses("min_distance_m", sample_off_grid_start, crowded, 0, POSITIONS, ORIENTATIONS)


# ---- Recording.


def test_a_recording_that_is_abandoned_waits_for_no_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Deleting the iterator closes the processes, which ends the episodes that they record."""
    is_closed = threading.Event()
    ended_in_time: list[bool] = []

    def record_until_closed(process: object, task: str, seed: int, *_: object) -> None:
        """Record seed 0 at once, and other seeds until the process is closed, at most 9 s."""
        ended_in_time.append(seed == 0 or is_closed.wait(9))

    monkeypatch.setattr(record, "SimplerProcess", lambda *_: SimpleNamespace(close=is_closed.set))
    monkeypatch.setattr(record, "record_episode", record_until_closed)

    episodes = record.record_episodes("task", range(8), (4, 4), workers=1)
    next(episodes)
    del episodes

    assert all(ended_in_time)
