"""How good a label of an object is, in numbers, and the one rule that says which objects are asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from spear.labels.fit.box3d import vertex_error
from spear.types import Array, Box3D


@dataclass(frozen=True)
class QualityBar:
    """The least good object that 3D questions are asked about (all our choice, from
    benchmarks/labels/accuracy.py).

    visible    at least this fraction of its outline is its own. Below 0.7 the median error of the centre is
               three times that of the others.
    edge       at most this fraction of its outline is cut by the image's edge: how far it goes on is not
               known.
    points     at least this many points.
    stability  at least this stable under resampling.
    """

    visible: float = 0.7
    edge: float = 0.05
    points: float = 30
    stability: float = 0.6


BAR = QualityBar()
"""Objects under it stay in the labels, with their scores, but are not asked about."""


def failings(scores: Mapping[str, float], bar: QualityBar = BAR) -> tuple[str, ...]:
    """The scores of an object that are under the bar, by name; a score that it does not have is not."""
    least = {"visible": bar.visible, "points": bar.points, "stability": bar.stability}
    low = tuple(name for name, limit in least.items() if scores.get(name, limit) < limit)
    return (*low, "edge") if scores.get("edge", 0.0) > bar.edge else low


def planarity(points: Array) -> float:
    """How flat the seen points [n >= 3, 3] are: (σ2 - σ3) / σ1 of their standard deviations along their
    principal axes, largest first. 1 for a square sheet, 0 for a line and for a ball."""
    third, second, first = np.sqrt(np.maximum(np.linalg.eigvalsh(np.cov(points.T)), 0))
    return float((second - third) / first) if first > 0 else 0.0


def stability(points: Array, box: Box3D, fit: Callable[[Array], Box3D], seed: int = 0) -> float:
    """How little the `box` of points [n >= 8, 3] changes when it is fitted to one half of them, or the other.

    1 minus the vertices' mean distance (up to the box's symmetries) from those of `box`, as a fraction of
    half its diagonal; not below 0. The halves are drawn at random, from a fixed seed.
    """
    order = np.random.default_rng(seed).permutation(len(points))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    moved = np.mean([vertex_error(fit(points[half]).vertices, box.vertices) for half in halves])
    return max(0.0, 1.0 - float(moved) / (0.5 * float(np.linalg.norm(box.size))))
