"""Oriented 3D boxes: fitting them to the visible points of an object, ordering their vertices, and
comparing two boxes.

The three axes of a box are named right, down and away, after the directions of the camera's x, y
and z axes to which they are nearest. The vertices of the top come first, then those of the bottom,
each in the order near-left, near-right, far-right, far-left, as the camera sees them. The paper
states only that the order is consistent with respect to the camera frame; this definition is our
choice.

The tight box around points depends on the few outermost points, which noise moves most. If an
object has flat faces, however, all points on a face tell where the face is. So `fit_faces` fits the
axes and the visible faces to all points at once, by Gauss-Newton from a first guess. Points that
lie on no face get less weight. The mean distance of the points from their nearest faces is called
the misfit. All of this is our choice.

The *support* is the surface on which an object stands. A box is *upright* when one of its axes is
the support's normal; its two other axes are its level axes. A box that may be turned in any way is
*free*. A *turn* is a rotation vector in radians.
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
"""[8, 3] on which side of the box's center each vertex is, along the right, down and away axes."""

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
"""The 12 edges of a box, as pairs of vertex indices."""

MAX_NUM_STEPS = 8  # Gauss-Newton makes at most this many steps
MIN_TURN_RAD = 2e-3  # Gauss-Newton ends after a step that turns the axes by less
MAX_TURN_RAD = 0.2  # one step of Gauss-Newton turns the axes by at most this much
MIN_FACE_FRACTION = 0.08
"""A face to which a smaller fraction of the points is nearest counts as not seen."""

MAX_TILTED_MISFIT_FRACTION = 0.6
"""An object on a support leans if the misfit of a free box is less than this fraction of the misfit
of an upright box."""
MAX_MISFIT_FRACTION = 0.03
"""An object is box-shaped if its misfit, beyond the noise of its points, is less than this fraction
of its side of medium length."""
FACE_DISTANCE_FRACTION = 0.1
"""A point lies on a face of a box if its distance from the face is less than this fraction of the
box's size along the face's normal."""
MIN_ON_FACE_FRACTION = 0.85
"""An object is round if a smaller fraction of its points lies on those faces of its box that the
camera sees."""
MAX_HIDDEN_DEPTH_FRACTION = 0.6
"""The largest depth of a round object's hidden back, as a fraction of its visible depth."""
ALIGNMENT_PER_RAD = 0.05
"""What a misalignment between an upright box and the camera costs. The box with the smallest
footprint wins, but a footprint counts as larger by this fraction for each radian of
misalignment."""

_COARSE_ANGLES_RAD = np.radians(np.arange(0.0, 90.0, 3.0))
_FINE_ANGLES_RAD = np.radians(np.linspace(-3.0, 3.0, 25))  # around the best coarse angle
_NUM_HULL_FACES = 48
"""Of a hull with more faces, only every n-th face is tried, where n is the number of faces divided
by this constant, rounded down. So at least this many are tried, but fewer than twice as many."""
_TRIPLES = np.array(list(combinations(range(7), 3)))  # [35, 3] all triples of seven indices
_EYE = np.eye(3)
_UNIT_CROSSES = np.cross(_EYE[:, None], _EYE)
"""[3, 3, 3]: element [i, j, k] is component k of (unit vector i × unit vector j)."""
_CROSS = _UNIT_CROSSES.transpose(2, 1, 0)
"""[3, 3, 3], with the indices [k, j, i]: `_CROSS @ a` is the cross-product matrix [k, j] of a
vector a, for which (`_CROSS @ a`) @ b = a × b."""


