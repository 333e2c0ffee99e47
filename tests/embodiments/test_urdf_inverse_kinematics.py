"""The inverse kinematics of a URDF lead back to a pose, or say how far away it stays."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from joint_datasets import SMALL_ARM, TIP, JointElement, write_urdf
from refusals import refuses
from spear.embodiments.urdf import UrdfArm, compute_urdf_pose, read_urdf_arm
from spear.embodiments.urdf_inverse_kinematics import solve_urdf_joints

ALL_TYPES = [
    JointElement("slide", "prismatic", "0.1 0.2 0.3", "0.3 -0.2 1", "0.6 0 0.8"),
    JointElement("plate", "fixed", "0 0.1 0", "1 0.5 -0.4"),
    JointElement("spin", "continuous", "0.05 0 0.2", "-1 0.2 0.3", "1 2 -2"),
    JointElement("bend", "revolute", "0 0 0.3", "0 1 0", "0 1 0"),
]
POSTURE_RAD = np.array([0.1, -0.4, 0.6, 0.7, 0.2])


@pytest.fixture
def small_arm(tmp_path: Path) -> UrdfArm:
    """An arm with the five joints, and about the size, of an SO-101; limits of 2 rad."""
    return read_urdf_arm(write_urdf(tmp_path), TIP)


@pytest.mark.parametrize("joints", [SMALL_ARM, ALL_TYPES], ids=["small_arm", "all_types"])
def test_joint_angles_lead_back_to_a_pose_that_the_arm_reaches(
    tmp_path: Path, joints: list[JointElement]
) -> None:
    arm = read_urdf_arm(write_urdf(tmp_path, joints), TIP)
    rng = np.random.default_rng(0)
    for _ in range(20):
        true_joints = rng.uniform(-1.5, 1.5, len(arm.moving_joint_names))
        start = true_joints + rng.uniform(-0.3, 0.3, len(true_joints))
        positions, rotations = compute_urdf_pose(arm, true_joints[None])

        solution = solve_urdf_joints(arm, start, positions[0], rotations[0])

        solved_positions, solved_rotations = compute_urdf_pose(arm, solution.joints[None])
        assert np.linalg.norm(solved_positions - positions) < 1e-3
        assert abs(solved_rotations[0] @ rotations[0]) > np.cos(np.radians(0.5) / 2)


def test_the_errors_are_those_of_the_pose_to_which_the_angles_lead(small_arm: UrdfArm) -> None:
    positions, rotations = compute_urdf_pose(small_arm, POSTURE_RAD[None])
    target = positions[0] + [0, 0, 0.5]

    solution = solve_urdf_joints(small_arm, POSTURE_RAD, target, rotations[0])

    solved_positions, solved_rotations = compute_urdf_pose(small_arm, solution.joints[None])
    distance_m = np.linalg.norm(solved_positions[0] - target)
    angle_rad = 2 * np.arccos(abs(solved_rotations[0] @ rotations[0]))
    assert distance_m > 0.05
    assert solution.position_error_m == pytest.approx(distance_m)
    assert solution.rotation_error_rad == pytest.approx(angle_rad, abs=1e-6)


def test_the_position_comes_before_the_orientation(small_arm: UrdfArm) -> None:
    """Five joints cannot turn the tip in all directions about a point."""
    positions, rotations = compute_urdf_pose(small_arm, POSTURE_RAD[None])
    rotation = Rotation.from_quat(rotations[0], scalar_first=True)
    turn_rad = 0.3
    for axis in np.eye(3):
        target = (Rotation.from_rotvec(turn_rad * axis) * rotation).as_quat(scalar_first=True)

        solution = solve_urdf_joints(small_arm, POSTURE_RAD, positions[0], target)

        assert solution.position_error_m < 1e-3
        assert solution.rotation_error_rad <= turn_rad + 1e-6


def test_angles_stay_within_the_limits(small_arm: UrdfArm) -> None:
    beyond_limits = np.array([1.9, 1.9, -1.9, 2.2, 2.2])
    positions, rotations = compute_urdf_pose(small_arm, beyond_limits[None])

    solution = solve_urdf_joints(small_arm, beyond_limits, positions[0], rotations[0])

    assert np.abs(solution.joints).max() <= 2
    assert solution.rotation_error_rad > 0.1


def test_no_joint_turns_further_than_allowed(small_arm: UrdfArm) -> None:
    positions, rotations = compute_urdf_pose(small_arm, POSTURE_RAD[None] + 0.5)

    solution = solve_urdf_joints(small_arm, POSTURE_RAD, positions[0], rotations[0], max_turn=0.1)

    assert np.abs(solution.joints - POSTURE_RAD).max() <= 0.1 + 1e-9
    assert solution.position_error_m > 0.01


def test_another_number_of_joints_is_refused(small_arm: UrdfArm) -> None:
    position = np.array([0.2, 0, 0.2])
    rotation = np.array([1.0, 0, 0, 0])

    refuses(
        "5 joints lead to the link", solve_urdf_joints, small_arm, np.zeros(6), position, rotation
    )
