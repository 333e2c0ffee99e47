"""Labeling one object: from its mask and the image's point map to a `LabeledObject` with a 3D box
and scores.

The *support* is the plane on which the objects of an image stand. The *height* of a point is its
component along the normal of the support (`Plane.up`). An object's *cloud* is the set of its clean
3D points, to which its box is fitted. Several functions work in a *window*, the rectangle of the
image that contains the object, to save time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from spear.labels.fit.box3d import compute_keypoints, compute_vertex_error, fit_box
from spear.labels.fit.image import compute_elementwise_iou_2d, compute_tight_box
from spear.labels.fit.masks import (
    denoise_points_at_pixels,
    drop_small_and_distant_parts,
    drop_support_pixels,
    encode_mask,
    erode_keeping_image_edge,
    snap_outline,
)
from spear.labels.fit.points import (
    TOUCHING_FRACTION,
    Plane,
    mark_inliers,
    select_evenly_spread_points,
)
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Box3D, LabeledObject

MARGIN_PX = 0.3
"""An object is taken to reach this far beyond the centers of its outermost pixels. On average, the
outline is half a pixel beyond the center of such a pixel. But the box is bounded by the outermost
of many pixels, whose center is nearer to the outline. Our choice, measured."""
MIN_POINTS = 12  # clean points; an object with fewer gets no box
MAX_POINTS = 600  # per object, up to half of them on its outline
LINKED_DEPTH_FRACTION = 0.04
"""Neighboring pixels of a mask are linked when their depths differ by less than this fraction (our
choice)."""
MASK_ERROR_FRACTION = 1 / 256
"""The outlines of estimated masks, and those of objects in estimated depth, are taken to be off by
this fraction of the image's longer side, at least by a pixel. (Our choice; the paper says only
"outlier removal, oriented box".)"""
MAX_CONTACT_HEIGHT_FRACTION = 0.25
"""A point beside an object may belong to what the object stands on if it is in this lowest part of
the object's visible height (our choice)."""
MIN_GAP_TO_TOP_FRACTION = 0.1
"""Such a point is also below the object's top by at least this fraction of the distance that
`TOUCHING_FRACTION` gives (our choice)."""
MIN_CONTACT_POINTS = 3  # with fewer such points, the lower part of the object counts as hidden
MIN_ON_PLANE_FRACTION = 0.2
"""An object stands on the support plane, and not on a plate, if more than this fraction of these
points are on the plane (our choice)."""
MAX_HIDDEN_HEIGHT_FRACTION = 0.8
"""The hidden lower part of an object may be as high as this fraction of its visible height (our
choice)."""
WIDTH_MARGIN = 1.25
"""Factor on the visible width of an object, because a part of the width may be hidden (our
choice)."""
MASK_END_FRACTION = 0.01
"""The estimated mask of an object that the image's edge cuts may end this fraction of the image's
longer side before the edge (our choice)."""


@dataclass(frozen=True)
class ImageGeometry:
    """The geometry of a whole image [h, w], which all of its objects need.

    Attributes:
        point_map: The 3D points of the image's pixels.
        support_plane: The support; None if no such plane was found.
        is_exact: Whether masks and depth are ground truth. If they are estimates, `label_object`
            corrects each object's mask and the points on its outline, as described in
            `spear.labels.fit.masks`.
        occupied: [h, w] bool, the pixels of all objects.
        noise: Standard deviation of the depth, as a fraction of the depth
            (`points.estimate_relative_noise`).
        lit_part: [[first row, last row], [first column, last column]] of the part of the image
            without black bars (`image.find_first_and_last_lit_row_and_column`).
    """

    point_map: PointMapResult
    support_plane: Plane | None
    is_exact: bool
    occupied: Array
    noise: float
    lit_part: Array

    @property
    def focal_px(self) -> float:
        """Focal length of the camera, in pixels."""
        return float(self.point_map.intrinsics[0, 0])


