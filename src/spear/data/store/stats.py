"""Computes statistics of a dataset's features (columns) in the form that LeRobot stores.

The statistics are minimum, maximum, mean, standard deviation, count and five quantiles. LeRobot
stores them per episode and over the dataset. The statistics of images are per channel, of pixel
values in 0 … 1, over some images of each episode. LeRobot averages the quantiles of episodes to get
those of the dataset, whereas this module computes the quantiles of all rows. A row is the value of
a feature at one step.
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
QUANTILE_TOLERANCE = 1e-12  # more than the rounding error of the summed fractions of the pixels
MAX_SAMPLED_IMAGES = 100  # per episode and camera; LeRobot samples about as many
SKETCH_CAPACITY = 16384  # values in a buffer of `QuantileSketch`

Stats = dict[str, Array]
"""The name of each statistic, such as "mean" or "q01" → its values."""


class RowStats:
    """Accumulates the statistics of a numeric feature with d components, over all added rows."""

    def __init__(self) -> None:
        self._sketches: list[QuantileSketch] = []  # one per component
        self._dtype: np.dtype | None = None

    def add(self, values: Array) -> Self:
        """Add the rows [T, d] of an episode, and return this object."""
        self._dtype = values.dtype
        components = values.T  # [d, T]
        if not self._sketches:
            self._sketches = [QuantileSketch() for _ in components]
        for sketch, component_values in zip(self._sketches, components, strict=True):
            sketch.add(component_values)
        return self

    def compute_stats(self) -> Stats:
        """Compute the statistics of all added rows: each is an array [d], but "count" is [1]."""
        sketches = self._sketches
        stats = {
            "min": np.array([sketch.low for sketch in sketches]).astype(self._dtype),
            "max": np.array([sketch.high for sketch in sketches]).astype(self._dtype),
            "mean": np.array([sketch.mean for sketch in sketches]),
            "std": np.array([np.sqrt(sketch.variance) for sketch in sketches]),
            "count": np.array([sketches[0].count]),
        }
        for name, quantile in QUANTILES.items():
            quantiles: list[float] = []
            for sketch in sketches:
                values, weights = sketch.get_values_and_weights()
                quantiles.append(compute_weighted_quantile(values, weights, quantile))
            stats[name] = np.array(quantiles)
        return stats


@dataclass(frozen=True)
class PixelHistograms:
    """The histograms of the three channels of some images, which all have the same size.

    Attributes:
        image_shape: (height, width) of each image in pixels.
        counts: [3, 256] for each channel and each level 0 … 255, the number of pixels of all these
            images. The counts of several `PixelHistograms` can be added.
    """

    image_shape: tuple[int, int]
    counts: Array = field(default_factory=lambda: np.zeros((3, 256), np.int64))

    def compute_stats(self) -> Stats:
        """Compute the statistics of each channel, [3, 1, 1], and "count", the number of images."""
        value = np.arange(256) / 255  # [256] the pixel value 0 … 1 of each level
        fraction = self.counts / self.counts.sum(1, keepdims=True)  # [3, 256] of the pixels
        mean = fraction @ value  # [3]
        variance = fraction @ value**2 - mean**2  # [3]
        has_pixels = self.counts > 0  # [3, 256]
        first_level = has_pixels.argmax(1)  # [3]
        last_level = 255 - has_pixels[:, ::-1].argmax(1)  # [3]
        pixels_per_image = math.prod(self.image_shape)
        num_pixels = self.counts[:1].sum(1)  # [1] of the first channel, the same in each channel
        num_images = num_pixels // pixels_per_image  # [1]
        stats = {
            "min": value[first_level],
            "max": value[last_level],
            "mean": mean,
            "std": np.sqrt(np.maximum(variance, 0)),
            "count": num_images,
        }

        # A quantile is the first level up to which at least this fraction of the pixels lies.
        cumulative_fraction = np.cumsum(fraction, axis=1)  # [3, 256]
        for name, quantile in QUANTILES.items():
            is_below = cumulative_fraction < quantile - QUANTILE_TOLERANCE  # [3, 256]
            quantile_level = is_below.sum(1)  # [3]; the levels below come first
            stats[name] = value[np.minimum(quantile_level, 255)]

        shaped_stats: Stats = {}
        for name, values in stats.items():
            shaped_stats[name] = values if name == "count" else values.reshape(3, 1, 1)
        return shaped_stats


def compute_pixel_histograms(episode: Episode) -> dict[str, PixelHistograms]:
    """Compute the histograms of up to 100 images of each camera, evenly spread over an episode.

    Returns:
        Camera → histograms of its images.

    Raises:
        SpearError: If an image is broken, or has another size than the camera's first one.
    """
    histograms: dict[str, PixelHistograms] = {}
    for camera, images in episode.images.items():
        num_sampled = min(len(images), MAX_SAMPLED_IMAGES)
        steps = np.linspace(0, len(images) - 1, num_sampled).round().astype(int)
        for step in np.unique(steps).tolist():
            description = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(images[step], description)
            height, width = image.shape[:2]
            camera_histograms = histograms.setdefault(camera, PixelHistograms((height, width)))
            check_same_image_shape((height, width), camera_histograms.image_shape, description)
            for channel in range(3):
                levels = image[..., channel].reshape(-1)  # [height * width]
                camera_histograms.counts[channel] += np.bincount(levels, minlength=256)
    return histograms


def check_same_image_shape(
    shape: tuple[int, ...], first_shape: tuple[int, int], description: str
) -> None:
    """Raise SpearError if an image has another size than the first image of its camera.

    Args:
        shape: (height, width) of the image in pixels.
        first_shape: (height, width) of the first image.
        description: The episode, step and camera of the image, for the message.
    """
    if shape == first_shape:
        return
    height, width = shape
    first_height, first_width = first_shape
    raise SpearError(
        f"{description} has {width} x {height} pixels, the first image {first_width} x "
        f"{first_height}. Leave the episode out, or prepare the data with --image-size."
    )


class QuantileSketch:
    """Approximates the quantiles of a stream of numbers in one pass and in bounded memory.

    The sketch (Manku, Rajagopalan and Lindsay, 1998) consists of levels, each with a buffer of
    values. A value on level i stands for 2^i added values. New values enter level 0. When a buffer
    is full, it is sorted and divided into pairs; one value of each pair moves to the next level,
    and the other value is dropped. Whether the smaller or the larger one of each pair moves
    alternates whenever the buffer is full. This is not random, so every run gives the same result.

    Up to `capacity` values, quantiles are exact. Beyond, the error in rank is at most
    (levels - 1) / capacity, which is 0.07 % for 45 million values.

    Attributes:
        capacity: The number of values in a buffer.
        count: The number of added values.
        low: The smallest added value.
        high: The largest added value.
        mean: The mean of all added values, exact.
        squared_deviations: The sum of the squared deviations of all added values from their mean.
    """

    def __init__(self, capacity: int = SKETCH_CAPACITY) -> None:
        self.capacity = capacity
        self.count = 0
        self.low = np.inf
        self.high = -np.inf
        self.mean = 0.0
        self.squared_deviations = 0.0
        self._levels: list[Array] = [np.zeros(0)]  # the buffer of each level
        self._keep_odd = [False]  # per level, whether the larger of each pair moves next time

    @property
    def variance(self) -> float:
        """The variance of all added values, exact."""
        return self.squared_deviations / self.count

    def add(self, values: Array) -> None:
        """Add numbers [N]."""
        values = np.asarray(values, np.float64).reshape(-1)
        for first in range(0, len(values), self.capacity):
            piece = values[first : first + self.capacity]
            self._add_moments(piece)
            self._levels[0] = np.concatenate([self._levels[0], piece])
            self._compact()

    def _add_moments(self, piece: Array) -> None:
        """Merge the moments of new values into the moments of the values that were added before.

        The moments are count, low, high, mean and squared_deviations. The formulas for merging are
        by Chan, Golub and LeVeque (1979).
        """
        piece_mean = float(piece.mean())
        piece_squared_deviations = float(((piece - piece_mean) ** 2).sum())
        total = self.count + len(piece)
        difference = piece_mean - self.mean
        self.mean += difference * len(piece) / total
        self.squared_deviations += (
            piece_squared_deviations + difference**2 * self.count * len(piece) / total
        )
        self.low = min(self.low, float(piece.min()))
        self.high = max(self.high, float(piece.max()))
        self.count = total

    def _compact(self) -> None:
        """Move one value of each pair of a full level to the next level; drop the other one."""
        for level, values in enumerate(self._levels):  # the list may grow in this loop
            if len(values) <= self.capacity:
                continue
            sorted_values = np.sort(values)
            num_paired = len(sorted_values) // 2 * 2  # an odd last value stays in its level
            first = 1 if self._keep_odd[level] else 0
            moved_values = sorted_values[first:num_paired:2]

            is_highest_level = level + 1 == len(self._levels)
            if is_highest_level:
                self._levels.append(np.zeros(0))
                self._keep_odd.append(False)
            self._levels[level] = sorted_values[num_paired:]
            self._levels[level + 1] = np.concatenate([self._levels[level + 1], moved_values])
            self._keep_odd[level] = not self._keep_odd[level]

    def get_values_and_weights(self) -> tuple[Array, Array]:
        """Get the values [N] of the sketch, and their weights [N].

        The weight of a value is the number of added values that it stands for. The weights sum to
        `count`.
        """
        weights = [np.full(len(values), 2.0**level) for level, values in enumerate(self._levels)]
        return np.concatenate(self._levels), np.concatenate(weights)

    def to_arrays(self) -> dict[str, Array]:
        """Convert the sketch to named arrays, from which `from_arrays` restores it."""
        moments = [
            self.count,
            self.low,
            self.high,
            self.mean,
            self.squared_deviations,
            self.capacity,
        ]
        arrays = {
            "moments": np.array(moments, np.float64),
            "keep_odd": np.array(self._keep_odd),
        }
        for level, values in enumerate(self._levels):
            arrays[f"level {level}"] = values
        return arrays

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> "QuantileSketch":
        """Restore a sketch from the arrays that `to_arrays` made of it.

        Raises KeyError or ValueError for any other arrays.
        """
        # `*_` skips a further number, which files of earlier versions have.
        count, low, high, mean, squared_deviations, capacity, *_ = arrays["moments"].tolist()
        sketch = QuantileSketch(int(capacity))
        sketch.count = int(count)
        sketch.low = low
        sketch.high = high
        sketch.mean = mean
        sketch.squared_deviations = squared_deviations
        sketch._keep_odd = arrays["keep_odd"].tolist()
        sketch._levels = [arrays[f"level {level}"] for level in range(len(sketch._keep_odd))]
        return sketch


def compute_weighted_quantile(values: Array, weights: Array, quantile: float) -> float:
    """Compute a quantile of values [N] with weights [N].

    The sorted values get ranks from 0 to 1, whose distances follow from the weights, and the
    quantile is interpolated linearly between the two values next to its rank. With equal weights
    this is `numpy.quantile`.

    Example:
        >>> compute_weighted_quantile(np.array([1.0, 2.0, 3.0]), np.ones(3), 0.5)
        2.0
    """
    order = np.argsort(values, kind="stable")
    sorted_values = values[order]
    sorted_weights = weights[order]
    middle = np.cumsum(sorted_weights) - sorted_weights / 2  # [N] the middle of each value's weight
    span = max(middle[-1] - middle[0], np.finfo(float).tiny)  # not 0 for a single value
    rank = (middle - middle[0]) / span  # [N] from 0 to 1
    return float(np.interp(quantile, rank, sorted_values))
