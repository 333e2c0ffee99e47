"""Oriented 3D boxes: fitting to the visible points of an object, the vertex order, and how to
compare two.

The box frame is the camera's, turned as little as needed: its axes point right, down and away from
the camera. Vertices come top four first, then the bottom four, each four in the order near-left,
near-right, far-right, far-left, as the camera sees them. The paper states only that the order is
consistent with respect to the camera frame; this definition is our choice.

The tight box around points depends on the outermost few, which noise moves most. Of an object with
flat faces, however, every point tells where its face is. So axes and faces are fitted to be nearest
to all points, by Gauss-Newton from a first guess, with less weight for points that lie on no face.
Our choice.
"""

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations, permutations, product

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from spear.labels.fit.points import UP_PRIOR
from spear.types import Array, Box3D

VERTEX_SIGNS = np.array(
    [
        (-1, -1, -1),
        (1, -1, -1),
        (1, -1, 1),
        (-1, -1, 1),
        (-1, 1, -1),
        (1, 1, -1),
        (1, 1, 1),
        (-1, 1, 1),
    ],
    float,
)
"""[8, 3] on which side of the box each vertex is, along its right, down and away axes."""

BOX_EDGES = (
    (0, 1),
    (1, 2),
    (2, 3),
    (3, 0),
    (4, 5),
    (5, 6),
    (6, 7),
    (7, 4),
    (0, 4),
    (1, 5),
    (2, 6),
    (3, 7),
)
"""The 12 edges, as pairs of vertex indices."""

MAX_NUM_STEPS = 8  # of Gauss-Newton
MIN_TURN_RAD = 2e-3  # Gauss-Newton ends after a step that turns the axes by less
MAX_TURN_RAD = 0.2  # of one step
MIN_FACE_FRACTION = 0.08  # of the points lie on a face; a face with fewer is not believed

MAX_TILTED_MISFIT_FRACTION = 0.6
"""An object on a surface leans where a freely turned box has less than this fraction of the misfit
of an upright one."""
MAX_MISFIT_FRACTION = 0.03
"""… and is a box when its points are, beyond their noise, nearer to its faces than this fraction of
its middle side."""
FACE_DISTANCE_FRACTION = 0.1
"""Points within this fraction of the box's size from a face count as lying on it."""
MIN_ON_FACE_FRACTION = 0.85
"""An object is round when fewer of its seen points than this lie on the faces that the camera
sees."""
ALIGNMENT_PER_RAD = 0.05
"""How much larger a footprint may be, per radian of turn, for a box better aligned with the
camera."""

_COARSE_ANGLES_RAD = np.radians(np.arange(0.0, 90.0, 3.0))
_FINE_ANGLES_RAD = np.radians(np.linspace(-3.0, 3.0, 25))
_MAX_HULL_FACES = 48  # of a convex hull that are tried as a face of the box
_TRIPLES = np.array(list(combinations(range(7), 3)))
_EYE = np.eye(3)
_CROSS = np.cross(_EYE[:, None], _EYE).transpose(2, 1, 0)
"""[k, j, i]: component k of (axis i × axis j) of the camera frame."""


def make_box(center: Array, size: Array, axes: Array) -> Box3D:
    """Make a box, with its axes and vertices in the order of this module.

    Args:
        center: [3] camera frame.
        size: [3] full sizes along the axes.
        axes: [3, 3] unit axes as columns, in any order and with any signs.
    """
    order, signs = _find_camera_like_axes(axes)
    rotation = axes[:, order] * signs
    ordered_size = np.asarray(size)[list(order)]
    vertices = center + (VERTEX_SIGNS * (ordered_size / 2)) @ rotation.T
    return Box3D(
        vertices=np.asarray(vertices, np.float32),
        center=np.asarray(center, np.float32),
        size=np.asarray(ordered_size, np.float32),
        rotation=np.asarray(rotation, np.float32),
    )


def make_box_from_vertices(vertices: Array) -> Box3D:
    """Make the box of eight vertices [8, 3] in any order."""
    return fit_nearest_box(order_vertices(vertices))


def fit_nearest_box(vertices: Array) -> Box3D:
    """Fit a box to eight points in the order of this module, which need not be the vertices of one.

    The axes are the rotation nearest to the mean edges, the size is their lengths along it (our
    choice).

    Args:
        vertices: [8, 3] camera frame.
    """
    edges = vertices.T @ VERTEX_SIGNS / 4  # columns: right, down, away
    lengths = np.maximum(np.linalg.norm(edges, axis=0), 1e-12)
    u, _, v_transposed = np.linalg.svd(edges / lengths)
    axes = u @ v_transposed
    return make_box(vertices.mean(0), np.maximum((edges * axes).sum(0), 1e-6), axes)


