"""Coordinates ⇄ 3D tokens: the numbers in SPEAR-VLM's answers as words of its vocabulary.

The paper adds N = 1024 "3D tokens" to the vocabulary, each for an interval (bin) of coordinates.
The bins are not equally wide: coordinates are about normally distributed, so the bin edges are
their quantiles. The bins are narrow near the mean and wide in the tails, and every token is used
about equally often. The embeddings of the 3D tokens are drawn from a normal distribution with the
mean and covariance of the pretrained embeddings.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from spear.errors import SpearError, check_known, summarize_error
from spear.types import Array, Unit
from spear.util.files import write_text
from spear.util.json_text import parse_json_as, read_utf8_bytes

NUM_BINS = 1024  # number of 3D tokens in the paper
TOKEN_FORMAT = "<3d{:04d}>"  # the text of a 3D token, from its bin's number
BinSpacing = Literal["quantile", "uniform"]
"""Where the bin edges are: at quantiles of the fitted values (the paper), or at equal distances."""

_NUM_ROWS_AT_ONCE = 8192  # embedding rows converted to float64 at once, to save memory

# A column of smooth embeddings (`_sample_columnwise_smooth_normal`) is a sum of waves along rows.
_NUM_WAVES = 64  # number of waves per column
_MIN_WAVELENGTH_ROWS = 8  # shortest wavelength, in rows
_MAX_WAVELENGTH_TABLES = 4  # longest wavelength, as a multiple of the table's number of rows


@dataclass
class CoordinateTokenizer:
    """Converts coordinates to token ids 0 … num_bins - 1, and back.

    Attributes:
        bin_edges: [num_bins + 1], strictly increasing. Bin i is the interval from edge i up to, but
            without, edge i + 1; only the last bin contains both its edges.
        bin_centers: [num_bins], the median of the fitted values in each bin. For a bin without
            fitted values it is the middle of the bin.
        unit: the unit of the coordinates.

    Example:
        >>> tokenizer = CoordinateTokenizer.fit(np.random.default_rng(0).normal(size=10_000))
        >>> ids = tokenizer.encode([-0.5, 0.5])
        >>> ids
        array([316, 699])
        >>> tokenizer.decode(ids).round(2)
        array([-0.5,  0.5])
    """

    bin_edges: Array
    bin_centers: Array
    unit: Unit

    @property
    def num_bins(self) -> int:
        return len(self.bin_centers)

    @staticmethod
    def fit(
        values: ArrayLike,
        bins: int = NUM_BINS,
        unit: Unit = "metre",
        spacing: BinSpacing = "quantile",
    ) -> "CoordinateTokenizer":
        """Choose bins that contain equal numbers of the given values.

        Args:
            values: coordinates, an array of any shape. A value that occurs several times is treated
                as if spread evenly over the gap between it and the next smaller value, so that
                edges always increase strictly.
            bins: number of bins.
            unit: the unit of the values.
            spacing: "quantile", or "uniform" for bins that are equally wide instead.

        Returns:
            The tokenizer with these bins.

        Raises:
            SpearError: for an unknown spacing, values that are not finite, and fewer than two
                different ones.
        """
        check_known("spacing", get_args(BinSpacing), spacing)
        sorted_values = np.sort(np.asarray(values, dtype=np.float64).ravel())
        if not np.isfinite(sorted_values).all():
            raise SpearError(
                "some of the coordinates to fit 3D tokens on are NaN or infinite. Leave those out."
            )
        distinct, counts = np.unique(sorted_values, return_counts=True)
        if len(distinct) < 2:
            raise SpearError(
                f"the coordinates to fit 3D tokens on have {len(distinct)} different values. "
                "Give at least 2."
            )

        if spacing == "uniform":
            edges = np.linspace(distinct[0], distinct[-1], bins + 1)
        else:
            # The fraction of values in the interval from the smallest value, exclusive, to each
            # distinct value, inclusive: 0 for the smallest, 1 for the largest. The smallest value
            # is not counted, because there is no gap below it to spread it over.
            num_above_smallest = len(sorted_values) - counts[0]
            cumulative_fraction = (np.cumsum(counts) - counts[0]) / num_above_smallest
            edges = np.interp(np.linspace(0, 1, bins + 1), cumulative_fraction, distinct)
        # Rounding may have made the two edges of a narrow bin equal.
        for i in range(bins):
            edges[i + 1] = max(edges[i + 1], np.nextafter(edges[i], math.inf))

        return CoordinateTokenizer(edges, _compute_bin_centers(edges, sorted_values), unit)

    def encode(self, values: ArrayLike) -> Array:
        """Convert coordinates to token ids.

        Args:
            values: coordinates in `unit`, an array of any shape.

        Returns:
            The id of each value's bin, int64, of the same shape. Values below or above all bins get
            the first or last id.

        Raises:
            SpearError: a value is NaN.
        """
        array = np.asarray(values, dtype=np.float64)
        if np.isnan(array).any():
            raise SpearError(
                "some of the coordinates to encode as 3D tokens are NaN. Leave those out."
            )
        # A value's id is the number of inner edges that are not above the value.
        inner_edges = self.bin_edges[1:-1]
        ids = np.searchsorted(inner_edges, array, side="right")
        return np.asarray(ids, dtype=np.int64)

    def decode(self, ids: ArrayLike) -> Array:
        """Convert token ids to coordinates.

        Args:
            ids: an array of any shape.

        Returns:
            The center of each id's bin, in `unit`, float64, of the same shape.

        Raises:
            SpearError: an id is not in 0 … num_bins - 1.
        """
        index = np.asarray(ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.num_bins):
            raise SpearError(
                f"the 3D token ids are {index.min()} … {index.max()}. Give 0 … {self.num_bins - 1}."
            )
        return np.asarray(self.bin_centers[index])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokenizer as JSON with all digits, so that `load` is exact.

        Args:
            path: the file.
        """
        content = {
            "unit": self.unit,
            "edges": self.bin_edges.tolist(),
            "representatives": self.bin_centers.tolist(),
        }
        write_text(Path(path), json.dumps(content))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "CoordinateTokenizer":
        """Read what `save` wrote.

        Args:
            path: the file.

        Returns:
            The same tokenizer.

        Raises:
            SpearError: the file is missing, or not a tokenizer.
        """
        try:
            content = parse_json_as(dict[str, Any], read_utf8_bytes(Path(path)))
            edges = np.asarray(content["edges"], np.float64)
            centers = np.asarray(content["representatives"], np.float64)
            unit = content["unit"]
            _check_bins(edges, centers, unit)
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise SpearError(
                f"{path} is no 3D tokenizer ({summarize_error(error)}). Choose another file."
            ) from error
        return CoordinateTokenizer(edges, centers, unit)


