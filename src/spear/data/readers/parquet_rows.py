"""The rows of single episodes in Parquet files that hold many of them.

Opening such a file parses its footer, and reading one row decodes its whole row group. Tools that
merge datasets write files of one row group with thousands of episodes. The last files therefore
stay open, each with the row group that was read last, as far as it was needed. The time per episode
then does not depend on the number of episodes in the file.
"""

import os
import threading
from collections.abc import Collection, Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.types import Array

MAX_OPEN_FILES = 4  # each of which keeps one row group in memory
ROWS_PER_BATCH = 500  # that are decoded at a time
INDEX_COLUMN = "episode_index"


def read_episode_rows(
    path: Path, episode_index: int, num_rows: int, skipped_columns: Collection[str]
) -> pa.Table:
    """Read the rows of one episode.

    Args:
        path: The Parquet file.
        episode_index: The number of the episode in the column `episode_index`.
        num_rows: How many rows the episode should have.
        skipped_columns: Columns that are not needed, such as images.

    Returns:
        A table of its own memory. It has fewer rows, or none, if the file does not have them.

    Raises:
        OSError, KeyError, pa.ArrowException: If the file, or a row group that may have the episode,
            cannot be read.
    """
    status = path.stat()
    # A forked process opens files itself, and so does everyone after a change of the file.
    file = _open_cached(path, status.st_mtime_ns, status.st_size, os.getpid())
    return file.read_episode(episode_index, num_rows, skipped_columns)


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open_cached(path: Path, changed_ns: int, num_bytes: int, process_id: int) -> "EpisodeFile":
    return EpisodeFile(path)


class EpisodeFile:
    """An open Parquet file of the rows of episodes, with the row group that was read last."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self._column_names: list[str] = self._file.schema_arrow.names
        if INDEX_COLUMN not in self._column_names:
            raise KeyError(f"no column {INDEX_COLUMN}")
        self._first_episodes, self._last_episodes = self._find_episode_ranges()
        self._last_group: _RowGroup | None = None
        self._last_group_key: tuple[int, frozenset[str]] | None = None
        self._lock = threading.Lock()  # for readers in several threads

    def read_episode(
        self, episode_index: int, num_rows: int, skipped_columns: Collection[str]
    ) -> pa.Table:
        """Read the rows of one episode; see `read_episode_rows`."""
        is_after_first = self._first_episodes <= episode_index
        is_before_last = episode_index <= self._last_episodes
        groups = np.flatnonzero(is_after_first & is_before_last).tolist()
        rows = self._file.schema_arrow.empty_table().select(self._select_columns(skipped_columns))
        with self._lock:
            for group in groups:
                row_group = self._open_group(group, frozenset(skipped_columns))
                pieces = row_group.read_episode(episode_index, num_rows - len(rows))
                rows = pa.concat_tables([rows, *pieces])
        return rows

    def _find_episode_ranges(self) -> tuple[Array, Array]:
        """Find the smallest and the largest episode number of each row group.

        The footer has them as statistics; otherwise the column of the numbers is read once.
        """
        metadata = self._file.metadata
        column_paths = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        column = column_paths.index(INDEX_COLUMN)
        first_episodes = np.full(metadata.num_row_groups, -np.inf)
        last_episodes = np.full(metadata.num_row_groups, np.inf)
        for group in range(metadata.num_row_groups):
            statistics = metadata.row_group(group).column(column).statistics
            if statistics is not None and statistics.has_min_max:
                first_episodes[group] = statistics.min
                last_episodes[group] = statistics.max
            else:
                indices = self._read_indices(group)
                first_episodes[group] = np.fmin.reduce(indices, initial=np.inf)
                last_episodes[group] = np.fmax.reduce(indices, initial=-np.inf)
        return first_episodes, last_episodes

    def _read_indices(self, group: int) -> Array:
        """Read the episode number of each row; a broken row group may have any episode."""
        try:
            table = self._file.read_row_group(group, columns=[INDEX_COLUMN])
            return _to_numbers(table.column(INDEX_COLUMN))
        except (OSError, pa.ArrowException):
            return np.array([-np.inf, np.inf])

    def _open_group(self, group: int, skipped_columns: frozenset[str]) -> "_RowGroup":
        """Open a row group, unless it is the last one."""
        key = (group, skipped_columns)
        if self._last_group is None or self._last_group_key != key:
            columns = self._select_columns(skipped_columns)
            batches = self._file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns)
            self._last_group = _RowGroup(batches)
            self._last_group_key = key
        return self._last_group

    def _select_columns(self, skipped_columns: Collection[str]) -> list[str]:
        return [name for name in self._column_names if name not in skipped_columns]


class _Run(NamedTuple):
    """Consecutive rows of one episode: `num_rows` from `first_row` of a batch."""

    batch: int
    first_row: int
    num_rows: int


class _RowGroup:
    """A row group that is decoded only as far as episodes are asked for."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._remaining_batches = batches
        self._batches: list[pa.RecordBatch] = []
        self._runs: dict[int, list[_Run]] = {}
        self._last_episode: int | None = None  # that of the last row decoded
        self._error: Exception | None = None

    def read_episode(self, episode_index: int, num_rows: int) -> list[pa.Table]:
        """Copy the rows of an episode, so that the row group can be freed.

        Decoding stops behind the episode, or at the end if the episode has fewer than `num_rows`.
        """
        while self._count_rows(episode_index) < num_rows or self._last_episode == episode_index:
            if not self._decode_next_batch():
                break

        pieces: list[pa.Table] = []
        for run in self._runs.get(episode_index, []):
            part = self._batches[run.batch].slice(run.first_row, run.num_rows)
            copy = part.take(pa.array(np.arange(run.num_rows)))
            pieces.append(pa.Table.from_batches([copy]))
        return pieces

    def _count_rows(self, episode_index: int) -> int:
        return sum(run.num_rows for run in self._runs.get(episode_index, []))

    def _decode_next_batch(self) -> bool:
        """Decode some more rows. Returns whether there were any."""
        if self._error is not None:
            raise self._error
        try:
            batch = next(self._remaining_batches, None)
        except (OSError, pa.ArrowException) as error:
            self._error = error  # the rows behind the broken ones cannot be decoded
            raise
        if batch is None:
            return False
        if not batch.num_rows:
            return True

        indices = _to_numbers(batch.column(batch.schema.get_field_index(INDEX_COLUMN)))
        is_change = np.diff(indices) != 0
        starts = np.flatnonzero(np.concatenate([[True], is_change])).tolist()
        ends = [*starts[1:], len(indices)]
        for start, end in zip(starts, ends, strict=True):
            if np.isfinite(indices[start]):
                run = _Run(len(self._batches), start, end - start)
                self._runs.setdefault(int(indices[start]), []).append(run)
        self._last_episode = None if np.isnan(indices[-1]) else int(indices[-1])
        self._batches.append(batch)
        return True


def _to_numbers(column: pa.Array | pa.ChunkedArray) -> Array:
    """Convert a column of integers to float64 [n]; empty cells become NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
