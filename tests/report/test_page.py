"""Pages: self-contained and escaped; plots to scale."""

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
    draw_differences,
    make_rate_bars,
)


def points(svg: str) -> list[np.ndarray]:
    """The joined points [n, 2] of each line of a chart, in pixels."""
    paths = re.findall(r'<path d="(M[^"]+)" stroke=', svg)
    return [np.array(re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path), float) for path in paths]


def test_text_is_escaped_and_nothing_comes_from_outside() -> None:
    html = render(
        "open_loop.html", title="T & <T>", facts=[("<b>", "&")], charts=[[draw_bars([("<i>", [])])]]
    )
    assert (
        "<h1>T &amp; &lt;T&gt;</h1>" in html and "&lt;i&gt;" in html and "<b>&lt;b&gt;</b>" in html
    )
    assert '<div class="bars">' in html  # what a template has made is not escaped again
    assert not re.search(r'(src|href)="(?!data:)', html) and "http" not in html
    assert "<title>&lt;x&gt;: 1, 2</title>" in draw_chart([Line("<x>", [1, 2], [2, 3], dots=True)])


def test_bars_are_as_long_as_the_rates() -> None:
    html = draw_bars(
        [
            (
                "carrot",
                make_rate_bars(
                    [
                        ("SPEAR-1", estimate_proportion(30, 40)),
                        ("nothing", estimate_proportion(0, 40)),
                    ]
                ),
            )
        ]
    )
    assert "width:75.0%" in html and "75% [60%, 86%]" in html and "0% [0%, 9%]" in html
    assert "width:100.0%" in draw_bars([("", [Bar("much too long", 9.7, "970 %")])])
    assert "left:50.0%" in draw_differences([("same", estimate_proportion(0, 40))])


def test_lines_and_maps_are_drawn_to_scale_and_lines_broken_where_nothing_is_known() -> None:
    svg = draw_chart(
        [Line("a", [0, 1, 2, 3], [0, 10, np.nan, 30], dots=True)], y=Axis(ends=(0, 40))
    )
    assert svg.count("<circle") == 3 and "nan" not in svg
    (line,) = points(svg)
    assert len(line) == 3  # two joined, one alone
    down, across = -np.diff(line[:, 1]), np.diff(line[:, 0])
    assert down[1] == pytest.approx(2 * down[0], abs=0.3)
    assert across[1] == pytest.approx(2 * across[0], abs=0.3)
    (decades,) = points(
        draw_chart([Line("", [1, 10, 100], [1, 10, 100])], Axis(log=True), Axis(log=True))
    )
    assert np.allclose(np.diff(decades, n=2, axis=0), 0, atol=0.2)
    # a map has one scale, and may be mirrored
    (line,) = points(
        draw_chart([Line("", [0, 1], [0, 1])], Axis(reverse=True), equal=True, size=(300, 700))
    )
    across, down = line[1] - line[0]
    assert across < 0 and across == pytest.approx(down, abs=0.2)
