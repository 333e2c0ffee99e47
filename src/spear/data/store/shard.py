"""A shard: two files with many episodes, of which any single step can be read without the others.

`episodes-00000.arrow` is an Arrow record batch with one row per episode. The numbers of an
episode's steps are one list in the cell of a column. `episodes-00000.images` consists of the
encoded images of all episodes, one after the other. For each step, the column `place:<camera>` has
two numbers: the byte of the images' file at which the step's image begins, and its length in bytes.

A shard that `spear serve --record` writes has one episode, and further columns `served:<name>`
(`ServedSteps`). It may still grow while it is read (`spear.data.store.growing_shard`).

Neither file is compressed. Both are mapped into memory, so reading an image is slicing memory,
whereas Parquet would have to decode a whole column chunk. Numbers and images have separate files,
so that opening thousands of shards is fast.
"""

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa

from spear.errors import SpearError, summarize_error
from spear.types import ACTION_DIM, Array, Episode
from spear.util.files import refuse_lfs_pointer

PLACE_PREFIX = "place:"
SERVED_PREFIX = "served:"
GROWING_NOTE = "growing"  # the key of a note: images may have been appended since it was written
SESSION_NOTE = "session"  # the key of a note: JSON that says which policy served which robot
FORMAT = "spear.episodes.2"
EPISODE_COLUMNS = {
    "instruction": pa.large_string(),
    "source": pa.large_string(),
    "rate_hz": pa.float64(),
    "success": pa.bool_(),
}
"""The columns with one value per episode → their types."""
STEP_COLUMNS = {
    "position": np.float32,
    "rotation": np.float32,
    "gripper": np.float32,
    "action": np.float32,
    "action_mask": np.uint8,
}
"""The columns with one list of numbers per episode → the types of these numbers."""


class ServedSteps(NamedTuple):
    """What a server knows of the T steps of an episode that it recorded.

    A step is one observation with its answer. The shard has a column for each field but `session`,
    with one flat list of numbers per step, and a column "num_rows" with the N of `rows`.

    Attributes:
        arrival_s: [T] when the observation arrived, Unix time.
        answer_s: [T] when its answer was ready, Unix time.
        inference_s: [T] how long the policy computed; batches count as a whole.
        actions: [T, H, 8] the action chunk that the policy predicted, in the layout of `Action`.
        rows: [T, N, n] the commands that the robot got: N rows of n numbers, into which the robot's
            control converts these actions.
        session: what the server told its clients: policy, embodiment, control, rate_hz.
    """

    arrival_s: Array
    answer_s: Array
    inference_s: Array
    actions: Array
    rows: Array
    session: Mapping[str, Any]


def to_list_column(offsets: Array, rows: Array) -> pa.Array:
    """Convert the numbers of all steps to a column with one flat list per episode.

    Args:
        offsets: [E + 1] the row at which each of E episodes begins, and the number of rows.
        rows: [N] or [N, d] the numbers of all steps of all episodes.

    Returns:
        A column of E lists. An episode of T steps has a list of T · d numbers.
    """
    numbers_per_row = rows.size // len(rows)
    list_offsets = pa.array(offsets * numbers_per_row, pa.int64())
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    return pa.LargeListArray.from_arrays(list_offsets, values)


def to_rows(column: pa.Array, width: int, num_steps: int) -> Array:
    """Invert `to_list_column`, without copying.

    Args:
        column: A column of lists.
        width: How many numbers a step has.
        num_steps: How many steps all episodes have together.

    Returns:
        A view [num_steps, width] of the column's numbers.

    Raises:
        ValueError: If the column has another number of steps.
    """
    values = column.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    if len(values) != num_steps:
        raise ValueError("columns have different numbers of steps")
    return values


