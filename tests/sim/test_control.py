"""The arm: published kinematics, actions that move as they say, limits, and a stable simulation."""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import mujoco
import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import refuses
from spear.embodiments.inverse_kinematics import (
    HOME_JOINTS_RAD,
    JOINT_LOWER_RAD,
    JOINT_UPPER_RAD,
    MAX_JOINT_SPEED_RAD_S,
    compute_ee_pose,
    solve_joints,
)
from spear.embodiments.kinematics import compute_franka_ee_poses
from spear.sim.control import (
    MIN_EE_HEIGHT_M,
    PHYSICS_STEPS_PER_CONTROL_STEP,
    validate_and_split_action,
)
from spear.sim.scene import sample_scene
from spear.sim.world import World

NO_ROTATION = np.array([1.0, 0, 0, 0])  # quaternion (w, x, y, z)
SHOULDER = np.array([0, 0, 0.333])  # position of the arm's shoulder joint, m, base frame
MAX_REACH_M = 0.95  # more than the arm's reach from its shoulder to the point between the fingers
UNSTABLE_SPEED = 100  # rad/s or m/s; if any joint is faster, the simulation has become unstable


def to_rotation(quaternion: np.ndarray) -> Rotation:
    return Rotation.from_quat(np.asarray(quaternion), scalar_first=True)


# --- Kinematics ---


def test_forward_kinematics_equal_the_published_parameters() -> None:
    joints = np.random.default_rng(0).uniform(JOINT_LOWER_RAD, JOINT_UPPER_RAD, (50, 7))
    expected_positions, expected_rotations = compute_franka_ee_poses(joints)

    for i in range(len(joints)):
        position, rotation = compute_ee_pose(joints[i])

        np.testing.assert_allclose(position, expected_positions[i], atol=1e-9)
        matrix = to_rotation(rotation).as_matrix()
        expected_matrix = to_rotation(expected_rotations[i]).as_matrix()
        np.testing.assert_allclose(matrix, expected_matrix, atol=1e-9)


def test_inverse_kinematics_reaches_poses_over_the_table_inside_the_limits() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        # Over the table (m), tilted by up to 0.25 rad, turned about the vertical by up to 1.2 rad.
        target = rng.uniform([0.35, -0.25, 0.02], [0.62, 0.25, 0.35])
        target_rotation = Rotation.from_rotvec(rng.uniform([-0.25, -0.25, -1.2], [0.25, 0.25, 1.2]))
        quaternion = target_rotation.as_quat(scalar_first=True)

        joints = solve_joints(HOME_JOINTS_RAD, target, quaternion, iterations=60)

        position, rotation = compute_ee_pose(joints)
        assert np.linalg.norm(position - target) < 1e-3
        assert (to_rotation(rotation).inv() * target_rotation).magnitude() < 5e-3
        assert (joints > JOINT_LOWER_RAD).all()
        assert (joints < JOINT_UPPER_RAD).all()


