"""Intervals: known values, coverage by simulation, and honest behaviour at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from spear.evaluate.stats import (
    bootstrap,
    mcnemar,
    paired_difference,
    paired_mean_difference,
    samples_for,
    wilson,
    wilson_mean,
)


@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_agrees_with_scipy(n: int, fraction: float) -> None:
    k = round(fraction * n)
    ours = wilson(k, n)
    theirs = binomtest(k, n).proportion_ci(0.95, method="wilson")
    assert ours.low == pytest.approx(max(0, theirs.low), abs=1e-12)
    assert ours.high == pytest.approx(min(1, theirs.high), abs=1e-12)
    assert ours.low <= ours.value <= ours.high


@pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_nonsense(k: int, n: int) -> None:
    with pytest.raises(ValueError, match="wilson"):
        wilson(k, n)


def test_paired_difference_covers_the_truth_and_gains_from_pairing() -> None:
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(400):
        hard = rng.random(60)  # scenes differ much; both policies fail on the same hard ones
        a, b = hard + 0.05 * rng.standard_normal(60) < 0.7, hard + 0.05 * rng.standard_normal(60) < 0.6
        d = paired_difference(a.tolist(), b.tolist())
        assert d.low <= d.value <= d.high
        covered += d.low <= 0.1 <= d.high
        widths.append(d.high - d.low)
    assert covered / 400 >= 0.93
    separate = wilson(42, 60).high - wilson(42, 60).low
    assert np.mean(widths) < separate


def test_paired_difference_of_equal_policies_is_zero_with_an_interval() -> None:
    d = paired_difference([True] * 30, [True] * 30)
    assert d.value == 0
    assert d.low < 0 < d.high


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_scipy(a: int, b: int) -> None:
    expected = binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert mcnemar(a, b) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_raises_no_more_false_alarms_than_it_says() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.random((2, 2000, 40)) < 0.4  # two equal policies, 2,000 times, on 40 scenes
    alarms = [mcnemar(int((x & ~y).sum()), int((~x & y).sum())) < 0.05 for x, y in zip(a, b, strict=True)]
    assert 0 < np.mean(alarms) <= 0.05


def test_the_mean_difference_covers_the_truth_over_unlike_families() -> None:
    rng = np.random.default_rng(4)
    rates = [(0.9, 0.8, 40), (0.5, 0.2, 25), (0.05, 0.05, 10)]
    truth = np.mean([p - q for p, q, _ in rates])
    covered = 0
    for _ in range(400):
        d = paired_mean_difference(
            [((rng.random(n) < p).tolist(), (rng.random(n) < q).tolist()) for p, q, n in rates]
        )
        assert d.low <= d.value <= d.high
        assert d.n == 75
        covered += d.low <= truth <= d.high
    assert 0.93 <= covered / 400 < 1
    one = ([True, True, False], [False, True, True])
    assert paired_mean_difference([one]) == paired_difference(*one)
    with pytest.raises(ValueError, match="no strata"):
        paired_mean_difference([])


def test_the_mean_of_rates_weighs_them_equally_and_its_interval_covers() -> None:
    assert wilson_mean([(3, 10), (9, 10)]) == wilson(12, 20)
    assert wilson_mean([(10, 10), (0, 1000)]).value == 0.5
    rng = np.random.default_rng(5)
    rates, sizes = np.array([0.5, 0.6, 0.3]), np.array([30, 60, 20])
    covered = 0
    for _ in range(400):
        wins = rng.binomial(sizes, rates)
        e = wilson_mean([(int(k), int(n)) for k, n in zip(wins, sizes, strict=True)])
        covered += e.low <= rates.mean() <= e.high
    assert covered / 400 >= 0.93


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.9])
def test_samples_for_is_the_smallest_number(rate: float) -> None:
    n = samples_for(0.05, rate)
    widths = [
        (e.high - e.low) / 2
        for e in (binomtest(round(rate * m), m).proportion_ci(0.95, "wilson") for m in (2 * n, n // 2))
    ]
    assert widths[0] < 0.05 < widths[1]
    assert samples_for(0.05) == 381
    with pytest.raises(ValueError, match="samples_for"):
        samples_for(0.0)


def test_bootstrap_resamples_groups_not_values() -> None:
    rng = np.random.default_rng(1)
    groups = [np.full(50, rng.normal()) for _ in range(20)]  # 20 independent numbers, not 1000
    together = bootstrap(groups, np.mean)
    apart = bootstrap([np.array([v]) for g in groups for v in g], np.mean)
    assert together.value == pytest.approx(apart.value)
    assert together.n == 20
    assert together.high - together.low > 4 * (apart.high - apart.low)


def test_bootstrap_interval_of_a_median_covers_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for seed in range(200):
        e = bootstrap([rng.exponential(size=1) for _ in range(60)], np.median, resamples=300, seed=seed)
        covered += e.low <= np.log(2) <= e.high
    assert covered / 200 >= 0.9


def test_bootstrap_ignores_empty_groups_and_refuses_none() -> None:
    assert bootstrap([np.array([]), np.array([2.0])]).n == 1
    with pytest.raises(ValueError, match="no values"):
        bootstrap([np.array([])])
