"""Numbers that others published, to be shown beside ours and never mixed into them.

One TOML file per table in `reference/`: its title, source, columns (tasks), which families of our results are
the same tasks, and success in %.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

from spear.evaluate.results import Results, terminal_table
from spear.evaluate.stats import Estimate

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Reference:
    """A published table.

    columns   tasks, and `families` the same tasks as families of our results; empty for means alone.
    rows      method -> success per column, %.
    means     method -> mean success, %, as published.
    note      what to know when reading it.
    trials    trials per task where we know or infer it.
    """

    title: str
    source: str
    columns: Sequence[str]
    families: Sequence[str]
    rows: Mapping[str, Sequence[float]]
    means: Mapping[str, float]
    note: str = ""
    trials: int | None = None

    def headers(self) -> list[str]:
        """Of the columns of `cells`."""
        return ["success, %", *self.columns, "mean"]

    def cells(self, ours: Sequence[tuple[str, Results]] = ()) -> list[list[str]]:
        """The table as text, marked as published; below it our results (by name), as measured here."""
        lines = []
        for name, mean in self.means.items():
            row = [f"{v:.1f}" for v in self.rows.get(name, ())] or ["–"] * len(self.columns)
            lines.append([f"{name} (published)", *row, f"{mean:.1f}"])
        for name, results in ours:
            here = set(results.families)
            found = [results.summary(family).success if family in here else None for family in self.families]
            found.append(results.mean() if here == set(self.families) else None)
            lines.append([f"{name} (measured here)", *map(_points, found)])
        return lines

    def table(self, ours: Sequence[tuple[str, Results]] = ()) -> Table:
        """The same for a terminal."""
        caption = f"Published numbers: {self.source}. {self.note}".strip()
        return terminal_table(self.title, self.headers(), self.cells(ours), caption)


def _points(e: Estimate | None) -> str:
    return "–" if e is None else f"{100 * e.value:.1f} [{100 * e.low:.0f}, {100 * e.high:.0f}]"


def references() -> dict[str, Reference]:
    """All published tables, by name."""
    folder = resources.files("spear.evaluate").joinpath("reference")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".toml")), key=lambda f: f.name)
    return {f.name.removesuffix(".toml"): Reference(**tomllib.loads(f.read_text("utf-8"))) for f in files}


def beside(results: Results) -> list[Reference]:
    """The published tables that hold a task of these results."""
    return [r for r in references().values() if set(r.families) & set(results.families)]
