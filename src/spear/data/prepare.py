"""From a robot dataset in any format to one that training reads at the speed of the decoder.

What is written is a LeRobot v3.0 dataset (`spear.data.lerobot_write`): canonical actions, 5 Hz, JPEGs in the
size that the model sees. Beside it lie `index.arrow`, by which `EpisodeStore` finds every image without
decoding Parquet, `sketches.npz` (see `spear.data.normalize`), and `set_aside.json`: which episodes were left
out, and why.

The work is done in blocks of episodes, made ready by any number of processes, and written in order: the bytes
do not depend on how many there are. Blocks are gathered in parts, one file of `data` each. A part counts when
its index is complete, in the folder `.OUT.part`; a run that was killed, by whatever, continues behind the
last one, and what was begun is written again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spear.data import lerobot_schema as lerobot
from spear.data.actions import RATE_HZ
from spear.data.episode import EpisodeStore
from spear.data.formats import need_format, read_episodes
from spear.data.images import FitImage
from spear.data.index import INDEX, index_batch, open_index, read_batches, write_batches
from spear.data.lerobot_stats import Images, Look
from spear.data.lerobot_write import LeRobotWriter, check_free
from spear.data.normalize import save_sketches
from spear.data.oxe import SPEC_FILE, Layout
from spear.data.ready import Ready, Wanted, blocks, ready_blocks
from spear.errors import SpearError
from spear.types import Episode

FEWEST_SEEN = 20
"""Episodes to look at before a share of bad ones means anything."""
QUALITY = 95
"""Of the JPEGs that are written; colour is kept at full resolution (our choice)."""
PART_MB = 100
"""Images in a part: the size that LeRobot gives its files."""
SET_ASIDE = "set_aside.json"


@dataclass
class SetAside:
    """Counts what is left out and why, and stops when it is more than `most` of all.

    Call it with the reason for each bad episode, and `check(good)` now and then. A reason given again (a file
    that ends too early is noticed by whoever reads behind its end) counts once.
    """

    most: float
    reasons: list[str] = field(default_factory=list)

    def __call__(self, reason: SpearError | str) -> None:
        if str(reason) not in self.reasons[-1:]:
            self.reasons.append(str(reason))

    def check(self, good: int) -> None:
        """Raises SpearError when, of enough episodes, too many were bad."""
        bad = len(self.reasons)
        if bad > self.most * (good + bad) and good + bad >= FEWEST_SEEN:
            raise SpearError(
                f"too many bad episodes: {bad} of the first {good + bad}, the last one: {self.reasons[-1]}; "
                "mend the dataset or its description, or allow a larger share"
            )

    def check_all(self, good: int, path: str | Path, split: str) -> None:
        """At the end: the same, and whether anything is left."""
        self.check(good)
        if good == 0:
            why = f": {self.reasons[-1]}" if self.reasons else " (the split is empty)"
            raise SpearError(f"no good episode: {path} split {split!r}{why}")


def good_episodes(path: str | Path, split: str, dataset: Layout, aside: SetAside) -> Iterator[Episode]:
    """The good episodes of a dataset in any format; the others go to `aside`.

    Raises SpearError when too many are bad (see `SetAside`), or nothing good is left.
    """
    count = 0
    for episode in read_episodes(path, split, dataset, aside):
        count += 1
        aside.check(count)
        yield episode
    aside.check_all(count, path, split)


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    dataset: Layout = None,
    most_bad: float = 0.5,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    fit_image: FitImage | None = None,
    rate_hz: float = RATE_HZ,
    quality: int = QUALITY,
    workers: int = 0,
    part_mb: float = PART_MB,
) -> tuple[int, list[str]]:
    """Make a dataset ready for training (see above); returns how many episodes it has, and why not the rest.

    path       in any format that `spear.data.formats` knows; split says which of its episodes.
    most_bad   the share of bad episodes at which it is given up.
    sizes      camera -> (width, height) of its images, "" for all others; `fit_image` brings them there. None
               keeps them as they are.
    quality    JPEG quality of images that are changed.
    workers    processes that read and resize (0: this one). The result is the same, byte for byte.
    part_mb    images, in MB, after which a part ends.

    A broken record, an episode that `check_episode` refuses (much of BridgeData has no instruction), and one
    that differs from the first in its cameras or image sizes is set aside. Raises SpearError when more than
    the share `most_bad` is bad, or nothing good is left; when `out_dir` is not empty; and when it cannot be
    written (a full disk): then, as after any interruption, the same call continues. `out_dir` appears when
    everything is in it.
    """
    out = Path(out_dir)
    check_free(out)
    if sizes and fit_image is None:
        raise SpearError("image sizes without a way to get there: give fit_image as well")
    wanted = Wanted(Path(path), dataset, rate_hz, dict(sizes or {}), fit_image, quality)
    todo = blocks(wanted.path, split)
    aside = SetAside(most_bad)
    request = {
        "path": str(wanted.path.resolve()),
        "episodes": hashlib.sha256("\n".join(todo).encode()).hexdigest(),
        "layout": _layout_text(wanted),
        "sizes": {name: list(size) for name, size in sorted(wanted.sizes.items())},
        "rate_hz": rate_hz,
        "quality": quality,
        "part_mb": part_mb,
    }
    try:
        with _working(out.with_name(f".{out.name}.part"), request) as work:
            parts = _Parts(work, rate_hz, part_mb, aside)
            try:
                parts.resume()
                with contextlib.closing(ready_blocks(wanted, todo[parts.blocks :], workers)) as results:
                    for ready, reasons in results:
                        parts.add(ready, reasons)
                aside.check_all(parts.episodes, path, split)
                parts.finish()
            except BaseException:
                parts.abandon()
                raise
            (work / "dataset").replace(out)
            shutil.rmtree(work, ignore_errors=True)
            return parts.episodes, aside.reasons
    except OSError as error:
        raise SpearError(
            f"cannot write: {out}: {error}; free some space and give the same command again (it continues), or "
            "choose another folder"
        ) from error


def _layout_text(wanted: Wanted) -> str:
    """What the columns are said to mean, to notice when that has changed."""
    given = wanted.dataset
    file = given if isinstance(given, Path) else wanted.path / SPEC_FILE
    return repr(given) + (file.read_text() if file.is_file() else "")


@contextlib.contextmanager
def _working(work: Path, request: Mapping[str, Any]) -> Iterator[Path]:
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


class _Parts:
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

    def finish(self) -> None:
        """End the last part, and write what sums up the dataset."""
        self.end()
        assert self.writer is not None  # something good is there
        self.writer.finish()
        lerobot.write_json(self.folder / SET_ASIDE, self.aside.reasons)
        batches = (batch for file in self._indices for batch in read_batches(file)[0])
        write_batches(self.folder / INDEX, batches, {})
        save_sketches(self.folder)


def _to_disk(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def open_store(path: str | Path, work_dir: str | Path) -> tuple[EpisodeStore, list[str]]:
    """The episodes of a folder in any format, as training reads them, and why some were set aside.

    A store (recorded or prepared) is opened as it is. Anything else is prepared first, once, into
    `work_dir`/<name of the folder>.
    """
    if need_format(path) == "store":
        return EpisodeStore(path), []
    target = Path(work_dir) / Path(path).resolve().name
    reasons: list[str] = []
    if not target.is_dir():
        _, reasons = prepare(path, target)
    return EpisodeStore(target), reasons
