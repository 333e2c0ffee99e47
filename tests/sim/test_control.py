"""The arm: published kinematics, actions that do what they say, limits, and no way to make it unstable."""

import math
import os
import subprocess
import sys
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
from spear.embodiments.kinematics import franka_pose
from spear.sim import control
from spear.sim.control import FLOOR, check_action
from spear.sim.scene import sample_scene
from spear.sim.world import World

STILL = np.array([1.0, 0, 0, 0])


def as_rotation(quat: np.ndarray) -> Rotation:
    return Rotation.from_quat(np.asarray(quat), scalar_first=True)


def test_forward_kinematics_equal_the_published_parameters() -> None:
    joints = np.random.default_rng(0).uniform(JOINT_LOWER_RAD, JOINT_UPPER_RAD, (50, 7))
    for row, position, rotation in zip(joints, *franka_pose(joints), strict=True):
        at, turned = compute_ee_pose(row)
        np.testing.assert_allclose(at, position, atol=1e-9)
        np.testing.assert_allclose(
            *[as_rotation(one).as_matrix() for one in (turned, rotation)], atol=1e-9
        )


def test_inverse_kinematics_reaches_poses_over_the_table_inside_the_limits() -> None:
    rng = np.random.default_rng(1)
    for _ in range(40):
        position = rng.uniform([0.35, -0.25, 0.02], [0.62, 0.25, 0.35])
        lean = Rotation.from_rotvec(rng.uniform([-0.25, -0.25, -1.2], [0.25, 0.25, 1.2]))
        joints = solve_joints(
            HOME_JOINTS_RAD,
            position,
            lean.as_quat(scalar_first=True),
            iterations=60,
        )
        at, turn = compute_ee_pose(joints)
        assert (
            np.linalg.norm(at - position) < 1e-3
            and (as_rotation(turn).inv() * lean).magnitude() < 5e-3
        )
        assert (joints > JOINT_LOWER_RAD).all() and (joints < JOINT_UPPER_RAD).all()


def test_threads_that_solve_at_once_find_what_each_finds_alone() -> None:
    rng = np.random.default_rng(3)
    tasks = [(rng.uniform([0.35, -0.2, 0.05], [0.6, 0.2, 0.3]), STILL) for _ in range(40)]
    alone = [solve_joints(HOME_JOINTS_RAD, *task) for task in tasks]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            together = list(
                threads.map(
                    lambda task: solve_joints(HOME_JOINTS_RAD, *task),
                    tasks,
                )
            )
    finally:
        sys.setswitchinterval(interval)
    np.testing.assert_array_equal(together, alone)


def test_actions_move_in_the_base_frame_and_turn_in_the_ee_frame() -> None:
    rng, world = np.random.default_rng(2), World(sample_scene("spoon_on_towel", 0))
    for _ in range(15):
        # stay high over the table: free space
        world.reset()
        world.servo.move(np.array([0, 0, 0.08]), STILL, 1.0)
        before, turn = world.servo.pose()
        step = rng.uniform(-0.03, 0.03, 3)
        delta = Rotation.from_rotvec(rng.uniform(-0.15, 0.15, 3))
        assert not world.servo.move(step, delta.as_quat(scalar_first=True), 1.0)
        after, turned = world.servo.pose()
        np.testing.assert_allclose(after - before, step, atol=2e-3)
        assert ((as_rotation(turn) * delta).inv() * as_rotation(turned)).magnitude() < math.radians(
            0.6
        )


def test_a_target_out_of_reach_is_reported_and_the_arm_comes_back_at_once() -> None:
    world = World(sample_scene("put_on", 0))
    unreachable = [world.servo.move(np.array([0.06, 0, 0.02]), STILL, 1.0) for _ in range(15)]
    assert not unreachable[0] and unreachable[-1]
    far, _ = world.servo.pose()
    assert np.linalg.norm(far - [0, 0, 0.333]) < 0.95
    for _ in range(2):
        assert not world.servo.move(np.array([-0.05, 0, -0.02]), STILL, 0.3)
    assert far[0] - world.servo.pose()[0][0] > 0.06 and world.servo.opening() < 0.05
    world.reset()
    unreachable = [world.servo.move(np.array([0, 0, -0.05]), STILL, 0.9) for _ in range(10)]
    assert unreachable[-1] and world.servo.pose()[0][2] > FLOOR - 0.003  # the table


def test_wild_actions_never_make_it_unstable_nor_leave_the_limits() -> None:
    rng = np.random.default_rng(3)
    for seed in range(3):
        world = World(sample_scene("put_in_basket", seed))
        for _ in range(25):
            quat, before = rng.normal(size=4), world.servo._command
            world.servo.move(rng.normal(0, 0.5, 3), quat / np.linalg.norm(quat), rng.random())
            asked = np.abs(world.servo._command - before)
            assert (
                asked <= MAX_JOINT_SPEED_RAD_S * control.SUBSTEPS * world.model.opt.timestep + 1e-9
            ).all()
            joints = world.data.qpos[world.servo._joints]
            assert (joints > JOINT_LOWER_RAD - 0.02).all() and (
                joints < JOINT_UPPER_RAD + 0.02
            ).all()
            assert np.isfinite(world.data.qpos).all() and np.abs(world.data.qvel).max() < 100
        assert world.data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number == 0


@pytest.mark.parametrize(
    ("action", "what"),
    [
        ([0, 0, np.inf, 1, 0, 0, 0, 1], "inf"),
        ([0, 0, 0, 1.01, 0, 0, 0, 1], "1.0100"),
        (np.zeros(8), "0.0000"),
        (np.zeros(7), "7"),
    ],
)
def test_bad_actions_are_refused_and_others_normalised(action: np.ndarray, what: str) -> None:
    refuses(what, check_action, np.asarray(action))
    np.testing.assert_allclose(
        check_action(np.array([0, 0, 0, 1.0009, 0, 0, 0, 1]))[1], [1, 0, 0, 0]
    )


EPISODE = """
from spear.sim import expert
from spear.sim.env import TabletopEnv

env = TabletopEnv("put_in_basket", images=False)
env.reset(seed=3)
for _ in range(12):
    env.physics_step(expert.act(env.world))
result = env.world.data.qpos.tobytes().hex()
"""


def test_another_processor_makes_the_same_episode() -> None:
    """Last bits that NumPy's linear algebra rounds otherwise there would grow into another episode."""
    here: dict[str, str] = {}
    exec(EPISODE, here)
    other = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}  # instructions that every x86 has
    code = [sys.executable, "-c", EPISODE + "print(result)"]
    there = subprocess.run(code, env=other, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here["result"]
