"""Robot demonstrations in a folder of any format: which format it is, and its episodes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from spear.data.readers.layout import Steps, episode_from
from spear.data.readers.lerobot import is_lerobot, open_lerobot
from spear.data.readers.rlds import is_rlds, open_rlds
from spear.data.readers.spec import DatasetSpec, Layout
from spear.data.readers.splits import split_ranges
from spear.data.store.episode_store import SHARD_GLOB, EpisodeStore, is_store
from spear.errors import SpearError
from spear.types import Episode

OnBad = Callable[[SpearError], None]
"""Takes the reason why an episode was left out."""

FORMATS: Mapping[str, tuple[str, Callable[[str | Path], bool]]] = {
    "store": (f"a store of episodes ({SHARD_GLOB})", is_store),
    "rlds": ("an RLDS dataset (features.json)", is_rlds),
    "lerobot": ("a LeRobot dataset (meta/info.json)", is_lerobot),
}
"""Name -> what it is called and known by, and whether a path is in it."""


class Dataset(Protocol):
    """A folder that other people's tools wrote: its metadata are read, its episodes are not yet."""

    @property
    def name(self) -> str:
        """What the dataset is called: by it, the registry knows its layout."""
        ...

    @property
    def path(self) -> Path:
        """Its folder, in which a `spear.json` may be."""
        ...

    @property
    def lengths(self) -> Mapping[str, list[int]]:
        """Split name -> episodes in each of its files."""
        ...

    def spec(self, given: Layout = None) -> DatasetSpec:
        """What its columns mean; see `find_spec`."""
        ...

    def steps(
        self, split: str, images: Collection[str] | None = None
    ) -> Iterator[tuple[str, Steps | SpearError]]:
        """(source, step arrays) of each episode of a split, or the reason why it cannot be read.

        images  the columns of images that are needed, None for all; others may be left out.
        """
        ...


def find_format(path: str | Path) -> str | None:
    """The name of the format that a path is in, or None."""
    return next((name for name, (_, is_one) in FORMATS.items() if is_one(path)), None)


def need_format(path: str | Path) -> str:
    """The name of the format that a path is in. Raises SpearError, saying what is known, when it is in none."""
    if not Path(path).exists():
        raise SpearError(f"no such folder: {path}: give a folder of robot episodes")
    found = find_format(path)
    if found is None:
        raise SpearError(f"no robot data: {path}: none of: {'; '.join(title for title, _ in FORMATS.values())}")
    return found


def open_dataset(path: str | Path) -> Dataset | EpisodeStore:
    """Open a folder in any format we know. Raises SpearError when it is in none, or its metadata are broken."""
    name = need_format(path)
    return EpisodeStore(path) if name == "store" else open_rlds(path) if name == "rlds" else open_lerobot(path)


def read_episodes(
    path: str | Path, split: str = "train", dataset: Layout = None, on_bad: OnBad | None = None
) -> Iterator[Episode]:
    """Episodes of a folder in any format, in our conventions, at their own rate, checked.

    split     which episodes: "train", "train[:20%]", … (see `spear.data.readers.splits`).
    dataset   the layout; without it, the folder's own `spear.json`, else the registry's entry of its name. A
              store needs none.
    Whatever is wrong with an episode raises SpearError naming it, or, with `on_bad`, is reported there and
    the episode is left out.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        yield from open_split(path, split)
        return
    spec = folder.spec(dataset)
    columns = [column.partition("[")[0] for column in spec.images.values()]
    for source, steps in folder.steps(split, columns):
        try:
            if isinstance(steps, SpearError):
                raise steps
            episode = episode_from(steps, spec, source)
        except SpearError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield episode


def open_split(path: str | Path, split: str = "train") -> EpisodeStore:
    """The episodes of a store that a split names; all of them are "train"."""
    store = EpisodeStore(path)
    chosen = [i for _, first, end in split_ranges({"train": [len(store)]}, split, path) for i in range(first, end)]
    if not chosen:
        raise SpearError(f"no episodes: {path} split {split!r} is empty")
    return store.subset(chosen)


def episode_lengths(path: str | Path) -> Mapping[str, list[int]]:
    """Split name -> number of episodes in each of its files."""
    folder = open_dataset(path)
    return {"train": [len(folder)]} if isinstance(folder, EpisodeStore) else folder.lengths


def episode_counts(path: str | Path) -> dict[str, int]:
    """Split name -> number of episodes."""
    return {name: sum(files) for name, files in episode_lengths(path).items()}


def dataset_name(path: str | Path) -> str:
    """What a dataset is called: RLDS says it itself (its folder is a version), others are called like their
    folder."""
    folder = open_dataset(path)
    return Path(path).resolve().name if isinstance(folder, EpisodeStore) else folder.name
