"""A shard: many episodes in two files, with single steps found in them without copying.

`episodes-00000.arrow` is an Arrow record batch with one row per episode, whose steps are lists of
numbers. For each step, two numbers in the column `place:<camera>` say where in
`episodes-00000.images` its encoded image begins, and how long it is.

Nothing is compressed, so an image is a slice of mapped memory; Parquet would have to decode a
column chunk. Numbers and images have separate files, so that opening thousands of shards is fast.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from spear.errors import SpearError, summarize_error
from spear.types import ACTION_DIM, Array, Episode
from spear.util.files import refuse_lfs_pointer

PLACE_PREFIX = "place:"
FORMAT = "spear.episodes.2"
EPISODE_COLUMNS = {
    "instruction": pa.large_string(),
    "source": pa.large_string(),
    "rate_hz": pa.float64(),
    "success": pa.bool_(),
}
"""Column → its type, of the columns with one value per episode."""
STEP_COLUMNS = {
    "position": np.float32,
    "rotation": np.float32,
    "gripper": np.float32,
    "action": np.float32,
    "action_mask": np.uint8,
}
"""Column → type of its numbers, of the columns with one list per episode."""


def to_list_column(offsets: Array, rows: Array) -> pa.Array:
    """Convert rows [N] or [N, d] of all steps to one list per episode, of its steps · d numbers."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    numbers_per_row = rows.size // len(rows)
    return pa.LargeListArray.from_arrays(pa.array(offsets * numbers_per_row, pa.int64()), values)


def to_rows(column: pa.Array, width: int, num_steps: int) -> Array:
    """Invert `to_list_column`: a view [num_steps, width]."""
    values = column.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    if len(values) != num_steps:
        raise ValueError("columns have different numbers of steps")
    return values


class Shard:
    """One record batch, as numpy views of its columns without copies.

    Attributes:
        images: The file with the encoded images.
        offsets: [E + 1] where each episode's steps begin.
        rates_hz: [E] steps per second.
        num_known_actions: [E] how many steps of each episode have a known action.
        episode_columns: "instruction", "source" and "success" of each episode, as Arrow has them.
        image_places: Camera → [steps, 2] where in `images` each image begins, and its length in
            bytes, which is 0 if the episode has no such camera.

    Raises:
        ValueError, KeyError or an error of Arrow: If the batch is broken.
    """

    def __init__(self, batch: pa.RecordBatch, images: Path) -> None:
        batch.validate(full=True)
        columns = {name: batch.column(index) for index, name in enumerate(batch.schema.names)}
        for name, column in columns.items():
            if column.null_count and name != "success":
                raise ValueError("a cell is empty")

        self.images = images
        self.episode_columns = {
            name: columns[name] for name in ("instruction", "source", "success")
        }
        self.rates_hz = columns["rate_hz"].to_numpy()
        if not 0 < self.rates_hz.min() <= self.rates_hz.max() < np.inf:
            raise ValueError("a rate_hz is not above 0")

        self.offsets = columns["gripper"].offsets.to_numpy()
        num_steps = int(self.offsets[-1])
        self.position = to_rows(columns["position"], 3, num_steps)
        self.rotation = to_rows(columns["rotation"], 4, num_steps)
        self.gripper = to_rows(columns["gripper"], 1, num_steps)[:, 0]
        self.action = to_rows(columns["action"], ACTION_DIM, num_steps)
        self.action_mask = to_rows(columns["action_mask"], 1, num_steps)[:, 0]
        self.image_places: dict[str, Array] = {}
        for name, column in columns.items():
            if name.startswith(PLACE_PREFIX):
                camera = name.removeprefix(PLACE_PREFIX)
                self.image_places[camera] = to_rows(column, 2, num_steps)
        self.num_known_actions = np.add.reduceat(
            self.action_mask != 0, self.offsets[:-1], dtype=np.int64
        )

    def __len__(self) -> int:
        return len(self.rates_hz)

    @functools.cached_property
    def _image_bytes(self) -> memoryview:
        """The file of images, mapped when needed. Arrow's mapping holds no file handle."""
        with pa.memory_map(str(self.images)) as file:
            first_byte = file.read_buffer(1)
            num_bytes = file.size()
        return memoryview(pa.foreign_buffer(first_byte.address, num_bytes, first_byte))

    def image(self, row: int, step: int, camera: str) -> bytes | None:
        """Read the encoded image of one step; None if the episode has no such camera."""
        if camera not in self.image_places:
            return None
        steps = slice(*self.offsets[row : row + 2])
        first, length = self.image_places[camera][steps][step].tolist()
        return bytes(self._image_bytes[first : first + length]) or None

    def episode(self, row: int, with_images: bool) -> Episode:
        """Read the episode in a row, with its images as encoded bytes."""
        steps = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        texts = {name: column[row].as_py() for name, column in self.episode_columns.items()}
        return Episode(
            images=self._episode_images(row, steps.stop - steps.start) if with_images else {},
            position=self.position[steps],
            rotation=self.rotation[steps],
            gripper=self.gripper[steps],
            rate_hz=float(self.rates_hz[row]),
            action=self.action[steps],
            action_mask=self.action_mask[steps].astype(bool),
            **texts,
        )

    def _episode_images(self, row: int, num_steps: int) -> dict[str, Sequence[bytes]]:
        """Camera → encoded images of an episode, of the cameras that it has."""
        images: dict[str, Sequence[bytes]] = {}
        for camera in self.image_places:
            encoded_images = [self.image(row, step, camera) for step in range(num_steps)]
            if encoded_images[0] is not None:
                images[camera] = [image for image in encoded_images if image is not None]
        return images