def make_box(center: Array, size: Array, axes: Array) -> Box3D:
    """Make a box whose axes and vertices are in the order that this module defines.

    Args:
        center: [3] camera frame.
        size: [3] full sizes along the axes.
        axes: [3, 3] unit axes as columns, in any order and with any signs.
    """
    order, signs = _order_axes_right_down_away(axes)
    rotation = axes[:, order] * signs
    ordered_size = np.asarray(size)[list(order)]
    offsets = VERTEX_SIGNS * (ordered_size / 2)  # [8, 3] of the vertices from the center, box frame
    vertices = center + offsets @ rotation.T
    return Box3D(
        vertices=np.asarray(vertices, np.float32),
        center=np.asarray(center, np.float32),
        size=np.asarray(ordered_size, np.float32),
        rotation=np.asarray(rotation, np.float32),
    )


def make_box_from_vertices(vertices: Array) -> Box3D:
    """Make the box that has these eight vertices [8, 3], in any order."""
    return fit_nearest_box(order_vertices(vertices))


def fit_nearest_box(ordered_vertices: Array) -> Box3D:
    """Fit a box to eight points, which need not be the exact vertices of a box.

    The box's axes are the rotation nearest to the directions of the mean edges. Its size is the
    length of the mean edges along these axes (our choice).

    Args:
        ordered_vertices: [8, 3] camera frame, in the order that this module defines.
    """
    # Column i is the mean of the four edges along axis i: the sum of the four vertices on one side
    # minus that of the four on the other, divided by 4.
    edges = ordered_vertices.T @ VERTEX_SIGNS / 4  # [3, 3]
    lengths = np.maximum(np.linalg.norm(edges, axis=0), 1e-12)
    u, _, v_transposed = np.linalg.svd(edges / lengths)
    axes = u @ v_transposed  # the orthogonal matrix nearest to the unit edges
    lengths_along_axes = (edges * axes).sum(0)
    return make_box(ordered_vertices.mean(0), np.maximum(lengths_along_axes, 1e-6), axes)


def order_vertices(vertices: Array) -> Array:
    """Bring the vertices of a box into the order that this module defines.

    The box axis nearest to `UP_PRIOR` (up, for a camera that looks 35° down) separates top from
    bottom. Of the two other axes, the one nearest to the camera's x axis separates left from right,
    and the third one separates near from far. The result is the same for every permutation of the
    vertices. A small rotation of the box changes the order only in two cases: for a box that is
    turned about the vertical by 45°, where left and near change places, and for a camera that looks
    up or more than 80° down.

    Args:
        vertices: [8, 3] camera frame, in any order.

    Returns:
        The same vertices [8, 3] in the new order.
    """
    # Sort them by their coordinates first, so that the result cannot depend on the given order.
    v = np.asarray(vertices, np.float64)
    v = v[np.lexsort(v.T)]

    # From one vertex, seven vectors lead to the others: three edges, three diagonals of faces and
    # the diagonal of the box. Only the three edges are pairwise orthogonal.
    vectors = v[1:] - v[0]  # [7, 3]
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    cosines = np.abs(unit @ unit.T)  # [7, 7]
    i, j, k = _TRIPLES.T
    most_orthogonal = np.argmin(cosines[i, j] + cosines[i, k] + cosines[j, k])
    axes = unit[_TRIPLES[most_orthogonal]].T  # [3, 3], as columns

    # Vertex number n is the one that is furthest in the direction of `VERTEX_SIGNS[n]`.
    order, signs = _order_axes_right_down_away(axes)
    along = (v - v.mean(axis=0)) @ (axes[:, order] * signs)  # [8, 3]
    return v[(along @ VERTEX_SIGNS.T).argmax(axis=0)]