class Shard:
    """The E episodes of a shard, as NumPy views of the columns of its record batch.

    The steps of all episodes follow each other; N is their number.

    Attributes:
        images_file: The file with the encoded images.
        offsets: [E + 1] the step at which each episode begins, and N.
        rates_hz: [E] steps per second.
        num_known_actions: [E] how many steps of each episode have a known action.
        episode_columns: "instruction", "source" and "success" of each episode, as Arrow columns.
        position, rotation, gripper, action, action_mask: [N, ...] these fields of `Episode`.
        image_places: Camera → [N, 2] the byte of `images_file` at which each image begins, and its
            length in bytes, which is 0 if the episode has no such camera.
        served_columns: Name of a field of `ServedSteps` → [N, d]; empty if no server recorded the
            shard.
        note: The note with which the shard was written.

    Raises:
        ValueError, KeyError, pa.ArrowException: If the batch is broken.
    """

    def __init__(self, batch: pa.RecordBatch, images_file: Path, note: Mapping[str, str]) -> None:
        batch.validate(full=True)
        columns = {name: batch.column(index) for index, name in enumerate(batch.schema.names)}
        for name, column in columns.items():
            if column.null_count and name != "success":
                raise ValueError("a cell is empty")

        self.images_file = images_file
        self.note = note
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
        self.served_columns: dict[str, Array] = {}
        for name, column in columns.items():
            if name.startswith(PLACE_PREFIX):
                camera = name.removeprefix(PLACE_PREFIX)
                self.image_places[camera] = to_rows(column, 2, num_steps)
            elif name.startswith(SERVED_PREFIX):
                width = len(column.values) // num_steps
                field = name.removeprefix(SERVED_PREFIX)
                self.served_columns[field] = to_rows(column, width, num_steps)
        # Sum the mask over the steps of each episode; an episode has at least one step.
        is_known = self.action_mask != 0  # [N]
        episode_starts = self.offsets[:-1]  # [E]
        self.num_known_actions = np.add.reduceat(is_known, episode_starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rates_hz)

    @functools.cached_property
    def _image_bytes(self) -> memoryview:
        """The bytes of the images' file, which is mapped when they are first needed.

        A mapping by Arrow stays valid after its file is closed, so thousands of shards need no file
        handles. The mapping lives as long as a buffer of it, so the memoryview of the whole file
        keeps the buffer of its first byte.
        """
        with pa.memory_map(str(self.images_file)) as file:
            first_byte = file.read_buffer(1)
            num_bytes = file.size()
        return memoryview(pa.foreign_buffer(first_byte.address, num_bytes, base=first_byte))

    def image(self, row: int, step: int, camera: str) -> bytes | None:
        """Read the encoded image of one step of the episode in a row.

        Returns None if the episode has no such camera.
        """
        if camera not in self.image_places:
            return None
        episode_start, episode_end = self.offsets[row : row + 2]
        episode_places = self.image_places[camera][episode_start:episode_end]  # [T, 2]
        start, num_bytes = episode_places[step].tolist()
        encoded = bytes(self._image_bytes[start : start + num_bytes])
        return encoded or None  # 0 bytes mean that the episode has no such camera

    def episode(self, row: int, with_images: bool) -> Episode:
        """Read the episode in a row, with encoded images or with no images at all."""
        steps = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        num_steps = steps.stop - steps.start
        texts = {name: column[row].as_py() for name, column in self.episode_columns.items()}
        return Episode(
            images=self._episode_images(row, num_steps) if with_images else {},
            position=self.position[steps],
            rotation=self.rotation[steps],
            gripper=self.gripper[steps],
            rate_hz=float(self.rates_hz[row]),
            action=self.action[steps],
            action_mask=self.action_mask[steps].astype(bool),
            **texts,
        )

    def served_steps(self, row: int) -> ServedSteps | None:
        """Read what a server knows of the episode in a row; None if no server recorded it."""
        if not self.served_columns:
            return None
        start, end = self.offsets[row : row + 2]
        num_steps = end - start
        columns: dict[str, Array] = {}  # field → [T, d]
        for field, values in self.served_columns.items():
            columns[field] = values[start:end]
        num_rows = int(columns["num_rows"][0, 0])  # N, the same at every step
        return ServedSteps(
            arrival_s=columns["arrival_s"][:, 0],
            answer_s=columns["answer_s"][:, 0],
            inference_s=columns["inference_s"][:, 0],
            actions=columns["actions"].reshape(num_steps, -1, ACTION_DIM),
            rows=columns["rows"].reshape(num_steps, num_rows, -1),
            session=json.loads(self.note[SESSION_NOTE]),
        )

    def _episode_images(self, row: int, num_steps: int) -> dict[str, Sequence[bytes]]:
        """Read the images of the episode in a row: camera → one encoded image per step.

        Cameras that the episode does not have are left out.
        """
        images: dict[str, Sequence[bytes]] = {}
        for camera in self.image_places:
            encoded_images = [self.image(row, step, camera) for step in range(num_steps)]
            if encoded_images[0] is not None:
                images[camera] = [image for image in encoded_images if image is not None]
        return images


def write_shard_files(path: Path, episodes: Sequence[Episode], note: Mapping[str, str]) -> None:
    """Write a shard, and wait until its files are on the disk.

    Args:
        path: The Arrow file. The file of images gets the same name with the suffix ".images".
        episodes: At least one checked episode, with canonical actions.
        note: Key → text, which becomes the shard's `note`.
    """
    with open(path.with_suffix(".images"), "wb") as file:
        image_places = _write_images(file, episodes)
        metadata = {"bytes": str(file.tell()), **note}
        flush_to_disk(file)
    with open(path, "wb") as file:
        write_table(file, make_columns(episodes, image_places), metadata)


