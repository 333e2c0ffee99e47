"""Draws docs/figures/ablation_*.svg, one per question, from the episodes in results/scores.parquet.

    python -m experiments.ablations.figures

The paper's numbers are those that `spear evaluate reference` shows.
"""

from __future__ import annotations

import re
from math import log10
from pathlib import Path

import numpy as np

from experiments.ablations.scores import find_key, load_scores
from experiments.ablations.table import stack_successes
from spear.evaluate.compare import load_references
from spear.evaluate.stats import Estimate, estimate_difference_over_seeds, estimate_mean_over_seeds
from spear.report.plot import LINE_COLORS, Axis, Line, draw_chart
from spear.types import Array

DOCS = Path(__file__).parents[2] / "docs"
KEY = r"`([0-9a-f]{4})`"
STYLE = """<style>text{font:12px sans-serif;fill:#444}.grid-line{stroke:#e3e6ea;fill:none}
.zero-line{stroke:#555;fill:none}.whisker-line{stroke:#333;stroke-width:1.4;fill:none}</style>"""
Rows = dict[str, list[Array]]
"""Row of a table → success [seeds, scenes] of each task family."""


def tables() -> list[list[str]]:
    """Of each table of the page the lines that name their episodes; tables without such are left
    out.
    """
    blocks = (DOCS / "ablations.md").read_text().split("\n\n")
    lines = ([line for line in block.splitlines() if re.search(KEY, line)] for block in blocks)
    return [table for table in lines if table]


def successes_of(line: str) -> list[Array]:
    """Success [seeds, scenes] of each task family behind a line of a table."""
    seeds = [load_scores()[find_key(prefix)] for prefix in re.findall(KEY, line)]
    return stack_successes(seeds, seeds[0].families)


def rows(table: list[str]) -> Rows:
    """Of each line of a table, by its name."""
    return {
        line.split("|")[1].split("(")[0].replace("`", "").strip(): successes_of(line)
        for line in table
    }


def points(
    x: list[float], found: list[Estimate], name: str, colour: str, joined: bool = True
) -> Line:
    """Estimates, in percent, over x."""
    mean, low, high = ([100 * getattr(e, end) for e in found] for end in ("value", "low", "high"))
    return Line(name, x, mean, colour, low=low, high=high, dots=True, joined=joined)


def trainings(x: list[float], found: list[list[Array]], colour: str) -> Line:
    """Every training behind rows, in percent, at their x."""
    each = [100 * np.mean(row, axis=(0, 2)) for row in found]
    places = [place for place, row in zip(x, each, strict=True) for _ in row]
    return Line("", places, np.concatenate(each), colour, dots=True, joined=False)


def write(name: str, lines: list[Line], x: Axis, y: Axis) -> None:
    """A chart as a file of its own, its legend above it, on white."""
    size = (760, 320)
    body = re.search(r"<svg[^>]*>(.*)</svg>", draw_chart(lines, x, y, size=size), re.S)
    assert body is not None
    legend, left = [], 60.0
    for line in (line for line in lines if line.name):
        legend.append(f'<circle cx="{left:g}" cy="14" r="4" fill="{line.color}"/>')
        legend.append(f'<text x="{left + 9:g}" y="18">{line.name}</text>')
        left += 30 + 6.4 * len(line.name)
    whole = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1] + 26}">{STYLE}'
    )
    whole += f'<rect width="100%" height="100%" fill="#fff"/>{"".join(legend)}'
    text = f'{whole}<g transform="translate(0 26)">{body[1]}</g></svg>\n'
    (DOCS / "figures" / f"ablation_{name}.svg").write_text(re.sub(r"\n\s*", "\n", text))


