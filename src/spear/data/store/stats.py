"""Statistics of features as LeRobot keeps them: per episode, and over the dataset.

Those of an image are per channel, of pixel values in 0 … 1, over some frames of each episode. LeRobot's
quantiles of a dataset are averages over its episodes; ours are the quantiles of the rows themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from spear.errors import SpearError
from spear.types import Array, Episode
from spear.util.images import decode_image

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
MOST_ROWS = 1 << 20
"""Rows that are kept for the quantiles; of more, every second, fourth … is (our choice)."""
MOST_FRAMES = 100
"""Frames of an episode that are looked at, spread over it (our choice; LeRobot takes about as many)."""

Stats = dict[str, Array]


class RowStats:
    """Statistics of a feature of numbers, over all rows added."""

    def __init__(self) -> None:
        self._count, self._stride = 0, 1
        self._low, self._high, self._mean, self._squares = map(np.array, (np.inf, -np.inf, 0.0, 0.0))
        self._kept: list[Array] = []

    def add(self, values: Array) -> Stats:
        """Take in one episode's rows [T, d]; returns their own statistics."""
        self.update(values)
        return {
            "min": values.min(0),
            "max": values.max(0),
            "mean": values.mean(0, dtype=np.float64),
            "std": values.std(0, dtype=np.float64),
            "count": np.array([len(values)]),
            **_quantiles(values),
        }

    def update(self, values: Array) -> None:
        """Take in one episode's rows [T, d]."""
        self._kept.append(values[-self._count % self._stride :: self._stride])
        mean = values.mean(0, dtype=np.float64)
        total = self._count + len(values)
        apart = mean - self._mean  # of two parts, the moments of the whole (Chan, Golub and LeVeque, 1979)
        self._mean = self._mean + apart * len(values) / total
        self._squares = self._squares + ((values - mean) ** 2).sum(0)
        self._squares = self._squares + apart**2 * self._count * len(values) / total
        self._low, self._high = np.minimum(self._low, values.min(0)), np.maximum(self._high, values.max(0))
        self._count = total
        if sum(map(len, self._kept)) > MOST_ROWS:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._stride *= 2

    def total(self) -> Stats:
        """Statistics of everything added."""
        kind = self._kept[0].dtype
        return {
            "min": self._low.astype(kind),
            "max": self._high.astype(kind),
            "mean": self._mean,
            "std": np.sqrt(self._squares / self._count),
            "count": np.array([self._count]),
            **_quantiles(np.concatenate(self._kept)),
        }


@dataclass(frozen=True)
class ImageSample:
    """What some of a camera's images look like.

    size (height, width) in pixels; histogram [3, 256] of the values of each channel in so many frames.
    """

    size: tuple[int, int]
    histogram: Array = field(default_factory=lambda: np.zeros((3, 256), np.int64))
    frames: int = 0

    def plus(self, other: ImageSample) -> ImageSample:
        """These images and others of the same size."""
        return ImageSample(self.size, self.histogram + other.histogram, self.frames + other.frames)

    def stats(self) -> Stats:
        """[3, 1, 1] statistics of each channel."""
        level = np.arange(256) / 255
        share = self.histogram / self.histogram.sum(1, keepdims=True)
        mean = share @ level
        below = np.cumsum(share, axis=1)
        found = {
            "min": level[(self.histogram > 0).argmax(1)],
            "max": level[255 - (self.histogram[:, ::-1] > 0).argmax(1)],
            "mean": mean,
            "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0)),
            "count": np.array([self.frames]),
        }
        for name, q in QUANTILES.items():
            found[name] = level[np.minimum((below < q - 1e-12).sum(1), 255)]
        return {name: v if name == "count" else v.reshape(3, 1, 1) for name, v in found.items()}


def sample_images(episode: Episode) -> dict[str, ImageSample]:
    """Some images of each camera of an episode, spread over it.

    Raises SpearError, naming it, for an image that is broken or of another size than the others.
    """
    samples: dict[str, ImageSample] = {}
    for camera, images in episode.images.items():
        steps = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_FRAMES)).round().astype(int))
        for number, step in enumerate(steps.tolist()):
            where = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(images[step], where)
            size = image.shape[0], image.shape[1]
            if number == 0:
                samples[camera] = ImageSample(size, frames=len(steps))
            check_size(size, samples[camera].size, where)
            histogram = [np.bincount(image[..., c].reshape(-1), minlength=256) for c in range(3)]
            samples[camera].histogram[...] += histogram
    return samples


def check_size(size: tuple[int, ...], first: tuple[int, int], where: str) -> None:
    """Raises SpearError for an image whose (height, width) is not that of the first one."""
    if size != first:
        (h, w), (h0, w0) = size, first
        raise SpearError(
            f"image sizes differ: {where} is {w} x {h} pixels, the first {w0} x {h0}: leave the episode out, "
            "or bring all to one size (see `spear data prepare --size`)"
        )


def _quantiles(values: Array) -> Stats:
    found = np.quantile(values.astype(np.float64), list(QUANTILES.values()), axis=0)
    return dict(zip(QUANTILES, found, strict=True))
