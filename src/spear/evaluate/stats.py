"""How far a measured number may be from the true one. All intervals are 95 %.

Proportions have Wilson's interval, differences on the same scenes that of Bonett and Price (2012), anything
else a bootstrap. Where a recipe was trained with several seeds and scored on the same scenes each time, two
things are drawn by chance: the variance of the mean is that over seeds plus that over scenes minus what both
contain (a two-way analysis of variance, as Cameron, Gelbach and Miller (2011) cluster by two things at once),
with Student's t at Satterthwaite's degrees of freedom. That interval is wide when three seeds disagree, and
never narrower than if all episodes were independent (our choice: a variance from three seeds can be small by
chance), with two seeds nor than over them alone: they often agree by chance, which makes these degrees of
freedom many. With one seed it speaks of that one training only.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.types import Array

Z95 = 1.959963984540054
"""The 97.5 % quantile of the standard normal."""
MIN_BOOTSTRAP_UNITS = 6
"""Units that a bootstrap needs: of five, not even the range from least to most holds the median in 95 %."""


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

    def to_text(self, form: str, scale: float = 1.0, unit: str = "") -> str:
        """As text, each number times `scale` in this format, `unit` behind the first.

        >>> Estimate(0.8, 0.49, 0.943, 10).to_text(".1f", 100)
        '80.0 [49.0, 94.3]'
        """
        value, low, high = (
            format(scale * number, form) for number in (self.value, self.low, self.high)
        )
        return value + unit + (f" (n = {self.n})" if math.isnan(self.low) else f" [{low}, {high}]")


def estimate_proportion(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval, which stays inside [0, 1] and is honest at 0 and n.

    >>> e = wilson(8, 10); round(e.value, 3), round(e.low, 3), round(e.high, 3)
    (0.8, 0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"wilson: {successes} successes of {n}")
    return Estimate(successes / n, *_score_interval(successes / n, n), n)


def estimate_mean_proportion(counts: Sequence[tuple[int, int]]) -> Estimate:
    """The mean of several proportions, each counting the same, from (successes, n) of each.

    Wilson's interval at the number of samples that a single proportion would need for the same largest
    variance, F² / Σ 1/n for F proportions: with equal n the interval of all samples together, and since
    proportions that differ vary less than that, never too narrow (our choice). With very unequal n it can be
    a little.
    """
    mean = float(np.mean([estimate_proportion(k, n).value for k, n in counts]))
    effective = len(counts) ** 2 / sum(1 / n for _, n in counts)
    return Estimate(mean, *_score_interval(mean, effective), sum(n for _, n in counts))


def find_num_samples(half_width: float, rate: float = 0.5) -> int:
    """The smallest n at which Wilson's interval around `rate` is at most ±half_width wide.

    >>> samples_for(0.05), samples_for(0.05, 0.9)
    (381, 141)
    """
    return next(n for n in itertools.count(1) if np.ptp(_score_interval(rate, n)) <= 2 * half_width)


def estimate_paired_difference(
    strata: Sequence[tuple[Sequence[bool], Sequence[bool]]],
) -> tuple[Estimate, float]:
    """The difference of two success rates, first - second, on the same scenes, and its two-sided p-value.

    strata  of task families, each counting the same: the successes of the first and of the second.

    Bonett and Price (2012): a Wald interval after adding one scene to those that only the first solved and
    one to those that only the second did, which covers well for few scenes. Both are spread over the strata,
    whose variances add up (our choice). p is of the same statistic, so that it is below 0.05 exactly where
    the interval leaves out zero: in simulations, for 0.4 to 6 % of pairs of equals, on 5 to 381 scenes.
    Pairing removes the differences between scenes, so that far fewer are needed.
    """
    if not strata:
        raise ValueError("paired_difference: no strata")
    values, centres, variance, n = [], [], 0.0, 0
    extra = 1 / len(strata)
    for first, second in strata:
        a, b = np.asarray(first), np.asarray(second)
        if a.dtype != bool or b.dtype != bool or a.shape != b.shape or not a.size:
            raise ValueError(f"paired_difference: {a.dtype} {a.shape} against {b.dtype} {b.shape}")
        total = a.size + 2 * extra
        wins, losses = ((a & ~b).sum() + extra) / total, ((~a & b).sum() + extra) / total
        values.append(a.mean() - b.mean())
        centres.append(wins - losses)
        variance += (wins + losses - (wins - losses) ** 2) / total / len(strata) ** 2
        n += a.size
    centre, error = float(np.mean(centres)), math.sqrt(variance)
    ends = max(-1.0, centre - Z95 * error), min(1.0, centre + Z95 * error)
    return Estimate(float(np.mean(values)), *ends, n), math.erfc(abs(centre) / error / math.sqrt(2))


def bootstrap(groups: Sequence[Array], statistic: Callable[[Array], Any] = np.median) -> Estimate:
    """A statistic of all values with a percentile-bootstrap interval that resamples whole groups.

    groups  one array of values per independent unit (an image, an episode). Values of one unit depend on each
            other, so that resampling single values would give intervals that are too narrow. Of fewer than
            `FEWEST` there is no interval: its ends are NaN; of few it is wider (Hesterberg, 2015). Of bool it
            is Wilson's, at the number of samples that would vary as much if they were independent (Korn and
            Graubard, 1998): near 0 and 1 draws differ too little. Where all are alike, that of the units.
    """
    from scipy.special import ndtr, stdtrit

    units = [np.asarray(g, np.float64).ravel() for g in groups if np.size(g)]
    value, count = float(statistic(np.concatenate(units))), len(units)
    if count < MIN_BOOTSTRAP_UNITS:
        return Estimate(value, math.nan, math.nan, count)
    wider = stdtrit(count - 1, 0.975)
    if all(np.asarray(g).dtype == bool for g in groups):
        n, off = sum(map(len, units)), sum((u - value).sum() ** 2 for u in units)
        alike = (
            value * (1 - value) * n**2 * (count - 1) / count / off * (Z95 / wider) ** 2
            if off
            else count
        )
        return Estimate(value, *_score_interval(value, min(n, alike) if n > count else n), count)
    draws = np.random.default_rng(0).integers(count, size=(1000, count))
    replicas = [float(statistic(np.concatenate([units[i] for i in draw]))) for draw in draws]
    tail = 100 * ndtr(-math.sqrt(count / (count - 1)) * wider)
    with np.errstate(invalid="ignore"):  # between two infinite values
        low, high = np.nan_to_num(
            np.percentile(replicas, [tail, 100 - tail]), nan=np.inf, posinf=np.inf
        )
    return Estimate(value, float(low), float(high), count)


def estimate_mean_over_seeds(strata: Sequence[Array]) -> Estimate:
    """The mean over strata (task families, each counting the same) of success [seeds, scenes] bool."""
    tables = _checked(strata)
    return _wider(
        _crossed(tables), estimate_mean_proportion([(int(t.sum()), t.size) for t in tables]), 0.0
    )


def estimate_difference_over_seeds(first: Sequence[Array], second: Sequence[Array]) -> Estimate:
    """Mean success of `first` minus that of `second` on the same scenes; arguments as in `mean_over_seeds`,
    seeds and scenes paired by their order."""
    a, b = _checked(first), _checked(second)
    if [x.shape for x in a] != [y.shape for y in b]:
        raise ValueError(f"difference: {[x.shape for x in a]} against {[y.shape for y in b]}")
    crossed = _crossed([x.astype(float) - y for x, y in zip(a, b, strict=True)])
    pairs = [(x.ravel().tolist(), y.ravel().tolist()) for x, y in zip(a, b, strict=True)]
    return _wider(crossed, estimate_paired_difference(pairs)[0], -1.0)


def _score_interval(p: float, n: float) -> tuple[float, float]:
    """Wilson's interval around a proportion p of n samples."""
    centre = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return float(max(0.0, min(p, centre - half))), float(min(1.0, max(p, centre + half)))


