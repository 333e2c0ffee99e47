"""The style of the figures that experiments draw: the one of the diagrams in the documentation.

A figure is an SVG without a background, whose colors follow the reader's light or dark theme.
"""

import io
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spear.evaluate.stats import Estimate

TEXT = "#1b2733"
FAINT_TEXT = "#55677a"
GRID = "#dde5ed"
BLUE = "#1f6fd6"
ORANGE = "#d97706"
DARK_COLORS = {
    TEXT: "#e6edf3",
    FAINT_TEXT: "#a9b7c6",
    GRID: "#2b3947",
    BLUE: "#6cb0ff",
    ORANGE: "#f5a742",
}
"""The color of a light theme, and the color that replaces it in a dark theme."""

WIDTH_INCHES = 7.6
STYLE: Any = {  # keys are names of Matplotlib's settings
    "font.size": 9,
    "text.color": TEXT,
    "axes.edgecolor": FAINT_TEXT,
    "axes.labelcolor": TEXT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": FAINT_TEXT,
    "ytick.color": FAINT_TEXT,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "legend.frameon": False,
    "savefig.transparent": True,
}


def use_style(salt: str) -> AbstractContextManager[None]:
    """Draw in this style in a `with` block; the same numbers and salt give the same file."""
    return plt.rc_context({**STYLE, "svg.hashsalt": salt})


def draw_forest(
    axes: Axes,
    gains: Mapping[str, Estimate],
    published: Sequence[float] | None = None,
) -> None:
    """Draw differences in success with their intervals, one row each, and write them at the right.

    Args:
        axes: where to draw; the rows go from top to bottom.
        gains: the name of each row and its difference, as a fraction.
        published: the same differences in the paper, in points; NaN where the paper has none.
    """
    positions = np.arange(len(gains))[::-1]
    values = 100 * np.array([gain.value for gain in gains.values()])
    lows = 100 * np.array([gain.low for gain in gains.values()])
    highs = 100 * np.array([gain.high for gain in gains.values()])

    axes.axvline(0, color=FAINT_TEXT, linewidth=1)
    axes.errorbar(
        values,
        positions,
        xerr=[values - lows, highs - values],
        fmt="o",
        color=BLUE,
        elinewidth=2,
        label="here, with its 95 % interval",
    )
    if published is not None:
        axes.plot(published, positions, "D", color=ORANGE, markersize=5, label="paper")
    for position, value, low, high in zip(positions, values, lows, highs, strict=True):
        text = f"{value:+.1f}  [{low:.1f}, {high:.1f}]".replace("-", "−")
        axes.annotate(
            text,
            (1.02, position),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8.5,
        )
    axes.set_yticks(positions, list(gains))
    axes.set_ylim(-0.6, len(gains) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as an SVG whose colors follow the reader's theme."""
    svg = io.StringIO()
    figure.savefig(svg, format="svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)
    path.write_text(add_dark_colors(svg.getvalue()), "utf-8")


def add_dark_colors(svg: str) -> str:
    """Add rules to an SVG that exchange its colors in a dark theme."""
    rules = []
    for light, dark in DARK_COLORS.items():
        for attribute in ("fill", "stroke"):
            selector = f'[style*="{attribute}: {light}"]'
            rules.append(f"{selector} {{ {attribute}: {dark} !important }}")
    style = "@media (prefers-color-scheme: dark) {\n" + "\n".join(rules) + "\n}"
    head, end_of_tag, tail = svg.partition("<defs>\n")
    return f'{head}<style type="text/css">\n{style}\n</style>\n{end_of_tag}{tail}'