def label_object(detection: Detection, mask: Array, image: ImageGeometry) -> LabeledObject:
    """Label one detected object: fit its 3D box, find its keypoints and compute its scores.

    Args:
        detection: The object's name and 2D box.
        mask: [h, w] bool, the object's pixels.
        image: The geometry of the image that shows the object.

    Returns:
        The labeled object. If its mask is empty or too few points remain, it has no 3D box and no
        keypoints. Such an object must stay in the label, because questions must not use its name
        for another object. The scores are:

        - "detection", the detector's score;
        - "points", the number of points to which the box is fitted;
        - "visible", the fraction of its outline at which neither the image's edge nor something in
          front cuts the object off;
        - "edge", the fraction of its outline that the image's edge cuts;
        - "known", the fraction of its pixels with depth;
        - "whole", the IoU of the detected 2D box and the tight box around the mask;
        - only for objects with a 3D box: "planarity", how flat the seen points are
          (`compute_planarity`); "stability", how little the box changes with its points
          (`compute_stability`); and "compact", how wide the object appears in comparison with the
          depth of its box (`_compute_width_over_depth_extent`).
    """
    tight_box = compute_tight_box(mask)
    box2d = np.asarray(detection.box2d, np.float32)
    if not mask.any():
        scores = {"detection": detection.score, "points": 0.0, "visible": 0.0}
        return LabeledObject(
            detection.name, box2d, encode_mask(mask), box3d=None, keypoints={}, scores=scores
        )

    # How far the outline of a mask may be off (`error_px`), and how far before the image's edge the
    # mask of an object that the edge cuts may end (`end_px`). Exact masks have neither error.
    longer_side = max(mask.shape)
    if image.is_exact:
        error_px = 0
        end_px = 0
    else:
        error_px = round(max(1.0, longer_side * MASK_ERROR_FRACTION))
        end_px = max(error_px, round(MASK_END_FRACTION * longer_side))

    # The window is the tight box around the mask, and `room` more pixels on each side.
    x0, y0, x1, y1 = tight_box.astype(int).tolist()
    room = 1
    if error_px:
        room += error_px + 4  # `snap_outline` needs pixels of the support beside the object
    rows = slice(max(y0 - room, 0), y1 + room)
    columns = slice(max(x0 - room, 0), x1 + room)
    window = (rows, columns)

    # Correct the mask, trace its outline, and collect clean points.
    points = image.point_map.points[window]
    is_known = image.point_map.mask[window]
    inside = mask[window]
    if error_px:
        inside = _correct_mask(inside, points, is_known, image, window, error_px)
    lit_part = image.lit_part + np.array([end_px, -end_px])  # `end_px` smaller on each side
    outline = _measure_outline(inside, window, lit_part, points, is_known)
    cloud = _collect_points(inside & is_known, points, error_px, image.noise)

    scores = {
        "detection": detection.score,
        "points": float(len(cloud)),
        "visible": outline.visible_fraction,
        "edge": outline.edge_fraction,
        "known": float(image.point_map.mask[mask].mean()),
        "whole": float(compute_elementwise_iou_2d(box2d, tight_box)),
    }
    if len(cloud) < MIN_POINTS:
        return LabeledObject(
            detection.name, box2d, encode_mask(mask), box3d=None, keypoints={}, scores=scores
        )

    # Fit the box.
    fit = _choose_fit(cloud, outline.points_beside, image)
    box = fit(cloud)
    scores["planarity"] = compute_planarity(cloud)
    scores["stability"] = compute_stability(cloud, box, fit)
    scores["compact"] = _compute_width_over_depth_extent(inside, cloud, box, image.focal_px)
    keypoints = compute_keypoints(cloud, box)
    return LabeledObject(detection.name, box2d, encode_mask(mask), box, keypoints, scores)


