"""What 3D brings at equal policy steps, from the kept episodes of all pairs of trainings.

    python -m experiments.ablations.pairs

A pair is one training with and one without 3D, with the same training seed and the same number of
demonstrations. Every training was scored on the same held-out scenes. The interval over all pairs
treats each pair as one seed, as `spear.evaluate.stats.estimate_difference_over_seeds` does.
"""

import numpy as np

from experiments.ablations.published import SuccessTables, load_rows, read_published_tables
from spear.evaluate.stats import estimate_difference_over_seeds

NUM_PLANNED_SEEDS = 3  # of the trainings with 500 demonstrations; two more were added later
OTHER_DEMONSTRATIONS = ("250", "1,000", "2,000")  # demonstrations per task family

Pairs = tuple[SuccessTables, SuccessTables]
"""Success of the trainings with and without 3D, in the same order of seeds."""


def load_pairs() -> dict[str, Pairs]:
    """Number of demonstrations per task family → its pairs of trainings."""
    _, long_trainings, other_demonstrations, *_ = map(load_rows, read_published_tables())
    pairs = {"500": (long_trainings["full method"], long_trainings["no-3d"])}
    for number in OTHER_DEMONSTRATIONS:
        with_3d = other_demonstrations[f"{number}, full method"]
        without_3d = other_demonstrations[f"{number}, no-3d"]
        pairs[number] = (with_3d, without_3d)
    return pairs


def take_seeds(pairs: Pairs, num_seeds: int) -> Pairs:
    """Take the first seeds of each side."""
    with_3d, without_3d = pairs
    first_with = [table[:num_seeds] for table in with_3d]
    first_without = [table[:num_seeds] for table in without_3d]
    return first_with, first_without


def pool_seeds(tables: list[SuccessTables]) -> SuccessTables:
    """Join the seeds of several recipes, per task family."""
    return [np.concatenate(family) for family in zip(*tables, strict=True)]


def pool_pairs(pairs: dict[str, Pairs]) -> Pairs:
    """Join the pairs of all numbers of demonstrations."""
    with_3d = pool_seeds([pair[0] for pair in pairs.values()])
    without_3d = pool_seeds([pair[1] for pair in pairs.values()])
    return with_3d, without_3d


def print_gain(title: str, pairs: Pairs) -> None:
    """Print the gain by 3D with its interval and number of pairs."""
    gain = estimate_difference_over_seeds(*pairs)
    num_pairs = len(pairs[0][0])
    print(f"{title:<44} {num_pairs:>5}  {gain.to_text('+.1f', 100)}")


def main() -> None:
    """Print the gain for each number of demonstrations, and over all pairs."""
    pairs = load_pairs()
    print(f"{'demonstrations per task family':<44} pairs  gain by 3D, points [95 %]")
    print_gain("500, the three planned seeds", take_seeds(pairs["500"], NUM_PLANNED_SEEDS))
    for number, pairs_of_number in pairs.items():
        print_gain(number, pairs_of_number)
    print_gain("all (pooling was not planned)", pool_pairs(pairs))


if __name__ == "__main__":
    main()
