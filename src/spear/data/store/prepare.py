"""From a robot dataset in any format to one that training reads at the speed of the decoder.

What is written is a LeRobot v3.0 dataset (`spear.data.store.lerobot_write`): canonical actions, 5 Hz, JPEGs
in the size that the model sees. Beside it lie `index.arrow`, by which `EpisodeStore` finds every image
without decoding Parquet, `sketches.npz` (see `spear.data.normalize`), and `skipped.json`: which episodes
were left out, and why.

Blocks of episodes are made ready by any number of processes and written in order: the bytes do not depend on
how many there are. Blocks are gathered in parts: a file of `data`, one of `meta/episodes`, and an index of
both. A part counts from the moment when its index is there under its name, in the folder `.OUT.part`; a run
that was killed continues behind the last one, and what was begun is written again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from spear.data.actions import RATE_HZ, resample, with_actions
from spear.data.normalize import save_sketches
from spear.data.readers.formats import Dataset, episode_counts, open_dataset, open_split, read_episodes
from spear.data.readers.spec import SPEC_FILE
from spear.data.readers.splits import split_ranges
from spear.data.store import schema as lerobot
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.index import INDEX, index_batch, open_shards, read_batches, write_batches
from spear.data.store.lerobot_write import LeRobotWriter
from spear.data.store.stats import ImageSample, sample_images
from spear.errors import SpearError
from spear.types import Episode
from spear.util import processes
from spear.util.files import check_new
from spear.util.images import decode_image, encode_jpeg, fit_image
from spear.util.ledger import Skipped, add_files, alone, same_settings
from spear.util.progress import ProgressBar

BLOCK = 16
"""Episodes that are made ready at a time (our choice)."""
PART_MB = 100
"""Images in a part: the size that LeRobot gives its files."""
MOST_BAD = 0.5
"""The share of bad episodes above which preparing is given up (our choice)."""
MARK = "request"
"""The note in the index that tells for which request a dataset was prepared."""
SKIPPED = "skipped.json"

Ready = tuple[Episode, Mapping[str, ImageSample]]
"""An episode with canonical actions, and what its images look like (see `sample_images`)."""


@dataclass(frozen=True)
class Conversion:
    """What is made of episodes.

    layout     what their columns mean, as for `read_episodes`.
    rate_hz    steps per second.
    sizes      camera -> (width, height) in pixels, "" for all others, brought to it with their aspect kept;
               those that have none stay as they are.
    quality    of the JPEGs, for images that are changed; colour is kept at full resolution (our choice).
    """

    layout: Path | None = None
    rate_hz: float = RATE_HZ
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    quality: int = 95


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    how: Conversion | None = None,
    workers: int = 0,
) -> tuple[int, list[str]]:
    """Make a dataset ready for training (see above); returns how many episodes it has, and why not the rest.

    path       in any format that `spear.data.readers.formats` knows; split says which of its episodes.
    how        what is made of them; by default at 5 Hz, images as they are.
    workers    processes that read and resize (0: this one). The result is the same, byte for byte.

    A broken or lost record, an episode that `check_episode` refuses (much of BridgeData has no instruction),
    one without a known action, and one that differs from the first in its cameras or image sizes is skipped.
    `out_dir` appears when everything is in it; the same call then finds it there, and does nothing. Raises
    SpearError when more than half are bad, or nothing good is left; when `out_dir` holds something else (also
    other episodes); and when it cannot be written (a full disk): then, as after any interruption, the same
    call continues.
    """
    path, out, how = Path(path), Path(out_dir), how or Conversion()
    todo: list[tuple[str, int]] = []  # pieces of the split as the readers take them, with their lengths
    for name, start, end in split_ranges(episode_counts(path), split, path):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            todo.append((f"{name}[{first}:{last}]", last - first))
    source = open_dataset(path)
    if isinstance(source, Dataset):
        source.spec(how.layout)  # says what is wrong with it before anything is written
    file = how.layout or path / SPEC_FILE
    request = {
        "path": str(path.resolve()),
        "data": _digest(source),
        "episodes": hashlib.sha256("\n".join(block for block, _ in todo).encode()).hexdigest(),
        "layout": repr(how.layout) + (file.read_text() if file.is_file() else ""),  # what columns mean
        "sizes": {name: list(size) for name, size in sorted(how.sizes.items())},
        "rate_hz": how.rate_hz,
        "quality": how.quality,
        "part_mb": PART_MB,
    }
    mark = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    if (out / INDEX).is_file() and (out / SKIPPED).is_file():
        if read_batches(out / INDEX)[1].get(MARK) == mark:
            return len(EpisodeStore(out)), json.loads((out / SKIPPED).read_text())
        raise SpearError(
            f"{out} was prepared from other episodes, or in another way (is {path} or its layout new?): "
            "remove that folder, or choose another --out"
        )
    check_new(out)
    work = out.with_name(f".{out.name}.part")
    try:
        with alone(work, "preparing data in", "request.json"):
            same_settings(work / "request.json", request, begun=any(work.glob("parts/*.arrow")))
            parts = _Parts(work, how.rate_hz)
            try:
                parts.resume()
                left, skipped = todo[parts.blocks :], parts.skipped
                before, total = (sum(n for _, n in some) for some in (todo[: parts.blocks], todo))
                bar = ProgressBar(f"preparing {path.name}", total, "episodes", before)
                advice = "use fewer --workers, and run the same command again: it continues"
                with bar, processes.pool(workers, __name__, advice) as pool:
                    make, splits = partial(make_ready, path, how), [block for block, _ in left]
                    results = processes.in_order(pool, make, splits, workers)
                    for (_, length), (ready, reasons) in zip(left, results, strict=True):
                        parts.add(ready, reasons)
                        bar.update(bar.done + length, f"{len(skipped.reasons)} skipped")
                _check_good(parts.episodes, skipped, path, split)
                parts.finish({MARK: mark})
            except BaseException:
                parts.abandon()
                raise
            (work / "dataset").replace(out)
            shutil.rmtree(work, ignore_errors=True)
            return parts.episodes, skipped.reasons
    except OSError as error:
        raise SpearError(
            f"cannot write: {out}: {error}; free some space and give the same command again (it "
            "continues), or choose another folder"
        ) from error


class _Parts:
    """The parts of a dataset: those that are complete, and the one that is being written.

    work      holds `dataset`, which becomes the result, and `parts`, their indices.
    blocks    how many blocks are in complete parts.
    """

    def __init__(self, work: Path, rate_hz: float) -> None:
        self.folder, self.done, self.rate_hz = work / "dataset", work / "parts", rate_hz
        self.skipped = Skipped(MOST_BAD)
        self.blocks = self.open_blocks = 0
        self.writer: LeRobotWriter | None = None
        self.waiting: list[Episode] = []

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
            for shard in open_shards(file, self.folder):
                for row in range(len(shard)):
                    writer.recall(shard.episode(row, with_images=False))
            for camera, (histogram, frames) in note["pictures"].items():
                writer.pictures[camera] = ImageSample(sizes[camera], np.array(histogram, np.int64), frames)
            writer.data_files += 1
            writer.meta_files += 1
            self.blocks = self.open_blocks = note["blocks"]
            self.skipped.reasons = note["reasons"]
        self._remove_unfinished()

    def _indices(self) -> list[Path]:
        return sorted(self.done.glob("part-*.arrow"))

    def _remove_unfinished(self) -> None:
        """Remove the files that belong to no complete part."""
        for template in (lerobot.DATA_PATH, lerobot.EPISODES_PATH):
            keep = {self.folder / lerobot.place(template, i) for i in range(len(self._indices()))}
            for path in {*self.folder.glob(f"{template.partition('/chunk')[0]}/*/*")} - keep:
                path.unlink()

    def add(self, ready: Sequence[Ready], reasons: Sequence[str]) -> None:
        """Write a block; end the part when it is large enough."""
        for reason in reasons:
            self.skipped(reason)
        for episode, samples in ready:
            sizes = {camera: seen.size for camera, seen in samples.items()}
            self.writer = self.writer or LeRobotWriter(self.folder, sizes, self.rate_hz)
            try:
                self.writer.check(episode, samples)
            except SpearError as error:
                self.skipped(error)
                continue
            self.writer.add(episode, samples)
            self.waiting.append(episode)
        self.skipped.check(self.episodes)
        self.open_blocks += 1
        images = (image for e in self.waiting for images in e.images.values() for image in images)
        if sum(map(len, images)) >= PART_MB * 2**20:
            self.end()

    def end(self) -> None:
        """Complete the part: from now on it counts."""
        if self.writer is None or not self.waiting:
            return
        number = self.writer.data_files
        self.writer.end_file()
        self.writer.write_episodes()
        for template in (lerobot.DATA_PATH, lerobot.EPISODES_PATH):
            _to_disk(self.folder / lerobot.place(template, number))
        seen = {camera: (s.histogram.tolist(), s.frames) for camera, s in self.writer.pictures.items()}
        reasons, sizes = self.skipped.reasons, self.writer.sizes
        note = {"blocks": self.open_blocks, "reasons": reasons, "sizes": sizes, "pictures": seen}
        batch = index_batch(self.folder, number, self.waiting)
        write_batches(self.done / f"part-{number:06d}.arrow", [batch], {"part": json.dumps(note)})
        self.blocks, self.waiting = self.open_blocks, []

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


def good_episodes(path: str | Path, split: str, layout: Path | None, skipped: Skipped) -> Iterator[Episode]:
    """The good episodes of a dataset in any format; the others go to `skipped`.

    Raises SpearError when too many are bad, or nothing good is left.
    """
    count = 0
    for episode in read_episodes(path, split, layout, skipped):
        count += 1
        skipped.check(count)
        yield episode
    _check_good(count, skipped, path, split)


def _check_good(good: int, skipped: Skipped, path: str | Path, split: str) -> None:
    """At the end of a split: raises SpearError when too many of its episodes were bad, or all."""
    skipped.check(good, finished=good > 0)
    if good == 0:
        why = f": {skipped.reasons[-1]}" if skipped.reasons else " (the split is empty)"
        raise SpearError(f"no good episode: {path} split {split!r}{why}")


def make_ready(path: Path, how: Conversion, split: str) -> tuple[list[Ready], list[str]]:
    """The good episodes of a split, and why not the others."""
    good: list[Ready] = []
    reasons: list[str] = []
    for episode in read_episodes(path, split, how.layout, lambda error: reasons.append(str(error))):
        try:
            good.append(_ready(episode, how))
        except SpearError as error:
            reasons.append(str(error))
    return good, reasons


def _ready(episode: Episode, how: Conversion) -> Ready:
    unknown = set(how.sizes) - {"", *episode.images}
    if unknown:
        known = ", ".join(sorted(episode.images))
        raise SpearError(f"no camera {min(unknown)!r}: {episode.source}: its cameras are {known}")
    episode = with_actions(resample(episode, how.rate_hz))
    if not np.any(episode.action_mask):
        raise SpearError(f"nothing to learn from: {episode.source}: none of its actions is known")
    images = {camera: _fit(episode, camera, how) for camera in episode.images}
    episode = dataclasses.replace(episode, images=images)
    return episode, sample_images(episode)


def _fit(episode: Episode, camera: str, how: Conversion) -> Sequence[bytes]:
    """A camera's images as JPEG in the size wanted; one that is so already stays, byte for byte."""
    size = how.sizes.get(camera, how.sizes.get(""))
    if size is None:
        return episode.images[camera]
    fitted = []
    for step, encoded in enumerate(episode.images[camera]):
        image = decode_image(encoded, f"{episode.source} step {step} camera {camera!r}")
        if image.shape[1::-1] != size or encoded[:2] != b"\xff\xd8":
            encoded = encode_jpeg(fit_image(image, size[1], size[0]), how.quality)
        fitted.append(encoded)
    return fitted


