"""Every way to write an orientation (`spear.data.readers.spec.RotationFormat`) as a quaternion."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch

from spear.data.readers.spec import RotationFormat
from spear.errors import SpearError
from spear.geometry import euler_to_quat, euler_zxy_to_quat, matrix_to_quat, quat_canonical, quat_exp
from spear.types import Array


def _matrix(values: torch.Tensor, columns: bool) -> torch.Tensor:
    """The 16 numbers [..., 16] of a pose, written column after column or row after row -> [..., 4, 4]."""
    pose = values.unflatten(-1, (4, 4))
    return pose.transpose(-1, -2) if columns else pose


def _from_pose(values: torch.Tensor, columns: bool) -> torch.Tensor:
    return matrix_to_quat(_matrix(values, columns)[..., :3, :3].contiguous())


FORMS: Mapping[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "euler_xyz": (3, lambda v: euler_to_quat(v, "xyz")),
    "euler_XYZ": (3, lambda v: euler_to_quat(v, "XYZ")),
    "euler_zyx": (3, lambda v: euler_to_quat(v.flip(-1), "xyz")),
    "euler_zxy": (3, euler_zxy_to_quat),
    "rotation_vector": (3, lambda v: quat_canonical(quat_exp(v))),
    "quat_wxyz": (4, lambda v: v),
    "quat_xyzw": (4, lambda v: v[..., [3, 0, 1, 2]]),
    "matrix4_columns": (16, lambda v: _from_pose(v, True)),
    "matrix4_rows": (16, lambda v: _from_pose(v, False)),
}
"""Format -> how many numbers, and [..., numbers], angles in rad, to quaternions [..., 4] (w, x, y, z).

Quaternions keep the length that was written. Joint angles are no such format: see `franka_pose`.
"""


def to_quaternion(values: Array, layout: RotationFormat, source: str = "") -> Array:
    """Orientations [T, d] in a dataset's layout, angles in rad, to quaternions [T, 4] (w, x, y, z).

    Raises SpearError when d is not what the layout has, and for 16 numbers that are no pose.
    """
    tensor = torch.as_tensor(np.asarray(values, np.float64))
    width, convert = FORMS[layout]
    if tensor.ndim != 2 or tensor.shape[1] != width:
        shape = tuple(tensor.shape)
        raise SpearError(f"wrong shape: {source}: rotation is {shape}, but {layout} needs {width} columns")
    if layout.startswith("matrix4"):
        _check_pose(tensor, layout == "matrix4_columns", source)
    return convert(tensor).numpy()


def _check_pose(values: torch.Tensor, columns: bool, source: str) -> None:
    pose = _matrix(values, columns)
    matrix, last = pose[:, :3, :3], torch.tensor([0.0, 0, 0, 1], dtype=pose.dtype)
    error = (matrix @ matrix.transpose(1, 2) - torch.eye(3, dtype=pose.dtype)).abs().amax((1, 2))
    row = (pose[:, 3] - last).abs().amax(1)
    bad = ~((error < 1e-2) & (row < 1e-3) & (torch.linalg.det(matrix) > 0))
    if bad.any():
        step, line = int(bad.int().argmax()), "column" if columns else "row"
        raise SpearError(
            f"not a rotation: {source} step {step}: the 16 numbers are no pose written {line} after {line}; "
            "leave it out, or check the layout"
        )


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
    """Joint angles [T, 7] of a Franka, rad, to positions [T, 3], m, and quaternions [T, 4] in the base frame.

    The pose is that of our end-effector frame: between the finger tips of Franka's own hand, parallel to the
    base frame when the gripper points straight down. Raises SpearError for other than seven columns of
    radians.
    """
    if joints.ndim != 2 or joints.shape[1] != 7:
        raise SpearError(f"wrong shape: {source}: joint angles are {joints.shape}, but a Franka has 7")
    if len(joints) and np.abs(joints).max() > 2 * math.pi:
        raise SpearError(f"{np.abs(joints).max():.3g} is no joint angle: {source}: radians are expected")
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
