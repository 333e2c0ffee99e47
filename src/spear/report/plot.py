"""The one plotter of all pages: line charts and histograms as SVG, bars with intervals as HTML.

It needs no script and no library: templates draw the plots, readable on light and dark.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from typing import Any

import numpy as np

from spear.evaluate.stats import Estimate
from spear.report.page import render
from spear.types import Array

LINE_COLORS = ("#3f86f5", "#e07b28", "#26a269", "#b05fd6", "#d8486b", "#8b8f98")
XYZ_COLORS = ("#d8486b", "#26a269", "#3f86f5")
GREY = "#8b8f98"

TOP_MARGIN_PX = 8
RIGHT_MARGIN_PX = 14
LEFT_MARGIN_PX = 40
LEFT_MARGIN_WITH_TITLE_PX = 54
BOTTOM_MARGIN_PX = 22
BOTTOM_MARGIN_WITH_TITLE_PX = 38
X_TICK_SPACING_PX = 60
Y_TICK_SPACING_PX = 40
MIN_DIFFERENCE_RANGE = 0.1  # of a plot of differences, on each side of zero

Range = tuple[float, float]
"""Where an axis begins and ends; the first is the larger one if the axis is reversed."""


@dataclass(frozen=True)
class Line:
    """A line through points.

    Attributes:
        name: in the legend; "" leaves the line out of it.
        x: of each point.
        y: of each point; NaN leaves a gap.
        color: in CSS; "" for the next one of `LINE_COLORS`.
        low: the lower end of a whisker at each point.
        high: its upper end.
        dots: whether the points are marked.
        joined: whether the points are joined by a line.
        dashed: whether that line is dashed.
    """

    name: str
    x: Sequence[float] | Array
    y: Sequence[float] | Array
    color: str = ""
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    dots: bool = False
    joined: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """One axis of a chart.

    Attributes:
        title: beside the axis.
        ends: where it begins and ends; by default, so that all lines fit.
        ticks: (value, label) of each; by default round numbers, followed by `unit`.
        unit: of the ticks' labels.
        log: whether the axis is logarithmic.
        reverse: whether it runs to the left, or down.
    """

    title: str = ""
    ends: Range | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    unit: str = ""
    log: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar with its interval, followed by a text. style: "quiet", "theirs", "good", "bad" or
    "dot".
    """

    name: str
    value: float | None
    text: str
    low: float | None = None
    high: float | None = None
    style: str = ""


