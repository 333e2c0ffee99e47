"""The tables of tables.md, with the kept episodes behind each of their lines."""

import re
from pathlib import Path

from experiments.ablations.scores import find_key, load_scores
from experiments.ablations.table import stack_successes
from spear.types import Array

DOCS = Path(__file__).parents[2] / "docs"
TABLES = Path(__file__).with_name("tables.md")
KEY_PATTERN = r"`([0-9a-f]{4})`"
"""The first digits of a key, in the last column of a table."""

SuccessTables = list[Array]
"""Success [seeds, scenes] of each task family."""


def read_published_tables() -> list[list[str]]:
    """The lines of each table of the page that name keys; tables without keys are left out."""
    tables = []
    for block in TABLES.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if re.search(KEY_PATTERN, line)]
        if lines:
            tables.append(lines)
    return tables


def find_keys(line: str) -> list[str]:
    """The keys of the trainings behind a line of a table."""
    return [find_key(prefix) for prefix in re.findall(KEY_PATTERN, line)]


def load_line(line: str) -> SuccessTables:
    """The episodes behind a line of a table."""
    seeds = [load_scores()[key] for key in find_keys(line)]
    return stack_successes(seeds, seeds[0].families)


def load_rows(table: list[str]) -> dict[str, SuccessTables]:
    """Name of each line of a table → its episodes."""
    rows = {}
    for line in table:
        first_cell = line.split("|")[1]
        name = first_cell.split("(")[0].replace("`", "").strip()
        rows[name] = load_line(line)
    return rows
