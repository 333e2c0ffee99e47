"""Oriented 3D boxes: fitting to the visible points of an object, the vertex order, and how to compare two.

The box frame is the camera's, turned as little as needed: its axes point right, down and away from the
camera. Vertices come top four first, then the bottom four, each four in the order near-left, near-right,
far-right, far-left, as the camera sees them. The paper states only that the order is consistent with respect
to the camera frame; this definition is our choice.

A box around points hangs on the outermost few, which noise moves most. Of a thing with flat faces every point
says where its face is: axes and faces are those from which the points are least far, found by Gauss-Newton
from a first guess, with less weight for points that lie on no face. Our choice.
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
    [(x, y, z) for y in (-1, 1) for x, z in ((-1, -1), (1, -1), (1, 1), (-1, 1))], float
)
"""[8, 3] which side of the box each vertex is on, along its right, down and away axes."""

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
"""The 12 edges, as pairs of vertex numbers."""

_TRIPLES = np.array(list(combinations(range(7), 3)))
_COARSE = np.radians(np.arange(0.0, 90.0, 3.0))
_FINE = np.radians(np.linspace(-3.0, 3.0, 25))
_ALIGNMENT = 0.05
"""How much larger a footprint may be, per radian of turn, for a box better aligned with the camera."""
_FACE = 0.1
"""How far from a face, as a fraction of the box's size, points count as lying on it."""
_TILTED = 0.6
"""An object on a surface leans where a freely turned box has so much less misfit than an upright one."""
_FLAT = 0.03
"""… and is a box when its points are nearer to its faces than this fraction of its middle side, and noise."""
_ROUND = 0.85
"""An object is round when fewer of its seen points than this lie on the faces that the camera sees."""

MAX_NUM_STEPS = 8
MIN_TURN_RAD = 2e-3
"""rad: the last turn is smaller."""
MIN_FACE_FRACTION = 0.08
"""A face with a smaller share of the points is not taken for one."""
_EYE = np.eye(3)
_CROSS = np.cross(_EYE[:, None], _EYE).transpose(2, 1, 0)
"""[k, j, i]: part k of (axis i × axis j) of the camera's frame."""


def make_box(center: Array, size: Array, axes: Array) -> Box3D:
    """The `Box3D` of a centre [3], full sizes [3] and unit axes [3, 3] (columns, any order and signs)."""
    order, signs = _camera_like(axes)
    rotation = axes[:, order] * signs
    size = np.asarray(size)[list(order)]
    vertices = center + (VERTEX_SIGNS * (size / 2)) @ rotation.T
    return Box3D(*(np.asarray(a, np.float32) for a in (vertices, center, size, rotation)))


def make_box_from_vertices(vertices: Array) -> Box3D:
    """The `Box3D` of eight vertices [8, 3] in any order."""
    return fit_nearest_box(order_vertices(vertices))


def fit_nearest_box(vertices: Array) -> Box3D:
    """The box nearest to eight vertices [8, 3] in the order of this module, which need not be one: its axes
    are the rotation nearest to the mean edges, its size their lengths along them (our choice)."""
    edges = vertices.T @ VERTEX_SIGNS / 4  # columns: right, down, away
    left, _, right = np.linalg.svd(edges / np.maximum(np.linalg.norm(edges, axis=0), 1e-12))
    axes = left @ right
    return make_box(vertices.mean(0), np.maximum((edges * axes).sum(0), 1e-6), axes)