def _digest(source: Dataset | EpisodeStore) -> str:
    """What tells the data of a folder from others."""
    if isinstance(source, EpisodeStore):
        return source.digest()
    digest = hashlib.sha256()
    add_files(digest, source.path, ("*.tfrecord*", "*.parquet", "*.mp4"))
    return digest.hexdigest()


def folder_in(work: Path, path: Path, split: str) -> Path:
    """Where in a folder for such work a split of a dataset is prepared."""
    whole = path.resolve()
    return work / f"{whole.name}-{hashlib.sha256(f'{whole} {split}'.encode()).hexdigest()[:8]}"


def open_store(
    path: str | Path, work_dir: str | Path, split: str = "train", wait: bool = False
) -> tuple[EpisodeStore, list[str]]:
    """The episodes of a split of a folder in any format, as training reads them, and why some were skipped.

    A store (recorded or prepared) is opened as it is. Anything else is prepared first, once, into a folder of
    `work_dir` whose name depends on path and split. With `wait`, this process waits until another has done
    that.
    """
    if isinstance(open_dataset(path), EpisodeStore):
        return open_split(path, split), []
    target = folder_in(Path(work_dir), Path(path), split)
    while wait and not target.is_dir():
        time.sleep(0.5)
    reasons: list[str] = []
    if not wait:
        _, reasons = prepare(path, target, split)
    return EpisodeStore(target), reasons