def _order_axes_right_down_away(axes: Array) -> tuple[list[int], Array]:
    """Find which columns of `axes` [3, 3] are the box's right, down and away axes.

    Returns:
        The indices of the right, down and away columns, and the signs [3], each 1 or -1, by which
        to multiply them in this order.
    """
    vertical = int(np.argmax(np.abs(UP_PRIOR @ axes)))
    # The columns of the two level axes. The three indices 0, 1 and 2 add up to 3.
    level1 = 1 if vertical == 0 else 0
    level2 = 3 - vertical - level1
    # Row 0 of `axes` has the axes' components along the camera's x axis.
    is_level1_right = abs(axes[0, level1]) >= abs(axes[0, level2])
    right = level1 if is_level1_right else level2
    away = level2 if is_level1_right else level1

    right_sign = 1.0 if axes[0, right] >= 0 else -1.0
    down_sign = -1.0 if UP_PRIOR @ axes[:, vertical] >= 0 else 1.0
    # Away is right × down, so that the axes are right-handed. The sign is 0 only for bad axes.
    forward = np.cross(right_sign * axes[:, right], down_sign * axes[:, vertical])
    away_sign = np.sign(forward @ axes[:, away]) or 1.0
    return [right, vertical, away], np.array([right_sign, down_sign, away_sign])


@dataclass(frozen=True)
class VisibleFaces:
    """The faces of an object that the camera sees, at most one along each of three axes.

    Attributes:
        axes: [3, 3] unit axes as columns.
        positions: [3] the position of the visible face along each axis; NaN for an axis along
            which the camera sees no face.
        end_sign: [3] the end of the points' extent along each axis at which the face is: -1 the
            lower end, 1 the upper end.
        misfit: Mean distance of the points from the nearest face; infinite if no face is seen.
    """

    axes: Array
    positions: Array
    end_sign: Array
    misfit: float


def fit_faces(points: Array, start_axes: Array, turn_axis: Array | None = None) -> VisibleFaces:
    """Fit the visible faces of an object to its points, by Gauss-Newton with robust weights.

    Args:
        points: [n, 3] camera frame.
        start_axes: [3, 3] first guess of the axes, as columns.
        turn_axis: [3] the only direction about which the axes may turn; None lets them turn freely.
    """
    middle = points.mean(axis=0)
    centered = points - middle
    # Columns: the directions about which the axes may turn, [3, 3] or [3, 1]
    free_turns = _EYE if turn_axis is None else np.asarray(turn_axis, np.float64)[:, None]

    # Which faces the camera sees, and a first guess of their positions. Along an axis, the camera
    # sees a face if it is beyond the extent of the points.
    axes = start_axes
    along = centered @ axes  # [n, 3]
    low, high = np.quantile(along, (0.02, 0.98), axis=0)  # [3] the extent without outliers
    camera = -middle @ axes  # [3] along each axis, from `middle` to the camera at the origin
    end_sign = np.where(camera > (low + high) / 2, 1.0, -1.0)
    positions = np.where(end_sign > 0, high, low)  # [3] of the faces, relative to `middle`
    is_visible = np.abs(camera - (low + high) / 2) > 0.5 * (high - low)
    if not is_visible.any():
        return VisibleFaces(axes, np.full(3, np.nan), end_sign, misfit=np.inf)

    indices = np.arange(len(points))
    median_index = len(points) // 2
    turn = np.ones(3)  # rotation vector of the last step, rad; at first too large to stop
    for step in range(MAX_NUM_STEPS + 1):
        # The signed distance of each point from its nearest face
        offset = np.where(is_visible, along - positions, np.inf)  # [n, 3]
        nearest = np.abs(offset).argmin(axis=1)  # [n] the axis of the nearest face
        error = offset[indices, nearest]  # [n]
        if step == MAX_NUM_STEPS or float(turn @ turn) < MIN_TURN_RAD**2:
            break

        # Cauchy weights, whose scale is twice the median error. `np.median` would be slower.
        median_error = float(np.partition(np.abs(error), median_index)[median_index])
        scale = 2.0 * median_error + 1e-6  # never 0
        weight = 1.0 / (1.0 + (error / scale) ** 2)

        # The derivative of a point's position along an axis with respect to the turn of the axes is
        # axis × point. It is computed for all three axes at once, by one product. Then each point
        # gets the derivative along the axis of its nearest face.
        axis_crosses = _CROSS @ axes  # [k, j, a]: component k of (axis a × unit vector j)
        cross_matrix = axis_crosses.transpose(1, 2, 0).reshape(3, 9)  # [j, (a, k)]
        axis_cross_point = (centered @ cross_matrix).reshape(-1, 3, 3)  # [n, a, k]
        turn_derivatives = axis_cross_point[indices, nearest] @ free_turns  # [n, 1 or 3]
        position_derivatives = -_EYE[nearest]  # [n, 3] the error is position minus face position
        jacobian = np.concatenate([turn_derivatives, position_derivatives], axis=1)

        # One damped Gauss-Newton step, which changes the turn and the three positions
        weighted = (jacobian * weight[:, None]).T
        normal_matrix = weighted @ jacobian
        diagonal = slice(None, None, len(normal_matrix) + 1)  # of the flat matrix
        normal_matrix.flat[diagonal] += 1e-6 * normal_matrix.trace()  # not singular
        change = np.linalg.solve(normal_matrix, -weighted @ error)  # of the turn, then 3 positions
        turn = free_turns @ change[:-3]
        turn *= min(1.0, MAX_TURN_RAD / max(math.sqrt(turn @ turn), 1e-9))
        axes = _compute_rotation_matrix(turn) @ axes
        positions = positions + change[-3:]
        along = centered @ axes

    # A face counts as seen only if enough points are nearest to it.
    point_fractions = np.bincount(nearest, minlength=3) / len(points)  # [3] per face
    is_seen = is_visible & (point_fractions >= MIN_FACE_FRACTION)
    positions = np.where(is_seen, positions + middle @ axes, np.nan)
    return VisibleFaces(axes, positions, end_sign, misfit=float(np.abs(error).mean()))