def order_vertices(vertices: Array) -> Array:
    """The vertices of a box [8, 3] (camera frame, any order) in the order this module defines.

    The axis nearest to up (for a camera that looks 35° down, `UP_PRIOR`) separates top from bottom; of the
    other two, the one nearest to the camera's x separates left from right; the third separates near from
    far. The result is the same for every permutation of the input. It can only jump where a box turned about
    the vertical by 45° makes left and near change places, or for a camera that looks up or over 80° down.
    """
    v = np.asarray(vertices, np.float64)
    v = v[np.lexsort(v.T)]
    edges = v[1:] - v[0]
    # Of the seven differences to one corner only its three edges are pairwise orthogonal.
    unit = edges / np.maximum(np.linalg.norm(edges, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(unit @ unit.T)
    i, j, k = _TRIPLES.T
    axes = unit[_TRIPLES[np.argmin(cosines[i, j] + cosines[i, k] + cosines[j, k])]].T
    order, signs = _camera_like(axes)
    along = (v - v.mean(axis=0)) @ (axes[:, order] * signs)
    return v[(along @ VERTEX_SIGNS.T).argmax(axis=0)]


def _camera_like(axes: Array) -> tuple[list[int], Array]:
    """Which column of `axes` [3, 3], with which sign, is the box's right, down and away axis."""
    up = int(np.argmax(np.abs(UP_PRIOR @ axes)))
    first, second = (i for i in range(3) if i != up)
    right, away = (
        (first, second) if abs(axes[0, first]) >= abs(axes[0, second]) else (second, first)
    )
    x = 1.0 if axes[0, right] >= 0 else -1.0
    down = -1.0 if UP_PRIOR @ axes[:, up] >= 0 else 1.0
    forward = np.cross(x * axes[:, right], down * axes[:, up])
    return [right, up, away], np.array([x, down, np.sign(forward @ axes[:, away]) or 1.0])


@dataclass(frozen=True)
class VisibleFaces:
    """Axes [3, 3] (columns) and the faces that the camera sees: for each axis, where along it its face is
    (`at` [3], NaN without one) and on which side of the points (`side` [3], -1 lower, 1 upper).

    misfit  mean distance of the points from the nearest face; infinite where no face is seen.
    """

    axes: Array
    at: Array
    side: Array
    misfit: float


def fit_faces(points: Array, axes: Array, about: Array | None = None) -> VisibleFaces:
    """The faces of points [n, 3] (camera frame) whose axes are near `axes` [3, 3] (columns).

    about: [3] the only direction about which the axes may turn; any where it is None.
    """
    middle = points.mean(axis=0)
    centred = points - middle
    free = _EYE if about is None else np.asarray(about, np.float64)[:, None]
    along = centred @ axes
    low, high = np.quantile(along, (0.02, 0.98), axis=0)
    camera = -middle @ axes  # where it is along each axis
    side = np.where(camera > (low + high) / 2, 1.0, -1.0)
    at = np.where(side > 0, high, low)
    seen = np.abs(camera - (low + high) / 2) > 0.5 * (high - low)
    if not seen.any():
        return VisibleFaces(axes, np.full(3, np.nan), side, np.inf)
    every, half = np.arange(len(points)), len(points) // 2
    turn = np.ones(3)
    for step in range(MAX_NUM_STEPS + 1):
        off = np.where(seen, along - at, np.inf)
        nearest = np.abs(off).argmin(axis=1)
        error = off[every, nearest]
        if step == MAX_NUM_STEPS or float(turn @ turn) < MIN_TURN_RAD**2:
            break
        # np.median without its checks, which cost more than the rest of it.
        scale = 2.0 * float(np.partition(np.abs(error), half)[half]) + 1e-6
        weight = 1.0 / (1.0 + (error / scale) ** 2)
        # How far each point moves along its axis when the axes turn: axis × point, of all three axes at once.
        moved = centred @ (_CROSS @ axes).transpose(1, 2, 0).reshape(3, 9)
        turned = moved.reshape(-1, 3, 3)[every, nearest] @ free  # [n, 1 or 3]
        slope = np.concatenate([turned, -_EYE[nearest]], axis=1)
        weighted = (slope * weight[:, None]).T
        normal = weighted @ slope
        normal.flat[:: len(normal) + 1] += 1e-6 * normal.trace()
        change = np.linalg.solve(normal, -weighted @ error)
        turn = free @ change[:-3]
        turn *= min(1.0, 0.2 / max(math.sqrt(turn @ turn), 1e-9))
        axes = _rotation(turn) @ axes
        at = at + change[-3:]
        along = centred @ axes
    share = np.bincount(nearest, minlength=3) / len(points)
    found = np.where(seen & (share >= MIN_FACE_FRACTION), at + middle @ axes, np.nan)
    return VisibleFaces(axes, found, side, float(np.abs(error).mean()))


def _rotation(turn: Array) -> Array:
    """Rodrigues' formula: the matrix [3, 3] of a rotation vector [3], rad. (SciPy's checks cost too much.)"""
    angle = math.sqrt(turn @ turn)
    cross = _CROSS @ turn
    rise, bend = (
        (math.sin(angle) / angle, (1 - math.cos(angle)) / angle**2) if angle > 1e-9 else (1.0, 0.5)
    )
    return _EYE + rise * cross + bend * (cross @ cross)


def fit_box(
    points: Array,
    up: Array | None = None,
    support: float | None = None,
    margin: float = 0,
    noise: float = 0,
) -> Box3D:
    """The oriented box of an object of which only the side that faces the camera is seen.

    points   [n >= 1, 3] clean points of the object, camera frame.
    up       [3] unit normal of the support surface, camera frame, when known. The box is then turned about it
             only (smallest area seen along `up`), but for an object without `support` whose freely turned box
             (smallest volume) has less than half the volume. Without `up` the box is turned freely.
    support  height of that surface under the object (up · p), when known: the box then reaches down to it,
             though its bottom is hidden.
    margin   how far the object reaches beyond its outermost points on each side.
    noise    standard deviation of the points' depth, as a fraction of it. Noise pushes the outermost points
             further out along their rays; the box is drawn in by as much as that direction has of each of its
             axes, at most a fifth of its size.

    Returns the box; no side is thinner than a thousandth of the longest.
    """
    points = np.asarray(points, np.float64)
    blur = (
        0.5 * noise * float(np.linalg.norm(points.mean(axis=0)))
    )  # smoothing takes the other half
    if up is not None:
        # For sure: noise hides the bend of round things, for which there is a better guess.
        stands = partial(_is_box, points, noise=0.8 * blur, flat=_FLAT / 3)
        level = _upright(points, up)
        upright = fit_faces(points, level, up)
        flat = stands(upright)
        if not flat:
            # Whether a face that the camera hardly sees is one shows only along better axes.
            upright = min(
                upright, fit_faces(points, upright.axes, up), key=lambda found: found.misfit
            )
            flat = stands(upright)
        if flat:
            return _boxed(points, upright.axes, margin, noise, support, upright)
    start = _smallest_volume(points)
    free = fit_faces(points, start)
    if up is not None:
        free = min(free, fit_faces(points, upright.axes), key=lambda found: found.misfit)
        if free.misfit > _TILTED * upright.misfit or not _is_box(points, free, blur):
            return _boxed(points, level, margin, noise, support, None)
    if _is_box(points, free, blur):
        return _boxed(points, free.axes, margin, noise, None, free)
    return _boxed(points, start, margin, noise, None, None)


def _is_box(points: Array, found: VisibleFaces, noise: float, flat: float = _FLAT) -> bool:
    """Whether the points lie on the faces, as far as the noise of their depth lets that be seen."""
    size = float(np.median(np.ptp(points @ found.axes, axis=0)))
    return found.misfit < flat * size + noise


def _boxed(
    points: Array,
    axes: Array,
    margin: float,
    noise: float,
    support: float | None,
    found: VisibleFaces | None,
) -> Box3D:
    """The tight box along `axes` [3, 3] (columns; the last one up, where a support height is given); faces
    that were `found` are where they are."""
    along = points @ axes
    low, high = along.min(axis=0), along.max(axis=0)
    pushed = np.minimum(noise * np.abs(along.mean(axis=0)), 0.2 * (high - low))
    low, high = low + pushed, high - pushed
    if found is not None:
        low = np.where((found.side < 0) & np.isfinite(found.at), found.at, low - margin)
        high = np.where((found.side > 0) & np.isfinite(found.at), found.at, high + margin)
    elif support is None:
        low, high = low - margin, high + margin
    if support is not None:
        low[2] = min(support, high[2])
    if support is not None and found is None:
        near, far = _hidden_back(along, axes, points.mean(axis=0), low, high)
        low[:2] -= margin + near
        high[:2] += margin + far
    size = np.maximum(high - low, 0)
    return make_box(axes @ ((low + high) / 2), np.maximum(size, max(1e-3 * size.max(), 1e-9)), axes)


def _hidden_back(
    along: Array, axes: Array, middle: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """How far a round object goes on behind its outline, at its level axes' lower and upper ends, [2] each.

    What is seen of a box fills its faces, and its far edge is where it ends. A round thing bends away from
    the faces of the box around it, and its back is hidden: it is taken to be as deep as it is wide or high,
    whichever is less. Our choice.

    along: [n, 3] the points along `axes`, the box axes [3, 3] (columns, the last one up), with their extremes
    `low` and `high` [3]. middle: [3] the mean point, camera frame.
    """
    towards = middle @ axes[:, :2]
    towards = towards / max(float(np.linalg.norm(towards)), 1e-9)
    size = high - low
    near = np.abs(along[:, :2] - np.where(towards > 0, low[:2], high[:2])) < _FACE * size[:2]
    on_face = (near.any(axis=1) | (along[:, 2] > high[2] - _FACE * size[2])).mean()
    if on_face > _ROUND:
        return np.zeros(2), np.zeros(2)
    depth = np.minimum(size[1::-1], size[2])
    more = np.clip(depth - size[:2], 0, 0.6 * size[:2]) * towards**2
    return np.where(towards > 0, 0, more), np.where(towards > 0, more, 0)


def _upright(points: Array, up: Array) -> Array:
    """Axes [3, 3] with `up` last, of the box of smallest footprint; among equals (round things) the one that
    is aligned with the camera, so that their yaw is not random."""
    up = np.asarray(up, np.float64)
    x = np.array([1.0, 0.0, 0.0]) - up[0] * up
    if x @ x < 1e-6:
        x = np.array([0.0, 0.0, 1.0]) - up[2] * up
    x /= np.linalg.norm(x)
    z = np.cross(up, x)
    flat = np.stack([points @ x, points @ z])
    angle = 0.0
    for offsets in (_COARSE, _FINE):
        angles = angle + offsets
        areas = _footprints(flat, angles)
        from_camera = np.abs((angles + np.pi / 4) % (np.pi / 2) - np.pi / 4)
        angle = float(angles[np.argmin(areas * (1 + _ALIGNMENT * from_camera))])
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos * x + sin * z, cos * z - sin * x, up], axis=1)


def _footprints(flat: Array, angles: Array) -> Array:
    """Areas [..., a] of the rectangles, turned by `angles` [a], around the points `flat` [..., 2, n]."""
    cos, sin = np.cos(angles), np.sin(angles)
    turns = np.concatenate([np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)])
    sides = np.ptp(turns @ flat, axis=-1)  # [..., 2a]
    return sides[..., : len(angles)] * sides[..., len(angles) :]


