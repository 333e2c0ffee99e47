"""Line plots as SVG inside a page: no script, no library, readable on light and dark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

COLOURS = ("#3f86f5", "#e07b28", "#26a269", "#b05fd6", "#d8486b", "#8b8f98")
WIDTH, HEIGHT = 460, 360
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 24, 10, 44


@dataclass(frozen=True)
class Line:
    """A named line through points (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


def plot(
    lines: Sequence[Line],
    x_title: str,
    y_title: str,
    reach: tuple[float, float],
    log: bool = False,
    dots: bool = False,
    unit: str = " %",
) -> str:
    """Lines over two axes that both go from reach[0] to reach[1], with the diagonal.

    log   logarithmic axes. dots: also mark the points. unit: after the numbers on the axes.
    """
    low, high = (log10(v) for v in reach) if log else reach

    def share(value: float) -> float:
        along = (log10(max(value, 1e-12)) if log else value) - low
        return min(max(along / (high - low), 0.0), 1.0)

    def x(value: float) -> float:
        return _LEFT + share(value) * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - share(value) * (HEIGHT - _TOP - _BOTTOM)

    parts = [_axes(_ticks(reach, log), x, y, unit)]
    parts.append(
        f'<path d="M{x(reach[0]):.1f} {y(reach[0]):.1f}L{x(reach[1]):.1f} {y(reach[1]):.1f}" '
        'stroke="var(--soft)" stroke-dasharray="4 4" fill="none"/>'
    )
    for index, line in enumerate(lines):
        colour = COLOURS[index % len(COLOURS)]
        path = "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in line.points)
        parts.append(f'<path d="M{path}" stroke="{colour}" stroke-width="2" fill="none"/>')
        for a, b in line.points if dots else ():
            parts.append(
                f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.2" fill="{colour}">'
                f"<title>{escape(line.name)}: {a:.3g}{unit}, {b:.3g}{unit}</title></circle>"
            )
    middle = _TOP + (HEIGHT - _TOP - _BOTTOM) / 2
    across = _LEFT + (WIDTH - _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{across:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>'
    )
    return (
        f'<div><svg viewBox="0 0 {WIDTH} {HEIGHT}" style="width:100%;max-width:560px;display:block;font-size:12px" '
        f'fill="var(--soft)" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">{"".join(parts)}</svg>'
        + f"{_legend([line.name for line in lines])}</div>"
    )


def _legend(names: Sequence[str]) -> str:
    """Each name behind a patch of its line's colour."""
    patch = "display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;background:"
    items = (
        f'<span style="white-space:nowrap"><span style="{patch}{COLOURS[i % len(COLOURS)]}"></span>{escape(n)}</span>'
        for i, n in enumerate(names)
    )
    return f'<p class="soft" style="display:flex;flex-wrap:wrap;gap:4px 16px;font-size:.88rem">{"".join(items)}</p>'


def _axes(ticks: Sequence[float], x: Callable[[float], float], y: Callable[[float], float], unit: str) -> str:
    parts = []
    for tick in ticks:
        across, up, label = x(tick), y(tick), f"{tick:g}{unit}"
        parts.append(
            f'<path d="M{across:.1f} {_TOP}V{HEIGHT - _BOTTOM}M{_LEFT} {up:.1f}H{WIDTH - _RIGHT}" '
            'stroke="var(--line)" fill="none"/>'
            f'<text x="{across:.1f}" y="{HEIGHT - _BOTTOM + 15}" text-anchor="middle">{label}</text>'
            f'<text x="{_LEFT - 5}" y="{up + 4:.1f}" text-anchor="end">{label}</text>'
        )
    return "".join(parts)


def _ticks(reach: tuple[float, float], log: bool) -> list[float]:
    if not log:
        return [reach[0] + i * (reach[1] - reach[0]) / 5 for i in range(6)]
    powers = range(floor(log10(reach[0])), floor(log10(reach[1])) + 1)
    return [v for p in powers for v in (10.0**p, 2 * 10.0**p, 5 * 10.0**p) if reach[0] <= v <= reach[1]]
