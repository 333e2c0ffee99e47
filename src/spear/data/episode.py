"""The store of episodes: a folder of Arrow IPC shards, read by memory mapping.

Knows how an `Episode` is checked, written and found again, and nothing of where it came from or what is
trained on it. One row of a shard is one episode; images are columns of encoded bytes, `image:<camera>`.

Why Arrow IPC (uncompressed) and not Parquet: training draws random single frames. Parquet has to decode
a column chunk to reach one row; an uncompressed Arrow file is its own index, so a frame is a slice of mapped
memory, and the operating system caches what is used. The images are compressed already (JPEG or PNG).
"""

from __future__ import annotations

import dataclasses
import functools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from spear.errors import SpearError
from spear.types import ACTION_DIM, Array, Episode

FORMAT = "spear.episodes.1"
SHARD_GLOB = "episodes-*.arrow"
IMAGE_PREFIX = "image:"
QUATERNION_TOLERANCE = 1e-3
"""How far a quaternion's norm may be from 1 and still be normalised instead of refused (our choice)."""


def check_episode(episode: Episode) -> Episode:
    """The same episode with float32 arrays, unit quaternions (w >= 0) and gripper openings in [0, 1].

    Raises SpearError, naming the episode and the step, for: no steps, arrays of different lengths, NaN or
    infinity, a quaternion whose norm is further than 1e-3 from 1, an empty instruction, a rate that is not
    positive, a gripper opening outside [0, 1] by more than 1e-3, no image at all.
    """
    name, steps = episode.source, len(episode)
    if steps == 0:
        raise SpearError(f"empty episode: {name}: it has no steps; leave it out")
    if not episode.instruction.strip():
        raise SpearError(f"empty instruction: {name}: say what the robot does, or leave the episode out")
    if not (np.isfinite(episode.rate_hz) and episode.rate_hz > 0):
        raise SpearError(f"bad rate {episode.rate_hz}: {name}: give the steps per second")
    if not episode.images:
        raise SpearError(f"no camera: {name}: an episode needs at least one camera's images")
    for camera, images in episode.images.items():
        _check_length(name, f"camera {camera!r}", len(images), steps)
        for step, image in enumerate(images):
            if not image:
                raise SpearError(f"empty image: {name} step {step} camera {camera!r}: leave the episode out")
    parts: dict[str, Any] = {
        "position": _array(name, "position", episode.position, (steps, 3)),
        "rotation": _unit(name, "rotation", _array(name, "rotation", episode.rotation, (steps, 4))),
        "gripper": _opening(name, "gripper", _array(name, "gripper", episode.gripper, (steps,))),
    }
    if episode.action is not None:
        action = _array(name, "action", episode.action, (steps, ACTION_DIM)).copy()
        action[:, 3:7] = _unit(name, "action rotation", action[:, 3:7])
        action[:, 7] = _opening(name, "action gripper", action[:, 7])
        parts["action"] = action
    if episode.action_mask is not None:
        mask = np.asarray(episode.action_mask, bool)
        _check_length(name, "action_mask", mask.shape[0], steps)
        parts["action_mask"] = mask
    return dataclasses.replace(episode, **parts)


def _check_length(name: str, what: str, length: int, steps: int) -> None:
    if length != steps:
        raise SpearError(f"lengths differ: {name}: {what} has {length} rows but there are {steps} steps")


def _array(name: str, what: str, values: Array, shape: tuple[int, ...]) -> Array:
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise SpearError(f"wrong shape: {name}: {what} is {array.shape}, expected {shape}")
    bad = ~np.isfinite(array.reshape(shape[0], -1)).all(axis=1)
    if bad.any():
        raise SpearError(
            f"not a number: {name} step {int(bad.argmax())}: {what} is {array[bad.argmax()].tolist()}"
        )
    return array


def _unit(name: str, what: str, quaternion: Array) -> Array:
    norm = np.linalg.norm(quaternion.astype(np.float64), axis=1)
    bad = np.abs(norm - 1) > QUATERNION_TOLERANCE
    if bad.any():
        step = int(bad.argmax())
        raise SpearError(
            f"not a rotation: {name} step {step}: {what} quaternion has norm {norm[step]:.4g}, expected 1; "
            "check the layout (w x y z) or leave the episode out"
        )
    unit = quaternion / norm[:, None]
    return np.where(unit[:, :1] < 0, -unit, unit).astype(np.float32)


def _opening(name: str, what: str, opening: Array) -> Array:
    bad = (opening < -1e-3) | (opening > 1 + 1e-3)
    if bad.any():
        step = int(bad.argmax())
        raise SpearError(
            f"gripper out of range: {name} step {step}: {what} is {opening[step]:.4g}, not in 0 … 1"
        )
    return np.clip(opening, 0, 1)


