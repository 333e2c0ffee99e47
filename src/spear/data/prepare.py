"""From a robot dataset to a store that training reads: canonical, at 5 Hz, the bad episodes set aside."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spear.data.actions import RATE_HZ, resample
from spear.data.episode import EpisodeStore, write_episodes
from spear.data.formats import need_format, open_split, read_episodes
from spear.data.oxe import Layout
from spear.errors import SpearError
from spear.types import Episode

FEWEST_SEEN = 20
"""Episodes to look at before a share of bad ones means anything."""


@dataclass
class SetAside:
    """Counts what is left out and why, and stops when it is more than `most` of all.

    Call it with the reason for each bad episode, and `check(good)` now and then.
    """

    most: float
    reasons: list[str] = field(default_factory=list)

    def __call__(self, reason: SpearError) -> None:
        self.reasons.append(str(reason))

    def check(self, good: int) -> None:
        """Raises SpearError when, of enough episodes, too many were bad."""
        bad = len(self.reasons)
        if bad > self.most * (good + bad) and good + bad >= FEWEST_SEEN:
            raise SpearError(
                f"too many bad episodes: {bad} of the first {good + bad}, the last one: {self.reasons[-1]}; "
                "mend the dataset or its description, or allow a larger share"
            )


def good_episodes(path: str | Path, split: str, dataset: Layout, aside: SetAside) -> Iterator[Episode]:
    """The good episodes of a dataset in any format; the others go to `aside`.

    Raises SpearError when too many are bad (see `SetAside`), or nothing good is left.
    """
    count = 0
    for episode in read_episodes(path, split, dataset, aside):
        count += 1
        aside.check(count)
        yield episode
    aside.check(count)
    if count == 0:
        why = f": {aside.reasons[-1]}" if aside.reasons else " (the split is empty)"
        raise SpearError(f"no good episode: {path} split {split!r}{why}")


def prepare(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    dataset: Layout = None,
    most_bad: float = 0.5,
) -> tuple[int, list[str]]:
    """Write a dataset as a store of canonical 5 Hz episodes; returns how many, and why not the rest.

    path is in any format that `spear.data.formats` knows; split says which of its episodes.

    A broken record, or an episode that `check_episode` refuses, is set aside (much of BridgeData has no
    instruction). Raises SpearError when more than the share `most_bad` is bad, or nothing good is left.
    `out_dir` appears when everything is in it; it must be empty or not exist yet.
    """
    aside = SetAside(most_bad)
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise SpearError(f"not empty: {out_dir}: choose another folder for the episodes, or remove it")

    part = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        good = good_episodes(path, split, dataset, aside)
        written = write_episodes((resample(episode, RATE_HZ) for episode in good), part)
        part.replace(out_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return written, aside.reasons


def open_store(
    path: str | Path, work_dir: str | Path, split: str = "train", wait: bool = False
) -> tuple[EpisodeStore, list[str]]:
    """The episodes of a split of a folder in any format, as training reads them, and why some were set aside.

    A store is opened as it is. Anything else is prepared first, once, into a folder of `work_dir` whose name depends on
    path and split. With `wait`, another process does that, and this one waits until it has.
    """
    if need_format(path) == "store":
        return open_split(path, split), []
    whole = Path(path).resolve()
    key = hashlib.sha256(f"{whole} {split}".encode()).hexdigest()[:8]
    target = Path(work_dir) / f"{whole.name}-{key}"
    while wait and not target.is_dir():
        time.sleep(0.5)
    reasons: list[str] = []
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        _, reasons = prepare(path, target, split)
    return EpisodeStore(target), reasons
