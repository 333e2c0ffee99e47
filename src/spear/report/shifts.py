"""A page about the suite of shifts: success along each axis, at each level, as bars."""

from collections.abc import Sequence
from pathlib import Path

from spear.evaluate.shift_suite import ShiftResult
from spear.report.page import render
from spear.report.plot import draw_bars, make_rate_bars
from spear.sim.shifts import AXES
from spear.util.files import write_text


def write_shift_page(results: Sequence[ShiftResult], policy: str, out: Path) -> None:
    """Write the page to the file `out`. Raises `SpearError` if it cannot be written."""
    unshifted = [(r.name, r.success) for r in results if r.shift is None]
    groups = [("none", make_rate_bars(unshifted))]
    for axis in AXES:
        rates = []
        for result in results:
            if result.shift is not None and result.shift.axis == axis:
                rates.append((f"level {result.shift.level}", result.success))
        groups.append((axis, make_rate_bars(rates)))
    html = render("shifts.html", title=f"Shifts: {policy}", facts=[], bars=draw_bars(groups))
    write_text(out, html)
