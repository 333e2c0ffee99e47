"""Intervals over trainings and scenes: coverage by simulation where both matter, honest at the edges."""

from __future__ import annotations

import numpy as np
import pytest

from spear.evaluate.seeds import difference, mean_success
from spear.evaluate.stats import paired_mean_difference, wilson_mean
from spear.types import Array


def draw(rng: np.random.Generator, rate: float, hard: Array, seeds: Array) -> Array:
    """Success [seeds, scenes]: scenes differ in how hard they are, trainings in how good they are."""
    logit = np.log(rate / (1 - rate)) + seeds[:, None] + hard[None]
    return rng.random(logit.shape) < 1 / (1 + np.exp(-logit))


@pytest.mark.parametrize(("spread", "seeds"), [(0.0, 3), (0.4, 3), (0.4, 5), (1.0, 3)])
def test_the_interval_of_a_difference_covers_the_truth(spread: float, seeds: int) -> None:
    """Two recipes alike: the truth is 0 whatever scenes and trainings are drawn."""
    rng = np.random.default_rng(0)
    covered, widths, runs = 0, [], 300
    for _ in range(runs):
        hard = [1.5 * rng.standard_normal(50) for _ in range(2)]
        both = []
        for _ in range(2):
            own = spread * rng.standard_normal(seeds)
            both.append([draw(rng, 0.6, h, own) for h in hard])
        d = difference(*both)
        assert d.low <= d.value <= d.high
        covered += d.low <= 0 <= d.high
        widths.append(d.half_width)
    assert covered / runs >= 0.93
    if (
        spread == 0
    ):  # where trainings do not differ, the interval is not much wider than of independent episodes
        assert np.median(widths) < 0.12


def test_independent_episodes_would_be_overconfident_where_trainings_differ() -> None:
    rng = np.random.default_rng(1)
    missed = 0
    for _ in range(200):
        a, b = (draw(rng, 0.5, np.zeros(200), rng.standard_normal(3)) for _ in range(2))
        naive = paired_mean_difference([(a.ravel(), b.ravel())])
        ours = difference([a], [b])
        missed += not naive.low <= 0 <= naive.high
        assert ours.low <= naive.low and naive.high <= ours.high
    assert missed > 50


def test_the_mean_covers_the_truth_over_unlike_families() -> None:
    rng = np.random.default_rng(2)
    truth = 0.0
    for rate in (0.9, 0.3):
        truth += float(draw(rng, rate, rng.standard_normal(4000), 0.3 * rng.standard_normal(500)).mean()) / 2
    covered = 0
    for _ in range(300):
        own = 0.3 * rng.standard_normal(3)
        e = mean_success([draw(rng, rate, rng.standard_normal(60), own) for rate in (0.9, 0.3)])
        covered += e.low <= truth <= e.high
    assert covered / 300 >= 0.93


def test_at_the_edges_it_is_that_of_independent_episodes() -> None:
    none = [np.zeros((3, 20), bool), np.zeros((3, 20), bool)]
    assert mean_success(none) == wilson_mean([(0, 60), (0, 60)])
    same = difference(none, none)
    assert same.value == 0 and same.low < 0 < same.high
    one = [np.array([[True, False, True]])]
    assert mean_success(one).n == 3
    for bad in ([], [np.zeros((0, 4), bool)], [np.zeros((2, 4), bool), np.zeros((3, 4), bool)]):
        with pytest.raises(ValueError, match="seeds and scenes"):
            mean_success(bad)
    with pytest.raises(ValueError, match="against"):
        difference(none, none[:1])
