"""Draws docs/figures/ablation_*.svg, one per question, from the episodes kept beside docs/ablations.md.

python scripts/ablation_figures.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from math import log10
from pathlib import Path

import numpy as np

from spear.ablations.table import successes
from spear.evaluate.results import load
from spear.evaluate.stats import Estimate, difference_over_seeds, mean_over_seeds
from spear.report.plot import COLOURS, Axis, Line, chart
from spear.types import Array

DOCS = Path(__file__).parents[1] / "docs"
KEY = r"\(ablations/scores/([0-9a-f]{12})\)"
STYLE = """<style>text{font:12px sans-serif;fill:#444}.grid-line{stroke:#e3e6ea;fill:none}
.zero-line{stroke:#555;fill:none}.whisker-line{stroke:#333;stroke-width:1.4;fill:none}</style>"""
HERE, THEIRS = "here, with its 95 % interval", "paper"


def tables() -> list[dict[str, list[Array]]]:
    """Of each table of the page: row → success [seeds, scenes] of each task family."""
    found = []
    for block in (DOCS / "ablations.md").read_text().split("\n\n"):
        rows = {}
        for line in block.splitlines():
            if keys := re.findall(KEY, line):
                seeds = [load(DOCS / "ablations" / "scores" / key) for key in keys]
                name = line.split("|")[1].split("(")[0].replace("`", "").strip()
                rows[name] = successes(seeds, seeds[0].families)
        found += [rows] if rows else []
    return found


def points(x: list[float], found: list[Estimate], name: str, colour: str, joined: bool = True) -> Line:
    """Estimates, in percent, over x."""
    mean, low, high = ([100 * getattr(e, end) for e in found] for end in ("value", "low", "high"))
    return Line(name, x, mean, colour, low=low, high=high, dots=True, joined=joined)


def write(name: str, lines: list[Line], x: Axis, y: Axis) -> None:
    """A chart as a file of its own, its legend above it, on white."""
    size = (760, 320)
    body = re.search(r"<svg[^>]*>(.*)</svg>", chart(lines, x, y, size=size), re.S)
    assert body is not None
    legend, left = [], 60.0
    for line in (line for line in lines if line.name):
        legend.append(f'<circle cx="{left:g}" cy="14" r="4" fill="{line.colour}"/>')
        legend.append(f'<text x="{left + 9:g}" y="18">{line.name}</text>')
        left += 30 + 6.4 * len(line.name)
    whole = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1] + 26}">{STYLE}'
    whole += f'<rect width="100%" height="100%" fill="#fff"/>{"".join(legend)}'
    text = f'{whole}<g transform="translate(0 26)">{body[1]}</g></svg>\n'
    (DOCS / "figures" / f"ablation_{name}.svg").write_text(re.sub(r"\n\s*", "\n", text))


def parts() -> None:
    """What each choice of the paper brings over the other, here and there."""
    three, long, *_ = tables()
    full, longer = three["full method"], long["full method"]
    found = [
        ("3D, 1,500 steps", full, three["no-3d"], 14.6),
        ("3D, 3,500 steps", longer, long["no-3d"], 14.6),
        ("objects, no pixels", full, three["points"], 14.6),
        ("MoGe's encoder", full, three["no-moge"], 9.4),
        ("S³ and cosine", full, three["linear-mse"], 9.4),
        ("quantiles", three["quantile"], full, 12.5),
        ("velocities", three["velocity"], full, None),
    ]
    places = list(map(float, range(len(found))))
    ours = [difference_over_seeds(with_it, without) for _, with_it, without, _ in found]
    theirs = [np.nan if there is None else there for *_, there in found]
    paper = Line(THEIRS, [place + 0.12 for place in places], theirs, COLOURS[1], dots=True, joined=False)
    ticks = [(place, name) for place, (name, *_) in zip(places, found, strict=True)]
    across = Axis(ends=(-0.6, len(found) - 0.4), ticks=ticks)
    here = points(places, ours, HERE, COLOURS[0], joined=False)
    write("parts", [here, paper], across, Axis("points that it brings"))


def demonstrations() -> None:
    """Success over demonstrations, with and without 3D, and every training."""
    _, long, some, _ = tables()
    rows: dict[str, dict[int, list[Array]]] = defaultdict(dict)
    for name in ("full method", "no-3d"):
        rows[name][500] = long[name]
        for number in (250, 2000):
            rows[name][number] = some[f"{number:,}, {name}"]
    lines = []
    for shift, colour, name in ((-0.012, COLOURS[0], "full method"), (0.012, COLOURS[1], "no-3d")):
        title = {"full method": "with 3D", "no-3d": "without (dots beside the intervals: single trainings)"}[
            name
        ]
        sizes = sorted(rows[name])
        trainings = {n: 100 * np.mean(rows[name][n], axis=(0, 2)) for n in sizes}
        places = [log10(n) + 2 * shift for n, some in trainings.items() for _ in some]
        x = [log10(n) + shift for n in sizes]
        lines.append(points(x, [mean_over_seeds(rows[name][n]) for n in sizes], title, colour))
        each = np.concatenate([*trainings.values()])
        lines.append(Line("", places, each, colour, dots=True, joined=False))
    ticks = [(log10(n), f"{n:,}") for n in (250, 500, 2000)]
    write(
        "demonstrations",
        lines,
        Axis("demonstrations of each family (3,500 steps)", (2.33, 3.37), ticks),
        Axis("success", (50, 100), unit=" %"),
    )


def images() -> None:
    """Success over 3D-labelled images: one training each."""
    rows = tables()[-1]
    names = {0: "no-images", 816: "images-16th", 3264: "images-4th", 13056: "full method"}
    x = [log10(max(n, 260)) for n in names]
    found = [mean_over_seeds(rows[name]) for name in names.values()]
    ticks = [(place, f"{n:,}") for place, n in zip(x, names, strict=True)]
    across, up = Axis("3D-labelled images", (2.3, 4.3), ticks), Axis("success", (30, 90), unit=" %")
    write("images", [points(x, found, "one training each", COLOURS[0])], across, up)


def error_by_time() -> None:
    """How far the end that the network predicts at time τ is from the demonstrated action."""
    blocks = re.split(r"\n(nano-vla-\w+)\n", (DOCS / "tables" / "error_by_time.txt").read_text())
    found = [np.array(re.findall(r"^\| (0[.\d]*) \| ([\d.]+) ", text, re.M), float) for text in blocks[2::2]]
    kinds = {"velocity (the paper's loss)": found[:3], "clean action": found[3:6]}
    lines = [
        Line(name if not i else "", table[:, 0], table[:, 1], COLOURS[k])
        for k, (name, tables) in enumerate(kinds.items())
        for i, table in enumerate(tables)
    ]
    error = Axis("error, mm", (0, 21))
    write("error_by_time", lines, Axis("flow time τ (0: noise, 1: action)", (0, 1)), error)


if __name__ == "__main__":
    for draw in (parts, demonstrations, images, error_by_time):
        draw()
