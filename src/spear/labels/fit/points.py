"""From a mask and a point map to clean points of one object, and to the surface that it stands
on."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from spear.types import Array

UP_PRIOR = np.array([0.0, -np.cos(np.radians(35.0)), -np.sin(np.radians(35.0))])
"""Up in the camera frame, for a camera that looks 35° down: what "up" means until a plane says it
better (our choice). A level camera and one that looks 80° down are both within 45° of it."""
TOUCHING_FRACTION = 0.02
"""Two points of neighboring pixels belong to touching surfaces when they are nearer to each other
than this fraction of their distance from the camera (our choice)."""

MAX_PLANE_POINTS = 600  # of a background are enough to find its plane (our choice)
MIN_PLANE_POINTS = 30  # with fewer there is no telling
MIN_PLANE_FRACTION = 0.2  # of the points lie on a support plane
NUM_PLANE_CANDIDATES = 128  # planes that RANSAC tries
MAX_TILT_DEG = 50.0  # of a support plane's normal from `UP_PRIOR`
MAX_KNOWN_TILT_DEG = 10.0  # … from the direction against gravity where that is known
STEEP_PLANE_WEIGHT = 0.4  # of a point on a steeper plane: it must have 2.5 times as many

NUM_NEIGHBORS = 8  # by which an outlier is told
MAX_OUTLIER_STD = 3.0  # standard deviations above the mean neighbor distance
MAX_NOISE_ROWS = 256  # of an image are enough to measure its noise
MAD_TO_STD = 1.4826  # median absolute deviation of a normal distribution → its standard deviation

_GOLDEN_RATIO = (np.sqrt(5.0) - 1.0) / 2.0


@dataclass(frozen=True)
class Plane:
    """The points p with up · p = height; up [3] is a unit vector away from the support, camera
    frame."""

    up: Array
    height: float


def subsample(points: Array, max_points: int) -> Array:
    """Choose at most `max_points` of the points [n, 3], spread evenly and without randomness.

    They follow a golden-ratio sequence, since a fixed stride could lock on to the rows of the
    image.
    """
    num_points = len(points)
    if num_points <= max_points:
        return points
    positions = np.arange(max_points) * _GOLDEN_RATIO % 1.0
    return points[(positions * num_points).astype(np.intp)]


def find_inliers(points: Array) -> Array:
    """Statistical outlier removal: which points are no further from their neighbors than usual.

    A point is an inlier when its mean distance to its `NUM_NEIGHBORS` nearest points is at most the
    mean of that over all points plus `MAX_OUTLIER_STD` standard deviations.

    Args:
        points: [n, 3].

    Returns:
        [n] bool; all True when there are too few points to tell.
    """
    if len(points) <= 2 * NUM_NEIGHBORS:
        return np.ones(len(points), bool)
    tree = cKDTree(points, balanced_tree=False)
    distances, _ = tree.query(points, k=NUM_NEIGHBORS + 1)  # the nearest is the point itself
    mean_distance = distances[:, 1:].mean(axis=1)
    return mean_distance <= mean_distance.mean() + MAX_OUTLIER_STD * mean_distance.std()


def estimate_noise(points: Array, is_known: Array) -> float:
    """Estimate how noisy depth is from pixel to pixel, as a fraction of itself (a standard
    deviation).

    Along a row, inverse depth is straight on every plane, so its second difference is noise; the
    median ignores edges.

    Args:
        points: [h, w, 3] of the image.
        is_known: [h, w] bool, where they are known.

    Returns:
        The noise; 0 where no three neighbors are known.
    """
    row_stride = max(1, len(points) // MAX_NOISE_ROWS)
    points = points[::row_stride]
    is_known = is_known[::row_stride]
    has_neighbors = is_known[:, 2:] & is_known[:, 1:-1] & is_known[:, :-2]
    if not has_neighbors.any():
        return 0.0
    inverse = 1 / np.where(is_known, points[..., 2], 1.0).astype(np.float64)
    bend = np.abs(inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2]) / inverse[:, 1:-1]
    # A second difference of independent noise has √(1 + 4 + 1) times its standard deviation.
    return float(MAD_TO_STD * np.median(bend[has_neighbors]) / np.sqrt(6.0))


def fit_support_plane(points: Array, up: Array | None = None) -> Plane | None:
    """Find the largest level plane among the points of a scene's background.

    RANSAC with a fixed seed: of planes through three points each, the one with the most points
    nearer than 1 % of the median distance from the camera.

    Args:
        points: [n, 3] camera frame, any unit.
        up: [3] unit vector against gravity, camera frame, when known. The plane's normal is then
            within `MAX_KNOWN_TILT_DEG` of it, otherwise within `MAX_TILT_DEG` of `UP_PRIOR`.
            Without `up`, a plane tilted by up to 90° (a wall, or the table of a camera that looks
            straight down) wins only where it has 2.5 times as many points (our choice).

    Returns:
        The plane, refined on all its points and facing the camera; None when less than
        `MIN_PLANE_FRACTION` of the points lie on one.
    """
    points = np.asarray(subsample(points, MAX_PLANE_POINTS), np.float64)
    if len(points) < MIN_PLANE_POINTS:
        return None
    limit = 0.01 * float(np.median(np.linalg.norm(points, axis=1)))

    # Candidates through three points each
    triples = np.random.default_rng(0).integers(0, len(points), (3, NUM_PLANE_CANDIDATES))
    a, b, c = points[triples]
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    heights = np.einsum("ij,ij->i", normals, a)
    is_near = np.abs(normals @ points.T - heights[:, None]) < limit

    # Votes: points on the plane, fewer or none for a plane that is not level
    direction = UP_PRIOR if up is None else np.asarray(up, np.float64)
    upwards = -np.sign(heights) * (normals @ direction)
    max_tilt_deg = MAX_TILT_DEG if up is None else MAX_KNOWN_TILT_DEG
    is_level = upwards > np.cos(np.radians(max_tilt_deg))
    steep_weight = STEEP_PLANE_WEIGHT * (upwards > 0) if up is None else 0.0
    votes = is_near.sum(axis=1) * np.where(is_level, 1.0, steep_weight)
    if not votes.any():
        return None

    # Refine the winner on all its points
    on_plane = is_near[np.argmax(votes)]
    for _ in range(2):
        if on_plane.sum() < max(12, MIN_PLANE_FRACTION * len(points)):
            return None
        plane_points = points[on_plane]
        middle = plane_points.mean(axis=0)
        normal = np.linalg.eigh(np.cov((plane_points - middle).T))[1][:, 0]
        normal = normal * -np.sign(normal @ middle)
        on_plane = np.abs((points - middle) @ normal) < limit
    return Plane(normal, float(middle @ normal))
