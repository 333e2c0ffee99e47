"""One object, from its mask and the image's point map to a `LabeledObject` with a box and
scores."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from spear.labels.fit.box3d import find_keypoints, fit_box
from spear.labels.fit.image import compute_iou_2d, compute_tight_box
from spear.labels.fit.masks import (
    clean_points,
    encode_mask,
    erode,
    keep_main_part,
    remove_support,
    snap_outline,
)
from spear.labels.fit.points import TOUCHING_FRACTION, Plane, find_inliers, subsample
from spear.labels.fit.quality import compute_planarity, compute_stability
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Box3D, LabeledObject

MARGIN_PX = 0.3
"""An object is taken to reach this far beyond the centers of its outermost pixels: less than half a
pixel, since the outermost of many is near the edge. Our choice, measured."""
MIN_POINTS = 12  # clean points; an object with fewer gets no box
MAX_POINTS = 600  # clean points per object, up to half of them from its outline
LINKED_DEPTH_FRACTION = 0.04
"""Pixels of a mask belong together when their depths differ by less than this fraction (our
choice)."""
MASK_ERROR_FRACTION = 1 / 256
"""Estimated masks and depth are taken to be off by this fraction of the image's longer side, at
least by a pixel. (Our choice; the paper says only "outlier removal, oriented box".)"""
MASK_END_FRACTION = 0.01
"""Estimated masks may end this fraction of the image's longer side before the image does (our
choice)."""


@dataclass(frozen=True)
class ImageGeometry:
    """What is known of a whole image when its objects are lifted to 3D.

    Attributes:
        point_map: The image's points.
        support_plane: What its objects stand on; None when no such plane was found.
        is_exact: Whether masks and depth are ground truth. Estimated depth smears over the outlines
            of objects. So `masks.snap_outline` decides by the 3D points which pixels near an
            outline belong to an object. `masks.clean_points` gives flying pixels the
            depth of pixels further inside the object.
        occupied: [h, w] bool, the pixels of all objects.
        noise: Standard deviation of the depth, as a fraction of the depth
            (`points.estimate_noise`).
        lit_part: [[first row, last row], [first column, last column]] of the part that is in no
            black bar (`image.find_lit_part`).
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
    """Lift one detection to 3D.

    Args:
        detection: Name and 2D box.
        mask: [h, w] bool, the object's pixels.
        image: The image that it is in.

    Returns:
        The object. When its mask is empty or too few points remain, the object has no box and no
        keypoints; it is still returned so that its name stays ambiguous where another object has
        the same name. Its scores are:

        - "detection", of the detector;
        - "points", the number of points to which the box is fitted;
        - "visible", the fraction of its outline that is its own, cut neither by the image's edge
          nor by something in front;
        - "edge", the fraction of its outline that the image's edge cuts;
        - "known", the fraction of its pixels with depth;
        - "whole", the IoU of the detected 2D box and the mask's;
        - with a box, "planarity" and "stability" (see `quality`), and "compact": the
          diagonal of the object as seen in the image (converted to m at its median depth), divided
          by the box's extent in depth (m), at most 1.
    """
    tight_box = compute_tight_box(mask)
    box2d = np.asarray(detection.box2d, np.float32)
    if not mask.any():
        scores = {"detection": detection.score, "points": 0.0, "visible": 0.0}
        return LabeledObject(detection.name, box2d, encode_mask(mask), None, {}, scores)

    # How far the outline of a mask may be off (`error_px`), and how far before the image's edge the
    # mask of an object that the edge cuts may end (`end_px`). Exact masks have neither error.
    longer_side = max(mask.shape)
    error_px = 0 if image.is_exact else round(max(1.0, longer_side * MASK_ERROR_FRACTION))
    end_px = max(error_px, round(MASK_END_FRACTION * longer_side)) if error_px else 0
    # The window is the part of the image that concerns the object: the box around its mask, and
    # `room` more pixels on each side, at least one.
    x0, y0, x1, y1 = tight_box.astype(int).tolist()
    room = 1
    if error_px:
        room += error_px + 4  # `snap_outline` looks at the support beside the object
    window = (slice(max(y0 - room, 0), y1 + room), slice(max(x0 - room, 0), x1 + room))

    # The object's pixels, outline and clean points
    points = image.point_map.points[window]
    is_known = image.point_map.mask[window]
    inside = mask[window]
    if error_px:
        inside = _correct_mask(inside, points, is_known, image, window, error_px)
    lit_part = image.lit_part + np.array([end_px, -end_px])
    visible, edge, points_beside = _trace_outline(inside, window, lit_part, points, is_known)
    cloud = _collect_points(inside & is_known, points, error_px, image.noise)

    scores = {
        "detection": detection.score,
        "points": float(len(cloud)),
        "visible": visible,
        "edge": edge,
        "known": float(image.point_map.mask[mask].mean()),
        "whole": float(compute_iou_2d(box2d, tight_box)),
    }
    if len(cloud) < MIN_POINTS:
        return LabeledObject(detection.name, box2d, encode_mask(mask), None, {}, scores)

    # The box
    fit = _choose_fit(cloud, points_beside, image)
    box = fit(cloud)
    scores["planarity"] = compute_planarity(cloud)
    scores["stability"] = compute_stability(cloud, box, fit)
    scores["compact"] = _compute_compactness(inside, cloud, box, image.focal_px)
    keypoints = find_keypoints(cloud, box)
    return LabeledObject(detection.name, box2d, encode_mask(mask), box, keypoints, scores)


