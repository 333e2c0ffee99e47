"""Many episodes as one Arrow record batch, and single steps found in it again without copying.

One row is one episode; its steps are lists of numbers. Images are either in the batch, as encoded bytes
(`image:<camera>`: recordings), or somewhere in another file that is mapped (`place:<camera>`: see
`spear.data.store.index`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from spear.errors import SpearError
from spear.types import ACTION_DIM, Array, Episode

IMAGE_PREFIX = "image:"


def number_columns(episodes: Sequence[Episode]) -> dict[str, pa.Array]:
    """Everything but the images of checked episodes with actions (see `with_actions`), as columns."""
    offsets = np.cumsum([0] + [len(e) for e in episodes])
    return {
        "instruction": pa.array([e.instruction for e in episodes], pa.large_string()),
        "source": pa.array([e.source for e in episodes], pa.large_string()),
        "rate_hz": pa.array([e.rate_hz for e in episodes], pa.float64()),
        "success": pa.array([e.success for e in episodes], pa.bool_()),
        "position": lists(offsets, np.concatenate([e.position for e in episodes])),
        "rotation": lists(offsets, np.concatenate([e.rotation for e in episodes])),
        "gripper": lists(offsets, np.concatenate([e.gripper for e in episodes])),
        "action": lists(offsets, np.concatenate([np.asarray(e.action, np.float32) for e in episodes])),
        "action_mask": lists(
            offsets, np.concatenate([np.asarray(e.action_mask, np.uint8) for e in episodes])
        ),
    }


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


class Images(Protocol):
    """A camera's images in a shard."""

    def find(self, row: int, step: int) -> bytes | None:
        """The encoded image of a step of the episode in this row, None when it has none."""
        ...


class _Inside:
    """Images that are in the batch itself."""

    def __init__(self, column: pa.Array, name: str, lengths: Array) -> None:
        self.where = column.offsets.to_numpy()
        counts = np.diff(self.where)
        if not ((counts == lengths) | (counts == 0)).all():
            raise ValueError(f"column {name!r} has another number of images than steps")
        _, ends, data = column.values.buffers()
        self.bounds = np.frombuffer(ends, np.int64)[: len(column.values) + 1]
        self.data = memoryview(data or b"")

    def find(self, row: int, step: int) -> bytes | None:
        first = int(self.where[row])
        if int(self.where[row + 1]) == first:
            return None
        return bytes(self.data[int(self.bounds[first + step]) : int(self.bounds[first + step + 1])])


FindImages = Callable[[Mapping[str, pa.Array], Array], Mapping[str, Images]]
"""(columns of a batch, its [E + 1] offsets of steps) -> camera -> its images."""


def images_inside(columns: Mapping[str, pa.Array], offsets: Array) -> dict[str, Images]:
    """The images of a recording."""
    return {
        name.removeprefix(IMAGE_PREFIX): _Inside(column, name, np.diff(offsets))
        for name, column in columns.items()
        if name.startswith(IMAGE_PREFIX)
    }


class Shard:
    """One record batch: numpy views of its columns, no copies.

    offsets [E + 1] of the steps; rates_hz [E]; known [E], how many steps of each episode have a known action;
    words: column -> instruction, source or success of each episode, as Arrow has them.
    Raises ValueError, KeyError or an error of Arrow when it is broken.
    """

    def __init__(self, batch: pa.RecordBatch, find_images: FindImages = images_inside) -> None:
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
        self.images = find_images(columns, self.offsets)
        self.known = np.add.reduceat(self.action_mask != 0, self.offsets[:-1], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rates_hz)

    def image(self, row: int, step: int, camera: str) -> bytes | None:
        """The encoded image of one step, or None when the episode has no such camera."""
        found = self.images.get(camera)
        return None if found is None else found.find(row, step)

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


def corrupt(path: Path, error: Exception) -> SpearError:
    """What to say of a file of episodes that is not in order."""
    reason = str(error).splitlines()[0]
    return SpearError(f"corrupt or truncated shard: {path}: {reason}; delete it or write it again")
