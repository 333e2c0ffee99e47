"""Estimates with 95 % confidence intervals: how far a measured number may be from the true one.

- Proportions have Wilson's score interval.
- Differences of success on the same scenes have the interval of Bonett and Price (2012).
- Everything else has a bootstrap interval that resamples whole images or episodes.
- A recipe may be trained with several seeds and evaluated on the same scenes each time. Its mean
  success depends on two random draws, of training seeds and of scenes (a *crossed* design). The
  variance of the mean is the variance over seeds, plus the variance over scenes, minus the variance
  that both contain (a two-way analysis of variance; Cameron, Gelbach and Miller (2011) cluster by
  two things at once in the same way). The interval uses Student's t at Satterthwaite's degrees of
  freedom.

The crossed interval is wide if the seeds disagree. It is never narrower than if all episodes were
independent (our choice), because a variance from three seeds can be small by chance. With two seeds
it is also never narrower than the interval over the seeds alone, because two seeds often agree by
chance, and Satterthwaite's degrees of freedom are large then. With one seed, the interval describes
only that one training.

A *stratum* is one task family. Strata have the same weight, however many scenes they have.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.types import Array

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution
# With five units, even the range from minimum to maximum misses the median in over 5 % of cases, so
# no 95 % interval is possible.
MIN_BOOTSTRAP_UNITS = 6
NUM_BOOTSTRAP_DRAWS = 1000  # resampled values of the statistic, of which percentiles are taken


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval.

    value  the estimate.
    low    lower end of the interval; NaN if there are too few samples for an interval.
    high   upper end of the interval; NaN if there are too few samples for an interval.
    n      the number of samples, or of groups of dependent samples.
    """

    value: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval, so that the number is value ± half_width."""
        return (self.high - self.low) / 2

    def to_text(self, format_spec: str, scale: float = 1.0, unit: str = "") -> str:
        """Format the number with its interval, or with n if it has no interval.

        Args:
            format_spec: Format specification of each number, for example ".1f".
            scale: Factor on each number, for example 100 for percent.
            unit: Text after the number.

        Example:
            >>> Estimate(0.8, 0.49, 0.943, 10).to_text(".1f", scale=100)
            '80.0 [49.0, 94.3]'
        """
        value = format(scale * self.value, format_spec)
        if math.isnan(self.low):
            return f"{value}{unit} (n = {self.n})"
        low = format(scale * self.low, format_spec)
        high = format(scale * self.high, format_spec)
        return f"{value}{unit} [{low}, {high}]"


def estimate_proportion(successes: int, n: int) -> Estimate:
    """Estimate a proportion with Wilson's score interval.

    This interval stays inside [0, 1], and has a sensible width also for 0 or n successes.

    Example:
        >>> e = estimate_proportion(8, 10)
        >>> round(e.value, 3), round(e.low, 3), round(e.high, 3)
        (0.8, 0.49, 0.943)
    """
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"{successes} successes of {n} are no proportion")
    proportion = successes / n
    low, high = _compute_wilson_interval(proportion, n)
    return Estimate(proportion, low, high, n)


def estimate_mean_proportion(counts: Sequence[tuple[int, int]]) -> Estimate:
    """Estimate the mean of several proportions, each with the same weight.

    The interval is Wilson's interval of a single proportion with an effective number of samples
    (our choice). For F proportions, this number is F² / Σ 1/n, because a single proportion of that
    many samples has the variance that the mean has if all F proportions are equal.

    If all n are equal, the interval is that of all samples together. It is never too narrow,
    because the mean of different proportions varies less than the mean of equal ones. If the n are
    very unequal, the interval can be slightly too narrow.

    Args:
        counts: (number of successes, n) of each proportion.
    """
    mean = float(np.mean([estimate_proportion(successes, n).value for successes, n in counts]))
    effective_n = len(counts) ** 2 / sum(1 / n for _, n in counts)
    low, high = _compute_wilson_interval(mean, effective_n)
    return Estimate(mean, low, high, sum(n for _, n in counts))


def compute_num_samples(half_width: float, rate: float = 0.5) -> int:
    """Find the smallest n for which Wilson's interval is no wider than 2 · half_width.

    Args:
        half_width: Half the width of the interval.
        rate: The measured proportion.

    Example:
        >>> compute_num_samples(0.05), compute_num_samples(0.05, 0.9)
        (381, 141)
    """
    n = 1
    while np.ptp(_compute_wilson_interval(rate, n)) > 2 * half_width:
        n += 1
    return n


def estimate_first_minus_second_and_p_value(
    strata: Sequence[tuple[Sequence[bool], Sequence[bool]]],
) -> tuple[Estimate, float]:
    """Estimate the difference of two success rates, first - second, on the same scenes.

    Pairing removes the differences between scenes, so that far fewer scenes are needed.

    The interval is that of Bonett and Price (2012): a Wald interval after one scene is added that
    only the first solved, and one that only the second solved. It is accurate also for few scenes.
    With several strata, the two added scenes are spread over all of them, and the strata's
    variances add up (our choice). The p-value belongs to the same statistic, so that it is below
    0.05 exactly if the interval excludes zero. In simulations of two equally good policies, this
    happened in 0.4 to 6 % of the comparisons, on 5 to 381 scenes.

    Args:
        strata: For each task family: the successes of the first and the successes of the second, in
            the same order of scenes.

    Returns:
        The difference, and its two-sided p-value.
    """
    if not strata:
        raise ValueError("estimate_first_minus_second_and_p_value needs at least one stratum")
    differences = []  # of the success rates, per stratum
    centers = []  # of the interval, per stratum
    variance = 0.0  # of the mean of the centers
    n = 0
    num_added = 1 / len(strata)  # scenes added in each stratum to each side
    for first, second in strata:
        a = np.asarray(first)  # [scenes] bool, whether the first succeeded
        b = np.asarray(second)
        has_success_values = a.dtype == bool and b.dtype == bool and a.size > 0
        if not has_success_values or a.shape != b.shape:
            raise ValueError(f"{a.dtype} {a.shape} cannot be compared with {b.dtype} {b.shape}")
        num_scenes = a.size + 2 * num_added  # with the added ones
        num_only_first = (a & ~b).sum()
        num_only_second = (~a & b).sum()
        win_rate = (num_only_first + num_added) / num_scenes
        loss_rate = (num_only_second + num_added) / num_scenes
        differences.append(a.mean() - b.mean())
        centers.append(win_rate - loss_rate)
        # A scene's difference is 1, -1 or 0; this is its variance.
        scene_variance = win_rate + loss_rate - (win_rate - loss_rate) ** 2
        variance += scene_variance / num_scenes / len(strata) ** 2
        n += a.size

    center = float(np.mean(centers))
    standard_error = math.sqrt(variance)
    low = max(-1.0, center - Z95 * standard_error)
    high = min(1.0, center + Z95 * standard_error)
    # Two-sided: the probability that a standard normal number is farther from 0 than z.
    z = abs(center) / standard_error
    p = math.erfc(z / math.sqrt(2))
    return Estimate(float(np.mean(differences)), low, high, n), p


def bootstrap(groups: Sequence[Array], statistic: Callable[[Array], Any] = np.median) -> Estimate:
    """Estimate a statistic of all values by a percentile bootstrap that resamples whole groups.

    With few groups the interval is widened (Hesterberg, 2015).

    If the values are booleans, the interval is Wilson's interval instead, because near 0 and 1 the
    draws of a bootstrap differ too little. Wilson's number of samples is then the number of
    independent samples that would vary as much (Korn and Graubard, 1998), or the number of groups
    if all values are equal.

    Args:
        groups: One array of values per independent unit (an image, an episode). Values of one unit
            depend on each other, so that resampling single values would give intervals that are too
            narrow.
        statistic: The function that is estimated: the mean or the median.

    Returns:
        The estimate. Its n is the number of groups that have values. With fewer than
        `MIN_BOOTSTRAP_UNITS` groups, the ends of the interval are NaN.
    """
    units = [np.asarray(group, np.float64).ravel() for group in groups if np.size(group)]
    value = float(statistic(np.concatenate(units)))
    num_units = len(units)
    if num_units < MIN_BOOTSTRAP_UNITS:
        return Estimate(value, math.nan, math.nan, num_units)

    if all(np.asarray(group).dtype == bool for group in groups):
        low, high = _compute_clustered_wilson_interval(value, units)
    else:
        low, high = _compute_percentile_interval(units, statistic)
    return Estimate(value, low, high, num_units)


def estimate_mean_over_seeds(success_by_family: Sequence[Array]) -> Estimate:
    """Estimate mean success over training seeds and scenes.

    Args:
        success_by_family: For each task family: success [seeds, scenes] bool.
    """
    tables = _validate_success_tables(success_by_family)
    mean, half_width = _compute_crossed_mean_and_half_width(tables)
    counts = [(int(table.sum()), table.size) for table in tables]
    # As if all runs were independent
    independent = estimate_mean_proportion(counts)
    return _widen_to_at_least(mean, half_width, narrowest=independent, min_value=0.0)


def estimate_difference_over_seeds(first: Sequence[Array], second: Sequence[Array]) -> Estimate:
    """Estimate the mean success of `first` minus the mean success of `second`.

    Args:
        first: For each task family: success [seeds, scenes] bool.
        second: Success in the same shapes. Entries with the same index are of the same scene; the
            seeds are paired by their order.
    """
    first_tables = _validate_success_tables(first)
    second_tables = _validate_success_tables(second)
    first_shapes = [table.shape for table in first_tables]
    second_shapes = [table.shape for table in second_tables]
    if first_shapes != second_shapes:
        raise ValueError(f"{first_shapes} cannot be compared with {second_shapes}")

    differences = []  # [seeds, scenes] of -1, 0 and 1 per family
    pairs = []  # per family: success of all episodes in `first` and in `second`
    for first_table, second_table in zip(first_tables, second_tables, strict=True):
        differences.append(first_table.astype(float) - second_table)
        pairs.append((first_table.ravel().tolist(), second_table.ravel().tolist()))
    mean, half_width = _compute_crossed_mean_and_half_width(differences)
    # As if all runs were independent
    independent, _ = estimate_first_minus_second_and_p_value(pairs)
    return _widen_to_at_least(mean, half_width, narrowest=independent, min_value=-1.0)


@dataclass(frozen=True)
class CrossedVariances:
    """Three variances of the mean over training seeds and scenes.

    over_seeds   as if only the seeds were drawn at random; 0 with one seed.
    over_scenes  as if only the scenes were drawn at random.
    in_both      the variance by chance in each entry, which the other two both contain.
    num_seeds    number of training seeds.
    num_scenes   number of scenes in each task family.
    """

    over_seeds: float
    over_scenes: float
    in_both: float
    num_seeds: int
    num_scenes: Sequence[int]


def compute_variances_of_crossed_mean(tables: Sequence[Array]) -> CrossedVariances:
    """Compute the variances of the mean of a crossed design (see the beginning of this file).

    Args:
        tables: [seeds, scenes] of each task family, with the same number of seeds.
    """
    num_seeds = len(tables[0])
    num_tables = len(tables)

    variance_over_seeds = 0.0
    if num_seeds > 1:
        seed_means = np.mean([table.mean(1) for table in tables], axis=0)  # [seeds]
        variance_over_seeds = float(seed_means.var(ddof=1)) / num_seeds

    variance_over_scenes = 0.0
    variance_in_both = 0.0
    for table in tables:
        num_scenes = table.shape[1]
        if num_scenes == 1:
            continue
        scene_means = table.mean(0)  # [scenes]
        variance_over_scenes += float(scene_means.var(ddof=1)) / num_scenes / num_tables**2
        if num_seeds > 1:
            # What remains of each entry without the effects of its seed and of its scene.
            residual = table - table.mean(1, keepdims=True) - scene_means + table.mean()
            freedom = (num_seeds - 1) * (num_scenes - 1)
            variance_in_both += float((residual**2).sum()) / freedom / table.size / num_tables**2

    return CrossedVariances(
        over_seeds=variance_over_seeds,
        over_scenes=variance_over_scenes,
        in_both=variance_in_both,
        num_seeds=num_seeds,
        num_scenes=[table.shape[1] for table in tables],
    )


def compute_crossed_half_width(variances: CrossedVariances) -> float:
    """Compute half the width of the interval of a mean over training seeds and scenes."""
    # The variance in both is subtracted, because the sum of the first two counts it twice.
    variance = max(
        variances.over_seeds + variances.over_scenes - variances.in_both,
        variances.over_seeds,
        variances.over_scenes,
    )
    if variance == 0:
        return 0.0

    # Satterthwaite's degrees of freedom of a sum of variances: the squared sum, divided by the sum
    # of each squared variance over its own degrees of freedom. The variance over seeds has
    # num_seeds - 1 degrees of freedom, the variance over scenes has scene_freedom.
    scene_freedom = sum(number - 1 for number in variances.num_scenes)
    seed_term = variances.over_seeds**2 / max(variances.num_seeds - 1, 1)
    scene_term = variances.over_scenes**2 / max(scene_freedom, 1)
    degrees_of_freedom = max(1.0, variance**2 / (seed_term + scene_term))
    half_width = _compute_student_t95(degrees_of_freedom) * math.sqrt(variance)
    # Two seeds often agree by chance, so the interval is never narrower than that of the seeds
    # alone, which has one degree of freedom.
    if variances.num_seeds == 2:
        half_width_of_seeds = _compute_student_t95(1) * math.sqrt(variances.over_seeds)
        half_width = max(half_width, half_width_of_seeds)
    return half_width


def _compute_wilson_interval(p: float, n: float) -> tuple[float, float]:
    """Compute Wilson's interval around a proportion p of n samples.

    SciPy's `binomtest` has this interval only for integers, but n may be an effective number of
    samples, which is no integer.
    """
    center = (p + Z95**2 / (2 * n)) / (1 + Z95**2 / n)
    half_width = Z95 / (1 + Z95**2 / n) * np.sqrt(p * (1 - p) / n + Z95**2 / (4 * n**2))
    # Without rounding errors the interval lies in [0, 1] and contains p. At p = 0 and p = 1, where
    # one end is p, rounding errors would break this.
    low = max(0.0, min(p, center - half_width))
    high = min(1.0, max(p, center + half_width))
    return float(low), float(high)


def _compute_student_t95(degrees_of_freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, 0.975))


def _compute_clustered_wilson_interval(rate: float, units: Sequence[Array]) -> tuple[float, float]:
    """Compute Wilson's interval for dependent samples (Korn and Graubard, 1998).

    The number of samples is replaced by the number of independent samples with the same variance.

    Args:
        rate: The mean of all samples.
        units: Samples (0 or 1) of each independent unit.
    """
    num_units = len(units)
    n = sum(len(unit) for unit in units)
    if n <= num_units:  # one sample per unit: all are independent
        return _compute_wilson_interval(rate, n)

    # For each unit: the square of the sum of its samples' deviations from the rate.
    squared_deviations = sum((unit - rate).sum() ** 2 for unit in units)
    # If all units have the same rate, such as 0, they do not show how dependent their samples are.
    # Then each unit counts as one sample.
    effective_n: float = num_units
    if squared_deviations:
        # The mean of dependent samples has the variance squared_deviations · num_units /
        # (num_units - 1) / n². The mean of effective_n independent samples has the variance
        # rate · (1 - rate) / effective_n. The two are equated.
        scaled_variance = rate * (1 - rate) * n**2 * (num_units - 1) / num_units
        # With few units their variance is uncertain, so the interval is widened.
        few_units_factor = (Z95 / _compute_student_t95(num_units - 1)) ** 2
        effective_n = scaled_variance / squared_deviations * few_units_factor
    return _compute_wilson_interval(rate, min(n, effective_n))


def _compute_percentile_interval(
    units: Sequence[Array], statistic: Callable[[Array], Any]
) -> tuple[float, float]:
    """Compute a percentile-bootstrap interval that resamples whole units.

    With few units, percentiles farther out are taken, which widens the interval (Hesterberg, 2015).

    Args:
        units: The values of each independent unit.
        statistic: The function that is estimated.
    """
    from scipy.special import ndtr

    num_units = len(units)
    rng = np.random.default_rng(0)
    draws = rng.integers(num_units, size=(NUM_BOOTSTRAP_DRAWS, num_units))
    replicas = []
    for draw in draws:
        drawn_values = np.concatenate([units[index] for index in draw])
        replicas.append(float(statistic(drawn_values)))

    # The half width in standard errors, instead of the normal distribution's 1.96.
    widened_z = math.sqrt(num_units / (num_units - 1)) * _compute_student_t95(num_units - 1)
    tail_percent = 100 * ndtr(-widened_z)
    # Interpolation between two infinite values gives NaN, which means infinity here.
    with np.errstate(invalid="ignore"):
        ends = np.percentile(replicas, [tail_percent, 100 - tail_percent])
    low, high = np.nan_to_num(ends, nan=np.inf, posinf=np.inf)
    return float(low), float(high)


def _validate_success_tables(success_by_family: Sequence[Array]) -> list[Array]:
    """Convert the success of each task family to an array [seeds, scenes] of bool.

    Raises `ValueError` for other shapes and types, or if the numbers of seeds differ.
    """
    tables = [np.asarray(success) for success in success_by_family]
    if not tables or not all(_is_success_table(table, len(tables[0])) for table in tables):
        kinds = [(table.dtype, table.shape) for table in tables]
        raise ValueError(f"Give bool tables [seeds, scenes] with equally many seeds, not {kinds}.")
    return tables


def _is_success_table(table: Array, num_seeds: int) -> bool:
    return table.dtype == bool and table.ndim == 2 and table.size > 0 and len(table) == num_seeds


def _compute_crossed_mean_and_half_width(tables: Sequence[Array]) -> tuple[float, float]:
    """Estimate the mean of a crossed design and its interval (see the beginning of this file).

    Args:
        tables: [seeds, scenes] of each task family, with the same number of seeds.

    Returns:
        The mean of the tables' means, and half the width of its interval.
    """
    mean = float(np.mean([table.mean() for table in tables]))
    variances = compute_variances_of_crossed_mean(tables)
    return mean, compute_crossed_half_width(variances)


def _widen_to_at_least(
    value: float, half_width: float, narrowest: Estimate, min_value: float
) -> Estimate:
    """Return an estimate whose interval spans value ± half_width and that of `narrowest`.

    The interval is cut off at `min_value` and 1, the range of possible values.
    """
    low = min(value - half_width, narrowest.low)
    high = max(value + half_width, narrowest.high)
    return Estimate(value, max(min_value, low), min(1.0, high), narrowest.n)
