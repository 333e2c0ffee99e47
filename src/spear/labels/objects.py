"""One object, from its mask and the image's point map to a `LabeledObject` with a box and quality scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear.labels import rle
from spear.labels.box3d import Mode, fit_box, keypoints
from spear.labels.points import Plane, erode, inliers, subsample
from spear.labels.protocols import Detection, PointMapResult
from spear.types import Array, LabeledObject

NEAR = 0.02
"""Two points of neighbouring pixels belong to touching surfaces when they are nearer to each other than this
fraction of their distance from the camera (our choice)."""


@dataclass(frozen=True)
class BoxSettings:
    """How boxes are fitted (all our choice; the paper says only "outlier removal, oriented box").

    mode         see `box3d.fit_box`.
    erosion      pixels taken off the border of a mask before its points are used, where estimated depth
                 smears over the outline ("flying pixels"); the box is widened by as much again. 0 for exact
                 depth.
    min_points   objects with fewer clean points (or fewer than 4) get no box.
    max_points   points kept per object.
    deviations   outlier threshold, see `points.inliers`.
    """

    mode: Mode = "auto"
    erosion: int = 0
    min_points: int = 12
    max_points: int = 400
    deviations: float = 3.0


def label_object(
    detection: Detection, mask: Array, pointmap: PointMapResult, plane: Plane | None, settings: BoxSettings
) -> LabeledObject | None:
    """Lift one detection to 3D.

    Args:
        detection: name, 2D box and score.
        mask: [h, w] bool, its pixels.
        pointmap: of the whole image.
        plane: the support plane of the image, None when none was found.

    Returns:
        The object, with `box3d` None and no keypoints when too few points are left; None for an empty mask.
        Its scores: "detection"; "points", used for the box; "visible", the fraction of its outline that is
        its own, neither cut by the image's edge nor by something in front; "edge", the fraction cut by the
        edge.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    window = (slice(max(rows[0] - 1, 0), rows[-1] + 2), slice(max(columns[0] - 1, 0), columns[-1] + 2))
    inside, points, known = mask[window], pointmap.points[window], pointmap.mask[window]
    visible, edge, beside = _outline(mask, window, points, known)
    cloud = subsample(points[erode(inside, settings.erosion) & known], settings.max_points)
    cloud = cloud[inliers(cloud, deviations=settings.deviations)].astype(np.float64)
    scores = {"detection": detection.score, "points": float(len(cloud)), "visible": visible, "edge": edge}
    box, points3d = None, {}
    if len(cloud) >= max(settings.min_points, 4):
        distance = float(np.median(cloud[:, 2]))
        margin = (0.5 + settings.erosion) * distance / float(pointmap.intrinsics[0, 0])
        up, support = (None, None) if plane is None else (plane.up, _support(cloud, beside, plane))
        box = fit_box(cloud, up, support, settings.mode, margin)
        points3d = keypoints(cloud, box)
    return LabeledObject(
        name=detection.name,
        box2d=np.asarray(detection.box2d, np.float32),
        mask=rle.encode(mask),
        box3d=box,
        keypoints=points3d,
        scores=scores,
    )


def _outline(
    mask: Array, window: tuple[slice, slice], points: Array, known: Array
) -> tuple[float, float, Array]:
    """Walk along the outline of a mask.

    Returns:
        "visible" and "edge" as in `label_object`; the points [n, 3] just outside the outline that touch the
        object.
    """
    inside = mask[window]
    total = occluded = 0
    beside = []
    for axis in (0, 1):
        ahead = tuple(slice(1, None) if i == axis else slice(None) for i in (0, 1))
        behind = tuple(slice(None, -1) if i == axis else slice(None) for i in (0, 1))
        for here, there in ((ahead, behind), (behind, ahead)):
            border = inside[here] & ~inside[there]
            total += int(np.count_nonzero(border))
            border &= known[here] & known[there]
            p, q = points[here][border], points[there][border]
            limit = NEAR * p[:, 2]
            occluded += int(np.count_nonzero(q[:, 2] < p[:, 2] - limit))
            gap = q - p
            touching = np.einsum("ij,ij->i", gap, gap) < limit * limit
            beside.append(q[touching])
    cut = sum(int(np.count_nonzero(side)) for side in (mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    total += cut
    return 1.0 - (occluded + cut) / total, cut / total, np.concatenate(beside)


def _support(cloud: Array, beside: Array, plane: Plane) -> float | None:
    """The height of the surface under an object, None when it seems to rest on nothing that is seen.

    The object stands where it touches points that are lower than nearly all of its own: the table, or the
    plate that it lies on. One whose lower part is hidden is taken to stand on the support plane unless it
    seems to hover: by nearly its visible height (the underside of a ball is not seen) or, seen from above,
    where sides are hidden, by more than its width. Our choice.
    """
    heights = cloud @ plane.up
    low, high = np.quantile(heights, (0.05, 1.0))
    reach = NEAR * float(np.median(cloud[:, 2]))
    contact = beside @ plane.up
    contact = contact[contact < min(low + 0.25 * (high - low), high - 0.1 * reach)]
    if len(contact) >= 3:
        on_plane = np.mean(np.abs(contact - plane.height) < 0.25 * reach)
        return plane.height if on_plane > 0.2 else float(np.median(contact))
    middle = cloud.mean(axis=0)
    steepness = float(middle @ plane.up) ** 2 / float(middle @ middle)
    level = cloud - heights[:, None] * plane.up
    width = 1.25 * float(np.sqrt(12 * np.linalg.eigvalsh(np.cov(level.T))[1]))
    return plane.height if low - plane.height < max(0.8 * (high - low), steepness * width) else None
