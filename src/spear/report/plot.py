"""The one plotter of all pages: line charts and histograms as SVG, bars with intervals as HTML.

No script and no library: templates draw them, readable on light and dark.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10

import numpy as np

from spear.evaluate.stats import Estimate
from spear.report.page import render
from spear.types import Array

COLOURS = ("#3f86f5", "#e07b28", "#26a269", "#b05fd6", "#d8486b", "#8b8f98")
XYZ = ("#d8486b", "#26a269", "#3f86f5")
GREY = "#8b8f98"


@dataclass(frozen=True)
class Line:
    """A line through the points (x, y).

    name    in the legend; "" keeps it out.
    y       NaN leaves a gap.
    low, high  the ends of a whisker at each point.
    dots    marks the points; joined=False marks only these.
    """

    name: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    colour: str = ""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    joined: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    ends   where it begins and ends; by default, so that all lines fit.
    ticks  (place, label) of each; by default round numbers, with `unit` behind them.
    """

    title: str = ""
    ends: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    unit: str = ""
    log: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar with its interval and, behind it, a text. style: "quiet", "theirs", "good", "bad" or "dot"."""

    name: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None
    style: str = ""


def chart(
    lines: Sequence[Line],
    x: Axis = Axis(),
    y: Axis = Axis(),
    title: str = "",
    size: tuple[int, int] = (360, 200),
    equal: bool = False,
) -> str:
    """Lines over two axes, with a legend, `size` pixels large. equal: one unit is as long on both axes."""
    left, right, top, bottom = (
        (54 if y.title else 40),
        size[0] - 14,
        8,
        size[1] - (38 if x.title else 22),
    )
    across = _ends(x, [line.x for line in lines])
    up = _ends(
        y, [*(line.y for line in lines), *(end for line in lines for end in (line.low, line.high))]
    )
    if equal:
        scale = max(
            abs(across[1] - across[0]) / (right - left), abs(up[1] - up[0]) / (bottom - top)
        )
        across, up = _widen(across, scale * (right - left)), _widen(up, scale * (bottom - top))
    to_x, to_y = _scale(across, left, right, x.log), _scale(up, bottom, top, y.log)
    drawn = []
    for index, line in enumerate(lines):
        found = [
            (to_x(a), to_y(b), f"{a:.3g}, {b:.3g}") for a, b in zip(line.x, line.y, strict=True)
        ]
        ends = zip(line.x if len(line.low) else (), line.low, line.high, strict=True)
        drawn.append(
            {
                "line": line,
                "colour": line.colour or COLOURS[index % len(COLOURS)],
                "path": _path([(x, y) for x, y, _ in found]) if line.joined else "",
                "dots": [
                    dot
                    for dot, b in zip(found, line.y, strict=True)
                    if line.dots and np.isfinite(b)
                ],
                "whiskers": [(to_x(a), to_y(low), to_y(high)) for a, low, high in ends],
            }
        )
    return render(
        "chart.html",
        lines=drawn,
        title=title,
        x_title=x.title,
        y_title=y.title,
        box=(left, right, top, bottom),
        size=size,
        x_ticks=[
            (to_x(v), label) for v, label in x.ticks or _ticks(across, x, (right - left) // 60)
        ],
        y_ticks=[(to_y(v), label) for v, label in y.ticks or _ticks(up, y, (bottom - top) // 40)],
        zero=to_y(0) if not y.log and up[0] < 0 < up[1] else None,
    )


def bars(
    groups: Sequence[tuple[str, Sequence[Bar]]], ends: tuple[float, float] = (0.0, 1.0)
) -> str:
    """Groups of bars, each under its heading ("" for none), on a common axis; longer ones are cut off."""

    def at(value: float) -> float:
        return round(min(max(100 * (value - ends[0]) / (ends[1] - ends[0]), 0.0), 100.0), 1)

    return render("bars.html", groups=groups, at=at, zero=at(0) if ends[0] < 0 else None)


def rate_bars(rates: Sequence[tuple[str, Estimate]]) -> list[Bar]:
    """Success rates. The first is the one that is judged, and stands out; the others are its references."""
    return [
        Bar(name, e.value, e.to_text(".0%"), e.low, e.high, "quiet" if i else "")
        for i, (name, e) in enumerate(rates)
    ]


def differences(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Differences of rates, in points, as dots with their intervals on an axis whose middle is zero."""
    reach = max(0.1, max(max(abs(e.low), abs(e.high)) for _, e in rows))
    dots = [
        Bar(
            name,
            e.value,
            e.to_text("+.1f", 100),
            e.low,
            e.high,
            "dot" if e.low <= 0 <= e.high else "sure dot",
        )
        for name, e in rows
    ]
    return bars([("", dots)], (-reach, reach))


def histogram(counts: Sequence[int], low: str, high: str) -> str:
    """Counts as bars as wide as the page, between the names of the two ends."""
    return render("histogram.html", counts=counts, most=max(*counts, 1), low=low, high=high)


def _ends(axis: Axis, values: Sequence[Sequence[float] | Array]) -> tuple[float, float]:
    """Where an axis begins and ends: around all finite values, with some air."""
    if axis.ends is not None:
        return axis.ends
    every = np.concatenate([np.ravel(v).astype(float) for v in values])
    finite = every[np.isfinite(every) & ((every > 0) | (not axis.log))]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.1, 1.0)
    if axis.log:
        return low / 1.2, high * 1.2
    flat = high - low <= 1e-6 * max(abs(low), abs(high))
    air = max(abs(high), 1.0) * 0.1 if flat else 0.07 * (high - low)
    return (high + air, low - air) if axis.reverse else (low - air, high + air)


def _widen(ends: tuple[float, float], span: float) -> tuple[float, float]:
    middle, half = (ends[0] + ends[1]) / 2, span / 2 if ends[1] > ends[0] else -span / 2
    return middle - half, middle + half


def _scale(
    ends: tuple[float, float], start: float, stop: float, log: bool
) -> Callable[[float], float]:
    """From a value to its pixel; values beyond the ends lie on them."""
    low, high = (log10(ends[0]), log10(ends[1])) if log else ends

    def place(value: float) -> float:
        share = ((log10(max(value, 1e-12)) if log else value) - low) / (high - low)
        return round(start + min(max(share, 0.0), 1.0) * (stop - start), 1)  # NaN stays NaN

    return place


def _path(at: Sequence[tuple[float, float]]) -> str:
    """An SVG path, broken where a point is not finite."""
    out, pen = [], False
    for a, b in at:
        known = bool(np.isfinite([a, b]).all())
        out.append(f"{'L' if pen else 'M'}{a:g} {b:g}" if known else "")
        pen = known
    return "".join(out)


def _ticks(ends: tuple[float, float], axis: Axis, about: int) -> list[tuple[float, str]]:
    low, high = sorted(ends)
    if axis.log:
        powers = range(floor(log10(low)), floor(log10(high)) + 1)
        places = [
            v for p in powers for v in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if low <= v <= high
        ]
    else:
        about = max(about, 5)  # two ticks at least
        step = 10.0 ** floor(log10((high - low) / about))
        step *= next(k for k in (1, 2, 5, 10) if (high - low) / (k * step) <= about)
        places = [i * step for i in range(ceil(low / step), floor(high / step + 1e-9) + 1)]
    return [(v, f"{v:g}{axis.unit}") for v in places]
