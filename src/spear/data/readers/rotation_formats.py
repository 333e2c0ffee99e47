"""The formats in which datasets write orientations, and their conversion to quaternions."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spear.data.actions import find_first
from spear.data.readers.dataset_layout import RotationFormat
from spear.errors import SpearError
from spear.geometry import (
    UNIT_NORM_TOLERANCE,
    euler_to_quat,
    matrix_to_quat,
    quat_canonical,
    quat_exp,
)
from spear.types import Array

MAX_ORTHOGONALITY_ERROR = 1e-2  # of R Rᵀ against the identity
MAX_LAST_ROW_ERROR = 1e-3  # of a homogeneous pose against (0, 0, 0, 1)


class RotationEncoding(NamedTuple):
    """How many numbers a format has, and what converts them to quaternions.

    `to_quaternion` takes [..., num_components], angles in rad, and gives [..., 4] (w, x, y, z).
    Quaternions keep the length that the dataset wrote.
    """

    num_components: int
    to_quaternion: Callable[[Tensor], Tensor]


def _pose_from_6d_rows(values: Tensor) -> Tensor:
    """[..., 6] the first two rows of a rotation matrix → [..., 4, 4] poses in the origin."""
    first_row, second_row = values.split(3, dim=-1)
    third_row = torch.linalg.cross(first_row, second_row)
    matrix = torch.stack([first_row, second_row, third_row], dim=-2)
    pose = torch.nn.functional.pad(matrix, (0, 1, 0, 1))
    pose[..., 3, 3] = 1
    return pose


def _pose_from_16_rows(values: Tensor) -> Tensor:
    """[..., 16] a homogeneous pose, row after row → [..., 4, 4]."""
    return values.unflatten(-1, (4, 4))


POSE_FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "6d_columns": lambda values: _pose_from_6d_rows(values).mT,
    "6d_rows": _pose_from_6d_rows,
    "matrix4_columns": lambda values: _pose_from_16_rows(values).mT,
    "matrix4_rows": _pose_from_16_rows,
}
"""Format → conversion of [..., numbers] to homogeneous poses [..., 4, 4]; `to_quaternion` checks
that they are poses."""


def _quaternion_from_pose(pose_format: str) -> Callable[[Tensor], Tensor]:
    """Make the conversion of one of `POSE_FORMATS` to quaternions."""
    to_pose = POSE_FORMATS[pose_format]
    return lambda values: matrix_to_quat(to_pose(values)[..., :3, :3].contiguous())


ROTATION_FORMATS: Mapping[str, RotationEncoding] = {
    "euler_xyz": RotationEncoding(3, lambda angles: euler_to_quat(angles, "xyz")),
    "euler_XYZ": RotationEncoding(3, lambda angles: euler_to_quat(angles, "XYZ")),
    "euler_ZYX": RotationEncoding(3, lambda angles: euler_to_quat(angles.flip(-1), "xyz")),
    "euler_zxy": RotationEncoding(3, lambda angles: euler_to_quat(angles[..., [1, 2, 0]], "zxy")),
    "rotation_vector": RotationEncoding(3, lambda vector: quat_canonical(quat_exp(vector))),
    "quat_wxyz": RotationEncoding(4, lambda quaternion: quaternion),
    "quat_xyzw": RotationEncoding(4, lambda quaternion: quaternion[..., [3, 0, 1, 2]]),
    "6d_columns": RotationEncoding(6, _quaternion_from_pose("6d_columns")),
    "6d_rows": RotationEncoding(6, _quaternion_from_pose("6d_rows")),
    "matrix4_columns": RotationEncoding(16, _quaternion_from_pose("matrix4_columns")),
    "matrix4_rows": RotationEncoding(16, _quaternion_from_pose("matrix4_rows")),
}
"""Format → its encoding. Joint angles are not among them: see `franka_pose`."""


def to_quaternion(values: Array, rotation_format: RotationFormat, source: str = "") -> Array:
    """Convert the orientations of an episode to quaternions.

    Args:
        values: [T, d] orientations in the dataset's format, angles in rad.
        rotation_format: One of `ROTATION_FORMATS`.
        source: The name of the episode, for error messages.

    Returns:
        [T, 4] quaternions (w, x, y, z), float64.

    Raises:
        SpearError: If d does not match the format, or 6 or 16 numbers are not a rotation.
    """
    tensor = torch.as_tensor(np.asarray(values, np.float64))
    encoding = ROTATION_FORMATS[rotation_format]
    if tensor.ndim != 2 or tensor.shape[1] != encoding.num_components:
        raise SpearError(
            f"wrong shape: {source}: rotation is {tuple(tensor.shape)}, "
            f"but {rotation_format} needs {encoding.num_components} columns"
        )

    if rotation_format in POSE_FORMATS:
        step = find_first(~find_rotations(values, rotation_format))
        if step is not None:
            raise SpearError(
                f"not a rotation: {source} step {step}: the numbers are no rotation written as "
                f"{rotation_format}; check the layout"
            )
    return encoding.to_quaternion(tensor).numpy()


def find_rotations(values: Array, rotation_format: RotationFormat) -> Array:
    """Find the rows whose numbers are a rotation. Any angles are one.

    Args:
        values: [T, d] orientations in the dataset's format.
        rotation_format: Any format, also "franka_joints".

    Returns:
        [T] bool; all True if d does not match the format, which `to_quaternion` refuses.
    """
    encoding = ROTATION_FORMATS.get(rotation_format)
    if encoding is None or values.ndim != 2 or values.shape[1] != encoding.num_components:
        return np.ones(len(values), bool)

    if rotation_format in POSE_FORMATS:
        tensor = torch.as_tensor(np.asarray(values, np.float64))
        return _are_rotations(POSE_FORMATS[rotation_format](tensor)).numpy()
    if rotation_format.startswith("quat"):
        # In the precision in which episodes have quaternions, and are checked.
        norm = np.linalg.norm(values.astype(np.float32).astype(np.float64), axis=1)
        return np.abs(norm - 1) <= UNIT_NORM_TOLERANCE
    return np.ones(len(values), bool)


def _are_rotations(pose: Tensor) -> Tensor:
    """[T] bool, whether homogeneous matrices [T, 4, 4] are poses with a proper rotation."""
    matrix = pose[:, :3, :3]
    identity = torch.eye(3, dtype=pose.dtype)
    orthogonality_error = (matrix @ matrix.mT - identity).abs().amax((1, 2))
    last_row_error = (pose[:, 3] - pose.new_tensor([0, 0, 0, 1])).abs().amax(1)
    return (
        (orthogonality_error < MAX_ORTHOGONALITY_ERROR)
        & (last_row_error < MAX_LAST_ROW_ERROR)
        & (torch.linalg.det(matrix) > 0)
    )
