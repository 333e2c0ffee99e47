"""What the audit found: a table for the terminal, and a page with plots."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spear.audit.dataset_audit import (
    MAX_EPISODES,
    MAX_STEPS,
    MAX_UNEXPLAINED,
    ActionPart,
    Finding,
    Margin,
    Report,
    format_size,
)
from spear.audit.hypotheses import integrate_translations
from spear.errors import format_count
from spear.report.page import render
from spear.report.plot import GREY, Axis, Bar, Line, draw_bars, draw_chart
from spear.util.files import write_text

MAX_PATHS = 3  # episodes whose path is drawn
QUESTIONS = {
    "kind": "change or target",
    "frame": "frame",
    "unit": "unit",
    "signs": "signs of x y z",
    "delay_steps": "steps late",
    "state_format": "form of states",
    "action_format": "form of actions",
}
"""Fields of a hypothesis, as the report calls them."""


class _NamedFinding(NamedTuple):
    """A finding, what it is about, and its name, such as "rotation frame"."""

    action_part: ActionPart
    finding: Finding
    name: str


def format_report(report: Report) -> str:
    """Return the report as a table for the terminal."""
    return render(
        "audit.txt",
        report=report,
        questions=QUESTIONS,
        conclusion=conclude(report),
        format_size=format_size,
        format_interval=_format_interval,
        format_count=format_count,
    )


def conclude(report: Report) -> str:
    """One line: the outcome, and what it is about."""
    findings = _name_findings(report)
    if report.outcome == "contradiction":
        problems = [*report.states, *_list_contradictions(report, findings)]
        return f"contradiction: the layout is WRONG: {'; '.join(problems)}"

    open_questions = _list_open_questions(report, findings)
    ending = ""
    if open_questions:
        ending = f"; it cannot be told: {'; '.join(open_questions)}"
    was_cut_short = report.num_episodes == MAX_EPISODES or report.num_steps > MAX_STEPS
    scope = f" of {report.num_episodes} episodes, the first" if was_cut_short else ""
    if report.outcome == "undecided":
        return f"undecided: nothing contradicts the layout in the data{scope}{ending}"
    return f"consistent: the layout agrees with the data{scope}{ending}"


def advise(report: Report) -> str:
    """What would decide an undecided audit: more episodes, a slower motion, or a line in
    spear.json."""
    is_unexplained = any(
        action_part.note and action_part.best_fit.relative_error > MAX_UNEXPLAINED
        for action_part in report.action_parts
    )
    is_not_said = any(part.verdict == "not said" for part in report.action_parts)
    open_questions = "; ".join(_list_open_questions(report, _name_findings(report)))
    if is_unexplained:
        cure = "Record slower motions, which the arm can follow"
    elif is_not_said:
        cure = "Write the missing keys into spear.json"
    else:
        cure = "Record more episodes with larger motions, or say it in spear.json if you know it"
    return f"{report.path} is undecided: {open_questions}. {cure}, and run the audit again."


def _name_findings(report: Report) -> list[_NamedFinding]:
    """Return all findings, with the parts that they are about."""
    findings = []
    for action_part in report.action_parts:
        for finding in action_part.findings:
            name = f"{action_part.name} {QUESTIONS[finding.question]}"
            findings.append(_NamedFinding(action_part, finding, name))
    return findings


def _list_contradictions(report: Report, findings: list[_NamedFinding]) -> list[str]:
    """What contradicts the layout, and what fits instead."""
    contradictions = []
    for action_part, finding, name in findings:
        if finding.verdict == "wrong" and action_part.verdict == "wrong":
            contradictions.append(f"{name}: {finding.best_answer}, not {finding.layout_answer}")
    if not contradictions:
        for action_part in report.action_parts:
            if action_part.verdict == "wrong":
                contradictions.append(f"{action_part.name}s: the whole reading")
    if report.fitting_formats:  # then the actions only look wrong
        formats = " or ".join(report.fitting_formats)
        contradictions = [f"rotation_format: {formats} fits all else that the layout says"]
    for check in report.checks:
        if check.verdict == "wrong":
            contradictions.append(f"{check.name}: {check.words}")
    return contradictions


def _list_open_questions(report: Report, findings: list[_NamedFinding]) -> list[str]:
    """What the data do not decide, and why."""
    decidable = [named for named in findings if not named.action_part.note]
    open_questions = []
    for _, finding, name in decidable:
        if finding.verdict == "cannot tell":
            open_questions.append(f"{name} ({' or '.join(finding.tied_answers)})")
    for _, finding, name in decidable:
        is_punctual = "0" in finding.tied_answers  # an arm without delay needs no mention
        if finding.verdict == "not said" and not is_punctual:
            answer = finding.best_answer
            open_questions.append(f"{name} (not in the layout; {answer} fits best)")
    for action_part in report.action_parts:
        if action_part.note:
            open_questions.append(f"{action_part.name}s ({action_part.note})")
    for check in report.checks:
        if check.verdict == "cannot tell":
            open_questions.append(f"{check.name} ({check.words})")
    return open_questions


def write_audit_page(report: Report, out: Path) -> None:
    """Write the report as one HTML file. Raises `SpearError` for a file that cannot be written."""
    facts = [(f"{report.num_episodes:,}", f"episodes, {format_count(report.num_steps, 'steps')}")]
    paths = []
    for action_part in report.action_parts:
        label = f"of the logged {action_part.name}s unexplained by their best reading"
        facts.append((f"{action_part.best_fit.relative_error:.1%}", label))
        if action_part.name == "translation":
            paths = _draw_paths(report, action_part)
    findings = []
    for action_part in report.action_parts:
        findings.append(
            (action_part, [(f, _draw_bars(action_part, f)) for f in action_part.findings])
        )
    html = render(
        "audit.html",
        title=f"Audit: {Path(report.path).resolve().name}",
        facts=facts,
        report=report,
        conclusion=conclude(report),
        questions=QUESTIONS,
        action_parts=findings,
        paths=paths,
    )
    write_text(out, html)


def _draw_bars(action_part: ActionPart, finding: Finding) -> str:
    """What each answer leaves of the motion; those that fit as well as the best in green."""
    rows = []
    for answer, (fit, margin) in finding.answers.items():
        comparison = "best" if answer == finding.best_answer else _format_interval(margin)
        label = f"{answer} · layout" if answer == finding.layout_answer else answer
        error = f"{fit.relative_error:.1%} ({format_size(action_part.name, fit.mean_error)})"
        style = "good" if answer in finding.tied_answers else ""
        rows.append(Bar(label, fit.relative_error, f"{error}, {comparison}", style=style))
    return draw_bars([("", rows)], (0.0, 1.2))


def _format_interval(margin: Margin) -> str:
    return f"{margin.value:+.1%} [{margin.low:+.1%}, {margin.high:+.1%}]"


def _draw_paths(report: Report, action_part: ActionPart) -> list[tuple[str, list[str]]]:
    """Paths of some episodes: as recorded, and as the logged translations lead from the start."""
    drawn = []
    for recording in report.recordings[:MAX_PATHS]:
        seconds = np.arange(len(recording.position)) / recording.rate_hz
        paths = [Line("recorded", seconds, recording.position, GREY)]
        for name, fit in (
            ("best reading", action_part.best_fit),
            ("layout", action_part.layout_fit),
        ):
            if fit is not None:
                path = integrate_translations(recording, fit)
                paths.append(Line(name, seconds, path, dashed=True))
        charts = []
        for index, axis in enumerate("xyz"):
            lines = [replace(path, y=np.asarray(path.y)[:, index]) for path in paths]
            charts.append(draw_chart(lines, Axis("seconds"), title=f"{axis}, m"))
        drawn.append((recording.source, charts))
    return drawn
