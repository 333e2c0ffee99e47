"""Pages are self-contained and escape all texts, and plots are drawn to scale."""

import re

import numpy as np
import pytest

from spear.evaluate.stats import estimate_proportion
from spear.report.page import render
from spear.report.plot import (
    Axis,
    Bar,
    Line,
    draw_bars,
    draw_chart,
    draw_rate_differences,
    make_rate_bars,
)


def read_lines(svg: str) -> list[np.ndarray]:
    """Return the joined points [n, 2] of each line of a chart, in pixels from its left and top."""
    paths = re.findall(r'<path d="(M[^"]+)" stroke=', svg)
    return [np.array(re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path), float) for path in paths]


@pytest.fixture(scope="module")
def page() -> str:
    """A page whose texts all have characters that HTML must escape."""
    bars = draw_bars([("<i>", [])])
    return render("open_loop.html", title="T & <T>", facts=[("<b>", "&")], charts=[[bars]])


def test_text_on_a_page_is_escaped(page: str) -> None:
    assert "<h1>T &amp; &lt;T&gt;</h1>" in page
    assert "<b>&lt;b&gt;</b>" in page
    assert "&lt;i&gt;" in page


def test_what_a_template_has_made_is_not_escaped_again(page: str) -> None:
    assert '<div class="bars">' in page


def test_a_page_needs_nothing_from_outside(page: str) -> None:
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "http" not in page


def test_names_in_a_chart_are_escaped() -> None:
    svg = draw_chart([Line("<x>", [1, 2], [2, 3], dots=True)])

    assert "<title>&lt;x&gt;: 1, 2</title>" in svg


def test_bars_are_as_long_as_the_rates() -> None:
    rates = [("SPEAR-1", estimate_proportion(30, 40)), ("nothing", estimate_proportion(0, 40))]

    html = draw_bars([("carrot", make_rate_bars(rates))])

    assert "width:75.0%" in html
    assert "75% [60%, 86%]" in html  # with the 95 % Wilson interval of 30 of 40
    assert "0% [0%, 9%]" in html


def test_a_bar_that_is_longer_than_the_axis_is_cut_off() -> None:
    assert "width:100.0%" in draw_bars([("", [Bar("much too long", 9.7, "970 %")])])


def test_no_difference_is_in_the_middle() -> None:
    assert "left:50.0%" in draw_rate_differences([("same", estimate_proportion(0, 40))])


def test_a_line_is_drawn_to_scale_and_broken_where_nothing_is_known() -> None:
    line = Line("a", [0, 1, 2, 3], [0, 10, np.nan, 30], dots=True)

    svg = draw_chart([line], y=Axis(ends=(0, 40)))

    assert svg.count("<circle") == 3
    assert "nan" not in svg
    [points] = read_lines(svg)
    assert len(points) == 3  # two joined, one alone
    # From the second to the third point it is twice as far as from the first to the second, in both
    # directions, because the point at x = 2 is missing.
    to_right = np.diff(points[:, 0])
    upward = -np.diff(points[:, 1])
    assert upward[1] == pytest.approx(2 * upward[0], abs=0.3)
    assert to_right[1] == pytest.approx(2 * to_right[0], abs=0.3)


def test_logarithmic_axes_have_decades_of_the_same_length() -> None:
    line = Line("", [1, 10, 100], [1, 10, 100])

    [points] = read_lines(draw_chart([line], Axis(log=True), Axis(log=True)))

    first_decade, second_decade = np.diff(points, axis=0)  # from 1 to 10, from 10 to 100
    np.testing.assert_allclose(second_decade, first_decade, atol=0.2, rtol=0)


def test_a_map_has_one_scale_and_may_be_mirrored() -> None:
    """A line of slope 1 stays one on a chart that is higher than wide; x grows to the left."""
    line = Line("", [0, 1], [0, 1])

    svg = draw_chart([line], Axis(reverse=True), has_equal_scales=True, size=(300, 700))

    [points] = read_lines(svg)
    to_right, down = points[1] - points[0]
    assert to_right < 0
    assert to_right == pytest.approx(down, abs=0.2)
