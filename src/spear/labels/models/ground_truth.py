"""Ground truth as detector, segmenter and point-map model.

It returns what a `Frame` from the simulator or from RGB-D files contains. An *instance* is one
object of a frame; the frame's instance map has the id of its instance at each pixel.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from spear.errors import SpearError
from spear.labels.fit.image import compute_elementwise_iou_2d, unproject
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Frame

GROUND_TRUTH = "ground-truth"  # the model's name in a label's provenance
MIN_VISIBLE_PIXELS = 12  # instances with fewer visible pixels are not detected
MIN_MATCH_IOU = 0.5  # a detection gets the mask of an instance only if their 2D boxes overlap more


def _make_missing_ground_truth_error(frame: Frame, missing_part: str) -> SpearError:
    """The error that a frame has no `missing_part`, for example no "instance map"."""
    name = frame.source or "the image"
    return SpearError(
        f"{name} has no {missing_part}. Give frames with ground truth, or label with a model."
    )


def compute_instance_boxes_2d(frame: Frame) -> dict[int, Array]:
    """Find the tight 2D box of each visible, named instance of a frame.

    Returns:
        Instance id → x0, y0, x1, y1 [4] in pixels; x1 and y1 are exclusive.

    Raises:
        SpearError: The frame has no instance map.
    """
    if frame.instances is None:
        raise _make_missing_ground_truth_error(frame, "instance map")
    # Instance id → the (rows, columns) slices that contain its pixels; None for unused ids
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
    """Detector, segmenter and point-map model in one class.

    As a detector and segmenter it reads a frame's `instances` and `names`, as a point-map model the
    frame's `depth` and `intrinsics`.
    """

    name = GROUND_TRUTH

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """Detect the named instances of each frame, in the order of their ids.

        Instances with fewer than `MIN_VISIBLE_PIXELS` visible pixels are left out.
        """
        return [_detect_instances(frame) for frame in frames]

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """Return the masks [n, h, w] bool of the n detections of each frame.

        The detections may come from another detector. A detection gets the mask of that instance
        with the same name whose 2D box overlaps the detection's box most. If no overlap (IoU) is
        above `MIN_MATCH_IOU`, the mask is empty.
        """
        masks_of_frames = []
        for frame, frame_detections in zip(frames, detections, strict=True):
            boxes = compute_instance_boxes_2d(frame)
            assert frame.instances is not None
            masks = np.zeros((len(frame_detections), *frame.instances.shape), bool)
            for mask, detection in zip(masks, frame_detections, strict=True):
                instance = _match_instance(detection, frame, boxes)
                if instance is not None:
                    mask[:] = frame.instances == instance  # fills in its part of `masks`
            masks_of_frames.append(masks)
        return masks_of_frames

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """Compute the point map of each frame, in meters, from its depth along z.

        Depths of 0, inf and NaN are unknown.
        """
        return [_unproject_frame(frame) for frame in frames]


def _detect_instances(frame: Frame) -> list[Detection]:
    """Return a detection for each instance of which enough pixels are visible."""
    detections = []
    for instance, box in sorted(compute_instance_boxes_2d(frame).items()):
        if np.count_nonzero(frame.instances == instance) >= MIN_VISIBLE_PIXELS:
            detections.append(Detection(frame.names[instance], box))
    return detections


def _match_instance(detection: Detection, frame: Frame, boxes: Mapping[int, Array]) -> int | None:
    """The instance whose 2D box overlaps that of a detection most; None if no instance matches.

    If two instances overlap it equally, the one with the lower id is returned.

    Args:
        detection: The detection.
        frame: The frame, with the names of its instances.
        boxes: Instance id → 2D box [4] (`compute_instance_boxes_2d`).
    """
    best_instance = None
    best_overlap = MIN_MATCH_IOU
    for instance in sorted(boxes):
        if frame.names[instance] != detection.name:
            continue
        overlap = float(compute_elementwise_iou_2d(boxes[instance], detection.box2d))
        if overlap > best_overlap:
            best_instance = instance
            best_overlap = overlap
    return best_instance


def _unproject_frame(frame: Frame) -> PointMapResult:
    """Make the point map of a frame from its true depth and intrinsics."""
    if frame.depth is None or frame.intrinsics is None:
        raise _make_missing_ground_truth_error(frame, "depth or no intrinsics")
    is_known = np.isfinite(frame.depth) & (frame.depth > 0)
    points = unproject(np.where(is_known, frame.depth, 0), frame.intrinsics)
    return PointMapResult(points, is_known, np.asarray(frame.intrinsics), "metre")