def _correct_mask(
    inside: Array,
    points: Array,
    is_known: Array,
    image: ImageGeometry,
    window: tuple[slice, slice],
    error_px: int,
) -> Array:
    """Correct an estimated mask [h, w], given in a window of the image, by where its pixels are in
    3D."""
    occupied = image.occupied[window] & ~inside
    link_limit = max(LINKED_DEPTH_FRACTION, 12.0 / image.focal_px, 4 * image.noise)
    inside = keep_main_part(inside, points, is_known, link_limit)
    plane = image.support_plane
    if plane is not None:
        inside = remove_support(inside, points, is_known, occupied, plane, image.noise)
    snapped = snap_outline(inside, points, is_known, occupied, plane, error_px, image.noise)
    return snapped if snapped.any() else inside


def _choose_fit(
    cloud: Array, points_beside: Array, image: ImageGeometry
) -> Callable[[Array], Box3D]:
    """How to fit a box to the points of an object, which stands on the support where there is
    one."""
    up = None
    support = None
    if image.support_plane is not None:
        up = image.support_plane.up
        support = _find_support_height(cloud, points_beside, image.support_plane)
    margin = MARGIN_PX * _compute_distance(cloud) / image.focal_px
    return partial(fit_box, up=up, support=support, margin=margin, noise=image.noise)


def _compute_compactness(inside: Array, cloud: Array, box: Box3D, focal_px: float) -> float:
    """How wide an object is seen, as a fraction of how far its box goes into the depth, at most 1.

    A mask that leaks on to what is behind makes a box much deeper than it is seen wide.
    """
    diagonal_px = float(np.hypot(*np.ptp(np.argwhere(inside), axis=0)))
    width = _compute_distance(cloud) / focal_px * diagonal_px
    depth = float(np.ptp(box.vertices[:, 2]))
    return min(1.0, width / max(depth, 1e-9))


def _compute_distance(cloud: Array) -> float:
    return float(np.median(cloud[:, 2]))