def _compute_rotation_matrix(turn: Array) -> Array:
    """The matrix [3, 3] of a rotation vector [3], rad, by Rodrigues' formula.

    SciPy's function does the same, but its checks of the arguments would take most of the time.
    """
    angle = math.sqrt(turn @ turn)
    cross = _CROSS @ turn  # [3, 3] the cross-product matrix of `turn`
    if angle > 1e-9:
        sine_term = math.sin(angle) / angle
        cosine_term = (1 - math.cos(angle)) / angle**2
    else:
        sine_term = 1.0  # the limits for an angle of 0
        cosine_term = 0.5
    return _EYE + sine_term * cross + cosine_term * (cross @ cross)


def fit_box(
    points: Array,
    up: Array | None = None,
    support_height: float | None = None,
    margin: float = 0,
    relative_noise: float = 0,
) -> Box3D:
    """Fit an oriented box to an object of which only the side that faces the camera is seen.

    Args:
        points: [n >= 1, 3] clean points of the object, camera frame.
        up: [3] unit normal of the support, camera frame, when known. The box is then upright (the
            first guess has the smallest footprint along `up`) unless the object clearly leans.
            Without `up` the box is free (the first guess has the smallest volume).
        support_height: Height of the support under the object (up · p), when known. The box then
            reaches down to the support, although the object's bottom is hidden.
        margin: How far the object reaches beyond its outermost points on each side.
        relative_noise: Standard deviation of the points' depth, as a fraction of the depth. Noise
            pushes the outermost points further out along their rays. To compensate, both ends of
            the box along an axis are moved inwards by the push's component along this axis, at most
            by a fifth of the points' extent.

    Returns:
        The box; no side is thinner than a thousandth of the longest.
    """
    points = np.asarray(points, np.float64)
    distance = float(np.linalg.norm(points.mean(axis=0)))
    # The length by which noise moves a point. `masks.denoise_points_at_pixels` has smoothed the
    # points, which removes at least half of the noise.
    blur = 0.5 * relative_noise * distance

    # First try an upright box. Return it if its faces certainly fit the points.
    if up is not None:
        level_axes = _fit_upright_axes(points, up)
        upright = fit_faces(points, level_axes, up)
        # The limits are strict because noise can make round objects, whose box is found below by
        # other means, look like boxes.
        is_upright_box = partial(
            _is_box, points, blur=0.8 * blur, max_misfit=MAX_MISFIT_FRACTION / 3
        )
        if not is_upright_box(upright):
            # Fit once more from the better axes, along which other faces may be visible.
            upright = min(upright, fit_faces(points, upright.axes, up), key=_get_misfit)
        if is_upright_box(upright):
            return _fit_box_along_axes(
                points,
                upright.axes,
                margin,
                relative_noise,
                support_height=support_height,
                faces=upright,
            )

    # Then try a free box. On a support, it must fit much better than the upright box.
    start_axes = _fit_smallest_volume_axes(points)
    free = fit_faces(points, start_axes)
    if up is not None:
        free = min(free, fit_faces(points, upright.axes), key=_get_misfit)
    is_free_box = _is_box(points, free, blur)
    if up is not None:
        is_upright_almost_as_good = free.misfit > MAX_TILTED_MISFIT_FRACTION * upright.misfit
        if is_upright_almost_as_good or not is_free_box:
            return _fit_box_along_axes(
                points, level_axes, margin, relative_noise, support_height=support_height
            )
    if is_free_box:
        return _fit_box_along_axes(points, free.axes, margin, relative_noise, faces=free)

    # The object is not box-shaped, and no support is known.
    return _fit_box_along_axes(points, start_axes, margin, relative_noise)


