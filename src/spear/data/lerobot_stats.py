"""Statistics of features as LeRobot keeps them: per episode, and over the dataset.

min, max, mean, std, count and the 1, 10, 50, 90 and 99 % quantiles of each component. Those of an image are
per channel, of pixel values in 0 … 1, over some frames of each episode. LeRobot averages the quantiles of
episodes into those of the dataset; ours are the quantiles of the rows themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spear.types import Array

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
MOST_ROWS = 1 << 20
"""Rows that are kept for the quantiles; of more, every second, fourth … is (our choice)."""
MOST_FRAMES = 100
"""Frames of an episode that are looked at, spread over it (our choice; LeRobot takes about as many)."""

Stats = dict[str, Array]


class Rows:
    """Statistics of a feature of numbers, over all rows added."""

    def __init__(self) -> None:
        self._parts: list[Stats] = []
        self._kept: list[Array] = []
        self._stride, self._seen = 1, 0

    def add(self, values: Array) -> Stats:
        """Statistics of one episode's rows [T, d]."""
        stats = {
            "min": values.min(0),
            "max": values.max(0),
            "mean": values.mean(0, dtype=np.float64),
            "std": values.std(0, dtype=np.float64),
            "count": np.array([len(values)]),
            **_quantiles(values),
        }
        self._parts.append({name: stats[name] for name in ("min", "max", "mean", "std", "count")})
        self._kept.append(values[-self._seen % self._stride :: self._stride])
        self._seen += len(values)
        if sum(map(len, self._kept)) > MOST_ROWS:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._stride *= 2
        return stats

    def total(self) -> Stats:
        """Statistics of everything added."""
        return {**_merge(self._parts), **_quantiles(np.concatenate(self._kept))}


class Images:
    """Statistics of a camera, by a histogram of its pixel values."""

    def __init__(self) -> None:
        self._histogram = np.zeros((3, 256), np.int64)
        self._frames = 0

    def add(self, images: list[Array]) -> Stats:
        """Statistics of some frames [h, w, 3] uint8 of one episode."""
        histogram = np.stack(
            [sum(np.bincount(image[..., c].reshape(-1), minlength=256) for image in images) for c in range(3)]
        )
        self._histogram += histogram
        self._frames += len(images)
        return _of_histogram(histogram, len(images))

    def total(self) -> Stats:
        """Statistics of everything added."""
        return _of_histogram(self._histogram, self._frames)


def frames_to_sample(length: int) -> Array:
    """The steps of an episode whose images count."""
    return np.unique(np.linspace(0, length - 1, min(length, MOST_FRAMES)).round().astype(int))


def _quantiles(values: Array) -> Stats:
    found = np.quantile(values.astype(np.float64), list(QUANTILES.values()), axis=0)
    return dict(zip(QUANTILES, found, strict=True))


def _merge(parts: list[Stats]) -> Stats:
    """Statistics of several sets of rows together, from those of each."""
    count = np.array([part["count"] for part in parts], np.float64)  # [E, 1]
    mean = np.sum([p["mean"] * p["count"] for p in parts], axis=0) / count.sum()
    square = np.sum([(p["std"] ** 2 + (p["mean"] - mean) ** 2) * p["count"] for p in parts], axis=0)
    return {
        "min": np.min([p["min"] for p in parts], axis=0),
        "max": np.max([p["max"] for p in parts], axis=0),
        "mean": mean,
        "std": np.sqrt(square / count.sum()),
        "count": np.array([int(count.sum())]),
    }


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