def make_columns(
    episodes: Sequence[Episode], image_places: Mapping[str, Array]
) -> dict[str, pa.Array]:
    """Make the columns of a shard's Arrow file.

    Args:
        episodes: At least one checked episode, with canonical actions. Images are ignored.
        image_places: Camera → [N, 2] for each of the N steps of all episodes, the byte at which its
            image begins, and its length in bytes.
    """
    lengths = [len(episode) for episode in episodes]
    offsets = np.cumsum([0, *lengths])  # [E + 1]
    columns: dict[str, pa.Array] = {}
    for name, arrow_type in EPISODE_COLUMNS.items():
        columns[name] = pa.array([getattr(episode, name) for episode in episodes], arrow_type)
    for name, dtype in STEP_COLUMNS.items():
        arrays = [np.asarray(getattr(episode, name), dtype) for episode in episodes]
        columns[name] = to_list_column(offsets, np.concatenate(arrays))
    for camera, camera_places in image_places.items():
        columns[PLACE_PREFIX + camera] = to_list_column(offsets, camera_places)
    return columns


def write_table(
    file: IO[bytes], columns: Mapping[str, pa.Array], metadata: Mapping[str, str]
) -> None:
    """Write a shard's Arrow file, and wait until it is on the disk.

    Args:
        file: The opened file.
        columns: Name → column, as `make_columns` makes them.
        metadata: The note, and under "bytes" the size of the images' file.
    """
    batch = pa.RecordBatch.from_pydict(dict(columns))
    batch = batch.replace_schema_metadata({"format": FORMAT, **metadata})
    with pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)
    flush_to_disk(file)


def _write_images(file: IO[bytes], episodes: Sequence[Episode]) -> dict[str, Array]:
    """Write the images of all cameras to a file, camera after camera.

    Returns:
        Camera → [N, 2] for each of the N steps of all episodes, the byte at which its image begins,
        and its length in bytes, which is 0 if the episode has no such camera.
    """
    cameras: set[str] = set()
    for episode in episodes:
        cameras.update(episode.images)

    image_places: dict[str, Array] = {}
    for camera in sorted(cameras):
        images: list[bytes] = []
        for episode in episodes:
            no_images = [b""] * len(episode)
            images.extend(episode.images.get(camera, no_images))
        lengths = np.array([len(image) for image in images])  # [N]
        ends = file.tell() + np.cumsum(lengths)
        starts = ends - lengths
        image_places[camera] = np.stack([starts, lengths], axis=1)
        file.writelines(images)
    return image_places


def flush_to_disk(file: IO[bytes]) -> None:
    """Wait until everything written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def open_shard(path: Path) -> Shard:
    """Map a shard into memory.

    Raises:
        SpearError: If a file is missing, broken or truncated.
    """
    try:
        return _open_shard(path)
    except FileNotFoundError as error:
        raise SpearError(
            f"{error.filename} is missing, which is one of the two files of a shard. Copy it next "
            f"to the other, or delete {path.name} to leave its episodes out."
        ) from error
    except (pa.ArrowException, OSError, KeyError, IndexError, ValueError) as error:
        refuse_lfs_pointer(path, path)
        raise SpearError(
            f"the shard {path} is corrupt or truncated ({summarize_error(error)}). Copy this one "
            "file again, or delete it to leave its episodes out."
        ) from error


def _open_shard(path: Path) -> Shard:
    """Map a shard; see `open_shard`. Other errors than SpearError mean that a file is broken."""
    images_file = path.with_suffix(".images")
    with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
        metadata = reader.schema.metadata or {}
        note = {key.decode(): text.decode() for key, text in metadata.items()}
        if note.pop("format", None) != FORMAT:
            raise SpearError(
                f"{path} is in another format than {FORMAT}. Prepare or record it again."
            )
        num_expected_bytes = int(note.pop("bytes"))
        is_growing = note.pop(GROWING_NOTE, None) is not None
        only_batch = reader.get_batch(0)
        shard = Shard(only_batch, images_file, note)

    num_image_bytes = images_file.stat().st_size
    has_more_images = is_growing and num_image_bytes > num_expected_bytes
    if num_image_bytes != num_expected_bytes and not has_more_images:
        refuse_lfs_pointer(images_file, images_file)
        raise _make_wrong_size_error(images_file, num_image_bytes, num_expected_bytes)
    return shard


def _make_wrong_size_error(images_file: Path, num_bytes: int, num_written_bytes: int) -> SpearError:
    """The error for a file of images that has another size than it was written with."""
    if num_bytes < num_written_bytes:
        return SpearError(
            f"{images_file} has {num_bytes} of {num_written_bytes} bytes, because its copy was "
            "interrupted or the disk is full. Make space, and copy this one file again."
        )
    return SpearError(
        f"{images_file} has {num_bytes} bytes instead of {num_written_bytes}, because it belongs "
        f"to another {images_file.stem}. Copy both files of this shard from the same folder."
    )