def _get_misfit(faces: VisibleFaces) -> float:
    return faces.misfit


def _is_box(
    points: Array, faces: VisibleFaces, blur: float, max_misfit: float = MAX_MISFIT_FRACTION
) -> bool:
    """Whether points [n, 3] lie on the visible faces of a box.

    Their misfit may be the fraction `max_misfit` of the box's side of medium length, plus the
    length `blur` by which noise moves points.
    """
    sides = np.ptp(points @ faces.axes, axis=0)  # [3]
    middle_side = float(np.median(sides))
    return faces.misfit < max_misfit * middle_side + blur


def _fit_box_along_axes(
    points: Array,
    axes: Array,
    margin: float,
    relative_noise: float,
    support_height: float | None = None,
    faces: VisibleFaces | None = None,
) -> Box3D:
    """Fit a box with given axes to points [n, 3] of an object whose back is hidden.

    Its ends are near the outermost points, and are corrected for margin, noise, support and faces.

    Args:
        points: [n, 3] points of the object, camera frame.
        axes: [3, 3] the box's axes as columns. If `support` is given, the last one is up.
        margin: How far the object reaches beyond its outermost points on each side.
        relative_noise: Standard deviation of the points' depth, as a fraction of the depth.
        support_height: Height of the support under the object, when known.
        faces: The visible faces along these axes, where they fit. The box ends at these faces
            instead of at the outermost points.
    """
    along = points @ axes  # [n, 3]
    low = along.min(axis=0)
    high = along.max(axis=0)

    # Noise along the rays pushes the outermost points outwards: move both ends back.
    push = np.minimum(relative_noise * np.abs(along.mean(axis=0)), 0.2 * (high - low))
    low = low + push
    high = high - push

    # An end with a visible face is at the face. Other ends are `margin` beyond the points, except
    # for the lower end of an object on a support, which is at the support.
    if faces is not None:
        has_face = np.isfinite(faces.positions)
        low = np.where((faces.end_sign < 0) & has_face, faces.positions, low - margin)
        high = np.where((faces.end_sign > 0) & has_face, faces.positions, high + margin)
    elif support_height is None:
        low = low - margin
        high = high + margin
    if support_height is not None:
        low[2] = min(support_height, high[2])

    # Without faces, an object on a support may be round. Its top gets no margin.
    if support_height is not None and faces is None:
        middle = points.mean(axis=0)
        beyond_low, beyond_high = _estimate_hidden_back_of_round_object(
            along, axes, middle, low, high
        )
        low[:2] -= margin + beyond_low
        high[:2] += margin + beyond_high

    # No side may be thinner than a thousandth of the longest.
    size = np.maximum(high - low, 0)
    size = np.maximum(size, max(1e-3 * size.max(), 1e-9))
    return make_box(axes @ ((low + high) / 2), size, axes)


