"""Success of trainings with several seeds, evaluated on the same scenes: the mean, and the difference of two.

    python benchmarks/evaluate/over_seeds.py --first runs/a1 runs/a2 runs/a3 --second runs/b1 runs/b2 runs/b3

Each folder is what `spear evaluate` wrote for one seed. Intervals are over seeds and scenes, as in the tables
of the ablations (`spear.evaluate.stats`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tyro

from spear.evaluate.results import load
from spear.evaluate.stats import difference_over_seeds, mean_over_seeds
from spear.types import Array


def table(folders: tuple[Path, ...]) -> dict[str, Array]:
    """Family -> success [seeds, scenes] on the scenes that all folders have, by seed."""
    found = [load(folder) for folder in folders]
    families = {}
    for family in found[0].families:
        rows = [{o.seed: o.success for o in results.outcomes if o.family == family} for results in found]
        shared = sorted(set.intersection(*map(set, rows)))
        families[family] = np.array([[row[seed] for seed in shared] for row in rows])
    return families


def main(first: tuple[Path, ...], second: tuple[Path, ...] = ()) -> None:
    """Print the tables.

    Args:
        first: folders of one training's seeds. second: those of another one, in the same order of seeds.
    """
    tables = [table(folders) for folders in (first, second) if folders]
    for folders, families in zip((first, second), tables, strict=False):
        print(", ".join(map(str, folders)))
        for family, success in families.items():
            each = ", ".join(f"{100 * rate:.1f}" for rate in success.mean(axis=1))
            print(f"  {family:<46} {100 * success.mean():5.1f} %  ({each}; n = {success.shape[1]} each)")
        print(f"  {'mean':<46} {mean_over_seeds(list(families.values())).say('.1f', 100, ' %')}")
    if second:
        pair = [list(families.values()) for families in tables]
        print(f"difference: {difference_over_seeds(*pair).say('+.1f', 100, ' points')}")


if __name__ == "__main__":
    tyro.cli(main)
