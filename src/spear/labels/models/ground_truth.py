"""Detector, segmenter and point map read from what a `Frame` knows, from the simulator or RGB-D
files."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from spear.errors import SpearError
from spear.labels.fit.image import compute_iou_2d, unproject
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Frame

GROUND_TRUTH = "ground-truth"  # in a label's provenance
MIN_VISIBLE_PIXELS = 12  # of an instance that is detected
MIN_MATCH_IOU = 0.5  # of a detection with the instance whose mask it gets


def _missing_error(frame: Frame, missing: str) -> SpearError:
    name = frame.source or "the image"
    return SpearError(
        f"{name} has no {missing}. Give frames with ground truth, or label with a model."
    )


def find_instance_boxes(frame: Frame) -> dict[int, Array]:
    """Find the tight 2D box of each visible, named instance of a frame.

    Returns:
        Instance id → x0, y0, x1, y1 [4] in pixels; x1 and y1 are exclusive.

    Raises:
        SpearError: The frame has no instance map.
    """
    if frame.instances is None:
        raise _missing_error(frame, "instance map")
    slices_by_instance = dict(enumerate(ndimage.find_objects(frame.instances), 1))
    boxes = {}
    for instance in frame.names:
        slices = slices_by_instance.get(instance)
        if slices:
            rows, columns = slices
            box = [columns.start, rows.start, columns.stop, rows.stop]
            boxes[instance] = np.array(box, np.float32)
    return boxes


class GroundTruth:
    """Detector, segmenter and depth model at once.

    They read a frame's `instances`, `names`, `depth` and `intrinsics`.
    """

    name = GROUND_TRUTH

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The named instances of each frame with enough visible pixels, by instance id."""
        return [_detect_instances(frame) for frame in frames]

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """For each frame, the masks [n, h, w] bool of its detections.

        A detection gets the mask of the instance of its name whose tight box overlaps its own most,
        and an empty one where none overlaps it by more than `MIN_MATCH_IOU`.
        """
        masks_of_frames = []
        for frame, frame_detections in zip(frames, detections, strict=True):
            boxes = find_instance_boxes(frame)
            assert frame.instances is not None
            masks = np.zeros((len(frame_detections), *frame.instances.shape), bool)
            for mask, detection in zip(masks, frame_detections, strict=True):
                instance = _match_instance(detection, frame, boxes)
                if instance is not None:
                    mask[:] = frame.instances == instance
            masks_of_frames.append(masks)
        return masks_of_frames

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The metric point map of each frame: its depth (along z; 0, inf and NaN are unknown),
        unprojected."""
        return [_unproject_frame(frame) for frame in frames]


def _detect_instances(frame: Frame) -> list[Detection]:
    detections = []
    for instance, box in sorted(find_instance_boxes(frame).items()):
        if np.count_nonzero(frame.instances == instance) >= MIN_VISIBLE_PIXELS:
            detections.append(Detection(frame.names[instance], box))
    return detections


def _match_instance(detection: Detection, frame: Frame, boxes: Mapping[int, Array]) -> int | None:
    """The instance of a detection: of equal overlaps the lower id wins."""
    best = None
    best_overlap = MIN_MATCH_IOU
    for instance in sorted(boxes):
        if frame.names[instance] != detection.name:
            continue
        overlap = float(compute_iou_2d(boxes[instance], detection.box2d))
        if overlap > best_overlap:
            best = instance
            best_overlap = overlap
    return best


def _unproject_frame(frame: Frame) -> PointMapResult:
    if frame.depth is None or frame.intrinsics is None:
        raise _missing_error(frame, "depth or no intrinsics")
    is_known = np.isfinite(frame.depth) & (frame.depth > 0)
    points = unproject(np.where(is_known, frame.depth, 0), frame.intrinsics)
    return PointMapResult(points, is_known, np.asarray(frame.intrinsics), "metre")
