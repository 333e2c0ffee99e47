"""From a mask and a point map to clean points of one object, and to the surface that it stands on."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from spear.types import Array

UP_PRIOR = np.array([0.0, -np.cos(np.radians(35.0)), -np.sin(np.radians(35.0))])
"""Up in the camera frame, for a camera that looks 35° down: what "up" means until a plane says it better
(our choice). A level camera and one that looks 80° down are both within 45° of it."""

TOUCHING_FRACTION = 0.02
"""Two points of neighbouring pixels belong to touching surfaces when they are nearer to each other than this
fraction of their distance from the camera (our choice)."""

MAX_PLANE_POINTS = 600  # of a background are enough to find its plane (our choice)
_GOLDEN = (np.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Plane:
    """The points p with up · p = height; up [3] is a unit vector away from the support, camera frame."""

    up: Array
    height: float


def subsample(points: Array, most: int) -> Array:
    """At most `most` of the points [n, 3], spread evenly and without randomness (a golden-ratio sequence: a
    fixed stride could lock on to the rows of the image)."""
    n = len(points)
    if n <= most:
        return points
    return points[((np.arange(most) * _GOLDEN % 1.0) * n).astype(np.intp)]


def find_inliers(points: Array) -> Array:
    """Statistical outlier removal: which points [n, 3] are no further from their neighbours than usual.

    A point stays when its mean distance to its nearest 8 is at most the mean over all points plus 3 standard
    deviations. Returns [n] bool; all True when there are too few points to tell.
    """
    if len(points) <= 16:
        return np.ones(len(points), bool)
    distances, _ = cKDTree(points, balanced_tree=False).query(points, k=9)
    spread = distances[:, 1:].mean(axis=1)
    return spread <= spread.mean() + 3.0 * spread.std()


def estimate_noise(points: Array, known: Array) -> float:
    """How noisy depth is from pixel to pixel, as a fraction of itself (a standard deviation).

    Along a row, inverse depth is straight on every plane, so its second difference is noise; the median over
    the image [h, w, 3], where `known` [h, w], ignores edges. 0 where no three neighbours are known. Of a
    large image some 256 rows are enough.
    """
    every = max(1, len(points) // 256)
    points, known = points[::every], known[::every]
    three = known[:, 2:] & known[:, 1:-1] & known[:, :-2]
    if not three.any():
        return 0.0
    inverse = 1 / np.where(known, points[..., 2], 1.0).astype(np.float64)
    bend = np.abs(inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2]) / inverse[:, 1:-1]
    return float(1.4826 * np.median(bend[three]) / np.sqrt(6.0))


def fit_support_plane(points: Array, up: Array | None = None) -> Plane | None:
    """The largest level plane among the points [n, 3] of a scene's background (RANSAC with a fixed seed: of
    planes through three points each, with those nearer than 1 % of the median distance from the camera).

    points  camera frame, any unit.
    up      [3] unit vector against gravity, camera frame, when known: the plane's normal is within 10° of it.
            Otherwise within 50° of `UP_PRIOR`; up to 90° (a wall, or the table of a camera that looks
            straight down) only where that plane has 2.5 times as many points (our choice).

    Returns the plane, refined on all its points and facing the camera; None when under a fifth lie on one.
    """
    points = np.asarray(subsample(points, MAX_PLANE_POINTS), np.float64)
    if len(points) < 30:
        return None
    limit = 0.01 * float(np.median(np.linalg.norm(points, axis=1)))
    a, b, c = points[np.random.default_rng(0).integers(0, len(points), (3, 128))]
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    heights = np.einsum("ij,ij->i", normals, a)
    near = np.abs(normals @ points.T - heights[:, None]) < limit
    towards = -np.sign(heights) * (
        normals @ (UP_PRIOR if up is None else np.asarray(up, np.float64))
    )
    level = towards > np.cos(np.radians(50.0 if up is None else 10.0))
    votes = near.sum(axis=1) * np.where(level, 1.0, 0.4 * (towards > 0) if up is None else 0.0)
    inside = near[np.argmax(votes)]
    if not votes.any():
        return None
    for _ in range(2):
        if inside.sum() < max(12, 0.2 * len(points)):
            return None
        chosen = points[inside]
        middle = chosen.mean(axis=0)
        normal = np.linalg.eigh(np.cov((chosen - middle).T))[1][:, 0]
        normal = normal * -np.sign(normal @ middle)
        inside = np.abs((points - middle) @ normal) < limit
    return Plane(normal, float(middle @ normal))
