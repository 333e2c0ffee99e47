"""Estimates with 95 % confidence intervals: how far a measured number may be from the true one.

- Proportions have Wilson's score interval.
- Differences on the same scenes have the interval of Bonett and Price (2012).
- Everything else has a bootstrap interval that resamples whole images or episodes.
- A recipe that was trained with several seeds and scored on the same scenes each time depends on
  two draws, of seeds and of scenes. The variance of its mean is the variance over seeds plus that
  over scenes minus what both contain (a two-way analysis of variance, as Cameron, Gelbach and
  Miller (2011) cluster by two things at once), with Student's t at Satterthwaite's degrees of
  freedom.

The last interval is wide when the seeds disagree. It is never narrower than if all episodes were
independent (our choice), because a variance from three seeds can be small by chance. With two seeds
it is also never narrower than the interval over the seeds alone, because two seeds often agree by
chance, and Satterthwaite's degrees of freedom are large then. With one seed it describes that one
training only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.types import Array

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal
MIN_BOOTSTRAP_UNITS = (
    6  # of five, even the range from minimum to maximum misses the median in over 5 %
)
NUM_BOOTSTRAP_DRAWS = 1000


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

    def to_text(self, format_spec: str, scale: float = 1.0, unit: str = "") -> str:
        """Format the number and its interval; without an interval, the number and n.

        Args:
            format_spec: Format specification of each number, for example ".1f".
            scale: Factor on each number, for example 100 for percent.
            unit: Text behind the number.

        Example:
            >>> Estimate(0.8, 0.49, 0.943, 10).to_text(".1f", 100)
            '80.0 [49.0, 94.3]'
        """
        value = format(scale * self.value, format_spec)
        if math.isnan(self.low):
            return f"{value}{unit} (n = {self.n})"
        low = format(scale * self.low, format_spec)
        high = format(scale * self.high, format_spec)
        return f"{value}{unit} [{low}, {high}]"


def estimate_proportion(successes: int, n: int) -> Estimate:
    """Estimate a proportion with Wilson's score interval, which stays inside [0, 1] and is honest
    at 0 and n.

    Example:
        >>> e = estimate_proportion(8, 10)
        >>> round(e.value, 3), round(e.low, 3), round(e.high, 3)
        (0.8, 0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"estimate_proportion: {successes} successes of {n}")
    proportion = successes / n
    low, high = _wilson_interval(proportion, n)
    return Estimate(proportion, low, high, n)


def estimate_mean_proportion(counts: Sequence[tuple[int, int]]) -> Estimate:
    """Estimate the mean of several proportions, each with the same weight, from (successes, n) of
    each.

    The interval is Wilson's at the number of samples that a single proportion would need for the
    same largest variance, F² / Σ 1/n for F proportions (our choice). With equal n it is the
    interval of all samples together. Proportions that differ vary less than that, so it is never
    too narrow; with very unequal n it can be slightly too narrow.
    """
    mean = float(np.mean([estimate_proportion(successes, n).value for successes, n in counts]))
    effective_n = len(counts) ** 2 / sum(1 / n for _, n in counts)
    low, high = _wilson_interval(mean, effective_n)
    return Estimate(mean, low, high, sum(n for _, n in counts))


def find_num_samples(half_width: float, rate: float = 0.5) -> int:
    """Find the smallest n at which Wilson's interval around `rate` is at most ±half_width wide.

    Example:
        >>> find_num_samples(0.05), find_num_samples(0.05, 0.9)
        (381, 141)
    """
    n = 1
    while np.ptp(_wilson_interval(rate, n)) > 2 * half_width:
        n += 1
    return n


