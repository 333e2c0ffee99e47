"""What the audit found, in words: a table for the terminal, and a page with plots that opens in any
browser."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

import numpy as np

from spear.data.audit import Finding, Part, Report, size
from spear.data.hypotheses import integrate_translations
from spear.report.dataset import plot, write_html

PATHS = 3
"""Episodes whose path is drawn."""
SHOWN = 5
"""Reasons why episodes were skipped that are shown."""
QUESTIONS = {
    "kind": "change or target",
    "frame": "frame",
    "unit": "unit",
    "signs": "signs of x y z",
    "shift": "steps late",
    "state": "form of states",
    "form": "form of actions",
}


def text(report: Report) -> str:
    """The report as a table for the terminal."""
    lines = [
        f"{report.path}: {report.episodes} episodes, {report.steps} steps",
        f"converted actions, integrated over each episode, end {1000 * report.closure[0]:.3g} mm and "
        f"{np.degrees(report.closure[1]):.3g}° from the last state (largest)",
        *(f"skipped: {reason}" for reason in report.skipped[:SHOWN]),
        *([f"skipped: {len(report.skipped) - SHOWN} more"] if len(report.skipped) > SHOWN else []),
        *(f"states: {remark}" for remark in report.states),
    ]
    for part in report.parts:
        lines += ["", *_part_text(part)]
    lines += ["", conclusion(report)]
    return "\n".join(lines)


def _part_text(part: Part) -> list[str]:
    best = part.best
    lines = [
        f"logged {part.name}s: the best reading is {size(part.name, best.mean)} off on average, "
        f"{best.relative:.1%} of the motion" + (f" ({part.note})" if part.note else "")
    ]
    if part.said is not None and part.margin is not None:
        lines[0] += (
            f"; the layout's leaves {part.said.relative:.1%}, which is {part.margin.value:+.1%} "
            f"[{part.margin.low:+.1%}, {part.margin.high:+.1%}]"
        )
    header = f"  {'':<26}{'best':<18}{'layout':<18}{'verdict':<13}next best: how much worse, 95 % interval"
    lines.append(header)
    for finding in part.findings:
        others = [(a, m) for a, (_, m) in finding.answers.items() if a != finding.best]
        other, margin = others[0]
        lines.append(
            f"  {QUESTIONS[finding.question]:<26}{finding.best:<18}{finding.said or '-':<18}{finding.verdict:<13}"
            f"{other}: {margin.value:+.1%} [{margin.low:+.1%}, {margin.high:+.1%}]"
        )
    return lines


def conclusion(report: Report) -> str:
    """One line: whether the layout is right."""
    wrong = [
        f"{part.name} {QUESTIONS[f.question]}: {f.best}, not {f.said}"
        for part in report.parts
        for f in part.findings
        if f.verdict == "wrong" and part.verdict == "wrong"
    ]
    wrong += [f"{p.name}s: the whole reading" for p in report.parts if p.verdict == "wrong" and not wrong]
    if wrong or report.states:
        return f"the layout is WRONG: {'; '.join([*report.states, *wrong])}"
    unsure = [
        f"{part.name} {QUESTIONS[f.question]} ({' or '.join(f.tied)})"
        for part in report.parts
        for f in part.findings
        if f.verdict == "cannot tell" and not part.note
    ]
    unsure += [
        f"{part.name} {QUESTIONS[f.question]} (not in the layout; {f.best} fits best)"
        for part in report.parts
        for f in part.findings
        if f.verdict == "not said" and not part.note
    ]
    unsure += [f"{part.name}s ({part.note})" for part in report.parts if part.note]
    if unsure:
        return f"nothing contradicts the layout; it cannot be told: {'; '.join(unsure)}"
    return "the layout agrees with the data"


_BARS = """
table{border-collapse:collapse}td,th{padding:2px 10px 2px 0;text-align:left;font-weight:normal}th{color:#667}
.bar{display:inline-block;height:.8em;background:#3d6fb6;border-radius:2px}.tied .bar{background:#3a8f5c}
.wrong{color:#d1495b;font-weight:600}.agrees{color:#3a8f5c}.conclusion{font-size:1.1em;font-weight:600}
"""


def write_audit_page(report: Report, out: Path) -> None:
    """Write the report as one HTML file. Raises SpearError for a file that cannot be written."""
    body = (
        f'<p class="conclusion">{escape(conclusion(report))}</p><pre>{escape(text(report))}</pre>'
        f"{''.join(_part(part) for part in report.parts)}{''.join(_paths(report))}"
    )
    write_html(out, f"audit of {Path(report.path).resolve().name}", body, _BARS)


def _part(part: Part) -> str:
    tables = "".join(_finding(part, finding) for finding in part.findings)
    return (
        f"<h2>Logged {part.name}s</h2><p>What is left of the motion by the best reading with each answer: 0 % is "
        f"perfect, 100 % is standing still. Green: fits as well as the best. {escape(part.note)}</p>{tables}"
    )


def _finding(part: Part, finding: Finding) -> str:
    rows = []
    for answer, (fit, margin) in finding.answers.items():
        width = 260 * min(fit.relative, 1.5) / 1.5
        tied = "tied" if answer in finding.tied else ""
        layout = "the layout" if answer == finding.said else ""
        rows.append(
            f'<tr class="{tied}"><td>{escape(answer)}</td><td><span class="bar" style="width:{width:.0f}px"></span> '
            f"{fit.relative:.1%} ({size(part.name, fit.mean)})</td>"
            f"<td>{margin.value:+.1%} [{margin.low:+.1%}, {margin.high:+.1%}]</td><td>{layout}</td></tr>"
        )
    name = finding.verdict.replace(" ", "-")
    return (
        f'<h3>{escape(QUESTIONS[finding.question])}: <span class="{name}">{finding.verdict}</span></h3>'
        "<table><tr><th>answer</th><th>left of the motion</th><th>worse than the best by (95 % interval)</th>"
        f"<th></th></tr>{''.join(rows)}</table>"
    )


def _paths(report: Report) -> Iterator[str]:
    """The paths of some episodes: as recorded, and as the logged translations lead from the first state."""
    part = next((part for part in report.parts if part.name == "translation"), None)
    if part is None:
        return
    yield "<h2>Logged translations, integrated from the first state</h2>"
    for recording in report.recordings[:PATHS]:
        best = integrate_translations(recording, part.best)
        said = best if part.said is None else integrate_translations(recording, part.said)
        seconds = np.arange(len(best)) / recording.rate_hz
        plots = [
            plot(
                f"{axis}, m",
                seconds,
                np.stack([recording.position[:, i], best[:, i], said[:, i]], axis=1),
                ("recorded", "best", "layout" if part.said is not None else "no layout"),
            )
            for i, axis in enumerate("xyz")
        ]
        yield f'<div class="label">{escape(recording.source)}</div><div class="plots">{"".join(plots)}</div>'
