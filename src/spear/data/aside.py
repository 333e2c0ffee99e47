"""Bad episodes are set aside by name; too many of them end the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spear.data.readers.formats import read_episodes
from spear.data.readers.spec import Layout
from spear.errors import SpearError
from spear.types import Episode

FEWEST_SEEN = 20
"""Episodes to look at before a share of bad ones means anything."""


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
