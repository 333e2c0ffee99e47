"""The suite of shifts: how much of a policy's success is left along every axis, at every level."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from spear.evaluate.agents import Agent
from spear.evaluate.closed_loop import evaluate_tabletop
from spear.evaluate.options import TabletopOptions
from spear.evaluate.results import build_terminal_table
from spear.evaluate.stats import Estimate
from spear.sim.shifts import AXES, LEVELS, Shift

UNSHIFTED = "none"


@dataclass(frozen=True)
class ShiftResult:
    """Success under one shift, in scenes that are the same for all shifts.

    shift  None for the scenes as they are.
    """

    shift: Shift | None
    success: Estimate

    @property
    def name(self) -> str:
        return UNSHIFTED if self.shift is None else str(self.shift)


def evaluate_shifts(agent: Agent, options: TabletopOptions) -> Iterator[ShiftResult]:
    """Evaluate without a shift, then with each axis at each level, on the same scenes.

    Args:
        agent: Who acts.
        options: As for `evaluate_tabletop`. Each shift has a folder of its own in `out`, so that a
            suite that was stopped continues.

    Yields:
        The results as they come.
    """
    for shift in list_shifts():
        name = UNSHIFTED if shift is None else f"{shift.axis}-{shift.level}"
        out = None if options.out is None else Path(options.out) / name
        shifted = replace(options, shift=None if shift is None else str(shift), out=out)
        results, _ = evaluate_tabletop(agent, shifted)
        if out is not None:
            results.save(out / "results.json")
        yield ShiftResult(shift, results.mean_success())


def list_shifts() -> list[Shift | None]:
    """All shifts of the suite, the first one being none."""
    shifts: list[Shift | None] = [None]
    for axis in AXES:
        shifts += [Shift(axis, level) for level in LEVELS]
    return shifts


def build_shift_table(results: list[ShiftResult], policy: str) -> Table:
    """One row per axis, one column per level."""
    by_name = {result.name: result.success.to_text(".0f", 100, " %") for result in results}
    rows = [["none", by_name[UNSHIFTED], "", ""]]
    for axis in AXES:
        rows.append([axis, *(by_name.get(f"{axis}:{level}", "") for level in LEVELS)])
    headers = ["shift", *(f"level {level}" for level in LEVELS)]
    return build_terminal_table(f"{policy}: success by shift", headers, rows)
