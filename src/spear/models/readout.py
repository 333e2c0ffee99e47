"""From the probabilities of 3D tokens to numbers: mode, mean, median, quantiles and spread.

Within a bin its probability is taken to be spread evenly. Its expected value is the bin's representative,
which in the wide bins of the tails is a better guess than the middle (our choice).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from spear.errors import check_known
from spear.tokens import CoordinateTokenizer
from spear.types import Array, Pixel

Decode = Literal["mode", "mean", "median"]
"""How a number is read off the probabilities of its bins."""
DECODE_METHODS: tuple[Decode, ...] = get_args(Decode)

Segment = str | float | Pixel
ONE_SIGMA_PROBABILITY = 0.6826894921370859
"""The probability within one standard deviation of a normal's mean."""


@dataclass(frozen=True)
class Distribution:
    """The probabilities that a model gave to each number of an answer.

    probabilities  [numbers, bins] float32, each row sums to 1; given the likeliest bins of earlier numbers.
    coordinates    what the bins mean, and in which unit.
    """

    probabilities: Array
    coordinates: CoordinateTokenizer

    def __len__(self) -> int:
        return len(self.probabilities)

    def read(self, decode: Decode) -> Array:
        """[numbers] float64. Raises SpearError for an unknown way to read."""
        check_known("decode", DECODE_METHODS, decode)
        if decode == "mode":
            return np.asarray(self.coordinates.decode(self.probabilities.argmax(-1)))
        if decode == "mean":
            return np.asarray(self.probabilities.astype(np.float64) @ self.coordinates.bin_centers)
        return self.quantile(0.5)

    def quantile(self, share: float) -> Array:
        """[numbers] the values below which `share` of the probability lies, 0 to 1."""
        if not 0 <= share <= 1:
            raise ValueError(f"quantile: {share} is no share: give 0 to 1")
        cumulative = self._cumulative()
        wanted = share * cumulative[:, -1]
        at = np.minimum((cumulative[:, 1:] < wanted[:, None]).sum(1), self.coordinates.num_bins - 1)
        rows = np.arange(len(self))
        inside = cumulative[rows, at + 1] - cumulative[rows, at]
        part = np.divide(
            wanted - cumulative[rows, at], inside, out=np.zeros(len(self)), where=inside > 0
        )
        low, high = self.coordinates.bin_edges[at], self.coordinates.bin_edges[at + 1]
        return np.asarray(low + np.clip(part, 0, 1) * (high - low))

    def probability_below(self, values: Array) -> Array:
        """[numbers] the probability of less than `values` [numbers]; 0 or 1 outside the bins.

        For a calibrated model it is uniform between 0 and 1 at the true values.
        """
        edges, cumulative = self.coordinates.bin_edges, self._cumulative()
        found = [
            np.interp(value, edges, row) for value, row in zip(values, cumulative, strict=True)
        ]
        return np.array(found) / cumulative[:, -1]

    def spread(self) -> Array:
        """[numbers] half the width of the central 68 %: the standard deviation, were it a normal."""
        low, high = (
            self.quantile((1 - ONE_SIGMA_PROBABILITY) / 2),
            self.quantile((1 + ONE_SIGMA_PROBABILITY) / 2),
        )
        return np.asarray((high - low) / 2)

    def _cumulative(self) -> Array:
        """[numbers, bins + 1] the probability below each edge."""
        total = np.cumsum(self.probabilities, axis=1, dtype=np.float64)
        return np.concatenate([np.zeros((len(self), 1)), total], axis=1)


def replace_numbers(segments: Sequence[Segment], values: Array | Sequence[float]) -> list[Segment]:
    """An answer with its numbers replaced, in order."""
    numbers: Iterator[float] = iter(np.asarray(values, np.float64).tolist())
    return [next(numbers) if isinstance(s, float) else s for s in segments]
