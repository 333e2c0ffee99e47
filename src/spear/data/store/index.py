"""Where each image of a prepared dataset is in LeRobot's Parquet files, and all numbers beside it.

`index.arrow` lies beside `meta` and `data`; LeRobot does not look at it. It has a record batch for each file
of `data`, with the numbers of its episodes and, in `place:<camera>`, two numbers for each step: where in that
file the encoded image begins, and how long it is. The images are stored there as they are, neither compressed
again nor in a dictionary, so that a frame is a slice of mapped memory: no Parquet is decoded in training.
"""

from __future__ import annotations

import functools
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.data.store import schema as lerobot
from spear.data.store.shard import Images, Shard, corrupt, flat_rows, lists, number_columns
from spear.errors import SpearError
from spear.types import Array, Episode

INDEX = "index.arrow"
FORMAT = "spear.index.1"
PLACE_PREFIX = "place:"
MOST_MAPPED = 256
"""Files that are mapped at a time: each takes a file handle (our choice)."""


def index_batch(folder: Path, number: int, episodes: Sequence[Episode]) -> pa.RecordBatch:
    """The index of file `number` of `data`, which is complete and holds these episodes in this order."""
    path = folder / lerobot.DATA_PATH.format(**lerobot.chunk_of(number))
    count = len(episodes)
    columns = {
        **number_columns(episodes),
        "data_file": pa.array(np.full(count, number, np.int64)),
        "data_bytes": pa.array(np.full(count, path.stat().st_size, np.int64)),
    }
    offsets = np.cumsum([0] + [len(e) for e in episodes])
    for camera, places in _find_places(path, episodes).items():
        columns[PLACE_PREFIX + camera] = lists(offsets, places)
    return pa.RecordBatch.from_pydict(columns)


def _find_places(path: Path, episodes: Sequence[Episode]) -> dict[str, Array]:
    """camera -> [N, 2] int64, first byte and length of each image of a Parquet file with a group per
    episode."""
    metadata = pq.read_metadata(path)
    leaves = {metadata.schema.column(i).path: i for i in range(metadata.num_columns)}
    found: dict[str, list[tuple[int, int]]] = {camera: [] for camera in sorted(episodes[0].images)}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group, episode in enumerate(episodes):
            for camera, places in found.items():
                leaf = leaves[f"{lerobot.feature_name(camera)}.bytes"]
                at = metadata.row_group(group).column(leaf).data_page_offset
                for image in episode.images[camera]:
                    # Values follow one another, each behind its length; now and then comes a page's header.
                    stored = struct.pack("<I", len(image)) + image
                    if data[at : at + len(stored)] != stored:
                        at = data.find(stored, at)
                    if at < 0:
                        raise SpearError(f"not as written: {path}: an image of {episode.source} is not in it")
                    places.append((at + 4, len(image)))
                    at += len(stored)
    return {camera: np.array(places, np.int64) for camera, places in found.items()}


def write_batches(path: Path, batches: Iterable[pa.RecordBatch], note: Mapping[str, str]) -> None:
    """Write an index file (one batch after the other is in memory), complete or not at all."""
    part = path.with_name(f".{path.name}.tmp")
    writer = None
    with open(part, "wb") as file:
        for batch in batches:
            schema = batch.schema.with_metadata({"format": FORMAT, **note})
            writer = writer or pa.ipc.new_file(file, schema)
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        assert writer is not None  # nobody writes an empty index
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_batches(path: Path) -> tuple[list[pa.RecordBatch], dict[str, str]]:
    """The mapped batches of an index file, and its note. Raises SpearError when it is broken."""
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            note = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            if note.pop("format", None) != FORMAT:
                raise SpearError(f"not an index: {path}: expected {FORMAT!r}; prepare the dataset again")
            return [reader.get_batch(i) for i in range(reader.num_record_batches)], note
    except (pa.ArrowException, OSError) as error:
        raise corrupt(path, error) from error


def open_index(path: Path, folder: Path) -> list[Shard]:
    """The shards of an index file; its images are in the files of `folder`.

    Raises SpearError when it is broken, and when a file of `data` is missing or is not as long as it was.
    """
    batches, _ = read_batches(path)
    try:
        return [Shard(batch, functools.partial(_images, folder)) for batch in batches]
    except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
        raise corrupt(path, error) from error


def _images(folder: Path, columns: Mapping[str, pa.Array], offsets: Array) -> dict[str, Images]:
    number, size = (int(columns[name][0].as_py()) for name in ("data_file", "data_bytes"))
    file = folder / lerobot.DATA_PATH.format(**lerobot.chunk_of(number))
    try:
        found = file.stat()
    except OSError as error:
        raise SpearError(f"missing file: {file}: {error.strerror}; copy the dataset again") from error
    if found.st_size != size:
        raise SpearError(f"truncated or changed: {file}: {found.st_size} bytes, not {size}; copy it again")
    key = (str(file), found.st_mtime_ns)
    return {
        name.removeprefix(PLACE_PREFIX): _Placed(key, offsets, flat_rows(column, 2, int(offsets[-1])))
        for name, column in columns.items()
        if name.startswith(PLACE_PREFIX)
    }


class _Placed:
    """Images that are slices of another file."""

    def __init__(self, file: tuple[str, int], offsets: Array, places: Array) -> None:
        self.file, self.offsets, self.places = file, offsets, places

    def find(self, row: int, step: int) -> bytes | None:
        first, length = self.places[int(self.offsets[row]) + step].tolist()
        return _map(*self.file)[first : first + length]


@functools.lru_cache(maxsize=MOST_MAPPED)
def _map(path: str, changed: int) -> Any:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SpearError(f"cannot read: {path}: {error.strerror}; copy the dataset again") from error