def _correct_mask(
    inside: Array,
    points: Array,
    is_known: Array,
    image: ImageGeometry,
    window: tuple[slice, slice],
    error_px: int,
) -> Array:
    """Correct an estimated mask by the 3D points of its pixels.

    Args:
        inside: [h, w] bool, the mask in the window.
        points: [h, w, 3] the window's points, camera frame.
        is_known: [h, w] bool, where the points are known.
        image: The geometry of the whole image.
        window: The rows and columns of the window in the image.
        error_px: How far the mask's outline may be off.

    Returns:
        The corrected mask [h, w] in the window.
    """
    occupied = image.occupied[window] & ~inside  # by other objects
    # The slope of a surface is the length by which its depth grows per unit of its width. From one
    # pixel to the next, the depth then changes by the fraction slope / focal_px. So pixels of
    # surfaces with slopes of up to 12 are linked, and so are pixels that differ by noise only.
    link_limit = max(LINKED_DEPTH_FRACTION, 12.0 / image.focal_px, 4 * image.noise)
    inside = drop_small_and_distant_parts(inside, points, is_known, link_limit)
    plane = image.support_plane
    if plane is not None:
        inside = drop_support_pixels(inside, points, is_known, occupied, plane, image.noise)
    snapped = snap_outline(inside, points, is_known, occupied, plane, error_px, image.noise)
    return snapped if snapped.any() else inside


def _choose_fit(
    cloud: Array, points_beside: Array, image: ImageGeometry
) -> Callable[[Array], Box3D]:
    """Choose the arguments of `fit_box` for an object.

    Args:
        cloud: [n, 3] points of the object, camera frame.
        points_beside: [m, 3] points just outside the object's mask that touch the object.
        image: The geometry of the image. The object is taken to stand on its support, if any.

    Returns:
        `fit_box` with all arguments but the points.
    """
    up = None
    support = None
    if image.support_plane is not None:
        up = image.support_plane.up
        support = _find_support_height(cloud, points_beside, image.support_plane)
    # Pixels at the object's depth, in the unit of the points
    margin = MARGIN_PX * _compute_median_depth(cloud) / image.focal_px
    return partial(
        fit_box, up=up, support_height=support, margin=margin, relative_noise=image.noise
    )


def compute_planarity(points: Array) -> float:
    """How flat the seen points [n >= 3, 3] are: 1 for a square sheet, 0 for a line and for a ball.

    The planarity is (σ2 - σ3) / σ1, where σ1 ≥ σ2 ≥ σ3 are the standard deviations of the points
    along their principal axes.
    """
    eigenvalues = np.linalg.eigvalsh(np.cov(points.T))  # [3] variances, smallest first
    sigma3, sigma2, sigma1 = np.sqrt(np.maximum(eigenvalues, 0))
    return float((sigma2 - sigma3) / sigma1) if sigma1 > 0 else 0.0


def compute_stability(points: Array, box: Box3D, fit: Callable[[Array], Box3D]) -> float:
    """How little a box changes when it is fitted to only half of its points.

    The points are divided at random (with a fixed seed) into two halves, and a box is fitted to
    each half. The error of such a box is the mean distance of its vertices from those of `box`, up
    to the box's symmetries (`compute_vertex_error`). The stability is 1 minus the mean of both
    errors, as a fraction of half the diagonal of `box`, and at least 0.

    Args:
        points: [n >= 8, 3] the points to which `box` was fitted.
        box: The box of all points.
        fit: Fits a box to points [n, 3].
    """
    order = np.random.default_rng(0).permutation(len(points))
    middle = len(order) // 2
    errors = []
    for half in (order[:middle], order[middle:]):
        errors.append(compute_vertex_error(fit(points[half]).vertices, box.vertices))
    half_diagonal = 0.5 * float(np.linalg.norm(box.size))
    return max(0.0, 1.0 - float(np.mean(errors)) / half_diagonal)