def estimate_paired_difference(
    strata: Sequence[tuple[Sequence[bool], Sequence[bool]]],
) -> tuple[Estimate, float]:
    """Estimate the difference of two success rates, first - second, on the same scenes.

    Bonett and Price (2012): a Wald interval after adding one scene to those that only the first
    solved and one to those that only the second solved, which covers well for few scenes. Both are
    spread over the strata, whose variances add up (our choice). p is of the same statistic, so that
    it is below 0.05 exactly where the interval excludes zero: in simulations, for 0.4 to 6 % of
    pairs of equals, on 5 to 381 scenes. Pairing removes the differences between scenes, so that far
    fewer scenes are needed.

    Args:
        strata: Per task family, each with the same weight: the successes of the first and of the
            second, in the same order of scenes.

    Returns:
        The difference, and its two-sided p-value.
    """
    if not strata:
        raise ValueError("estimate_paired_difference: no strata")
    differences = []
    centers = []
    variance = 0.0
    n = 0
    extra = 1 / len(strata)
    for first, second in strata:
        a = np.asarray(first)
        b = np.asarray(second)
        if a.dtype != bool or b.dtype != bool or a.shape != b.shape or not a.size:
            raise ValueError(
                f"estimate_paired_difference: {a.dtype} {a.shape} against {b.dtype} {b.shape}"
            )
        total = a.size + 2 * extra
        wins = ((a & ~b).sum() + extra) / total
        losses = ((~a & b).sum() + extra) / total
        differences.append(a.mean() - b.mean())
        centers.append(wins - losses)
        variance += (wins + losses - (wins - losses) ** 2) / total / len(strata) ** 2
        n += a.size

    center = float(np.mean(centers))
    error = math.sqrt(variance)
    low = max(-1.0, center - Z95 * error)
    high = min(1.0, center + Z95 * error)
    p = math.erfc(abs(center) / error / math.sqrt(2))
    return Estimate(float(np.mean(differences)), low, high, n), p


def bootstrap(groups: Sequence[Array], statistic: Callable[[Array], Any] = np.median) -> Estimate:
    """Estimate a statistic of all values by a percentile bootstrap that resamples whole groups.

    With few groups the interval is widened (Hesterberg, 2015). The interval of booleans is Wilson's
    at the number of samples that would vary as much if they were independent (Korn and Graubard,
    1998), because near 0 and 1 the draws differ too little; where all values are alike, that number
    is the number of groups.

    Args:
        groups: One array of values per independent unit (an image, an episode). Values of one unit
            depend on each other, so that resampling single values would give intervals that are too
            narrow.
        statistic: What is estimated: the mean or the median.

    Returns:
        The estimate; its n is the number of groups. With fewer than `MIN_BOOTSTRAP_UNITS` groups
        the ends of the interval are NaN.
    """
    units = [np.asarray(group, np.float64).ravel() for group in groups if np.size(group)]
    value = float(statistic(np.concatenate(units)))
    num_units = len(units)
    if num_units < MIN_BOOTSTRAP_UNITS:
        return Estimate(value, math.nan, math.nan, num_units)

    if all(np.asarray(group).dtype == bool for group in groups):
        low, high = _clustered_wilson_interval(value, units)
    else:
        low, high = _percentile_interval(units, statistic)
    return Estimate(value, low, high, num_units)


def estimate_mean_over_seeds(strata: Sequence[Array]) -> Estimate:
    """Estimate mean success over training seeds and scenes.

    Args:
        strata: Per task family, each with the same weight: success [seeds, scenes] bool.
    """
    tables = _to_success_tables(strata)
    mean, half_width = _crossed_interval(tables)
    counts = [(int(table.sum()), table.size) for table in tables]
    return _widen(mean, half_width, estimate_mean_proportion(counts), lower_bound=0.0)


def estimate_difference_over_seeds(first: Sequence[Array], second: Sequence[Array]) -> Estimate:
    """Estimate mean success of `first` minus that of `second` on the same scenes.

    The arguments are as in `estimate_mean_over_seeds`; seeds and scenes are paired by their order.
    """
    a = _to_success_tables(first)
    b = _to_success_tables(second)
    shapes_a = [table.shape for table in a]
    shapes_b = [table.shape for table in b]
    if shapes_a != shapes_b:
        raise ValueError(f"difference: {shapes_a} against {shapes_b}")

    mean, half_width = _crossed_interval([x.astype(float) - y for x, y in zip(a, b, strict=True)])
    pairs = [(x.ravel().tolist(), y.ravel().tolist()) for x, y in zip(a, b, strict=True)]
    independent, _ = estimate_paired_difference(pairs)
    return _widen(mean, half_width, independent, lower_bound=-1.0)


def _wilson_interval(p: float, n: float) -> tuple[float, float]:
    """Wilson's interval around a proportion p of n samples.

    Written out because n may be an effective number of samples, which is not an integer (SciPy's
    `binomtest` takes integers only).
    """
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    return float(max(0.0, min(p, center - half))), float(min(1.0, max(p, center + half)))