@pytest.fixture
def frequent_thread_switches() -> Iterator[None]:
    """Let Python switch between threads every microsecond, so that races become likely."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("frequent_thread_switches")
def test_threads_that_solve_at_once_find_what_each_finds_alone() -> None:
    rng = np.random.default_rng(3)
    targets = [rng.uniform([0.35, -0.2, 0.05], [0.6, 0.2, 0.3]) for _ in range(40)]

    def solve(target: np.ndarray) -> np.ndarray:
        return solve_joints(HOME_JOINTS_RAD, target, NO_ROTATION)

    alone = [solve(target) for target in targets]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(solve, targets))

    np.testing.assert_array_equal(together, alone)


# --- The servo ---


def test_actions_move_in_the_base_frame_and_turn_in_the_ee_frame() -> None:
    rng = np.random.default_rng(2)
    world = World(sample_scene("spoon_on_towel", 0))
    servo = world.servo
    for _ in range(15):
        # Start high over the table, in free space.
        world.reset()
        servo.move_for_one_control_step(np.array([0, 0, 0.08]), NO_ROTATION, 1.0)
        position_before, rotation_before = servo.measure_pose()
        step = rng.uniform(-0.03, 0.03, 3)
        turn = Rotation.from_rotvec(rng.uniform(-0.15, 0.15, 3))

        is_unreachable = servo.move_for_one_control_step(step, turn.as_quat(scalar_first=True), 1.0)

        position, rotation = servo.measure_pose()
        assert not is_unreachable
        np.testing.assert_allclose(position - position_before, step, atol=2e-3)
        expected_rotation = to_rotation(rotation_before) * turn
        error_rad = (expected_rotation.inv() * to_rotation(rotation)).magnitude()
        assert error_rad < math.radians(0.6)


class TestTargetOutOfReach:
    @pytest.fixture
    def world(self) -> World:
        """A world whose arm was moved forward for 15 steps, farther than it can reach.

        `is_unreachable` has what the servo reported at each step.
        """
        world = World(sample_scene("put_on", 0))
        self.is_unreachable = [
            world.servo.move_for_one_control_step(np.array([0.06, 0, 0.02]), NO_ROTATION, 1.0)
            for _ in range(15)
        ]
        return world

    def test_is_reported(self, world: World) -> None:
        assert not self.is_unreachable[0]
        assert self.is_unreachable[-1]
        position, _ = world.servo.measure_pose()
        assert np.linalg.norm(position - SHOULDER) < MAX_REACH_M

    def test_does_not_wind_up_so_the_arm_comes_back_at_once(self, world: World) -> None:
        stretched, _ = world.servo.measure_pose()

        for _ in range(2):
            assert not world.servo.move_for_one_control_step(
                np.array([-0.05, 0, -0.02]), NO_ROTATION, 0.3
            )

        # Two steps back, of 5 cm each, move the arm back by more than 6 cm, and close the gripper.
        position, _ = world.servo.measure_pose()
        assert stretched[0] - position[0] > 0.06
        assert world.servo.measure_opening() < 0.05


def test_the_gripper_stays_over_the_table_and_reports_it() -> None:
    world = World(sample_scene("put_on", 0))

    for _ in range(10):
        is_unreachable = world.servo.move_for_one_control_step(
            np.array([0, 0, -0.05]), NO_ROTATION, 0.9
        )

    position, _ = world.servo.measure_pose()
    assert is_unreachable
    assert position[2] > MIN_EE_HEIGHT_M - 0.003  # the servo may miss its target by 3 mm


@pytest.mark.parametrize("seed", range(3))
def test_wild_actions_never_make_the_arm_unstable_nor_leave_its_limits(seed: int) -> None:
    """Random actions of about half a meter keep the joints within their speeds and angles."""
    rng = np.random.default_rng([3, seed])
    world = World(sample_scene("put_in_basket", seed))
    control_step_s = PHYSICS_STEPS_PER_CONTROL_STEP * world.model.opt.timestep
    for _ in range(25):
        quaternion = rng.normal(size=4)
        quaternion /= np.linalg.norm(quaternion)
        command_before = world.servo._joint_command

        world.servo.move_for_one_control_step(rng.normal(0, 0.5, 3), quaternion, rng.random())

        joint_step = np.abs(world.servo._joint_command - command_before)
        assert (joint_step <= MAX_JOINT_SPEED_RAD_S * control_step_s + 1e-9).all()
        # The measured angles may exceed the limits of the commands by 0.02 rad.
        joints = world.data.qpos[world.servo._joints]
        assert (joints > JOINT_LOWER_RAD - 0.02).all()
        assert (joints < JOINT_UPPER_RAD + 0.02).all()
        assert np.isfinite(world.data.qpos).all()
        assert np.abs(world.data.qvel).max() < UNSTABLE_SPEED
    assert world.data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number == 0


# --- Actions ---


# Each bad action, and the part of it that the error shows: a number, the norm, or the shape.
@pytest.mark.parametrize(
    ("action", "message"),
    [
        ([0, 0, np.inf, 1, 0, 0, 0, 1], "inf"),
        ([0, 0, 0, 1.01, 0, 0, 0, 1], "1.0100"),
        (np.zeros(8), "0.0000"),
        (np.zeros(7), "7"),
    ],
)
def test_bad_actions_are_refused(action: np.ndarray, message: str) -> None:
    refuses(message, validate_and_split_action, np.asarray(action))


def test_a_quaternion_of_about_unit_length_is_normalized() -> None:
    _, rotation, _ = validate_and_split_action(np.array([0, 0, 0, 1.0009, 0, 0, 0, 1]))

    np.testing.assert_allclose(rotation, NO_ROTATION)


# A program that simulates the first 12 steps of an episode, and stores the joint angles as text.
EPISODE = """
from spear.sim import expert
from spear.sim.env import TabletopEnv

env = TabletopEnv("put_in_basket", images=False)
env.reset(seed=3)
for _ in range(12):
    env.step_without_observing(expert.act(env.world))
result = env.world.data.qpos.tobytes().hex()
"""


def test_another_processor_makes_the_same_episode() -> None:
    """The episode is the same here and with the linear algebra of an old processor.

    NumPy's matrix products would round the last bit differently there, and the difference would
    grow until the episodes differ visibly.
    """
    variables: dict[str, str] = {}
    exec(EPISODE, variables)
    # Prescott is the oldest processor that OpenBLAS has code for; every x86 can run this code.
    old_processor = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}

    command = [sys.executable, "-c", EPISODE + "print(result)"]
    result = subprocess.run(command, env=old_processor, capture_output=True, text=True, check=True)

    assert result.stdout.strip() == variables["result"]
