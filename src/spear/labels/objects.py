"""One object, from its mask and the image's point map to a `LabeledObject` with a box and quality scores."""

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
from spear.types import Array, LabeledObject

MARGIN_PX = 0.3
"""Pixels that an object is taken to reach beyond the centres of its outermost ones: less than half of one,
since the outermost of many is near the edge. Our choice, measured."""
MIN_POINTS, MAX_POINTS = 12, 600
"""Objects with fewer clean points get no box; so many are kept of each, up to half from its outline."""
LINKED = 0.04
"""Pixels of a mask belong together when their depths differ by less than this fraction (our choice)."""
EDGE, NEAR_EDGE = 256, 0.01
"""Estimated masks and depth are taken to be off by one pixel, of an image whose longer side is so long; in
larger ones by more in proportion. And masks may end so much of that side before the image does. (Our choice;
the paper says only "outlier removal, oriented box".)"""


def label_object(
    detection: Detection,
    mask: Array,
    pointmap: PointMapResult,
    plane: Plane | None,
    exact: bool,
    taken: Array,
    noise: float,
    lit: Array,
) -> LabeledObject:
    """Lift one detection to 3D.

    mask   [h, w] bool, its pixels; taken: [h, w] bool, those of all objects; pointmap: of the whole image.
    plane  the support plane of the image, None when none was found.
    exact  whether mask and depth are true. Otherwise pixels near the outline are decided anew by where they
           are in 3D (`masks.snap`), and those that fly take their depth from further inside, since estimated
           depth smears over the outline (`masks.clean_points`).
    noise  of the depth, see `points.noise_level`; lit: the image's edges, as `image.lit_part`.

    Returns the object; without box and keypoints when too few points are left or its mask is empty: others of
    its name are not alone. Its scores: "detection"; "points", used for the box; "visible", the fraction of
    its outline that is its own, neither cut by the image's edge nor by something in front; "edge", the
    fraction cut by the edge; "known", the fraction of its pixels with depth; "whole", the IoU of the detected
    2D box and the mask's. With a box also: "planarity" and "stability", see `quality`; and "compact", how
    wide it is seen, as a fraction of how far the box goes into the depth, at most 1.
    """
    x0, y0, x1, y1 = compute_tight_box(mask).astype(int).tolist()
    box2d = np.asarray(detection.box2d, np.float32)
    if x1 == 0:
        scores = {"detection": detection.score, "points": 0.0, "visible": 0.0}
        return LabeledObject(detection.name, box2d, encode_mask(mask), None, {}, scores)
    band = 0 if exact else round(max(1.0, max(mask.shape) / EDGE))
    room = 1 + (band and band + 4)  # `snap` looks at the support beside the object
    window = slice(max(y0 - room, 0), y1 + room), slice(max(x0 - room, 0), x1 + room)
    inside, points, known = mask[window], pointmap.points[window], pointmap.mask[window]
    focal = float(pointmap.intrinsics[0, 0])
    if band:
        others = taken[window] & ~inside
        inside = keep_main_part(inside, points, known, max(LINKED, 12.0 / focal, 4 * noise))
        if plane is not None:
            inside = remove_support(inside, points, known, others, plane, noise)
        snapped = snap_outline(inside, points, known, others, plane, band, noise)
        inside = snapped if snapped.any() else inside
    near = band and max(
        band, round(NEAR_EDGE * max(mask.shape))
    )  # outlines end a little before the image
    visible, edge, beside = _outline(inside, window, lit + np.array([near, -near]), points, known)
    cloud = _cloud(inside & known, points, band, noise)
    scores = {
        "detection": detection.score,
        "points": float(len(cloud)),
        "visible": visible,
        "edge": edge,
    }
    scores |= {
        "known": float(pointmap.mask[mask].mean()),
        "whole": float(compute_iou_2d(box2d, compute_tight_box(mask))),
    }
    box, points3d = None, {}
    if len(cloud) >= MIN_POINTS:
        distance = float(np.median(cloud[:, 2]))
        up, support = (None, None) if plane is None else (plane.up, _support(cloud, beside, plane))
        fit = partial(
            fit_box, up=up, support=support, margin=MARGIN_PX * distance / focal, noise=noise
        )
        box = fit(cloud)
        points3d = find_keypoints(cloud, box)
        scores |= {
            "planarity": compute_planarity(cloud),
            "stability": compute_stability(cloud, box, fit),
        }
        # A mask that leaks on to what is behind makes a box much deeper than it is seen wide.
        width = distance / focal * float(np.hypot(*np.ptp(np.argwhere(inside), axis=0)))
        scores["compact"] = min(1.0, width / max(float(np.ptp(box.vertices[:, 2])), 1e-9))
    return LabeledObject(detection.name, box2d, encode_mask(mask), box, points3d, scores)


