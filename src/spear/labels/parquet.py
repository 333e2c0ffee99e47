"""A Parquet file that appears whole or not at all, written row group by row group."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.parquet as pq

from spear.util.files import writing

ROWS_PER_GROUP = 16
"""Rows that are read together: what a random access costs."""


class ParquetWriter:
    """Writes to a temporary name beside `path`; `commit` gives the file its name.

    Used as a context, it removes the temporary file when `commit` was not reached. The bytes of the file
    depend on its rows alone, not on how they were handed over.

    Raises:
        SpearError: the disk is full, or the file cannot be written.
    """

    def __init__(self, path: Path, schema: pa.Schema, rows_per_group: int = ROWS_PER_GROUP) -> None:
        self.path, self.schema, self.rows_per_group = path, schema, rows_per_group
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._waiting: list[pa.Table] = []
        with writing(path):
            self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed by __exit__
            self._parquet = pq.ParquetWriter(self._file, schema, compression="zstd")

    def write(self, table: pa.Table) -> None:
        """Add rows."""
        self._waiting.append(table)
        while sum(map(len, self._waiting)) >= self.rows_per_group:
            rows = pa.concat_tables(self._waiting)
            self._write_group(rows.slice(0, self.rows_per_group))
            self._waiting = [rows.slice(self.rows_per_group)]

    def _write_group(self, rows: pa.Table) -> None:
        with writing(self.path):
            self._parquet.write_table(rows.combine_chunks())

    def commit(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the last rows, and `metadata` into the footer; then the file is there, on the disk."""
        if any(map(len, self._waiting)):
            self._write_group(pa.concat_tables(self._waiting))
        with writing(self.path):
            if metadata:
                self._parquet.add_key_value_metadata(dict(metadata))
            self._parquet.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self.path)

    def __enter__(self) -> ParquetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):  # of a disk that is full: what is in the file is thrown away
            self._parquet.close()
        with suppress(OSError):
            self._file.close()
        self._temporary.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed writers have left in a folder."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
