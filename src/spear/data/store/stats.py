"""Statistics of features as LeRobot has them: per episode, and over the dataset.

The statistics of an image feature are per channel, of pixel values in 0 … 1, over some images of
each episode. LeRobot's quantiles of a dataset are averages over its episodes; ours are the
quantiles of the rows themselves.
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
QUANTILE_TOLERANCE = 1e-12  # of the rounding of summed shares
MAX_SAMPLED_IMAGES = 100  # per episode and camera, spread over it; LeRobot takes about as many
SKETCH_CAPACITY = 16384  # values in a buffer of `QuantileSketch`

Stats = dict[str, Array]


class RowStats:
    """Statistics of a feature of numbers, over all rows added."""

    def __init__(self) -> None:
        self._sketches: list[QuantileSketch] = []  # of each column
        self._dtype: np.dtype | None = None

    def add(self, values: Array) -> Self:
        """Add the rows [T, d] of an episode; returns itself."""
        self._dtype = values.dtype
        if not self._sketches:
            self._sketches = [QuantileSketch() for _ in values.T]
        for sketch, column in zip(self._sketches, values.T, strict=True):
            sketch.add(column)
        return self

    def total(self) -> Stats:
        """The statistics of all rows added, each [d]; "count" is [1]."""
        sketches = self._sketches
        stats = {
            "min": np.array([sketch.low for sketch in sketches]).astype(self._dtype),
            "max": np.array([sketch.high for sketch in sketches]).astype(self._dtype),
            "mean": np.array([sketch.mean for sketch in sketches]),
            "std": np.array([np.sqrt(sketch.squares / sketch.count) for sketch in sketches]),
            "count": np.array([sketches[0].count]),
        }
        for name, quantile in QUANTILES.items():
            quantiles: list[float] = []
            for sketch in sketches:
                values, weights = sketch.weighted()
                quantiles.append(weighted_quantile(values, weights, quantile))
            stats[name] = np.array(quantiles)
        return stats


@dataclass(frozen=True)
class ImageSample:
    """A summary of some of a camera's images.

    size       (height, width) in pixels.
    histogram  [3, 256] counts of the values of each channel, which can be added up.
    """

    size: tuple[int, int]
    histogram: Array = field(default_factory=lambda: np.zeros((3, 256), np.int64))

    def stats(self) -> Stats:
        """The statistics of each channel, [3, 1, 1]; "count" is [1], in images."""
        level = np.arange(256) / 255
        share = self.histogram / self.histogram.sum(1, keepdims=True)
        mean = share @ level
        variance = share @ level**2 - mean**2
        first_level = (self.histogram > 0).argmax(1)
        last_level = 255 - (self.histogram[:, ::-1] > 0).argmax(1)
        stats = {
            "min": level[first_level],
            "max": level[last_level],
            "mean": mean,
            "std": np.sqrt(np.maximum(variance, 0)),
            "count": self.histogram[:1].sum(1) // math.prod(self.size),
        }
        cumulative_share = np.cumsum(share, axis=1)
        for name, quantile in QUANTILES.items():
            num_levels_below = (cumulative_share < quantile - QUANTILE_TOLERANCE).sum(1)
            stats[name] = level[np.minimum(num_levels_below, 255)]
        return {
            name: values if name == "count" else values.reshape(3, 1, 1)
            for name, values in stats.items()
        }


def sample_images(episode: Episode) -> dict[str, ImageSample]:
    """Summarize some images of each camera of an episode, spread over it.

    Returns:
        Camera → summary.

    Raises:
        SpearError: If an image is broken, or has another size than the camera's first one.
    """
    samples: dict[str, ImageSample] = {}
    for camera, images in episode.images.items():
        num_sampled = min(len(images), MAX_SAMPLED_IMAGES)
        steps = np.linspace(0, len(images) - 1, num_sampled).round().astype(int)
        for step in np.unique(steps).tolist():
            description = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(images[step], description)
            height, width = image.shape[:2]
            sample = samples.setdefault(camera, ImageSample((height, width)))
            check_size((height, width), sample.size, description)
            for channel in range(3):
                values = image[..., channel].reshape(-1)
                sample.histogram[channel] += np.bincount(values, minlength=256)
    return samples


def check_size(size: tuple[int, ...], first_size: tuple[int, int], description: str) -> None:
    """Raise SpearError for an image whose (height, width) differs from that of the first one."""
    if size == first_size:
        return
    height, width = size
    first_height, first_width = first_size
    raise SpearError(
        f"image sizes differ: {description} is {width} x {height} pixels, "
        f"the first {first_width} x {first_height}: "
        "leave the episode out; of one aspect, prepare --image-size"
    )


class QuantileSketch:
    """Quantiles of a stream in one pass, of bounded size, with a proven bound on the error in rank.

    Values wait in a buffer. A full buffer is sorted, and every second value moves to the next
    buffer, where it stands for two, and so on (Manku, Rajagopalan and Lindsay, 1998). Which of two
    values moves alternates, so the result is the same in every run. Up to `capacity` values nothing
    is lost. The error in rank is at most (levels - 1) / capacity: 0.07 % for 45 million values.

    Attributes:
        capacity: The number of values in a buffer.
        count, low, high, mean: Of all values, exact.
        squares: The sum of squared deviations from the mean.
    """

    def __init__(self, capacity: int = SKETCH_CAPACITY) -> None:
        self.capacity = capacity
        self.count = 0
        self.low = np.inf
        self.high = -np.inf
        self.mean = 0.0
        self.squares = 0.0
        self._levels: list[Array] = [np.zeros(0)]  # values of level i stand for 2^i values
        self._keep_odd = [False]  # which of two values of a level moves next

    def add(self, values: Array) -> None:
        """Add numbers [N]."""
        values = np.asarray(values, np.float64).reshape(-1)
        for first in range(0, len(values), self.capacity):
            piece = values[first : first + self.capacity]
            self._add_moments(piece)
            self._levels[0] = np.concatenate([self._levels[0], piece])
            self._compact()

    def _add_moments(self, piece: Array) -> None:
        """Update the moments by those of two parts (Chan, Golub and LeVeque, 1979)."""
        piece_mean = float(piece.mean())
        piece_squares = float(((piece - piece_mean) ** 2).sum())
        total = self.count + len(piece)
        difference = piece_mean - self.mean
        self.mean += difference * len(piece) / total
        self.squares += piece_squares + difference**2 * self.count * len(piece) / total
        self.low = min(self.low, float(piece.min()))
        self.high = max(self.high, float(piece.max()))
        self.count = total

    def _compact(self) -> None:
        """Move every second value of full levels to the next one."""
        for level, values in enumerate(self._levels):  # the list may grow in this loop
            if len(values) <= self.capacity:
                continue
            values = np.sort(values)
            num_paired = len(values) // 2 * 2
            first = int(self._keep_odd[level])
            moved = values[first:num_paired:2]
            if level + 1 == len(self._levels):
                self._levels.append(np.zeros(0))
                self._keep_odd.append(False)
            self._levels[level] = values[num_paired:]
            self._levels[level + 1] = np.concatenate([self._levels[level + 1], moved])
            self._keep_odd[level] = not self._keep_odd[level]

    def weighted(self) -> tuple[Array, Array]:
        """The values of the sketch, and their weights.

        The weight of a value is the number of added values that it stands for. The weights sum to
        `count`.
        """
        weights = [np.full(len(values), 2.0**level) for level, values in enumerate(self._levels)]
        return np.concatenate(self._levels), np.concatenate(weights)

    def to_arrays(self) -> dict[str, Array]:
        """Convert the whole sketch to arrays, for `from_arrays`."""
        # Beside the moments, the array holds the smallest and largest value and the capacity.
        moments = [self.count, self.low, self.high, self.mean, self.squares, self.capacity]
        arrays = {
            "moments": np.array(moments, np.float64),
            "keep_odd": np.array(self._keep_odd),
        }
        for level, values in enumerate(self._levels):
            arrays[f"level {level}"] = values
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> "QuantileSketch":
        """Restore what `to_arrays` converted. Raises KeyError or ValueError for other arrays."""
        # `*_` passes over further numbers; `to_arrays` writes none.
        count, low, high, mean, squares, capacity, *_ = arrays["moments"].tolist()
        sketch = QuantileSketch(int(capacity))
        sketch.count = int(count)
        sketch.low = low
        sketch.high = high
        sketch.mean = mean
        sketch.squares = squares
        sketch._keep_odd = arrays["keep_odd"].tolist()
        sketch._levels = [arrays[f"level {level}"] for level in range(len(sketch._keep_odd))]
        return sketch


def weighted_quantile(values: Array, weights: Array, quantile: float) -> float:
    """Compute a quantile of values [N] with weights [N].

    A weight says how much its value counts. A quantile that falls between two of the values is
    interpolated linearly between them. Equal weights give `numpy.quantile`.

    Example:
        >>> weighted_quantile(np.array([1.0, 2.0, 3.0]), np.ones(3), 0.5)
        2.0
    """
    order = np.argsort(values, kind="stable")
    sorted_weights = weights[order]
    rank = np.cumsum(sorted_weights) - sorted_weights / 2  # the middle of each value's weight
    rank = (rank - rank[0]) / max(rank[-1] - rank[0], np.finfo(float).tiny)
    return float(np.interp(quantile, rank, values[order]))
