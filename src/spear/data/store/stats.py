"""Statistics of features as LeRobot keeps them: per episode, and over the dataset.

min, max, mean, std, count and the 1, 10, 50, 90 and 99 % quantiles of each component. Those of an image are
per channel, of pixel values in 0 … 1, over some frames of each episode. LeRobot averages the quantiles of
episodes into those of the dataset; ours are the quantiles of the rows themselves.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        self._count = 0
        self._low: Array = np.array(np.inf)
        self._high: Array = np.array(-np.inf)
        self._mean: Array = np.array(0.0)
        self._squares: Array = np.array(0.0)
        self._kept: list[Array] = []
        self._stride = 1

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
    """What some of a camera's images in an episode look like.

    size (height, width) in pixels; histogram [3, 256] of the values of each channel in so many frames.
    """

    size: tuple[int, int]
    histogram: Array
    frames: int


def sample_images(episode: Episode) -> dict[str, ImageSample]:
    """Some images of each camera of an episode, spread over it.

    Raises SpearError, naming it, for an image that is broken or of another size than the others.
    """
    samples = {}
    for camera, images in episode.images.items():
        histogram = np.zeros((3, 256), np.int64)
        size: tuple[int, int] | None = None
        steps = np.unique(np.linspace(0, len(images) - 1, min(len(images), MOST_FRAMES)).round().astype(int))
        for step in steps.tolist():
            where = f"{episode.source} step {step} camera {camera!r}"
            image = decode_image(images[step], where)
            size = size or (image.shape[0], image.shape[1])
            if image.shape[:2] != size:
                (h, w), (h0, w0) = image.shape[:2], size
                raise SpearError(f"image sizes differ: {where} is {w} x {h} pixels, the first {w0} x {h0}")
            histogram += [np.bincount(image[..., c].reshape(-1), minlength=256) for c in range(3)]
        assert size is not None  # an episode has steps
        samples[camera] = ImageSample(size, histogram, len(steps))
    return samples


class ImageStats:
    """Statistics of a camera, by a histogram of its pixel values."""

    def __init__(self) -> None:
        self.histogram = np.zeros((3, 256), np.int64)
        self.frames = 0

    def add(self, seen: ImageSample) -> Stats:
        """Take in what was seen of one episode; returns its own statistics."""
        self.histogram = self.histogram + seen.histogram
        self.frames += seen.frames
        return _of_histogram(seen.histogram, seen.frames)

    def total(self) -> Stats:
        """Statistics of everything added."""
        return _of_histogram(self.histogram, self.frames)


def _quantiles(values: Array) -> Stats:
    found = np.quantile(values.astype(np.float64), list(QUANTILES.values()), axis=0)
    return dict(zip(QUANTILES, found, strict=True))


def _of_histogram(histogram: Array, frames: int) -> Stats:
    """[3, 1, 1] statistics from how often each of the 256 values occurs in each channel [3, 256]."""
    level = np.arange(256) / 255
    share = histogram / histogram.sum(1, keepdims=True)
    mean = share @ level
    below = np.cumsum(share, axis=1)
    quantiles = {name: level[np.minimum((below < q - 1e-12).sum(1), 255)] for name, q in QUANTILES.items()}
    stats = {
        "min": level[(histogram > 0).argmax(1)],
        "max": level[255 - (histogram[:, ::-1] > 0).argmax(1)],
        "mean": mean,
        "std": np.sqrt(np.maximum(share @ level**2 - mean**2, 0)),
        **quantiles,
    }
    shaped = {name: values.reshape(3, 1, 1) for name, values in stats.items()}
    return {
        **{name: shaped[name] for name in ("min", "max", "mean", "std")},
        "count": np.array([frames]),
        **{name: shaped[name] for name in QUANTILES},
    }


def to_json(stats: Stats) -> dict[str, Any]:
    """The statistics as lists."""
    return {name: values.tolist() for name, values in stats.items()}


def read_stats(folder: Path) -> dict[str, Stats]:
    """feature -> statistics of a LeRobot dataset: min, max, mean, std and count; v3.0 has quantiles as well.

    Version 2.1 keeps them for each episode: they are put together here. Empty where the dataset has none.
    Raises SpearError, naming the file, for one that is not in order.
    """
    whole, each = folder / "meta/stats.json", folder / "meta/episodes_stats.jsonl"
    file = whole if whole.is_file() else each
    try:
        if file == whole:
            return {name: _arrays(stats) for name, stats in json.loads(file.read_text()).items()}
        if not file.is_file():
            return {}
        parts: dict[str, list[Stats]] = {}
        for line in file.read_text().splitlines():
            for name, stats in json.loads(line)["stats"].items() if line.strip() else ():
                parts.setdefault(name, []).append(_arrays(stats))
        return {name: _together(stats) for name, stats in parts.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise SpearError(f"unreadable: {file}: {reason}; copy the dataset again") from error


def _arrays(stats: Mapping[str, Any]) -> Stats:
    return {name: np.asarray(values, np.float64) for name, values in stats.items()}


def _together(parts: Sequence[Stats]) -> Stats:
    """Statistics of all rows from those of the episodes."""
    count = np.array([float(p["count"].reshape(-1)[0]) for p in parts])
    means, deviations = (np.stack([p[name] for p in parts]) for name in ("mean", "std"))
    mean = np.average(means, axis=0, weights=count)
    square = np.average(deviations**2 + (means - mean) ** 2, axis=0, weights=count)
    return {
        "min": np.min([p["min"] for p in parts], axis=0),
        "max": np.max([p["max"] for p in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(square),
        "count": np.array([count.sum()]),
    }
