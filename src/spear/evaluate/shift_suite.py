"""The suite of shifts: a policy's success when scenes are shifted along every axis, at every level.

A shift (`spear.sim.shifts`) changes one aspect of the scenes, its axis (for example the light), by
one of three levels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.table import Table

from spear.evaluate.options import SimplerOptions, TabletopOptions
from spear.evaluate.results import Results, build_terminal_table
from spear.evaluate.stats import Estimate
from spear.sim.shifts import AXES, LEVELS, Shift

UNSHIFTED = "none"  # name of the result without a shift
ShiftOptions = TypeVar("ShiftOptions", TabletopOptions, SimplerOptions)


@dataclass(frozen=True)
class ShiftResult:
    """Success under one shift, in scenes that are the same for all shifts.

    shift    the shift; None for the scenes without a shift.
    success  mean success over the task families.
    """

    shift: Shift | None
    success: Estimate

    @property
    def name(self) -> str:
        return name_shift(self.shift)


def evaluate_shifts(
    evaluate: Callable[[ShiftOptions], Results],
    options: ShiftOptions,
    axes: Sequence[str] = AXES,
) -> Iterator[ShiftResult]:
    """Evaluate without a shift, then with each axis at each level, on the same scenes.

    Args:
        evaluate: Evaluates with some options, in any simulator.
        options: The options. Each shift has its own folder in `out`, so that an interrupted suite
            resumes.
        axes: The axes of the simulator.

    Yields:
        The result of each shift as soon as it is known.
    """
    for shift in list_shifts(axes):
        out = None if options.out is None else Path(options.out) / name_folder(shift)
        shifted = replace(options, shift=None if shift is None else str(shift), out=out)
        results = evaluate(shifted)
        if out is not None:
            results.save(out / "results.json")
        yield ShiftResult(shift, results.mean_success())


def name_shift(shift: Shift | None) -> str:
    """Return the name of a shift in tables, such as "camera:2"; "none" for no shift."""
    return UNSHIFTED if shift is None else str(shift)


def name_folder(shift: Shift | None) -> str:
    """Return the name of the folder of a shift's results."""
    return name_shift(shift).replace(":", "-")


def list_shifts(axes: Sequence[str] = AXES) -> list[Shift | None]:
    """List all shifts of some axes. The first entry is None: no shift."""
    shifts: list[Shift | None] = [None]
    for axis in axes:
        shifts += [Shift(axis, level) for level in LEVELS]
    return shifts


def build_shift_table(results: list[ShiftResult], policy: str) -> Table:
    """Build a table with one row per axis and one column per level.

    The success without a shift is in the first row.
    """
    success_by_name = {}  # name of the shift → success as text
    for result in results:
        success_by_name[result.name] = result.success.to_text(".0f", scale=100, unit=" %")
    # The first row has no levels, so the cells of the second and third level are empty.
    rows = [[UNSHIFTED, success_by_name[UNSHIFTED], "", ""]]
    for axis in AXES:
        success_by_level = [success_by_name.get(f"{axis}:{level}", "") for level in LEVELS]
        if any(success_by_level):  # not every simulator has every axis
            rows.append([axis, *success_by_level])
    headers = ["shift", *(f"level {level}" for level in LEVELS)]
    return build_terminal_table(f"{policy}: success by shift", headers, rows)