def write_episodes(
    episodes: Iterable[Episode], out_dir: str | Path, shard_size: int = 256, append: bool = False
) -> int:
    """Write checked episodes as shards of `shard_size`; returns how many were written.

    A shard appears complete or not at all, and takes the next free number, so several processes may append
    to one folder. Raises SpearError for a bad episode, for a folder that has episodes already (unless
    `append`), and when the disk is full (what is already written stays readable).
    """
    folder = Path(out_dir)
    if not append and any(folder.glob(SHARD_GLOB)):
        raise SpearError(f"episodes exist: {folder}: choose another folder, remove it, or append to it")
    folder.mkdir(parents=True, exist_ok=True)
    waiting: list[Episode] = []
    written = 0
    for episode in episodes:
        waiting.append(check_episode(episode))
        if len(waiting) == shard_size:
            written += _write_shard(waiting, folder)
            waiting = []
    return written + (_write_shard(waiting, folder) if waiting else 0)


def _write_shard(episodes: Sequence[Episode], folder: Path) -> int:
    table = _to_table(episodes)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=".episodes-", suffix=".tmp", dir=folder)
        with os.fdopen(handle, "wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_batch(table)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        number = len(list(folder.glob(SHARD_GLOB)))
        while True:
            try:
                os.link(temporary, folder / f"episodes-{number:05d}.arrow")
                return len(episodes)
            except FileExistsError:
                number += 1
    except OSError as error:
        raise SpearError(
            f"cannot write: {folder}: {error}; free some space or choose another folder"
        ) from error
    finally:
        if temporary:
            os.unlink(temporary)


def _to_table(episodes: Sequence[Episode]) -> pa.RecordBatch:
    offsets = np.cumsum([0] + [len(e) for e in episodes])
    columns: dict[str, pa.Array] = {
        "instruction": pa.array([e.instruction for e in episodes], pa.large_string()),
        "source": pa.array([e.source for e in episodes], pa.large_string()),
        "rate_hz": pa.array([e.rate_hz for e in episodes], pa.float64()),
        "success": pa.array([e.success for e in episodes], pa.bool_()),
        "position": _lists(offsets, np.concatenate([e.position for e in episodes])),
        "rotation": _lists(offsets, np.concatenate([e.rotation for e in episodes])),
        "gripper": _lists(offsets, np.concatenate([e.gripper for e in episodes])[:, None]),
    }
    empty = np.zeros((0, ACTION_DIM), np.float32)
    actions = [empty if e.action is None else e.action for e in episodes]
    columns["action"] = _lists(np.cumsum([0] + [len(a) for a in actions]), np.concatenate(actions))
    masks = [np.ones(len(e)) if e.action_mask is None else e.action_mask for e in episodes]
    columns["action_mask"] = _lists(offsets, np.concatenate(masks).astype(np.uint8)[:, None])
    for camera in sorted({camera for e in episodes for camera in e.images}):
        images = [list(e.images.get(camera, ())) for e in episodes]
        values = pa.array([image for each in images for image in each], pa.large_binary())
        where = pa.array(np.cumsum([0] + [len(each) for each in images]), pa.int64())
        columns[IMAGE_PREFIX + camera] = pa.LargeListArray.from_arrays(where, values)
    batch = pa.RecordBatch.from_pydict(columns)
    return batch.replace_schema_metadata({"format": FORMAT})


def _lists(offsets: Array, rows: Array) -> pa.Array:
    """[N, d] rows as one list per episode of N_e · d numbers."""
    values = pa.array(np.ascontiguousarray(rows).reshape(-1))
    return pa.LargeListArray.from_arrays(pa.array(offsets * rows.shape[1], pa.int64()), values)


class _Shard:
    """One mapped file: numpy views of its columns, no copies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pa.ipc.open_file(pa.memory_map(str(path))) as reader:
                if (reader.schema.metadata or {}).get(b"format") != FORMAT.encode():
                    raise SpearError(f"not an episode shard: {path}: expected {FORMAT!r}; record it again")
                batch = reader.get_batch(0)
            batch.validate(full=True)
            self._load(batch)
        except (pa.ArrowException, OSError, KeyError, IndexError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SpearError(
                f"corrupt or truncated shard: {path}: {reason}; delete it (the other shards stay usable) "
                "or write it again"
            ) from error

    def _load(self, batch: pa.RecordBatch) -> None:
        columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
        self.instructions: list[str] = columns["instruction"].to_pylist()
        self.sources: list[str] = columns["source"].to_pylist()
        self.rates: list[float] = columns["rate_hz"].to_pylist()
        self.successes: list[bool | None] = columns["success"].to_pylist()
        self.offsets = columns["gripper"].offsets.to_numpy()  # [E + 1]
        steps = int(self.offsets[-1])
        self.position = _rows(columns["position"], 3, steps)
        self.rotation = _rows(columns["rotation"], 4, steps)
        self.gripper = _rows(columns["gripper"], 1, steps)[:, 0]
        self.action_mask = _rows(columns["action_mask"], 1, steps)[:, 0]
        self.action_offsets = columns["action"].offsets.to_numpy() // ACTION_DIM
        self.action = _rows(columns["action"], ACTION_DIM, int(self.action_offsets[-1]))
        self.images: dict[str, tuple[Array, Array, memoryview]] = {}
        lengths = np.diff(self.offsets)
        for name, column in columns.items():
            if name.startswith(IMAGE_PREFIX):
                where, values = column.offsets.to_numpy(), column.values
                counts = np.diff(where)
                if not ((counts == lengths) | (counts == 0)).all():
                    raise ValueError(f"column {name!r} has another number of images than steps")
                _, ends, data = values.buffers()
                bounds = np.frombuffer(ends, np.int64)[: len(values) + 1]
                self.images[name.removeprefix(IMAGE_PREFIX)] = (where, bounds, memoryview(data or b""))

    def image(self, row: int, step: int, camera: str) -> bytes | None:
        if camera not in self.images:
            return None
        where, bounds, data = self.images[camera]
        first = int(where[row])
        if int(where[row + 1]) == first:
            return None
        return bytes(data[int(bounds[first + step]) : int(bounds[first + step + 1])])

    def episode(self, row: int, with_images: bool) -> Episode:
        rows = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        acted = slice(int(self.action_offsets[row]), int(self.action_offsets[row + 1]))
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
            instruction=self.instructions[row],
            rate_hz=self.rates[row],
            source=self.sources[row],
            action=self.action[acted] if acted.stop > acted.start else None,
            action_mask=self.action_mask[rows].astype(bool),
            success=self.successes[row],
        )


def _rows(column: pa.Array, width: int, steps: int) -> Array:
    values = column.values.to_numpy(zero_copy_only=True).reshape(-1, width)
    if len(values) != steps:
        raise ValueError("columns have different numbers of steps")
    return values


class EpisodeStore:
    """Random access to the episodes of a folder, and to single frames, by memory mapping.

    Opening maps the shards and reads their indices; nothing is loaded until asked for. Raises SpearError for
    a folder without episodes, and for a corrupt or truncated shard, naming it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        files = sorted(self.path.glob(SHARD_GLOB))
        if not files:
            raise SpearError(f"no episodes: {self.path}: no {SHARD_GLOB} in it; record or convert some")
        self._shards = [_Shard(file) for file in files]
        self._where = [(s, row) for s in self._shards for row in range(len(s.instructions))]

    def subset(self, indices: Sequence[int]) -> EpisodeStore:
        """A store of only these episodes, in this order, sharing the mapped files."""
        store = object.__new__(EpisodeStore)
        store.path, store._shards = self.path, self._shards
        store._where = [self._where[int(i)] for i in indices]
        return store

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: int) -> Episode:
        """Episode `index`, its images as encoded bytes."""
        shard, row = self._where[index]
        return shard.episode(row, with_images=True)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def lengths(self) -> Array:
        """[E] number of steps of each episode."""
        return np.array([shard.offsets[row + 1] - shard.offsets[row] for shard, row in self._where], np.int64)

    @property
    def cameras(self) -> list[str]:
        """Names of all cameras that occur."""
        return sorted({camera for shard in self._shards for camera in shard.images})

    def image(self, index: int, step: int, camera: str) -> bytes | None:
        """The encoded image of one step, or None when this episode has no such camera."""
        shard, row = self._where[index]
        return shard.image(row, step, camera)

    def instruction(self, index: int) -> str:
        """What the robot was asked to do in episode `index`."""
        shard, row = self._where[index]
        return shard.instructions[row]

    def source(self, index: int) -> str:
        """Where episode `index` came from."""
        shard, row = self._where[index]
        return shard.sources[row]

    def rate_hz(self, index: int) -> float:
        """Steps per second of episode `index`."""
        shard, row = self._where[index]
        return shard.rates[row]

    def without_images(self, index: int) -> Episode:
        """Episode `index` with its states and actions only (`images` is empty): cheap."""
        shard, row = self._where[index]
        return shard.episode(row, with_images=False)
