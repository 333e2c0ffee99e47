"""Reports the results of an audit: as a table for the terminal, and as a page with plots.

The audit tests *hypotheses*, possible meanings of a dataset's logged actions. For each part of the
actions (translation, rotation) it has a *finding* per question, such as the frame: which answers
fit the recorded motion, and whether the layout gives one of these.
"""

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

JOINTS_CHECK = "joints"  # the name of the check of `spear.audit.joint_limits`
MAX_PATHS = 3  # number of episodes whose path is drawn
QUESTIONS = {
    "kind": "change or target",
    "frame": "frame",
    "unit": "unit",
    "signs": "signs of x y z",
    "delay_steps": "steps late",
    "state_format": "form of states",
    "action_format": "form of actions",
}
"""Field of a hypothesis -> its name in the report."""


class _NamedFinding(NamedTuple):
    """A finding, the part of the actions that it is about, and its name: "rotation frame"."""

    action_part: ActionPart
    finding: Finding
    name: str


def format_report(report: Report) -> str:
    """Return the report as a table for the terminal."""
    return render(
        "audit.txt",
        report=report,
        questions=QUESTIONS,
        conclusion=format_conclusion(report, is_followed_by_advice=True),
        format_size=format_size,
        format_interval=_format_margin,
        format_count=format_count,
    )


def format_conclusion(report: Report, is_followed_by_advice: bool = False) -> str:
    """Return one line: the outcome of the audit, with the contradictions or open questions.

    Args:
        report: The report.
        is_followed_by_advice: Whether the message of `advise_on_undecided` follows. It names the
            open questions of an undecided audit, so the line does not.
    """
    findings = _name_findings(report)
    if report.outcome == "contradiction":
        return f"contradiction: {explain_contradiction(report)}"

    open_questions = _list_open_questions(report, findings)
    ending = ""
    if open_questions:
        ending = f", which do not decide {'; '.join(open_questions)}"
    has_more_episodes = report.num_episodes == MAX_EPISODES or report.num_steps > MAX_STEPS
    scope = f" of the first {report.num_episodes} episodes" if has_more_episodes else ""
    if report.outcome == "undecided":
        if is_followed_by_advice:
            ending = ""
        return f"undecided: nothing contradicts the layout in the data{scope}{ending}"
    conclusion = f"consistent: the layout agrees with the data{scope}{ending}"
    if any(check.name == JOINTS_CHECK for check in report.checks):
        conclusion += (
            "; whether the joints' zeros and signs are right, only the heights in the row "
            f"{JOINTS_CHECK} show: compare them with what you recorded"
        )
    return conclusion


def explain_contradiction(report: Report) -> str:
    """Return what is wrong with a layout that the data contradict."""
    problems = [*report.state_problems, *_list_contradictions(report, _name_findings(report))]
    return f"the layout is WRONG, because {'; '.join(problems)}"


def advise_on_undecided(report: Report) -> str:
    """Return a message about an undecided audit: what is open, and what would decide it.

    The advice is to record slower motions or more episodes, or to complete spear.json.
    """
    is_unexplained = any(
        action_part.note and action_part.best_fit.relative_error > MAX_UNEXPLAINED
        for action_part in report.action_parts
    )
    is_not_said = any(action_part.verdict == "not said" for action_part in report.action_parts)
    open_questions = "; ".join(_list_open_questions(report, _name_findings(report)))
    if is_unexplained:
        cure = "Record slower motions, which the arm can follow"
    elif is_not_said:
        cure = "Write the missing keys into spear.json"
    else:
        cure = "Record more episodes with larger motions, or say it in spear.json if you know it"
    return f"{report.path} does not decide {open_questions}. {cure}, and run the audit again."


def _name_findings(report: Report) -> list[_NamedFinding]:
    """Return all findings, with their names and the parts of the actions they are about."""
    findings = []
    for action_part in report.action_parts:
        for finding in action_part.findings:
            name = f"{action_part.name} {QUESTIONS[finding.question]}"
            findings.append(_NamedFinding(action_part, finding, name))
    return findings


def _list_contradictions(report: Report, findings: list[_NamedFinding]) -> list[str]:
    """List what contradicts the layout, and what fits instead."""
    contradictions = []
    for action_part, finding, name in findings:
        if finding.verdict == "wrong" and action_part.verdict == "wrong":
            contradictions.append(
                f"the {name} is {finding.best_answer}, not {finding.layout_answer}"
            )

    # Without a single wrong answer, the combination of the answers is wrong.
    if not contradictions:
        for action_part in report.action_parts:
            if action_part.verdict == "wrong":
                contradictions.append(f"the {action_part.name}s do not fit it as a whole")

    # With another rotation format of the states, the actions would fit. So the format is the one
    # mistake, and the contradictions of the actions are consequences.
    if report.fitting_formats:
        formats = " or ".join(report.fitting_formats)
        contradictions = [f"rotation_format {formats} fits all else that the layout says"]
    for check in report.checks:
        if check.verdict == "wrong":
            contradictions.append(f"the check of {check.name} fails ({check.words})")
    return contradictions


