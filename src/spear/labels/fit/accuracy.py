"""How well labelled boxes agree with true ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from spear.errors import SpearError
from spear.labels.fit.box3d import box_from_vertices, iou, vertex_error
from spear.labels.fit.masks import decode_mask
from spear.types import Box3D, Frame, LabeledImage, LabeledObject


@dataclass(frozen=True)
class Accuracy:
    """Medians over n boxes.

    center   distance between the centres.
    vertex   mean distance between the vertices, up to the symmetry of a box.
    ordered  the same in the order that questions give them, without symmetry.
    iou      3D intersection over union.
    missed   true boxes of visible objects that no label has.
    """

    n: int
    center: float
    vertex: float
    ordered: float
    iou: float
    missed: int

    def __str__(self) -> str:
        return (
            f"n {self.n} · centre {self.center:.4f} · vertex {self.vertex:.4f} · "
            f"ordered vertex {self.ordered:.4f} · IoU {self.iou:.3f} · missed {self.missed}"
        )


def instance_of(o: LabeledObject, label: LabeledImage, frame: Frame) -> int:
    """The instance of a frame that the object's mask covers most; 0 when it covers none."""
    assert frame.instances is not None
    covered = frame.instances[decode_mask(o.mask, label.height, label.width)]
    return int(np.bincount(covered[covered > 0], minlength=1).argmax())


def box_errors(box: Box3D, true: Box3D) -> tuple[float, float, float]:
    """Distance of the centres, mean distance of the vertices up to the box's symmetries, 3D IoU."""
    center = float(np.linalg.norm(box.center - true.center))
    return center, vertex_error(box.vertices, true.vertices), iou(box, true)


def compare(labels: Iterable[LabeledImage], frames: Iterable[Frame], min_visible: float = 0.0) -> Accuracy:
    """Median errors of labels against the frames they were made from (pairwise, in order): of every labelled
    box against the true box of the instance that its mask covers most.

    Args:
        min_visible: leaves out objects whose "visible" score is lower, which questions do not ask about
        either.

    Raises:
        SpearError: a frame without instance map or true boxes, or nothing to compare.
    """
    rows: list[tuple[float, ...]] = []
    missed = 0
    for label, frame in zip(labels, frames, strict=True):
        if frame.instances is None or frame.boxes is None:
            raise SpearError(
                f"{frame.source or 'frame'}: no instances or boxes: compare with frames that have both"
            )
        found: dict[int, tuple[float, tuple[float, ...]]] = {}
        for o in label.objects:
            instance = instance_of(o, label, frame)
            if o.box3d is None or instance not in frame.boxes:
                continue
            true = box_from_vertices(frame.boxes[instance])
            center, vertex, overlap = box_errors(o.box3d, true)
            ordered = float(np.linalg.norm(o.box3d.vertices - true.vertices, axis=1).mean())
            found[instance] = o.scores.get("visible", 1.0), (center, vertex, ordered, overlap)
        rows += [errors for visible, errors in found.values() if visible >= min_visible]
        missed += len((set(np.unique(frame.instances).tolist()) & set(frame.boxes)) - set(found))
    if not rows:
        raise SpearError("accuracy: no labelled box has a true box: give frames with instances and boxes")
    center, vertex, ordered, overlap = np.median(rows, axis=0).tolist()
    return Accuracy(len(rows), center, vertex, ordered, overlap, missed)
