"""Makes the page about shifts: bars of a policy's success rate in scenes that differ from training.

A shift changes the scenes along an axis (camera, light, …), by one of three levels.
"""

from collections.abc import Sequence
from pathlib import Path

from spear.evaluate.shift_suite import ShiftResult
from spear.report.page import render
from spear.report.plot import draw_bars, make_rate_bars
from spear.sim.shifts import AXES
from spear.util.files import write_text


def write_shift_page(results: Sequence[ShiftResult], policy: str, out: Path) -> None:
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
        groups.append((axis, make_rate_bars(rates)))
    html = render("shifts.html", title=f"Shifts: {policy}", facts=[], bars=draw_bars(groups))
    write_text(out, html)
