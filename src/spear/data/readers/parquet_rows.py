"""Reads the rows of one episode from a Parquet file that has many episodes.

A Parquet file consists of row groups, and pyarrow decodes a row group in batches, from its first
row on. Opening a file parses its footer. Tools that merge datasets write files with one row group
of thousands of episodes, so decoding a row group anew for each of its episodes would be slow.
Therefore the files that were read last stay open, and each keeps the batches that it decoded of the
row group that was read last. The time per episode then does not depend on the number of episodes in
the file.
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

MAX_OPEN_FILES = 4  # each open file keeps one row group in memory
ROWS_PER_BATCH = 500  # the rows that pyarrow decodes at a time
INDEX_COLUMN = "episode_index"  # the column that says to which episode a row belongs


def read_episode_rows(
    path: Path, episode_index: int, num_expected_rows: int, skipped_columns: Collection[str]
) -> pa.Table:
    """Read the rows of one episode.

    Args:
        path: The Parquet file.
        episode_index: The number of the episode in the column `episode_index`.
        num_expected_rows: How many rows the episode should have according to the metadata.
        skipped_columns: Columns that are not needed, such as images.

    Returns:
        The rows in order, copied, so that the table does not keep the row group in memory. The
        table has fewer than `num_expected_rows` rows if the file lacks some.

    Raises:
        OSError, KeyError, pa.ArrowException: If the file, or a row group that may have rows of the
            episode, cannot be read.
    """
    status = path.stat()
    # An open file is not reused by a forked process, nor after the file has changed on disk.
    file = _open_cached(path, status.st_mtime_ns, status.st_size, os.getpid())
    return file.read_episode(episode_index, num_expected_rows, skipped_columns)


@lru_cache(maxsize=MAX_OPEN_FILES)
def _open_cached(path: Path, changed_ns: int, num_bytes: int, process_id: int) -> "EpisodeFile":
    """Open a file, or return it if it is open. The other arguments only distinguish cache entries.

    Args:
        path: The Parquet file.
        changed_ns: When the file was changed.
        num_bytes: The size of the file.
        process_id: The process that reads.
    """
    return EpisodeFile(path)


class EpisodeFile:
    """An open Parquet file of episodes, with the row group that was read last."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        self._column_names: list[str] = self._file.schema_arrow.names
        if INDEX_COLUMN not in self._column_names:
            raise KeyError(f"no column {INDEX_COLUMN}")
        # The smallest and the largest episode number of each row group, [num_row_groups] each.
        self._first_episodes, self._last_episodes = self._read_episode_ranges_of_row_groups()
        self._last_group: _RowGroup | None = None
        self._last_group_key: tuple[int, frozenset[str]] | None = None
        self._lock = threading.Lock()  # for readers in several threads

    def read_episode(
        self, episode_index: int, num_expected_rows: int, skipped_columns: Collection[str]
    ) -> pa.Table:
        """Read the rows of one episode; see `read_episode_rows`."""
        is_after_first = self._first_episodes <= episode_index  # [num_row_groups]
        is_before_last = episode_index <= self._last_episodes  # [num_row_groups]
        groups = np.flatnonzero(is_after_first & is_before_last).tolist()
        column_names = self._select_columns(skipped_columns)
        rows = self._file.schema_arrow.empty_table().select(column_names)
        with self._lock:
            for group in groups:
                row_group = self._open_group(group, frozenset(skipped_columns))
                num_missing_rows = num_expected_rows - len(rows)
                pieces = row_group.read_episode(episode_index, num_missing_rows)
                rows = pa.concat_tables([rows, *pieces])
        return rows

    def _read_episode_ranges_of_row_groups(self) -> tuple[Array, Array]:
        """Find the smallest and the largest episode number of each row group.

        Most footers have these numbers as statistics. For a row group without statistics, its
        column of episode numbers is read once.

        Returns:
            Two arrays [num_row_groups]: the smallest and the largest numbers.
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
        """Read the episode number of each row of a row group, [n].

        A row group that cannot be read may have any episode, so its numbers are the infinities.
        """
        try:
            table = self._file.read_row_group(group, columns=[INDEX_COLUMN])
            return _to_numbers(table.column(INDEX_COLUMN))
        except (OSError, pa.ArrowException):
            return np.array([-np.inf, np.inf])

    def _open_group(self, group: int, skipped_columns: frozenset[str]) -> "_RowGroup":
        """Open a row group, or return it if it is the one that was read last."""
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
    """Consecutive rows of one episode in one batch: the `num_rows` rows from `first_row` on.

    `batch` is the index of the batch in its row group.
    """

    batch: int
    first_row: int
    num_rows: int


class _RowGroup:
    """A row group that is decoded only as far as the episodes that were read so far need."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self._remaining_batches = batches
        self._batches: list[pa.RecordBatch] = []  # the batches decoded so far
        self._runs: dict[int, list[_Run]] = {}  # episode number → its rows among these batches
        self._last_episode: int | None = None  # the episode of the last decoded row
        self._error: Exception | None = None  # why decoding cannot continue

    def read_episode(self, episode_index: int, num_expected_rows: int) -> list[pa.Table]:
        """Copy the rows of an episode, so that the row group can be freed.

        Batches are decoded until `num_expected_rows` rows of the episode are known and the last
        decoded row is of another episode, or until the row group ends. The episode may thus turn
        out to have more rows than `num_expected_rows`.
        """
        while (
            self._count_rows(episode_index) < num_expected_rows
            or self._last_episode == episode_index
        ):
            if not self._decode_next_batch():
                break

        pieces: list[pa.Table] = []
        for run in self._runs.get(episode_index, []):
            view = self._batches[run.batch].slice(run.first_row, run.num_rows)
            copied_rows = view.take(pa.array(np.arange(run.num_rows)))  # `slice` copies nothing
            pieces.append(pa.Table.from_batches([copied_rows]))
        return pieces

    def _count_rows(self, episode_index: int) -> int:
        """Count the rows of an episode that are decoded so far."""
        return sum(run.num_rows for run in self._runs.get(episode_index, []))

    def _decode_next_batch(self) -> bool:
        """Decode one more batch. Returns whether the row group had one more."""
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

        # A run of rows starts at the first row and at each row whose number differs from the last.
        index_column = batch.column(batch.schema.get_field_index(INDEX_COLUMN))
        episode_indices = _to_numbers(index_column)  # [n]
        is_change = np.diff(episode_indices) != 0  # [n - 1]
        starts_run = np.concatenate([[True], is_change])  # [n]
        starts = np.flatnonzero(starts_run).tolist()
        ends = [*starts[1:], len(episode_indices)]
        for start, end in zip(starts, ends, strict=True):
            if np.isfinite(episode_indices[start]):
                run = _Run(batch=len(self._batches), first_row=start, num_rows=end - start)
                self._runs.setdefault(int(episode_indices[start]), []).append(run)

        last_index = episode_indices[-1]
        self._last_episode = None if np.isnan(last_index) else int(last_index)
        self._batches.append(batch)
        return True


def _to_numbers(column: pa.Array | pa.ChunkedArray) -> Array:
    """Convert a column of integers to float64 [n]; empty cells become NaN."""
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float64)
