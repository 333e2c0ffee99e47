"""Writes orientations in every format that datasets have, by SciPy."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy.spatial.transform import Rotation

POSITION_M = (0.3, 0.1, 0.2)  # position in the formats of 16 numbers, which are poses


def _to_poses(rotation: Rotation) -> np.ndarray:
    """Return pose matrices [N, 4, 4] with the rotations [N] and the position `POSITION_M`."""
    poses = np.tile(np.eye(4), (len(rotation), 1, 1))
    poses[:, :3, :3] = rotation.as_matrix()
    poses[:, :3, 3] = POSITION_M
    return poses


ROTATION_WRITERS: Mapping[str, Callable[[Rotation], np.ndarray]] = {
    "euler_xyz": lambda rotation: rotation.as_euler("xyz"),  # small letters: fixed axes
    "euler_ZYX": lambda rotation: rotation.as_euler("ZYX"),  # capitals: moving axes
    "euler_XYZ": lambda rotation: rotation.as_euler("XYZ"),
    "euler_zxy": lambda rotation: rotation.as_euler("zxy"),
    "rotation_vector": lambda rotation: rotation.as_rotvec(),
    "quat_wxyz": lambda rotation: rotation.as_quat(scalar_first=True),
    "quat_xyzw": lambda rotation: rotation.as_quat(),
    "6d_columns": lambda rotation: rotation.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(-1, 6),
    "6d_rows": lambda rotation: rotation.as_matrix()[:, :2].reshape(-1, 6),
    "matrix4_columns": lambda rotation: _to_poses(rotation).transpose(0, 2, 1).reshape(-1, 16),
    "matrix4_rows": lambda rotation: _to_poses(rotation).reshape(-1, 16),
}
"""Name of a format -> function from rotations [N] to the numbers [N, …] of this format.

Only joint angles are missing, because they do not determine an orientation without the robot."""
