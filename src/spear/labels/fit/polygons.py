"""COCO's polygons to masks, pixel for pixel as COCO's own tools fill them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spear.errors import SpearError
from spear.types import Array

_FINER = 5
"""COCO draws outlines on a grid five times finer than the pixels."""


def fill(polygons: Sequence[Sequence[float]], height: int, width: int) -> Array:
    """The union [height, width] bool of polygons, each x0, y0, x1, y1, … in pixels, closed by itself.

    COCO's rule: the outline is drawn on the finer grid; where it passes the middle of a pixel's column,
    inside and outside swap for the pixels below; a polygon that crosses itself is filled by the even-odd
    rule.

    Raises:
        SpearError: a polygon of an odd number of coordinates, fewer than three points, or not finite.
    """
    mask = np.zeros((height, width), bool)
    for polygon in polygons:
        corners = np.asarray(polygon, np.float64)
        if corners.ndim != 1 or len(corners) % 2 or len(corners) < 6 or not np.isfinite(corners).all():
            raise SpearError(
                f"polygon of {corners.size} numbers: give x, y of at least three points, all of them finite"
            )
        mask |= _fill(corners.reshape(-1, 2), height, width)
    return mask


def _fill(corners: Array, height: int, width: int) -> Array:
    fine = np.trunc(_FINER * corners + 0.5).astype(np.int64)
    ends = np.roll(fine, -1, axis=0)
    outline = np.concatenate([_line(start, end) for start, end in zip(fine, ends, strict=True)])
    before, after = outline[:-1], outline[1:]
    steps = before[:, 0] != after[:, 0]
    before, after = before[steps], after[steps]
    column = (np.minimum(before[:, 0], after[:, 0]) + 0.5) / _FINER - 0.5
    inside = (column == np.floor(column)) & (column >= 0) & (column <= width - 1)
    row = (np.minimum(before[inside, 1], after[inside, 1]) + 0.5) / _FINER - 0.5
    row = np.ceil(np.clip(row, 0, height))
    swaps = (column[inside] * height + row).astype(np.int64)
    parity = np.cumsum(np.bincount(swaps, minlength=height * width + 1)[:-1]) % 2
    return parity.astype(bool).reshape((height, width), order="F")


def _line(start: Array, end: Array) -> Array:
    """Points [n, 2] of the finer grid from start to end, one per step along the longer axis."""
    length = np.abs(end - start)
    along = 0 if length[0] >= length[1] else 1
    if not length[along]:
        return start[None]
    low, high = (start, end) if start[along] <= end[along] else (end, start)
    step = np.arange(length[along] + 1)
    points = np.empty((len(step), 2), np.int64)
    points[:, along] = low[along] + step
    slope = (high[1 - along] - low[1 - along]) / length[along]
    points[:, 1 - along] = np.trunc(low[1 - along] + slope * step + 0.5)
    return points if low is start else points[::-1]