def write_shard(path: Path, episodes: Sequence[Episode], note: Mapping[str, str]) -> None:
    """Write checked episodes with actions, and a note of keys and texts, onto the disk.

    Args:
        path: The Arrow file; the file of images gets the same name with the suffix ".images".
        episodes: At least one episode.
        note: Texts that `open_shard` gives back.
    """
    lengths = [len(episode) for episode in episodes]
    offsets = np.cumsum([0, *lengths])
    columns: dict[str, Any] = {}
    for name, arrow_type in EPISODE_COLUMNS.items():
        columns[name] = pa.array([getattr(episode, name) for episode in episodes], arrow_type)
    for name, dtype in STEP_COLUMNS.items():
        arrays = [np.asarray(getattr(episode, name), dtype) for episode in episodes]
        columns[name] = to_list_column(offsets, np.concatenate(arrays))

    with open(path.with_suffix(".images"), "wb") as file:
        for camera, image_places in _write_images(file, episodes).items():
            columns[PLACE_PREFIX + camera] = to_list_column(offsets, image_places)
        metadata = {"format": FORMAT, "bytes": str(file.tell()), **note}
        _flush_to_disk(file)

    batch = pa.RecordBatch.from_pydict(columns).replace_schema_metadata(metadata)
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        _flush_to_disk(file)


def _write_images(file: IO[bytes], episodes: Sequence[Episode]) -> dict[str, Array]:
    """Write the images of all cameras; returns camera → [steps, 2] place and length."""
    cameras: set[str] = set()
    for episode in episodes:
        cameras.update(episode.images)

    image_places: dict[str, Array] = {}
    for camera in sorted(cameras):
        images: list[bytes] = []
        for episode in episodes:
            images.extend(episode.images.get(camera, [b""] * len(episode)))
        lengths = np.array([len(image) for image in images])
        starts = file.tell() + np.cumsum(lengths) - lengths
        image_places[camera] = np.stack([starts, lengths], axis=1)
        file.writelines(images)
    return image_places


def _flush_to_disk(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def open_shard(path: Path) -> tuple[Shard, dict[str, str]]:
    """Map a shard into memory.

    Returns:
        The shard, and the note with which it was written.

    Raises:
        SpearError: If a file is missing, broken or truncated.
    """
    try:
        return _open_shard(path)
    except FileNotFoundError as error:
        raise SpearError(f"missing file: {error.filename}: copy the folder again") from error
    except (pa.ArrowException, OSError, KeyError, IndexError, ValueError) as error:
        refuse_lfs_pointer(path, path)
        raise SpearError(
            f"corrupt or truncated shard: {path}: {summarize_error(error)}; "
            "delete it or write it again"
        ) from error


def _open_shard(path: Path) -> tuple[Shard, dict[str, str]]:
    images = path.with_suffix(".images")
    with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
        metadata = reader.schema.metadata or {}
        note = {key.decode(): text.decode() for key, text in metadata.items()}
        if note.pop("format", None) != FORMAT:
            raise SpearError(
                f"other format: {path}: expected {FORMAT!r}; prepare or record it again"
            )
        shard = Shard(reader.get_batch(0), images)

    num_image_bytes = images.stat().st_size
    if num_image_bytes != int(note.pop("bytes")):
        refuse_lfs_pointer(images, images)
        raise SpearError(
            f"truncated or changed: {images}: it has {num_image_bytes} bytes; copy it again"
        )
    return shard, note