def _checked(strata: Sequence[Array]) -> list[Array]:
    tables = [np.asarray(table) for table in strata]
    fits = [t.dtype == bool and t.ndim == 2 and t.size and len(t) == len(tables[0]) for t in tables]
    if not tables or not all(fits):
        raise ValueError(
            f"success of seeds and scenes, bool: {[(t.dtype, t.shape) for t in tables]}"
        )
    return tables


def _crossed(tables: Sequence[Array]) -> tuple[float, float]:
    """The mean of the strata's means and half its interval; the tables are [seeds, scenes]."""
    from scipy.special import stdtrit

    seeds, parts = len(tables[0]), len(tables)
    mean = float(np.mean([table.mean() for table in tables]))
    over_seeds = over_scenes = both = 0.0
    scenes = sum(table.shape[1] - 1 for table in tables)
    if seeds > 1:
        over_seeds = float(np.mean([table.mean(1) for table in tables], axis=0).var(ddof=1)) / seeds
    for table in (table for table in tables if table.shape[1] > 1):
        count = table.shape[1]
        over_scenes += float(table.mean(0).var(ddof=1)) / count / parts**2
        if seeds > 1:
            rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
            both += float((rest**2).sum()) / ((seeds - 1) * (count - 1)) / table.size / parts**2
    variance = max(over_seeds + over_scenes - both, over_seeds, over_scenes)
    if variance == 0:
        return mean, 0.0
    spread = over_seeds**2 / max(seeds - 1, 1) + over_scenes**2 / max(scenes, 1)
    half = stdtrit(max(1.0, variance**2 / spread), 0.975) * np.sqrt(variance)
    alone = stdtrit(1, 0.975) * np.sqrt(over_seeds) if seeds == 2 else 0.0
    return mean, float(max(half, alone))


def _wider(crossed: tuple[float, float], independent: Estimate, least: float) -> Estimate:
    """The wider of both intervals, around the value of the first, cut off at `least` and 1."""
    value, half = crossed
    low, high = min(value - half, independent.low), max(value + half, independent.high)
    return Estimate(value, max(least, low), min(1.0, high), independent.n)
