"""Finds and drops the rows of an episode that cannot be used, and counts these repairs.

A row is what a dataset recorded at one step: one number or image of each column. Some datasets
contain rows of zeros, rows in which a number is missing (NaN), or rows whose orientation is not a
rotation. A reader drops such a bad row and masks the action of the row before it, because that
action would lead to the bad row. The rest of the episode remains usable.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.types import Array

MIN_GOOD_SHARE = 0.5  # if a smaller part of an episode's rows is good, the episode is refused
NEAR_ZERO_SHARE = 0.1  # a pose below this fraction of the usual size is near zero


@dataclass
class Repairs:
    """How much of a dataset was dropped or changed while its episodes were read.

    Attributes:
        num_dropped_rows: Rows that were dropped because they have no pose, or lack a number.
        num_clipped_readings: Gripper readings that were clipped to their declared range.
    """

    num_dropped_rows: int = 0
    num_clipped_readings: int = 0

    def add(self, repairs: "Repairs") -> None:
        """Add the counts of another part of the dataset to these counts."""
        self.num_dropped_rows += repairs.num_dropped_rows
        self.num_clipped_readings += repairs.num_clipped_readings


_current_repairs: ContextVar[Repairs | None] = ContextVar("repairs", default=None)


@contextlib.contextmanager
def collect_repairs() -> Iterator[Repairs]:
    """Count the repairs of all episodes that are read in a `with` block.

    Yields:
        The counts, which grow while the block reads episodes.
    """
    repairs = Repairs()
    token = _current_repairs.set(repairs)
    try:
        yield repairs
    finally:
        _current_repairs.reset(token)


def record_repairs(*, num_dropped_rows: int = 0, num_clipped_readings: int = 0) -> None:
    """Add repairs to the counts of the surrounding `collect_repairs`, if there is one."""
    repairs = _current_repairs.get()
    if repairs is not None:
        repairs.add(Repairs(num_dropped_rows, num_clipped_readings))


def mark_complete_rows(columns: Iterable[Array]) -> Array:
    """Say of each row whether all its numbers are finite.

    Args:
        columns: Columns of numbers, [T] or [T, d] each, with the same number of rows.

    Returns:
        [T] bool.
    """
    masks: list[Array] = []
    for values in columns:
        numbers_of_rows = values.reshape(len(values), -1)  # [T, d]
        is_finite = np.isfinite(numbers_of_rows)  # [T, d]
        masks.append(np.all(is_finite, axis=1))
    return np.logical_and.reduce(masks)


def mark_zeros_for_missing_poses(pose: Array) -> Array:
    """Say of each row whether it has zeros that stand for a missing pose: True if so.

    Some recorders write zeros for a lost reading. But if other poses of the episode are near zero,
    for example because positions are relative to where the episode begins, a row of zeros is a real
    pose.

    Args:
        pose: [T, d] the numbers of position and orientation, in any format and unit.

    Returns:
        [T] bool.
    """
    sizes = np.abs(pose).max(axis=1, initial=0)  # [T] the largest number of each row
    is_zero = sizes == 0  # [T]
    nonzero_sizes = sizes[~is_zero]
    no_row = np.zeros(len(pose), bool)
    if not len(nonzero_sizes):
        return no_row

    usual_size = np.median(nonzero_sizes)
    comes_near_zero = nonzero_sizes.min() < NEAR_ZERO_SHARE * usual_size
    return no_row if comes_near_zero else is_zero


def list_good_rows_or_all_if_most_are_bad(is_good: Array) -> Array:
    """List the good rows of an episode, or all rows if most are bad.

    If more than half of the rows are bad, the layout is probably wrong, or little of the episode
    would remain. Then all rows are listed, and their conversion refuses the episode by name.

    Args:
        is_good: [T] bool, whether each row can be used.

    Returns:
        [N] the indices of the listed rows, ascending.
    """
    num_rows = len(is_good)
    num_good_rows = int(is_good.sum())
    if num_good_rows < MIN_GOOD_SHARE * num_rows:
        return np.arange(num_rows)
    return np.flatnonzero(is_good)


def select_rows(columns: Mapping[str, Any], rows: Array, num_rows_before: int) -> Mapping[str, Any]:
    """Select the same rows of every column of an episode.

    Args:
        columns: The columns of an episode: arrays, lists, or mappings of further columns.
        rows: [N] the indices of the rows to select.
        num_rows_before: The number of rows of the episode. Columns of another length stay
            unchanged.

    Returns:
        Columns of the selected rows, nested as in `columns`.
    """
    selects_all_rows = len(rows) == num_rows_before
    if selects_all_rows:
        return columns

    selected: dict[str, Any] = {}
    for name, values in columns.items():
        if isinstance(values, Mapping):
            selected[name] = select_rows(values, rows, num_rows_before)
        elif isinstance(values, np.ndarray) and values.shape[:1] == (num_rows_before,):
            selected[name] = values[rows]
        elif isinstance(values, list) and len(values) == num_rows_before:
            selected[name] = [values[row] for row in rows]
        else:
            selected[name] = values
    return selected


def mask_actions_before_gaps(rows: Array) -> Array | None:
    """Mask the actions of rows whose next row was dropped.

    The motion from such a row to the next remaining row takes more than one step, so it is no
    action.

    Args:
        rows: [T] the indices of the rows that remain, ascending.

    Returns:
        [T] bool, False at the last row before each gap; None if there is no gap.
    """
    is_followed_by_next_row = np.diff(rows) == 1  # [T - 1]
    action_mask = np.append(is_followed_by_next_row, True)  # [T]; no row follows the last one
    return None if action_mask.all() else action_mask
