"""SIMPLER without ManiSkill: frames in closed form, the oracle through adapter and controller."""

import dataclasses
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
    is_official,
    sample_off_grid_start,
)
from spear.evaluate.simpler.world import _to_ee_pose, compute_opening, is_at_rest, to_base_frame
from spear.types import Array

DOWN = Rotation.from_matrix([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # of the link, gripper down
OBJECT_SIZES_M = {  # of the object to move, and of the goal
    "PutCarrotOnPlateInScene-v1": ([0.115, 0.032, 0.038], [0.11, 0.11, 0.006]),
    "PutEggplantInBasketScene-v1": ([0.078, 0.037, 0.038], [0.13, 0.08, 0.002]),
    "PutSpoonOnTableClothInScene-v1": ([0.14, 0.035, 0.026], [0.1, 0.1, 0.01]),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": ([0.03, 0.03, 0.03], [0.03, 0.03, 0.03]),
}
MAX_HELD_OFFSET_M = 0.035  # closing fingers hold an object that is nearer
GOAL_HALF_WIDTH_M = 0.04


class IdealRobot:
    """The controller's law: the arm is at its target at once, objects stick to closed fingers.

    is_idle          of each step, whether the arm and the gripper command stayed as they were.
    grasp_alignment  cosine between the fingers' axis and the object's long axis at the grasp.
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
        # 3° off the vertical, so that the oracle's commands do not rely on a gripper exactly down.
        self.link_rotation = Rotation.from_euler("y", 3, degrees=True) * DOWN
        self.is_open = True
        self.has_gripper_changed = False
        self.is_idle = [False]
        self.held_offset: Array | None = None
        self.grasp_alignment = 0.0

    def truth(self) -> Truth:
        ee_rotation = (self.link_rotation * DOWN.inv()).as_quat(scalar_first=True)
        pose = np.concatenate([self.ee_position, ee_rotation])
        object_rotation = self.object_rotation.as_quat(scalar_first=True)
        return Truth(
            commanded=pose,
            measured=pose,
            opening=self.opening(),
            open=self.is_open,
            still=self.is_idle[-1],
            closing=self.has_gripper_changed and not self.is_open,
            source=np.concatenate([self.object_position, object_rotation]),
            source_size=self.object_size,
            goal=np.concatenate([self.goal_position, [1, 0, 0, 0]]),
            goal_size=self.goal_size,
        )

    def opening(self) -> float:
        if self.is_open:
            return 1.0
        return 0.0 if self.held_offset is None else 0.6

    def act(self) -> None:
        """Let the oracle act for one step, through the robot's adapter."""
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
        assert np.linalg.norm(command[:3]) <= oracle.MAX_STEP + 1e-6
        self.ee_position = self.ee_position + command[:3]
        self.link_rotation = Rotation.from_euler("XYZ", command[3:6]) * self.link_rotation
        opens = bool(command[6] > 0)
        self.has_gripper_changed = opens != self.is_open
        self.is_open = opens
        has_moved = np.abs(command[:6]).max() >= 1e-4
        self.is_idle.append(not self.has_gripper_changed and not has_moved)
        if self.is_open:
            self._release()
        elif self.has_gripper_changed:
            self._grasp()
        if self.held_offset is not None:
            self.object_position = self.ee_position + self.held_offset

    def _grasp(self) -> None:
        offset = self.object_position - self.ee_position
        if np.linalg.norm(offset) < MAX_HELD_OFFSET_M:
            self.held_offset = offset
            finger_axis = (self.link_rotation * DOWN.inv()).as_matrix()[:, 1]
            long_axis = self.object_rotation.as_matrix()[:, 0]
            self.grasp_alignment = abs(float(finger_axis @ long_axis))

    def _release(self) -> None:
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
    return request.param


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_brings_the_object(task: str, start: tuple[tuple[float, float], float]) -> None:
    object_xy, yaw = start
    robot = IdealRobot(task, object_xy, yaw)
    robot.is_open = False  # the fingers closed on nothing: the oracle tries again

    for _ in range(TASKS[task].max_steps):
        robot.act()

    assert robot.is_open
    offset = robot.object_position[:2] - robot.goal_position[:2]
    assert np.linalg.norm(offset) < 0.006
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

    while robot.is_idle[-1]:  # it is done
        robot.is_idle.pop()
    assert sum(robot.is_idle) == 1


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
    assert is_across or ("Cube" in task and is_along)


# ---- Poses.


def test_a_pose_in_the_world_is_converted_to_the_base_frame() -> None:
    base = np.array([0.147, 0.028, 0.870, 0, 0, 0, 1])  # turned by half a turn about z
    rotation = Rotation.from_euler("z", 90, degrees=True)
    pose = np.array([-0.235, -0.075, 0.8875, *rotation.as_quat(scalar_first=True)])

    converted = to_base_frame(base, pose)

    np.testing.assert_allclose(converted[:3], [0.382, 0.103, 0.0175], atol=1e-9)
    converted_rotation = Rotation.from_quat(converted[3:], scalar_first=True)
    assert (converted_rotation * rotation).magnitude() < 1e-9


def test_the_end_effector_is_parallel_to_the_base_when_the_gripper_points_down() -> None:
    link = np.array([0.3, 0.0, 0.1, *DOWN.as_quat(scalar_first=True)])

    np.testing.assert_allclose(_to_ee_pose(link), [0.3, 0.0, 0.1, 1, 0, 0, 0], atol=1e-9)


@pytest.mark.parametrize(
    ("joint_m", "opening"), [(0.014, 0), (0.015, 0), (0.026, 0.5), (0.037, 1), (0.038, 1)]
)
def test_the_opening_is_a_fraction_of_the_fingers_travel(joint_m: float, opening: float) -> None:
    assert compute_opening(np.full(2, joint_m)) == pytest.approx(opening)


@pytest.mark.parametrize(
    ("moved_m", "opening_change", "at_rest"),
    [
        (1e-4, 0.0, True),  # joints at 0.03 rad/s that press on something go nowhere
        (2e-3, 0.0, False),
        (0.0, -0.1, False),
    ],
)
def test_rest_is_judged_by_the_pose_and_the_opening(
    moved_m: float, opening_change: float, at_rest: bool
) -> None:
    truth = IdealRobot("PutEggplantInBasketScene-v1", (0.3, 0.1), 0.0).truth()
    measured = truth.measured + np.array([moved_m, 0, 0, 0, 0, 0, 0])

    assert is_at_rest(truth, measured, truth.opening + opening_change) == at_rest


# ---- Starts off the grid. The grid is as ManiSkill's of the carrot: four corners, two
# orientations.

CARROT = TASKS["PutCarrotOnPlateInScene-v1"]
CORNERS = np.array([[x, y, 0.88] for x in (-0.235, -0.085) for y in (-0.075, 0.075)])
POSITIONS = np.array([[a, b] for a in CORNERS for b in CORNERS if a is not b])
TURNS = np.array([[[1.0, 0, 0, 0]] * 2, [[0.5**0.5, 0, 0, 0.5**0.5], [1, 0, 0, 0]]])


@pytest.fixture(scope="module")
def starts() -> list[Start]:
    return [sample_off_grid_start(CARROT, seed, POSITIONS, TURNS) for seed in range(300)]


def smallest_turn(start: Start) -> float:
    """From the nearest official orientation of the object to move, rad."""
    official = Rotation.from_quat(TURNS[:, 0], scalar_first=True)
    turn = official.inv() * Rotation.from_quat(start.turns[0], scalar_first=True)
    return float(turn.magnitude().min())


def test_starts_off_the_grid_are_none_of_the_official_ones(starts: list[Start]) -> None:
    for start in starts:
        distances = np.linalg.norm(POSITIONS[:, :, :2] - start.positions[:, :2], axis=-1)
        nearest = distances.max(axis=1).min()
        assert nearest >= MIN_START_OFFSET_M or smallest_turn(start) >= MIN_START_TURN_RAD


def test_starts_off_the_grid_keep_to_the_tasks_limits(starts: list[Start]) -> None:
    for start in starts:
        distance = np.linalg.norm(start.positions[0] - start.positions[1])
        assert distance >= CARROT.min_distance_m
        assert (abs(start.positions[:, :2] - [-0.16, 0]) <= 0.1).all()
        assert smallest_turn(start) <= np.pi / 4 + 1e-9


def test_a_start_close_to_an_official_one_is_official(starts: list[Start]) -> None:
    for start in starts:
        close_positions = POSITIONS[3] + 0.5 * MIN_START_OFFSET_M
        close = dataclasses.replace(start, positions=close_positions, turns=TURNS[1])
        assert is_official(close, POSITIONS, TURNS)


def test_a_start_follows_from_its_seed(starts: list[Start]) -> None:
    resampled = sample_off_grid_start(CARROT, 7, POSITIONS, TURNS)

    np.testing.assert_array_equal(resampled.positions, starts[7].positions)
    assert len({start.positions.tobytes() for start in starts}) == 300


def test_objects_that_the_official_starts_do_not_move_stay() -> None:
    fixed_positions = CORNERS[[[2] * 4, [1] * 4]]
    positions = np.stack([CORNERS, *fixed_positions], axis=1)

    start = sample_off_grid_start(CARROT, 0, positions, TURNS[:, [0, 1, 1]])

    np.testing.assert_array_equal(start.positions[1:], CORNERS[[2, 1]])


def test_a_task_without_room_is_refused() -> None:
    crowded = dataclasses.replace(CARROT, min_distance_m=0.6)

    refuses("min_distance_m", sample_off_grid_start, crowded, 0, POSITIONS, TURNS)


# ---- Recording.


def test_a_recording_that_is_abandoned_waits_for_no_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    is_closed = threading.Event()
    ended_in_time: list[bool] = []

    def record_until_closed(process: object, task: str, seed: int, *_: object) -> None:
        ended_in_time.append(seed == 0 or is_closed.wait(9))

    monkeypatch.setattr(record, "SimplerProcess", lambda *_: SimpleNamespace(close=is_closed.set))
    monkeypatch.setattr(record, "record_episode", record_until_closed)

    episodes = record.record_episodes("task", range(8), (4, 4), workers=1)
    next(episodes)
    del episodes

    assert all(ended_in_time)
