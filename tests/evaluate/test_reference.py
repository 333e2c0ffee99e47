"""Published numbers are consistent, and are shown next to ours for the same tasks, never mixed."""

from dataclasses import replace

import numpy as np
import pytest

from spear.evaluate.compare import find_published_tables_of_same_tasks, load_published_tables
from spear.evaluate.results import Outcome, Results

SIMPLER = load_published_tables()["simpler_widowx"]


def make_results(*families: str) -> Results:
    """Make results with three successes in four scenes of each family."""
    outcomes = []
    for family in families:
        for seed in range(4):
            outcome = Outcome(
                family=family,
                seed=seed,
                instruction="go",
                success=seed < 3,
                reached=True,
                grasped=True,
                wrong_object_moved=False,
                unreachable=0,
                steps=9,
            )
            outcomes.append(outcome)
    return Results(policy="mine", settings={}, outcomes=outcomes, seconds=1.0)


@pytest.mark.parametrize("name", load_published_tables())
def test_every_table_has_a_source_and_fitting_rows(name: str) -> None:
    table = load_published_tables()[name]

    assert "arXiv" in table.source
    assert len(table.columns) == len(table.families)
    assert set(table.rows) <= set(table.means)
    assert all(len(row) == len(table.columns) for row in table.rows.values())
    assert all(0 <= mean <= 100 for mean in table.means.values())


@pytest.mark.parametrize("name", load_published_tables())
def test_published_means_are_those_of_their_rows(name: str) -> None:
    table = load_published_tables()[name]

    for method, row in table.rows.items():
        assert np.mean(row) == pytest.approx(table.means[method], abs=0.1)  # rounded


def test_our_simulators_tasks_match_no_published_table() -> None:
    assert find_published_tables_of_same_tasks(make_results("spoon_on_towel", "stack_cube")) == []


def test_results_of_the_same_tasks_match_a_table() -> None:
    results = make_results(SIMPLER.families[0])

    assert find_published_tables_of_same_tasks(results) == [SIMPLER]


def test_results_of_other_starts_match_no_table() -> None:
    results = replace(make_results(SIMPLER.families[0]), settings={"starts": "off the grid"})

    assert find_published_tables_of_same_tasks(results) == []


def test_our_numbers_stand_below_the_published_ones() -> None:
    results = make_results(SIMPLER.families[0])

    *published, measured = SIMPLER.cells([("mine", results)])

    assert published == SIMPLER.cells()
    assert all("(published)" in line[0] for line in published)
    # Three of four successes with Wilson's interval; the other tasks and the mean are unknown.
    assert measured == ["mine (measured here)", "75.0 [30, 95]", "–", "–", "–", "–"]


def test_a_mean_is_shown_where_all_tasks_were_measured() -> None:
    results = make_results(*SIMPLER.families)

    measured = SIMPLER.cells([("mine", results)])[-1]

    assert measured[-1] == "75.0 [51, 90]"  # Wilson's interval of 12 of 16


def test_a_published_mean_without_its_tasks_stays_in_its_column() -> None:
    table = replace(SIMPLER, rows={})

    for line in table.cells():
        assert line[1:-1] == ["–"] * 4  # the four tasks
        assert len(line) == len(table.headers())
