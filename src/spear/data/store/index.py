"""Many episodes as one Arrow record batch, and single steps found in it again without copying.

One row is one episode; its steps are lists of numbers. The images of recordings are in the batch, as encoded
bytes (`image:<camera>`). Those of a prepared dataset are in LeRobot's Parquet files, as they are, neither
compressed again nor in a dictionary. `index.arrow` beside them has a batch for each file of `data`, with two
numbers for each step in `place:<camera>`: where in that file the encoded image begins, and how long it is.
So a frame is a slice of mapped memory: no Parquet is decoded in training.
"""

import functools
import mmap
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.data.store import schema as lerobot
from spear.errors import SpearError, first_line
from spear.types import ACTION_DIM, Array, Episode

IMAGE_PREFIX, PLACE_PREFIX = "image:", "place:"
INDEX = "index.arrow"
FORMAT = "spear.index.1"
MOST_MAPPED = 256
"""Files that are mapped at a time: each takes a file handle (our choice)."""


def number_columns(episodes: Sequence[Episode]) -> dict[str, pa.Array]:
    """Everything but the images of checked episodes with actions (see `with_actions`), as columns."""
    offsets = np.cumsum([0] + [len(e) for e in episodes])
    text = pa.large_string()
    words = {"instruction": text, "source": text, "rate_hz": pa.float64(), "success": pa.bool_()}
    columns = {name: pa.array([getattr(e, name) for e in episodes], kind) for name, kind in words.items()}
    for name in ("position", "rotation", "gripper", "action", "action_mask"):
        kind = np.uint8 if name == "action_mask" else np.float32
        columns[name] = lists(offsets, np.concatenate([np.asarray(getattr(e, name), kind) for e in episodes]))
    return columns


def image_columns(episodes: Sequence[Episode]) -> dict[str, pa.Array]:
    """The encoded images, one column for each camera that occurs."""
    columns = {}
    for camera in sorted({camera for e in episodes for camera in e.images}):
        images = [list(e.images.get(camera, ())) for e in episodes]
        values = pa.array([image for each in images for image in each], pa.large_binary())
        where = pa.array(np.cumsum([0] + [len(each) for each in images]), pa.int64())
        columns[IMAGE_PREFIX + camera] = pa.LargeListArray.from_arrays(where, values)
    return columns


def lists(offsets: Array, rows: Array) -> pa.Array:
    """[N] or [N, d] rows as one list per episode of N_e · d numbers."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    return pa.LargeListArray.from_arrays(pa.array(offsets * (rows.size // len(rows)), pa.int64()), values)


def flat_rows(column: pa.Array, width: int, steps: int) -> Array:
    """The inverse of `lists`: [steps, width], a view."""
    values = column.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    if len(values) != steps:
        raise ValueError("columns have different numbers of steps")
    return values


FindImage = Callable[[int, int], bytes | None]
"""(row of an episode, step) -> a camera's encoded image, None when the episode has none."""


def _inside(column: pa.Array, lengths: Array) -> FindImage:
    """Images that are in the batch itself."""
    where = column.offsets.to_numpy()
    counts = np.diff(where)
    if not ((counts == lengths) | (counts == 0)).all():
        raise ValueError("a camera has another number of images than steps")
    _, ends, buffer = column.values.buffers()
    bounds, data = np.frombuffer(ends, np.int64), memoryview(buffer or b"")

    def find(row: int, step: int) -> bytes | None:
        place = int(where[row]) + step
        return bytes(data[int(bounds[place]) : int(bounds[place + 1])]) if counts[row] else None

    return find


