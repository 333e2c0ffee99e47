"""Coordinates ⇄ 3D tokens: the numbers of SPEAR-VLM's answers as words of its vocabulary.

The paper adds N = 1024 "3D tokens" whose bins are not uniform: coordinates are about normally distributed, so
the bins are their quantiles, fine near the mean and wide in the tails, and every token is used about equally
often. New embeddings are drawn from a normal with the mean and covariance of the pretrained ones.
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

from spear.errors import SpearError, check_known
from spear.types import Array, Unit
from spear.util.files import write_text

NUM_BINS = 1024
BinSpacing = Literal["quantile", "uniform"]
"""Where the edges of the bins lie: at quantiles of the fitted values (the paper), or at equal distances."""
TOKEN_FORMAT = "<3d{:04d}>"

_CHUNK = 8192
"""Embedding rows taken to float64 at a time, so that a large vocabulary is never copied whole."""


@dataclass
class CoordinateTokenizer:
    """Numbers in `unit` to bin ids 0 … bins - 1 and back.

    bin_edges    [bins + 1] strictly increasing; bin i is [edges[i], edges[i + 1]),
                 the last one closed.
    bin_centers  [bins] the median of the fitted values of each bin (its middle if it had none).
    unit         of the values, "metre" or "relative".
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
        """Bins with equal shares of the values (any shape, pooled); "uniform" ones are equally wide instead.

        Repeated values are spread evenly over the gap below them, so that edges always increase strictly.
        Raises `SpearError` for another spacing, values that are not finite, and fewer than two different.
        """
        check_known("spacing", get_args(BinSpacing), spacing)
        flat = np.sort(np.asarray(values, dtype=np.float64).ravel())
        if not np.isfinite(flat).all():
            raise SpearError(
                "coordinates to fit 3D tokens on: some are NaN or infinite: leave those out"
            )
        distinct, counts = np.unique(flat, return_counts=True)
        if len(distinct) < 2:
            raise SpearError(
                f"coordinates to fit 3D tokens on: {len(distinct)} different: give at least 2"
            )
        share = (np.cumsum(counts) - counts[0]) / (len(flat) - counts[0])
        if spacing == "uniform":
            edges = np.linspace(distinct[0], distinct[-1], bins + 1)
        else:
            edges = np.interp(np.linspace(0, 1, bins + 1), share, distinct)
        for i in range(bins):  # rounding may have closed the narrowest bins
            edges[i + 1] = max(edges[i + 1], np.nextafter(edges[i], math.inf))
        middle = edges[:-1] + (edges[1:] - edges[:-1]) / 2
        middle = np.where(middle < edges[1:], middle, edges[:-1])
        ends = np.searchsorted(flat, [*edges[1:-1], math.inf])  # of each bin's values
        starts = np.append(0, ends[:-1])
        representatives = np.where(starts < ends, flat[(starts + ends - 1) // 2], middle)
        return CoordinateTokenizer(edges, representatives, unit)

    def encode(self, values: ArrayLike) -> Array:
        """Bin ids, int64, of the same shape; monotone in the value.

        Values out of range take the first or last bin. NaN raises `SpearError`.
        """
        x = np.asarray(values, dtype=np.float64)
        if np.isnan(x).any():
            raise SpearError("coordinates to encode as 3D tokens: some are NaN: leave those out")
        return np.asarray(np.searchsorted(self.bin_edges[1:-1], x, side="right"), dtype=np.int64)

    def decode(self, ids: ArrayLike) -> Array:
        """The representative of each bin, in `unit`, float64, of the same shape.

        Ids outside 0 … bins - 1 raise `SpearError`.
        """
        index = np.asarray(ids, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.num_bins):
            raise SpearError(
                f"3D token ids: {index.min()} … {index.max()}: give 0 … {self.num_bins - 1}"
            )
        return np.asarray(self.bin_centers[index])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it exactly (floats with all their digits), whole or not at all."""
        content = {"edges": self.bin_edges.tolist(), "representatives": self.bin_centers.tolist()}
        write_text(Path(path), json.dumps({"unit": self.unit, **content}))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "CoordinateTokenizer":
        """Read what `save` wrote; `SpearError` if the file is missing or not a tokenizer."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            edges, value = (
                np.asarray(content[name], np.float64) for name in ("edges", "representatives")
            )
            unit = content["unit"]
            if unit not in get_args(Unit):
                raise ValueError(f"unknown unit {unit!r}")
            low, high = edges[:-1], edges[1:]
            rising = (low <= value) & (value <= high) & (low < high) & np.isfinite(high - low)
            if low.ndim != 1 or low.shape != value.shape or not (len(low) and rising.all()):
                raise ValueError("finite edges must increase, with one value between each two")
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise SpearError(
                f"not a 3D tokenizer: {path} ({error}): choose another file"
            ) from error
        return CoordinateTokenizer(edges, value, unit)


def extend_tokenizer(tokenizer: Any, bins: int = NUM_BINS) -> int:
    """Add the 3D tokens to a Hugging Face tokenizer, once; the id of the first (the others follow it).

    They are ordinary tokens: `skip_special_tokens` keeps them. Raises `SpearError` if the tokenizer
    already knows some of the names under ids that are not consecutive.
    """
    names = [TOKEN_FORMAT.format(i) for i in range(bins)]
    tokenizer.add_tokens(names)
    ids = tokenizer.convert_tokens_to_ids(names)
    first = int(ids[0])
    if list(ids) != list(range(first, first + bins)):
        raise SpearError(
            f"tokenizer: its 3D tokens are not the {bins} ids from {first}: take one without"
        )
    return first


def init_new_embeddings(
    existing: Tensor, count: int, generator: torch.Generator | None = None, smooth: bool = False
) -> Tensor:
    """New rows [count, D] from N(mean, cov) of the rows of `existing` [V, D]; its dtype and device.

    The covariance is D × D in float64 and may be singular (V ≤ D, unused dimensions): its symmetric square
    root is taken from its eigenvectors. Random numbers come from the CPU `generator`, whatever the device.

    smooth  False: rows are independent (the paper). True: each row has the same distribution, but
            neighbouring rows are alike, as the bins that they stand for are (our choice for small models,
            which cannot learn the order of a thousand tokens from few examples).
    """
    rows, width = existing.shape
    weight = existing.detach()
    zero = torch.zeros((), dtype=torch.float64, device=weight.device)
    mean = sum((chunk.double().sum(0) for chunk in weight.split(_CHUNK)), zero) / rows
    centred = (chunk.double() - mean for chunk in weight.split(_CHUNK))
    cov = sum((chunk.T @ chunk for chunk in centred), zero) / rows
    eigenvalues, vectors = torch.linalg.eigh(cov)
    root = (vectors * eigenvalues.clamp_min(0).sqrt()) @ vectors.T
    if smooth:
        drawn = _smooth_normal(count, width, generator)
    else:
        drawn = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return (mean + drawn.to(weight.device) @ root).to(weight.dtype)


def _smooth_normal(
    count: int, width: int, generator: torch.Generator | None, waves: int = 64
) -> Tensor:
    """[count, width] standard normals, independent between columns, each a smooth curve along the rows.

    A column is a sum of waves with random amplitudes; their lengths are spread evenly, in octaves, from 8
    rows to four times the table.
    """
    octaves = torch.rand(waves, width, generator=generator, dtype=torch.float64)
    length = 8 * (4 * count / 8) ** octaves
    amplitudes = torch.randn(2, waves, width, generator=generator, dtype=torch.float64) / waves**0.5
    place = torch.arange(count, dtype=torch.float64)[:, None]
    total = torch.zeros(count, width, dtype=torch.float64)
    for wave in range(waves):
        angle = 2 * math.pi * place / length[wave]
        total += amplitudes[0, wave] * angle.cos() + amplitudes[1, wave] * angle.sin()
    return total
