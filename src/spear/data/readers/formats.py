"""Robot demonstrations in a folder of any format: which format it is, and its episodes."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from spear.data.readers.build_episode import build_episode
from spear.data.readers.columns import RawEpisodes
from spear.data.readers.dataset_layout import DatasetLayout
from spear.data.readers.lerobot import INFO_FILE, LeRobotFolder, open_lerobot
from spear.data.readers.rlds import RldsFolder, find_rlds_folders, open_rlds
from spear.data.readers.splits import parse_split
from spear.data.readers.tfrecord import read_checksums
from spear.data.store.episode_store import SHARD_GLOB, EpisodeStore, list_shards
from spear.errors import SpearError
from spear.types import Episode
from spear.util.fingerprints import hash_file_ends
from spear.util.skipped_items import SkippedItems

T = TypeVar("T")
OnError = Callable[[SpearError], None]
Dataset = RldsFolder | LeRobotFolder
"""A folder that other tools wrote, with its metadata read."""

INPUT_FILES = ("config.json", "labels-*.parquet", "external/labels-*.parquet")
"""What marks a folder that holds a model or labels."""
HASHED_FILES = (
    "*.tfrecord*",
    "*.parquet",
    "*.mp4",
    "*.[jp]*g",
    "info.json",
    "*.jsonl",
    "features.json",
    "dataset_info.json",
)
"""The files that `fingerprint_dataset` looks at, by their names, sizes and ends."""


@dataclass(frozen=True)
class DataFormat:
    """A format of robot data: what messages call it, how it is detected, and what opens it."""

    title: str
    is_format_of: Callable[[Path], bool]
    open: Callable[[Path], Dataset | EpisodeStore]


FORMATS: Mapping[str, DataFormat] = {
    "store": DataFormat(
        title=f"a store of episodes ({SHARD_GLOB})",
        is_format_of=lambda path: bool(list_shards(path)),
        open=EpisodeStore,
    ),
    "rlds": DataFormat(
        title="an RLDS dataset (features.json)",
        is_format_of=lambda path: bool(find_rlds_folders(path)),
        open=open_rlds,
    ),
    "lerobot": DataFormat(
        title=f"a LeRobot dataset ({INFO_FILE})",
        is_format_of=lambda path: (path / INFO_FILE).is_file(),
        open=open_lerobot,
    ),
}
"""Format name → format, in the order in which a folder is tested."""


def find_format(path: str | Path) -> str | None:
    """Find the name of the format that a folder is in; None if it holds no robot data."""
    for name, data_format in FORMATS.items():
        if data_format.is_format_of(Path(path)):
            return name
    return None


def check_holds_no_input(out: Path, action: str) -> None:
    """Raise SpearError if an output folder holds robot data, a model or labels.

    Args:
        out: The output folder.
        action: What the command does, for the message: "train".
    """
    holds_data = find_format(out) is not None
    if holds_data or any(any(out.glob(pattern)) for pattern in INPUT_FILES):
        raise SpearError(f"{out}: holds other files: {action} into a folder of its own")


def open_dataset(path: str | Path) -> Dataset | EpisodeStore:
    """Open a folder of robot data in any format.

    Raises:
        SpearError: If the folder does not exist, is in no known format, or has broken metadata.
    """
    path = Path(path)
    if not path.exists():
        raise SpearError(f"no such folder: {path}: give a folder of robot episodes")

    format_name = find_format(path)
    if format_name is None:
        titles = "; ".join(data_format.title for data_format in FORMATS.values())
        raise SpearError(f"no robot data: {path}: none of: {titles}")
    return FORMATS[format_name].open(path)


def read_episodes(
    path: str | Path,
    split: str = "train",
    layout_file: Path | None = None,
    on_error: OnError | None = None,
) -> Iterator[Episode]:
    """Read the episodes of a folder in any format, in our conventions, at their own rate, checked.

    Args:
        path: The folder.
        split: Which episodes: "train", "train[:20%]", … (see `parse_split`).
        layout_file: The file that describes the dataset's layout; without it, the dataset's own
            layout is used (see `find_layout`).
        on_error: Called with the error of each bad episode, which is then skipped.

    Raises:
        SpearError: If the folder cannot be read; also for a bad episode, if `on_error` is None.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        yield from open_store_split(path, split)
        return

    layout = folder.load_layout(layout_file)
    yield from convert_episodes(
        read_layout_steps(folder, split, layout, layout.images.values()),
        partial(build_episode, layout=layout),
        on_error,
    )


