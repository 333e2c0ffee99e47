"""Forward kinematics of the Franka arm: converts joint angles to end-effector poses.

This module needs no simulator, so readers of datasets use it for recordings that contain joint
angles only. It computes all steps of a recording at once. `spear.embodiments.inverse_kinematics`
computes one pose at a time with MuJoCo's model of the same arm, and also solves the inverse
problem. A test compares the two modules.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from spear.errors import SpearError
from spear.geometry import quat_canonical, quat_exp, quat_multiply, quat_rotate
from spear.types import Array

NUM_JOINTS = 7
FLANGE_OFFSET_M = 0.107  # from the frame of joint 7 to the flange
FINGER_TIP_OFFSET_M = 0.1034  # from the flange to the point between the tips of Franka's fingers
HAND_ANGLE_RAD = -math.pi / 4  # the hand is mounted on the flange at this angle


class _Link(NamedTuple):
    """Denavit-Hartenberg parameters of one joint in Craig's convention.

    The frame of a joint is that of the joint before it, rotated about x by alpha, moved along x by
    a and along the new z by d, and rotated about the new z by the joint angle.
    """

    a_m: float
    d_m: float
    alpha_rad: float


_LINKS = (
    _Link(0.0, 0.333, 0.0),
    _Link(0.0, 0.0, -math.pi / 2),
    _Link(0.0, 0.316, math.pi / 2),
    _Link(0.0825, 0.0, math.pi / 2),
    _Link(-0.0825, 0.384, -math.pi / 2),
    _Link(0.0, 0.0, math.pi / 2),
    _Link(0.088, 0.0, math.pi / 2),
    _Link(0.0, FLANGE_OFFSET_M + FINGER_TIP_OFFSET_M, 0.0),  # fixed: joint 7 to the finger tips
)
"""Franka's published parameters: https://frankaemika.github.io/docs/control_parameters.html."""


class Poses(NamedTuple):
    """One pose, or several along the first dimensions, in the frame that the function names.

    Attributes:
        position: [..., 3] m.
        rotation: [..., 4] unit quaternions (w, x, y, z).
    """

    position: Array
    rotation: Array


def compute_franka_ee_poses(joints: Array, source: str = "") -> Poses:
    """Compute the end-effector poses of a Franka from its joint angles.

    The pose is that of our end-effector frame: between the finger tips of Franka's own hand, and
    parallel to the base frame when the gripper points straight down.

    Args:
        joints: [T, 7] joint angles, rad.
        source: where the angles come from, for error messages.

    Returns:
        Positions [T, 3] (m) and canonical unit quaternions [T, 4] (w, x, y, z) in the base frame,
        float64.

    Raises:
        SpearError: the array does not have 7 columns, or its numbers are too large for radians.

    Example:
        >>> joints = np.array([[0, -0.785, 0, -2.356, 0, 1.571, 0.785]])
        >>> position, rotation = compute_franka_ee_poses(joints)
        >>> position.round(2) + 0.0
        array([[0.31, 0.  , 0.49]])
    """
    if joints.ndim != 2 or joints.shape[1] != NUM_JOINTS:
        raise SpearError(
            f"joint angles of {source} have the shape {joints.shape}, but a Franka has 7. Give "
            "an array of 7 angles."
        )
    if len(joints) and np.abs(joints).max() > 2 * math.pi:
        raise SpearError(
            f"a joint angle of {source} is {np.abs(joints).max():.3g}, more than a turn. Give "
            "radians."
        )

    # The hand is one more link, whose angle is fixed.
    link_angles = np.insert(joints.astype(np.float64), NUM_JOINTS, HAND_ANGLE_RAD, axis=1)
    angles = torch.from_numpy(link_angles)  # [T, 8]
    x_axis = angles.new_tensor([1, 0, 0])
    z_axis = angles.new_tensor([0, 0, 1])

    # The pose of the last link so far: [3] and [4] at first, then [T, 3] and [T, 4].
    position = angles.new_zeros(3)
    rotation = angles.new_tensor([1, 0, 0, 0])
    for link, angle in zip(_LINKS, angles.T, strict=True):
        # Move by a along x, and by d along the z axis that alpha has rotated about x.
        offset_y = -link.d_m * math.sin(link.alpha_rad)
        offset_z = link.d_m * math.cos(link.alpha_rad)
        offset = angles.new_tensor([link.a_m, offset_y, offset_z])
        rotation_about_x = quat_exp(link.alpha_rad * x_axis)  # [4]
        rotation_about_z = quat_exp(angle[:, None] * z_axis)  # [T, 4]
        link_rotation = quat_multiply(rotation_about_x, rotation_about_z)
        position = position + quat_rotate(rotation, offset)
        rotation = quat_multiply(rotation, link_rotation)

    # The hand's z axis points out of the gripper, and that of our end-effector frame back into it.
    half_turn_about_x = angles.new_tensor([0, 1, 0, 0])
    ee_rotation = quat_canonical(quat_multiply(rotation, half_turn_about_x))
    return Poses(position.numpy(), ee_rotation.numpy())
