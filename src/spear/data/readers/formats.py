"""Which format a path is in, and its episodes: the one place that decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from spear.data.episode import SHARD_GLOB, EpisodeStore, is_store
from spear.data.readers.bad import OnBad
from spear.data.readers.bridge_raw import (
    find_numpy,
    find_raw,
    is_bridge_numpy,
    is_bridge_raw,
    read_bridge_numpy,
    read_bridge_raw,
)
from spear.data.readers.droid_raw import find_droid_raw, is_droid_raw, read_droid_raw
from spear.data.readers.lerobot import is_lerobot, open_lerobot, read_lerobot
from spear.data.readers.rlds import is_rlds, open_rlds, read_rlds
from spear.data.readers.spec import Layout
from spear.data.readers.splits import split_ranges
from spear.errors import SpearError
from spear.types import Episode

Reader = Callable[[str | Path, str, Layout, OnBad | None], Iterator[Episode]]


@dataclass(frozen=True)
class Format:
    """A way to keep robot demonstrations in a folder.

    title    what a user calls it.
    sign     what it is known by.
    is_one   whether a path is such a folder.
    lengths  split name -> episodes in each of its files.
    read     (path, split, layout or None, on_bad) -> episodes in our conventions, at their own rate.
    """

    title: str
    sign: str
    is_one: Callable[[str | Path], bool]
    lengths: Callable[[str | Path], Mapping[str, list[int]]]
    read: Reader


def _read_store(
    path: str | Path, split: str = "train", dataset: Layout = None, on_bad: OnBad | None = None
) -> Iterator[Episode]:
    """The episodes of a store; it needs no layout, and what is in it has been checked."""
    yield from open_split(path, split)


def open_split(path: str | Path, split: str = "train") -> EpisodeStore:
    """The episodes of a store that a split names; all of them are "train"."""
    store = EpisodeStore(path)
    ranges = split_ranges({"train": [len(store)]}, split, path)
    chosen = [i for _, first, end in ranges for i in range(first, end)]
    if not chosen:
        raise SpearError(f"no episodes: {path} split {split!r} is empty")
    return store.subset(chosen)


FORMATS: Mapping[str, Format] = {
    "store": Format(
        "a store of episodes", SHARD_GLOB, is_store, lambda p: {"train": [len(EpisodeStore(p))]}, _read_store
    ),
    "rlds": Format("an RLDS dataset", "features.json", is_rlds, lambda p: open_rlds(p).lengths, read_rlds),
    "lerobot": Format(
        "a LeRobot dataset", "meta/info.json", is_lerobot, lambda p: open_lerobot(p).lengths, read_lerobot
    ),
    "bridge_raw": Format(
        "raw BridgeData V2",
        "obs_dict.pkl",
        is_bridge_raw,
        lambda p: {name: [len(found)] for name, found in find_raw(p).items()},
        read_bridge_raw,
    ),
    "bridge_numpy": Format(
        "BridgeData V2 as NumPy",
        "out.npy",
        is_bridge_numpy,
        lambda p: {name: [len(found)] for name, found in find_numpy(p).items()},
        read_bridge_numpy,
    ),
    "droid_raw": Format(
        "raw DROID",
        "trajectory.h5",
        is_droid_raw,
        lambda p: {name: [len(found)] for name, found in find_droid_raw(p).items()},
        read_droid_raw,
    ),
}


def find_format(path: str | Path) -> str | None:
    """The name of the format that a path is in, or None."""
    return next((name for name, known in FORMATS.items() if known.is_one(path)), None)


def need_format(path: str | Path) -> str:
    """The name of the format that a path is in. Raises SpearError, saying what is known, when it is in
    none."""
    if not Path(path).exists():
        raise SpearError(f"no such folder: {path}: give a folder of robot episodes")
    found = find_format(path)
    if found is None:
        known = "; ".join(f"{f.title} ({f.sign})" for f in FORMATS.values())
        raise SpearError(f"no robot data: {path}: none of: {known}")
    return found


def read_episodes(
    path: str | Path,
    split: str = "train",
    dataset: Layout = None,
    on_bad: OnBad | None = None,
) -> Iterator[Episode]:
    """Episodes of a folder in any format we know, in our conventions, at their own rate, checked.

    dataset is the layout; without it, the folder's own `spear.json`, else the registry's entry of its name.
    Whatever is wrong with an episode raises SpearError naming it, or, with `on_bad`, is reported there and
    the episode is left out.
    """
    return FORMATS[need_format(path)].read(path, split, dataset, on_bad)


def episode_counts(path: str | Path) -> dict[str, int]:
    """Split name -> number of episodes."""
    return {name: sum(files) for name, files in FORMATS[need_format(path)].lengths(path).items()}


def episode_ranges(path: str | Path, split: str) -> list[tuple[str, int, int]]:
    """A split as (split name, first episode, end) ranges; see `split_ranges`."""
    return split_ranges(FORMATS[need_format(path)].lengths(path), split, path)


def dataset_name(path: str | Path) -> str:
    """What a dataset is called: RLDS says it itself (its folder is a version), of others it is the folder's
    name."""
    return open_rlds(path).name if need_format(path) == "rlds" else Path(path).resolve().name
