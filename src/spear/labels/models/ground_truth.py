"""Detector, segmenter and point map read from what a `Frame` knows, from the simulator or RGB-D files."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from spear.errors import SpearError
from spear.labels.fit.image import compute_iou_2d, unproject
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Frame

GROUND_TRUTH = "ground-truth"
"""Its name in a label's provenance."""


def _missing(frame: Frame, what: str) -> SpearError:
    return SpearError(
        f"{frame.source or 'image'}: no {what}: give ground truth, or label with a model"
    )


def find_instance_boxes(frame: Frame) -> dict[int, Array]:
    """Tight 2D box [4] of each visible, named instance: x0, y0, x1, y1, pixels, the upper ends exclusive."""
    if frame.instances is None:
        raise _missing(frame, "instance map")
    found = dict(enumerate(ndimage.find_objects(frame.instances), 1))
    seen = {i: found[i] for i in frame.names if found.get(i)}
    return {
        i: np.array([x.start, y.start, x.stop, y.stop], np.float32) for i, (y, x) in seen.items()
    }


class GroundTruth:
    """A frame's `instances`, `names`, `depth` and `intrinsics` as all three components."""

    name = GROUND_TRUTH

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The named instances of each frame of at least 12 visible pixels, by instance id."""
        found = []
        for frame in frames:
            boxes = sorted(find_instance_boxes(frame).items())
            seen = [(i, box) for i, box in boxes if np.count_nonzero(frame.instances == i) >= 12]
            found.append([Detection(frame.names[i], box) for i, box in seen])
        return found

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """For each frame, masks [n, h, w] bool: of the instance of the detection's name whose tight box
        overlaps it most (IoU > 0.5); empty where none does."""
        found = []
        for frame, wanted in zip(frames, detections, strict=True):
            boxes = find_instance_boxes(frame)
            assert frame.instances is not None
            found.append(np.zeros((len(wanted), *frame.instances.shape), bool))
            for mask, detection in zip(found[-1], wanted, strict=True):
                candidates = [i for i in boxes if frame.names[i] == detection.name]
                overlaps = [
                    (float(compute_iou_2d(boxes[i], detection.box2d)), -i) for i in candidates
                ]
                overlap, best = max(overlaps, default=(0.0, 0))
                if overlap > 0.5:
                    mask[:] = frame.instances == -best
        return found

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The metric point map of each frame: its depth (along z; 0, inf and NaN are unknown) unprojected."""
        found = []
        for frame in frames:
            if frame.depth is None or frame.intrinsics is None:
                raise _missing(frame, "depth or intrinsics")
            known = np.isfinite(frame.depth) & (frame.depth > 0)
            points = unproject(np.where(known, frame.depth, 0), frame.intrinsics)
            found.append(PointMapResult(points, known, np.asarray(frame.intrinsics), "metre"))
        return found
