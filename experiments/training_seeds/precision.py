"""How wide the interval of a gain is with how many training seeds and scenes.

    python -m experiments.training_seeds.precision
    python -m experiments.training_seeds.precision --sd 5    # with the spread of your own pilot

The kept episodes of the ablations say how much the gain of one recipe over another varies between
pairs of trainings and between scenes. The table puts these variances into the formula of the
interval of `spear.evaluate.stats.estimate_difference_over_seeds`, for other numbers of both.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import tyro

from experiments.ablations.published import load_rows, read_published_tables
from spear.cli import run_reporting_errors
from spear.errors import SpearError
from spear.evaluate.stats import (
    CrossedVariances,
    compute_crossed_half_width,
    compute_variances_of_crossed_mean,
)
from spear.types import Array

MIN_SEEDS = 3  # the variance between two pairs of trainings says too little
NUMBERS_OF_SEEDS = (2, 3, 4, 5, 8, 10, 20)
NUMBERS_OF_SCENES = (50, 100, 200, 400, 1600)


@dataclass(frozen=True)
class Spread:
    """How a gain varies (1 is 100 points), in one task family.

    between_seeds   variance of the gain between pairs of trainings, over infinitely many scenes.
    between_scenes  variance of the gain between scenes, over infinitely many pairs.
    in_episodes     variance that neither the pair of trainings nor the scene explains.
    """

    between_seeds: float
    between_scenes: float
    in_episodes: float


def _compute_variance_between_seeds(variances: CrossedVariances) -> float:
    """Variance of the mean gain between pairs of trainings, over infinitely many scenes.

    As an estimate, it may be negative.
    """
    return variances.num_seeds * (variances.over_seeds - variances.in_both)


def compute_sd_between_seeds(gains: Sequence[Array]) -> float:
    """Standard deviation of the mean gain between pairs of trainings, over infinitely many scenes.

    Args:
        gains: [seeds, scenes] of each task family.
    """
    variance = _compute_variance_between_seeds(compute_variances_of_crossed_mean(gains))
    return math.sqrt(max(0.0, variance))


def subtract_success(first: Sequence[Array], second: Sequence[Array]) -> list[Array]:
    """The gain [seeds, scenes] of the first over the second, over the seeds that both have."""
    num_seeds = min(len(first[0]), len(second[0]))
    gains = []
    for first_table, second_table in zip(first, second, strict=True):
        gains.append(first_table[:num_seeds].astype(float) - second_table[:num_seeds])
    return gains


def load_gains() -> list[Array]:
    """The gain [seeds, scenes] of each row over the first of its table, in each task family.

    Rows with fewer than `MIN_SEEDS` seeds do not count.
    """
    gains = []
    for table in read_published_tables():
        baseline, *rows = load_rows(table).values()
        for row in rows:
            if min(len(row[0]), len(baseline[0])) >= MIN_SEEDS:
                gains += subtract_success(row, baseline)
    return gains


def measure_spread(gain: Array) -> Spread:
    """How the gain [seeds, scenes] in one task family varies."""
    num_seeds, num_scenes = gain.shape
    variances = compute_variances_of_crossed_mean([gain])
    in_episodes = variances.in_both * num_seeds * num_scenes
    return Spread(
        between_seeds=_compute_variance_between_seeds(variances),
        between_scenes=num_scenes * (variances.over_scenes - variances.in_both),
        in_episodes=in_episodes,
    )


def average_spreads(spreads: Sequence[Spread]) -> Spread:
    """The mean of each variance. An estimated variance may be negative; the true one is not."""
    return Spread(
        between_seeds=max(0.0, float(np.mean([spread.between_seeds for spread in spreads]))),
        between_scenes=max(0.0, float(np.mean([spread.between_scenes for spread in spreads]))),
        in_episodes=float(np.mean([spread.in_episodes for spread in spreads])),
    )


def predict_half_width(spread: Spread, num_seeds: int, num_scenes: int) -> float:
    """Half the width of the interval of a gain with this spread."""
    over_seeds = (spread.between_seeds + spread.in_episodes / num_scenes) / num_seeds
    over_scenes = (spread.between_scenes + spread.in_episodes / num_seeds) / num_scenes
    in_both = spread.in_episodes / (num_seeds * num_scenes)
    variances = CrossedVariances(over_seeds, over_scenes, in_both, num_seeds, [num_scenes])
    return compute_crossed_half_width(variances)


def print_table(spread: Spread) -> None:
    """Print the half-width for each number of seeds and scenes."""
    headers = [f"{number:,} scenes" for number in NUMBERS_OF_SCENES]
    print("seeds per recipe" + "".join(f"{header:>14}" for header in headers))
    for num_seeds in NUMBERS_OF_SEEDS:
        cells = []
        for num_scenes in NUMBERS_OF_SCENES:
            half_width = predict_half_width(spread, num_seeds, num_scenes)
            text = f"±{100 * min(1.0, half_width):.0f}"  # no gain exceeds 100 points
            cells.append(f"{text:>14}")
        print(f"{num_seeds:>16}{''.join(cells)}")


def main(sd: Annotated[float | None, tyro.conf.arg(metavar="POINTS")] = None) -> None:
    """Print the half-width of the interval of a gain, in points, in one task family.

    Args:
        sd: standard deviation of the gain between your pairs of trainings. Without it, that of the
            ablations.
    """
    gains = load_gains()
    spread = average_spreads([measure_spread(gain) for gain in gains])
    if sd is not None:
        if sd < 0:
            raise SpearError(f"--sd {sd:g} is negative. Give points, such as 5.")
        spread = Spread((sd / 100) ** 2, spread.between_scenes, spread.in_episodes)

    print(
        f"standard deviation of the gain between pairs of trainings: "
        f"{100 * math.sqrt(spread.between_seeds):.1f} points"
    )
    if sd is None:
        deviations = [100 * compute_sd_between_seeds([gain]) for gain in gains]
        quarter, three_quarters = np.percentile(deviations, [25, 75])
        print(
            f"from the mean variance of {len(gains)} gains in the ablations, whose own deviations "
            f"have the quartiles {quarter:.1f} and {three_quarters:.1f} points"
        )
    print_table(spread)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
