"""The suite of shifts for 3D questions: how far answers are off when scenes are shifted.

A shift (`spear.sim.shifts`) changes one aspect of the scenes, its axis, by one of three levels. The
axis "language" is left out, because it changes instructions, and questions are no instructions.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from spear.evaluate.results import build_terminal_table
from spear.evaluate.shift_suite import name_shift
from spear.evaluate.stats import Estimate
from spear.evaluate.vqa.measures import choose_main_measure, format_measure
from spear.sim.shifts import AXES, Shift

PICTURE_AXES = tuple(axis for axis in AXES if axis != "language")
"""The axes that change the pictures about which questions are asked."""


@dataclass(frozen=True)
class ShiftedErrors:
    """The errors of a model under one shift, in scenes that are the same for all shifts.

    shift   the shift; None for the scenes without a shift.
    errors  question type → its median error, in mm, or in pixels if its answers are places in the
            image.
    """

    shift: Shift | None
    errors: Mapping[str, Estimate]

    @property
    def name(self) -> str:
        return name_shift(self.shift)


def parse_picture_shift(text: str) -> Shift:
    """Read "AXIS:LEVEL" or "AXIS". Raises `SpearError` if it is no shift of pictures."""
    reason = "changes instructions, and there is none in 3D questions"
    return Shift.parse_possible(text, PICTURE_AXES, reason)


def read_shifted_errors(shift: Shift | None, scores: Mapping[str, Any]) -> ShiftedErrors:
    """Take the errors out of the content of a file scores.json."""
    errors = {}
    for question_type, score in scores["families"].items():
        error = score["measures"].get(choose_error_measure(question_type))
        if error is not None:
            # An end of an interval that is not known is null in the file.
            low = math.nan if error["low"] is None else error["low"]
            high = math.nan if error["high"] is None else error["high"]
            errors[question_type] = Estimate(error["value"], low, high, error["n"])
    return ShiftedErrors(shift, errors)


def choose_error_measure(question_type: str) -> str:
    """Return the measure (`measures.MEASURES`) that is a question type's error in scenes."""
    return choose_main_measure(question_type, unit="metre")


def build_error_table(results: Sequence[ShiftedErrors], model: str) -> Table:
    """Build a table with one row per shift and one column per question type."""
    question_types = list(results[0].errors)
    headers = ["shift", *(question_type.replace("_", " ") for question_type in question_types)]
    rows = []
    for result in results:
        cells = []
        for question_type in question_types:
            error = result.errors.get(question_type)
            text = (
                "–" if error is None else format_measure(choose_error_measure(question_type), error)
            )
            cells.append(text)
        rows.append([result.name, *cells])
    return build_terminal_table(f"{model}: median error by shift", headers, rows)