def order_vertices(vertices: Array) -> Array:
    """Bring the vertices of a box into the order that this module defines.

    The axis nearest to up (for a camera that looks 35° down, `UP_PRIOR`) separates top from bottom;
    of the other two, the one nearest to the camera's x separates left from right; the third
    separates near from far. The result is the same for every permutation of the input. It can only
    jump where a box turned about the vertical by 45° makes left and near change places, or for a
    camera that looks up or more than 80° down.

    Args:
        vertices: [8, 3] camera frame, in any order.

    Returns:
        The same vertices [8, 3].
    """
    v = np.asarray(vertices, np.float64)
    v = v[np.lexsort(v.T)]
    edges = v[1:] - v[0]

    # Of the seven differences to one corner only its three edges are pairwise orthogonal.
    unit = edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(unit @ unit.T)
    i, j, k = _TRIPLES.T
    most_orthogonal = np.argmin(cosines[i, j] + cosines[i, k] + cosines[j, k])
    axes = unit[_TRIPLES[most_orthogonal]].T

    order, signs = _find_camera_like_axes(axes)
    along = (v - v.mean(axis=0)) @ (axes[:, order] * signs)
    return v[(along @ VERTEX_SIGNS.T).argmax(axis=0)]


def _find_camera_like_axes(axes: Array) -> tuple[list[int], Array]:
    """Which column of `axes` [3, 3] is the box's right, down and away axis, and with which sign
    [3]."""
    vertical = int(np.argmax(np.abs(UP_PRIOR @ axes)))
    first = 1 if vertical == 0 else 0
    second = 3 - vertical - first
    first_is_right = abs(axes[0, first]) >= abs(axes[0, second])
    right = first if first_is_right else second
    away = second if first_is_right else first

    right_sign = 1.0 if axes[0, right] >= 0 else -1.0
    down_sign = -1.0 if UP_PRIOR @ axes[:, vertical] >= 0 else 1.0
    forward = np.cross(right_sign * axes[:, right], down_sign * axes[:, vertical])
    away_sign = np.sign(forward @ axes[:, away]) or 1.0
    return [right, vertical, away], np.array([right_sign, down_sign, away_sign])


@dataclass(frozen=True)
class VisibleFaces:
    """Axes, and the faces of an object that the camera sees along them.

    Attributes:
        axes: [3, 3] as columns.
        at: [3] the position of the face along each axis; NaN for an axis without a visible face.
        side: [3] on which side of the points that face is: -1 the lower, 1 the upper.
        misfit: Mean distance of the points from the nearest face; infinite where no face is seen.
    """

    axes: Array
    at: Array
    side: Array
    misfit: float


def fit_faces(points: Array, axes: Array, turn_axis: Array | None = None) -> VisibleFaces:
    """Fit the visible faces of an object to its points, by Gauss-Newton with robust weights.

    Args:
        points: [n, 3] camera frame.
        axes: [3, 3] first guess of the axes, as columns.
        turn_axis: [3] the only direction about which the axes may turn; None lets them turn freely.
    """
    middle = points.mean(axis=0)
    centered = points - middle
    free_turns = _EYE if turn_axis is None else np.asarray(turn_axis, np.float64)[:, None]

    # Which faces the camera sees, and a first guess of their positions
    along = centered @ axes
    low, high = np.quantile(along, (0.02, 0.98), axis=0)
    camera = -middle @ axes  # where the camera is along each axis
    side = np.where(camera > (low + high) / 2, 1.0, -1.0)
    at = np.where(side > 0, high, low)
    is_visible = np.abs(camera - (low + high) / 2) > 0.5 * (high - low)
    if not is_visible.any():
        return VisibleFaces(axes, np.full(3, np.nan), side, np.inf)

    indices = np.arange(len(points))
    half = len(points) // 2
    turn = np.ones(3)
    for step in range(MAX_NUM_STEPS + 1):
        # The distance of each point from its nearest face
        offset = np.where(is_visible, along - at, np.inf)
        nearest = np.abs(offset).argmin(axis=1)
        error = offset[indices, nearest]
        if step == MAX_NUM_STEPS or float(turn @ turn) < MIN_TURN_RAD**2:
            break

        # Cauchy weights: np.median without its checks, which cost more than the rest of it
        scale = 2.0 * float(np.partition(np.abs(error), half)[half]) + 1e-6
        weight = 1.0 / (1.0 + (error / scale) ** 2)

        # How far each point moves along its axis when the axes turn: axis × point, of all axes at
        # once
        moved = centered @ (_CROSS @ axes).transpose(1, 2, 0).reshape(3, 9)
        turned = moved.reshape(-1, 3, 3)[indices, nearest] @ free_turns  # [n, 1 or 3]
        jacobian = np.concatenate([turned, -_EYE[nearest]], axis=1)

        # One damped Gauss-Newton step of the turn and of the positions
        weighted = (jacobian * weight[:, None]).T
        normal = weighted @ jacobian
        normal.flat[:: len(normal) + 1] += 1e-6 * normal.trace()
        change = np.linalg.solve(normal, -weighted @ error)
        turn = free_turns @ change[:-3]
        turn *= min(1.0, MAX_TURN_RAD / max(math.sqrt(turn @ turn), 1e-9))
        axes = _rotation_matrix(turn) @ axes
        at = at + change[-3:]
        along = centered @ axes

    fraction = np.bincount(nearest, minlength=3) / len(points)
    is_believed = is_visible & (fraction >= MIN_FACE_FRACTION)
    positions = np.where(is_believed, at + middle @ axes, np.nan)
    return VisibleFaces(axes, positions, side, float(np.abs(error).mean()))


