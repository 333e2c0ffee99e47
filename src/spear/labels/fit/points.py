"""Points of one object or of an image: removing outliers, measuring noise, and finding the support
plane, on which the objects stand."""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from spear.types import Array

UP_PRIOR = np.array([0.0, -np.cos(np.radians(35.0)), -np.sin(np.radians(35.0))])
"""The direction of up in the camera frame (x right, y down, z forward) for a camera that looks 35°
down. It stands for the real direction while that is not known (our choice). The real direction
differs from it by at most 45° for cameras that look between 0° and 80° down."""
TOUCHING_FRACTION = 0.02
"""The points of two neighboring pixels belong to touching surfaces when the distance between the
points is less than this fraction of their distance from the camera (our choice)."""

MAX_PLANE_POINTS = 600  # this many points are enough to find the background's plane (our choice)
MIN_PLANE_POINTS = 30  # with fewer background points no plane is searched
MIN_PLANE_FRACTION = 0.2  # a support plane contains at least this fraction of the points
NUM_PLANE_CANDIDATES = 128  # planes that RANSAC tries
MAX_TILT_DEG = 50.0  # largest angle between the normal of a level plane and `UP_PRIOR`
# If the direction of gravity is known: largest angle between that normal and the measured up.
MAX_KNOWN_TILT_DEG = 10.0
STEEP_PLANE_WEIGHT = 0.4
"""How much a point on a plane that is not level counts. Such a plane needs 2.5 times as many points
as a level one to win."""

NUM_NEIGHBORS = 8  # a point's distances to this many neighbors decide whether it is an outlier
MAX_OUTLIER_STD = 3.0
"""A point is an outlier when its mean distance to its neighbors is larger than the average by more
than this many standard deviations."""
MAX_NOISE_ROWS = 256  # about this many rows of an image are enough to measure its noise
MAD_TO_STD = 1.4826  # median absolute deviation of a normal distribution → its standard deviation

_INVERSE_GOLDEN_RATIO = (np.sqrt(5.0) - 1.0) / 2.0
"""Multiples of this number, modulo 1, are spread evenly over 0 … 1, however many there are."""


@dataclass(frozen=True)
class Plane:
    """The plane of all points p with up · p = height.

    Attributes:
        up: [3] unit normal that points away from the support, camera frame.
        height: Component of the plane's points along `up`. It is negative when the camera, which
            is at p = 0, is above the plane.
    """

    up: Array
    height: float


def select_evenly_spread_points(points: Array, max_points: int) -> Array:
    """Choose at most `max_points` of the points [n, d], spread evenly and without randomness.

    The chosen indices follow a golden-ratio sequence. A fixed stride could choose the same columns
    of the image in every row.
    """
    num_points = len(points)
    if num_points <= max_points:
        return points
    positions = np.arange(max_points) * _INVERSE_GOLDEN_RATIO % 1.0  # [max_points] in [0, 1)
    return points[(positions * num_points).astype(np.intp)]


