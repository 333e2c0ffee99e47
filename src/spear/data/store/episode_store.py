"""The store of episodes: random access to episodes and single frames of a folder, by memory mapping.

A folder of shards (`spear.data.store.shard`), recorded (`write_episodes`, to which several processes may
append) or prepared for training (`spear.data.store.prepare`). Episodes may differ in rate, cameras and sizes.
"""

import bisect
import contextlib
import copy
import hashlib
import itertools
import os
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from spear.data.store.shard import Shard, open_shard, write_shard
from spear.errors import SpearError, format_count, notice
from spear.types import Array, Episode
from spear.util.files import notice_missing_shards, read_json, report_write_errors

SHARD_GLOB = "episodes-*.arrow"
REQUEST_FILE = (
    "request.json"  # of a prepared folder: what it was made of, and how many shards it has
)
DIGESTED = 1000
"""Episodes whose numbers `EpisodeStore.fingerprint` reads (our choice)."""


def write_episodes(episodes: Iterable[Episode], folder: Path, shard_size: int = 256) -> int:
    """Append checked episodes, with canonical actions, as shards of `shard_size`; returns how many.

    A shard appears complete or not at all, and takes the next free number, so several processes may append
    to one folder. Raises SpearError for a bad episode, and for a full disk (what is written stays readable).
    """
    from spear.data.actions import add_actions, check_episode  # here: to read takes no PyTorch

    folder.mkdir(parents=True, exist_ok=True)
    checked, written = (add_actions(check_episode(episode)) for episode in episodes), 0
    while shard := list(itertools.islice(checked, shard_size)):
        add_shard(shard, folder, {})
        written += len(shard)
    return written


def add_shard(episodes: Sequence[Episode], folder: Path, note: Mapping[str, str]) -> None:
    """`write_shard` under the next free number. Raises SpearError when it cannot be written."""
    temporary = folder / f".episodes-{uuid.uuid4().hex}.arrow"
    files = temporary.with_suffix(".images"), temporary  # in this order: the second makes it count
    try:
        with report_write_errors(folder):
            write_shard(temporary, episodes, note)
            for number in itertools.count(len(list_shards(folder))):
                with contextlib.suppress(FileExistsError):
                    for file in files:
                        os.link(file, folder / f"episodes-{number:05d}{file.suffix}")
                    break
    finally:
        for file in files:
            file.unlink(missing_ok=True)


def remove_unfinished_shards(folder: Path) -> None:
    """Remove what killed writers have left of shards, from a folder to which nobody else is writing."""
    images = (
        file
        for file in folder.glob("episodes-*.images")
        if not file.with_suffix(".arrow").is_file()
    )
    for file in (*folder.glob(".episodes-*"), *images):
        file.unlink()


def list_shards(folder: Path) -> list[Path]:
    """The shards of a folder, in order."""
    return sorted(folder.glob(SHARD_GLOB))


