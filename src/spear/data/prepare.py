"""From a robot dataset to a store that training reads: canonical, at 5 Hz, the bad episodes set aside."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spear.data.actions import RATE_HZ, resample
from spear.data.episode import write_episodes
from spear.data.oxe import DatasetSpec
from spear.data.rlds import read_rlds
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


def prepare_rlds(
    path: str | Path,
    out_dir: str | Path,
    split: str = "train",
    dataset: DatasetSpec | None = None,
    most_bad: float = 0.5,
) -> tuple[int, list[str]]:
    """Write an RLDS split as a store of canonical 5 Hz episodes; returns how many, and why not the rest.

    A broken record, or an episode that `check_episode` refuses, is set aside (much of BridgeData has no
    instruction). Raises SpearError when more than the share `most_bad` is bad, or nothing good is left.
    `out_dir` appears when everything is in it; it must be empty or not exist yet.
    """
    aside = SetAside(most_bad)
    out_dir = Path(out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise SpearError(f"not empty: {out_dir}: choose another folder for the episodes, or remove it")

    def good() -> Iterator[Episode]:
        count = 0
        for episode in read_rlds(path, split, dataset, aside):
            count += 1
            aside.check(count)
            yield resample(episode, RATE_HZ)
        aside.check(count)
        if count == 0:
            why = f": {aside.reasons[-1]}" if aside.reasons else " (the split is empty)"
            raise SpearError(f"no good episode: {path} split {split!r}{why}")

    part = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        written = write_episodes(good(), part)
        part.replace(out_dir)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return written, aside.reasons