def _smallest_volume(points: Array) -> Array:
    """Axes [3, 3] of about the smallest box with a face on a face of the convex hull; the principal axes of
    points that span no volume."""
    try:
        hull = ConvexHull(points)
    except (QhullError, ValueError):
        return np.linalg.eigh(
            np.cov((points - points.mean(axis=0)).T) if len(points) > 1 else np.eye(3)
        )[1]
    corners = points[hull.vertices]
    normals = hull.equations[:, :3]
    normals = normals[:: max(1, len(normals) // 48)]
    sideways = np.cross(normals, np.eye(3)[np.argmin(np.abs(normals), axis=1)])
    sideways /= np.linalg.norm(sideways, axis=1, keepdims=True)
    flat = np.stack([corners @ sideways.T, corners @ np.cross(normals, sideways).T])  # [2, n, m]
    areas = _footprints(np.moveaxis(flat, 2, 0), _COARSE[::2])  # [m, a]
    volumes = areas.min(axis=1) * np.ptp(corners @ normals.T, axis=0)
    return _upright(corners, normals[np.argmin(volumes)])


def find_keypoints(points: Array, box: Box3D) -> dict[str, Array]:
    """{"closest", "furthest"}: the seen points [3] nearest to and furthest from the camera; "centre"."""
    distances = np.einsum("ij,ij->i", points, points)
    near, far = (
        np.asarray(points[i], np.float32) for i in (distances.argmin(), distances.argmax())
    )
    return {"closest": near, "furthest": far, "centre": box.center}


def compute_iou_3d(a: Box3D, b: Box3D) -> float:
    """Volume of the intersection of two boxes over that of their union; exact up to rounding."""
    # A convex intersection is the hull of each box's corners inside the other and of where edges cross faces.
    corners = np.concatenate([_inside(a, b), _inside(b, a)])
    shared = 0.0
    if len(corners) >= 4:
        with suppress(QhullError):  # they touch
            shared = float(ConvexHull(corners - corners.mean(axis=0)).volume)
    volume_a, volume_b = (float(np.prod(box.size, dtype=np.float64)) for box in (a, b))
    return shared / (volume_a + volume_b - shared)


def _inside(a: Box3D, b: Box3D) -> Array:
    """[n, 3] corners of `a` inside `b`, and crossings of `a`'s edges with `b`'s faces; float64."""
    axes, half = b.rotation.astype(np.float64), b.size.astype(np.float64) / 2
    center = b.center.astype(np.float64)
    local = (a.vertices.astype(np.float64) - center) @ axes
    start = local[[i for i, _ in BOX_EDGES]]
    step = local[[j for _, j in BOX_EDGES]] - start
    with np.errstate(divide="ignore", invalid="ignore"):
        at = (np.concatenate([-half, half]) - np.tile(start, 2)) / np.tile(step, 2)  # [12, 6]
    edge, face = np.nonzero((at >= 0) & (at <= 1))
    crossings = start[edge] + at[edge, face][:, None] * step[edge]
    candidates = np.concatenate([local, crossings])
    # Faces often lie in one plane (two boxes on one table), up to what float32 loses at their distance.
    tolerance = 1e-6 * float(half.max() + np.abs(center).max())
    return candidates[(np.abs(candidates) <= half + tolerance).all(axis=1)] @ axes.T + center


_WAYS = product(permutations(range(3)), product((-1, 1), repeat=3))
SYMMETRIES = np.array(
    [(VERTEX_SIGNS[:, turn] * flip @ VERTEX_SIGNS.T).argmax(axis=1) for turn, flip in _WAYS]
)
"""[48, 8] the relabellings of a box's vertices that keep it a box."""


def compute_vertex_error(a: Array, b: Array) -> float:
    """Mean distance between the vertices [8, 3] of two boxes (both in `order_vertices` order), for the
    relabelling of one of them, among the box's 48 symmetries, that makes it least."""
    distances = np.linalg.norm(
        np.asarray(a, np.float64)[SYMMETRIES] - np.asarray(b, np.float64), axis=-1
    )
    return float(distances.mean(axis=1).min())