def _estimate_hidden_back_of_round_object(
    along: Array, axes: Array, middle: Array, low: Array, high: Array
) -> tuple[Array, Array]:
    """Estimate how far the hidden back of a round object reaches beyond its visible points.

    The visible points of a box-shaped object fill its faces and end at its far edges. The surface
    of a round object, in contrast, curves away from the faces of the box around it, and the
    object's back is hidden. A round object is taken to be as deep as it is wide or high, whichever
    is less. Our choice.

    Args:
        along: [n, 3] the points along the axes.
        axes: [3, 3] the box's axes as columns; the first two are level, the last one is up.
        middle: [3] the mean point, camera frame.
        low: [3] the lower end of the points' extent along each axis.
        high: [3] the upper end of the points' extent along each axis.

    Returns:
        Two arrays [2] of distances along the level axes: how far the object reaches beyond the
        lower ends, and how far beyond the upper ends. All are 0 if the object is not round.
    """
    direction = middle @ axes[:, :2]  # [2] the camera's line of sight along the level axes
    direction = direction / max(float(np.linalg.norm(direction)), 1e-9)
    size = high - low

    # Which points lie on one of the two sides that face the camera, or on the top
    facing_sides = np.where(direction > 0, low[:2], high[:2])
    is_on_side = np.abs(along[:, :2] - facing_sides) < FACE_DISTANCE_FRACTION * size[:2]  # [n, 2]
    is_on_top = along[:, 2] > high[2] - FACE_DISTANCE_FRACTION * size[2]  # [n]
    is_on_face = is_on_side.any(axis=1) | is_on_top
    if is_on_face.mean() > MIN_ON_FACE_FRACTION:
        return np.zeros(2), np.zeros(2)

    # Along one level axis, the object's width is its size along the other level axis.
    width = size[[1, 0]]
    depth = np.minimum(width, size[2])
    missing_depth = np.clip(depth - size[:2], 0, MAX_HIDDEN_DEPTH_FRACTION * size[:2])
    # The squared components of a unit vector add up to 1. An axis at a right angle to the line of
    # sight gets nothing.
    extension = missing_depth * direction**2
    beyond_low = np.where(direction > 0, 0, extension)
    beyond_high = np.where(direction > 0, extension, 0)
    return beyond_low, beyond_high


def _fit_upright_axes(points: Array, up: Array) -> Array:
    """The axes [3, 3] of the upright box with the smallest footprint; the last column is `up`.

    The footprint of a round object is nearly the same for every yaw. The box that is aligned with
    the camera is preferred then, so that the yaw is not random.

    Args:
        points: [n, 3] camera frame.
        up: [3] the unit vector that becomes the last axis.
    """
    # A level basis: x is the camera's x axis (or its z axis, if x is vertical) made level.
    up = np.asarray(up, np.float64)
    x = np.array([1.0, 0.0, 0.0]) - up[0] * up
    if x @ x < 1e-6:
        x = np.array([0.0, 0.0, 1.0]) - up[2] * up
    x /= np.linalg.norm(x)
    z = np.cross(up, x)
    flat = np.stack([points @ x, points @ z])  # [2, n]

    # Search the yaw in coarse, then in fine steps.
    angle = 0.0
    for offsets in (_COARSE_ANGLES_RAD, _FINE_ANGLES_RAD):
        angles = angle + offsets
        areas = _compute_footprint_areas(flat, angles)
        # The angle between box and camera, 0 to 45°: boxes repeat every quarter turn.
        misalignment = np.abs((angles + np.pi / 4) % (np.pi / 2) - np.pi / 4)
        weighted_areas = areas * (1 + ALIGNMENT_PER_RAD * misalignment)
        angle = float(angles[np.argmin(weighted_areas)])

    cos = np.cos(angle)
    sin = np.sin(angle)
    return np.stack([cos * x + sin * z, cos * z - sin * x, up], axis=1)


