"""The tables of the ablations as Markdown, as one HTML page with charts, and as data."""

import json
from collections.abc import Sequence
from math import ceil, log10
from pathlib import Path
from typing import Any

from experiments.ablations.plan import Plan
from experiments.ablations.table import FilledTable, Line, to_json
from spear.report import plot
from spear.report.page import render_from
from spear.report.plot import (
    GREY,
    LINE_COLORS,
    Axis,
    Bar,
    draw_bars,
    draw_chart,
    draw_rate_differences,
)
from spear.util.files import write_text

TEMPLATES = Path(__file__).with_name("templates")
CURVE_TABLE = "images"  # this table is also drawn as a curve
CHART_SIZE = (760, 340)
ZERO_OFFSET = 0.5  # decades between 0 images and the first number, on a logarithmic axis
DOT_OFFSET = 0.03  # decades between an interval and the dots of its trainings


def write_report(plan: Plan, tables: Sequence[FilledTable], out: Path) -> list[Path]:
    """Write ablations.md, ablations.html and ablations.json into a folder; returns their paths."""
    lines = [line for filled in tables for line in filled.lines]
    verdicts = [line.verdict.partition(":")[0] for line in lines]
    num_waiting = sum(line.success is None for line in lines)
    values: dict[str, Any] = {
        "title": "Ablations at nano size",
        "facts": [
            (verdicts.count("agrees"), "rows in which nano agrees with the paper"),
            (verdicts.count("disagrees"), "in which it disagrees"),
            (verdicts.count("cannot tell"), "in which the intervals cannot tell"),
            (num_waiting, "rows that have not run yet"),
        ],
        "plan": plan,
        "done": sum(len(line.by_seed) for line in lines),
        "wanted": plan.seeds * len(lines),
        "waiting": num_waiting,
        "tables": [_make_section(filled) for filled in tables],
    }
    contents = {
        "ablations.md": render_from(TEMPLATES, "ablations.md", **values),
        "ablations.html": render_from(TEMPLATES, "ablations.html", **values),
        "ablations.json": json.dumps(to_json(tables), indent=1),
    }
    for name, content in contents.items():
        write_text(out / name, content)
    return [out / name for name in contents]


def _make_section(filled: FilledTable) -> dict[str, Any]:
    """A table as the templates show it."""
    has_run = any(line.success is not None for line in filled.lines)
    if filled.table.name == CURVE_TABLE and has_run:
        figure = _draw_scaling_curve(filled)
    else:
        figure = _draw_bars(filled)
    row_differences = []
    for line in filled.lines:
        if line.against is not None:
            row_differences.append((line.row.title, line.against))
    titles = {line.row.name: line.row.title for line in filled.lines}
    return {
        "table": filled.table,
        "source": filled.source,
        "chart": figure,
        "against": titles[filled.table.against],
        "differences": draw_rate_differences(row_differences) if row_differences else "",
        "headers": list(_make_cells(filled.lines[0], filled)),
        "rows": [list(_make_cells(line, filled).values()) for line in filled.lines],
    }


def _make_cells(line: Line, filled: FilledTable) -> dict[str, str]:
    """A line as text, by the columns' headers."""
    cells = {"row": line.row.title}
    if filled.table.name == CURVE_TABLE:
        cells["3D-labeled images"] = f"{line.images:,}"

    success = "not run yet"
    if line.success is not None:
        success = line.success.to_text(".1f", 100)
    cells["success, % [95 %]"] = success
    against = "–"
    if line.against is not None:
        against = line.against.to_text("+.1f", 100)
    cells["difference, points [95 %]"] = against

    if filled.source:
        published = "–" if line.published is None else f"{line.published:.1f}"
        cells["paper (theirs), %"] = published
        points = "–" if line.published_against is None else f"{line.published_against:+.1f}"
        cells["points (theirs)"] = points
        cells["verdict"] = line.verdict
    cells["each seed, %"] = " ".join(f"{100 * value:.1f}" for value in line.by_seed) or "–"
    cells["policy steps"] = f"{line.steps:,}"
    return cells


def _draw_bars(filled: FilledTable) -> str:
    """Our numbers as full bars with intervals; below each the paper's number as a hollow one."""
    groups = []
    for line in filled.lines:
        success = line.success
        if success is None:
            group = [Bar("here", None, "not run yet")]
        else:
            text = success.to_text(".1f", 100)
            group = [Bar("here", success.value, text, success.low, success.high)]
        if line.published is not None:
            text = f"{line.published:.1f} (theirs)"
            group.append(Bar("paper", line.published / 100, text, style="theirs"))
        groups.append((line.row.title, group))
    return draw_bars(groups)


def _draw_scaling_curve(filled: FilledTable) -> str:
    """Success over the number of 3D-labeled images: means with intervals, and a dot per training.

    The horizontal axis is logarithmic, with 0 at its left end.
    """
    finished = []
    for line in sorted(filled.lines, key=lambda line: line.images):
        if line.success is not None:
            finished.append((line.images, line.success, line.by_seed))
    smallest = min((images for images, _, _ in finished if images), default=1)

    x = []
    tops = []
    dot_x = []
    dot_y = []
    for images, success, by_seed in finished:
        position = log10(images) if images else log10(smallest) - ZERO_OFFSET
        x.append(position)
        tops.append(max(success.high, *by_seed))
        for rate in by_seed:
            dot_x.append(position + DOT_OFFSET)
            dot_y.append(100 * rate)

    mean = plot.Line(
        "mean of the trainings, with its 95 % interval",
        x,
        [100 * success.value for _, success, _ in finished],
        LINE_COLORS[0],
        low=[100 * success.low for _, success, _ in finished],
        high=[100 * success.high for _, success, _ in finished],
        dots=True,
    )
    trainings = plot.Line("one training", dot_x, dot_y, GREY, dots=True, joined=False)
    ticks = [(a, f"{images:,}") for a, (images, _, _) in zip(x, finished, strict=True)]
    images_axis = Axis("3D-labeled images", (x[0] - 0.2, x[-1] + 0.2), ticks)
    success_axis = Axis("success", (0, min(100, 10 * ceil(10 * max(tops)))), unit=" %")
    return draw_chart([trainings, mean], images_axis, success_axis, size=CHART_SIZE)