class Shard:
    """One record batch: numpy views of its columns, no copies.

    offsets [E + 1] of the steps; rates_hz [E]; known [E], how many steps of each episode have a known action;
    words: column -> instruction, source or success of each episode, as Arrow has them.
    folder is where the images of a prepared dataset are. Raises ValueError, KeyError or an error of Arrow
    when the batch is broken, SpearError when a file of `data` is missing or is not as long as it was.
    """

    def __init__(self, batch: pa.RecordBatch, folder: Path | None = None) -> None:
        batch.validate(full=True)
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        self.words = {name: columns[name] for name in ("instruction", "source", "success")}
        self.rates_hz = columns["rate_hz"].to_numpy()
        self.offsets = columns["gripper"].offsets.to_numpy()
        steps = int(self.offsets[-1])
        self.position = flat_rows(columns["position"], 3, steps)
        self.rotation = flat_rows(columns["rotation"], 4, steps)
        self.gripper = flat_rows(columns["gripper"], 1, steps)[:, 0]
        self.action = flat_rows(columns["action"], ACTION_DIM, steps)
        self.action_mask = flat_rows(columns["action_mask"], 1, steps)[:, 0]
        kind = IMAGE_PREFIX if folder is None else PLACE_PREFIX
        cameras = {name.removeprefix(kind): c for name, c in columns.items() if name.startswith(kind)}
        self.images: dict[str, FindImage] = {}
        if folder is None:
            self.images |= {name: _inside(column, np.diff(self.offsets)) for name, column in cameras.items()}
        else:
            number, size = (int(columns[name][0].as_py()) for name in ("data_file", "data_bytes"))
            file = _data_file(folder, number, size)
            for name, column in cameras.items():
                self.images[name] = _placed(file, self.offsets, flat_rows(column, 2, steps))
        self.known = np.add.reduceat(self.action_mask != 0, self.offsets[:-1], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rates_hz)

    def image(self, row: int, step: int, camera: str) -> bytes | None:
        """The encoded image of one step, or None when the episode has no such camera."""
        return self.images[camera](row, step) if camera in self.images else None

    def episode(self, row: int, with_images: bool) -> Episode:
        """The episode in a row, its images as encoded bytes."""
        rows = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        images: dict[str, Sequence[bytes]] = {}
        for camera in self.images if with_images else ():
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


def _corrupt(path: Path, error: Exception) -> SpearError:
    """What to say of a file of episodes that is not in order."""
    why = first_line(error)
    return SpearError(f"corrupt or truncated shard: {path}: {why}; delete it or write it again")


def index_batch(folder: Path, number: int, episodes: Sequence[Episode]) -> pa.RecordBatch:
    """The index of file `number` of `data`, which is complete and holds these episodes in this order."""
    path = folder / lerobot.place(lerobot.DATA_PATH, number)
    columns = number_columns(episodes)
    for name, value in (("data_file", number), ("data_bytes", path.stat().st_size)):
        columns[name] = pa.array(np.full(len(episodes), value, np.int64))
    offsets = np.cumsum([0] + [len(e) for e in episodes])
    for camera, places in _find_places(path, episodes).items():
        columns[PLACE_PREFIX + camera] = lists(offsets, places)
    return pa.RecordBatch.from_pydict(columns)


def _find_places(path: Path, episodes: Sequence[Episode]) -> dict[str, Array]:
    """camera -> [N, 2] int64, first byte and length of each image of a file with a group per episode."""
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
    """Write an index file (one batch after the other is in memory), complete or not at all. Its format is
    `FORMAT`, unless the note says another."""
    part = path.with_name(f".{path.name}.tmp")
    writer = None
    try:
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
    finally:
        part.unlink(missing_ok=True)


def read_batches(path: Path, form: str = FORMAT) -> tuple[list[pa.RecordBatch], dict[str, str]]:
    """The mapped batches of a file of this format, and its note. Raises SpearError when it is broken."""
    try:
        with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
            note = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            if note.pop("format", None) != form:
                raise SpearError(f"other format: {path}: expected {form!r}; prepare or record it again")
            return [reader.get_batch(i) for i in range(reader.num_record_batches)], note
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, error) from error


def open_shards(path: Path, folder: Path | None, form: str = FORMAT) -> list[Shard]:
    """The shards of a file; its images are in it, or in the files of `folder`.

    Raises SpearError when it is broken, and when a file of `data` is missing or is not as long as it was.
    """
    try:
        return [Shard(batch, folder) for batch in read_batches(path, form)[0]]
    except (pa.ArrowException, KeyError, IndexError, ValueError) as error:
        raise _corrupt(path, error) from error


def _data_file(folder: Path, number: int, size: int) -> tuple[str, int]:
    """A file of `data`, for `_map`: its path and when it was changed."""
    file = folder / lerobot.place(lerobot.DATA_PATH, number)
    try:
        found = file.stat()
    except OSError as error:
        raise SpearError(f"missing file: {file}: {error.strerror}; copy the dataset again") from error
    if found.st_size != size:
        raise SpearError(f"truncated or changed: {file}: {found.st_size} bytes, not {size}; copy it again")
    return str(file), found.st_mtime_ns


def _placed(file: tuple[str, int], offsets: Array, places: Array) -> FindImage:
    """Images that are slices of another file."""

    def find(row: int, step: int) -> bytes | None:
        first, length = places[int(offsets[row]) + step].tolist()
        return _map(*file)[first : first + length]

    return find


@functools.lru_cache(maxsize=MOST_MAPPED)
def _map(path: str, changed: int) -> Any:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SpearError(f"cannot read: {path}: {error.strerror}; copy the dataset again") from error
