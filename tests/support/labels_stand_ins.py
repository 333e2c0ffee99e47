"""Models of fixed behavior for tests of the engines: quick, and a function of the pixels alone."""

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

REFUSED_LEVEL = 13  # of the first pixel of an image that the detector refuses
EMPTY_LEVEL = 14  # of the first pixel of an image in which the detector finds nothing


class BrightDetector:
    """What is brighter than 128 is one object, a "block"."""

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
            time.sleep(1e6)
        if any(frame.source.endswith(self.unreached) for frame in frames):
            raise RetryableError("no connection")
        if any(frame.image[0, 0, 0] == REFUSED_LEVEL for frame in frames):
            raise SpearError("request refused")
        return [
            [] if frame.image[0, 0, 0] == EMPTY_LEVEL else [_detect_bright(frame.image)]
            for frame in frames
        ]


def _detect_bright(image: Array) -> Detection:
    y, x = np.nonzero(image[..., 0] > 128)
    return Detection(
        "block", np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float32), 0.9
    )


class BoxSegmenter:
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
    """A plane that recedes upwards; what is bright stands 0.1 m before it. As with a network, what
    it says of an image depends a little on how many others come with it."""

    name = "slope"

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        return [self._predict(frame.image, 1 + 1e-6 * len(frames)) for frame in frames]

    def _predict(self, image: Array, off: float) -> PointMapResult:
        height, width = image.shape[:2]
        intrinsics = np.array(
            [[off * width, 0, width / 2], [0, off * width, height / 2], [0, 0, 1.0]]
        )
        depth = np.linspace(1.5, 1.0, height)[:, None] - 0.1 * (image[..., 0] > 128)
        valid_mask = np.ones((height, width), bool)
        return PointMapResult(unproject(depth, intrinsics), valid_mask, intrinsics, "metre")


def make_noise_frame(seed: int, height: int = 40, width: int = 60) -> Frame:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Frame(image, source=f"{seed}.jpg")


def make_factories(*detector: Any) -> ModelFactories:
    return partial(BrightDetector, *detector), BoxSegmenter, SlopePointMap


def make_engine(workers: int = 0, *detector: Any) -> Any:
    return partial(run_local, make_factories(*detector), workers)


def write_photos(folder: Path, count: int, bad: bool = True) -> Path:
    """`count` images of a bright block each; with `bad`, number 3 is broken, 5 refused and 7
    empty."""
    folder.mkdir(parents=True)
    for i in range(count):
        image = np.full((40, 60, 3), 20 + i % 50, np.uint8)
        image[8 + i % 9 : 30, 10 + i % 13 : 40] = 220
        if bad and i in (5, 7):
            image[0, 0] = {5: REFUSED_LEVEL, 7: EMPTY_LEVEL}[i]
        path = folder / f"{i:05d}.png"
        Image.fromarray(image).save(path)
        if bad and i == 3:
            path.write_bytes(path.read_bytes()[:70])
    return folder