def _compute_bin_centers(edges: Array, sorted_values: Array) -> Array:
    """The median of the values in each bin, or the middle of an empty bin, [num_bins].

    The median of an even number of values is the lower of the two middle ones.
    """
    low = edges[:-1]
    high = edges[1:]
    middle = low + (high - low) / 2
    middle = np.where(middle < high, middle, low)  # in the narrowest bins it rounds to `high`

    # Bin i contains sorted_values[starts[i] : ends[i]]. The last bin contains its upper edge, too.
    ends = np.searchsorted(sorted_values, [*edges[1:-1], math.inf])
    starts = np.append(0, ends[:-1])
    median_index = (starts + ends - 1) // 2
    median = sorted_values[median_index]  # meaningless for empty bins
    is_filled = starts < ends
    return np.where(is_filled, median, middle)


def _check_bins(edges: Array, centers: Array, unit: str) -> None:
    """Raise `ValueError` if the arrays are not a tokenizer's bins, or the unit is unknown."""
    if unit not in get_args(Unit):
        raise ValueError(f"unknown unit {unit!r}")
    low = edges[:-1]
    high = edges[1:]
    contains_center = (low <= centers) & (centers <= high)
    has_width = (low < high) & np.isfinite(high - low)
    has_right_shape = low.ndim == 1 and low.shape == centers.shape and len(low) > 0
    if not has_right_shape or not (contains_center & has_width).all():
        raise ValueError("finite edges must increase, with one value between each two")


