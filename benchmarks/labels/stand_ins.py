"""What the benchmarks of labeling run on: made-up photos, and models that answer after a fixed
time."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage

from spear.labels.fit.image import unproject
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Frame

NUM_OBJECTS = 5  # in every image
NUM_DIFFERENT_PHOTOS = 32  # the others are links to them


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write `count` JPEG files of textured noise of `size` (width, height)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < NUM_DIFFERENT_PHOTOS:
            noise = rng.normal(size=(size[1], size[0], 3))
            image = 128 + 60 * ndimage.gaussian_filter(noise, (3, 3, 0)) * 6
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            os.link(folder / f"{i % NUM_DIFFERENT_PHOTOS:06d}.jpg", path)


def _keep_busy(seconds: float) -> None:
    """Keep one core busy for so much of its time, without keeping other threads from running.

    A network does the same. Time that other processes take of the core does not count.
    """
    end = time.thread_time() + seconds
    data = bytes(1 << 16)
    while time.thread_time() < end:
        hashlib.sha256(data)


class StandIn:
    """All three models: they see `NUM_OBJECTS` ellipses on a slope, and take a fixed time per
    image.

    Attributes:
        seconds: The time that each model takes per image.
        start_time: When it was first called (`time.perf_counter`).
    """

    name = "stand-in"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.start_time: float | None = None
        self._scenes: dict[tuple[int, ...], _Scene] = {}

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The ellipses' boxes."""
        self.start_time = self.start_time or time.perf_counter()
        _keep_busy(self.seconds * len(frames))
        return [self._get_scene(frame.image.shape).detections for frame in frames]

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """The ellipses [n, h, w]."""
        _keep_busy(self.seconds * len(frames))
        return [self._get_scene(frame.image.shape).masks.copy() for frame in frames]

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The slope, with the ellipses standing out of it, and noise."""
        _keep_busy(self.seconds * len(frames))
        results = []
        for frame in frames:
            p = self._get_scene(frame.image.shape).point_map
            results.append(PointMapResult(p.points.copy(), p.mask.copy(), p.intrinsics, p.unit))
        return results

    def _get_scene(self, shape: tuple[int, ...]) -> _Scene:
        if shape not in self._scenes:
            self._scenes[shape] = _Scene.make(shape[0], shape[1])
        return self._scenes[shape]


class _Scene(NamedTuple):
    """What the stand-ins see in all images of one size."""

    detections: list[Detection]
    masks: Array
    point_map: PointMapResult

    @staticmethod
    def make(height: int, width: int) -> _Scene:
        rng = np.random.default_rng(1)
        intrinsics = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        y, x = np.mgrid[:height, :width]
        depth = 1.6 - 0.6 * y / height + 0.002 * rng.normal(size=(height, width))
        detections = []
        masks = []
        for i in range(NUM_OBJECTS):
            cx = width * (i + 0.5) / NUM_OBJECTS
            cy = height * rng.uniform(0.3, 0.7)
            rx = width * rng.uniform(0.04, 0.09)
            ry = height * rng.uniform(0.06, 0.2)
            mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
            depth[mask] -= 0.05
            masks.append(mask)
            box = np.array([cx - rx, cy - ry, cx + rx, cy + ry], np.float32)
            detections.append(Detection(f"thing {i}", box, 0.9))
        points = unproject(depth, intrinsics)
        point_map = PointMapResult(points, np.ones_like(masks[0]), intrinsics, "metre")
        return _Scene(detections, np.stack(masks), point_map)
