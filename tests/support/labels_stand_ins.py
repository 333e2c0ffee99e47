"""Quick stand-ins for the three labeling models, whose results depend on the pixels alone.

An *engine* runs the models over many images, in this or in other processes.
"""

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from spear.errors import RetryableError, SpearError
from spear.labels.engine import ModelFactories, run_local
from spear.labels.fit.image import unproject
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Frame

REFUSED_LEVEL = 13  # the detector refuses images whose first pixel has this level
EMPTY_LEVEL = 14  # the detector finds nothing in images whose first pixel has this level


class BrightDetector:
    """Detects all pixels brighter than 128 as one object, a "block".

    Args:
        seconds: time that it takes per image.
        stuck_at: ending of the source of images at which it hangs.
        unreached: endings of the sources of images for which it raises a `RetryableError`.

    By default these endings are "none", which no source has.
    """

    name = "bright"

    def __init__(
        self, seconds: float = 0.0, stuck_at: str = "none", unreached: tuple[str, ...] = ("none",)
    ) -> None:
        self.seconds = seconds
        self.stuck_at = stuck_at
        self.unreached = unreached

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        time.sleep(self.seconds * len(frames))
        if any(frame.source.endswith(self.stuck_at) for frame in frames):
            time.sleep(1e6)  # longer than any test waits
        if any(frame.source.endswith(self.unreached) for frame in frames):
            raise RetryableError("no connection")
        if any(frame.image[0, 0, 0] == REFUSED_LEVEL for frame in frames):
            raise SpearError("request refused")
        return [
            [] if frame.image[0, 0, 0] == EMPTY_LEVEL else [_detect_bright(frame.image)]
            for frame in frames
        ]


def _detect_bright(image: Array) -> Detection:
    """Return the bounding box of the bright pixels of an image [h, w, 3]."""
    y, x = np.nonzero(image[..., 0] > 128)
    box2d = np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32)
    return Detection("block", box2d, score=0.9)


class BoxSegmenter:
    """Returns the whole bounding box of each detection as its mask."""

    name = "box"

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        masks = []
        for frame, frame_detections in zip(frames, detections, strict=True):
            mask = np.zeros((len(frame_detections), *frame.image.shape[:2]), bool)
            for i, detection in enumerate(frame_detections):
                x0, y0, x1, y1 = detection.box2d.astype(int)
                mask[i, y0:y1, x0:x1] = True
            masks.append(mask)
        return masks


class SlopePointMap:
    """Predicts a plane that recedes upwards, and bright pixels 0.1 m in front of the plane.

    As with a network, the result for an image depends a little on the number of images that are
    predicted together.
    """

    name = "slope"

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        relative_focal = 1 + 1e-6 * len(frames)
        return [self._predict(frame.image, relative_focal) for frame in frames]

    def _predict(self, image: Array, relative_focal: float) -> PointMapResult:
        """Predict for an image [h, w, 3]; relative_focal: focal length in widths of the image."""
        height, width = image.shape[:2]
        focal_px = relative_focal * width
        intrinsics = np.array([[focal_px, 0, width / 2], [0, focal_px, height / 2], [0, 0, 1.0]])
        plane_depth = np.linspace(1.5, 1.0, height)[:, None]  # meters, from the top row down
        is_bright = image[..., 0] > 128
        depth = plane_depth - 0.1 * is_bright  # [h, w]
        valid_mask = np.ones((height, width), bool)
        return PointMapResult(unproject(depth, intrinsics), valid_mask, intrinsics, "metre")


def make_noise_frame(seed: int, height: int = 40, width: int = 60) -> Frame:
    """Make a frame of random pixels."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Frame(image, source=f"{seed}.jpg")


def make_factories(*detector: Any) -> ModelFactories:
    """Return functions that make the stand-ins; `detector`: arguments of `BrightDetector`."""
    return partial(BrightDetector, *detector), BoxSegmenter, SlopePointMap


def make_engine(workers: int = 0, *detector: Any) -> Any:
    """Return an engine that runs the stand-ins in `workers` processes; 0 means this process.

    detector: arguments of `BrightDetector`.
    """
    return partial(run_local, make_factories(*detector), workers)


def write_photos(folder: Path, count: int, bad: bool = True) -> Path:
    """Write `count` images, each of a bright block whose size depends on the image's number.

    With `bad`, the file of image 3 is truncated, the detector refuses image 5, and it finds nothing
    in image 7.
    """
    folder.mkdir(parents=True)
    for number in range(count):
        image = np.full((40, 60, 3), 20 + number % 50, np.uint8)
        top = 8 + number % 9
        left = 10 + number % 13
        image[top:30, left:40] = 220
        if bad and number == 5:
            image[0, 0] = REFUSED_LEVEL
        if bad and number == 7:
            image[0, 0] = EMPTY_LEVEL
        path = folder / f"{number:05d}.png"
        Image.fromarray(image).save(path)
        if bad and number == 3:
            path.write_bytes(path.read_bytes()[:70])  # the beginning of the PNG
    return folder
