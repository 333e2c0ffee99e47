"""The published table of the ablations says what the episodes say that are kept beside it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from spear.evaluate.results import load
from spear.evaluate.stats import difference_over_seeds, mean_over_seeds
from spear.types import Array

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "ablations.md").read_text()
KEY = r"\(ablations/scores/([0-9a-f]{12})\)"
LINES = [line for line in PAGE.splitlines() if line.startswith("|") and re.search(KEY, line)]
FIRST = next(line for line in LINES if line.startswith("| full method |"))


def key_of(line: str) -> str:
    """The folder of the episodes behind a line of a table."""
    key = re.search(KEY, line)
    assert key is not None
    return key[1]


def strata(line: str) -> list[Array]:
    """Success [1, scenes] of each task family behind a line of a table."""
    outcomes = load(DOCS / "ablations" / "scores" / key_of(line)).outcomes
    return [
        np.array([[o.success for o in sorted(outcomes, key=lambda o: o.seed) if o.family == family]])
        for family in sorted({o.family for o in outcomes})
    ]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line.split("|")[1].strip())
def test_a_published_line_is_what_was_kept(line: str) -> None:
    families = strata(line)
    assert sum(family.size for family in families) >= 200
    assert f"| {mean_over_seeds(families).say('.1f', 100)} |" in line
    if key_of(line) != key_of(FIRST):
        assert f"| {difference_over_seeds(families, strata(FIRST)).say('+.1f', 100)} |" in line


def test_all_that_is_kept_is_published() -> None:
    kept = {path.parent.name for path in (DOCS / "ablations" / "scores").glob("*/*.jsonl")}
    assert kept == {key for line in LINES for key in re.findall(KEY, line)} and kept
