"""How good labeled objects are: their scores, the rule by which scores decide whether questions may
be about an object, and the errors of labeled boxes compared with true boxes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import compute_iou_3d, compute_vertex_error, make_box_from_vertices
from spear.labels.fit.masks import decode_mask
from spear.types import Array, Box3D, Frame, LabeledImage, LabeledObject

MIN_VISIBLE = 0.7
"""3D questions are about objects whose "visible" score is at least this: the fraction of the
object's outline at which neither the image's edge nor something in front cuts it off. For objects
with a lower score, the median error of the box's center is three times as large (our choice,
measured by benchmarks/labels/accuracy.py)."""
MAX_EDGE = 0.05
"""3D questions are about objects whose "edge" score is at most this: the fraction of the object's
outline that the image's edge cuts off. How far such an object continues outside the image is not
known."""
MIN_SCORES = {
    "visible": MIN_VISIBLE,
    "points": 30.0,  # number (not a fraction) of points to which the box is fitted
    "known": 0.8,  # fraction of the object's pixels that have depth
    "whole": 0.5,  # IoU of the detected 2D box and the tight box around the mask
    "stability": 0.6,  # how little the box changes with its points, see `compute_stability`
    "compact": 0.4,  # how wide the object is seen, as a fraction of the box's extent in depth
}
"""Name → lowest score of objects that 3D questions may be about (our choice). Objects with lower
scores stay in the labels, with their scores."""


def find_failed_scores(scores: Mapping[str, float]) -> tuple[str, ...]:
    """The names of the scores that exclude an object from questions.

    A missing score excludes nothing.
    """
    failed_scores = [name for name, limit in MIN_SCORES.items() if scores.get(name, limit) < limit]
    if scores.get("edge", 0.0) > MAX_EDGE:
        failed_scores.append("edge")
    return tuple(failed_scores)


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


@dataclass(frozen=True)
class BoxAccuracy:
    """Median errors of n labeled boxes (see `compute_box_errors`), and the number of missing boxes.

    Attributes:
        n: How many labeled boxes were compared with a true box.
        center: Median distance between the centers of labeled and true box, in the labels' unit.
        vertex: Median over boxes of the mean distance between their vertices, in the labels' unit.
        iou: Median 3D intersection over union.
        missed: How many true boxes of visible objects have no labeled box.
    """

    n: int
    center: float
    vertex: float
    iou: float
    missed: int


def find_instance(o: LabeledObject, label: LabeledImage, frame: Frame) -> int:
    """The instance of a frame that the mask of an object covers most; 0 if the mask covers none.

    Args:
        o: The object.
        label: The label of the frame, which contains the object.
        frame: The frame, with its instance map.
    """
    assert frame.instances is not None
    mask = decode_mask(o.mask_runs, label.height, label.width)
    covered = frame.instances[mask]  # [n] instance ids, 0 for background
    return int(np.bincount(covered[covered > 0], minlength=1).argmax())


def compute_box_errors(box: Box3D, true_box: Box3D) -> tuple[float, float, float]:
    """The errors of a labeled box.

    Returns:
        The distance between the centers, the mean distance between the vertices (up to the box's
        symmetries), and the 3D IoU.
    """
    center_error = float(np.linalg.norm(box.center - true_box.center))
    vertex_error = compute_vertex_error(box.vertices, true_box.vertices)
    return center_error, vertex_error, compute_iou_3d(box, true_box)


def compare_labels(
    labels: Iterable[LabeledImage], frames: Iterable[Frame], min_visible: float = 0.0
) -> BoxAccuracy:
    """Compare labels with the ground truth of the frames that were labeled.

    Every labeled box is compared with the true box of the instance that the object's mask covers
    most.

    Args:
        labels: The labels.
        frames: The labeled frames with ground truth, in the order of `labels`.
        min_visible: Boxes of objects with a lower "visible" score do not count in the medians.

    Returns:
        The median errors.

    Raises:
        SpearError: A frame has no instance map or no true boxes, or there is nothing to compare.
    """
    errors: list[tuple[float, ...]] = []
    num_missed = 0
    for label, frame in zip(labels, frames, strict=True):
        if frame.instances is None or frame.boxes is None:
            name = frame.source or "frame"
            raise SpearError(f"{name} has no instances or no boxes. Give frames that have both.")
        matched_instances: set[int] = set()
        errors_by_instance: dict[int, tuple[float, ...]] = {}
        for o in label.objects:
            instance = find_instance(o, label, frame)
            if o.box3d is None or instance not in frame.boxes:
                continue
            matched_instances.add(instance)
            true_box = make_box_from_vertices(frame.boxes[instance])
            # If two labeled boxes belong to one instance, the last box counts.
            errors_by_instance.pop(instance, None)
            if o.scores.get("visible", 1.0) >= min_visible:
                errors_by_instance[instance] = compute_box_errors(o.box3d, true_box)
        errors += errors_by_instance.values()
        visible_instances = set(np.unique(frame.instances).tolist()) & set(frame.boxes)
        num_missed += len(visible_instances - matched_instances)

    if not errors:
        raise SpearError("No labeled box has a true box. Give frames with instances and boxes.")
    center, vertex, overlap = np.median(errors, axis=0).tolist()
    return BoxAccuracy(len(errors), center, vertex, overlap, num_missed)
