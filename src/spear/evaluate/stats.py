"""Intervals: how far a measured number may be from the true one. All intervals are 95 %."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.types import Array

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the number of samples (or clusters) behind it."""

    value: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval, which stays inside [0, 1] and is honest at 0 and n.

    >>> e = wilson(8, 10); round(e.value, 3), round(e.low, 3), round(e.high, 3)
    (0.8, 0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson: {successes} successes of {n}")
    p = successes / n
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return Estimate(p, float(max(0.0, min(p, centre - half))), float(min(1.0, max(p, centre + half))), n)


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """The difference of two success rates, first - second, measured on the same scenes.

    Agresti and Min (2005): a Wald interval after adding half a scene to each cell of the 2x2 table, which
    covers well for few scenes. Pairing removes the differences between scenes, so that it needs far fewer of
    them than two separate intervals do.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or a.size == 0:
        raise ValueError(f"paired_difference: {a.size} scenes against {b.size}")
    n = a.size
    only_first, only_second = int((a & ~b).sum()) + 0.5, int((~a & b).sum()) + 0.5
    total = n + 2.0
    centre = (only_first - only_second) / total
    half = Z95 * np.sqrt((only_first + only_second) - (only_first - only_second) ** 2 / total) / total
    return Estimate(
        float(a.mean() - b.mean()), float(max(-1.0, centre - half)), float(min(1.0, centre + half)), n
    )


def bootstrap(
    groups: Sequence[Array],
    statistic: Callable[[Array], Any] = np.median,
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """A statistic of all values with a percentile-bootstrap interval that resamples whole groups.

    groups  one array of values per independent unit (an image, an episode). Values of one unit hang together,
            so that resampling single values would give intervals that are too narrow.
    """
    units = [np.asarray(g, np.float64).ravel() for g in groups if np.size(g)]
    if not units:
        raise ValueError("bootstrap: no values")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(units), size=(resamples, len(units)))
    replicas = [float(statistic(np.concatenate([units[i] for i in draw]))) for draw in draws]
    low, high = np.percentile(replicas, [2.5, 97.5])
    return Estimate(float(statistic(np.concatenate(units))), float(low), float(high), len(units))
