"""The errors of labeled boxes, compared with the true boxes of frames with ground truth."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import compute_iou_3d, compute_vertex_error, make_box_from_vertices
from spear.labels.fit.masks import decode_mask
from spear.types import Box3D, Frame, LabeledImage, LabeledObject


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


def choose_instance_with_most_mask_pixels(
    o: LabeledObject, label: LabeledImage, frame: Frame
) -> int:
    """The instance of a frame that the mask of an object covers most; 0 if the mask covers none.

    Args:
        o: The object.
        label: The label of the frame, which contains the object.
        frame: The frame, with its instance map.
    """
    assert frame.instances is not None
    mask = decode_mask(o.mask_runs, label.height, label.width)
    covered = frame.instances[mask]  # [n] instance ids, 0 for background
    num_pixels = np.bincount(covered[covered > 0], minlength=1)  # index: instance id
    return int(num_pixels.argmax())


class BoxErrors(NamedTuple):
    """The errors of a labeled box.

    center  Distance between the centers of the labeled and the true box.
    vertex  Mean distance between their vertices, up to the symmetries of boxes.
    iou     Their 3D intersection over union, 0 … 1; more is better.
    """

    center: float
    vertex: float
    iou: float


def compute_box_errors(box: Box3D, true_box: Box3D) -> BoxErrors:
    """Compare a labeled box with the true one. Both are in the camera frame."""
    return BoxErrors(
        center=float(np.linalg.norm(box.center - true_box.center)),
        vertex=compute_vertex_error(box.vertices, true_box.vertices),
        iou=compute_iou_3d(box, true_box),
    )


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
    errors: list[BoxErrors] = []  # of all boxes, as `compute_box_errors` returns them
    num_missed = 0
    for label, frame in zip(labels, frames, strict=True):
        if frame.instances is None or frame.boxes is None:
            name = frame.source or "frame"
            raise SpearError(f"{name} has no instances or no boxes. Give frames that have both.")
        matched_instances: set[int] = set()
        errors_by_instance: dict[int, BoxErrors] = {}
        for o in label.objects:
            instance = choose_instance_with_most_mask_pixels(o, label, frame)
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
    center, vertex, iou = np.median(errors, axis=0).tolist()
    return BoxAccuracy(len(errors), center, vertex, iou, num_missed)
