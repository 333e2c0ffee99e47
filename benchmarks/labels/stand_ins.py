"""Photos made up, and networks that answer at once or after a fixed time: what the labelling benchmarks run
on."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from spear.labels.fit.image import unproject
from spear.labels.models.protocols import Detection, PointMapResult
from spear.types import Array, Frame

OBJECTS = 5
"""In every image."""
DIFFERENT = 32
"""Photos that differ; the others are links to them."""


def photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """`count` JPEG files of textured noise of `size` (width, height)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / f"{i:06d}.jpg"
        if i < DIFFERENT:
            noise = rng.normal(size=(size[1], size[0], 3))
            image = 128 + 60 * ndimage.gaussian_filter(noise, (3, 3, 0)) * 6
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            os.link(folder / f"{i % DIFFERENT:06d}.jpg", path)


def _work(seconds: float) -> None:
    """Keep one core busy for so much of its time (what others take of it does not count) without keeping
    other threads from running, as a network does."""
    end = time.thread_time() + seconds
    data = bytes(1 << 16)
    while time.thread_time() < end:
        hashlib.sha256(data)


class StandIn:
    """All three components: `OBJECTS` ellipses on a slope, at a cost of `seconds` per image each.

    begun  when it was first called (`time.perf_counter`).
    """

    name = "stand-in"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.begun: float | None = None
        self._known: dict[tuple[int, ...], tuple[list[Detection], Array, PointMapResult]] = {}

    def detect(self, frames: Sequence[Frame]) -> list[list[Detection]]:
        """The ellipses' boxes."""
        self.begun = self.begun or time.perf_counter()
        _work(self.seconds * len(frames))
        return [self._scene(frame.image.shape)[0] for frame in frames]

    def segment(
        self, frames: Sequence[Frame], detections: Sequence[Sequence[Detection]]
    ) -> list[Array]:
        """The ellipses [n, h, w]."""
        _work(self.seconds * len(frames))
        return [self._scene(frame.image.shape)[1].copy() for frame in frames]

    def predict(self, frames: Sequence[Frame]) -> list[PointMapResult]:
        """The slope, with the ellipses standing out of it, and noise."""
        _work(self.seconds * len(frames))
        found = [self._scene(frame.image.shape)[2] for frame in frames]
        return [PointMapResult(g.points.copy(), g.mask.copy(), g.intrinsics, g.unit) for g in found]

    def _scene(self, shape: tuple[int, ...]) -> tuple[list[Detection], Array, PointMapResult]:
        if shape not in self._known:
            self._known[shape] = self._make(shape[0], shape[1])
        return self._known[shape]

    def _make(self, height: int, width: int) -> tuple[list[Detection], Array, PointMapResult]:
        rng = np.random.default_rng(1)
        intrinsics = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
        y, x = np.mgrid[:height, :width]
        depth = 1.6 - 0.6 * y / height + 0.002 * rng.normal(size=(height, width))
        detections, masks = [], []
        for i in range(OBJECTS):
            cx, cy = width * (i + 0.5) / OBJECTS, height * rng.uniform(0.3, 0.7)
            rx, ry = width * rng.uniform(0.04, 0.09), height * rng.uniform(0.06, 0.2)
            mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
            depth[mask] -= 0.05
            masks.append(mask)
            box = np.array([cx - rx, cy - ry, cx + rx, cy + ry], np.float32)
            detections.append(Detection(f"thing {i}", box, 0.9))
        points = unproject(depth, intrinsics)
        return (
            detections,
            np.stack(masks),
            PointMapResult(points, np.ones_like(masks[0]), intrinsics, "metre"),
        )