def extend_tokenizer(tokenizer: Any, bins: int = NUM_BINS) -> range:
    """Add the 3D tokens to a Hugging Face tokenizer, unless it has them already.

    The 3D tokens are ordinary tokens, so that decoding with `skip_special_tokens` keeps them.

    Args:
        tokenizer: a tokenizer of `transformers`.
        bins: number of 3D tokens.

    Returns:
        The ids of the 3D tokens.

    Raises:
        SpearError: the tokenizer knows some of the tokens under ids that are not consecutive.
    """
    names = [TOKEN_FORMAT.format(i) for i in range(bins)]
    tokenizer.add_tokens(names)
    ids = tokenizer.convert_tokens_to_ids(names)
    first_id = int(ids[0])
    consecutive_ids = range(first_id, first_id + bins)
    if list(ids) != list(consecutive_ids):
        raise SpearError(
            f"the 3D tokens of the tokenizer are not the {bins} ids from {first_id}. Take a "
            "tokenizer without them."
        )
    return consecutive_ids


def sample_new_embeddings(
    existing: Tensor, count: int, generator: torch.Generator | None = None, smooth: bool = False
) -> Tensor:
    """Draw embeddings for new tokens from N(mean, covariance) of the existing ones (the paper).

    The covariance may be singular (few tokens, unused dimensions), because its symmetric square
    root is computed from its eigenvectors. The random numbers are drawn on the CPU, even if the
    embeddings are on another device.

    Args:
        existing: [V, D], the pretrained embeddings.
        count: number of new embeddings.
        generator: source of the random numbers.
        smooth: whether neighboring embeddings are similar, as the bins of neighboring 3D tokens
            are. Each embedding still has the distribution N(mean, covariance). This is our choice
            for small models, which cannot learn the order of a thousand tokens from few examples.

    Returns:
        [count, D], in the dtype and on the device of `existing`.
    """
    num_rows, width = existing.shape
    embeddings = existing.detach()
    zero = torch.zeros((), dtype=torch.float64, device=embeddings.device)
    block_sums = (rows.double().sum(0) for rows in embeddings.split(_NUM_ROWS_AT_ONCE))
    mean = sum(block_sums, zero) / num_rows  # [D]
    centered_blocks = (rows.double() - mean for rows in embeddings.split(_NUM_ROWS_AT_ONCE))
    covariance = sum((rows.T @ rows for rows in centered_blocks), zero) / num_rows  # [D, D]
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
    # The square root of the covariance. Rounding may have made zero eigenvalues negative.
    root = (eigenvectors * eigenvalues.clamp_min(0).sqrt()) @ eigenvectors.T
    if smooth:
        noise = _sample_columnwise_smooth_normal(count, width, generator)
    else:
        noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (mean + noise.to(embeddings.device) @ root).to(embeddings.dtype)


def _sample_columnwise_smooth_normal(
    num_rows: int, width: int, generator: torch.Generator | None
) -> Tensor:
    """Draw standard normals [num_rows, width], independent between columns; a column is smooth.

    A column is a sum of waves with random amplitudes. The waves' lengths are random, uniform on a
    logarithmic scale from 8 rows to four times the number of rows.
    """
    exponent = torch.rand(_NUM_WAVES, width, generator=generator, dtype=torch.float64)
    wavelength_ratio = _MAX_WAVELENGTH_TABLES * num_rows / _MIN_WAVELENGTH_ROWS
    wavelength = _MIN_WAVELENGTH_ROWS * wavelength_ratio**exponent  # [waves, width], rows

    # Amplitudes of cosine and sine. A wave with normal amplitudes has the same variance at every
    # row, and the divisor gives the sum of all waves a variance of 1.
    amplitudes = torch.randn(2, _NUM_WAVES, width, generator=generator, dtype=torch.float64)
    amplitudes = amplitudes / _NUM_WAVES**0.5
    row = torch.arange(num_rows, dtype=torch.float64)[:, None]  # [num_rows, 1]
    total = torch.zeros(num_rows, width, dtype=torch.float64)
    for wave in range(_NUM_WAVES):
        angle = 2 * math.pi * row / wavelength[wave]  # [num_rows, width]
        total += amplitudes[0, wave] * angle.cos() + amplitudes[1, wave] * angle.sin()
    return total