def mark_inliers(points: Array) -> Array:
    """Statistical outlier removal: which points are no further from their neighbors than usual.

    Each point has a mean distance to its `NUM_NEIGHBORS` nearest points. A point is an inlier when
    its mean distance exceeds the average of all points' mean distances by at most
    `MAX_OUTLIER_STD` of their standard deviations.

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


def estimate_relative_noise(points: Array, is_known: Array) -> float:
    """Estimate the standard deviation of depth from pixel to pixel, as a fraction of the depth.

    On a plane, inverse depth is a linear function of the column. So its second difference along a
    row consists of noise only. The median over the image ignores the edges of objects.

    Args:
        points: [h, w, 3] point map, camera frame.
        is_known: [h, w] bool, where the points are known.

    Returns:
        The noise; 0 if nowhere three neighboring points in a row are known.
    """
    row_stride = max(1, len(points) // MAX_NOISE_ROWS)
    points = points[::row_stride]
    is_known = is_known[::row_stride]
    has_neighbors = is_known[:, 2:] & is_known[:, 1:-1] & is_known[:, :-2]
    if not has_neighbors.any():
        return 0.0
    inverse = 1 / np.where(is_known, points[..., 2], 1.0).astype(np.float64)
    second_difference = inverse[:, 2:] - 2 * inverse[:, 1:-1] + inverse[:, :-2]
    bend = np.abs(second_difference) / inverse[:, 1:-1]  # relative to the inverse depth
    # A second difference of independent noise has √(1 + 4 + 1) times its standard deviation.
    return float(MAD_TO_STD * np.median(bend[has_neighbors]) / np.sqrt(6.0))


def fit_support_plane(points: Array, up: Array | None = None) -> Plane | None:
    """Find the largest level plane among the points of a scene's background.

    RANSAC with a fixed seed tries planes through three random points each. The plane that contains
    the most points wins. A plane contains the points that are nearer to it than 1 % of the points'
    median distance from the camera.

    Args:
        points: [n, 3] camera frame, any unit.
        up: [3] unit vector against gravity, camera frame, when known. A plane is level when its
            normal is within `MAX_KNOWN_TILT_DEG` of `up`, or without `up` within `MAX_TILT_DEG` of
            `UP_PRIOR`. Without `up`, a steeper plane (a wall, or the table under a camera that
            looks straight down) can also win, if it has 2.5 times as many points (our choice).

    Returns:
        The plane, refined on all its points and facing the camera; None when it contains less than
        `MIN_PLANE_FRACTION` of the points.
    """
    points = np.asarray(select_evenly_spread_points(points, MAX_PLANE_POINTS), np.float64)
    if len(points) < MIN_PLANE_POINTS:
        return None
    limit = 0.01 * float(np.median(np.linalg.norm(points, axis=1)))

    # Candidates through three points each
    triples = np.random.default_rng(0).integers(0, len(points), (3, NUM_PLANE_CANDIDATES))
    a, b, c = points[triples]  # [candidates, 3] each
    normals = np.cross(b - a, c - a)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    heights = np.einsum("ij,ij->i", normals, a)  # [candidates]
    is_near = np.abs(normals @ points.T - heights[:, None]) < limit  # [candidates, n]

    # The cosine of each normal's angle to up. A normal's sign is arbitrary, so the one that faces
    # the camera (the origin) is taken.
    up_direction = UP_PRIOR if up is None else np.asarray(up, np.float64)
    cosines = -np.sign(heights) * (normals @ up_direction)  # [candidates]

    # A candidate gets a vote from each of its points, less (or nothing) if it is not level. A steep
    # plane can win only without `up`, and only if its visible side does not face down.
    if up is None:
        max_tilt_deg = MAX_TILT_DEG
        steep_weight: Array | float = STEEP_PLANE_WEIGHT * (cosines > 0)
    else:
        max_tilt_deg = MAX_KNOWN_TILT_DEG
        steep_weight = 0.0
    is_level = cosines > np.cos(np.radians(max_tilt_deg))
    votes = is_near.sum(axis=1) * np.where(is_level, 1.0, steep_weight)
    if not votes.any():
        return None

    # Refine the winner on all its points: the normal is the direction of their smallest variance.
    # This is done twice, because the refined plane has other points.
    on_plane = is_near[np.argmax(votes)]
    for _ in range(2):
        # With fewer than 12 points, the direction of smallest variance would be too uncertain.
        if on_plane.sum() < max(12, MIN_PLANE_FRACTION * len(points)):
            return None
        plane_points = points[on_plane]
        middle = plane_points.mean(axis=0)
        covariance = np.cov((plane_points - middle).T)
        normal = np.linalg.eigh(covariance)[1][:, 0]
        normal = normal * -np.sign(normal @ middle)  # towards the camera
        on_plane = np.abs((points - middle) @ normal) < limit
    return Plane(normal, float(middle @ normal))