def _compute_footprint_areas(flat_2xn: Array, yaws_rad: Array) -> Array:
    """The areas of rectangles around points in a plane, for several yaws of the rectangle.

    Args:
        flat_2xn: [..., 2, n] the points.
        yaws_rad: [a] the yaws.

    Returns:
        The areas [..., a].
    """
    cos = np.cos(yaws_rad)
    sin = np.sin(yaws_rad)
    first_axes = np.stack([cos, sin], axis=1)  # [a, 2]
    second_axes = np.stack([-sin, cos], axis=1)  # [a, 2]
    directions = np.concatenate([first_axes, second_axes])  # [2a, 2]
    sides = np.ptp(directions @ flat_2xn, axis=-1)  # [..., 2a]
    num_yaws = len(yaws_rad)
    return sides[..., :num_yaws] * sides[..., num_yaws:]


def _fit_smallest_volume_axes(points: Array) -> Array:
    """The axes [3, 3] of nearly the smallest box around points [n, 3].

    The smallest box has nearly always a face that lies on a face of the points' convex hull. So
    the normals of the hull's faces are tried as axes of the box. Points that span no volume have no
    hull; their principal axes are returned.
    """
    try:
        hull = ConvexHull(points)
    except (QhullError, ValueError):
        covariance = np.cov((points - points.mean(axis=0)).T) if len(points) > 1 else np.eye(3)
        return np.linalg.eigh(covariance)[1]
    corners = points[hull.vertices]  # [k, 3]
    normals = hull.equations[:, :3]
    stride = max(1, len(normals) // _NUM_HULL_FACES)
    normals = normals[::stride]  # [m, 3]

    # Two axes in the plane of each face. The first one is orthogonal to the normal and to the
    # coordinate axis from which the normal is furthest.
    smallest_component = np.argmin(np.abs(normals), axis=1)
    sideways = np.cross(normals, np.eye(3)[smallest_component])  # [m, 3]
    sideways /= np.linalg.norm(sideways, axis=1, keepdims=True)
    other_sideways = np.cross(normals, sideways)

    # For each normal, the smallest box is the smallest footprint times the height.
    flat = np.stack([corners @ sideways.T, corners @ other_sideways.T])  # [2, k, m]
    every_6_degrees = _COARSE_ANGLES_RAD[::2]  # [a]
    areas = _compute_footprint_areas(np.moveaxis(flat, 2, 0), every_6_degrees)  # [m, a]
    heights = np.ptp(corners @ normals.T, axis=0)  # [m]
    volumes = areas.min(axis=1) * heights
    return _fit_upright_axes(corners, normals[np.argmin(volumes)])


def compute_keypoints(points: Array, box: Box3D) -> dict[str, Array]:
    """Find the three keypoints of an object.

    Args:
        points: [n, 3] the object's visible points, camera frame.
        box: The object's box.

    Returns:
        Name → point [3] float32: "closest" and "furthest" are the visible points that are nearest
        to and furthest from the camera; "centre" is the box's center.
    """
    squared_distances = np.einsum("ij,ij->i", points, points)  # [n] from the camera
    return {
        "closest": np.asarray(points[squared_distances.argmin()], np.float32),
        "furthest": np.asarray(points[squared_distances.argmax()], np.float32),
        "centre": box.center,
    }


def compute_iou_3d(a: Box3D, b: Box3D) -> float:
    """Volume of the intersection of two boxes over that of their union; exact up to rounding."""
    # The intersection is convex. Its corners are the corners of each box that are inside the other
    # box, and the points where an edge of one box crosses a face of the other.
    corners = np.concatenate(
        [
            _compute_corners_and_crossings_of_a_in_b(a, b),
            _compute_corners_and_crossings_of_a_in_b(b, a),
        ]
    )
    intersection = 0.0
    if len(corners) >= 4:
        with suppress(QhullError):  # the boxes only touch
            intersection = float(ConvexHull(corners - corners.mean(axis=0)).volume)
    volume_a = float(np.prod(a.size, dtype=np.float64))
    volume_b = float(np.prod(b.size, dtype=np.float64))
    return intersection / (volume_a + volume_b - intersection)


def _compute_corners_and_crossings_of_a_in_b(a: Box3D, b: Box3D) -> Array:
    """The corners of box `a` inside box `b`, and where `a`'s edges cross `b`'s faces: [n, 3]."""
    axes = b.rotation.astype(np.float64)
    half_size = b.size.astype(np.float64) / 2
    center = b.center.astype(np.float64)

    # The vertices and edges of `a` in the frame of `b`, where b's faces are at ± half_size
    local = (a.vertices.astype(np.float64) - center) @ axes  # [8, 3]
    start = local[[i for i, _ in BOX_EDGES]]  # [12, 3]
    step = local[[j for _, j in BOX_EDGES]] - start  # [12, 3]

    # Each edge meets the planes of the six faces at start + fraction · step. Division by zero gives
    # no fraction for an edge that is parallel to a face. The lower faces of the three axes come
    # first, then the upper faces.
    face_positions = np.concatenate([-half_size, half_size])  # [6]
    with np.errstate(divide="ignore", invalid="ignore"):
        fraction = (face_positions - np.tile(start, 2)) / np.tile(step, 2)  # [12, 6]
    edge, face = np.nonzero((fraction >= 0) & (fraction <= 1))
    crossings = start[edge] + fraction[edge, face][:, None] * step[edge]
    candidates = np.concatenate([local, crossings])

    # A crossing may still be outside b's other faces. Faces of two boxes on one table lie in one
    # plane up to the rounding of float32, so the comparison needs a tolerance.
    tolerance = 1e-6 * float(half_size.max() + np.abs(center).max())
    is_inside = (np.abs(candidates) <= half_size + tolerance).all(axis=1)
    return candidates[is_inside] @ axes.T + center


def _list_vertex_relabelings() -> Array:
    """The symmetries of a cube: 6 permutations of its axes times 8 choices of their signs."""
    symmetries = []
    for axis_order, axis_signs in product(permutations(range(3)), product((-1, 1), repeat=3)):
        relabeled = VERTEX_SIGNS[:, axis_order] * axis_signs  # [8, 3]
        # The product of two rows of signs is largest (3) where they are equal.
        symmetries.append((relabeled @ VERTEX_SIGNS.T).argmax(axis=1))
    return np.array(symmetries)


SYMMETRIES = _list_vertex_relabelings()
"""[48, 8]: each row is a permutation of the vertices' indices that maps edges to edges, so that the
permuted vertices describe the same box."""


def compute_vertex_error(vertices: Array, other_vertices: Array) -> float:
    """The mean distance between corresponding vertices of two boxes, in their unit.

    Which vertices correspond is decided by that one of a box's 48 symmetries for which the mean
    distance is smallest.

    Args:
        vertices: [8, 3] of a box, in the order of `order_vertices`.
        other_vertices: [8, 3] of the other box, in the same order.
    """
    relabeled_vertices = np.asarray(vertices, np.float64)[SYMMETRIES]  # [48, 8, 3]
    difference = relabeled_vertices - np.asarray(other_vertices, np.float64)
    distances = np.linalg.norm(difference, axis=-1)
    return float(distances.mean(axis=1).min())
