"""Published numbers: consistent in themselves, beside ours where the tasks are the same, never mixed in."""

from dataclasses import replace

import numpy as np
import pytest

from spear.evaluate.compare import find_matching_references, load_references
from spear.evaluate.results import Outcome, Results

SIMPLER = load_references()["simpler_widowx"]


def results(families: tuple[str, ...]) -> Results:
    outcomes = [
        Outcome(f, s, "go", s < 3, True, True, False, 0, 9) for f in families for s in range(4)
    ]
    return Results("mine", {}, outcomes, 1.0)


@pytest.mark.parametrize("name", load_references())
def test_every_table_has_a_source_and_fitting_rows(name: str) -> None:
    table = load_references()[name]
    assert "arXiv" in table.source and len(table.columns) == len(table.families)
    assert set(table.rows) <= set(table.means)
    for method, row in table.rows.items():
        assert len(row) == len(table.columns)
        assert np.mean(row) == pytest.approx(
            table.means[method], abs=0.1
        )  # published means are rounded
    assert all(0 <= v <= 100 for v in table.means.values())


def test_ours_stand_below_theirs_on_the_same_tasks_only() -> None:
    assert (
        find_matching_references(results(("spoon_on_towel", "stack_cube"))) == []
    )  # our simulator's tasks are not SIMPLER's
    one = results(SIMPLER.families[:1])
    assert (
        find_matching_references(one) == [SIMPLER]
        and find_matching_references(replace(one, settings={"starts": "off the grid"})) == []
    )
    *theirs, ours = SIMPLER.cells([("mine", one)])
    assert theirs == SIMPLER.cells() and all("(published)" in line[0] for line in theirs)
    mean_alone = replace(
        SIMPLER, rows={}
    ).cells()  # a published mean without its tasks stays in its column
    assert all(
        line[1:-1] == ["–"] * 4 and len(line) == len(SIMPLER.headers()) for line in mean_alone
    )
    assert ours == ["mine (measured here)", "75.0 [30, 95]", "–", "–", "–", "–"]
    assert SIMPLER.cells([("mine", results(tuple(SIMPLER.families)))])[-1][-1] == "75.0 [51, 90]"
