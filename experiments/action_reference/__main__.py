"""Policies whose actions are measured from the previous or the observed pose, compared.

    python -m experiments.action_reference                                # prints the table
    python -m experiments.action_reference --add-seams runs/action_reference

The second command copies the seams that run.sh has measured into results/seams.parquet. Success is
in results/scores.parquet (`python -m experiments.ablations.scores`). Both files have a key for each
evaluation, "observed-0/async-1-200ms": the action reference, the seed of the training, the
execution mode with its replan interval, and the latency.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from scipy import stats

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

RESULTS = Path(__file__).with_name("results")
SCORES_FILE = "scores.parquet"
SEAMS_FILE = "seams.parquet"
KEY = re.compile(r"(?P<reference>\w+)-(?P<seed>\d+)/(?P<mode>\w+)-(?P<replan>\d+)-(?P<ms>\d+)ms")


@dataclass
class Cell:
    """The policies of one action reference in one execution mode, at one latency.

    results_by_seed   training seed → the results of its policy.
    seams_mm_by_seed  training seed → the changes of velocity where its chunks meet, mm per step.
    """

    results_by_seed: dict[int, Results]
    seams_mm_by_seed: dict[int, Array]

    def stack_seeds(self) -> list[Array]:
        """Success [seeds, scenes] of each task family."""
        results = [self.results_by_seed[seed] for seed in sorted(self.results_by_seed)]
        return stack_successes(results, results[0].families)

    def estimate_success(self) -> Estimate:
        """Mean success over training seeds and scenes."""
        return estimate_mean_over_seeds(self.stack_seeds())

    def list_success_rates(self) -> list[float]:
        """The success rate of each training."""
        seeds = sorted(self.results_by_seed)
        return [self.results_by_seed[seed].mean_success().value for seed in seeds]

    def list_median_seams(self) -> Array:
        """The median change of velocity at the seams of each training [seeds], mm per step."""
        seeds = sorted(self.seams_mm_by_seed)
        return np.array([np.median(self.seams_mm_by_seed[seed]) for seed in seeds])


Condition = tuple[str, int, int]
"""Execution mode, replan interval and latency in milliseconds."""


def load_cells(folder: Path = RESULTS) -> dict[Condition, dict[str, Cell]]:
    """The cells of all conditions: condition → action reference → cell."""
    seams = pq.read_table(folder / SEAMS_FILE).to_pylist()
    seams_mm_by_key = {row["key"]: np.array(row["seams_mm"]) for row in seams}
    cells: dict[Condition, dict[str, Cell]] = {}
    for key, results in load_scores(folder / SCORES_FILE).items():
        match = KEY.fullmatch(key)
        assert match, key
        condition = (match["mode"], int(match["replan"]), int(match["ms"]))
        by_reference = cells.setdefault(condition, {})
        cell = by_reference.setdefault(match["reference"], Cell({}, {}))
        cell.results_by_seed[int(match["seed"])] = results
        cell.seams_mm_by_seed[int(match["seed"])] = seams_mm_by_key[key]
    return cells


def estimate_seam_difference(observed: Cell, previous: Cell) -> Estimate:
    """How much larger the seams of `observed` are, mm per step, over pairs of trainings.

    The interval is Student's t interval of the differences between the medians of two trainings
    with the same seed.
    """
    differences = observed.list_median_seams() - previous.list_median_seams()
    num_seeds = len(differences)
    mean = float(differences.mean())
    if num_seeds == 1:
        return Estimate(mean, np.nan, np.nan, num_seeds)
    half_width = stats.t.ppf(0.975, num_seeds - 1) * differences.std(ddof=1) / np.sqrt(num_seeds)
    return Estimate(mean, mean - half_width, mean + half_width, num_seeds)


def join_numbers(numbers: Iterable[float], format_spec: str, scale: float = 1.0) -> str:
    """Several numbers as text: "4.0, 5.0"."""
    return ", ".join(format(scale * number, format_spec) for number in numbers)


def format_tables(cells: dict[Condition, dict[str, Cell]]) -> str:
    """Success in percent, and changes of velocity at seams, as two Markdown tables."""
    success_lines = [
        "| execution | latency | previous, % [95 %] | observed, % [95 %] |"
        " observed more by, points [95 %] | each seed, previous; observed |",
        "|---|---|---|---|---|---|",
    ]
    seam_lines = [
        "| execution | latency | previous, mm | observed, mm | observed more by, mm [95 %] |",
        "|---|---|---|---|---|",
    ]
    for condition in sorted(cells, key=lambda c: (c[0] != "sync", c)):
        mode, replan, latency_ms = condition
        previous = cells[condition]["previous"]
        observed = cells[condition]["observed"]
        start = f"| {mode}/{replan} | {latency_ms} ms |"
        difference = estimate_difference_over_seeds(observed.stack_seeds(), previous.stack_seeds())
        previous_rates = join_numbers(previous.list_success_rates(), ".0f", scale=100)
        observed_rates = join_numbers(observed.list_success_rates(), ".0f", scale=100)
        success_lines.append(
            f"{start} {previous.estimate_success().to_text('.1f', 100)} |"
            f" {observed.estimate_success().to_text('.1f', 100)} |"
            f" {difference.to_text('+.1f', 100)} | {previous_rates}; {observed_rates} |"
        )
        previous_medians = join_numbers(previous.list_median_seams(), ".1f")
        observed_medians = join_numbers(observed.list_median_seams(), ".1f")
        seam_difference = estimate_seam_difference(observed, previous)
        seam_lines.append(
            f"{start} {previous_medians} | {observed_medians} | {seam_difference.to_text('+.1f')} |"
        )
    return "\n".join([*success_lines, "", *seam_lines])


def collect_seams(runs: Path, folder: Path = RESULTS) -> None:
    """Copy the seams of all evaluations of a run into one Parquet file."""
    rows = []
    for file in sorted((runs / "scores").rglob("seams.txt")):
        key = file.parent.relative_to(runs / "scores").as_posix()
        rows.append({"key": key, "seams_mm": [float(line) for line in file.read_text().split()]})
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([("key", pa.string()), ("seams_mm", pa.list_(pa.float32()))])
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, folder / SEAMS_FILE, compression="zstd", compression_level=19)
    print(f"{folder / SEAMS_FILE}: seams of {len(rows)} evaluations")


def report(add_seams: Path | None = None, folder: Path = RESULTS) -> None:
    """Print the tables of the kept results.

    Args:
        add_seams: Folder of run.sh, whose seams are copied into the results instead.
        folder: Folder with scores.parquet and seams.parquet.
    """
    if add_seams is not None:
        collect_seams(add_seams, folder)
    else:
        print(format_tables(load_cells(folder)))


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(report)))