def _rotation_matrix(turn: Array) -> Array:
    """The matrix [3, 3] of a rotation vector [3], rad, by Rodrigues' formula.

    SciPy has the same, but its checks cost too much here.
    """
    angle = math.sqrt(turn @ turn)
    cross = _CROSS @ turn
    if angle > 1e-9:
        sine_term = math.sin(angle) / angle
        cosine_term = (1 - math.cos(angle)) / angle**2
    else:
        sine_term = 1.0
        cosine_term = 0.5
    return _EYE + sine_term * cross + cosine_term * (cross @ cross)


def fit_box(
    points: Array,
    up: Array | None = None,
    support: float | None = None,
    margin: float = 0,
    noise: float = 0,
) -> Box3D:
    """Fit an oriented box to an object of which only the side that faces the camera is seen.

    Args:
        points: [n >= 1, 3] clean points of the object, camera frame.
        up: [3] unit normal of the support surface, camera frame, when known. The box is then
            upright (smallest area seen along `up`) unless the object clearly leans. Without `up`
            the box is turned freely (smallest volume).
        support: Height of that surface under the object (up · p), when known. The box then reaches
            down to it, although its bottom is hidden.
        margin: How far the object reaches beyond its outermost points on each side.
        noise: Standard deviation of the points' depth, as a fraction of the depth. Noise pushes the
            outermost points further out along their rays. Each axis of the box is shortened by the
            push's component along it, at most by a fifth.

    Returns:
        The box; no side is thinner than a thousandth of the longest.
    """
    points = np.asarray(points, np.float64)
    distance = float(np.linalg.norm(points.mean(axis=0)))
    blur = 0.5 * noise * distance  # smoothing takes the other half

    # An upright box whose faces fit the points for certain
    if up is not None:
        level_axes = _fit_upright_axes(points, up)
        upright = fit_faces(points, level_axes, up)
        # Be strict: noise hides the bend of round things, for which there is a better guess.
        is_upright_box = partial(
            _is_box, points, blur=0.8 * blur, max_misfit=MAX_MISFIT_FRACTION / 3
        )
        if not is_upright_box(upright):
            # Whether a face that the camera hardly sees is a face shows only along better axes.
            upright = min(upright, fit_faces(points, upright.axes, up), key=_get_misfit)
        if is_upright_box(upright):
            return _enclose(points, upright.axes, margin, noise, support, upright)

    # A freely turned one, if it is much better than the upright one
    start_axes = _fit_smallest_volume_axes(points)
    free = fit_faces(points, start_axes)
    if up is not None:
        free = min(free, fit_faces(points, upright.axes), key=_get_misfit)
        is_upright_almost_as_good = free.misfit > MAX_TILTED_MISFIT_FRACTION * upright.misfit
        if is_upright_almost_as_good or not _is_box(points, free, blur):
            return _enclose(points, level_axes, margin, noise, support, None)
    if _is_box(points, free, blur):
        return _enclose(points, free.axes, margin, noise, None, free)

    # Not a box at all, on no known surface
    return _enclose(points, start_axes, margin, noise, None, None)


def _get_misfit(faces: VisibleFaces) -> float:
    return faces.misfit


def _is_box(
    points: Array, faces: VisibleFaces, blur: float, max_misfit: float = MAX_MISFIT_FRACTION
) -> bool:
    """Whether the points lie on the faces, up to the blur (a length) of their depth's noise."""
    size = float(np.median(np.ptp(points @ faces.axes, axis=0)))
    return faces.misfit < max_misfit * size + blur