def _student_t95(degrees_of_freedom: float) -> float:
    """The 97.5 % quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.975))


def _clustered_wilson_interval(rate: float, units: Sequence[Array]) -> tuple[float, float]:
    """Wilson's interval at the effective number of samples in units of 0 and 1 (Korn and Graubard,
    1998).
    """
    num_units = len(units)
    n = sum(len(unit) for unit in units)
    if n <= num_units:
        return _wilson_interval(rate, n)

    squared_deviations = sum((unit - rate).sum() ** 2 for unit in units)
    effective_n: float = num_units
    if squared_deviations:
        independent_variance = rate * (1 - rate) * n**2 * (num_units - 1) / num_units
        few_units = (Z95 / _student_t95(num_units - 1)) ** 2
        effective_n = independent_variance / squared_deviations * few_units
    return _wilson_interval(rate, min(n, effective_n))


def _percentile_interval(
    units: Sequence[Array], statistic: Callable[[Array], Any]
) -> tuple[float, float]:
    """A percentile-bootstrap interval that resamples units; wider for few of them (Hesterberg,
    2015).
    """
    from scipy.special import ndtr

    num_units = len(units)
    rng = np.random.default_rng(0)
    draws = rng.integers(num_units, size=(NUM_BOOTSTRAP_DRAWS, num_units))
    replicas = []
    for draw in draws:
        replicas.append(float(statistic(np.concatenate([units[index] for index in draw]))))

    widening = math.sqrt(num_units / (num_units - 1)) * _student_t95(num_units - 1)
    tail = 100 * ndtr(-widening)
    with np.errstate(invalid="ignore"):  # between two infinite values
        ends = np.percentile(replicas, [tail, 100 - tail])
    low, high = np.nan_to_num(ends, nan=np.inf, posinf=np.inf)
    return float(low), float(high)


def _to_success_tables(strata: Sequence[Array]) -> list[Array]:
    """Convert strata to arrays [seeds, scenes] of bool with the same number of seeds.

    Raises `ValueError` if they are something else.
    """
    tables = [np.asarray(table) for table in strata]
    if not tables or not all(_is_success_table(table, len(tables[0])) for table in tables):
        kinds = [(table.dtype, table.shape) for table in tables]
        raise ValueError(f"Give bool tables [seeds, scenes] with equally many seeds, not {kinds}.")
    return tables


def _is_success_table(table: Array, num_seeds: int) -> bool:
    return table.dtype == bool and table.ndim == 2 and table.size > 0 and len(table) == num_seeds


def _crossed_interval(tables: Sequence[Array]) -> tuple[float, float]:
    """The mean of the tables' means and half its interval; the tables are [seeds, scenes]."""
    num_seeds = len(tables[0])
    num_tables = len(tables)
    mean = float(np.mean([table.mean() for table in tables]))

    variance_over_seeds = 0.0
    if num_seeds > 1:
        seed_means = np.mean([table.mean(1) for table in tables], axis=0)
        variance_over_seeds = float(seed_means.var(ddof=1)) / num_seeds

    variance_over_scenes = 0.0
    variance_in_both = 0.0
    for table in tables:
        num_scenes = table.shape[1]
        if num_scenes == 1:
            continue
        scene_means = table.mean(0)
        variance_over_scenes += float(scene_means.var(ddof=1)) / num_scenes / num_tables**2
        if num_seeds > 1:
            residual = table - table.mean(1, keepdims=True) - scene_means + table.mean()
            freedom = (num_seeds - 1) * (num_scenes - 1)
            variance_in_both += float((residual**2).sum()) / freedom / table.size / num_tables**2

    variance = max(
        variance_over_seeds + variance_over_scenes - variance_in_both,
        variance_over_seeds,
        variance_over_scenes,
    )
    if variance == 0:
        return mean, 0.0

    scene_freedom = sum(table.shape[1] - 1 for table in tables)
    spread_over_seeds = variance_over_seeds**2 / max(num_seeds - 1, 1)
    spread_over_scenes = variance_over_scenes**2 / max(scene_freedom, 1)
    degrees_of_freedom = max(1.0, variance**2 / (spread_over_seeds + spread_over_scenes))
    half_width = _student_t95(degrees_of_freedom) * np.sqrt(variance)
    if num_seeds == 2:
        half_width = max(half_width, _student_t95(1) * np.sqrt(variance_over_seeds))
    return mean, float(half_width)


def _widen(value: float, half_width: float, independent: Estimate, lower_bound: float) -> Estimate:
    """The wider of value ± half_width and another interval, cut off at `lower_bound` and 1."""
    low = min(value - half_width, independent.low)
    high = max(value + half_width, independent.high)
    return Estimate(value, max(lower_bound, low), min(1.0, high), independent.n)
