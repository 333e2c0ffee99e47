"""The published table of the ablations says what the episodes say that are kept beside it."""

import re

import pytest

from experiments.ablations.figures import DOCS, KEY, successes_of, tables
from spear.evaluate.stats import difference_over_seeds, mean_over_seeds

TABLES = tables()


def first(table: list[str], number: int) -> str:
    """The line that one is compared with: the last before it without a difference."""
    return next(
        line for line in reversed(table[: number + 1]) if re.search(r"\[[\d., ]+\] \| – \|", line)
    )


@pytest.mark.parametrize(
    ("line", "first"),
    [(line, first(table, number)) for table in TABLES for number, line in enumerate(table)],
    ids=[f"{n}-{line.split('|')[1].strip()}" for n, table in enumerate(TABLES) for line in table],
)
def test_a_published_line_is_what_was_kept(line: str, first: str) -> None:
    families = successes_of(line)
    assert sum(family.size for family in families) >= 200
    assert f"| {mean_over_seeds(families).say('.1f', 100)} |" in line
    if line != first:
        assert (
            f"| {difference_over_seeds(families, successes_of(first)).say('+.1f', 100)} |" in line
        )


def test_all_that_is_kept_is_published() -> None:
    kept = {path.parent.name for path in (DOCS / "ablations" / "scores").glob("*/*.jsonl")}
    assert (
        kept == {key for table in TABLES for line in table for key in re.findall(KEY, line)}
        and kept
    )
