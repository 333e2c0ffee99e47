"""Intervals for a recipe that was trained with several seeds and scored on the same scenes each time.

Two things are drawn by chance, trainings and scenes, and every training meets every scene. The variance of
the mean is that over seeds plus that over scenes minus what both contain (a two-way analysis of variance, as
Cameron, Gelbach and Miller (2011) cluster by two things at once), with Student's t at Satterthwaite's degrees
of freedom: with three seeds that disagree the interval is wide, as it must be. It is never narrower than if
all episodes were independent (our
choice: a variance from three seeds can be small by chance). With one seed it speaks of that one training
only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spear.evaluate.stats import Estimate, paired_mean_difference, wilson_mean
from spear.types import Array


def mean_success(strata: Sequence[Array]) -> Estimate:
    """The mean over strata (task families, each counting the same) of success [seeds, scenes] bool, 95 %."""
    tables = _checked(strata)
    independent = wilson_mean([(int(table.sum()), table.size) for table in tables])
    return _wider(_crossed(tables), independent, 0.0)


def difference(first: Sequence[Array], second: Sequence[Array]) -> Estimate:
    """Mean success of `first` minus that of `second`, on the same scenes; arguments as in `mean_success`.

    Seeds are paired by their order, scenes by theirs.
    """
    a, b = _checked(first), _checked(second)
    if [x.shape for x in a] != [y.shape for y in b]:
        raise ValueError(f"difference: {[x.shape for x in a]} against {[y.shape for y in b]}")
    crossed = _crossed([x.astype(float) - y for x, y in zip(a, b, strict=True)])
    independent = paired_mean_difference(
        [(x.ravel().tolist(), y.ravel().tolist()) for x, y in zip(a, b, strict=True)]
    )
    return _wider(crossed, independent, -1.0)


def _checked(strata: Sequence[Array]) -> list[Array]:
    tables = [np.asarray(table, bool) for table in strata]
    if not tables or any(t.ndim != 2 or not t.size or len(t) != len(tables[0]) for t in tables):
        raise ValueError(f"seeds and scenes: {[t.shape for t in tables]}")
    return tables


def _crossed(tables: Sequence[Array]) -> tuple[float, float]:
    """The mean of the strata's means and half its interval; the tables are [seeds, scenes]."""
    from scipy.special import stdtrit

    seeds, parts = len(tables[0]), len(tables)
    mean = float(np.mean([table.mean() for table in tables]))
    over_seeds = over_scenes = both = 0.0
    scenes = 0
    if seeds > 1:
        over_seeds = float(np.mean([table.mean(1) for table in tables], axis=0).var(ddof=1)) / seeds
    for table in tables:
        count = table.shape[1]
        if count < 2:
            continue
        scenes += count - 1
        over_scenes += float(table.mean(0).var(ddof=1)) / count / parts**2
        if seeds > 1:
            rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
            both += float((rest**2).sum()) / ((seeds - 1) * (count - 1)) / table.size / parts**2
    variance = max(over_seeds + over_scenes - both, over_seeds, over_scenes)
    if variance == 0:
        return mean, 0.0
    spread = over_seeds**2 / max(seeds - 1, 1) + over_scenes**2 / max(scenes, 1)
    return mean, float(stdtrit(max(1.0, variance**2 / spread), 0.975) * np.sqrt(variance))


def _wider(crossed: tuple[float, float], independent: Estimate, least: float) -> Estimate:
    value, half = crossed
    low, high = min(value - half, independent.low), max(value + half, independent.high)
    return Estimate(value, max(least, low), min(1.0, high), independent.n)
