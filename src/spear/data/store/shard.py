"""A shard: many episodes in two files, and single steps found in them without copying.

`episodes-00000.arrow` is an Arrow record batch with one row per episode: its steps are lists of numbers. Two
numbers for each step in `place:<camera>` say where in `episodes-00000.images` the encoded image begins, and
how long it is. Nothing is compressed, so a frame is a slice of mapped memory (Parquet has to decode a column
chunk). The numbers are apart from the images, so that thousands of shards are opened at once.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from spear.errors import SpearError, summarize_error
from spear.types import ACTION_DIM, Array, Episode

PLACE_PREFIX = "place:"
FORMAT = "spear.episodes.2"


def to_list_column(offsets: Array, rows: Array) -> pa.Array:
    """[N] or [N, d] rows as one list per episode of N_e · d numbers."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    return pa.LargeListArray.from_arrays(
        pa.array(offsets * (rows.size // len(rows)), pa.int64()), values
    )


def to_rows(column: pa.Array, width: int, steps: int) -> Array:
    """The inverse of `to_list_column`: [steps, width], a view."""
    values = column.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    if len(values) != steps:
        raise ValueError("columns have different numbers of steps")
    return values


class Shard:
    """One record batch: numpy views of its columns, no copies; `images` is the file with its images.

    offsets [E + 1] of the steps; rates_hz [E]; known [E], how many steps of each episode have a known action;
    words: column -> instruction, source or success of each episode, as Arrow has them. Raises ValueError,
    KeyError or an error of Arrow when the batch is broken.
    """

    def __init__(self, batch: pa.RecordBatch, images: Path) -> None:
        batch.validate(full=True)
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        if any(column.null_count for name, column in columns.items() if name != "success"):
            raise ValueError("a cell is empty")
        self.words = {name: columns[name] for name in ("instruction", "source", "success")}
        self.rates_hz = columns["rate_hz"].to_numpy()
        if not 0 < self.rates_hz.min() <= self.rates_hz.max() < np.inf:
            raise ValueError("a rate_hz is not above 0")
        self.offsets = columns["gripper"].offsets.to_numpy()
        steps = int(self.offsets[-1])
        self.position = to_rows(columns["position"], 3, steps)
        self.rotation = to_rows(columns["rotation"], 4, steps)
        self.gripper = to_rows(columns["gripper"], 1, steps)[:, 0]
        self.action = to_rows(columns["action"], ACTION_DIM, steps)
        self.action_mask = to_rows(columns["action_mask"], 1, steps)[:, 0]
        self.images = images
        places = (name for name in columns if name.startswith(PLACE_PREFIX))
        self.places = {n.removeprefix(PLACE_PREFIX): to_rows(columns[n], 2, steps) for n in places}
        self.known = np.add.reduceat(self.action_mask != 0, self.offsets[:-1], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rates_hz)

    @functools.cached_property
    def _encoded(self) -> memoryview:
        """The file of images, mapped when the first is asked for. Arrow's mapping keeps no file handle."""
        with pa.memory_map(str(self.images)) as file:
            begin, size = file.read_buffer(1), file.size()
        return memoryview(pa.foreign_buffer(begin.address, size, begin))

    def image(self, row: int, step: int, camera: str) -> bytes | None:
        """The encoded image of one step, or None when the episode has no such camera."""
        if camera not in self.places:
            return None
        first, length = self.places[camera][slice(*self.offsets[row : row + 2])][step].tolist()
        return bytes(self._encoded[first : first + length]) or None

    def episode(self, row: int, with_images: bool) -> Episode:
        """The episode in a row, its images as encoded bytes."""
        rows = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        images: dict[str, Sequence[bytes]] = {}
        for camera in self.places if with_images else ():
            found = [self.image(row, step, camera) for step in range(rows.stop - rows.start)]
            if found[0] is not None:
                images[camera] = [image for image in found if image is not None]
        return Episode(
            images=images,
            position=self.position[rows],
            rotation=self.rotation[rows],
            gripper=self.gripper[rows],
            rate_hz=float(self.rates_hz[row]),
            action=self.action[rows],
            action_mask=self.action_mask[rows].astype(bool),
            **{name: column[row].as_py() for name, column in self.words.items()},
        )


def write_shard(path: Path, episodes: Sequence[Episode], note: Mapping[str, str]) -> None:
    """Write checked episodes with actions and, beside them, a note of names and texts, onto the disk."""
    offsets = np.cumsum([0] + [len(e) for e in episodes])
    text = pa.large_string()
    words = {"instruction": text, "source": text, "rate_hz": pa.float64(), "success": pa.bool_()}
    columns = {
        name: pa.array([getattr(e, name) for e in episodes], kind) for name, kind in words.items()
    }
    for name in ("position", "rotation", "gripper", "action", "action_mask"):
        kind = np.uint8 if name == "action_mask" else np.float32
        columns[name] = to_list_column(
            offsets, np.concatenate([np.asarray(getattr(e, name), kind) for e in episodes])
        )
    with open(path.with_suffix(".images"), "wb") as file:
        for camera in sorted({camera for e in episodes for camera in e.images}):
            images = [image for e in episodes for image in e.images.get(camera, [b""] * len(e))]
            lengths = np.array([len(image) for image in images])
            places = np.stack([file.tell() + np.cumsum(lengths) - lengths, lengths], axis=1)
            columns[PLACE_PREFIX + camera] = to_list_column(offsets, places)
            file.writelines(images)
        note = {"format": FORMAT, "bytes": str(file.tell()), **note}
        _to_disk(file)
    batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata(note)
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        _to_disk(file)


def _to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def open_shard(path: Path) -> tuple[Shard, dict[str, str]]:
    """A shard, mapped into memory, and its note. Raises SpearError for a missing, broken or cut file."""
    images = path.with_suffix(".images")
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            note = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            if note.pop("format", None) != FORMAT:
                raise SpearError(
                    f"other format: {path}: expected {FORMAT!r}; prepare or record it again"
                )
            shard = Shard(reader.get_batch(0), images)
        if (size := images.stat().st_size) != int(note.pop("bytes")):
            raise SpearError(f"truncated or changed: {images}: it has {size} bytes; copy it again")
        return shard, note
    except FileNotFoundError as error:
        raise SpearError(f"missing file: {error.filename}: copy the folder again") from error
    except (pa.ArrowException, OSError, KeyError, IndexError, ValueError) as error:
        why = summarize_error(error)
        raise SpearError(
            f"corrupt or truncated shard: {path}: {why}; delete it or write it again"
        ) from error