def parts(three: Rows, long: Rows) -> None:
    """What each choice of the paper brings over the other, here and there."""

    def published(table: str, choice: str, other: str) -> float:
        means = load_references()[table].means
        return means[choice] - means[other]

    full = three["full method"]
    brings_3d = published("ablations", "full", "no 3D")
    found = [
        ("3D, 1,500 steps", full, three["no-3d"], brings_3d),
        ("3D, 3,500 steps", long["full method"], long["no-3d"], brings_3d),
        (
            "objects, no pixels",
            full,
            three["points"],
            published("ablations", "full", "points but no objects"),
        ),
        ("MoGe's encoder", full, three["no-moge"], published("ablations", "full", "no MoGe")),
        (
            "S³ and cosine",
            full,
            three["linear-mse"],
            published("rotation", "S³, cosine", "linear, MSE"),
        ),
        (
            "quantiles",
            three["quantile"],
            full,
            published("normalisation", "1–99 % quantile", "mean-std"),
        ),
        ("velocities", three["velocity"], full, np.nan),
    ]
    places = [float(place) for place in range(len(found))]
    ours = [estimate_difference_over_seeds(with_it, without) for _, with_it, without, _ in found]
    here = points(places, ours, "here, with its 95 % interval", LINE_COLORS[0], joined=False)
    beside, theirs = [place + 0.12 for place in places], [there for *_, there in found]
    paper = Line("paper", beside, theirs, LINE_COLORS[1], dots=True, joined=False)
    ticks = [(place, name) for place, (name, *_) in zip(places, found, strict=True)]
    across = Axis(ends=(-0.6, len(found) - 0.4), ticks=ticks)
    write("parts", [here, paper], across, Axis("points that it brings"))


def demonstrations(long: Rows, some: Rows) -> None:
    """Success over demonstrations, with and without 3D, and every training."""
    lines = []
    for name, title, shift, colour in (
        ("full method", "with 3D", -0.012, LINE_COLORS[0]),
        ("no-3d", "without (dots beside the intervals: single trainings)", 0.012, LINE_COLORS[1]),
    ):
        rows = {
            n: long[name] if n == 500 else some[f"{n:,}, {name}"] for n in (250, 500, 1000, 2000)
        }
        x = [log10(n) + shift for n in rows]
        lines.append(
            points(x, [estimate_mean_over_seeds(row) for row in rows.values()], title, colour)
        )
        lines.append(trainings([place + shift for place in x], [*rows.values()], colour))
    ticks = [(log10(n), f"{n:,}") for n in (250, 500, 1000, 2000)]
    across = Axis("demonstrations of each family (3,500 steps)", (2.33, 3.37), ticks)
    write("demonstrations", lines, across, Axis("success", (50, 100), unit=" %"))


def images(curve: Rows) -> None:
    """Success over 3D-labelled images, and every training."""
    numbers = [int(name.replace(",", "").replace("none", "0")) for name in curve]
    x = [log10(max(n, 16)) for n in numbers]
    found = [estimate_mean_over_seeds(row) for row in curve.values()]
    lines = [
        points(
            x,
            found,
            "three trainings each, the last two (dots beside the intervals)",
            LINE_COLORS[0],
        )
    ]
    lines.append(trainings([place + 0.03 for place in x], [*curve.values()], LINE_COLORS[0]))
    ticks = [(place, f"{n:,}") for place, n in zip(x, numbers, strict=True)]
    across, up = Axis("3D-labelled images", (1, 4.3), ticks), Axis("success", (20, 80), unit=" %")
    write("images", lines, across, up)


def error_by_time() -> None:
    """How far the end that the network predicts at time τ is from the demonstrated action."""
    blocks = re.split(r"\n(nano-vla-\w+)\n", (DOCS / "tables" / "error_by_time.txt").read_text())
    found = [
        np.array(re.findall(r"^\| (0[.\d]*) \| ([\d.]+) ", text, re.M), float)
        for text in blocks[2::2]
    ]
    kinds = {"velocity (the paper's loss)": found[:3], "clean action": found[3:6]}
    lines = [
        Line("" if seed else name, table[:, 0], table[:, 1], colour)
        for (name, seeds), colour in zip(kinds.items(), LINE_COLORS, strict=False)
        for seed, table in enumerate(seeds)
    ]
    error = Axis("error, mm", (0, 21))
    write("error_by_time", lines, Axis("flow time τ (0: noise, 1: action)", (0, 1)), error)


if __name__ == "__main__":
    three, long, some, _, _, curve, _ = map(rows, tables())
    parts(three, long)
    demonstrations(long, some)
    images(curve)
    error_by_time()
