"""Calibration: predicted spreads and intervals against what is true.

Of every number, the distribution over its bins says which interval holds 50, 80, 95 % of the probability. A
calibrated model's truths fall into them as often, an overconfident model's less often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from spear.evaluate.stats import Estimate, bootstrap
from spear.models.readout import ONE_SIGMA, Distribution
from spear.types import Array

CENTRAL = (0.5, 0.8, 0.95)
"""The central intervals that tables report."""
LEVELS = tuple(round(0.05 * i, 2) for i in range(21))
"""Those of the curve."""
MOST_GROUPS, PER_GROUP = 10, 40


@dataclass(frozen=True)
class Certainty:
    """How sure an answer's numbers were, and whether rightly: [numbers] each, for a true answer `truth`.

    below    probability that was given to less than the truth.
    spread   half the width of the central 68 %, relative to the thing's distance.
    off      distance of the truth from the middle of the distribution (its median), relative likewise.
    """

    below: Array
    spread: Array
    off: Array

    @staticmethod
    def of(said: Distribution, truth: Array, scales: Array) -> Certainty:
        """From what was held possible for an answer's numbers; scales: the distances they relate to."""
        off = np.abs(said.read("median") - truth) / scales
        return Certainty(said.below(truth), said.spread() / scales, off)


@dataclass(frozen=True)
class Band:
    """Numbers of similar predicted spread: the median of it, and the error that 68 % of them stay below.

    Both in percent of the distance. They are equal where the model is calibrated.
    """

    spread: float
    error: float
    n: int


@dataclass(frozen=True)
class Calibration:
    """The calibration of one family's numbers.

    coverage  central interval ("50%") → fraction of the truths that lie in it; intervals resample images.
    curve     the same, without intervals, for every level of `LEVELS`.
    bands     in order of the spread.
    surer, less_sure  median error, in percent of the distance, of the half of the answers whose mean spread
                      is smaller, and of the other half.
    """

    n: int
    coverage: Mapping[str, Estimate]
    curve: Sequence[float]
    bands: Sequence[Band]
    surer: float
    less_sure: float

    @property
    def miss(self) -> float:
        """How far the curve is from the diagonal, on average (the expected calibration error)."""
        return float(np.mean(np.abs(np.subtract(self.curve, LEVELS))))


def calibrate(answers: Sequence[tuple[int, Certainty, float]]) -> Calibration:
    """From (image, certainty, relative error in percent) of each of a family's answers."""
    certain = [c for _, c, _ in answers]
    below = np.concatenate([c.below for c in certain])
    spread, off = (100 * np.concatenate([getattr(c, name) for c in certain]) for name in ("spread", "off"))
    order = np.argsort(spread, kind="stable")
    groups = int(np.clip(len(order) // PER_GROUP, 1, MOST_GROUPS))
    bands = [
        Band(float(np.median(spread[rows])), float(np.quantile(off[rows], ONE_SIGMA)), len(rows))
        for rows in np.array_split(order, groups)
    ]
    sure = np.argsort([float(c.spread.mean()) for c in certain], kind="stable")
    errors = np.array([error for _, _, error in answers])[sure]
    half = (len(errors) + 1) // 2

    def inside(level: float) -> list[Array]:
        return by_image([(image, _inside(c.below, level)) for image, c, _ in answers])

    return Calibration(
        n=len(below),
        coverage={f"{level:.0%}": bootstrap(inside(level), np.mean) for level in CENTRAL},
        curve=[float(_inside(below, level).mean()) for level in LEVELS],
        bands=bands,
        surer=float(np.median(errors[:half])),
        less_sure=float(np.median(errors[-half:])),
    )


def _inside(below: Array, level: float) -> Array:
    """Whether each truth lies in the central interval that holds `level` of the probability."""
    return np.abs(below - 0.5) <= level / 2 + 1e-12


def by_image(values: Sequence[tuple[int, Array | float]]) -> list[Array]:
    """(image, values) of answers → the values of each image's answers together, for `stats.bootstrap`."""
    groups: dict[int, list[Array]] = {}
    for image, value in values:
        groups.setdefault(image, []).append(np.atleast_1d(np.asarray(value)))
    return [np.concatenate(g) for g in groups.values()]