def _cloud(inside: Array, points: Array, erosion: int, noise: float) -> Array:
    """At most `MOST_POINTS` clean points [n, 3] of a mask [h, w], out of the image's [h, w, 3]. Its outline,
    which bounds the box, is kept more densely."""
    inner = erode(inside, 1)
    outline = subsample(np.argwhere(inside & ~inner), MAX_POINTS // 2)
    pixels = np.concatenate([outline, subsample(np.argwhere(inner), MAX_POINTS - len(outline))])
    cloud = clean_points(inside, points, pixels, erosion, noise).astype(np.float64)
    return cloud[find_inliers(cloud)]


def _outline(
    inside: Array, window: tuple[slice, slice], lit: Array, points: Array, known: Array
) -> tuple[float, float, Array]:
    """Walk along the outline of a mask, given in a window of an image with the edges `lit`.

    Returns "visible" and "edge" as in `label_object`; the points [n, 3] just outside that touch the object.
    """
    lit = lit - [[side.start] for side in window]
    shown = tuple(slice(max(low, 0), max(high + 1, 0)) for low, high in lit)
    if inside[shown].any():  # else all of it lies in the dark, which is no bar then
        inside, points, known = inside[shown], points[shown], known[shown]
        lit = lit - [[side.start] for side in shown]
    total = occluded = 0
    beside = []
    for ahead, behind in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        for here, there in ((ahead, behind), (behind, ahead)):
            border = inside[here] & ~inside[there]
            total += int(np.count_nonzero(border))
            border &= known[here] & known[there]
            p, q = points[here][border], points[there][border]
            limit = TOUCHING_FRACTION * p[:, 2]
            occluded += int(np.count_nonzero(q[:, 2] < p[:, 2] - limit))
            gap = q - p
            beside.append(q[np.einsum("ij,ij->i", gap, gap) < limit * limit])
    cut = 0
    for axis, ends in enumerate(lit):
        lines = np.count_nonzero(inside, axis=1 - axis)
        cut += int(lines[ends[(ends >= 0) & (ends < len(lines))]].sum())
    total += cut
    return float(1.0 - (occluded + cut) / total), float(cut / total), np.concatenate(beside)


def _support(cloud: Array, beside: Array, plane: Plane) -> float | None:
    """The height of the surface under an object, None when it seems to rest on nothing that is seen.

    The object stands where it touches points that are lower than nearly all of its own: the table, or the
    plate that it lies on. One whose lower part is hidden is taken to stand on the support plane unless it
    seems to hover: by nearly its visible height (the underside of a ball is not seen) or, seen from above,
    where sides are hidden, by more than its width. Our choice.
    """
    heights = cloud @ plane.up
    low, high = np.quantile(heights, (0.05, 1.0))
    reach = TOUCHING_FRACTION * float(np.median(cloud[:, 2]))
    contact = beside @ plane.up
    contact = contact[contact < min(low + 0.25 * (high - low), high - 0.1 * reach)]
    if len(contact) >= 3:
        on_plane = np.mean(np.abs(contact - plane.height) < 0.25 * reach)
        return plane.height if on_plane > 0.2 else float(np.median(contact))
    middle = cloud.mean(axis=0)
    steepness = float(middle @ plane.up) ** 2 / float(middle @ middle)
    level = cloud - heights[:, None] * plane.up
    width = 1.25 * float(np.sqrt(max(12 * np.linalg.eigvalsh(np.cov(level.T))[1], 0)))
    return plane.height if low - plane.height < max(0.8 * (high - low), steepness * width) else None
