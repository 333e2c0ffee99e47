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


def to_string(runs: Sequence[int]) -> str:
    """Run lengths as COCO's compressed string.

    From the third on, each run is stored as its difference from the one two before it; each number as groups
    of five bits, lowest first, the sixth bit set while more groups follow, plus 48 to make it printable.
    """
    text = []
    for i, run in enumerate(runs):
        value = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = value & 31
            value >>= 5
            more = value != (-1 if group & 16 else 0)
            text.append(chr(group + 32 * more + 48))
    return "".join(text)


def from_string(text: str | bytes) -> list[int]:
    """The inverse of `to_string`; `SpearError` for a string that is none."""
    data = text.encode("latin-1", "replace") if isinstance(text, str) else text
    runs: list[int] = []
    value = shift = 0
    for code in data:
        if not 48 <= code < 112:
            raise SpearError(f"compressed mask: {chr(code)!r} is not part of one: give COCO run lengths")
        value |= (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32:
            continue
        if code - 48 & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise SpearError("compressed mask: it ends in the middle of a number: give the whole string")
    return runs