def _compute_width_over_depth_extent(
    inside: Array, cloud: Array, box: Box3D, focal_px: float
) -> float:
    """How wide an object appears, divided by the extent of its box in depth; at most 1.

    The width is the diagonal of the mask's extent, at the distance of the object. If a mask leaks
    on to what is behind the object, the box becomes much deeper than the object appears wide.

    Args:
        inside: [h, w] bool, the object's mask.
        cloud: [n, 3] points of the object, camera frame.
        box: The object's box.
        focal_px: Focal length of the camera, in pixels.
    """
    height_px, width_px = np.ptp(np.argwhere(inside), axis=0)  # of the mask
    diagonal_px = float(np.hypot(height_px, width_px))
    width = _compute_median_depth(cloud) / focal_px * diagonal_px  # in the unit of the points
    depth = float(np.ptp(box.vertices[:, 2]))
    return min(1.0, width / max(depth, 1e-9))


def _compute_median_depth(cloud: Array) -> float:
    """The median depth of points [n, 3]."""
    return float(np.median(cloud[:, 2]))


def _collect_points(inside: Array, points: Array, erosion_px: int, noise: float) -> Array:
    """Collect clean points of an object.

    Up to half of them come from the outline of the mask, because the outline bounds the box.

    Args:
        inside: [h, w] bool, the object's pixels with known points.
        points: [h, w, 3] camera frame.
        erosion_px: How many layers of outermost pixels may have wrong depth.
        noise: Standard deviation of the depth, as a fraction of the depth.

    Returns:
        At most `MAX_POINTS` points [n, 3].
    """
    inner = erode_keeping_image_edge(inside, 1)
    outline_pixels = select_evenly_spread_points(np.argwhere(inside & ~inner), MAX_POINTS // 2)
    inner_pixels = select_evenly_spread_points(np.argwhere(inner), MAX_POINTS - len(outline_pixels))
    pixels = np.concatenate([outline_pixels, inner_pixels])
    cloud = denoise_points_at_pixels(inside, points, pixels, erosion_px, noise).astype(np.float64)
    return cloud[mark_inliers(cloud)]


class _Outline(NamedTuple):
    """What the outline of an object's mask tells.

    Attributes:
        visible_fraction: The score "visible" of `label_object`.
        edge_fraction: The score "edge" of `label_object`.
        points_beside: [n, 3] the points just outside the mask that touch the object, camera frame.
    """

    visible_fraction: float
    edge_fraction: float
    points_beside: Array


def _measure_outline(
    inside: Array, window: tuple[slice, slice], lit_part: Array, points: Array, is_known: Array
) -> _Outline:
    """Examine the outline of an object's mask in a window of the image.

    The outline consists of the borders between neighboring pixels of which only one is in the mask,
    and of the mask's pixels along the image's edge. The edge is the border of the lit part.

    Args:
        inside: [h, w] bool, the mask in the window.
        window: The rows and columns of the window in the image.
        lit_part: [[first row, last row], [first column, last column]] of the image's lit part.
        points: [h, w, 3] the window's points, camera frame.
        is_known: [h, w] bool, where the points are known.
    """
    # Restrict the window to the lit part, both in the window's own rows and columns.
    rows, columns = window
    lit_part = lit_part - [[rows.start], [columns.start]]
    lit_window = tuple(slice(max(first, 0), max(last + 1, 0)) for first, last in lit_part)
    # If no pixel of the mask is lit, the object itself is dark, so the dark rows are no black bar.
    if inside[lit_window].any():
        inside = inside[lit_window]
        points = points[lit_window]
        is_known = is_known[lit_window]
        lit_part = lit_part - [[side.start] for side in lit_window]

    # The outline between pixels. A point outside the mask that is nearer to the camera than its
    # neighbor in the mask occludes the object. If both points are close together, they touch.
    outline_length = 0
    num_occluded = 0
    touching_points = []
    lower = np.s_[1:]
    upper = np.s_[:-1]
    right = np.s_[:, 1:]
    left = np.s_[:, :-1]
    for inner, outer in ((lower, upper), (upper, lower), (right, left), (left, right)):
        is_border = inside[inner] & ~inside[outer]
        outline_length += int(np.count_nonzero(is_border))
        is_border &= is_known[inner] & is_known[outer]
        object_points = points[inner][is_border]  # [k, 3]
        outer_points = points[outer][is_border]  # [k, 3]
        touching_distance = TOUCHING_FRACTION * object_points[:, 2]
        is_in_front = outer_points[:, 2] < object_points[:, 2] - touching_distance
        num_occluded += int(np.count_nonzero(is_in_front))
        gap = outer_points - object_points
        squared_gap = np.einsum("ij,ij->i", gap, gap)
        touching_points.append(outer_points[squared_gap < touching_distance * touching_distance])

    # The outline along the image's edge: the mask's pixels in the first and last row and column
    num_cut = 0
    for axis, ends in enumerate(lit_part):
        line_lengths = np.count_nonzero(inside, axis=1 - axis)  # mask pixels per row (or column)
        ends_in_window = ends[(ends >= 0) & (ends < len(line_lengths))]
        num_cut += int(line_lengths[ends_in_window].sum())
    outline_length += num_cut
    return _Outline(
        visible_fraction=float(1.0 - (num_occluded + num_cut) / outline_length),
        edge_fraction=float(num_cut / outline_length),
        points_beside=np.concatenate(touching_points),
    )


def _find_support_height(cloud: Array, points_beside: Array, plane: Plane) -> float | None:
    """The height of the surface on which an object stands; None if no such surface is seen.

    The object stands on the points that touch it and are lower than nearly all of its own points.
    They belong to the table, or to the plate on which the object lies. If there are too few such
    points, the object's lower part is hidden. The object is then taken to stand on the support
    plane, unless its visible points are too far above the plane. They may be as far above it as
    nearly the object's visible height, because the underside of a ball is not seen. If the camera
    looks down steeply, it does not see the object's sides, so the points may also be as far above
    the plane as the object is wide. Our choice.

    Args:
        cloud: [n, 3] points of the object, camera frame.
        points_beside: [m, 3] points beside the object that touch it.
        plane: The support plane of the image.
    """
    heights = cloud @ plane.up
    # The lowest point, without outliers, and the top
    low, high = np.quantile(heights, (0.05, 1.0))
    touching_distance = TOUCHING_FRACTION * _compute_median_depth(cloud)

    # Points that touch the object in the lowest part of its visible height, and are clearly below
    # its top, however flat it is
    heights_beside = points_beside @ plane.up
    visible_height = high - low
    max_contact_height = min(
        low + MAX_CONTACT_HEIGHT_FRACTION * visible_height,
        high - MIN_GAP_TO_TOP_FRACTION * touching_distance,
    )
    contact_heights = heights_beside[heights_beside < max_contact_height]
    if len(contact_heights) >= MIN_CONTACT_POINTS:
        # If enough of them are on the support plane, so is the object. Otherwise it is on a plate,
        # or on another object.
        max_plane_distance = 0.25 * touching_distance  # our choice
        is_on_plane = np.abs(contact_heights - plane.height) < max_plane_distance
        if np.mean(is_on_plane) > MIN_ON_PLANE_FRACTION:
            return plane.height
        return float(np.median(contact_heights))

    # The lower part is hidden: compare how far the visible points are above the plane with the
    # object's visible height and, as far as the camera looks down, with its width.
    middle = cloud.mean(axis=0)
    steepness = float(middle @ plane.up) ** 2 / float(middle @ middle)  # 0 level, 1 straight down
    level_cloud = cloud - heights[:, None] * plane.up  # [n, 3] projected on to the plane
    # Of the three variances along principal axes, the smallest is that along `up`, nearly 0. The
    # middle one belongs to the shorter level side. A uniform distribution over a side has 1/12 of
    # the squared side as its variance.
    variance = np.linalg.eigvalsh(np.cov(level_cloud.T))[1]
    width = WIDTH_MARGIN * float(np.sqrt(max(12 * variance, 0)))
    hidden_height = low - plane.height
    max_hidden_height = max(MAX_HIDDEN_HEIGHT_FRACTION * visible_height, steepness * width)
    return plane.height if hidden_height < max_hidden_height else None
