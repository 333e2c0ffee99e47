"""Success in laboratories that no demonstration shows, from the kept episodes.

    python -m experiments.labs             # prints the table
    python -m experiments.labs --figure    # also draws docs/figures/labs.svg, needs Matplotlib

A key of results/scores.parquet names the surroundings of the evaluation ("seen" or "unseen"
laboratories), the row, the number of laboratories with demonstrations, and the seed of the
training: "unseen-3d-64-0".
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from experiments.ablations.scores import load_scores
from experiments.ablations.table import stack_successes
from spear.cli import run_reporting_errors
from spear.evaluate.results import Results
from spear.evaluate.stats import (
    Estimate,
    estimate_difference_over_seeds,
    estimate_mean_over_seeds,
)
from spear.types import Array

SCORES = Path(__file__).with_name("results") / "scores.parquet"
FIGURE = Path(__file__).parents[2] / "docs" / "figures" / "labs.svg"

Surroundings = Literal["seen", "unseen"]
SURROUNDINGS: tuple[Surroundings, ...] = ("unseen", "seen")
ROW_TITLES = {
    "3d": "3D questions",
    "3d-no-moge": "3D questions, no MoGe",
    "2d": "2D questions",
    "no-images": "no images",
    "3d-more": "3D questions, more images",
    "2d-more": "2D questions, more images",
}
"""Row → what its VLM was asked about the images without demonstrations."""
MAIN_ROW = "3d"
MORE_ENDING = "-more"
"""End of the names of rows whose encoders know such rooms, whose VLM saw more images, and whose
policies were trained for twice as many steps."""


@dataclass(frozen=True)
class Cell:
    """The trainings of one row with one number of laboratories, in seen or unseen ones.

    results_by_seed  training seed → the results of its policy.
    """

    surroundings: Surroundings
    row: str
    num_labs: int
    results_by_seed: dict[int, Results]

    def select_seeds(self, seeds: list[int]) -> list[Array]:
        """Success [seeds, scenes] of each task family, for these training seeds."""
        results = [self.results_by_seed[seed] for seed in seeds]
        return stack_successes(results, results[0].families)

    def success(self) -> Estimate:
        """Mean success over training seeds and scenes."""
        return estimate_mean_over_seeds(self.select_seeds(sorted(self.results_by_seed)))


def load_cells(path: Path = SCORES) -> list[Cell]:
    """All cells that have been scored: unseen laboratories first, then by their number and row."""
    by_cell: dict[tuple[Surroundings, str, int], dict[int, Results]] = {}
    for key, results in load_scores(path).items():
        surroundings, name = key.split("-", 1)
        row, num_labs_text, seed = name.rsplit("-", 2)
        assert surroundings in SURROUNDINGS, key
        by_cell.setdefault((surroundings, row, int(num_labs_text)), {})[int(seed)] = results

    cells = []
    for (surroundings, row, num_labs), results_by_seed in by_cell.items():
        cells.append(Cell(surroundings, row, num_labs, results_by_seed))
    rows = list(ROW_TITLES)
    cells.sort(
        key=lambda cell: (
            SURROUNDINGS.index(cell.surroundings),
            cell.num_labs,
            rows.index(cell.row),
        )
    )
    return cells


def find_difference(cell: Cell, cells: list[Cell]) -> tuple[Estimate, int] | None:
    """How much the main row succeeds more often than a cell's row, over the seeds of both.

    Returns the difference and the number of seeds, or None for a main row itself.
    """
    main_row = MAIN_ROW + MORE_ENDING if cell.row.endswith(MORE_ENDING) else MAIN_ROW
    if cell.row == main_row:
        return None
    for main_cell in cells:
        if (main_cell.surroundings, main_cell.row, main_cell.num_labs) == (
            cell.surroundings,
            main_row,
            cell.num_labs,
        ):
            seeds = sorted(set(main_cell.results_by_seed) & set(cell.results_by_seed))
            difference = estimate_difference_over_seeds(
                main_cell.select_seeds(seeds), cell.select_seeds(seeds)
            )
            return difference, len(seeds)
    return None


def format_table(cells: list[Cell]) -> str:
    """The table as Markdown, success and differences in percent and points."""
    lines = [
        "| laboratories | demonstrations in | VLM was asked | success, % [95 %] |"
        " 3D questions more by, points [95 %] | each seed, % |",
        "|---|---|---|---|---|---|",
    ]
    for cell in cells:
        rates = []
        for seed in sorted(cell.results_by_seed):
            rates.append(f"{100 * cell.results_by_seed[seed].mean_success().value:.1f}")
        difference = find_difference(cell, cells)
        gain = "–" if difference is None else difference[0].to_text("+.1f", 100)
        lines.append(
            f"| {cell.surroundings} | {cell.num_labs} | {ROW_TITLES[cell.row]} |"
            f" {cell.success().to_text('.1f', 100)} | {gain} | {', '.join(rates)} |"
        )
    return "\n".join(lines)


def draw_figure(cells: list[Cell], path: Path = FIGURE) -> None:
    """Draw success over the number of laboratories, for every row; dots are single trainings."""
    import matplotlib.pyplot as plt

    from experiments.figure_style import (
        BLUE,
        FAINT_TEXT,
        ORANGE,
        WIDTH_INCHES,
        save_figure,
        use_style,
    )

    styles = {  # color, and style of the line or of the marker
        "3d": (BLUE, "-"),
        "3d-no-moge": (BLUE, "--"),
        "2d": (ORANGE, "-"),
        "no-images": (FAINT_TEXT, "-"),
        # With one number of laboratories only: a diamond instead of a line
        "3d-more": (BLUE, "D"),
        "2d-more": (ORANGE, "D"),
    }
    titles = {
        "unseen": "Laboratories without demonstrations",
        "seen": "Laboratories with demonstrations",
    }
    with use_style("labs"):
        figure, all_axes = plt.subplots(
            ncols=2, figsize=(WIDTH_INCHES, 3), sharey=True, layout="constrained"
        )
        for surroundings, axes in zip(SURROUNDINGS, all_axes, strict=True):
            for row, (color, line) in styles.items():
                row_cells = [
                    cell for cell in cells if cell.surroundings == surroundings and cell.row == row
                ]
                if not row_cells:
                    continue
                labs = [cell.num_labs for cell in row_cells]
                means = [100 * cell.success().value for cell in row_cells]
                axes.plot(labs, means, line, color=color, label=ROW_TITLES[row])
                for cell in row_cells:
                    rates = [100 * r.mean_success().value for r in cell.results_by_seed.values()]
                    axes.plot([cell.num_labs] * len(rates), rates, "o", color=color, alpha=0.5)
            ticks = sorted({cell.num_labs for cell in cells})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
            axes.set_title(titles[surroundings])
            axes.set_xlabel("laboratories that demonstrations show")
        all_axes[0].set_ylabel("success, %")
        all_axes[0].set_ylim(bottom=0)
        all_axes[1].legend(loc="upper left")
        save_figure(figure, path)


def report(scores: Path = SCORES, figure: bool = False) -> None:
    """Print the table of the kept scores.

    Args:
        scores: Parquet file of `python -m experiments.ablations.scores`.
        figure: Also draw the figure of the page.
    """
    cells = load_cells(scores)
    print(format_table(cells))
    if figure:
        draw_figure(cells)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(report)))
