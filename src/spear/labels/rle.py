"""Masks as run lengths, the COCO convention: column-major order, starting with the count of zeros."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spear.errors import SpearError
from spear.types import Array


def encode(mask: Array) -> list[int]:
    """Run lengths of a mask.

    Args:
        mask: [h, w] bool.

    Returns:
        Alternating counts of zeros and ones, zeros first (0 when the first pixel is set); sums to h·w.
    """
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    if flat.size == 0:
        return []
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    start = [0, 0] if flat[0] else [0]
    edges = np.concatenate([start, changes, [flat.size]])
    runs: list[int] = np.diff(edges).tolist()
    return runs


def decode(runs: Sequence[int] | Array, height: int, width: int) -> Array:
    """The mask [height, width] bool of run lengths; `SpearError` when they do not add up to its size."""
    counts = np.asarray(runs, dtype=np.int64)
    if (counts < 0).any() or counts.sum() != height * width:
        raise SpearError(
            f"mask run lengths: they cover {counts.sum()} pixels, not {height}×{width}: label the image again"
        )
    flat = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape((height, width), order="F")
