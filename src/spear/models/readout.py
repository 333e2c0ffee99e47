"""From the probabilities of 3D tokens to numbers: mode, mean, median, quantiles and spread.

Each 3D token stands for a bin, an interval of coordinates. For quantiles, the probability of a bin
is taken to be spread evenly over the bin. For the mean, a bin counts with its center, the median of
the values that it was fitted to. In the wide bins of the tails this is a better guess than the
middle of the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from spear.errors import check_known
from spear.tokens import CoordinateTokenizer
from spear.types import Array, Pixel

DecodeMethod = Literal["mode", "mean", "median"]
"""How a number is read off the probabilities of its bins."""
DECODE_METHODS: tuple[DecodeMethod, ...] = get_args(DecodeMethod)

Segment = str | float | Pixel
"""A part of an answer: text, a number (a 3D token), or a pixel."""

ONE_SIGMA_PROBABILITY = 0.6826894921370859
"""The probability that a normal variable is within one standard deviation of its mean."""


@dataclass(frozen=True)
class Distribution:
    """The probabilities of the bins, for each number of a model's answer.

    probabilities  [numbers, bins] float32, each row sums to 1. The probabilities of a number are
                   conditional on the likeliest bins of the numbers before it.
    coordinates    The tokenizer, which has the edges and centers of the bins and their unit.
    """

    probabilities: Array
    coordinates: CoordinateTokenizer

    def __len__(self) -> int:
        return len(self.probabilities)

    def read_numbers(self, method: DecodeMethod) -> Array:
        """Read each number off its probabilities: [numbers] float64.

        Raises:
            SpearError: `method` is none of `DECODE_METHODS`.
        """
        check_known("decode", DECODE_METHODS, method)
        if method == "mode":
            return np.asarray(self.coordinates.decode(self.probabilities.argmax(-1)))
        if method == "mean":
            return np.asarray(self.probabilities.astype(np.float64) @ self.coordinates.bin_centers)
        return self.quantile(0.5)

    def quantile(self, probability: float) -> Array:
        """The values that each number is below with the given probability (0 to 1): [numbers]."""
        if not 0 <= probability <= 1:
            raise ValueError(
                f"quantile {probability} is no probability. Give a number from 0 to 1."
            )
        cumulative = self._cumulative()  # [numbers, bins + 1]
        # The last cumulative probability is 1 up to rounding.
        target = probability * cumulative[:, -1]

        # The bin in which the cumulative probability reaches the target. Its index is the number of
        # bins at whose upper edge the cumulative probability is still below the target.
        is_below_target = cumulative[:, 1:] < target[:, None]
        bin_index = np.minimum(is_below_target.sum(1), self.coordinates.num_bins - 1)  # [numbers]
        rows = np.arange(len(self))
        before_bin = cumulative[rows, bin_index]
        bin_probability = cumulative[rows, bin_index + 1] - before_bin

        # The place within that bin, from 0 (its lower edge) to 1.
        fraction = np.divide(
            target - before_bin, bin_probability, out=np.zeros(len(self)), where=bin_probability > 0
        )
        low = self.coordinates.bin_edges[bin_index]
        high = self.coordinates.bin_edges[bin_index + 1]
        return np.asarray(low + np.clip(fraction, 0, 1) * (high - low))

    def probability_below(self, values: Array) -> Array:
        """The probability that each number is less than its value in `values` [numbers]: [numbers].

        A value outside all bins has the probability 0 or 1. If `values` are the true values and the
        model is calibrated, these probabilities are distributed uniformly between 0 and 1.
        """
        edges = self.coordinates.bin_edges
        cumulative = self._cumulative()
        probabilities = [
            np.interp(value, edges, row) for value, row in zip(values, cumulative, strict=True)
        ]
        return np.array(probabilities) / cumulative[:, -1]

    def spread(self) -> Array:
        """Half the width of the central interval with a probability of 68 %: [numbers].

        For a normal distribution, this is the standard deviation.
        """
        low = self.quantile((1 - ONE_SIGMA_PROBABILITY) / 2)
        high = self.quantile((1 + ONE_SIGMA_PROBABILITY) / 2)
        return np.asarray((high - low) / 2)

    def _cumulative(self) -> Array:
        """The probability below each edge: [numbers, bins + 1]."""
        total = np.cumsum(self.probabilities, axis=1, dtype=np.float64)
        return np.concatenate([np.zeros((len(self), 1)), total], axis=1)


def replace_numbers(segments: Sequence[Segment], values: Array | Sequence[float]) -> list[Segment]:
    """The segments of an answer, with its numbers replaced by `values`, in order.

    Example:
        >>> replace_numbers(["at ", 0.1, " and ", 0.2], [3.0, 4.0])
        ['at ', 3.0, ' and ', 4.0]
    """
    numbers = iter(np.asarray(values, np.float64).tolist())
    replaced: list[Segment] = []
    for segment in segments:
        replaced.append(next(numbers) if isinstance(segment, float) else segment)
    return replaced
