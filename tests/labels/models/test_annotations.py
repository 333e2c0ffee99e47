from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from spear.errors import SpearError
from spear.labels.models.annotations import Annotation, FileDetector, FileSegmenter
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.models.protocols import Detection
from spear.labels.pipeline import label
from spear.types import Array, Frame


def disc(height: int, width: int, x: float, y: float, radius: float) -> Array:
    """A mask [height, width], in pixels of a 60×40 image."""
    rows, columns = (np.mgrid[:height, :width] + 0.5) * 60 / width
    return np.hypot(columns - x, rows - y) < radius


def outlined(name: str, x: float, y: float, radius: float = 8, **changes: Any) -> Annotation:
    fields: dict[str, Any] = {
        "box2d": np.array([x - radius, y - radius, x + radius, y + radius]),
        "size": (40, 60),
        "outline": lambda height, width: disc(height, width, x, y, radius),
    }
    return Annotation(name, **{**fields, **changes})


class Known:
    """Annotations held in memory, by source."""

    name = "known"

    def __init__(self, **images: list[Annotation]) -> None:
        self.images = images

    def find(self, source: str) -> list[Annotation] | None:
        return self.images.get(source)


class FullBoxes:
    """A segmenter that fills the boxes, and keeps count of what it was asked."""

    name = "boxes"

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def segment(self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]) -> list[Array]:
        self.asked += [[d.name for d in found] for found in detections]
        results = []
        for frame, found in zip(frames, detections, strict=True):
            masks = np.zeros((len(found), *frame.image.shape[:2]), bool)
            for mask, d in zip(masks, found, strict=True):
                x0, y0, x1, y1 = d.box2d.astype(int)
                mask[y0:y1, x0:x1] = True
            results.append(masks)
        return results


def frame(source: str, height: int = 40, width: int = 60, **known: Any) -> Frame:
    return Frame(np.zeros((height, width, 3), np.uint8), source=source, **known)


def test_boxes_and_masks_are_those_of_the_file() -> None:
    known = Known(a=[outlined("cup", 20, 20), outlined("cup", 44, 22, 5)], b=[])
    frames = [frame("a"), frame("b")]
    detections = FileDetector(known).detect(frames)
    assert [d.name for d in detections[0]] == ["cup", "cup"] and detections[1] == []
    assert detections[0][0].box2d.tolist() == [12, 12, 28, 28]
    masks, none = FileSegmenter(known).segment(frames, detections)
    assert (masks[0] == disc(40, 60, 20, 20, 8)).all()
    assert (masks[1] == disc(40, 60, 44, 22, 5)).all()
    assert none.shape == (0, 40, 60)


def test_an_image_may_be_resized_but_not_cropped() -> None:
    known = Known(a=[outlined("cup", 20, 20)])
    for height, width in ((20, 30), (80, 120), (27, 40)):
        small = [frame("a", height, width)]
        found = FileDetector(known).detect(small)
        np.testing.assert_allclose(found[0][0].box2d, np.array([12, 12, 28, 28]) * width / 60, rtol=0.02)
        (masks,) = FileSegmenter(known).segment(small, found)
        assert (masks[0] != disc(height, width, 20, 20, 8)).mean() < 0.02
    with pytest.raises(SpearError, match=r"'cup' is for an image of 60×40, this one is 60×60"):
        FileDetector(known).detect([frame("a", 60, 60)])
    with pytest.raises(SpearError, match="60×40"):
        FileSegmenter(known).segment([frame("a", 40, 40)], [[Detection("cup", np.array([12, 12, 28, 28]))]])


def test_boxes_are_cut_at_the_edge_and_empty_ones_left_out() -> None:
    known = Known(
        a=[
            outlined("cut", 58, 38),
            outlined("outside", 80, 20),
            Annotation("seen", None, (40, 60), lambda h, w: disc(h, w, 30, 20, 6)),
            Annotation("unseen", None, (40, 60), lambda h, w: np.zeros((h, w), bool)),
        ]
    )
    (found,) = FileDetector(known).detect([frame("a")])
    assert [(d.name, d.box2d.tolist()) for d in found] == [
        ("cut", [50, 30, 60, 40]),
        ("seen", [24, 14, 36, 26]),
    ]


def test_an_unknown_image_goes_to_the_other_detector_or_is_an_error() -> None:
    known = Known(a=[outlined("cup", 20, 20)])
    instances = np.zeros((40, 60), np.int32)
    instances[5:15, 10:30] = 1
    other = frame("x", instances=instances, names={1: "plate"})
    with pytest.raises(SpearError, match="x: not in known"):
        FileDetector(known).detect([frame("a"), other])
    detector = FileDetector(known, GroundTruthDetector())
    assert [[d.name for d in f] for f in detector.detect([other, frame("a")])] == [["plate"], ["cup"]]
    assert detector.name == "known, otherwise ground-truth"


def test_objects_without_a_mask_go_to_the_other_segmenter_or_are_an_error() -> None:
    boxed = outlined("fork", 44, 22, 5, outline=None)
    known = Known(a=[boxed, outlined("cup", 20, 20)], b=[outlined("cup", 20, 20)])
    frames = [frame("a"), frame("b"), frame("c")]
    spoon = Detection("spoon", np.array([0, 0, 4, 4], np.float32))
    detections = [*FileDetector(known).detect(frames[:2]), [spoon]]
    with pytest.raises(SpearError, match=r"a: no mask of 'fork' in known: add a segmenter"):
        FileSegmenter(known).segment(frames, detections)
    boxes = FullBoxes()
    masks = FileSegmenter(known, boxes).segment(frames, detections)
    assert boxes.asked == [["fork"], ["spoon"]]
    assert masks[0][0].sum() == 100 and (masks[0][1] == disc(40, 60, 20, 20, 8)).all()
    assert masks[2][0].sum() == 16


def test_detections_of_others_get_the_mask_that_they_overlap() -> None:
    known = Known(a=[outlined("mug", 20, 20), outlined("cup", 22, 20)])
    near = Detection(
        "cup", np.array([12, 12, 28, 28], np.float32)
    )  # exactly the mug's box, but a cup by name
    second = Detection("beaker", np.array([13, 12, 29, 28], np.float32))
    far = Detection("cup", np.array([40, 12, 56, 28], np.float32))
    (masks,) = FileSegmenter(known, FullBoxes()).segment([frame("a")], [[near, second, far]])
    assert (masks[0] == disc(40, 60, 22, 20, 8)).all()
    assert (masks[1] == disc(40, 60, 20, 20, 8)).all()
    assert masks[2].sum() == 256


def test_annotated_masks_run_through_the_pipeline() -> None:
    known = Known(a=[outlined("ball", 30, 20)])
    k = np.array([[50, 0, 30], [0, 50, 20], [0, 0, 1.0]])
    seen = frame("a", depth=np.where(disc(40, 60, 30, 20, 8), 1.0, 2.0).astype(np.float32), intrinsics=k)
    unseen = frame("b", depth=np.ones((40, 60), np.float32), intrinsics=k)
    (result,) = label([seen], FileDetector(known), FileSegmenter(known), GroundTruthPointMap())
    (ball,) = result.objects
    assert ball.name == "ball" and ball.box3d is not None
    assert abs(ball.box3d.center[2] - 1) < 0.05
    assert result.provenance["detector"] == result.provenance["segmenter"] == "known"
    with pytest.raises(SpearError, match="b: not in known"):
        list(label([unseen], FileDetector(known), GroundTruthSegmenter(), GroundTruthPointMap()))
