"""How good labels of objects are: their scores, the one rule that says which objects are asked about, and
their errors against true boxes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import compute_iou_3d, compute_vertex_error, make_box_from_vertices
from spear.labels.fit.masks import decode_mask
from spear.types import Array, Box3D, Frame, LabeledImage, LabeledObject

MIN_VISIBLE = 0.7
"""3D questions ask about objects of whose outline at least this fraction is their own. Below it, the median
error of the centre is three times that of the others (our choice, from benchmarks/labels/accuracy.py)."""
MAX_EDGE = 0.05
"""… of whose outline at most this fraction is cut by the image's edge: how far it goes on is not known."""
MIN_SCORES = {
    "visible": MIN_VISIBLE,
    "points": 30.0,
    "known": 0.8,
    "whole": 0.5,
    "stability": 0.6,
    "compact": 0.4,
}
"""… whose scores are at least these (our choice). The others stay in the labels, with their scores."""


def find_failed_scores(scores: Mapping[str, float]) -> tuple[str, ...]:
    """The scores for which an object is not asked about, by name; a score that it does not have is none."""
    low = tuple(name for name, limit in MIN_SCORES.items() if scores.get(name, limit) < limit)
    return (*low, "edge") if scores.get("edge", 0.0) > MAX_EDGE else low


def compute_planarity(points: Array) -> float:
    """How flat the seen points [n >= 3, 3] are: (σ2 - σ3) / σ1 of their standard deviations along their
    principal axes, largest first. 1 for a square sheet, 0 for a line and for a ball."""
    third, second, first = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(points.T)), 0))
    return float((second - third) / first) if first > 0 else 0.0


def compute_stability(points: Array, box: Box3D, fit: Callable[[Array], Box3D]) -> float:
    """How little the `box` of points [n >= 8, 3] changes when it is fitted to one half of them, or the other.

    1 minus the vertices' mean distance (up to the box's symmetries) from those of `box`, as a fraction of
    half its diagonal; not below 0. The halves are drawn at random, from a fixed seed.
    """
    order = np.random.default_rng(0).permutation(len(points))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    moved = np.mean(
        [compute_vertex_error(fit(points[half]).vertices, box.vertices) for half in halves]
    )
    return max(0.0, 1.0 - float(moved) / (0.5 * float(np.linalg.norm(box.size))))


@dataclass(frozen=True)
class BoxAccuracy:
    """Medians over n boxes of what `box_errors` says; missed: true boxes of visible objects without one."""

    n: int
    center: float
    vertex: float
    iou: float
    missed: int


def find_instance(o: LabeledObject, label: LabeledImage, frame: Frame) -> int:
    """The instance of a frame that the object's mask covers most; 0 when it covers none."""
    assert frame.instances is not None
    covered = frame.instances[decode_mask(o.mask, label.height, label.width)]
    return int(np.bincount(covered[covered > 0], minlength=1).argmax())


def compute_box_errors(box: Box3D, true: Box3D) -> tuple[float, float, float]:
    """Distance of the centres, mean distance of the vertices up to the box's symmetries, 3D IoU."""
    center = float(np.linalg.norm(box.center - true.center))
    return center, compute_vertex_error(box.vertices, true.vertices), compute_iou_3d(box, true)


def compare_labels(
    labels: Iterable[LabeledImage], frames: Iterable[Frame], min_visible: float = 0.0
) -> BoxAccuracy:
    """Median errors of labels against the frames they were made from (pairwise, in order): of every labelled
    box against the true box of the instance that its mask covers most.

    min_visible leaves out objects whose "visible" score is lower, as questions do below `VISIBLE`. Raises
    `SpearError`: a frame without instance map or true boxes, or nothing to compare.
    """
    rows: list[tuple[float, ...]] = []
    missed = 0
    for label, frame in zip(labels, frames, strict=True):
        if frame.instances is None or frame.boxes is None:
            raise SpearError(
                f"{frame.source or 'frame'}: no instances or boxes: give frames that have both"
            )
        found: dict[int, tuple[float, tuple[float, ...]]] = {}
        for o in label.objects:
            instance = find_instance(o, label, frame)
            if o.box3d is not None and instance in frame.boxes:
                errors = compute_box_errors(o.box3d, make_box_from_vertices(frame.boxes[instance]))
                found[instance] = o.scores.get("visible", 1.0), errors
        rows += [errors for visible, errors in found.values() if visible >= min_visible]
        missed += len((set(np.unique(frame.instances).tolist()) & set(frame.boxes)) - set(found))
    if not rows:
        raise SpearError(
            "accuracy: no labelled box has a true box: give frames with instances and boxes"
        )
    center, vertex, overlap = np.median(rows, axis=0).tolist()
    return BoxAccuracy(len(rows), center, vertex, overlap, missed)
