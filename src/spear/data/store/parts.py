"""The parts in which a dataset is prepared: what is complete counts, and is never done again.

A part is a file of `data`, one of `meta/episodes`, and an index of both with the numbers of its episodes (see
`spear.data.store.index`). It counts from the moment when its index is there under its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.aside import SetAside
from spear.data.normalize import save_sketches
from spear.data.store import schema as lerobot
from spear.data.store.index import INDEX, index_batch, open_index, read_batches, write_batches
from spear.data.store.lerobot_write import LeRobotWriter
from spear.data.store.ready import Ready
from spear.data.store.stats import Images, Look
from spear.errors import SpearError
from spear.types import Episode

SET_ASIDE = "set_aside.json"


@contextlib.contextmanager
def working(work: Path, request: Mapping[str, Any]) -> Iterator[Path]:
    """The folder of an unfinished preparation, held by this process; removed when nothing in it is of use.

    Raises SpearError when another process holds it, or when it was begun for something else.
    """
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SpearError(f"being prepared by another process: {work}: wait for it") from error
        file = work / "request.json"
        text = json.dumps(request, indent=1)
        if file.is_file() and any(work.glob("parts/*.arrow")):
            begun = json.loads(file.read_text())
            changed = [name for name in request if begun.get(name) != json.loads(text)[name]]
            if changed:
                raise SpearError(
                    f"another preparation was begun in {work}: with other {', '.join(changed)}: give the same "
                    "options to continue it, or remove that folder"
                )
        else:
            file.write_text(text)
        try:
            yield work
        finally:
            if work.is_dir() and not any(work.glob("parts/*.arrow")):
                shutil.rmtree(work, ignore_errors=True)


class Parts:
    """The parts of a dataset: those that are complete, and the one that is being written.

    work      holds `dataset`, which becomes the result, and `parts`, their indices.
    blocks    how many blocks are in complete parts.
    episodes  how many were written.
    """

    def __init__(self, work: Path, rate_hz: float, part_mb: float, aside: SetAside) -> None:
        self.folder, self.done = work / "dataset", work / "parts"
        self.rate_hz, self.part_mb, self.aside = rate_hz, part_mb, aside
        self.blocks = self.open_blocks = 0
        self.writer: LeRobotWriter | None = None
        self.waiting: list[Episode] = []
        self.bytes = 0

    @property
    def episodes(self) -> int:
        return self.writer.episodes if self.writer is not None else 0

    def resume(self) -> None:
        """Take over the complete parts, and remove what was written behind them."""
        self.folder.mkdir(exist_ok=True)
        self.done.mkdir(exist_ok=True)
        for file in sorted(self.done.glob("part-*.arrow")):
            note = json.loads(read_batches(file)[1]["part"])
            sizes = {camera: (h, w) for camera, (h, w) in note["sizes"].items()}
            writer = self.writer = self.writer or LeRobotWriter(self.folder, sizes, self.rate_hz)
            for shard in open_index(file, self.folder):
                for row in range(len(shard)):
                    writer.recall(shard.episode(row, with_images=False))
            for camera, (histogram, frames) in note["pictures"].items():
                writer.pictures[camera].add(Look(sizes[camera], np.array(histogram, np.int64), frames))
            writer.data_files += 1
            writer.meta_files += 1
            self.blocks = note["blocks"]
            self.aside.reasons += note["reasons"]
        self.open_blocks = self.blocks
        self._begin()
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Remove the files that belong to no complete part."""
        for template in (lerobot.DATA_PATH, lerobot.EPISODES_PATH):
            keep = {template.format(**lerobot.chunk_of(i)) for i in range(len(self._indices))}
            for path in self.folder.glob(f"{template.partition('/chunk')[0]}/*/*"):
                if str(path.relative_to(self.folder)) not in keep:
                    path.unlink()

    @property
    def _indices(self) -> list[Path]:
        return sorted(self.done.glob("part-*.arrow"))

    def _begin(self) -> None:
        """Begin a part."""
        self.waiting, self.bytes = [], 0
        self.reasons_before = len(self.aside.reasons)
        pictures = self.writer.pictures if self.writer is not None else {}
        self.seen_before = {camera: (p.histogram, p.frames) for camera, p in pictures.items()}

    def add(self, ready: list[Ready], reasons: list[str]) -> None:
        """Write a block; end the part when it is large enough."""
        for reason in reasons:
            self.aside(reason)
        for each in ready:
            sizes = {camera: seen.size for camera, seen in each.looks.items()}
            self.writer = self.writer or LeRobotWriter(self.folder, sizes, self.rate_hz)
            try:
                self.writer.check(each.episode, each.looks)
            except SpearError as error:
                self.aside(error)
                continue
            self.writer.add(each.episode, each.looks)
            self.waiting.append(each.episode)
            self.bytes += sum(len(image) for images in each.episode.images.values() for image in images)
        self.aside.check(self.episodes)
        self.open_blocks += 1
        if self.bytes >= self.part_mb * 2**20:
            self.end()

    def end(self) -> None:
        """Complete the part: from now on it counts."""
        if self.writer is None or not self.waiting:
            return
        number = self.writer.data_files
        self.writer.end_file()
        self.writer.write_episodes()
        for template in (lerobot.DATA_PATH, lerobot.EPISODES_PATH):
            _to_disk(self.folder / template.format(**lerobot.chunk_of(number)))
        note = {
            "blocks": self.open_blocks,
            "reasons": self.aside.reasons[self.reasons_before :],
            "sizes": self.writer.sizes,
            "pictures": {
                camera: self._seen_since(camera, pictures)
                for camera, pictures in self.writer.pictures.items()
            },
        }
        batch = index_batch(self.folder, number, self.waiting)
        write_batches(self.done / f"part-{number:06d}.arrow", [batch], {"part": json.dumps(note)})
        self.blocks = self.open_blocks
        self._begin()

    def abandon(self) -> None:
        """Close and remove what does not count: on a full disk, every byte does."""
        with contextlib.suppress(OSError):  # what went wrong first is told
            if self.writer is not None:
                self.writer.close()
        with contextlib.suppress(OSError):
            self._remove_unfinished()

    def _seen_since(self, camera: str, pictures: Images) -> tuple[list[list[int]], int]:
        histogram, frames = self.seen_before.get(camera, (0, 0))
        return (pictures.histogram - histogram).tolist(), pictures.frames - frames

    def finish(self, note: Mapping[str, str]) -> None:
        """End the last part, and write what sums up the dataset; `note` goes into the index."""
        self.end()
        assert self.writer is not None  # something good is there
        self.writer.finish()
        lerobot.write_json(self.folder / SET_ASIDE, self.aside.reasons)
        batches = (batch for file in self._indices for batch in read_batches(file)[0])
        write_batches(self.folder / INDEX, batches, note)
        save_sketches(self.folder)


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
