"""Success over several training seeds on the same scenes, and the difference of two recipes.

    python -m experiments.training_seeds --first runs/a1 runs/a2 --second runs/b1 runs/b2
    python -m experiments.training_seeds --first 5066 495a 43d3 --second b2b8 9d8d 789b

Each folder is what `spear evaluate`, `spear evaluate simpler` or `spear evaluate libero` wrote for
one seed. The first digits of a key in `experiments/ablations/tables.md` stand for the kept scores
of that training. Intervals are over seeds and scenes, as in the tables of the ablations
(`spear.evaluate.stats`).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tyro

from experiments.ablations.scores import find_key, load_scores
from experiments.ablations.table import stack_successes
from experiments.training_seeds.precision import compute_sd_between_seeds, subtract_success
from spear.cli import run_reporting_errors
from spear.errors import SpearError, format_count
from spear.evaluate.compare import compare_results
from spear.evaluate.results import Results, load_results
from spear.evaluate.stats import estimate_difference_over_seeds, estimate_mean_over_seeds
from spear.types import Array

KEY_DIGITS = re.compile("[0-9a-f]{4,}")
"""The first digits of the key of a training in the ablations."""


def load_one_seed(folder: Path) -> Results:
    """Load the results in a folder, or those that the repository keeps under a key."""
    if not folder.exists() and KEY_DIGITS.fullmatch(str(folder)):
        return load_scores()[find_key(str(folder))]
    return load_results(folder)


def check_same_scenes(results: Sequence[Results]) -> None:
    """Raise `SpearError` unless all results have the same scenes."""
    scenes = [{outcome.scene for outcome in one_seed.outcomes} for one_seed in results]
    if any(seed_scenes != scenes[0] for seed_scenes in scenes):
        raise SpearError("the folders hold different scenes: evaluate all on the same")


def describe_different_settings(results: Sequence[Results]) -> list[str]:
    """How some results were run differently from the first, in words."""
    differences: set[str] = set()
    for one_seed in results:
        differences.update(compare_results(results[0], one_seed).settings)
    return sorted(differences)


def print_recipe(folders: Sequence[Path], families: Sequence[str], tables: Sequence[Array]) -> None:
    """Print the success of one recipe: per family and seed, and the mean with its interval."""
    print(", ".join(str(folder) for folder in folders))
    for family, success in zip(families, tables, strict=True):
        by_seed = ", ".join(f"{100 * rate:.1f}" for rate in success.mean(axis=1))
        num_scenes = success.shape[1]
        mean = f"{100 * success.mean():5.1f} %"
        print(f"  {family:<46} {mean}  ({by_seed}; n = {num_scenes} each)")
    print(f"  {'mean':<46} {estimate_mean_over_seeds(tables).to_text('.1f', 100, ' %')}")


def print_pairs(gains: Sequence[Array]) -> None:
    """Print the mean gain of each pair of trainings, and how much it varies between pairs."""
    gain_by_pair = np.mean([gain.mean(axis=1) for gain in gains], axis=0)
    if len(gain_by_pair) > 1:
        by_pair = ", ".join(f"{100 * gain:+.1f}" for gain in gain_by_pair)
        deviation = 100 * compute_sd_between_seeds(gains)
        print(
            f"of each pair: {by_pair}. Between pairs of trainings, the standard deviation is "
            f"{deviation:.1f} points."
        )


def main(first: tuple[Path, ...], second: tuple[Path, ...] = ()) -> None:
    """Print the tables.

    Args:
        first: Folders of one recipe's seeds, or keys of the ablations.
        second: Those of another recipe, in the same order of seeds.
    """
    folders = [*first, *second]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise SpearError("a folder is given twice: give one per seed")
    if second and len(first) != len(second):
        raise SpearError(
            f"{format_count(len(first), 'folders')} cannot be paired with {len(second)}. "
            "Give both recipes equally many seeds."
        )
    first_results = [load_one_seed(folder) for folder in first]
    second_results = [load_one_seed(folder) for folder in second]
    all_results = [*first_results, *second_results]
    check_same_scenes(all_results)
    for difference in describe_different_settings(all_results):
        print(f"run differently: {difference}")

    families = all_results[0].families
    first_tables = stack_successes(first_results, families)
    print_recipe(first, families, first_tables)
    if second:
        second_tables = stack_successes(second_results, families)
        print_recipe(second, families, second_tables)
        gain = estimate_difference_over_seeds(first_tables, second_tables)
        print(f"difference: {gain.to_text('+.1f', 100, ' points')}")
        print_pairs(subtract_success(first_tables, second_tables))
    if len(first) == 1:
        print(
            "one seed each: the intervals cover the scenes only. Trainings with other seeds may "
            "differ by more."
        )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
