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

MAX_ORTHOGONALITY_ERROR = 1e-2  # largest difference of R Rᵀ from the identity
MAX_LAST_ROW_ERROR = 1e-3  # largest difference of a pose's last row from (0, 0, 0, 1)


class RotationEncoding(NamedTuple):
    """A format of orientations.

    Attributes:
        num_components: How many numbers an orientation has.
        to_quaternion: Converts orientations [..., num_components] (angles in rad) to quaternions
            [..., 4] (w, x, y, z). Recorded quaternions are not normalized, so that a check of their
            norm can follow.
    """

    num_components: int
    to_quaternion: Callable[[Tensor], Tensor]


def _make_matrix4_from_6d_rows(values: Tensor) -> Tensor:
    """Complete the first two rows of rotation matrices, [..., 6], to pose matrices [..., 4, 4].

    The position of the poses is zero.
    """
    first_row, second_row = values.split(3, dim=-1)  # each [..., 3]
    third_row = torch.linalg.cross(first_row, second_row)
    matrix = torch.stack([first_row, second_row, third_row], dim=-2)  # [..., 3, 3]
    pose = torch.nn.functional.pad(matrix, (0, 1, 0, 1))  # one zero column and row at the end
    pose[..., 3, 3] = 1
    return pose


def _make_matrix4_from_16_numbers(values: Tensor) -> Tensor:
    """Arrange poses [..., 16], which are matrices row after row, as matrices [..., 4, 4]."""
    return values.unflatten(-1, (4, 4))


# The same numbers column after column are the rows of the transposed matrix: `.mT` undoes that.
POSE_FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "6d_columns": lambda values: _make_matrix4_from_6d_rows(values).mT,
    "6d_rows": _make_matrix4_from_6d_rows,
    "matrix4_columns": lambda values: _make_matrix4_from_16_numbers(values).mT,
    "matrix4_rows": _make_matrix4_from_16_numbers,
}
"""Format → conversion of [..., num_components] to homogeneous matrices [..., 4, 4]. `to_quaternion`
checks whether these matrices are poses, because arbitrary numbers are not."""


def _make_quaternion_conversion(pose_format: str) -> Callable[[Tensor], Tensor]:
    """Make the conversion of one of `POSE_FORMATS` to quaternions."""
    to_pose = POSE_FORMATS[pose_format]
    return lambda values: matrix_to_quat(to_pose(values)[..., :3, :3].contiguous())


ROTATION_FORMATS: Mapping[str, RotationEncoding] = {
    "euler_xyz": RotationEncoding(3, lambda angles: euler_to_quat(angles, "xyz")),
    "euler_XYZ": RotationEncoding(3, lambda angles: euler_to_quat(angles, "XYZ")),
    # The angles are recorded as yaw, pitch, roll; reversed, they are about x, y, z.
    "euler_ZYX": RotationEncoding(3, lambda angles: euler_to_quat(angles.flip(-1), "xyz")),
    # The angles are recorded in the order z, x, y, and `euler_to_quat` takes them as x, y, z.
    "euler_zxy": RotationEncoding(3, lambda angles: euler_to_quat(angles[..., [1, 2, 0]], "zxy")),
    "rotation_vector": RotationEncoding(3, lambda vector: quat_canonical(quat_exp(vector))),
    "quat_wxyz": RotationEncoding(4, lambda quaternion: quaternion),
    "quat_xyzw": RotationEncoding(4, lambda quaternion: quaternion[..., [3, 0, 1, 2]]),
    "6d_columns": RotationEncoding(6, _make_quaternion_conversion("6d_columns")),
    "6d_rows": RotationEncoding(6, _make_quaternion_conversion("6d_rows")),
    "matrix4_columns": RotationEncoding(16, _make_quaternion_conversion("matrix4_columns")),
    "matrix4_rows": RotationEncoding(16, _make_quaternion_conversion("matrix4_rows")),
}
"""Format → its encoding. The joint angles are missing: `compute_franka_ee_poses` and
`compute_tip_poses` convert them."""


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
            f"the rotation of {source} has the shape {tuple(tensor.shape)}, but "
            f"{rotation_format} needs {encoding.num_components} columns. Name as many."
        )

    if rotation_format in POSE_FORMATS:
        is_rotation = mark_rotations(values, rotation_format)  # [T]
        step = find_first(~is_rotation)  # the first step without a rotation
        if step is not None:
            raise SpearError(
                f"the rotation of {source} at step {step} is not written as {rotation_format}. "
                "Check rotation_format in spear.json."
            )
    return encoding.to_quaternion(tensor).numpy()


def mark_rotations(values: Array, rotation_format: RotationFormat) -> Array:
    """Mark the rows whose numbers are a rotation in this format.

    Numbers of a pose format or of a quaternion may be no rotation. Angles always are one.

    Args:
        values: [T, d] orientations in the dataset's format.
        rotation_format: Any format, also one of joint angles.

    Returns:
        [T] bool. If d does not match the format, all are True, and `to_quaternion` will refuse the
        orientations.
    """
    encoding = ROTATION_FORMATS.get(rotation_format)
    if encoding is None or values.ndim != 2 or values.shape[1] != encoding.num_components:
        return np.ones(len(values), bool)

    if rotation_format in POSE_FORMATS:
        tensor = torch.as_tensor(np.asarray(values, np.float64))
        return _are_poses(POSE_FORMATS[rotation_format](tensor)).numpy()
    if rotation_format.startswith("quat"):
        # `validate_episode` will check the norm of float32 quaternions, so these are judged here.
        float32_values = values.astype(np.float32).astype(np.float64)
        norm = np.linalg.norm(float32_values, axis=1)  # [T]
        return np.abs(norm - 1) <= UNIT_NORM_TOLERANCE
    return np.ones(len(values), bool)


def _are_poses(matrix4: Tensor) -> Tensor:
    """Say of each matrix [T, 4, 4] whether it is a pose with a proper rotation, as [T] bool."""
    matrix = matrix4[:, :3, :3]
    identity = torch.eye(3, dtype=matrix4.dtype)
    orthogonality_error = (matrix @ matrix.mT - identity).abs().amax((1, 2))  # [T]
    last_row_error = (matrix4[:, 3] - matrix4.new_tensor([0, 0, 0, 1])).abs().amax(1)  # [T]
    # A reflection is orthogonal too, but its determinant is negative.
    return (
        (orthogonality_error < MAX_ORTHOGONALITY_ERROR)
        & (last_row_error < MAX_LAST_ROW_ERROR)
        & (torch.linalg.det(matrix) > 0)
    )
