"""The published table of the ablations says what the episodes say that are kept beside it."""

import re
from pathlib import Path

import pytest

from spear.ablations.table import successes
from spear.evaluate.results import load
from spear.evaluate.stats import difference_over_seeds, mean_over_seeds
from spear.types import Array

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "ablations.md").read_text()
KEY = r"\(ablations/scores/([0-9a-f]{12})\)"
TABLES = [
    [line for line in block.splitlines() if re.search(KEY, line)]
    for block in PAGE.split("\n\n")
    if block.startswith("|") and re.search(KEY, block)
]
"""The lines of each table that name their episodes."""


def strata(line: str) -> list[Array]:
    """Success [seeds, scenes] of each task family behind a line of a table."""
    seeds = [load(DOCS / "ablations" / "scores" / key) for key in re.findall(KEY, line)]
    return successes(seeds, seeds[0].families)


def first(table: list[str], number: int) -> str:
    """The line that one is compared with: the last before it without a difference."""
    return next(line for line in reversed(table[: number + 1]) if re.search(r"\[[\d., ]+\] \| – \|", line))


@pytest.mark.parametrize(
    ("line", "first"),
    [(line, first(table, number)) for table in TABLES for number, line in enumerate(table)],
    ids=[f"{n}-{line.split('|')[1].strip()}" for n, table in enumerate(TABLES) for line in table],
)
def test_a_published_line_is_what_was_kept(line: str, first: str) -> None:
    families = strata(line)
    assert sum(family.size for family in families) >= 200
    assert f"| {mean_over_seeds(families).say('.1f', 100)} |" in line
    if line != first:
        assert f"| {difference_over_seeds(families, strata(first)).say('+.1f', 100)} |" in line


def test_all_that_is_kept_is_published() -> None:
    kept = {path.parent.name for path in (DOCS / "ablations" / "scores").glob("*/*.jsonl")}
    assert kept == {key for table in TABLES for line in table for key in re.findall(KEY, line)} and kept