def draw_chart(
    lines: Sequence[Line],
    x: Axis = Axis(),
    y: Axis = Axis(),
    title: str = "",
    size: tuple[int, int] = (360, 200),
    equal: bool = False,
) -> str:
    """Draw lines over two axes, with a legend.

    Args:
        lines: what to draw.
        x: the horizontal axis.
        y: the vertical axis.
        title: above the chart.
        size: width and height in pixels.
        equal: whether one unit is as long on both axes, as on a map.

    Returns:
        HTML with an SVG.
    """
    # The box inside of the margins.
    width, height = size
    left_px = LEFT_MARGIN_WITH_TITLE_PX if y.title else LEFT_MARGIN_PX
    right_px = width - RIGHT_MARGIN_PX
    top_px = TOP_MARGIN_PX
    bottom_px = height - (BOTTOM_MARGIN_WITH_TITLE_PX if x.title else BOTTOM_MARGIN_PX)

    # The ranges of the axes.
    x_range = _find_range(x, [line.x for line in lines])
    y_values = [line.y for line in lines]
    for line in lines:
        y_values += [line.low, line.high]
    y_range = _find_range(y, y_values)
    if equal:
        x_units_per_px = abs(x_range[1] - x_range[0]) / (right_px - left_px)
        y_units_per_px = abs(y_range[1] - y_range[0]) / (bottom_px - top_px)
        units_per_px = max(x_units_per_px, y_units_per_px)
        x_range = _widen(x_range, units_per_px * (right_px - left_px))
        y_range = _widen(y_range, units_per_px * (bottom_px - top_px))

    # Everything in pixels.
    to_x = _make_scale(x_range, left_px, right_px, x.log)
    to_y = _make_scale(y_range, bottom_px, top_px, y.log)
    drawn_lines = []
    for index, line in enumerate(lines):
        default_color = LINE_COLORS[index % len(LINE_COLORS)]
        drawn_lines.append(_draw_line(line, default_color, to_x, to_y))
    x_ticks = x.ticks or _choose_ticks(x_range, x, (right_px - left_px) // X_TICK_SPACING_PX)
    y_ticks = y.ticks or _choose_ticks(y_range, y, (bottom_px - top_px) // Y_TICK_SPACING_PX)
    has_zero_line = not y.log and y_range[0] < 0 < y_range[1]
    return render(
        "chart.html",
        lines=drawn_lines,
        title=title,
        x_title=x.title,
        y_title=y.title,
        box=(left_px, right_px, top_px, bottom_px),
        size=size,
        x_ticks=[(to_x(value), label) for value, label in x_ticks],
        y_ticks=[(to_y(value), label) for value, label in y_ticks],
        zero=to_y(0) if has_zero_line else None,
    )


def _draw_line(
    line: Line,
    default_color: str,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> dict[str, Any]:
    """Return a line as the template draws it, in pixels."""
    points = []
    dots = []
    for x, y in zip(line.x, line.y, strict=True):
        point = (to_x(x), to_y(y))
        points.append(point)
        if line.dots and np.isfinite(y):
            dots.append((*point, f"{x:.3g}, {y:.3g}"))
    whiskers = []
    if len(line.low):
        for x, low, high in zip(line.x, line.low, line.high, strict=True):
            whiskers.append((to_x(x), to_y(low), to_y(high)))
    return {
        "line": line,
        "color": line.color or default_color,
        "path": _make_path(points) if line.joined else "",
        "dots": dots,
        "whiskers": whiskers,
    }


def draw_bars(groups: Sequence[tuple[str, Sequence[Bar]]], ends: Range = (0.0, 1.0)) -> str:
    """Draw groups of bars, each under its heading ("" for none), on a common axis.

    Bars that are longer than the axis are cut off.
    """

    def to_percent(value: float) -> float:
        share = (value - ends[0]) / (ends[1] - ends[0])
        return round(min(max(100 * share, 0.0), 100.0), 1)

    zero = to_percent(0) if ends[0] < 0 else None
    return render("bars.html", groups=groups, at=to_percent, zero=zero)


def make_rate_bars(rates: Sequence[tuple[str, Estimate]]) -> list[Bar]:
    """Make bars of success rates.

    The first one is judged and stands out; the others are baselines.
    """
    bars = []
    for index, (name, rate) in enumerate(rates):
        style = "quiet" if index else ""
        bars.append(Bar(name, rate.value, rate.to_text(".0%"), rate.low, rate.high, style))
    return bars


def draw_differences(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Draw differences of rates, in points, as dots with intervals on an axis around zero."""
    half_range = MIN_DIFFERENCE_RANGE
    dots = []
    for name, difference in rows:
        low, high = difference.low, difference.high
        half_range = max(half_range, abs(low), abs(high))
        style = "dot" if low <= 0 <= high else "sure dot"
        text = difference.to_text("+.1f", 100)
        dots.append(Bar(name, difference.value, text, low, high, style))
    return draw_bars([("", dots)], (-half_range, half_range))


def draw_histogram(counts: Sequence[int], low: str, high: str) -> str:
    """Draw counts as bars, as wide as the page, with names at the two ends."""
    return render("histogram.html", counts=counts, most=max(*counts, 1), low=low, high=high)


def _find_range(axis: Axis, values: Sequence[Sequence[float] | Array]) -> Range:
    """Find where an axis begins and ends: around all finite values, with some space."""
    if axis.ends is not None:
        return axis.ends
    flat = np.concatenate([np.ravel(column).astype(float) for column in values])
    is_shown = np.isfinite(flat)
    if axis.log:
        is_shown &= flat > 0
    shown_values = flat[is_shown]
    low, high = 0.1, 1.0
    if len(shown_values):
        low = float(shown_values.min())
        high = float(shown_values.max())

    if axis.log:
        return low / 1.2, high * 1.2
    is_flat = high - low <= 1e-6 * max(abs(low), abs(high))
    space = max(abs(high), 1.0) * 0.1 if is_flat else 0.07 * (high - low)
    if axis.reverse:
        return high + space, low - space
    return low - space, high + space


def _widen(ends: Range, span: float) -> Range:
    """Return a range of this span around the same middle, in the same direction."""
    middle = (ends[0] + ends[1]) / 2
    half = span / 2 if ends[1] > ends[0] else -span / 2
    return middle - half, middle + half


def _make_scale(
    ends: Range, start_px: float, stop_px: float, is_log: bool
) -> Callable[[float], float]:
    """Return the function from a value to its pixel; values beyond the ends lie on them."""
    low, high = ends
    if is_log:
        low, high = log10(low), log10(high)

    def to_px(value: float) -> float:
        position = log10(max(value, 1e-12)) if is_log else value
        share = (position - low) / (high - low)
        share_inside = min(max(share, 0.0), 1.0)  # NaN stays NaN
        return round(start_px + share_inside * (stop_px - start_px), 1)

    return to_px


def _make_path(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path, broken where a point is not finite."""
    path = ""
    is_pen_down = False
    for x, y in points:
        is_finite = bool(np.isfinite([x, y]).all())
        if is_finite:
            path += f"{'L' if is_pen_down else 'M'}{x:g} {y:g}"
        is_pen_down = is_finite
    return path


def _choose_ticks(ends: Range, axis: Axis, max_ticks: int) -> list[tuple[float, str]]:
    """Choose round numbers within a range, and label them."""
    low, high = sorted(ends)
    values = _log_ticks(low, high) if axis.log else _linear_ticks(low, high, max_ticks)
    return [(value, f"{value:g}{axis.unit}") for value in values]


def _log_ticks(low: float, high: float) -> list[float]:
    values = []
    for power in range(floor(log10(low)), floor(log10(high)) + 1):
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            if low <= value <= high:
                values.append(value)
    return values


def _linear_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    max_ticks = max(max_ticks, 5)  # two ticks at least
    step = 10.0 ** floor(log10((high - low) / max_ticks))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= max_ticks:
            step *= factor
            break
    first = ceil(low / step)
    last = floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]
