"""How good labels of objects are: their scores, the one rule that decides which objects questions
may be about, and their errors against true boxes."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import compute_iou_3d, compute_vertex_error, make_box_from_vertices
from spear.labels.fit.masks import decode_mask
from spear.types import Array, Box3D, Frame, LabeledImage, LabeledObject

MIN_VISIBLE = 0.7
"""3D questions are about objects of whose outline at least this fraction is their own. Below it,
the median error of the center is three times that of the others (our choice, measured by
benchmarks/labels/accuracy.py)."""
MAX_EDGE = 0.05
"""3D questions are about objects of whose outline the image's edge cuts at most this fraction: how
far the object goes on outside the image is not known."""
MIN_SCORES = {
    "visible": MIN_VISIBLE,  # fraction of the outline that is the object's own
    "points": 30.0,  # number (no fraction) of points to which the box is fitted
    "known": 0.8,  # fraction of the object's pixels with depth
    "whole": 0.5,  # IoU of the detected 2D box and the mask's
    "stability": 0.6,  # how little the box changes with its points, see `compute_stability`
    "compact": 0.4,  # how wide the object is seen, as a fraction of the box's extent in depth
}
"""3D questions are about objects whose scores are at least these (our choice). The labels keep the
other objects, with their scores."""


def find_failed_scores(scores: Mapping[str, float]) -> tuple[str, ...]:
    """The names of the scores that exclude an object from questions; missing ones pass."""
    failed = [name for name, limit in MIN_SCORES.items() if scores.get(name, limit) < limit]
    if scores.get("edge", 0.0) > MAX_EDGE:
        failed.append("edge")
    return tuple(failed)


def compute_planarity(points: Array) -> float:
    """How flat the seen points [n >= 3, 3] are: 1 for a square sheet, 0 for a line and for a ball.

    It is (σ2 - σ3) / σ1 of their standard deviations along their principal axes, largest first.
    """
    eigenvalues = np.linalg.eigvalsh(np.cov(points.T))  # smallest first
    third, second, first = np.sqrt(np.maximum(eigenvalues, 0))
    return float((second - third) / first) if first > 0 else 0.0


def compute_stability(points: Array, box: Box3D, fit: Callable[[Array], Box3D]) -> float:
    """How little a box changes when it is fitted to one half of its points, or to the other.

    It is 1 minus the vertices' mean distance (up to the box's symmetries) from those of `box`, as a
    fraction of half its diagonal, and at least 0. The halves are drawn at random from a fixed seed.

    Args:
        points: [n >= 8, 3] to which the box was fitted.
        box: The box of all points.
        fit: Fits a box to points.
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
    """Median errors over n boxes (see `compute_box_errors`), and the true boxes without a labeled
    one.

    Attributes:
        n: How many boxes were compared.
        center: Median distance of the centers, in the labels' unit.
        vertex: Median of the mean distance of the vertices, in the labels' unit.
        iou: Median 3D intersection over union.
        missed: True boxes of visible objects that no label has.
    """

    n: int
    center: float
    vertex: float
    iou: float
    missed: int


def find_instance(o: LabeledObject, label: LabeledImage, frame: Frame) -> int:
    """The instance of a frame that the object's mask covers most; 0 when it covers none."""
    assert frame.instances is not None
    covered = frame.instances[decode_mask(o.mask_runs, label.height, label.width)]
    return int(np.bincount(covered[covered > 0], minlength=1).argmax())


def compute_box_errors(box: Box3D, true_box: Box3D) -> tuple[float, float, float]:
    """Distance of the centers, mean distance of the vertices up to the box's symmetries, and 3D
    IoU."""
    center_error = float(np.linalg.norm(box.center - true_box.center))
    vertex_error = compute_vertex_error(box.vertices, true_box.vertices)
    return center_error, vertex_error, compute_iou_3d(box, true_box)


def compare_labels(
    labels: Iterable[LabeledImage], frames: Iterable[Frame], min_visible: float = 0.0
) -> BoxAccuracy:
    """Compare labels with the frames they were made from.

    Every labeled box is compared with the true box of the instance that its mask covers most.

    Args:
        labels: The labels.
        frames: Their frames, with ground truth, in the same order.
        min_visible: Ignores objects whose "visible" score is lower, as questions do below
            `MIN_VISIBLE`.

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
        matched: set[int] = set()
        errors_by_instance: dict[int, tuple[float, ...]] = {}
        for o in label.objects:
            instance = find_instance(o, label, frame)
            if o.box3d is None or instance not in frame.boxes:
                continue
            matched.add(instance)
            true_box = make_box_from_vertices(frame.boxes[instance])
            errors_by_instance.pop(instance, None)  # of two boxes of one instance the last counts
            if o.scores.get("visible", 1.0) >= min_visible:
                errors_by_instance[instance] = compute_box_errors(o.box3d, true_box)
        errors += errors_by_instance.values()
        visible = set(np.unique(frame.instances).tolist()) & set(frame.boxes)
        num_missed += len(visible - matched)

    if not errors:
        raise SpearError("No labeled box has a true box. Give frames with instances and boxes.")
    center, vertex, overlap = np.median(errors, axis=0).tolist()
    return BoxAccuracy(len(errors), center, vertex, overlap, num_missed)
