"""The ways in which datasets write orientations, and their conversion to quaternions."""

from collections.abc import Callable, Mapping

import numpy as np
import torch

from spear.data.actions import find_first
from spear.data.readers.dataset_layout import RotationFormat
from spear.errors import SpearError
from spear.geometry import euler_to_quat, matrix_to_quat, quat_canonical, quat_exp
from spear.types import Array


def _from_6d(values: torch.Tensor) -> torch.Tensor:
    """[..., 4, 4] poses in the origin, whose first two rows are the numbers [..., 6]."""
    first, second = values.split(3, dim=-1)
    turn = torch.stack([first, second, torch.linalg.cross(first, second)], dim=-2)
    pose = torch.nn.functional.pad(turn, (0, 1, 0, 1))
    pose[..., 3, 3] = 1
    return pose


def _turn(pose: torch.Tensor) -> torch.Tensor:
    """[..., 4, 4] poses to quaternions [..., 4]."""
    return matrix_to_quat(pose[..., :3, :3].contiguous())


POSE_FORMATS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "6d_columns": lambda v: _from_6d(v).mT,
    "6d_rows": _from_6d,
    "matrix4_columns": lambda v: v.unflatten(-1, (4, 4)).mT,
    "matrix4_rows": lambda v: v.unflatten(-1, (4, 4)),
}
"""Format -> [..., numbers] to homogeneous poses [..., 4, 4], if they are any: see `to_quaternion`."""
ROTATION_FORMATS: Mapping[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "euler_xyz": (3, lambda v: euler_to_quat(v, "xyz")),
    "euler_XYZ": (3, lambda v: euler_to_quat(v, "XYZ")),
    "euler_ZYX": (3, lambda v: euler_to_quat(v.flip(-1), "xyz")),
    "euler_zxy": (3, lambda v: euler_to_quat(v[..., [1, 2, 0]], "zxy")),
    "rotation_vector": (3, lambda v: quat_canonical(quat_exp(v))),
    "quat_wxyz": (4, lambda v: v),
    "quat_xyzw": (4, lambda v: v[..., [3, 0, 1, 2]]),
    "6d_columns": (6, lambda v: _turn(POSE_FORMATS["6d_columns"](v))),
    "6d_rows": (6, lambda v: _turn(POSE_FORMATS["6d_rows"](v))),
    "matrix4_columns": (16, lambda v: _turn(POSE_FORMATS["matrix4_columns"](v))),
    "matrix4_rows": (16, lambda v: _turn(POSE_FORMATS["matrix4_rows"](v))),
}
"""Format -> how many numbers, and [..., numbers], angles in rad, to quaternions [..., 4] (w, x, y, z).

Quaternions keep the length that was written. Joint angles are no such format: see `franka_pose`.
"""


def to_quaternion(values: Array, layout: RotationFormat, source: str = "") -> Array:
    """Orientations [T, d] in a dataset's layout, angles in rad, to quaternions [T, 4] (w, x, y, z).

    Raises SpearError when d is not what the layout has, and for 6 or 16 numbers of no rotation.
    """
    tensor = torch.as_tensor(np.asarray(values, np.float64))
    width, convert = ROTATION_FORMATS[layout]
    if tensor.ndim != 2 or tensor.shape[1] != width:
        shape = tuple(tensor.shape)
        raise SpearError(
            f"wrong shape: {source}: rotation is {shape}, but {layout} needs {width} columns"
        )
    if layout in POSE_FORMATS:
        pose = POSE_FORMATS[layout](tensor)
        matrix, last = pose[:, :3, :3], pose.new_tensor([0, 0, 0, 1])
        error = (matrix @ matrix.mT - torch.eye(3, dtype=pose.dtype)).abs().amax((1, 2))
        row = (pose[:, 3] - last).abs().amax(1)
        bad = ~((error < 1e-2) & (row < 1e-3) & (torch.linalg.det(matrix) > 0))
        if (step := find_first(bad.numpy())) is not None:
            wrong = f"not a rotation: {source} step {step}: the numbers are no rotation written as {layout}"
            raise SpearError(f"{wrong}; check the layout")
    return convert(tensor).numpy()
