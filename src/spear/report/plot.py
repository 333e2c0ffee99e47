"""Draws the plots of all pages: line charts and histograms as SVG, bars with intervals as HTML.

The templates of this folder draw the plots, without a script or a plotting library. The plots are
readable on light and dark pages.
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
XYZ_COLORS = ("#d8486b", "#26a269", "#3f86f5")  # red, green and blue for x, y and z
GREY = "#8b8f98"

TOP_MARGIN_PX = 8
RIGHT_MARGIN_PX = 14
LEFT_MARGIN_PX = 40
LEFT_MARGIN_WITH_TITLE_PX = 54
BOTTOM_MARGIN_PX = 22
BOTTOM_MARGIN_WITH_TITLE_PX = 38
# About the smallest distances of ticks, so that their labels do not overlap.
X_TICK_SPACING_PX = 60
Y_TICK_SPACING_PX = 40
MIN_DIFFERENCE_RANGE = 0.1  # a plot of rate differences shows at least ± 10 points
# Space between the outermost points and the ends of an axis that fits its lines.
LINEAR_SPACE = 0.07  # of the values' range
CONSTANT_SPACE = 0.1  # of the value, or of 1 if that is larger, if all values are the same
LOG_SPACE_FACTOR = 1.2  # by which the ends of a logarithmic axis are beyond the points

Range = tuple[float, float]
"""The values at which an axis begins and ends. A reversed axis begins at the larger value."""


@dataclass(frozen=True)
class Line:
    """A line through points.

    Attributes:
        name: the line's name in the legend; a line named "" is not in the legend.
        x: x of each point.
        y: y of each point; NaN leaves a gap.
        color: a CSS color; "" takes the color of `LINE_COLORS` at the line's index in the chart.
        low: lower end of the whisker at each point; empty for a line without whiskers.
        high: upper end of the whisker at each point.
        dots: whether the points are marked by dots.
        joined: whether the points are joined by a line.
        dashed: whether the joining line is dashed.
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
        title: text at the axis.
        ends: values at which the axis begins and ends; by default all lines fit between them.
        ticks: (value, label) of each tick; by default round numbers, followed by `unit`.
        unit: text that follows the numbers of the default ticks.
        log: whether the axis is logarithmic.
        reverse: whether values grow to the left, or downward.
    """

    title: str = ""
    ends: Range | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    unit: str = ""
    log: bool = False
    reverse: bool = False


@dataclass(frozen=True)
class Bar:
    """A bar with an interval, and a text behind it.

    Attributes:
        name: text before the bar.
        value: length of the bar; None draws no bar.
        text: text behind the bar.
        low: lower end of the interval; None draws no interval.
        high: upper end of the interval.
        style: CSS classes of templates/page.css: "quiet", "theirs", "good", "bad", "dot", "sure".
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
    has_equal_scales: bool = False,
) -> str:
    """Draw lines over two axes, with a legend.

    Args:
        lines: the lines.
        x: the horizontal axis.
        y: the vertical axis.
        title: text above the chart.
        size: width and height in pixels.
        has_equal_scales: whether one unit has the same length on both axes, as on a map.

    Returns:
        HTML with an SVG.
    """
    # Find the box inside the margins, in pixels from the chart's left and top.
    width, height = size
    bottom_margin_px = BOTTOM_MARGIN_WITH_TITLE_PX if x.title else BOTTOM_MARGIN_PX
    left_px = LEFT_MARGIN_WITH_TITLE_PX if y.title else LEFT_MARGIN_PX
    right_px = width - RIGHT_MARGIN_PX
    top_px = TOP_MARGIN_PX
    bottom_px = height - bottom_margin_px
    box_width_px = right_px - left_px
    box_height_px = bottom_px - top_px

    # Find the ranges of the axes.
    x_range = _choose_axis_range(x, [line.x for line in lines])
    y_values = [line.y for line in lines]
    for line in lines:
        y_values += [line.low, line.high]
    y_range = _choose_axis_range(y, y_values)
    if has_equal_scales:
        x_units_per_px = abs(x_range[1] - x_range[0]) / box_width_px
        y_units_per_px = abs(y_range[1] - y_range[0]) / box_height_px
        units_per_px = max(x_units_per_px, y_units_per_px)
        x_range = _with_length(x_range, units_per_px * box_width_px)
        y_range = _with_length(y_range, units_per_px * box_height_px)

    # Convert the lines and the ticks to pixels.
    to_x = _make_scale(x_range, left_px, right_px, x.log)
    to_y = _make_scale(y_range, bottom_px, top_px, y.log)
    drawn_lines = []
    for index, line in enumerate(lines):
        default_color = LINE_COLORS[index % len(LINE_COLORS)]
        drawn_lines.append(_make_line_values(line, default_color, to_x, to_y))
    x_ticks = x.ticks or _choose_ticks(x_range, x, max_ticks=box_width_px // X_TICK_SPACING_PX)
    y_ticks = y.ticks or _choose_ticks(y_range, y, max_ticks=box_height_px // Y_TICK_SPACING_PX)
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


def _make_line_values(
    line: Line,
    default_color: str,
    to_x: Callable[[float], float],
    to_y: Callable[[float], float],
) -> dict[str, Any]:
    """Return the values, in pixels, from which the template draws a line.

    Args:
        line: the line.
        default_color: the color of a line that has none.
        to_x: function from an x value to pixels.
        to_y: function from a y value to pixels.
    """
    points = []
    dots = []
    for x, y in zip(line.x, line.y, strict=True):
        point = (to_x(x), to_y(y))
        points.append(point)
        if line.dots and np.isfinite(y):
            tooltip = f"{x:.3g}, {y:.3g}"
            dots.append((*point, tooltip))
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

    Args:
        groups: (heading, bars) of each group.
        ends: values at which the axis begins and ends.
    """

    low, high = ends

    def to_percent(value: float) -> float:
        """Return the position of a value on the axis, in percent of the axis's length."""
        percent = 100 * ((value - low) / (high - low))
        return round(min(max(percent, 0.0), 100.0), 1)

    zero = to_percent(0) if low < 0 else None
    return render("bars.html", groups=groups, at=to_percent, zero=zero)


def make_rate_bars(rates: Sequence[tuple[str, Estimate]]) -> list[Bar]:
    """Make bars of success rates, which are pairs of a name and the rate.

    The first rate is the one of interest, and its bar stands out. The others are baselines.
    """
    bars = []
    for index, (name, rate) in enumerate(rates):
        is_baseline = index > 0
        style = "quiet" if is_baseline else ""
        bars.append(Bar(name, rate.value, rate.to_text(".0%"), rate.low, rate.high, style))
    return bars


def draw_rate_differences(rows: Sequence[tuple[str, Estimate]]) -> str:
    """Draw differences of rates as dots with intervals, on an axis around zero.

    Args:
        rows: (name, difference) of each row; a difference of 0.1 is shown as 10 points.
    """
    half_range = MIN_DIFFERENCE_RANGE
    dots = []
    for name, difference in rows:
        low, high = difference.low, difference.high
        half_range = max(half_range, abs(low), abs(high))
        contains_zero = low <= 0 <= high  # then the difference may be due to chance
        style = "dot" if contains_zero else "sure dot"
        text = difference.to_text("+.1f", scale=100)
        dots.append(Bar(name, difference.value, text, low, high, style))
    return draw_bars([("", dots)], (-half_range, half_range))


def draw_histogram(counts: Sequence[int], low: str, high: str) -> str:
    """Draw counts as bars, over the whole width of the page.

    Args:
        counts: height of each bar.
        low: text at the left end.
        high: text at the right end.
    """
    largest_count = max([*counts, 1])  # at least 1, because the template divides by it
    return render("histogram.html", counts=counts, most=largest_count, low=low, high=high)


def _choose_axis_range(axis: Axis, values: Sequence[Sequence[float] | Array]) -> Range:
    """Return the values at which an axis begins and ends.

    These are the axis's own ends, or otherwise ends around all finite values, with some space.
    """
    if axis.ends is not None:
        return axis.ends
    all_values = np.concatenate([np.ravel(column).astype(float) for column in values])
    is_shown = np.isfinite(all_values)
    if axis.log:
        is_shown &= all_values > 0
    shown_values = all_values[is_shown]
    low, high = 0.1, 1.0  # of an axis without values; above 0, so that the axis may be logarithmic
    if len(shown_values):
        low = float(shown_values.min())
        high = float(shown_values.max())

    if axis.log:
        return low / LOG_SPACE_FACTOR, high * LOG_SPACE_FACTOR
    is_constant = high - low <= 1e-6 * max(abs(low), abs(high))
    if is_constant:
        space = max(abs(high), 1.0) * CONSTANT_SPACE
    else:
        space = LINEAR_SPACE * (high - low)
    if axis.reverse:
        return high + space, low - space
    return low - space, high + space


def _with_length(ends: Range, length: float) -> Range:
    """Return a range of length `length` with the middle and the direction of the range `ends`."""
    start, stop = ends
    middle = (start + stop) / 2
    half = length / 2 if stop > start else -length / 2
    return middle - half, middle + half


def _make_scale(
    ends: Range, start_px: float, stop_px: float, is_log: bool
) -> Callable[[float], float]:
    """Return the function from a value to its position in pixels.

    Values beyond an end of the axis get the position of that end.

    Args:
        ends: values at which the axis begins and ends.
        start_px: position of the axis's beginning.
        stop_px: position of the axis's end.
        is_log: whether the axis is logarithmic.
    """
    low, high = ends
    if is_log:
        low = log10(low)
        high = log10(high)

    def to_px(value: float) -> float:
        """Return the position of a value in pixels."""
        scaled_value = log10(max(value, 1e-12)) if is_log else value
        fraction = (scaled_value - low) / (high - low)
        fraction_on_axis = min(max(fraction, 0.0), 1.0)  # NaN stays NaN
        return round(start_px + fraction_on_axis * (stop_px - start_px), 1)

    return to_px


def _make_path(points: Sequence[tuple[float, float]]) -> str:
    """Return an SVG path through points (x, y) in pixels, with gaps where a point is not finite."""
    path = ""
    is_pen_down = False
    for x, y in points:
        is_finite = bool(np.isfinite([x, y]).all())
        if is_finite:
            command = "L" if is_pen_down else "M"  # draw a line to the point, or move there
            path += f"{command}{x:g} {y:g}"
        is_pen_down = is_finite
    return path


def _choose_ticks(ends: Range, axis: Axis, max_ticks: int) -> list[tuple[float, str]]:
    """Choose round numbers between the ends of an axis, and return them with their labels."""
    low, high = sorted(ends)
    values = _list_log_ticks(low, high) if axis.log else _list_linear_ticks(low, high, max_ticks)
    return [(value, f"{value:g}{axis.unit}") for value in values]


def _list_log_ticks(low: float, high: float) -> list[float]:
    """Return the numbers 1, 2 and 5 times powers of ten that lie in a range."""
    values = []
    for power in range(floor(log10(low)), floor(log10(high)) + 1):
        for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power):
            if low <= value <= high:
                values.append(value)
    return values


def _list_linear_ticks(low: float, high: float, max_ticks: int) -> list[float]:
    """Return the multiples of a step in a range. The step is 1, 2 or 5 times a power of ten."""
    max_ticks = max(max_ticks, 5)  # fewer would leave some ranges with less than two ticks
    # Begin with a power of ten that gives too many ticks, and enlarge it.
    step = 10.0 ** floor(log10((high - low) / max_ticks))
    for factor in (1, 2, 5, 10):
        if (high - low) / (factor * step) <= max_ticks:
            step *= factor
            break
    first = ceil(low / step)
    last = floor(high / step + 1e-9)  # without the 1e-9, rounding could lose a tick at the end
    return [number * step for number in range(first, last + 1)]