class EpisodeStore:
    """The episodes of a folder: nothing is loaded until asked for.

    Every episode has canonical actions and a mask of those that are known.
    lengths, known and rates_hz [E] are each episode's steps, those with a known action, and steps per second;
    `is_complete` is False for a `subset`. Raises SpearError for a folder without episodes, or a broken file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.is_complete = True
        if not (files := list_shards(self.path)):
            raise SpearError(f"no episodes: {path}: no {SHARD_GLOB} in it; record or convert some")
        made = (
            read_json(self.path / REQUEST_FILE, "copy it again")
            if (self.path / REQUEST_FILE).is_file()
            else {}
        )
        notice_missing_shards(self.path, files, "copy it again", made.get("shards", 0))
        self._shards = [open_shard(file)[0] for file in files]
        self._bounds = np.cumsum([0] + [len(shard) for shard in self._shards]).tolist()
        self._ids = np.arange(self._bounds[-1])  # episodes of the folder that are in this store
        self.lengths: Array = np.concatenate([np.diff(shard.offsets) for shard in self._shards])
        self.known: Array = np.concatenate([shard.known for shard in self._shards])
        self.rates_hz: Array = np.concatenate([shard.rates_hz for shard in self._shards])

    def subset(self, indices: Sequence[int]) -> "EpisodeStore":
        """A store of only these episodes, in this order, sharing the mapped files."""
        store, chosen = copy.copy(self), np.asarray(indices, np.int64)
        store.is_complete = False
        for name in ("_ids", "lengths", "known", "rates_hz"):
            setattr(store, name, getattr(self, name)[chosen])
        return store

    def select_demonstrations(self) -> "EpisodeStore":
        """Without the episodes that are known to have failed (a notice). SpearError where none is left."""
        return self._without(self.failed_mask(), "failed", "give others")

    def select_cameras(self, cameras: Collection[str]) -> "EpisodeStore":
        """Without the episodes that none of these cameras has seen; a notice names others that have."""
        none = [np.zeros(len(shard), bool) for shard in self._shards]
        lengths = [
            [s.places[c][s.offsets[:-1], 1] for c in cameras if c in s.places] for s in self._shards
        ]
        seen = np.concatenate(
            [sum((n > 0 for n in of), no) for of, no in zip(lengths, none, strict=True)]
        )
        lacks = f"with no camera {' or '.join(cameras)} (there: {', '.join(self.cameras)})"
        store = self._without(~seen[self._ids], lacks, "name them so in its spear.json")
        absent, unused = sorted({*cameras} - {*self.cameras}), sorted({*self.cameras} - {*cameras})
        if absent and unused:
            what = f"no camera {' or '.join(absent)}, but {', '.join(unused)}, which is not learned from"
            notice(f"{self.path}: has {what}: if it is the same, name it so in its spear.json")
        return store

    def _without(self, lost: Array, why: str, wish: str) -> "EpisodeStore":
        words = f"{self.path}: {lost.sum()} of {format_count(len(self), 'episodes')} {why}"
        if lost.all():
            raise SpearError(f"{words}: nothing to learn from: {wish}")
        if not lost.any():
            return self
        notice(f"{words}: left out")
        store = self.subset(np.flatnonzero(~lost).tolist())
        store.is_complete = self.is_complete
        return store

    def failed_mask(self) -> Array:
        """[E] bool: which episodes are known to have failed."""
        success = [ended for shard in self._shards for ended in shard.words["success"].to_pylist()]
        return np.array([ended is False for ended in success])[self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Episode:
        """Episode `index`, its images as encoded bytes."""
        shard, row = self._find(index)
        return shard.episode(row, with_images=True)

    def __iter__(self) -> Iterator[Episode]:
        return (self[i] for i in range(len(self)))

    def _find(self, index: int) -> tuple[Shard, int]:
        number = int(self._ids[index])
        shard = bisect.bisect_right(self._bounds, number) - 1
        return self._shards[shard], number - self._bounds[shard]

    @property
    def cameras(self) -> list[str]:
        """Names of all cameras that occur."""
        return sorted({camera for shard in self._shards for camera in shard.places})

    def image(self, index: int, step: int, camera: str) -> bytes | None:
        """The encoded image of one step, or None when this episode has no such camera."""
        shard, row = self._find(index)
        return shard.image(row, step, camera)

    def source(self, index: int) -> str:
        """Where episode `index` came from."""
        shard, row = self._find(index)
        return str(shard.words["source"][row].as_py())

    def fingerprint(self, seen: bool = False) -> str:
        """What tells these episodes from others: all sources and lengths, and the numbers of some; or, with
        `seen`, all instructions and cameras, and the lengths of some encoded images."""
        digest = hashlib.sha256(self.lengths.tobytes())
        columns = (shard.words["instruction" if seen else "source"] for shard in self._shards)
        words = [
            word for column in columns for word in column.to_pylist()
        ]  # faster than one by one
        digest.update("".join(f"{words[number]}\0" for number in self._ids).encode())
        digest.update("\0".join(self.cameras if seen else ()).encode())
        for index in np.unique(np.linspace(0, len(self) - 1, DIGESTED).astype(int)).tolist():
            shard, row = self._find(index)
            steps = slice(*shard.offsets[row : row + 2])
            numbers = [
                shard.position,
                shard.rotation,
                shard.gripper,
                shard.action,
                shard.action_mask,
            ]
            for rows in [p[:, 1] for _, p in sorted(shard.places.items())] if seen else numbers:
                digest.update(rows[steps].tobytes())
        return digest.hexdigest()

    def episode_fingerprints(self) -> list[str]:
        """What tells each episode from others, wherever it lies: its length, first, middle and last pose."""
        each = map(self.without_images, range(len(self)))
        some = (
            (n, np.hstack([e.position, e.rotation])[[0, n // 2, -1]]) for e in each if (n := len(e))
        )
        told = (f"{n} {(poses.round(4) + 0.0).tolist()}" for n, poses in some)
        return [hashlib.sha256(text.encode()).hexdigest()[:12] for text in told]

    def without_images(self, index: int) -> Episode:
        """Episode `index` with its states and actions only (`images` is empty): cheap."""
        shard, row = self._find(index)
        return shard.episode(row, with_images=False)
