"""What the audit found: a table for the terminal, and a page with plots."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from spear.audit.dataset_audit import EPISODES, STEPS, Finding, Margin, Part, Report, size
from spear.audit.hypotheses import integrate_translations
from spear.errors import format_count
from spear.report.page import render
from spear.report.plot import GREY, Axis, Bar, Line, bars, chart
from spear.util.files import write_text

PATHS = 3
"""Episodes whose path is drawn."""
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
    shown = {"report": report, "questions": QUESTIONS, "conclusion": conclusion(report)}
    return render("audit.txt", **shown, size=size, interval=_interval, counted=format_count)


def conclusion(report: Report) -> str:
    """One line: the outcome, and what it is about."""
    found = [(p, f, f"{p.name} {QUESTIONS[f.question]}") for p in report.parts for f in p.findings]
    if report.outcome == "contradiction":
        bad = [(f, name) for p, f, name in found if f.verdict == p.verdict == "wrong"]
        wrong = [f"{name}: {f.best}, not {f.said}" for f, name in bad]
        wrong = wrong or [
            f"{p.name}s: the whole reading" for p in report.parts if p.verdict == "wrong"
        ]
        if report.forms:  # then the actions only look wrong
            wrong = [
                f"rotation_format: {' or '.join(report.forms)} fits all else that the layout says"
            ]
        wrong += [
            f"{check.name}: {check.words}" for check in report.checks if check.verdict == "wrong"
        ]
        return f"contradiction: the layout is WRONG: {'; '.join([*report.states, *wrong])}"
    open_ones = [(f, name) for part, f, name in found if not part.note]
    unsure = [
        f"{name} ({' or '.join(f.tied)})" for f, name in open_ones if f.verdict == "cannot tell"
    ]
    unsaid = [
        (f, name) for f, name in open_ones if f.verdict == "not said" and "0" not in f.tied
    ]  # in time
    unsure += [f"{name} (not in the layout; {f.best} fits best)" for f, name in unsaid]
    unsure += [f"{part.name}s ({part.note})" for part in report.parts if part.note]
    unsure += [
        f"{check.name} ({check.words})" for check in report.checks if check.verdict == "cannot tell"
    ]
    told = f"; it cannot be told: {'; '.join(unsure)}" if unsure else ""
    part_of_it = report.episodes == EPISODES or report.steps > STEPS
    first = f" of {report.episodes} episodes, the first" if part_of_it else ""
    if report.outcome == "undecided":
        return f"undecided: nothing contradicts the layout in the data{first}{told}"
    return f"consistent: the layout agrees with the data{first}{told}"


def write_audit_page(report: Report, out: Path) -> None:
    """Write the report as one HTML file. Raises SpearError for a file that cannot be written."""
    facts = [(f"{report.episodes:,}", f"episodes, {format_count(report.steps, 'steps')}")]
    words = "of the logged {}s unexplained by their best reading"
    facts += [(f"{part.best.relative:.1%}", words.format(part.name)) for part in report.parts]
    html = render(
        "audit.html",
        title=f"Audit: {Path(report.path).resolve().name}",
        facts=facts,
        report=report,
        conclusion=conclusion(report),
        questions=QUESTIONS,
        parts=[(part, [(f, _bars(part, f)) for f in part.findings]) for part in report.parts],
        paths=[
            path
            for part in report.parts
            if part.name == "translation"
            for path in _paths(report, part)
        ],
    )
    write_text(out, html)


def _bars(part: Part, finding: Finding) -> str:
    """What each answer to a question leaves of the motion; those that fit as well as the best in green."""
    rows = []
    for answer, (fit, margin) in finding.answers.items():
        worse = "best" if answer == finding.best else _interval(margin)
        name = f"{answer} · layout" if answer == finding.said else answer
        words = f"{fit.relative:.1%} ({size(part.name, fit.mean)}), {worse}"
        rows.append(Bar(name, fit.relative, words, style="good" if answer in finding.tied else ""))
    return bars([("", rows)], (0.0, 1.2))


def _interval(margin: Margin) -> str:
    return f"{margin.value:+.1%} [{margin.low:+.1%}, {margin.high:+.1%}]"


def _paths(report: Report, part: Part) -> list[tuple[str, list[str]]]:
    """The paths of some episodes: as recorded, and as the logged translations lead from the first state."""
    shown = []
    for recording in report.recordings[:PATHS]:
        seconds = np.arange(len(recording.position)) / recording.rate_hz
        paths = [Line("recorded", seconds, recording.position, GREY)]
        for name, fit in (("best reading", part.best), ("layout", part.said)):
            if fit is not None:
                paths.append(
                    Line(name, seconds, integrate_translations(recording, fit), dashed=True)
                )
        along = [[replace(path, y=np.asarray(path.y)[:, i]) for path in paths] for i in range(3)]
        named = zip("xyz", along, strict=True)
        charts = [chart(lines, Axis("seconds"), title=f"{axis}, m") for axis, lines in named]
        shown.append((recording.source, charts))
    return shown