def _list_open_questions(report: Report, findings: list[_NamedFinding]) -> list[str]:
    """List the questions that the data do not decide, each with the reason."""
    # An action part with a note has one reason for all of its questions, which comes below.
    findings_without_note = [named for named in findings if not named.action_part.note]
    open_questions = []
    for _, finding, name in findings_without_note:
        if finding.verdict == "cannot tell":
            open_questions.append(f"the {name} ({' or '.join(finding.tied_answers)})")
    for _, finding, name in findings_without_note:
        # "0" can only be the answer about the delay, and the layout need not mention a delay of 0.
        fits_without_delay = "0" in finding.tied_answers
        if finding.verdict == "not said" and not fits_without_delay:
            reason = f"not in the layout; {finding.best_answer} fits best"
            if finding.question == "delay_steps":
                reason = f"{finding.best_answer} fits best; spear.json has no key for it"
            open_questions.append(f"the {name} ({reason})")
    for action_part in report.action_parts:
        if action_part.note:
            open_questions.append(f"the {action_part.name}s ({action_part.note})")
    for check in report.checks:
        if check.verdict == "cannot tell":
            open_questions.append(f"{check.name} ({check.words})")
    return open_questions


def write_audit_page(report: Report, out: Path) -> None:
    """Write the report as one HTML file.

    Raises:
        SpearError: the file cannot be written.
    """
    facts = [(f"{report.num_episodes:,}", f"episodes, {format_count(report.num_steps, 'steps')}")]
    paths = []
    for action_part in report.action_parts:
        label = f"of the logged {action_part.name}s unexplained by their best hypothesis"
        facts.append((f"{action_part.best_fit.relative_error:.1%}", label))
        if action_part.name == "translation":
            paths = _draw_positions_over_time(report, action_part)
    drawn_parts = []
    for action_part in report.action_parts:
        drawn_findings = [
            (finding, _draw_unexplained_motion(action_part, finding))
            for finding in action_part.findings
        ]
        drawn_parts.append((action_part, drawn_findings))
    html = render(
        "audit.html",
        title=f"Audit: {Path(report.path).resolve().name}",
        facts=facts,
        report=report,
        conclusion=format_conclusion(report),
        questions=QUESTIONS,
        action_parts=drawn_parts,
        paths=paths,
    )
    write_text(out, html)


def _draw_unexplained_motion(action_part: ActionPart, finding: Finding) -> str:
    """Draw how much of the motion each answer of a finding leaves unexplained.

    The bars of answers that fit as well as the best one are green.
    """
    rows = []
    for answer, (fit, margin) in finding.answers.items():
        comparison = "best" if answer == finding.best_answer else _format_margin(margin)
        label = f"{answer} · layout" if answer == finding.layout_answer else answer
        error = f"{fit.relative_error:.1%} ({format_size(action_part.name, fit.mean_error)})"
        style = "good" if answer in finding.tied_answers else ""
        rows.append(Bar(label, fit.relative_error, f"{error}, {comparison}", style=style))
    return draw_bars([("", rows)], ends=(0.0, 1.2))  # an error of 1 is as large as the motion


def _format_margin(margin: Margin) -> str:
    """Return by how much an answer fits worse than the best one, with its interval."""
    return f"{margin.value:+.1%} [{margin.low:+.1%}, {margin.high:+.1%}]"


def _draw_positions_over_time(
    report: Report, action_part: ActionPart
) -> list[tuple[str, list[str]]]:
    """Draw positions over time: as recorded, and as the logged translations add up from the start.

    The translations are added up twice: with the meaning that fits best, and with the meaning that
    the layout gives them.

    Returns:
        (name, charts of x, y and z) of each of the first `MAX_PATHS` episodes.
    """
    drawn_paths = []
    for recording in report.recordings[:MAX_PATHS]:
        seconds = np.arange(len(recording.position)) / recording.rate_hz
        # The y of these lines are positions [T, 3]; each chart below takes one of the 3 columns.
        paths = [Line("recorded", seconds, recording.position, GREY)]
        for name, fit in (
            ("best hypothesis", action_part.best_fit),
            ("layout", action_part.layout_fit),
        ):
            if fit is not None:
                path = integrate_translations(recording, fit)
                paths.append(Line(name, seconds, path, dashed=True))
        charts = []
        for index, axis in enumerate("xyz"):
            lines = [replace(path, y=np.asarray(path.y)[:, index]) for path in paths]
            charts.append(draw_chart(lines, Axis("seconds"), title=f"{axis}, m"))
        drawn_paths.append((recording.source, charts))
    return drawn_paths
