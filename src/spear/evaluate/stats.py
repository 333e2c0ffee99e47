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

    @property
    def half_width(self) -> float:
        """Half the interval's width: the number is known to about ± this."""
        return (self.high - self.low) / 2


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval, which stays inside [0, 1] and is honest at 0 and n.

    >>> e = wilson(8, 10); round(e.value, 3), round(e.low, 3), round(e.high, 3)
    (0.8, 0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson: {successes} successes of {n}")
    return Estimate(successes / n, *_score_interval(successes / n, n), n)


def wilson_mean(counts: Sequence[tuple[int, int]]) -> Estimate:
    """The mean of several proportions, each counting the same, from (successes, n) of each.

    Wilson's interval at the number of samples that a single proportion would need for the same largest
    variance, F² / Σ 1/n for F proportions: with equal n the interval of all samples together, and since
    proportions that differ vary less than that, never too narrow (our choice). With very unequal n it can be
    a little.
    """
    rates = [wilson(k, n).value for k, n in counts]
    if not rates:
        raise ValueError("wilson_mean: no proportions")
    mean = float(np.mean(rates))
    effective = len(counts) ** 2 / sum(1 / n for _, n in counts)
    return Estimate(mean, *_score_interval(mean, effective), sum(n for _, n in counts))


def samples_for(half_width: float, rate: float = 0.5) -> int:
    """The smallest n at which Wilson's interval around `rate` is at most ±half_width wide.

    >>> samples_for(0.05), samples_for(0.05, 0.9)
    (381, 140)
    """
    if not 0 < half_width < 0.5 or not 0 <= rate <= 1:
        raise ValueError(f"samples_for: ±{half_width} around {rate}")
    low, high = 0, 1
    while _half_width(rate, high) > half_width:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _half_width(rate, middle) <= half_width else (middle, high)
    return high


def paired_difference(first: Sequence[bool], second: Sequence[bool]) -> Estimate:
    """The difference of two success rates, first - second, measured on the same scenes.

    Agresti and Min (2005): a Wald interval after adding half a scene to each cell of the 2x2 table, which
    covers well for few scenes. Pairing removes the differences between scenes, so that it needs far fewer of
    them than two separate intervals do.
    """
    return paired_mean_difference([(first, second)])


def paired_mean_difference(strata: Sequence[tuple[Sequence[bool], Sequence[bool]]]) -> Estimate:
    """The mean over strata (task families), each counting the same, of the paired differences first - second.

    As `paired_difference` for each, whose variances add up; the half scene per cell is spread over the strata
    (our choice), so that one stratum gives the interval of Agresti and Min.
    """
    if not strata:
        raise ValueError("paired_mean_difference: no strata")
    values, centres, variance, n = [], [], 0.0, 0
    extra = 0.5 / len(strata)
    for first, second in strata:
        a, b = np.asarray(first, bool), np.asarray(second, bool)
        if a.shape != b.shape or a.size == 0:
            raise ValueError(f"paired_difference: {a.size} scenes against {b.size}")
        total = a.size + 4 * extra
        wins, losses = ((a & ~b).sum() + extra) / total, ((~a & b).sum() + extra) / total
        values.append(a.mean() - b.mean())
        centres.append(wins - losses)
        variance += (wins + losses - (wins - losses) ** 2) / total / len(strata) ** 2
        n += a.size
    centre, half = float(np.mean(centres)), float(Z95 * np.sqrt(variance))
    return Estimate(float(np.mean(values)), max(-1.0, centre - half), min(1.0, centre + half), n)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test, from the scenes that only one of two policies solved.

    Under the null hypothesis either is as likely to be that one, in every family: so counts may be summed
    over families, which is the exact stratified test.

    >>> mcnemar(8, 1), mcnemar(3, 3)
    (0.0390625, 1.0)
    """
    from scipy.stats import binom

    if only_first < 0 or only_second < 0:
        raise ValueError(f"mcnemar: {only_first} and {only_second} scenes")
    n = only_first + only_second
    return float(min(1.0, 2 * binom.cdf(min(only_first, only_second), n, 0.5))) if n else 1.0


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


def _score_interval(p: float, n: float) -> tuple[float, float]:
    """Wilson's interval around a proportion p of n samples."""
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return float(max(0.0, min(p, centre - half))), float(min(1.0, max(p, centre + half)))


def _half_width(rate: float, n: int) -> float:
    low, high = _score_interval(rate, n)
    return (high - low) / 2
