"""The page: self-contained, escaped, with intervals drawn."""

from __future__ import annotations

import re

import numpy as np

from spear.evaluate.stats import wilson
from spear.report import page


def test_a_page_needs_nothing_from_outside_and_escapes_text() -> None:
    body = page.picture(np.zeros((4, 6, 3), np.uint8), 'a "quoted" <b>caption</b>') + page.film(
        b"\x00", "video/mp4", "film"
    )
    html = page.page("T & T", "", [("97 %", "success")], [page.Section("One", body, 3.2)])
    assert not re.search(r'(src|href)="(?!data:)', html)
    assert "http" not in html
    assert "<b>caption" not in html
    assert "T &amp; T" in html
    assert "3 s" in html


def test_bars_are_as_long_as_the_rates() -> None:
    html = page.success_bars([("carrot", [("SPEAR-1", wilson(30, 40)), ("nothing", wilson(0, 40))])])
    assert "width:75.0%" in html
    assert "75% [60%, 86%]" in html
    assert "0% [0%, 9%]" in html


def test_tables_escape_their_cells() -> None:
    assert "<td>&lt;x&gt;</td>" in page.table(["h"], [["<x>"]])
