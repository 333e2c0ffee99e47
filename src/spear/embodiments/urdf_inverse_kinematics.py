"""Inverse kinematics of any arm that a URDF describes: converts poses of a link to joint angles.

`spear.embodiments.urdf` converts joint angles of a whole recording to poses. This module needs one
pose at a time, and how it changes with each joint. Unlike `spear.embodiments.inverse_kinematics`,
which is for the Franka arm, it needs no MuJoCo.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

from spear.embodiments.urdf import UrdfArm
from spear.errors import SpearError, format_count
from spear.geometry import quat_to_matrix
from spear.types import Array

METERS_PER_RAD = 0.01  # so small that an arm with too few joints reaches the position first


class JointSolution(NamedTuple):
    """Joint angles that lead near to a target pose.

    Attributes:
        joints: [d] rad (m for a prismatic joint), from the base to the tip.
        position_error_m: how far the tip then is from the target.
        rotation_error_rad: by which angle the tip's orientation then differs from the target.
    """

    joints: Array
    position_error_m: float
    rotation_error_rad: float


class _TipMotion(NamedTuple):
    """The pose of an arm's tip, and how it changes with each joint; all in the base frame.

    Attributes:
        position: [3] m.
        matrix: [3, 3] the orientation.
        velocities: [d, 3] of the tip, per rad (or m) of each joint.
        angular_velocities: [d, 3] of the tip, likewise.
    """

    position: Array
    matrix: Array
    velocities: Array
    angular_velocities: Array


def solve_urdf_joints(
    arm: UrdfArm, joints: Array, position: Array, rotation: Array, max_turn: float = math.inf
) -> JointSolution:
    """Find the joint angles at which the tip of an arm is as near to a target pose as possible.

    The angles stay within the limits of the URDF. If no angles lead to the pose, the position comes
    first and the orientation second, and the errors of the result say how far away the tip is. An
    arm with five joints, for example, reaches most positions but few orientations.

    Args:
        arm: the arm.
        joints: [d] angles to begin from, rad (m for a prismatic joint), from the base to the tip.
        position: [3] target of the tip, m, base frame.
        rotation: [4] target of the tip, unit quaternion (w, x, y, z), base frame.
        max_turn: how far a joint may be from `joints` at most, rad (m).

    Returns:
        The angles and their errors.

    Raises:
        SpearError: there is not one number for each joint.

    Example:
        >>> arm = read_urdf_arm(Path("arm.urdf"), "gripper_frame_link")  # doctest: +SKIP
        >>> solution = solve_urdf_joints(arm, joints, position, rotation)  # doctest: +SKIP
        >>> solution.position_error_m < 0.01  # doctest: +SKIP
        True
    """
    if np.shape(joints) != (len(arm.moving_joint_names),):
        raise SpearError(
            f"there are joint angles of the shape {list(np.shape(joints))}, but "
            f"{format_count(len(arm.moving_joint_names), 'joints')} lead to the link {arm.tip!r} "
            f"({', '.join(arm.moving_joint_names)}). Give one number for each of them."
        )
    target_matrix = quat_to_matrix(torch.from_numpy(np.array(rotation, np.float64))).numpy()
    # If two orientations differ by a small angle, the Frobenius norm of the difference of their
    # matrices is √2 times the angle.
    matrix_weight_m = METERS_PER_RAD / math.sqrt(2)

    def compute_errors(angles: Array) -> Array:
        """Compute the differences [12] from the target, m: position, then matrix."""
        tip = _compute_tip_motion(arm, angles)
        matrix_error = matrix_weight_m * (tip.matrix - target_matrix)
        return np.concatenate([tip.position - position, matrix_error.ravel()])

    def compute_jacobian(angles: Array) -> Array:
        """Compute how these differences change with each joint: [12, d]."""
        tip = _compute_tip_motion(arm, angles)
        # The columns of a matrix are axes, and an axis a of a turning link moves by ω x a.
        axes = tip.matrix.T[None]  # [1, 3 axes, 3]
        axis_velocities = np.cross(tip.angular_velocities[:, None], axes)  # [d, 3 axes, 3]
        matrix_velocities = axis_velocities.transpose(0, 2, 1).reshape(len(angles), 9)
        return np.concatenate([tip.velocities, matrix_weight_m * matrix_velocities], axis=1).T

    lower, upper = _compute_bounds(arm, joints, max_turn)
    start = np.clip(joints, lower, upper)
    result = least_squares(
        compute_errors,
        start,
        jac=compute_jacobian,
        bounds=(lower, upper),
        gtol=1e-10,  # the errors are small numbers, in m, and so are their gradients
    )

    tip = _compute_tip_motion(arm, result.x)
    matrix_distance = np.linalg.norm(tip.matrix - target_matrix)  # Frobenius: √8 sin(angle / 2)
    return JointSolution(
        joints=result.x,
        position_error_m=float(np.linalg.norm(tip.position - position)),
        rotation_error_rad=2 * math.asin(min(1.0, float(matrix_distance) / math.sqrt(8))),
    )


def _compute_bounds(arm: UrdfArm, joints: Array, max_turn: float) -> tuple[Array, Array]:
    """Find the smallest and largest value [d] of each joint: its limits, and the largest turn.

    A joint that is beyond a limit counts as being at this limit.
    """
    limits = np.array([joint.limits or (-math.inf, math.inf) for joint in arm.moving_joints])
    start = np.clip(joints, limits[:, 0], limits[:, 1])
    lower = np.maximum(limits[:, 0], start - max_turn)
    upper = np.minimum(limits[:, 1], start + max_turn)
    return lower, upper


def _compute_tip_motion(arm: UrdfArm, joints: Array) -> _TipMotion:
    """Compute the pose of the tip, and how it changes with each joint [d]."""
    position = np.zeros(3)
    matrix = np.eye(3)
    axes = []  # [3] of each moving joint, base frame
    origins = []  # [3] m
    remaining_joints = iter(joints)
    for joint in arm.chain:
        # From the frame of the parent to the joint's own frame.
        position = position + matrix @ joint.origin_m
        matrix = matrix @ Rotation.from_euler("xyz", joint.origin_rpy_rad).as_matrix()
        if joint.joint_type == "fixed":
            continue

        # Along the joint's axis, or about it, by its value.
        axes.append(matrix @ joint.axis)
        origins.append(position)
        motion = next(remaining_joints) * np.array(joint.axis)
        if joint.joint_type == "prismatic":
            position = position + matrix @ motion
        else:
            matrix = matrix @ Rotation.from_rotvec(motion).as_matrix()

    is_sliding = np.array([joint.joint_type == "prismatic" for joint in arm.moving_joints])[:, None]
    turning_velocities = np.cross(axes, position - np.array(origins))  # ω x r
    return _TipMotion(
        position=position,
        matrix=matrix,
        velocities=np.where(is_sliding, axes, turning_velocities),
        angular_velocities=np.where(is_sliding, 0.0, axes),
    )
