"""Intervals: known values, their coverage in simulations, and their behavior at the edges."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spear.evaluate.options import TabletopOptions
from spear.evaluate.stats import (
    Estimate,
    bootstrap,
    compute_num_samples,
    estimate_difference_over_seeds,
    estimate_first_minus_second_and_p_value,
    estimate_mean_over_seeds,
    estimate_mean_proportion,
    estimate_proportion,
)
from spear.types import Array

MIN_COVERAGE = 0.93  # 0.95, less what chance explains in some hundred simulations


def measure_coverage(estimates: Sequence[Estimate], truth: float) -> float:
    """Return the fraction of estimates whose interval contains the truth."""
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in estimates]))


# ---- Proportions.


@given(st.integers(1, 400), st.floats(0, 1))
def test_a_proportions_interval_agrees_with_scipy(n: int, fraction: float) -> None:
    successes = round(fraction * n)

    estimate = estimate_proportion(successes, n)

    interval = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert estimate.low == pytest.approx(max(0, interval.low), abs=1e-12)
    assert estimate.high == pytest.approx(min(1, interval.high), abs=1e-12)
    assert estimate.low <= estimate.value <= estimate.high


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_the_number_of_samples_gives_the_width(rate: float) -> None:
    """With twice as many samples the interval is narrower than ±0.05, with half as many wider."""
    n = compute_num_samples(0.05, rate)
    many = 2 * n
    few = n // 2

    interval_of_many = binomtest(round(rate * many), many).proportion_ci(0.95, "wilson")
    interval_of_few = binomtest(round(rate * few), few).proportion_ci(0.95, "wilson")
    assert interval_of_many.high - interval_of_many.low < 2 * 0.05
    assert interval_of_few.high - interval_of_few.low > 2 * 0.05


def test_the_default_number_of_scenes_knows_any_rate_to_five_points() -> None:
    assert compute_num_samples(0.05) == 381 == TabletopOptions().num_scenes


def test_a_mean_of_equal_families_has_the_interval_of_all_samples() -> None:
    assert estimate_mean_proportion([(3, 10), (9, 10)]) == estimate_proportion(12, 20)


def test_a_mean_weighs_families_equally_whatever_their_size() -> None:
    assert estimate_mean_proportion([(10, 10), (0, 1000)]).value == 0.5


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (estimate_proportion, (0, 0)),  # no samples
        (estimate_proportion, (3, 2)),  # more successes than samples
        (estimate_proportion, (-1, 4)),
        (estimate_first_minus_second_and_p_value, ([],)),  # no strata
        (estimate_first_minus_second_and_p_value, ([([0.2], [0.9])],)),  # no booleans
        (
            estimate_first_minus_second_and_p_value,
            ([([True], [True, False])],),
        ),  # other numbers of scenes
        (bootstrap, ([np.array([])],)),  # no values
        # The strata (task families) of these two functions are arrays [seeds, scenes].
        (estimate_mean_over_seeds, ([],)),  # no strata
        (estimate_mean_over_seeds, ([np.full((2, 4), np.nan)],)),  # no booleans
        (estimate_mean_over_seeds, ([np.zeros((0, 4))],)),  # no seeds
        # 2 seeds in one stratum, 3 in the other
        (estimate_mean_over_seeds, ([np.zeros((2, 4)), np.zeros((3, 4))],)),
        # 4 scenes for the first policy, 5 for the second
        (estimate_difference_over_seeds, ([np.zeros((2, 4))], [np.zeros((2, 5))])),
    ],
)
def test_nonsense_is_refused(function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        function(*arguments)


# ---- Paired differences.


def test_a_paired_difference_covers_the_truth_and_gains_from_pairing() -> None:
    """The first policy solves scenes up to a difficulty of 0.7, the second up to 0.6."""
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(400):
        # Scenes differ much, and both policies fail on the same hard scenes.
        difficulty = rng.random(60)
        first = difficulty + 0.05 * rng.standard_normal(60) < 0.7
        second = difficulty + 0.05 * rng.standard_normal(60) < 0.6
        difference, _ = estimate_first_minus_second_and_p_value([(first.tolist(), second.tolist())])
        differences.append(difference)

    assert all(d.low <= d.value <= d.high for d in differences)
    assert measure_coverage(differences, 0.7 - 0.6) >= MIN_COVERAGE
    unpaired_width = 2 * estimate_proportion(42, 60).half_width  # of a single rate of 0.7
    assert np.mean([2 * d.half_width for d in differences]) < unpaired_width


def test_the_difference_of_equal_outcomes_is_zero_with_an_interval() -> None:
    difference, _ = estimate_first_minus_second_and_p_value([([True] * 30, [True] * 30)])

    assert difference.value == 0
    assert difference.low < 0 < difference.high


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=4
    )
)
def test_the_interval_excludes_zero_exactly_where_p_is_small(
    counts: list[tuple[int, int, int]],
) -> None:
    """For each stratum there are three numbers of scenes: that only the first, only the second,
    and both solved.
    """
    strata = []
    for stratum in counts:
        if any(stratum):  # a stratum without scenes is not allowed
            first = np.repeat([True, False, True], stratum).tolist()
            second = np.repeat([False, True, True], stratum).tolist()
            strata.append((first, second))
    assume(strata)

    difference, p = estimate_first_minus_second_and_p_value(strata)

    excludes_zero = difference.low > 0 or difference.high < 0
    assert (p < 0.05) == excludes_zero
    assert difference.low <= difference.value <= difference.high


@pytest.mark.parametrize(("n", "either"), [(10, 0.3), (24, 0.4), (60, 0.05), (381, 0.1)])
def test_equals_are_seldom_told_apart(n: int, either: float) -> None:
    """With probability `either`, only the first policy solves a scene, and with the same
    probability only the second.
    """
    rng = np.random.default_rng(0)
    num_simulations = 2000
    num_differences = 0
    for _ in range(num_simulations):
        # 0: only the first solves the scene; 1: only the second; 2: neither.
        solver = rng.choice(3, n, p=[either, either, 1 - 2 * either])
        _, p = estimate_first_minus_second_and_p_value([(solver == 0, solver == 1)])
        num_differences += p < 0.05

    assert num_differences / num_simulations < 0.06  # 0.05 and a little


def test_means_over_unlike_families_cover_the_truth() -> None:
    rng = np.random.default_rng(4)
    # Success rate of the first and of the second policy, and number of scenes, of each family.
    families = [(0.9, 0.8, 40), (0.5, 0.2, 25), (0.05, 0.05, 10)]
    differences = []
    means = []
    for _ in range(400):
        strata = []
        counts = []
        for first_rate, second_rate, n in families:
            first = rng.random(n) < first_rate
            second = rng.random(n) < second_rate
            strata.append((first.tolist(), second.tolist()))
            counts.append((int(first.sum()), n))
        difference, _ = estimate_first_minus_second_and_p_value(strata)
        differences.append(difference)
        means.append(estimate_mean_proportion(counts))

    true_difference = float(np.mean([first - second for first, second, _ in families]))
    true_mean = float(np.mean([first for first, _, _ in families]))
    assert MIN_COVERAGE <= measure_coverage(differences, true_difference) < 1
    assert measure_coverage(means, true_mean) >= MIN_COVERAGE
    assert all(estimate.n == 40 + 25 + 10 for estimate in [*differences, *means])


# ---- Bootstrap.


def test_bootstrap_resamples_groups_not_values() -> None:
    rng = np.random.default_rng(1)
    groups = [np.full(50, rng.normal()) for _ in range(20)]  # 20 independent numbers, not 1000
    single_values = np.concatenate(groups)[:, None]  # 1000 groups of one value

    by_group = bootstrap([*groups, np.array([])], np.mean)
    by_value = bootstrap(single_values, np.mean)

    assert by_group.n == 20  # the empty group does not count
    assert by_group.value == pytest.approx(by_value.value)
    # The interval should be about √50 = 7 times as wide.
    assert by_group.half_width > 4 * by_value.half_width


def test_one_group_has_no_interval() -> None:
    estimate = bootstrap([np.arange(50.0)], np.mean)

    assert "[" not in estimate.to_text(".3f")


@pytest.mark.parametrize("success", [True, False])
def test_groups_that_are_all_alike_have_wilsons_interval(success: bool) -> None:
    """All draws of a bootstrap would be equal, so its interval would have no width."""
    estimate = bootstrap([np.full(9, success)] * 20, np.mean)

    assert estimate == estimate_proportion(20 * success, 20)


def test_groups_of_one_have_wilsons_interval() -> None:
    groups = np.arange(12)[:, None] < 8  # 12 groups of one boolean, 8 of which are True

    assert bootstrap(groups, np.mean) == estimate_proportion(8, 12)


def test_few_groups_cover_the_truth() -> None:
    rng = np.random.default_rng(2)

    # Six groups of one value each: the smallest number that has an interval.
    estimates = [bootstrap(rng.normal(size=(6, 1)), np.mean) for _ in range(200)]

    assert measure_coverage(estimates, 0) > 0.9


@pytest.mark.parametrize(("rate", "correlation"), [(0.5, 0.5), (0.9, 0.1), (0.97, 0.5)])
def test_a_rate_covers_the_truth_where_samples_of_a_group_are_correlated(
    rate: float, correlation: float
) -> None:
    rng = np.random.default_rng(0)
    # If the rates of groups have this beta distribution, their samples have that correlation.
    concentration = 1 / correlation - 1
    num_simulations = 1000
    num_groups = 20
    group_rates = rng.beta(
        rate * concentration, (1 - rate) * concentration, (num_simulations, num_groups)
    )

    estimates = []
    for rates in group_rates:
        groups = [rng.random(10) < group_rate for group_rate in rates]
        estimates.append(bootstrap(groups, np.mean))

    assert MIN_COVERAGE <= measure_coverage(estimates, rate) < 1


# ---- Seeds.


def draw_successes(
    rng: np.random.Generator, rate: float, difficulties: Array, qualities: Array
) -> Array:
    """Draw success in some scenes after some trainings.

    Args:
        rng: Generator of random numbers.
        rate: Success rate at difficulty 0 and quality 0.
        difficulties: [scenes] what each scene adds to the logit of the success rate.
        qualities: [seeds] what each training adds to it.

    Returns:
        [seeds, scenes] bool.
    """
    logit = np.log(rate / (1 - rate)) + qualities[:, None] + difficulties[None]
    return rng.random(logit.shape) < 1 / (1 + np.exp(-logit))


# The standard deviation of the trainings' quality, and the number of training seeds.
@pytest.mark.parametrize(("spread", "seeds"), [(0.0, 3), (0.4, 2), (0.4, 3), (0.4, 5), (1.0, 3)])
def test_a_difference_over_seeds_covers_the_truth(spread: float, seeds: int) -> None:
    """The two recipes are equally good, so the true difference is 0."""
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(200):
        difficulties = [1.5 * rng.standard_normal(50) for _ in range(2)]  # two families
        first_quality = spread * rng.standard_normal(seeds)
        second_quality = spread * rng.standard_normal(seeds)
        first = [draw_successes(rng, 0.6, family, first_quality) for family in difficulties]
        second = [draw_successes(rng, 0.6, family, second_quality) for family in difficulties]
        differences.append(estimate_difference_over_seeds(first, second))

    assert all(d.low <= d.value <= d.high for d in differences)
    assert measure_coverage(differences, 0) >= MIN_COVERAGE
    if spread == 0:  # not much wider than if all episodes were independent
        assert np.median([d.half_width for d in differences]) < 0.12


def test_a_mean_over_seeds_covers_the_truth_over_unlike_families() -> None:
    rng = np.random.default_rng(2)
    family_rates = (0.9, 0.3)
    # The true rates are means over very many scenes and trainings.
    true_rates = []
    for rate in family_rates:
        difficulties = rng.standard_normal(4000)
        qualities = 0.3 * rng.standard_normal(500)
        true_rates.append(float(draw_successes(rng, rate, difficulties, qualities).mean()))

    means = []
    for _ in range(200):
        quality = 0.3 * rng.standard_normal(3)
        families = []
        for rate in family_rates:
            families.append(draw_successes(rng, rate, rng.standard_normal(60), quality))
        means.append(estimate_mean_over_seeds(families))

    assert measure_coverage(means, float(np.mean(true_rates))) >= MIN_COVERAGE


def test_without_successes_a_mean_over_seeds_has_the_interval_of_independent_episodes() -> None:
    failures = [np.zeros((3, 20), bool), np.zeros((3, 20), bool)]

    assert estimate_mean_over_seeds(failures) == estimate_mean_proportion([(0, 60), (0, 60)])


def test_the_difference_of_equal_failures_is_zero_with_an_interval() -> None:
    failures = [np.zeros((3, 20), bool), np.zeros((3, 20), bool)]

    difference = estimate_difference_over_seeds(failures, failures)

    assert difference.value == 0
    assert difference.low < 0 < difference.high


def test_one_seed_counts_its_scenes() -> None:
    assert estimate_mean_over_seeds([np.array([[True, False, True]])]).n == 3
