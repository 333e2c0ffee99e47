"""The scaling curve as a drawing: success against the number of 3D-labelled images, for a page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from spear.evaluate.stats import Estimate

Point = tuple[int, Estimate, Sequence[float]]
"""Images, success with its interval, and the success of each training."""

_WIDTH, _HEIGHT = 760, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 20, 16, 52
_GAP = 90
"""Between no images, which a logarithmic axis has no place for, and the first of the others, pixels."""


def drawing(points: Sequence[Point]) -> str:
    """SVG of at least one point, by images: a line through the means, 95 % intervals, a small dot per
    training.

    The horizontal axis is logarithmic, with 0 set apart at its left end.
    """
    points = sorted(points, key=lambda point: point[0])
    top = min(1.0, math.ceil(10 * max(max(e.high, *singles) for _, e, singles in points)) / 10)
    parts = [_grid(top)]
    at = {images: _across(images, [n for n, _, _ in points]) for images, _, _ in points}
    place = [(at[n], _up(e.value, top)) for n, e, _ in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    parts.append(f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>')
    for (images, e, singles), (x, y) in zip(points, place, strict=True):
        low, high = _up(e.low, top), _up(e.high, top)
        parts.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 6:.1f} {low:.1f}h12M{x - 6:.1f} {high:.1f}h12" '
                     'stroke="var(--ink)" stroke-width="1.5" fill="none"/>')  # fmt: skip
        for single in singles:
            parts.append(
                f'<circle cx="{x + 12:.1f}" cy="{_up(single, top):.1f}" r="3" fill="var(--soft)" opacity=".7"/>'
            )
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="var(--accent)"/>')
        parts.append(_text(x, _HEIGHT - _BOTTOM + 20, f"{images:,}", "middle"))
    parts.append(_text(_LEFT + (_WIDTH - _LEFT - _RIGHT) / 2, _HEIGHT - 8, "3D-labelled images", "middle"))
    label = escape(", ".join(f"{n} images: {e.value:.0%} [{e.low:.0%}, {e.high:.0%}]" for n, e, _ in points))
    return (
        f'<div class="scroll"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}" '
        f'style="width:100%;min-width:520px;max-width:{_WIDTH}px;display:block">{"".join(parts)}</svg></div>'
    )


def _grid(top: float) -> str:
    parts = []
    for tenth in range(0, round(10 * top) + 1, 1 if top <= 0.5 else 2):
        y = _up(tenth / 10, top)
        colour = "var(--soft)" if tenth == 0 else "var(--line)"
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="{colour}"/>')
        parts.append(_text(_LEFT - 8, y + 4, f"{10 * tenth} %", "end"))
    return "".join(parts)


def _text(x: float, y: float, words: str, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-size="13" fill="var(--soft)">{escape(words)}</text>'


def _up(value: float, top: float) -> float:
    return _HEIGHT - _BOTTOM - value / top * (_HEIGHT - _TOP - _BOTTOM)


def _across(images: int, every: Sequence[int]) -> float:
    """Where so many images are on the axis, pixels."""
    first = _LEFT + 30
    some = [n for n in every if n > 0]
    if images == 0 or not some:
        return first
    begin = first + (_GAP if 0 in every else 0)
    span = math.log(some[-1] / some[0])
    share = math.log(images / some[0]) / span if span else 1.0
    return begin + share * (_WIDTH - _RIGHT - 30 - begin)
