"""Statistics of features as LeRobot keeps them: per episode, and over the dataset.

Those of an image are per channel, of pixel values in 0 … 1, over some frames of each episode. LeRobot's
quantiles of a dataset are averages over its episodes; ours are the quantiles of the rows themselves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from spear.errors import SpearError
from spear.types import Array, Episode
from spear.util.images import decode_image

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
MOST_FRAMES = 100
"""Frames of an episode that are looked at, spread over it (our choice; LeRobot takes about as many)."""

Stats = dict[str, Array]


class RowStats:
    """Statistics of a feature of numbers, over all rows added."""

    def __init__(self) -> None:
        self._columns: list[QuantileSketch] = []

    def add(self, values: Array) -> Self:
        """Take in one episode's rows [T, d]; returns itself."""
        self._columns, self._kind = (
            self._columns or [QuantileSketch() for _ in values.T],
            values.dtype,
        )
        for sketch, column in zip(self._columns, values.T, strict=True):
            sketch.add(column)
        return self

    def total(self) -> Stats:
        """Statistics of everything added."""
        rows = self._columns
        low, high = (
            np.array([getattr(s, n) for s in rows]).astype(self._kind) for n in ("low", "high")
        )
        spread = np.array([np.sqrt(s.squares / s.count) for s in rows])
        found = {"min": low, "max": high, "mean": np.array([s.mean for s in rows]), "std": spread}
        found["count"] = np.array([rows[0].count])
        for name, q in QUANTILES.items():
            found[name] = np.array([weighted_quantile(*s.weighted(), q) for s in rows])
        return found


@dataclass(frozen=True)
class ImageSample:
    """What some of a camera's images look like.

    size (height, width) in pixels; histogram [3, 256] of the values of each channel, which can be added up.
    """

    size: tuple[int, int]
    histogram: Array = field(default_factory=lambda: np.zeros((3, 256), np.int64))

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
            "count": self.histogram[:1].sum(1) // math.prod(self.size),
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
        steps = np.unique(
            np.linspace(0, len(images) - 1, min(len(images), MOST_FRAMES)).round().astype(int)
        )
        for step in steps.tolist():
            where = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(images[step], where)
            size = image.shape[0], image.shape[1]
            sample = samples.setdefault(camera, ImageSample(size))
            check_size(size, sample.size, where)
            histogram = [np.bincount(image[..., c].reshape(-1), minlength=256) for c in range(3)]
            sample.histogram[...] += histogram
    return samples


def check_size(size: tuple[int, ...], first: tuple[int, int], where: str) -> None:
    """Raises SpearError for an image whose (height, width) is not that of the first one."""
    if size != first:
        (h, w), (h0, w0) = size, first
        apart = f"image sizes differ: {where} is {w} x {h} pixels, the first {w0} x {h0}"
        raise SpearError(f"{apart}: leave the episode out; of one aspect, prepare --size")


CAPACITY = 16384
"""Values in a buffer. The error in rank is at most (levels - 1) / CAPACITY: 0.07 % for 45 million values."""


class QuantileSketch:
    """Quantiles of a stream in one pass, of bounded size, with a proven bound on the error in rank.

    Values wait in a buffer. A full one is sorted and every second value kept, which then stands for two and
    waits in the next buffer, and so on (Manku, Rajagopalan and Lindsay, 1998). Which of two is kept
    alternates, so the result is the same in every run. Up to `capacity` values nothing is lost. count, low,
    high and mean are exact; `squares` is the sum of squared deviations from the mean.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.count = 0
        self.low, self.high = np.inf, -np.inf
        self.mean, self.squares = 0.0, 0.0
        self._levels: list[Array] = [np.zeros(0)]
        self._keep_odd = [False]

    def add(self, values: Array) -> None:
        """Take in numbers [N], in any pieces."""
        values = np.asarray(values, np.float64).reshape(-1)
        for first in range(0, len(values), self.capacity):
            piece = values[first : first + self.capacity]
            mean = float(piece.mean())
            squares = float(((piece - mean) ** 2).sum())
            # Of two parts, the moments of the whole (Chan, Golub and LeVeque, 1979).
            total, apart = self.count + len(piece), mean - self.mean
            self.mean += apart * len(piece) / total
            self.squares += squares + apart**2 * self.count * len(piece) / total
            self.low, self.high = (
                min(self.low, float(piece.min())),
                max(self.high, float(piece.max())),
            )
            self.count = total
            self._levels[0] = np.concatenate([self._levels[0], piece])
            self._compact()

    def weighted(self) -> tuple[Array, Array]:
        """Values, and for how many each of them stands; together they stand for `count`."""
        weights = [np.full(len(values), 2.0**level) for level, values in enumerate(self._levels)]
        return np.concatenate(self._levels), np.concatenate(weights)

    def to_arrays(self) -> dict[str, Array]:
        """All of it, for `from_arrays`."""
        moments = [self.count, self.low, self.high, self.mean, self.squares, self.capacity]
        levels = {f"level {i}": values for i, values in enumerate(self._levels)}
        return {
            "moments": np.array(moments, np.float64),
            "keep_odd": np.array(self._keep_odd),
            **levels,
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> "QuantileSketch":
        """The sketch that `to_arrays` took apart. Raises KeyError or ValueError when it is none."""
        count, low, high, mean, squares, capacity, *_ = arrays["moments"].tolist()
        sketch = QuantileSketch(int(capacity))
        sketch.count, sketch.low, sketch.high = int(count), low, high
        sketch.mean, sketch.squares = mean, squares
        sketch._keep_odd = arrays["keep_odd"].tolist()
        sketch._levels = [arrays[f"level {i}"] for i in range(len(sketch._keep_odd))]
        return sketch

    def _compact(self) -> None:
        for level, values in enumerate(self._levels):  # which grow meanwhile
            if len(values) > self.capacity:
                values = np.sort(values)
                even = len(values) // 2 * 2
                kept = values[int(self._keep_odd[level]) : even : 2]
                if level + 1 == len(self._levels):
                    self._levels.append(np.zeros(0))
                    self._keep_odd.append(False)
                self._levels[level] = values[even:]
                self._levels[level + 1] = np.concatenate([self._levels[level + 1], kept])
                self._keep_odd[level] = not self._keep_odd[level]


def weighted_quantile(values: Array, weights: Array, q: float) -> float:
    """The quantile of values [N] of which each stands for a share; linear between them.

    Equal weights give `numpy.quantile`.
    """
    order = np.argsort(values, kind="stable")
    share = weights[order]
    rank = np.cumsum(share) - share / 2  # the middle of each value's share
    rank = (rank - rank[0]) / max(rank[-1] - rank[0], np.finfo(float).tiny)
    return float(np.interp(q, rank, values[order]))
