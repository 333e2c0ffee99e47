"""Success of trainings with several seeds, evaluated on the same scenes: the mean, and the difference of two.

    python -m experiments.training_seeds --first runs/a1 runs/a2 runs/a3 --second runs/b1 runs/b2 runs/b3

Each folder is what `spear evaluate` wrote for one seed. Intervals are over seeds and scenes, as in the tables
of the ablations (`spear.evaluate.stats`).
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from experiments.ablations.table import stack_successes
from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.evaluate.compare import compare_results
from spear.evaluate.results import load_results
from spear.evaluate.stats import estimate_difference_over_seeds, estimate_mean_over_seeds


def main(first: tuple[Path, ...], second: tuple[Path, ...] = ()) -> None:
    """Print the tables.

    Args:
        first: folders of one training's seeds. second: those of another one, in the same order of seeds.
    """
    if len({folder.resolve() for folder in (*first, *second)}) < len(first) + len(second):
        raise SpearError("a folder is given twice: give one per seed")
    found = [[load_results(folder) for folder in folders] for folders in (first, second) if folders]
    families = found[0][0].families
    scenes = [
        {(o.family, o.seed) for o in results.outcomes} for seeds in found for results in seeds
    ]
    if any(seen != scenes[0] for seen in scenes):
        raise SpearError("the folders hold different scenes: evaluate all on the same")
    every = [results for seeds in found for results in seeds]
    for words in sorted(
        {words for one in every for words in compare_results(every[0], one).settings}
    ):
        print(f"run differently: {words}")
    tables = [stack_successes(seeds, families) for seeds in found]
    for folders, table in zip((first, second), tables, strict=False):
        print(", ".join(map(str, folders)))
        for family, success in zip(families, table, strict=True):
            each = ", ".join(f"{100 * rate:.1f}" for rate in success.mean(axis=1))
            print(
                f"  {family:<46} {100 * success.mean():5.1f} %  ({each}; n = {success.shape[1]} each)"
            )
        print(f"  {'mean':<46} {estimate_mean_over_seeds(table).to_text('.1f', 100, ' %')}")
    if second:
        print(
            f"difference: {estimate_difference_over_seeds(*tables).to_text('+.1f', 100, ' points')}"
        )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
