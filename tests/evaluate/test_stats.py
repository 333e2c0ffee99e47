"""Intervals: known values, coverage by simulation, and honest behaviour at the edges."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spear.evaluate.options import TabletopOptions
from spear.evaluate.stats import (
    bootstrap,
    estimate_difference_over_seeds,
    estimate_mean_over_seeds,
    estimate_mean_proportion,
    estimate_paired_difference,
    estimate_proportion,
    find_num_samples,
)
from spear.types import Array


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_agrees_with_scipy(n: int, fraction: float) -> None:
    k = round(fraction * n)
    ours = estimate_proportion(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert (ours.low, ours.high) == pytest.approx(
        (max(0, theirs.low), min(1, theirs.high)), abs=1e-12
    )
    assert ours.low <= ours.value <= ours.high


@pytest.mark.parametrize(
    ("function", "nonsense"),
    [
        *((estimate_proportion, counts) for counts in ((0, 0), (3, 2), (-1, 4))),
        *(
            (estimate_paired_difference, (each,))
            for each in ([], [([0.2], [0.9])], [([True], [True, False])])
        ),
        (estimate_mean_over_seeds, ([np.full((2, 4), np.nan)],)),
        (bootstrap, ([np.array([])],)),
        *(
            (estimate_mean_over_seeds, (t,))
            for t in ([], [np.zeros((0, 4))], [np.zeros((2, 4)), np.zeros((3, 4))])
        ),
        (estimate_difference_over_seeds, ([np.zeros((2, 4))], [np.zeros((2, 5))])),
    ],
)
def test_nonsense_is_refused(function: Callable[..., object], nonsense: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError):
        function(*nonsense)


def test_a_paired_difference_covers_the_truth_and_gains_from_pairing() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(400):
        hard = rng.random(60)  # scenes differ much; both policies fail on the same hard ones
        a, b = (
            hard + 0.05 * rng.standard_normal(60) < 0.7,
            hard + 0.05 * rng.standard_normal(60) < 0.6,
        )
        d, _ = estimate_paired_difference([(a.tolist(), b.tolist())])
        assert d.low <= d.value <= d.high
        covered += d.low <= 0.1 <= d.high
        widths.append(d.high - d.low)
    assert (
        covered / 400 >= 0.93
        and np.mean(widths) < estimate_proportion(42, 60).high - estimate_proportion(42, 60).low
    )
    same, _ = estimate_paired_difference([([True] * 30, [True] * 30)])
    assert same.value == 0 and same.low < 0 < same.high


@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=4
    )
)
def test_the_interval_leaves_out_zero_exactly_where_p_is_small(
    counts: list[tuple[int, int, int]],
) -> None:
    first, second = [True, False, True], [False, True, True]
    strata = [
        (np.repeat(first, n).tolist(), np.repeat(second, n).tolist()) for n in counts if any(n)
    ]
    if strata:
        d, p = estimate_paired_difference(strata)
        assert (p < 0.05) == (d.low > 0 or d.high < 0) and d.low <= d.value <= d.high


@pytest.mark.parametrize(("n", "either"), [(10, 0.3), (24, 0.4), (60, 0.05), (381, 0.1)])
def test_equals_are_seldom_told_apart(n: int, either: float) -> None:
    rng = np.random.default_rng(0)
    found = [rng.choice(3, n, p=[either, either, 1 - 2 * either]) for _ in range(2000)]
    assert np.mean([estimate_paired_difference([(f == 0, f == 1)])[1] < 0.05 for f in found]) < 0.06


def test_means_over_unlike_families_cover_the_truth() -> None:
    rng = np.random.default_rng(4)
    rates = [(0.9, 0.8, 40), (0.5, 0.2, 25), (0.05, 0.05, 10)]
    truth, mean = np.mean([p - q for p, q, _ in rates]), np.mean([p for p, _, _ in rates])
    covered = inside = 0
    for _ in range(400):
        drawn = [(rng.random(n) < p, rng.random(n) < q) for p, q, n in rates]
        d, _ = estimate_paired_difference([(a.tolist(), b.tolist()) for a, b in drawn])
        e = estimate_mean_proportion([(int(a.sum()), a.size) for a, _ in drawn])
        assert d.n == e.n == 75
        covered += d.low <= truth <= d.high
        inside += e.low <= mean <= e.high
    assert 0.93 <= covered / 400 < 1 and inside / 400 >= 0.93
    assert estimate_mean_proportion([(3, 10), (9, 10)]) == estimate_proportion(12, 20)
    assert estimate_mean_proportion([(10, 10), (0, 1000)]).value == 0.5


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_samples_for_is_the_smallest_number(rate: float) -> None:
    n = find_num_samples(0.05, rate)
    assert find_num_samples(0.05) == 381 == TabletopOptions().scenes
    enough, few = (
        binomtest(round(rate * m), m).proportion_ci(0.95, "wilson") for m in (2 * n, n // 2)
    )
    assert enough.high - enough.low < 0.1 < few.high - few.low


def test_bootstrap_resamples_groups_not_values() -> None:
    rng = np.random.default_rng(1)
    groups = [np.full(50, rng.normal()) for _ in range(20)]  # 20 independent numbers, not 1000
    together = bootstrap([*groups, np.array([])], np.mean)
    apart = bootstrap([np.array([v]) for g in groups for v in g], np.mean)
    assert together.value == pytest.approx(apart.value) and together.n == 20
    assert together.high - together.low > 4 * (apart.high - apart.low)
    assert "[" not in bootstrap(groups[:1], np.mean).to_text(
        ".3f"
    )  # of one nothing is known about others
    for won in (True, False):  # as of values that all are alike, no two draws differ
        assert bootstrap([np.full(9, won)] * 20, np.mean) == estimate_proportion(20 * won, 20)
    assert bootstrap(np.arange(12)[:, None] < 8, np.mean) == estimate_proportion(8, 12)
    few = [bootstrap(rng.normal(size=(6, 1)), np.mean) for _ in range(200)]
    assert np.mean([e.low < 0 < e.high for e in few]) > 0.9


@pytest.mark.parametrize(("rate", "alike"), [(0.5, 0.5), (0.9, 0.1), (0.97, 0.5)])
def test_a_rate_covers_the_truth_where_samples_of_a_group_are_alike(
    rate: float, alike: float
) -> None:
    rng, certain = np.random.default_rng(0), 1 / alike - 1
    of_groups = rng.beta(rate * certain, (1 - rate) * certain, (1000, 20))
    found = [bootstrap([rng.random(10) < own for own in groups], np.mean) for groups in of_groups]
    assert 0.93 <= np.mean([e.low <= rate <= e.high for e in found]) < 1


def draw(rng: np.random.Generator, rate: float, hard: Array, seeds: Array) -> Array:
    """Success [seeds, scenes]: scenes differ in how hard they are, trainings in how good they are."""
    logit = np.log(rate / (1 - rate)) + seeds[:, None] + hard[None]
    return rng.random(logit.shape) < 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize(("spread", "seeds"), [(0.0, 3), (0.4, 2), (0.4, 3), (0.4, 5), (1.0, 3)])
def test_a_difference_over_seeds_covers_the_truth(spread: float, seeds: int) -> None:
    """Two recipes alike: the truth is 0 whatever scenes and trainings are drawn."""
    rng = np.random.default_rng(0)
    covered, widths, runs = 0, [], 200
    for _ in range(runs):
        hard = [1.5 * rng.standard_normal(50) for _ in range(2)]
        own = [spread * rng.standard_normal(seeds) for _ in range(2)]
        d = estimate_difference_over_seeds(*([draw(rng, 0.6, h, one) for h in hard] for one in own))
        assert d.low <= d.value <= d.high
        covered += d.low <= 0 <= d.high
        widths.append(d.half_width)
    assert covered / runs >= 0.93
    # Where trainings do not differ, the interval is not much wider than of independent episodes.
    assert spread > 0 or np.median(widths) < 0.12


def test_a_mean_over_seeds_covers_the_truth_over_unlike_families() -> None:
    rng, truth = np.random.default_rng(2), 0.0
    for rate in (0.9, 0.3):
        truth += (
            float(draw(rng, rate, rng.standard_normal(4000), 0.3 * rng.standard_normal(500)).mean())
            / 2
        )
    covered = 0
    for _ in range(200):
        own = 0.3 * rng.standard_normal(3)
        e = estimate_mean_over_seeds(
            [draw(rng, rate, rng.standard_normal(60), own) for rate in (0.9, 0.3)]
        )
        covered += e.low <= truth <= e.high
    assert covered / 200 >= 0.93


def test_at_the_edges_seeds_give_the_interval_of_independent_episodes() -> None:
    none = [np.zeros((3, 20), bool), np.zeros((3, 20), bool)]
    assert estimate_mean_over_seeds(none) == estimate_mean_proportion([(0, 60), (0, 60)])
    same = estimate_difference_over_seeds(none, none)
    assert same.value == 0 and same.low < 0 < same.high
    assert estimate_mean_over_seeds([np.array([[True, False, True]])]).n == 3