def _collect_points(inside: Array, points: Array, erosion_px: int, noise: float) -> Array:
    """At most `MAX_POINTS` clean points [n, 3] of a mask [h, w], out of the image's [h, w, 3].

    Up to half come from its outline, which bounds the box.
    """
    inner = erode(inside, 1)
    outline_pixels = subsample(np.argwhere(inside & ~inner), MAX_POINTS // 2)
    inner_pixels = subsample(np.argwhere(inner), MAX_POINTS - len(outline_pixels))
    pixels = np.concatenate([outline_pixels, inner_pixels])
    cloud = clean_points(inside, points, pixels, erosion_px, noise).astype(np.float64)
    return cloud[find_inliers(cloud)]


def _trace_outline(
    inside: Array, window: tuple[slice, slice], lit_part: Array, points: Array, is_known: Array
) -> tuple[float, float, Array]:
    """Examine the outline of a mask, given in a window of an image.

    Args:
        inside: [h, w] bool, the mask.
        window: Where in the image it is.
        lit_part: [2, 2] the ends of the image's rows and columns.
        points: [h, w, 3] camera frame.
        is_known: [h, w] bool, where the points are known.

    Returns:
        The scores "visible" and "edge" of `label_object`, and the points [n, 3] just outside the
        mask that touch the object.
    """
    lit_part = lit_part - [[side.start] for side in window]
    lit_window = tuple(slice(max(low, 0), max(high + 1, 0)) for low, high in lit_part)
    if inside[lit_window].any():  # otherwise all of it is in the dark, which is no black bar then
        inside = inside[lit_window]
        points = points[lit_window]
        is_known = is_known[lit_window]
        lit_part = lit_part - [[side.start] for side in lit_window]

    # The outline between pixels: what is nearer beside the object occludes it, what is as near
    # touches it
    length = 0
    num_occluded = 0
    touching = []
    for later, earlier in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        for inner, outer in ((later, earlier), (earlier, later)):
            border = inside[inner] & ~inside[outer]
            length += int(np.count_nonzero(border))
            border &= is_known[inner] & is_known[outer]
            object_points = points[inner][border]
            outer_points = points[outer][border]
            limit = TOUCHING_FRACTION * object_points[:, 2]
            is_in_front = outer_points[:, 2] < object_points[:, 2] - limit
            num_occluded += int(np.count_nonzero(is_in_front))
            gap = outer_points - object_points
            touching.append(outer_points[np.einsum("ij,ij->i", gap, gap) < limit * limit])

    # The outline along the image's edge
    num_cut = 0
    for axis, ends in enumerate(lit_part):
        line_lengths = np.count_nonzero(inside, axis=1 - axis)
        ends_here = ends[(ends >= 0) & (ends < len(line_lengths))]
        num_cut += int(line_lengths[ends_here].sum())
    length += num_cut
    visible = float(1.0 - (num_occluded + num_cut) / length)
    return visible, float(num_cut / length), np.concatenate(touching)


def _find_support_height(cloud: Array, beside: Array, plane: Plane) -> float | None:
    """The height of the surface under an object; None when it seems to rest on nothing that is
    seen.

    The object stands where it touches points that are lower than nearly all of its own: the table,
    or the plate on which it lies. If its lower part is hidden, it is taken to stand on the support
    plane unless it seems to hover: by nearly its visible height (the underside of a ball is not
    seen) or, seen from above, where sides are hidden, by more than its width. Our choice.

    Args:
        cloud: [n, 3] points of the object.
        beside: [m, 3] points beside it that touch it.
        plane: The support plane of the image.
    """
    heights = cloud @ plane.up
    low, high = np.quantile(heights, (0.05, 1.0))
    touching_distance = TOUCHING_FRACTION * _compute_distance(cloud)

    contact = beside @ plane.up
    contact = contact[contact < min(low + 0.25 * (high - low), high - 0.1 * touching_distance)]
    if len(contact) >= 3:
        is_on_plane = np.abs(contact - plane.height) < 0.25 * touching_distance
        return plane.height if np.mean(is_on_plane) > 0.2 else float(np.median(contact))

    middle = cloud.mean(axis=0)
    steepness = float(middle @ plane.up) ** 2 / float(middle @ middle)
    level = cloud - heights[:, None] * plane.up
    variance = np.linalg.eigvalsh(np.cov(level.T))[1]
    width = 1.25 * float(np.sqrt(max(12 * variance, 0)))  # 12: of a uniform distribution
    stands = low - plane.height < max(0.8 * (high - low), steepness * width)
    return plane.height if stands else None
