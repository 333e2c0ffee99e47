"""Quantiles of a stream in one pass, of bounded size, with a proven bound on the error in rank.

Values wait in a buffer. A full one is sorted and every second value kept, which then stands for two; those
that stand for two wait in the next buffer, and so on (Manku, Rajagopalan and Lindsay, 1998). Which of two is
kept alternates, so the result is the same in every run. Up to `CAPACITY` values nothing is lost.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from spear.types import Array

CAPACITY = 16384
"""Values in a buffer. The error in rank is at most (levels - 1) / CAPACITY: 0.07 % for 45 million values."""


class QuantileSketch:
    """A summary of numbers: their quantiles nearly, their count, extremes, mean and variance exactly.

    count, low, high, mean; `squares` is the sum of squared deviations from the mean.
    """

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.count = 0
        self.low, self.high = np.inf, -np.inf
        self.mean, self.squares = 0.0, 0.0
        self._levels: list[Array] = [np.zeros(0)]
        self._keep_odd = [False]
        self._lost = 0

    def add(self, values: Array) -> None:
        """Take in numbers [N], in any pieces."""
        values = np.asarray(values, np.float64).reshape(-1)
        for first in range(0, len(values), self.capacity):
            piece = values[first : first + self.capacity]
            mean = float(piece.mean())
            squares = float(((piece - mean) ** 2).sum())
            # Of two parts, the moments of the whole (Chan, Golub and LeVeque, 1979).
            total, apart = self.count + len(piece), mean - self.mean
            self.mean += apart * len(piece) / total
            self.squares += squares + apart**2 * self.count * len(piece) / total
            self.low, self.high = min(self.low, float(piece.min())), max(self.high, float(piece.max()))
            self.count = total
            self._levels[0] = np.concatenate([self._levels[0], piece])
            self._compact()

    @property
    def rank_error(self) -> float:
        """By how much the rank of any value can be wrong, as part of the count: a proven bound."""
        return self._lost / max(self.count, 1)

    def weighted(self) -> tuple[Array, Array]:
        """Values, and for how many each of them stands; together they stand for `count`."""
        weights = [np.full(len(values), 2.0**level) for level, values in enumerate(self._levels)]
        return np.concatenate(self._levels), np.concatenate(weights)

    def to_arrays(self) -> dict[str, Array]:
        """All of it, for `from_arrays`."""
        moments = [self.count, self.low, self.high, self.mean, self.squares, self.capacity, self._lost]
        levels = {f"level {i}": values for i, values in enumerate(self._levels)}
        return {"moments": np.array(moments, np.float64), "keep_odd": np.array(self._keep_odd), **levels}

    @staticmethod
    def from_arrays(arrays: Mapping[str, Array]) -> QuantileSketch:
        """The sketch that `to_arrays` took apart. Raises KeyError or ValueError when it is none."""
        count, low, high, mean, squares, capacity, lost = arrays["moments"].tolist()
        sketch = QuantileSketch(int(capacity))
        sketch.count, sketch.low, sketch.high = int(count), low, high
        sketch.mean, sketch.squares, sketch._lost = mean, squares, int(lost)
        sketch._keep_odd = arrays["keep_odd"].tolist()
        sketch._levels = [arrays[f"level {i}"] for i in range(len(sketch._keep_odd))]
        return sketch

    def _compact(self) -> None:
        level = 0
        while level < len(self._levels):
            values = self._levels[level]
            if len(values) > self.capacity:
                values = np.sort(values)
                even = len(values) // 2 * 2
                kept = values[int(self._keep_odd[level]) : even : 2]
                if level + 1 == len(self._levels):
                    self._levels.append(np.zeros(0))
                    self._keep_odd.append(False)
                self._levels[level] = values[even:]
                self._levels[level + 1] = np.concatenate([self._levels[level + 1], kept])
                self._keep_odd[level] = not self._keep_odd[level]
                # Of each pair one is dropped and the other counts twice: between them the rank is off by one.
                self._lost += 2**level
            level += 1


def weighted_quantile(values: Array, weights: Array, q: float) -> float:
    """The quantile of values [N] of which each stands for a share; linear between them.

    Equal weights give `numpy.quantile`.
    """
    order = np.argsort(values, kind="stable")
    share = weights[order]
    rank = np.cumsum(share) - share / 2  # the middle of each value's share
    rank = (rank - rank[0]) / max(rank[-1] - rank[0], np.finfo(float).tiny)
    return float(np.interp(q, rank, values[order]))
