"""Finds out in which format a folder of robot demonstrations is, and reads its episodes."""

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
from spear.errors import SpearError, format_alternatives, format_count
from spear.types import Episode
from spear.util.fingerprints import hash_names_sizes_and_tails
from spear.util.skipped_items import SkippedItems

T = TypeVar("T")
OnError = Callable[[SpearError], None]
Dataset = RldsFolder | LeRobotFolder
"""A folder that other tools wrote, with its metadata read. An `EpisodeStore` is our own format."""

INPUT_FILES = ("config.json", "labels-*.parquet", "external/labels-*.parquet")
"""Patterns of the files by which a folder of a model or of labels is recognized."""
HASHED_FILES = (
    "*.tfrecord*",
    "*.parquet",
    "*.mp4",
    "*.[jp]*g",  # jpg, jpeg, png
    "info.json",
    "*.jsonl",
    "features.json",
    "dataset_info.json",
)
"""Patterns of the files of which `fingerprint_dataset` hashes names, sizes and last bytes."""


@dataclass(frozen=True)
class DataFormat:
    """A format of robot data.

    Attributes:
        title: What messages call the format.
        is_format_of: Whether a folder is in this format.
        open: Reads the metadata of a folder in this format.
    """

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
"""Format name → format. `find_format` tests the formats in this order."""


def find_format(path: str | Path) -> str | None:
    """Find the name of the format that a folder is in; None if it holds no robot data."""
    for name, data_format in FORMATS.items():
        if data_format.is_format_of(Path(path)):
            return name
    return None


def find_stores_in_subfolders(folder: Path) -> list[Path]:
    """Find the stores of episodes in the folders of a folder.

    `spear train` prepares such stores in `RUN/data`.
    """
    return sorted(child for child in folder.glob("[!.]*") if list_shards(child))


def check_holds_no_input(out: Path, verb: str) -> None:
    """Raise SpearError if an output folder contains robot data, a model or labels.

    Args:
        out: The output folder.
        verb: What the command does, for the message: "train".
    """
    has_robot_data = find_format(out) is not None
    has_model_or_labels = any(any(out.glob(pattern)) for pattern in INPUT_FILES)
    if has_robot_data or has_model_or_labels:
        raise SpearError(f"{out} contains other files. Choose an empty folder to {verb} into.")


def open_dataset(path: str | Path) -> Dataset | EpisodeStore:
    """Open a folder of robot data in any format.

    Args:
        path: The folder.

    Returns:
        A recorded or prepared folder as an `EpisodeStore`, any other as a `Dataset` with the
        columns as they are in the files.

    Raises:
        SpearError: If the folder does not exist, is in no known format, or has broken metadata.

    Example:
        >>> dataset = open_dataset("my_robot")  # doctest: +SKIP
        >>> dataset.splits  # doctest: +SKIP
        {'train': 50}
    """
    path = Path(path)
    if not path.exists():
        raise SpearError(f"there is no folder {path}. Give a folder of robot episodes.")

    format_name = find_format(path)
    if format_name is None:
        stores = find_stores_in_subfolders(path)
        if stores:
            raise SpearError(
                f"{path} contains {format_count(len(stores), 'prepared datasets')} in a folder "
                f"below it. Give {format_alternatives([str(store) for store in stores])}."
            )
        titles = format_alternatives([data_format.title for data_format in FORMATS.values()])
        raise SpearError(f"{path} contains no robot data. Give {titles}.")
    return FORMATS[format_name].open(path)


