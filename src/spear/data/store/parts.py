"""The parts in which a dataset is prepared: what is complete counts, and is never done again.

A part is a file of `data`, one of `meta/episodes`, and an index of both with the numbers of its episodes (see
`spear.data.store.index`). It counts from the moment when its index is there under its name.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spear.data.normalize import save_sketches
from spear.data.store import schema as lerobot
from spear.data.store.index import INDEX, index_batch, open_index, read_batches, write_batches
from spear.data.store.lerobot_write import LeRobotWriter
from spear.data.store.stats import ImageSample
from spear.errors import SpearError
from spear.types import Episode
from spear.util.ledger import Skipped

SKIPPED = "skipped.json"


@dataclass(frozen=True)
class Ready:
    """An episode with canonical actions, and what its images look like (see `sample_images`)."""

    episode: Episode
    samples: Mapping[str, ImageSample]


class Parts:
    """The parts of a dataset: those that are complete, and the one that is being written.

    work      holds `dataset`, which becomes the result, and `parts`, their indices.
    blocks    how many blocks are in complete parts.
    """

    def __init__(self, work: Path, rate_hz: float, part_mb: float, skipped: Skipped) -> None:
        self.folder, self.done = work / "dataset", work / "parts"
        self.rate_hz, self.part_mb, self.skipped = rate_hz, part_mb, skipped
        self.blocks = self.open_blocks = 0
        self.writer: LeRobotWriter | None = None

    @property
    def episodes(self) -> int:
        """How many were written."""
        return self.writer.episodes if self.writer is not None else 0

    def resume(self) -> None:
        """Take over the complete parts, and remove what was written behind them."""
        self.folder.mkdir(exist_ok=True)
        self.done.mkdir(exist_ok=True)
        for file in self._indices():
            note = json.loads(read_batches(file)[1]["part"])
            sizes = {camera: (h, w) for camera, (h, w) in note["sizes"].items()}
            writer = self.writer = self.writer or LeRobotWriter(self.folder, sizes, self.rate_hz)
            for shard in open_index(file, self.folder):
                for row in range(len(shard)):
                    writer.recall(shard.episode(row, with_images=False))
            for camera, (histogram, frames) in note["pictures"].items():
                writer.pictures[camera].add(ImageSample(sizes[camera], np.array(histogram, np.int64), frames))
            writer.data_files += 1
            writer.meta_files += 1
            self.blocks = note["blocks"]
            self.skipped.reasons += note["reasons"]
        self.open_blocks = self.blocks
        self._begin()
        self._remove_unfinished()

    def _indices(self) -> list[Path]:
        return sorted(self.done.glob("part-*.arrow"))

    def _remove_unfinished(self) -> None:
        """Remove the files that belong to no complete part."""
        for template in (lerobot.DATA_PATH, lerobot.EPISODES_PATH):
            keep = {template.format(**lerobot.chunk_of(i)) for i in range(len(self._indices()))}
            for path in self.folder.glob(f"{template.partition('/chunk')[0]}/*/*"):
                if str(path.relative_to(self.folder)) not in keep:
                    path.unlink()

    def _begin(self) -> None:
        """Begin a part."""
        self.waiting: list[Episode] = []
        self.bytes = 0
        self.reasons_before = len(self.skipped.reasons)
        pictures = self.writer.pictures if self.writer is not None else {}
        self.seen_before = {camera: (p.histogram, p.frames) for camera, p in pictures.items()}

    def add(self, ready: Sequence[Ready], reasons: Sequence[str]) -> None:
        """Write a block; end the part when it is large enough."""
        for reason in reasons:
            self.skipped(reason)
        for each in ready:
            sizes = {camera: seen.size for camera, seen in each.samples.items()}
            self.writer = self.writer or LeRobotWriter(self.folder, sizes, self.rate_hz)
            try:
                self.writer.check(each.episode, each.samples)
            except SpearError as error:
                self.skipped(error)
                continue
            self.writer.add(each.episode, each.samples)
            self.waiting.append(each.episode)
            self.bytes += sum(len(image) for images in each.episode.images.values() for image in images)
        self.skipped.check(self.episodes)
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
        pictures = {}  # camera -> the histogram of its images in this part, and of how many frames
        for camera, seen in self.writer.pictures.items():
            histogram, frames = self.seen_before.get(camera, (0, 0))
            pictures[camera] = (seen.histogram - histogram).tolist(), seen.frames - frames
        note = {
            "blocks": self.open_blocks,
            "reasons": self.skipped.reasons[self.reasons_before :],
            "sizes": self.writer.sizes,
            "pictures": pictures,
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

    def finish(self, note: Mapping[str, str]) -> None:
        """End the last part, and write what sums up the dataset; `note` goes into the index."""
        self.end()
        assert self.writer is not None  # something good is there
        self.writer.finish()
        lerobot.write_json(self.folder / SKIPPED, self.skipped.reasons)
        batches = (batch for file in self._indices() for batch in read_batches(file)[0])
        write_batches(self.folder / INDEX, batches, note)
        save_sketches(self.folder)


def _to_disk(path: Path) -> None:
    """A part must be on the disk before its index says that it is there."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
