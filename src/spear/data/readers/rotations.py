"""Every way to write an orientation (`spear.data.readers.spec.RotationFormat`) as a quaternion."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from spear.geometry import euler_to_quat, euler_zxy_to_quat, matrix_to_quat, quat_canonical, quat_exp


def pose_matrix(values: torch.Tensor, columns: bool) -> torch.Tensor:
    """The 16 numbers [..., 16] of a pose, written column after column or row after row -> [..., 4, 4]."""
    pose = values.unflatten(-1, (4, 4))
    return pose.transpose(-1, -2) if columns else pose


def _from_pose(values: torch.Tensor, columns: bool) -> torch.Tensor:
    return matrix_to_quat(pose_matrix(values, columns)[..., :3, :3].contiguous())


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

Quaternions keep the length that was written. Joint angles are no such format (`spear.data.readers.franka`).
"""