def read_episodes(
    path: str | Path,
    split: str = "train",
    layout_file: Path | None = None,
    on_error: OnError | None = None,
) -> Iterator[Episode]:
    """Read and check the episodes of a folder in any format.

    The episodes are in our conventions (frames, units), but at the rate of the folder.

    Args:
        path: The folder.
        split: Which episodes: "train", "train[:20%]", … (see `parse_split`).
        layout_file: The file that describes the dataset's layout. If it is None, the dataset's own
            layout is used (see `resolve_layout`).
        on_error: Called with the error of each bad episode, which is then skipped. If it is None,
            the error is raised.

    Yields:
        The episodes of the split, in order.

    Raises:
        SpearError: If the folder cannot be read.

    Example:
        >>> for episode in read_episodes("my_robot", "train[:5]"):  # doctest: +SKIP
        ...     print(len(episode), episode.rate_hz, episode.instruction)
        87 30.0 put the carrot on the plate
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        yield from open_store_split(path, split)
        return

    layout = folder.load_layout(layout_file)
    yield from convert_episodes(
        read_steps_with_task_texts(folder, split, layout, layout.images.values()),
        partial(build_episode, layout=layout),
        on_error,
    )


def read_steps_with_task_texts(
    folder: Dataset, split: str, layout: DatasetLayout, image_columns: Collection[str]
) -> RawEpisodes:
    """Read all columns of each episode of a split, with a text in each row of the instruction.

    A LeRobot dataset may have indices of tasks as instructions. They are replaced by the tasks'
    texts, so that the column of the instruction has texts in every format.

    Args:
        folder: The dataset.
        split: Which episodes (see `parse_split`).
        layout: What the columns mean.
        image_columns: The image columns to read.

    Yields:
        (source, steps) of each episode. If the episode cannot be read, an error replaces its steps.
    """
    raw_episodes = folder.read_steps(split, image_columns)
    if isinstance(folder, LeRobotFolder):
        return folder.replace_task_indices(raw_episodes, layout.instruction)
    return raw_episodes


def convert_episodes(
    raw_episodes: RawEpisodes, convert: Callable[..., T], on_error: OnError | None
) -> Iterator[T]:
    """Yield `convert(steps, source=source)` of each episode.

    `on_error` is called with the error of each bad episode. If it is None, the error is raised.
    """
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
    """Open the episodes of a store that `split` selects. The only split of a store is "train"."""
    store = EpisodeStore(path)
    indices: list[int] = []
    for _, first, end in parse_split({"train": len(store)}, split, path):
        indices.extend(range(first, end))
    if not indices:
        raise SpearError(f"the split {split!r} of {path} is empty. Choose a larger one.")

    is_whole_store = indices == list(range(len(store)))  # each episode, in the store's order
    return store if is_whole_store else store.subset(indices)


def check_enough_good(num_good: int, skipped: SkippedItems, path: str | Path, split: str) -> None:
    """Raise SpearError if all episodes of a split were bad, or too many of them.

    Args:
        num_good: The number of good episodes.
        skipped: The bad episodes.
        path: The folder, for the message.
        split: The split, for the message.
    """
    has_good_episode = num_good > 0
    # `check_limit` raises if too many episodes were bad. With `is_finished=False` it does so only
    # if there were many episodes. Few episodes that are all bad get the more detailed message
    # below.
    skipped.check_limit(num_good, is_finished=has_good_episode)
    if not has_good_episode:
        if not skipped.reasons:
            raise SpearError(f"the split {split!r} of {path} is empty. Choose a larger one.")
        raise SpearError(
            f"no episode of {path} (split {split!r}) can be used. {skipped.summarize()}."
        )


def count_episodes(data: str | Path | Dataset | EpisodeStore) -> Mapping[str, int]:
    """Count the episodes of each split of a folder, given by its path or already opened."""
    folder = open_dataset(data) if isinstance(data, str | Path) else data
    if isinstance(folder, EpisodeStore):
        return {"train": len(folder)}
    return folder.split_lengths


def fingerprint_dataset(folder: Dataset | EpisodeStore) -> str:
    """Hash enough of a folder's files to recognize other data, without reading most of them."""
    if isinstance(folder, EpisodeStore):
        return (
            folder.fingerprint_states_and_actions()
            + folder.fingerprint_image_lengths_and_instructions()
        )

    # The last bytes of a file of records say nothing about earlier records. Their checksums do.
    record_files = sorted(folder.path.glob("*.tfrecord*"))
    checksums = b"".join(read_checksums(file) for file in record_files)
    return hash_names_sizes_and_tails([folder.path], HASHED_FILES, checksums)


def list_cameras(path: str | Path, layout_file: Path | None = None) -> list[str]:
    """List our names of the cameras of a folder's episodes.

    Raises SpearError if the folder has no layout (see `resolve_layout`).
    """
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        return folder.cameras
    return list(folder.load_layout(layout_file).images)


def read_frame_versions(path: str | Path, layout_file: Path | None = None) -> Mapping[str, int]:
    """Find the versions of the frames of a folder's poses (`spear.data.frames`)."""
    folder = open_dataset(path)
    if isinstance(folder, EpisodeStore):
        return folder.frame_versions
    return folder.load_layout(layout_file).frames


def get_dataset_name(path: str | Path) -> str:
    """Get the name of a dataset: from its metadata if it is RLDS, else from its folder.

    If the folder is named like a version (1.0.0), the folder above it gives the name.
    """
    if find_format(path) == "rlds":
        return open_rlds(path).name

    folder = Path(path).resolve()
    is_version = re.fullmatch(r"\d+\.\d+\.\d+", folder.name)
    return folder.parent.name if is_version else folder.name
