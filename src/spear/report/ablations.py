"""The tables for people: Markdown, and one HTML page with bars and the scaling curve."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from spear.ablations.plan import Plan
from spear.ablations.table import Filled, Line, to_json
from spear.evaluate.stats import Estimate
from spear.report import page
from spear.report.curve import drawing
from spear.report.page import Section
from spear.util.files import write_text

TITLE = "Ablations at nano size"
CURVE = "images"
"""The table that is also drawn as a curve."""
METHOD = (
    "Success is the mean of the task families, in the embedded simulator. Every training meets the same held-out "
    "scenes. Intervals are 95 % and count both chances, of trainings and of scenes: the variance over seeds plus that "
    "over scenes minus what both contain, with Student's t at Satterthwaite's degrees of freedom, and never narrower "
    "than if all episodes were independent. The published numbers were measured by others, at 3 billion parameters, on "
    "other tasks: only the direction is compared. “agrees”: our interval of the difference leaves out zero on the "
    "paper's side; “disagrees”: on the other side; “cannot tell”: it holds zero, or there is only one seed. Several "
    "rows are judged, so one in twenty of these intervals misses the truth by chance."
)


def markdown(plan: Plan, tables: Sequence[Filled]) -> str:
    """All tables as Markdown, with the method below them."""
    parts = [f"# {TITLE}\n\n{_state(plan, tables)}\n"]
    for filled in tables:
        names = headers(filled)
        lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
        lines += [f"| {' | '.join(cells(line, filled))} |" for line in filled.lines]
        note = f" {filled.table.note}" if filled.table.note else ""
        source = f" Paper: {filled.source}." if filled.source else ""
        below = f"Differences are from “{_compared(filled)}”.{note}{source}"
        parts.append(f"## {filled.table.title}\n\n" + "\n".join(lines) + f"\n\n{below}\n")
    parts.append(METHOD)
    return "\n".join(parts) + "\n"


def html(plan: Plan, tables: Sequence[Filled]) -> str:
    """The same as a self-contained page, with bars."""
    verdicts = [line.verdict for filled in tables for line in filled.lines]
    facts = [
        (f"{verdicts.count('agrees')}", "rows in which nano agrees with the paper"),
        (f"{verdicts.count('disagrees')}", "in which it disagrees"),
        (
            f"{sum(v.startswith('cannot tell') for v in verdicts)}",
            "in which the intervals cannot tell",
        ),
        (f"{sum(line.success is None for f in tables for line in f.lines)}", "rows that have not run yet"),
    ]
    sections = [Section(filled.table.title, _section(filled)) for filled in tables]
    sections.append(Section("How to read this", page.paragraph(METHOD)))
    return page.page(TITLE, page.paragraph(_state(plan, tables)), facts, sections)


def write(plan: Plan, tables: Sequence[Filled], out: Path) -> list[Path]:
    """Both, and the same as data, into a folder: ablations.md, ablations.html, ablations.json."""
    texts = {
        "md": markdown(plan, tables),
        "html": html(plan, tables),
        "json": json.dumps(to_json(tables), indent=1),
    }
    paths = []
    for ending, text in texts.items():
        paths.append(out / f"ablations.{ending}")
        write_text(paths[-1], text)
    return paths


def cells(line: Line, filled: Filled) -> list[str]:
    """A line as text, under `headers`."""
    first = line.row.name == filled.table.against
    row = [
        line.row.title,
        "not run yet" if line.success is None else _rate(line.success),
        "–" if first or line.against is None else _points(line.against),
    ]
    if filled.source:
        row.append("–" if line.published is None else f"{line.published:.1f}")
        row.append("–" if line.published_against is None else f"{line.published_against:+.1f}")
        row.append(line.verdict)
    if filled.table.name == CURVE:
        row.insert(1, f"{line.images:,}")
    return [*row, " ".join(f"{100 * value:.1f}" for value in line.by_seed) or "–", f"{line.steps:,}"]


def headers(filled: Filled) -> list[str]:
    """Of the columns of `cells`."""
    names = ["row", "success, % [95 %]", "difference, points [95 %]"]
    if filled.source:
        names += ["paper (theirs), %", "points (theirs)", "verdict"]
    if filled.table.name == CURVE:
        names.insert(1, "3D-labelled images")
    return [*names, "each seed, %", "policy steps"]


def _compared(filled: Filled) -> str:
    return next(line.row.title for line in filled.lines if line.row.name == filled.table.against)


def _state(plan: Plan, tables: Sequence[Filled]) -> str:
    lines = [line for filled in tables for line in filled.lines]
    ran = sum(len(line.by_seed) for line in lines)
    families = ", ".join(family.replace("_", " ") for family in plan.families)
    text = f"{plan.scenes} held-out scenes of each task family ({families}) per training; "
    text += f"{ran} of {plan.seeds * len(lines)} numbers are in."
    if any(line.success is None for line in lines):
        text += " Rows without a number have not run yet."
    return text


def _rate(e: Estimate) -> str:
    return f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]"


def _points(e: Estimate) -> str:
    return f"{100 * e.value:+.1f} [{100 * e.low:+.1f}, {100 * e.high:+.1f}]"


def _section(filled: Filled) -> str:
    ran = [line for line in filled.lines if line.success is not None]
    parts = []
    if filled.table.name == CURVE and ran:
        parts.append(drawing([(line.images, line.success, line.by_seed) for line in ran if line.success]))
    elif ran:
        parts.append(_bars(filled))
    apart = [(line.row.title, line.against) for line in filled.lines if line.against is not None]
    if apart:
        parts.append(
            f"<h3>Difference from “{escape(_compared(filled))}”, points</h3>{page.difference_bars(apart)}"
        )
    parts.append("<h3>Numbers</h3>")
    parts.append(page.table(headers(filled), [cells(line, filled) for line in filled.lines]))
    if filled.table.note:
        parts.append(page.paragraph(filled.table.note, soft=True))
    if filled.source:
        parts.append(page.paragraph(f"Published numbers (theirs): {filled.source}.", soft=True))
    return "".join(parts)


def _bars(filled: Filled) -> str:
    """Ours as full bars with intervals; below each the paper's number as a hollow one."""
    rows = []
    for line in filled.lines:
        rows.append(f'<div class="head">{escape(line.row.title)}</div>')
        if line.success is None:
            rows.append('<div class="name">here</div><div class="track"></div><div>not run yet</div>')
        else:
            e = line.success
            span = f"left:{100 * e.low:.1f}%;width:{100 * (e.high - e.low):.1f}%"
            rows.append(
                f'<div class="name">here</div><div class="track"><div class="fill" style="width:{100 * e.value:.1f}%">'
                f'</div><div class="whisker" style="{span}"></div></div><div>{_rate(e)}</div>'
            )
        if line.published is not None:
            rows.append(
                '<div class="name">paper</div><div class="track"><div class="fill theirs" '
                f'style="width:{line.published:.1f}%"></div></div><div>{line.published:.1f} (theirs)</div>'
            )
    return f'<div class="bars">{"".join(rows)}</div>'
