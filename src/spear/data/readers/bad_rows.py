"""Rows of a recording that cannot be used, and what was done about them.

Some datasets contain rows of zeros, or poses that are no rotation. Such a row costs itself and the
action of the row before, not the whole episode.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.data.readers.dataset_layout import RotationFormat
from spear.data.readers.rotation_formats import find_rotations
from spear.types import Array

MIN_GOOD_SHARE = 0.5  # of an episode's rows; with fewer, the whole episode is refused


@dataclass
class Repairs:
    """How much of a dataset was dropped or changed while its episodes were read.

    Attributes:
        num_dropped_rows: Rows that were dropped because their orientation is no rotation.
        num_clipped_readings: Gripper readings that were clipped to their declared range.
    """

    num_dropped_rows: int = 0
    num_clipped_readings: int = 0

    def add(self, repairs: "Repairs") -> None:
        """Add the numbers of another part of the dataset."""
        self.num_dropped_rows += repairs.num_dropped_rows
        self.num_clipped_readings += repairs.num_clipped_readings


_current_repairs: ContextVar[Repairs | None] = ContextVar("repairs", default=None)


@contextlib.contextmanager
def count_repairs() -> Iterator[Repairs]:
    """Count the repairs of all episodes that are read in a `with` block."""
    repairs = Repairs()
    token = _current_repairs.set(repairs)
    try:
        yield repairs
    finally:
        _current_repairs.reset(token)


def record_repairs(*, num_dropped_rows: int = 0, num_clipped_readings: int = 0) -> None:
    """Add repairs to the counts of the surrounding `count_repairs`, if there is one."""
    repairs = _current_repairs.get()
    if repairs is not None:
        repairs.add(Repairs(num_dropped_rows, num_clipped_readings))


def find_good_rows(rotation: Array, rotation_format: RotationFormat) -> Array:
    """Find the rows of an episode whose orientation is a rotation.

    If more than half of the rows are bad, all are returned: the layout is wrong, or little of the
    episode would be left, and what converts the orientations then refuses the episode.

    Args:
        rotation: [T, d] recorded orientations.
        rotation_format: Their format.

    Returns:
        [N] the numbers of the rows to use.
    """
    is_good = find_rotations(rotation, rotation_format)
    num_rows = len(is_good)
    num_good_rows = int(is_good.sum())
    if num_good_rows < MIN_GOOD_SHARE * num_rows:
        return np.arange(num_rows)

    record_repairs(num_dropped_rows=num_rows - num_good_rows)
    return np.flatnonzero(is_good)


def select_rows(columns: Mapping[str, Any], rows: Array, num_rows: int) -> Mapping[str, Any]:
    """Select rows of all columns, nested ones too.

    Args:
        columns: The columns of an episode.
        rows: [N] the numbers of the rows to select.
        num_rows: The number of rows of the episode. Columns of another length stay unchanged.

    Returns:
        The selected rows; the columns themselves if these are all rows.
    """
    if len(rows) == num_rows:
        return columns

    selected: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, Mapping):
            selected[name] = select_rows(values, rows, num_rows)
        elif isinstance(values, np.ndarray) and values.shape[:1] == (num_rows,):
            selected[name] = values[rows]
        elif isinstance(values, list) and len(values) == num_rows:
            selected[name] = [values[row] for row in rows]
        else:
            selected[name] = values
    return selected


def mask_gaps(rows: Array) -> Array | None:
    """Mask the steps whose next row was dropped, because their motion would span two rows.

    Args:
        rows: [T] the numbers of the rows that are left.

    Returns:
        [T] bool, False at the last row before each gap; None if there is no gap.
    """
    leads_to_next_row = np.append(np.diff(rows) == 1, True)
    return None if leads_to_next_row.all() else leads_to_next_row
