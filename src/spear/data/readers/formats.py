"""Robot demonstrations in a folder of any format: which format it is, and its episodes."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from spear.data.readers.build_episode import build_episode
from spear.data.readers.columns import RawEpisodes
from spear.data.readers.lerobot import INFO, LeRobotFolder, open_lerobot
from spear.data.readers.rlds import RldsFolder, open_rlds, rlds_folders
from spear.data.readers.splits import parse_split
from spear.data.readers.tfrecord import record_sums
from spear.data.store.episode_store import SHARD_GLOB, EpisodeStore, list_shards
from spear.errors import SpearError
from spear.types import Episode
from spear.util.fingerprints import hash_file_ends
from spear.util.skipped_items import SkippedItems

T = TypeVar("T")
OnError = Callable[[SpearError], None]
Dataset = RldsFolder | LeRobotFolder
"""A folder that other tools wrote: its metadata are read, its episodes are not yet."""
FORMATS: Mapping[
    str, tuple[str, Callable[[Path], object], Callable[[Path], Dataset | EpisodeStore]]
] = {
    "store": (f"a store of episodes ({SHARD_GLOB})", list_shards, EpisodeStore),
    "rlds": ("an RLDS dataset (features.json)", rlds_folders, open_rlds),
    "lerobot": (f"a LeRobot dataset ({INFO})", lambda path: (path / INFO).is_file(), open_lerobot),
}
"""Name -> what it is called and known by, whether a folder holds it, and how it is opened."""


def find_format(path: str | Path) -> str | None:
    """The name of the format that a path is in, or None."""
    return next((name for name, (_, holds, _) in FORMATS.items() if holds(Path(path))), None)


def check_holds_no_input(out: Path, action: str) -> None:
    """Raises SpearError for a folder to `action` into that holds robot data, a model or labels."""
    kinds = "config.json", "labels-*.parquet", "external/labels-*.parquet"
    if find_format(out) is not None or any(any(out.glob(kind)) for kind in kinds):
        raise SpearError(f"{out}: holds other files: {action} into a folder of its own")


def open_dataset(path: str | Path) -> Dataset | EpisodeStore:
    """A folder in any format. Raises SpearError when it is in none, or its metadata are broken."""
    if not Path(path).exists():
        raise SpearError(f"no such folder: {path}: give a folder of robot episodes")
    if (found := find_format(path)) is None:
        known = "; ".join(title for title, _, _ in FORMATS.values())
        raise SpearError(f"no robot data: {path}: none of: {known}")
    return FORMATS[found][2](Path(path))


def read_episodes(
    path: str | Path,
    split: str = "train",
    dataset: Path | None = None,
    on_bad: OnError | None = None,
) -> Iterator[Episode]:
    """Episodes of a folder in any format, in our conventions, at their own rate, checked.

    split     which episodes: "train", "train[:20%]", … (see `spear.data.readers.splits`).
    dataset   the layout; None for the dataset's own (see `find_layout`).
    Whatever is wrong with an episode raises SpearError naming it, or is reported to `on_bad` instead.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        yield from open_store_split(path, split)
        return
    spec = folder.load_layout(dataset)
    yield from convert_episodes(
        folder.read_steps(split, spec.images.values()), partial(build_episode, spec=spec), on_bad
    )


def convert_episodes(
    read: RawEpisodes, make: Callable[..., T], on_bad: OnError | None
) -> Iterator[T]:
    """What `make` makes of each episode's steps and `source`; what is wrong is as in `read_episodes`."""
    for source, steps in read:
        try:
            if isinstance(steps, SpearError):
                raise steps
            yield make(steps, source=source)
        except SpearError as error:
            if on_bad is None:
                raise
            on_bad(error)


def open_store_split(path: str | Path, split: str = "train") -> EpisodeStore:
    """The episodes of a store that a split names; all of them are "train"."""
    store = EpisodeStore(path)
    ranges = parse_split({"train": len(store)}, split, path)
    chosen = [i for _, first, end in ranges for i in range(first, end)]
    if not chosen:
        raise SpearError(f"no episodes: {path} split {split!r} is empty")
    return store if chosen == list(range(len(store))) else store.subset(chosen)


def check_enough_good(good: int, skipped: SkippedItems, path: str | Path, split: str) -> None:
    """At the end of a split: raises SpearError when too many of its episodes were bad, or all."""
    skipped.check(good, finished=good > 0)
    if good == 0:
        why = f": {skipped.reasons[-1]}" if skipped.reasons else " (the split is empty)"
        raise SpearError(f"no good episode: {path} split {split!r}{why}")


def count_episodes(data: str | Path | Dataset | EpisodeStore) -> Mapping[str, int]:
    """Split name -> number of episodes, of a path or of what is there, opened."""
    folder = open_dataset(data) if isinstance(data, str | Path) else data
    return {"train": len(folder)} if isinstance(folder, EpisodeStore) else folder.split_lengths


def fingerprint_dataset(folder: Dataset | EpisodeStore) -> str:
    """What tells the data of a folder from others; the larger part of them is not read."""
    if isinstance(folder, EpisodeStore):
        return folder.fingerprint() + folder.fingerprint(seen=True)
    records = b"".join(
        map(record_sums, sorted(folder.path.glob("*.tfrecord*")))
    )  # their ends are but images
    told = "info.json", "*.jsonl", "features.json", "dataset_info.json"
    return hash_file_ends(
        [folder.path], ("*.tfrecord*", "*.parquet", "*.mp4", "*.[jp]*g", *told), records
    )


def list_cameras(path: str | Path, layout: Path | None = None) -> list[str]:
    """The cameras of a folder's episodes, by our names. Raises SpearError where its columns are not known."""
    folder = open_dataset(path)
    return (
        folder.cameras
        if isinstance(folder, EpisodeStore)
        else list(folder.load_layout(layout).images)
    )


def get_dataset_name(path: str | Path) -> str:
    """What a dataset is called: as RLDS says; or as its folder, or the one above a version (1.0.0)."""
    if find_format(path) == "rlds":
        return open_rlds(path).name
    whole = Path(path).resolve()
    return whole.parent.name if re.fullmatch(r"\d+\.\d+\.\d+", whole.name) else whole.name
