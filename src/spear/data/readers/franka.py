"""Where a Franka's gripper is, from its joint angles: for datasets that recorded nothing else."""

from __future__ import annotations

import math

import numpy as np
import torch

from spear.errors import SpearError
from spear.geometry import matrix_to_quat
from spear.types import Array

_DH = (
    (0.0, 0.333, 0.0),
    (0.0, 0.0, -math.pi / 2),
    (0.0, 0.316, math.pi / 2),
    (0.0825, 0.0, math.pi / 2),
    (-0.0825, 0.384, -math.pi / 2),
    (0.0, 0.0, math.pi / 2),
    (0.088, 0.0, math.pi / 2),
)
"""Franka's published parameters (Craig's convention) of each joint: a m, d m, α rad."""
_FINGERTIPS = 0.107 + 0.1034
"""From joint 7 to the flange, and on to the point between the tips of Franka's own fingers, m."""


def franka_pose(joints: Array, source: str = "") -> tuple[Array, Array]:
    """Joint angles [T, 7], rad, to positions [T, 3], m, and quaternions [T, 4] in the base frame.

    Of our end-effector frame: between the finger tips of Franka's own hand, parallel to the base frame when
    the gripper points straight down. Raises SpearError for other than seven columns of radians.
    """
    if joints.ndim != 2 or joints.shape[1] != 7:
        raise SpearError(f"wrong shape: {source}: joint angles are {joints.shape}, but a Franka has 7")
    if len(joints) and np.abs(joints).max() > 2 * math.pi:
        raise SpearError(
            f"{np.abs(joints).max():.3g} is no joint angle: {source}: radians are expected; check the column"
        )
    pose = np.tile(np.eye(4), (len(joints), 1, 1))
    for (a, d, alpha), angle in zip(_DH, joints.T, strict=True):
        pose = pose @ _link(a, d, alpha, angle)
    pose[:, :3, 3] += _FINGERTIPS * pose[:, :3, 2]
    # The hand is turned by -45° on the flange; half a turn about x makes its axes ours.
    hand = _link(0, 0, 0, np.array([-math.pi / 4]))[0, :3, :3] @ np.diag([1.0, -1.0, -1.0])
    return pose[:, :3, 3], matrix_to_quat(torch.from_numpy(pose[:, :3, :3] @ hand)).numpy()


def _link(a: float, d: float, alpha: float, angle: Array) -> Array:
    """[T, 4, 4] transforms over one joint."""
    c, s, ca, sa = np.cos(angle), np.sin(angle), math.cos(alpha), math.sin(alpha)
    link = np.zeros((len(angle), 4, 4))
    link[:, 0] = np.stack([c, -s, 0 * c, a + 0 * c], axis=1)
    link[:, 1] = np.stack([s * ca, c * ca, -sa + 0 * c, -d * sa + 0 * c], axis=1)
    link[:, 2] = np.stack([s * sa, c * sa, ca + 0 * c, d * ca + 0 * c], axis=1)
    link[:, 3, 3] = 1
    return link
