"""Comparisons as pages: two policies in the same scenes; predicted actions beside a demonstrator's."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spear.errors import format_count
from spear.evaluate.compare import (
    SIGNIFICANCE_LEVEL,
    Comparison,
    Pair,
    Reference,
    format_p_value,
    format_points,
    format_row,
)
from spear.evaluate.open_loop import OpenLoopErrors
from spear.evaluate.results import Outcome, Results
from spear.report.page import render, spaced
from spear.report.plot import COLOURS, GREY, Axis, Line, bars, chart, differences, rate_bars


def comparison_page(
    comparison: Comparison,
    folders: tuple[Path, Path],
    films: int = 12,
    published: Sequence[Reference] = (),
    ours: Sequence[tuple[str, Results]] = (),
) -> str:
    """A self-contained document.

    folders    where the films of the first and the second policy lie.
    films      at most so many pairs of films, chosen by `filmed_pairs`.
    published  tables of others; `ours`, by name, are shown below each.
    """
    c, mean = comparison, comparison.mean
    a, b = mean.first, mean.second
    facts = [
        (f"{a.value:.1%}", f"{c.first}: mean success [{a.low:.0%}, {a.high:.0%}]"),
        (f"{b.value:.1%}", f"{c.second}: mean success [{b.low:.0%}, {b.high:.0%}]"),
        tuple(format_points(mean.difference).split(" ", 1)),
        (
            f"p {format_p_value(mean.p)}",
            f"paired test, {format_count(len(c.pairs), 'shared scenes')}",
        ),
    ]
    groups = [
        (spaced(r.name), rate_bars([(c.first, r.first), (c.second, r.second)])) for r in c.rows
    ]
    return render(
        "comparison.html",
        title=f"{c.first} against {c.second}",
        facts=facts,
        comparison=c,
        alpha=SIGNIFICANCE_LEVEL,
        rates=bars(groups),
        differences=differences([(spaced(r.name), r.difference) for r in c.rows]),
        rows=[[spaced(format_row(r)[0]), *format_row(r)[1:]] for r in c.rows],
        scenes=[_scene(c, pair, folders) for pair in filmed_pairs(c, folders, films)],
        published=[(table, table.headers(), table.cells(ours)) for table in published],
    )


def open_loop_page(model: OpenLoopErrors, reference: OpenLoopErrors) -> str:
    """A self-contained document with `open_loop_charts`."""
    num_episodes = format_count(len(model.truth), "held-out episodes")
    title = f"{model.name}: predicted actions, the first of {num_episodes}"
    return render(
        "open_loop.html", title=title, facts=[], charts=open_loop_charts(model, reference)
    )


def open_loop_charts(model: OpenLoopErrors, reference: OpenLoopErrors) -> list[list[str]]:
    """Of three held-out episodes: predicted and true displacement along each axis, and gripper, by step."""
    names = ("Forward (x), mm", "Left (y), mm", "Up (z), mm", "Gripper opening")
    shown = []
    episodes = zip(model.truth, model.predicted, reference.predicted, strict=True)
    for truth, ours, theirs in itertools.islice(episodes, 3):
        charts = []
        for row, name in enumerate(names):
            scale, column = (1000, row) if row < 3 else (1, 7)
            steps = range(len(truth))
            lines = [
                Line("demonstrator", steps, scale * truth[:, column], GREY, dots=True),
                Line(model.name, steps, scale * ours[:, column], COLOURS[0], dots=True),
                Line(reference.name, steps, scale * theirs[:, column], COLOURS[1], dashed=True),
            ]
            charts.append(chart(lines, Axis("step (5 Hz)"), title=name))
        shown.append(charts)
    return shown


def filmed_pairs(comparison: Comparison, folders: tuple[Path, Path], limit: int) -> list[Pair]:
    """The shared scenes to show: first those that only one of the two solved, of which both folders have a
    film, then those of which one has, then others of which both have one. Families take turns."""
    seen: dict[tuple[bool, bool, str], int] = {}
    ranked = []
    for a, b in comparison.pairs:
        count = sum((f / o.film_name).is_file() for f, o in zip(folders, (a, b), strict=True))
        agree = a.success == b.success
        if count == 2 or (count and not agree):
            key = (agree, count == 1, a.family)
            seen[key] = seen.get(key, 0) + 1
            ranked.append((*key[:2], seen[key], (a, b)))
    return [pair for *_, pair in sorted(ranked, key=lambda r: r[:3])][:limit]


def _scene(c: Comparison, pair: Pair, folders: tuple[Path, Path]) -> dict[str, Any]:
    """What two policies did in one scene, each with its film if there is one."""
    runs = []
    for name, outcome, folder in zip((c.first, c.second), pair, folders, strict=True):
        path = folder / outcome.film_name
        runs.append((f"{name}: {ending(outcome)}", path.read_bytes() if path.is_file() else None))
    first = pair[0]
    return {
        "title": f"{spaced(first.family)}, scene {first.seed}: {first.instruction}",
        "runs": runs,
    }


def ending(outcome: Outcome) -> str:
    """How an episode ended, in words."""
    words = (
        f"success after {format_count(outcome.steps, 'steps')}" if outcome.success else "failure"
    )
    return words + (
        f", {format_count(outcome.unreachable, 'steps')} out of reach"
        if outcome.unreachable
        else ""
    )
