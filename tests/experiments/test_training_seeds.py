"""Success over training seeds, and how many seeds and scenes the interval of a gain needs."""

from pathlib import Path

import numpy as np
import pytest

from experiments.training_seeds.__main__ import main
from experiments.training_seeds.precision import (
    Spread,
    average_spreads,
    compute_sd_between_seeds,
    load_gains,
    measure_spread,
    predict_half_width,
)
from experiments.training_seeds.precision import main as print_precision
from outcomes import make_outcome
from spear.cli import main as run_spear
from spear.errors import SpearError
from spear.evaluate.results import Journal
from spear.evaluate.stats import estimate_difference_over_seeds
from spear.types import Array

SIMPLER_SETTINGS = {"simulator": "simpler", "replan": 3}
LIBERO_SETTINGS = {"simulator": "libero", "protocol": "openpi"}


def write_results(
    folder: Path,
    num_successes: int,
    family: str = "put_on",
    settings: dict[str, object] | None = None,
) -> Path:
    """Write the results of ten scenes, of which the first ones succeed."""
    scenes = range(10)
    journal = Journal(folder, folder.name, settings or {}, shard=(1, 1), scenes={family: scenes})
    for seed in scenes:
        outcome = make_outcome(family, seed, success=seed < num_successes)
        journal.add(outcome, episode_s=1.0, since_last_end_s=1.0)
    return folder


def draw_gain(num_seeds: int, num_scenes: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Draw the success [seeds, scenes] of two recipes; seeds and scenes differ in how easy."""
    scene_rates = rng.uniform(0.2, 0.8, size=num_scenes)
    successes = []
    for _ in range(2):
        seed_effects = rng.normal(0.0, 0.1, size=(num_seeds, 1))
        rates = np.clip(scene_rates + seed_effects, 0.0, 1.0)
        successes.append(rng.random((num_seeds, num_scenes)) < rates)
    first, second = successes
    return first, second


def test_one_seed_each_says_that_the_interval_covers_scenes_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(first=(write_results(tmp_path / "a", 8),), second=(write_results(tmp_path / "b", 5),))

    printed = capsys.readouterr().out
    assert "difference: +30.0 points" in printed
    assert "one seed each: the intervals cover the scenes only" in printed


def test_several_seeds_print_the_gain_of_each_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (write_results(tmp_path / "a1", 8), write_results(tmp_path / "a2", 9))
    second = (write_results(tmp_path / "b1", 5), write_results(tmp_path / "b2", 9))

    main(first=first, second=second)

    printed = capsys.readouterr().out
    assert "difference: +15.0 points" in printed
    assert "of each pair: +30.0, +0.0." in printed
    assert "one seed each" not in printed


def test_recipes_with_other_numbers_of_seeds_are_refused(tmp_path: Path) -> None:
    first = (write_results(tmp_path / "a1", 8), write_results(tmp_path / "a2", 9))
    second = (write_results(tmp_path / "b1", 5),)

    with pytest.raises(SpearError, match="2 folders cannot be paired with 1"):
        main(first=first, second=second)


def test_keys_of_the_ablations_stand_for_their_scores(capsys: pytest.CaptureFixture[str]) -> None:
    """The table of 3,500 steps in tables.md has these rates of its first seeds."""
    main(first=(Path("b22f"),), second=(Path("eb45"),))

    printed = capsys.readouterr().out
    assert "76.8 %" in printed
    assert "73.5 %" in printed


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("PutCarrotOnPlateInScene-v1", SIMPLER_SETTINGS),
        ("libero_object-3", LIBERO_SETTINGS),
    ],
)
def test_results_of_the_benchmarks_are_compared_like_others(
    family: str,
    settings: dict[str, object],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = write_results(tmp_path / "a", 8, family, settings)
    second = write_results(tmp_path / "b", 5, family, settings)

    main(first=(first,), second=(second,))
    run_spear(["evaluate", "compare", str(first), str(second)])

    printed = capsys.readouterr().out
    assert "difference: +30.0 points" in printed
    assert "+30.0" in printed.split("one seed each")[1]


def test_the_spread_of_drawn_trainings_is_measured() -> None:
    rng = np.random.default_rng(0)
    spreads = []
    for _ in range(100):
        first, second = draw_gain(num_seeds=5, num_scenes=100, rng=rng)
        spreads.append(measure_spread(first.astype(float) - second))

    spread = average_spreads(spreads)

    # Two recipes, each with a standard deviation of 0.1 between its trainings.
    assert spread.between_seeds == pytest.approx(2 * 0.1**2, rel=0.2)
    # The gain is 0 on average in every scene.
    assert spread.between_scenes == pytest.approx(0.0, abs=0.005)


def test_the_standard_deviation_is_that_of_the_seeds_without_the_chance_of_episodes() -> None:
    rng = np.random.default_rng(0)
    first, second = draw_gain(num_seeds=2000, num_scenes=20, rng=rng)

    deviation = compute_sd_between_seeds([first.astype(float) - second])

    assert deviation == pytest.approx(0.1 * 2**0.5, rel=0.1)


@pytest.mark.parametrize(("num_seeds", "num_scenes"), [(3, 100), (5, 50), (8, 200)])
def test_the_predicted_half_width_is_that_of_typical_intervals(
    num_seeds: int, num_scenes: int
) -> None:
    rng = np.random.default_rng(0)
    spreads = []
    half_widths = []
    for _ in range(200):
        first, second = draw_gain(num_seeds, num_scenes, rng)
        spreads.append(measure_spread(first.astype(float) - second))
        half_widths.append(estimate_difference_over_seeds([first], [second]).half_width)

    predicted = predict_half_width(average_spreads(spreads), num_seeds, num_scenes)

    assert predicted == pytest.approx(np.mean(half_widths), rel=0.2)


def test_more_seeds_and_more_scenes_make_the_interval_narrower() -> None:
    spread = Spread(between_seeds=0.007, between_scenes=0.02, in_episodes=0.3)

    half_width = predict_half_width(spread, num_seeds=3, num_scenes=100)

    assert predict_half_width(spread, num_seeds=5, num_scenes=100) < half_width
    assert predict_half_width(spread, num_seeds=3, num_scenes=400) < half_width


def test_gains_are_of_three_trainings_or_more() -> None:
    num_seeds = [len(gain) for gain in load_gains()]

    assert len(num_seeds) > 20
    assert min(num_seeds) == 3


def test_the_table_can_have_the_spread_of_a_pilot(capsys: pytest.CaptureFixture[str]) -> None:
    print_precision(sd=3.0)

    assert "between pairs of trainings: 3.0 points" in capsys.readouterr().out


def test_a_negative_spread_is_refused() -> None:
    with pytest.raises(SpearError, match="--sd -3 is negative"):
        print_precision(sd=-3.0)
