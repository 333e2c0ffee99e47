"""Draws docs/figures/ablation_*.svg from the episodes in results/scores.parquet. Needs Matplotlib.

    python -m experiments.ablations.figures

The paper's numbers are those that `spear evaluate reference` shows.
"""

import re
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.ablations.published import (
    DOCS,
    SuccessTables,
    load_rows,
    read_published_tables,
)
from spear.evaluate.compare import load_references
from spear.evaluate.stats import (
    Estimate,
    estimate_difference_over_seeds,
    estimate_mean_over_seeds,
)
from spear.types import Array

Rows = dict[str, SuccessTables]

BLUE = "#2563eb"
ORANGE = "#d97706"
FIGURE_SIZE_INCHES = (7.6, 3.4)
STYLE: Any = {  # keys are names of matplotlib's settings
    "svg.hashsalt": "ablations",  # the same file from the same numbers
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e6ea",
}
NUM_DEMONSTRATIONS = (250, 500, 1000, 2000)
DEFAULT_NUM_DEMONSTRATIONS = 500  # of the table of long trainings
ZERO_IMAGES_X = 16  # where no images are drawn on a logarithmic axis


def main() -> None:
    """Draw all figures of the page."""
    tables = [load_rows(table) for table in read_published_tables()]
    three_seeds, long, demonstrations, _, _, images, _ = tables
    with plt.rc_context(STYLE):
        draw_parts(three_seeds, long)
        draw_demonstrations(long, demonstrations)
        draw_images(images)
        draw_error_by_time()


def draw_parts(three_seeds: Rows, long: Rows) -> None:
    """What each choice of the paper brings, here and in the paper."""
    full = three_seeds["full method"]
    three_d_gain = find_published_gain("ablations", "full", "no 3D")
    parts = [
        ("3D,\n1,500 steps", full, three_seeds["no-3d"], three_d_gain),
        ("3D,\n3,500 steps", long["full method"], long["no-3d"], three_d_gain),
        (
            "objects,\nno pixels",
            full,
            three_seeds["points"],
            find_published_gain("ablations", "full", "points but no objects"),
        ),
        (
            "MoGe's\nencoder",
            full,
            three_seeds["no-moge"],
            find_published_gain("ablations", "full", "no MoGe"),
        ),
        (
            "S³ and\ncosine",
            full,
            three_seeds["linear-mse"],
            find_published_gain("rotation", "S³, cosine", "linear, MSE"),
        ),
        (
            "quantiles",
            three_seeds["quantile"],
            full,
            find_published_gain("normalisation", "1–99 % quantile", "mean-std"),
        ),
        ("velocities", three_seeds["velocity"], full, np.nan),
    ]
    positions = np.arange(len(parts))
    gains = [estimate_difference_over_seeds(a, b) for _, a, b, _ in parts]
    published_gains = [published for *_, published in parts]

    figure, axes = plt.subplots(figsize=FIGURE_SIZE_INCHES)
    axes.axhline(0, color="#555", linewidth=1)
    draw_estimates(axes, positions, gains, "here, with its 95 % interval", BLUE, fmt="o")
    axes.plot(positions + 0.12, published_gains, "D", color=ORANGE, label="paper")
    axes.set_xticks(positions, [name for name, *_ in parts])
    axes.set_ylabel("gain in success, points")
    save(figure, axes, "parts")


def find_published_gain(table: str, choice: str, alternative: str) -> float:
    """How many points the paper gains by a choice."""
    means = load_references()[table].means
    return means[choice] - means[alternative]