def _enclose(
    points: Array,
    axes: Array,
    margin: float,
    noise: float,
    support: float | None,
    faces: VisibleFaces | None,
) -> Box3D:
    """The tight box along `axes` [3, 3] (columns; the last one up, where a support height is
    given).

    Fitted faces, where there are any, take the place of the outermost points.
    """
    along = points @ axes
    low = along.min(axis=0)
    high = along.max(axis=0)
    pushed = np.minimum(noise * np.abs(along.mean(axis=0)), 0.2 * (high - low))
    low = low + pushed
    high = high - pushed

    if faces is not None:
        has_face = np.isfinite(faces.at)
        low = np.where((faces.side < 0) & has_face, faces.at, low - margin)
        high = np.where((faces.side > 0) & has_face, faces.at, high + margin)
    elif support is None:
        low = low - margin
        high = high + margin
    if support is not None:
        low[2] = min(support, high[2])
    if support is not None and faces is None:
        near, far = _extend_round_back(along, axes, points.mean(axis=0), low, high)
        low[:2] -= margin + near
        high[:2] += margin + far

    size = np.maximum(high - low, 0)
    size = np.maximum(size, max(1e-3 * size.max(), 1e-9))
    return make_box(axes @ ((low + high) / 2), size, axes)


def _extend_round_back(
    along: Array, axes: Array, middle: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """How far a round object goes on behind its outline, at the lower and upper ends of its level
    axes.

    The seen points of a box fill its faces, and its far edge is where it ends. A round thing bends
    away from the faces of the box around it, and its back is hidden. It is taken to be as deep as
    it is wide or high, whichever is less. Our choice.

    Args:
        along: [n, 3] the points along the axes.
        axes: [3, 3] the box axes as columns, the last one up.
        middle: [3] the mean point, camera frame.
        low: [3] the lower end of the box along each axis.
        high: [3] the upper end.

    Returns:
        Two distances [2] along the first two axes: beyond the lower ends and beyond the upper ends.
    """
    direction = middle @ axes[:, :2]
    direction = direction / max(float(np.linalg.norm(direction)), 1e-9)
    size = high - low

    # How many points lie on the two sides that face the camera, or on the top
    facing_sides = np.where(direction > 0, low[:2], high[:2])
    is_on_side = np.abs(along[:, :2] - facing_sides) < FACE_DISTANCE_FRACTION * size[:2]
    is_on_top = along[:, 2] > high[2] - FACE_DISTANCE_FRACTION * size[2]
    if (is_on_side.any(axis=1) | is_on_top).mean() > MIN_ON_FACE_FRACTION:
        return np.zeros(2), np.zeros(2)

    depth = np.minimum(size[1::-1], size[2])
    extension = np.clip(depth - size[:2], 0, 0.6 * size[:2]) * direction**2
    return np.where(direction > 0, 0, extension), np.where(direction > 0, extension, 0)


def _fit_upright_axes(points: Array, up: Array) -> Array:
    """Axes [3, 3] with `up` last, of the box of smallest footprint.

    Among equals (round things) the box that is aligned with the camera wins, so that yaw is not
    random.
    """
    up = np.asarray(up, np.float64)
    x = np.array([1.0, 0.0, 0.0]) - up[0] * up
    if x @ x < 1e-6:
        x = np.array([0.0, 0.0, 1.0]) - up[2] * up
    x /= np.linalg.norm(x)
    z = np.cross(up, x)
    flat = np.stack([points @ x, points @ z])

    angle = 0.0
    for offsets in (_COARSE_ANGLES_RAD, _FINE_ANGLES_RAD):
        angles = angle + offsets
        areas = _compute_footprints(flat, angles)
        from_camera = np.abs((angles + np.pi / 4) % (np.pi / 2) - np.pi / 4)
        angle = float(angles[np.argmin(areas * (1 + ALIGNMENT_PER_RAD * from_camera))])

    cos = np.cos(angle)
    sin = np.sin(angle)
    return np.stack([cos * x + sin * z, cos * z - sin * x, up], axis=1)


def _compute_footprints(flat: Array, angles: Array) -> Array:
    """Areas [..., a] of the rectangles, turned by `angles` [a], around the points `flat` [..., 2,
    n]."""
    cos = np.cos(angles)
    sin = np.sin(angles)
    turns = np.concatenate([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)])
    sides = np.ptp(turns @ flat, axis=-1)  # [..., 2a]
    return sides[..., : len(angles)] * sides[..., len(angles) :]