def read_layout_steps(
    folder: Dataset, split: str, layout: DatasetLayout, images: Collection[str]
) -> RawEpisodes:
    """Read the columns of each episode of a split, with the instructions as texts.

    Args:
        folder: The dataset.
        split: Which episodes.
        layout: What the columns mean.
        images: The image columns to read.
    """
    raw_episodes = folder.read_steps(split, images)
    if isinstance(folder, LeRobotFolder):
        return folder.with_instruction_texts(raw_episodes, layout.instruction)
    return raw_episodes


def convert_episodes(
    raw_episodes: RawEpisodes, convert: Callable[..., T], on_error: OnError | None
) -> Iterator[T]:
    """Yield `convert(steps, source=source)` of each episode; errors are handled as in
    `read_episodes`."""
    for source, steps in raw_episodes:
        try:
            if isinstance(steps, SpearError):
                raise steps
            yield convert(steps, source=source)
        except SpearError as error:
            if on_error is None:
                raise
            on_error(error)


def open_store_split(path: str | Path, split: str = "train") -> EpisodeStore:
    """Open the episodes of a store that a split names; a store has the one split "train"."""
    store = EpisodeStore(path)
    indices: list[int] = []
    for _, first, end in parse_split({"train": len(store)}, split, path):
        indices.extend(range(first, end))
    if not indices:
        raise SpearError(f"no episodes: {path} split {split!r} is empty")

    is_whole_store = indices == list(range(len(store)))
    return store if is_whole_store else store.subset(indices)


def check_enough_good(num_good: int, skipped: SkippedItems, path: str | Path, split: str) -> None:
    """At the end of a split, raise SpearError if too many of its episodes were bad, or all."""
    skipped.check(num_good, finished=num_good > 0)
    if num_good == 0:
        reason = f": {skipped.summarize()}" if skipped.reasons else " (the split is empty)"
        raise SpearError(f"no good episode: {path} split {split!r}{reason}")


def count_episodes(data: str | Path | Dataset | EpisodeStore) -> Mapping[str, int]:
    """Count the episodes of each split of a folder, given by its path or already opened."""
    folder = open_dataset(data) if isinstance(data, str | Path) else data
    if isinstance(folder, EpisodeStore):
        return {"train": len(folder)}
    return folder.split_lengths


def fingerprint_dataset(folder: Dataset | EpisodeStore) -> str:
    """Hash what distinguishes the data of a folder from others, without reading most of it."""
    if isinstance(folder, EpisodeStore):
        return folder.fingerprint() + folder.content_fingerprint()

    # The ends of record files are only parts of images, so their checksums are hashed as well.
    record_files = sorted(folder.path.glob("*.tfrecord*"))
    checksums = b"".join(read_checksums(file) for file in record_files)
    return hash_file_ends([folder.path], HASHED_FILES, checksums)


def list_cameras(path: str | Path, layout_file: Path | None = None) -> list[str]:
    """List the cameras of a folder's episodes, by our names.

    Raises SpearError if nothing describes the folder's columns.
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        return folder.cameras
    return list(folder.load_layout(layout_file).images)


def get_dataset_name(path: str | Path) -> str:
    """Get the name of a dataset: from RLDS metadata, or from its folder.

    If the folder is named like a version (1.0.0), the folder above gives the name.
    """
    if find_format(path) == "rlds":
        return open_rlds(path).name

    folder = Path(path).resolve()
    is_version = re.fullmatch(r"\d+\.\d+\.\d+", folder.name)
    return folder.parent.name if is_version else folder.name
