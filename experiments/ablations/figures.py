"""Draws docs/figures/ablation_*.svg from the episodes in results/scores.parquet. Needs Matplotlib.

    python -m experiments.ablations.figures

The paper's numbers are those that `spear evaluate reference` shows.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from experiments.ablations.published import (
    DOCS,
    SuccessTables,
    load_rows,
    read_published_tables,
)
from experiments.figure_style import (
    BLUE,
    ORANGE,
    WIDTH_INCHES,
    draw_forest,
    save_figure,
    use_style,
)
from spear.evaluate.compare import load_published_tables
from spear.evaluate.stats import estimate_difference_over_seeds

Rows = dict[str, SuccessTables]

NUM_DEMONSTRATIONS = (250, 500, 1000, 2000)
DEFAULT_NUM_DEMONSTRATIONS = 500  # of the table of long trainings
ZERO_IMAGES_X = 16  # where no images are drawn on a logarithmic axis


def main() -> None:
    """Draw all figures of the page."""
    tables = [load_rows(table) for table in read_published_tables()]
    three_seeds, long, demonstrations, _, _, images, _ = tables
    with use_style("ablations"):
        draw_parts(three_seeds, long)
        draw_demonstrations(long, demonstrations)
        draw_images(images)
        draw_error_by_time()


def draw_parts(three_seeds: Rows, long: Rows) -> None:
    """What each choice of the paper brings, here and in the paper."""
    full = three_seeds["full method"]
    three_d_gain = find_published_gain("ablations", "full", "no 3D")
    choices = {  # choice → its rows, the rows without it, and what the paper gains by it
        "3D, 1,500 policy steps": (full, three_seeds["no-3d"], three_d_gain),
        "3D, 3,500 policy steps": (long["full method"], long["no-3d"], three_d_gain),
        "questions about objects, not pixels": (
            full,
            three_seeds["points"],
            find_published_gain("ablations", "full", "points but no objects"),
        ),
        "MoGe's encoder": (
            full,
            three_seeds["no-moge"],
            find_published_gain("ablations", "full", "no MoGe"),
        ),
        "S³ and cosine, not R⁴ and squares": (
            full,
            three_seeds["linear-mse"],
            find_published_gain("rotation", "S³, cosine", "linear, MSE"),
        ),
        "quantiles, not mean and deviation": (
            three_seeds["quantile"],
            full,
            find_published_gain("normalisation", "1–99 % quantile", "mean-std"),
        ),
        "velocities, not clean actions": (three_seeds["velocity"], full, np.nan),
    }
    gains = {
        name: estimate_difference_over_seeds(with_choice, without_choice)
        for name, (with_choice, without_choice, _) in choices.items()
    }

    figure, axes = plt.subplots(figsize=(WIDTH_INCHES * 0.6, 3.2))
    draw_forest(axes, gains, [published for *_, published in choices.values()])
    axes.set_title("What each choice of the paper brings", loc="center", x=0.3)
    axes.set_xlabel("gain in success, points")
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.16), ncols=2)
    save_figure(figure, locate_figure("parts"))


def find_published_gain(table: str, choice: str, alternative: str) -> float:
    """How many points the paper gains by a choice."""
    means = load_published_tables()[table].means
    return means[choice] - means[alternative]


def draw_demonstrations(long: Rows, demonstrations: Rows) -> None:
    """Success over the number of demonstrations with and without 3D, and the differences."""
    with_3d = {}
    without_3d = {}
    for number in NUM_DEMONSTRATIONS:
        if number == DEFAULT_NUM_DEMONSTRATIONS:
            with_3d[number] = long["full method"]
            without_3d[number] = long["no-3d"]
        else:
            with_3d[number] = demonstrations[f"{number:,}, full method"]
            without_3d[number] = demonstrations[f"{number:,}, no-3d"]
    gains = {
        f"{number:,}": estimate_difference_over_seeds(with_3d[number], without_3d[number])
        for number in NUM_DEMONSTRATIONS
    }

    figure, (trainings_axes, gains_axes) = plt.subplots(
        ncols=2, figsize=(WIDTH_INCHES, 3), width_ratios=[1.5, 1], layout="constrained"
    )
    draw_trainings(trainings_axes, with_3d, "with 3D", BLUE)
    draw_trainings(trainings_axes, without_3d, "without 3D", ORANGE)
    set_log_axis(
        trainings_axes, NUM_DEMONSTRATIONS, [f"{number:,}" for number in NUM_DEMONSTRATIONS]
    )
    trainings_axes.set_title("Success of each training")
    trainings_axes.set_xlabel("demonstrations of each task (3,500 policy steps)")
    trainings_axes.set_ylabel("success, %")
    trainings_axes.set_ylim(0, 100)
    trainings_axes.legend(loc="lower right")
    draw_forest(gains_axes, gains)
    gains_axes.set_title("Gain by 3D")
    gains_axes.set_xlabel("points, with 95 % interval")
    gains_axes.set_ylabel("demonstrations")
    save_figure(figure, locate_figure("demonstrations"))


def draw_images(curve: Rows) -> None:
    """Success over the number of 3D-labeled images, and the gains over none.

    The row of 13,056 images is not drawn: it has fewer trainings, which ran on other hardware.
    """
    all_rows = {int(name.replace(",", "").replace("none", "0")): row for name, row in curve.items()}
    rows = {
        number: row for number, row in all_rows.items() if np.shape(row) == np.shape(all_rows[0])
    }
    rows_by_x = {max(number, ZERO_IMAGES_X): row for number, row in rows.items()}
    gains = {
        f"{number:,}": estimate_difference_over_seeds(row, rows[0])
        for number, row in rows.items()
        if number
    }

    figure, (trainings_axes, gains_axes) = plt.subplots(
        ncols=2, figsize=(WIDTH_INCHES, 3), width_ratios=[1.5, 1], layout="constrained"
    )
    draw_trainings(trainings_axes, rows_by_x, "", BLUE)
    set_log_axis(trainings_axes, list(rows_by_x), [f"{number:,}" for number in rows])
    trainings_axes.set_title("Success of each training")
    trainings_axes.set_xlabel("3D-labeled images (1,500 policy steps)")
    trainings_axes.set_ylabel("success, %")
    trainings_axes.set_ylim(0, 100)
    draw_forest(gains_axes, gains)
    gains_axes.set_title("Gain over no images")
    gains_axes.set_xlabel("points, with 95 % interval")
    gains_axes.set_ylabel("images")
    save_figure(figure, locate_figure("images"))


def draw_error_by_time() -> None:
    """How far the end that the network predicts at time τ is from the demonstrated action."""
    text = (DOCS / "tables" / "error_by_time.txt").read_text()
    policies = re.split(r"\n(nano-vla-\w+)\n", text)[2::2]
    curves = []
    for policy in policies:
        rows = re.findall(r"^\| (0[.\d]*) \| ([\d.]+) ", policy, re.M)
        curves.append(np.array(rows, float))

    figure, axes = plt.subplots(figsize=(WIDTH_INCHES, 3))
    for title, seeds, color in (
        ("velocity (the paper's loss), three trainings", curves[:3], BLUE),
        ("clean action, three trainings", curves[3:6], ORANGE),
    ):
        for index, curve in enumerate(seeds):
            label = title if index == 0 else None
            axes.plot(curve[:, 0], curve[:, 1], color=color, label=label)
    axes.set_title("Error of the translation at the end of the flow, as predicted at time τ")
    axes.set_xlabel("flow time τ (0 is noise, 1 the action)")
    axes.set_ylabel("error, mm")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 21)
    axes.legend(loc="upper right")
    save_figure(figure, locate_figure("error_by_time"))


def draw_trainings(axes: Axes, rows: Mapping[int, SuccessTables], name: str, color: str) -> None:
    """Draw a dot for every training behind rows, and a line through their means, in percent.

    Args:
        axes: where to draw.
        rows: the place on the horizontal axis and the outcomes of its trainings.
        name: what the legend says about the line.
        color: of line and dots.
    """
    means = []
    for x, row in rows.items():
        rates = 100 * np.mean(row, axis=(0, 2))  # [seeds]
        means.append(rates.mean())
        axes.plot([x] * len(rates), rates, "o", color=color, alpha=0.5, markersize=4)
    axes.plot(list(rows), means, "-", color=color, label=name)


def set_log_axis(axes: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    """Make the horizontal axis logarithmic, with these ticks only."""
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def locate_figure(name: str) -> Path:
    """Return the file of a figure of the page."""
    return DOCS / "figures" / f"ablation_{name}.svg"


if __name__ == "__main__":
    main()