def _fit_smallest_volume_axes(points: Array) -> Array:
    """Axes [3, 3] of about the smallest box with a face on a face of the points' convex hull.

    Points that span no volume get their principal axes.
    """
    try:
        hull = ConvexHull(points)
    except (QhullError, ValueError):
        covariance = np.cov((points - points.mean(axis=0)).T) if len(points) > 1 else np.eye(3)
        return np.linalg.eigh(covariance)[1]
    corners = points[hull.vertices]
    normals = hull.equations[:, :3]
    normals = normals[:: max(1, len(normals) // _MAX_HULL_FACES)]
    sideways = np.cross(normals, np.eye(3)[np.argmin(np.abs(normals), axis=1)])
    sideways /= np.linalg.norm(sideways, axis=1, keepdims=True)
    flat = np.stack([corners @ sideways.T, corners @ np.cross(normals, sideways).T])  # [2, n, m]
    areas = _compute_footprints(np.moveaxis(flat, 2, 0), _COARSE_ANGLES_RAD[::2])  # [m, a]
    volumes = areas.min(axis=1) * np.ptp(corners @ normals.T, axis=0)
    return _fit_upright_axes(corners, normals[np.argmin(volumes)])


def find_keypoints(points: Array, box: Box3D) -> dict[str, Array]:
    """Find the keypoints [3] of an object: "closest", "furthest" and "centre".

    The first two are the seen points nearest to and furthest from the camera, the last is the box's
    center.

    Args:
        points: [n, 3] the seen points, camera frame.
        box: The object's box.
    """
    squared_distances = np.einsum("ij,ij->i", points, points)
    return {
        "closest": np.asarray(points[squared_distances.argmin()], np.float32),
        "furthest": np.asarray(points[squared_distances.argmax()], np.float32),
        "centre": box.center,
    }


def compute_iou_3d(a: Box3D, b: Box3D) -> float:
    """Volume of the intersection of two boxes over that of their union; exact up to rounding."""
    # The intersection is convex: the hull of each box's corners inside the other and of the points
    # where edges cross faces.
    corners = np.concatenate([_find_corners_inside(a, b), _find_corners_inside(b, a)])
    intersection = 0.0
    if len(corners) >= 4:
        with suppress(QhullError):  # the boxes only touch
            intersection = float(ConvexHull(corners - corners.mean(axis=0)).volume)
    volume_a = float(np.prod(a.size, dtype=np.float64))
    volume_b = float(np.prod(b.size, dtype=np.float64))
    return intersection / (volume_a + volume_b - intersection)


def _find_corners_inside(a: Box3D, b: Box3D) -> Array:
    """[n, 3] corners of `a` inside `b`, and crossings of `a`'s edges with `b`'s faces; float64."""
    axes = b.rotation.astype(np.float64)
    half = b.size.astype(np.float64) / 2
    center = b.center.astype(np.float64)

    # In the frame of b
    local = (a.vertices.astype(np.float64) - center) @ axes
    start = local[[i for i, _ in BOX_EDGES]]
    step = local[[j for _, j in BOX_EDGES]] - start
    with np.errstate(divide="ignore", invalid="ignore"):
        at = (np.concatenate([-half, half]) - np.tile(start, 2)) / np.tile(step, 2)  # [12, 6]
    edge, face = np.nonzero((at >= 0) & (at <= 1))
    crossings = start[edge] + at[edge, face][:, None] * step[edge]
    candidates = np.concatenate([local, crossings])

    # Faces often lie in one plane (two boxes on one table), up to what float32 loses at their
    # distance.
    tolerance = 1e-6 * float(half.max() + np.abs(center).max())
    is_inside = (np.abs(candidates) <= half + tolerance).all(axis=1)
    return candidates[is_inside] @ axes.T + center


def _list_symmetries() -> Array:
    symmetries = []
    for turn, flip in product(permutations(range(3)), product((-1, 1), repeat=3)):
        relabeled = VERTEX_SIGNS[:, turn] * flip
        symmetries.append((relabeled @ VERTEX_SIGNS.T).argmax(axis=1))
    return np.array(symmetries)


SYMMETRIES = _list_symmetries()
"""[48, 8] the relabelings of a box's vertices that keep it a box."""


def compute_vertex_error(a: Array, b: Array) -> float:
    """Mean distance between the vertices [8, 3] of two boxes, both in the order of
    `order_vertices`.

    One of them is relabeled by that of the box's 48 symmetries for which the distance is smallest.
    """
    difference = np.asarray(a, np.float64)[SYMMETRIES] - np.asarray(b, np.float64)
    distances = np.linalg.norm(difference, axis=-1)
    return float(distances.mean(axis=1).min())
