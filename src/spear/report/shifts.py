"""Makes the pages about shifts: bars of success rates or errors in scenes unlike those of training.

A shift changes the scenes along an axis (camera, light, …), by one of three levels.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from spear.evaluate.shift_suite import UNSHIFTED, ShiftResult
from spear.evaluate.vqa.measures import format_measure
from spear.evaluate.vqa.shift_suite import ShiftedErrors, choose_error_measure
from spear.report.page import render
from spear.report.plot import Bar, draw_bars, make_rate_bars
from spear.sim.shifts import AXES
from spear.util.files import write_text

RATE_CAPTION = (
    "The same scenes, changed along one axis at a time. Bars are success rates, with 95 % "
    'intervals; "none" is the scenes as they are.'
)
ERROR_CAPTION = "median error, with 95 % intervals; a short bar is good."


def write_shifted_success_page(results: Sequence[ShiftResult], policy_name: str, out: Path) -> None:
    """Write the page about a policy's results to the file `out`.

    Raises:
        SpearError: the file cannot be written.
    """
    unshifted_rates = [(result.name, result.success) for result in results if result.shift is None]
    groups = [("none", make_rate_bars(unshifted_rates))]
    for axis in AXES:
        rates = []
        for result in results:
            if result.shift is not None and result.shift.axis == axis:
                rates.append((f"level {result.shift.level}", result.success))
        if rates:  # not every simulator has every axis
            groups.append((axis, make_rate_bars(rates)))
    html = render(
        "shifts.html",
        title=f"Shifts: {policy_name}",
        charts=[(RATE_CAPTION, draw_bars(groups))],
        facts=[],
    )
    write_text(out, html)


def write_shifted_errors_page(results: Sequence[ShiftedErrors], model_name: str, out: Path) -> None:
    """Write the page about a SPEAR-VLM's errors to the file `out`: a chart per question type.

    Raises:
        SpearError: the file cannot be written.
    """
    charts = []
    for question_type in results[0].errors:
        caption = f"{question_type.replace('_', ' ').capitalize()}: {ERROR_CAPTION}"
        charts.append((caption, _draw_errors(results, question_type)))
    html = render("shifts.html", title=f"Shifts: {model_name}", charts=charts, facts=[])
    write_text(out, html)


def _draw_errors(results: Sequence[ShiftedErrors], question_type: str) -> str:
    """Draw the errors of a question type under each shift."""
    bars_by_axis: dict[str, list[Bar]] = {}
    longest = 0.0
    for result in results:
        error = result.errors.get(question_type)
        if error is None:
            continue
        axis = UNSHIFTED
        name = UNSHIFTED
        if result.shift is not None:
            axis = result.shift.axis
            name = f"level {result.shift.level}"
        text = format_measure(choose_error_measure(question_type), error)
        bar = Bar(name, error.value, text)
        longest = max(longest, error.value)
        has_interval = not math.isnan(error.low)
        if has_interval:
            bar = replace(bar, low=error.low, high=error.high)
            longest = max(longest, error.high)
        bars_by_axis.setdefault(axis, []).append(bar)
    return draw_bars(list(bars_by_axis.items()), ends=(0.0, longest or 1.0))