def draw_demonstrations(long: Rows, demonstrations: Rows) -> None:
    """Success over the number of demonstrations, with and without 3D, and every training."""
    figure, axes = plt.subplots(figsize=FIGURE_SIZE_INCHES)
    for name, title, shift, color in (
        ("full method", "with 3D", 0.97, BLUE),
        ("no-3d", "without 3D (small dots: single trainings)", 1.03, ORANGE),
    ):
        rows = []
        for number in NUM_DEMONSTRATIONS:
            if number == DEFAULT_NUM_DEMONSTRATIONS:
                rows.append(long[name])
            else:
                rows.append(demonstrations[f"{number:,}, {name}"])
        x = shift * np.array(NUM_DEMONSTRATIONS)
        means = [estimate_mean_over_seeds(row) for row in rows]
        draw_estimates(axes, x, means, title, color, fmt="o-")
        draw_trainings(axes, shift * x, rows, color)
    set_log_axis(axes, NUM_DEMONSTRATIONS, [f"{number:,}" for number in NUM_DEMONSTRATIONS])
    axes.set_xlabel("demonstrations of each family (3,500 steps)")
    axes.set_ylabel("success, %")
    axes.set_ylim(50, 100)
    save(figure, axes, "demonstrations")


def draw_images(curve: Rows) -> None:
    """Success over the number of 3D-labeled images, and every training."""
    numbers = [int(name.replace(",", "").replace("none", "0")) for name in curve]
    x = np.maximum(numbers, ZERO_IMAGES_X)
    rows = list(curve.values())
    means = [estimate_mean_over_seeds(row) for row in rows]

    figure, axes = plt.subplots(figsize=FIGURE_SIZE_INCHES)
    title = "three trainings each, the last two (small dots: single trainings)"
    draw_estimates(axes, x, means, title, BLUE, fmt="o-")
    draw_trainings(axes, 1.07 * x, rows, BLUE)
    set_log_axis(axes, x, [f"{number:,}" for number in numbers])
    axes.set_xlabel("3D-labeled images")
    axes.set_ylabel("success, %")
    axes.set_ylim(20, 80)
    save(figure, axes, "images")


def draw_error_by_time() -> None:
    """How far the end that the network predicts at time τ is from the demonstrated action."""
    text = (DOCS / "tables" / "error_by_time.txt").read_text()
    policies = re.split(r"\n(nano-vla-\w+)\n", text)[2::2]
    curves = []
    for policy in policies:
        rows = re.findall(r"^\| (0[.\d]*) \| ([\d.]+) ", policy, re.M)
        curves.append(np.array(rows, float))

    figure, axes = plt.subplots(figsize=FIGURE_SIZE_INCHES)
    for title, seeds, color in (
        ("velocity (the paper's loss)", curves[:3], BLUE),
        ("clean action", curves[3:6], ORANGE),
    ):
        for index, curve in enumerate(seeds):
            label = title if index == 0 else None
            axes.plot(curve[:, 0], curve[:, 1], color=color, label=label)
    axes.set_xlabel("flow time τ (0: noise, 1: action)")
    axes.set_ylabel("error, mm")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 21)
    save(figure, axes, "error_by_time")


def draw_estimates(
    axes: Axes, x: Array, estimates: Sequence[Estimate], title: str, color: str, fmt: str
) -> None:
    """Draw estimates with their intervals, in percent."""
    values = 100 * np.array([estimate.value for estimate in estimates])
    low = 100 * np.array([estimate.low for estimate in estimates])
    high = 100 * np.array([estimate.high for estimate in estimates])
    axes.errorbar(
        x, values, [values - low, high - values], fmt=fmt, color=color, label=title, capsize=3
    )


def draw_trainings(axes: Axes, x: Array, rows: Sequence[SuccessTables], color: str) -> None:
    """Draw a small dot for every training behind rows, in percent."""
    for position, row in zip(x, rows, strict=True):
        rates = 100 * np.mean(row, axis=(0, 2))
        axes.plot([position] * len(rates), rates, ".", color=color, alpha=0.6)


def set_log_axis(axes: Axes, ticks: Sequence[float] | Array, labels: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels)
    axes.minorticks_off()


def save(figure: Figure, axes: Axes, name: str) -> None:
    """Write a figure of the page."""
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    figure.tight_layout()
    path = DOCS / "figures" / f"ablation_{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
