"""The pinhole camera: x right, y down, z forward; pixel centres at integer + 0.5."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from spear.types import Array


@lru_cache(maxsize=8)
def _rays(height: int, width: int, intrinsics: bytes) -> Array:
    inverse = np.linalg.inv(np.frombuffer(intrinsics, np.float64).reshape(3, 3))
    y, x = np.mgrid[:height, :width] + 0.5
    rays = np.stack([x, y, np.ones_like(x)], axis=-1) @ inverse.T
    return rays.astype(np.float32)


def unproject(depth: Array, intrinsics: Array) -> Array:
    """Depth along z [h, w] and intrinsics [3, 3] -> points [h, w, 3] float32, camera frame, the depth's
    unit."""
    rays = _rays(*depth.shape, np.asarray(intrinsics, np.float64).tobytes())
    return rays * np.asarray(depth, np.float32)[..., None]


def project(points: Array, intrinsics: Array) -> Array:
    """Points [..., 3] in front of the camera and intrinsics [3, 3] -> pixels [..., 2] (x, y)."""
    image = points @ np.asarray(intrinsics).T
    return image[..., :2] / image[..., 2:]
