"""The tables of the ablations for people: Markdown, and one HTML page with bars and the scaling curve."""

import json
from collections.abc import Sequence
from math import ceil, log10
from pathlib import Path
from typing import Any

from experiments.ablations.plan import Plan
from experiments.ablations.table import Filled, Line, to_json
from spear.report import plot
from spear.report.page import render_from
from spear.report.plot import GREY, LINE_COLORS, Axis, Bar, draw_bars, draw_chart, draw_differences
from spear.util.files import write_text

TEMPLATES = Path(__file__).with_name("templates")
CURVE = "images"
"""The table that is also drawn as a curve."""


def write(plan: Plan, tables: Sequence[Filled], out: Path) -> list[Path]:
    """As Markdown, as a page and as data, into a folder: ablations.md, ablations.html, ablations.json."""
    lines = [line for filled in tables for line in filled.lines]
    verdicts = [line.verdict.partition(":")[0] for line in lines]
    waiting = sum(line.success is None for line in lines)
    values: dict[str, Any] = {
        "title": "Ablations at nano size",
        "facts": [
            (verdicts.count("agrees"), "rows in which nano agrees with the paper"),
            (verdicts.count("disagrees"), "in which it disagrees"),
            (verdicts.count("cannot tell"), "in which the intervals cannot tell"),
            (waiting, "rows that have not run yet"),
        ],
        "plan": plan,
        "done": sum(len(line.by_seed) for line in lines),
        "wanted": plan.seeds * len(lines),
        "waiting": waiting,
        "tables": [_section(filled) for filled in tables],
    }
    texts = [render_from(TEMPLATES, name, **values) for name in ("ablations.md", "ablations.html")]
    files = [out / f"ablations.{ending}" for ending in ("md", "html", "json")]
    for file, text in zip(files, [*texts, json.dumps(to_json(tables), indent=1)], strict=True):
        write_text(file, text)
    return files


def _section(filled: Filled) -> dict[str, Any]:
    """A table as the templates show it."""
    apart = [(line.row.title, line.against) for line in filled.lines if line.against is not None]
    has_run = any(line.success is not None for line in filled.lines)
    return {
        "table": filled.table,
        "source": filled.source,
        "chart": _scaling_curve(filled)
        if filled.table.name == CURVE and has_run
        else _bars(filled),
        "against": next(
            line.row.title for line in filled.lines if line.row.name == filled.table.against
        ),
        "differences": draw_differences(apart) if apart else "",
        "headers": list(_cells(filled.lines[0], filled)),
        "rows": [list(_cells(line, filled).values()) for line in filled.lines],
    }


def _cells(line: Line, filled: Filled) -> dict[str, str]:
    """A line as text, by the columns' names."""
    cells = {"row": line.row.title}
    if filled.table.name == CURVE:
        cells["3D-labelled images"] = f"{line.images:,}"
    success, against = line.success, line.against
    cells["success, % [95 %]"] = "not run yet" if success is None else success.to_text(".1f", 100)
    cells["difference, points [95 %]"] = "–" if against is None else against.to_text("+.1f", 100)
    if filled.source:
        theirs, apart = line.published, line.published_against
        cells["paper (theirs), %"] = "–" if theirs is None else f"{theirs:.1f}"
        cells["points (theirs)"] = "–" if apart is None else f"{apart:+.1f}"
        cells["verdict"] = line.verdict
    cells["each seed, %"] = " ".join(f"{100 * value:.1f}" for value in line.by_seed) or "–"
    return {**cells, "policy steps": f"{line.steps:,}"}


def _bars(filled: Filled) -> str:
    """Ours as full bars with intervals; below each the paper's number as a hollow one."""
    groups = []
    for line in filled.lines:
        e, rows = line.success, [Bar("here", None, "not run yet")]
        if e is not None:
            rows = [Bar("here", e.value, e.to_text(".1f", 100), e.low, e.high)]
        if line.published is not None:
            rows.append(
                Bar("paper", line.published / 100, f"{line.published:.1f} (theirs)", style="theirs")
            )
        groups.append((line.row.title, rows))
    return draw_bars(groups)


def _scaling_curve(filled: Filled) -> str:
    """Success over the number of 3D-labelled images: means with 95 % intervals, and a dot per training.

    The horizontal axis is logarithmic, with 0 set apart at its left end.
    """
    lines = sorted(filled.lines, key=lambda line: line.images)
    found = [(line.images, e, line.by_seed) for line in lines if (e := line.success) is not None]
    first = min((images for images, _, _ in found if images), default=1)
    x = [log10(images) if images else log10(first) - 0.5 for images, _, _ in found]
    top = min(100, 10 * ceil(10 * max(max(e.high, *singles) for _, e, singles in found)))
    mean = plot.Line(
        "mean of the trainings, with its 95 % interval",
        x,
        [100 * e.value for _, e, _ in found],
        LINE_COLORS[0],
        low=[100 * e.low for _, e, _ in found],
        high=[100 * e.high for _, e, _ in found],
        dots=True,
    )
    trainings = [
        (a + 0.03, 100 * s) for a, (_, _, some) in zip(x, found, strict=True) for s in some
    ]
    places, successes = zip(*trainings, strict=True)
    each = plot.Line("one training", places, successes, GREY, dots=True, joined=False)
    ticks = [(a, f"{n:,}") for a, (n, _, _) in zip(x, found, strict=True)]
    images = Axis("3D-labelled images", (x[0] - 0.2, x[-1] + 0.2), ticks)
    return draw_chart([each, mean], images, Axis("success", (0, top), unit=" %"), size=(760, 340))
