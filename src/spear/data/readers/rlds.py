"""Reads RLDS datasets as TFDS writes them (Open X-Embodiment), without TensorFlow.

A dataset is a folder with `dataset_info.json` (splits and shards), `features.json` (a tree of the
names and types of all values) and TFRecord files, the shards. One record is one episode. A record
has no tree, but one flat list of values for each leaf of the tree:

- The list of a value b in a mapping a is called "a/b".
- A node of the type Dataset or Sequence is a list of what is below it. It adds a leading dimension
  to the values, and the flat list has the values of all elements one after the other.
- Lists of lists ("ragged") are stored as their flat values and, per level, the lengths of the rows.

This module restores the nested arrays that tensorflow_datasets would give, but keeps images
encoded. In place of a column that it cannot read, it gives a str that says why.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.data.actions import make_empty_episode_error
from spear.data.readers.columns import (
    RawEpisodes,
    Steps,
    UnreadableReason,
    count_steps,
    walk_columns,
)
from spear.data.readers.dataset_layout import DatasetLayout, resolve_layout
from spear.data.readers.splits import parse_split
from spear.data.readers.tfrecord import Feature, parse_example, read_records
from spear.errors import SpearError, format_count
from spear.types import Array
from spear.util.files import read_json
from spear.util.foreign_paths import fill_path_template, join_inside

TFDS_FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # how TFDS names shards
# Why a column cannot be read:
VARYING_SHAPE = "it has another shape at every step"
VARYING_LENGTH = "it is a list of another length at every step, or of several texts or images"


class RldsShard(NamedTuple):
    """A TFRecord file of a split, and how many episodes it has."""

    file: Path
    num_episodes: int


@dataclass(frozen=True)
class RldsFolder:
    """What the two JSON files of a dataset folder say.

    Attributes:
        path: The folder.
        name: The dataset's name.
        version: The dataset's version, such as "1.0.0".
        splits: Split name → its shards in order.
        features: The tree of names and types, as `features.json` has it.
    """

    path: Path
    name: str
    version: str
    splits: Mapping[str, list[RldsShard]]
    features: Mapping[str, Any]

    @property
    def split_lengths(self) -> dict[str, int]:
        """Split name → number of episodes."""
        return {
            name: sum(shard.num_episodes for shard in shards)
            for name, shards in self.splits.items()
        }

    def load_layout(self, layout_file: Path | None = None) -> DatasetLayout:
        """Load the dataset's layout (see `resolve_layout`).

        Raises SpearError if this version of the dataset is newer than the newest correct one.
        """
        layout = resolve_layout(self.name, self.path, layout_file)
        if layout.newest is None:
            return layout
        if _split_version(self.version) > _split_version(layout.newest):
            # `facts` say how we know each field: here, what is wrong with later versions.
            reason = layout.facts.get("newest", "")
            raise SpearError(
                f"version {self.version} in {self.path} is broken ({reason}). Use version "
                f"{layout.newest}."
            )
        return layout

    def read_steps(self, split: str, image_columns: Collection[str] | None = None) -> RawEpisodes:
        """Read the columns of each episode of a split, nested as in `features.json`.

        A value that the dataset stores once per episode ("episode_metadata/file_path") becomes a
        column with the same value in all rows.

        Args:
            split: For example "train[:10]" (see `parse_split`).
            image_columns: Has no effect, because the images of a record cannot be skipped.

        Yields:
            (source, steps) of each episode. If the episode cannot be read, an error replaces its
            steps.
        """
        for name, first, end in parse_split(self.split_lengths, split, self.path):
            num_before = 0  # the number of episodes in the split's earlier shards
            for file, num_episodes in self.splits[name]:
                start = max(first - num_before, 0)  # within this shard
                stop = min(end - num_before, num_episodes)
                if start < stop:
                    for index, record in read_records(file, start, stop, num_episodes):
                        source = f"{self.name}/{name}#{num_before + index}"
                        yield source, self._parse_record(record, file, index)
                num_before += num_episodes

    def _parse_record(
        self, record: bytes | SpearError, file: Path, index: int
    ) -> Steps | SpearError:
        """Parse a record into the columns of its episode, or an error if that fails.

        Args:
            record: The bytes of the record, or an error if they could not be read.
            file: The shard, for error messages.
            index: The index of the record in the shard, for error messages.
        """
        if isinstance(record, SpearError):
            return record
        try:
            episode = unflatten(self.features, parse_example(record))
            steps = episode.pop("steps")
            num_steps = count_steps(steps)
            if not num_steps:
                return make_empty_episode_error(f"{file} record {index}")
            return _repeat_episode_values(episode, num_steps) | steps
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            return SpearError(
                f"record {index} of {file} is broken ({error}). Its features.json describes "
                "other records, so download both of the same version."
            )


def _repeat_episode_values(episode: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Turn the texts and numbers that an episode has once into columns of `num_steps` rows.

    Lists, empty arrays and values that cannot be read are left out.
    """
    columns: dict[str, Any] = {}
    for name, value in walk_columns(episode):
        is_unreadable = isinstance(value, str)  # the str says why
        is_list_of_bytes = isinstance(value, list)
        if is_unreadable or is_list_of_bytes or np.size(value) == 0:
            continue
        if isinstance(value, bytes):
            columns[name] = [value] * num_steps
        else:
            columns[name] = np.broadcast_to(value, (num_steps, *np.shape(value)))
    return columns


def _split_version(version: str) -> list[int]:
    """Split "1.0.0" into numbers, which compare in the order of versions."""
    return [int(number) for number in version.split(".") if number.isdecimal()]


def find_rlds_folders(path: Path) -> list[Path]:
    """Find the RLDS folders at a path: the folder itself, or else the folders of versions in it."""
    if (path / "features.json").is_file():
        return [path]
    return sorted(file.parent for file in path.glob("*/features.json"))


def open_rlds(path: str | Path) -> RldsFolder:
    """Read the description of an RLDS folder, or of the one version folder in it.

    Raises:
        SpearError: If there are several versions, or the description is broken.
    """
    folders = find_rlds_folders(Path(path))
    if not folders:
        raise SpearError(
            f"{path} is no RLDS folder, because it has no features.json. Give the folder with "
            "this file."
        )
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise SpearError(f"{path} contains several RLDS folders. Choose one of {names}.")

    folder = folders[0]
    info = read_json(folder / "dataset_info.json", "download this file again")
    features = read_json(folder / "features.json", "download this file again")
    try:
        return _parse_description(folder, info, features)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SpearError(
            f"{folder}/dataset_info.json cannot be read ({type(error).__name__}, {error}). "
            "Download this file again."
        ) from error


def _parse_description(
    folder: Path, info: Mapping[str, Any], features: Mapping[str, Any]
) -> RldsFolder:
    """Make the description of a folder from the contents of its two JSON files."""
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise SpearError(
            f"{folder} is in the file format {info['fileFormat']!r}. Convert it to tfrecord."
        )

    splits: dict[str, list[RldsShard]] = {}
    for split in info["splits"]:
        splits[str(split["name"])] = _list_shards(folder, info["name"], split)
    if not splits:
        raise SpearError(
            f"dataset_info.json of {folder} names no split, so there are no episodes. Download "
            "this file again."
        )
    version = str(info.get("version", ""))
    return RldsFolder(folder, str(info["name"]), version, splits, features)


def _list_shards(folder: Path, dataset: str, split: Mapping[str, Any]) -> list[RldsShard]:
    """List the shards of a split, as an entry of `dataset_info.json` describes it."""
    lengths = [int(length) for length in split.get("shardLengths", [])]
    template = split.get("filepathTemplate") or TFDS_FILE_TEMPLATE
    num_shards = f"{len(lengths):05d}"
    shards: list[RldsShard] = []
    for index, length in enumerate(lengths):
        shard_index = f"{index:05d}"
        values = {
            "DATASET": dataset,
            "SPLIT": split["name"],
            "FILEFORMAT": "tfrecord",
            "SHARD_INDEX": shard_index,
            "NUM_SHARDS": num_shards,
            "SHARD_X_OF_Y": f"{shard_index}-of-{num_shards}",
        }
        file_name = fill_path_template(template, values)
        shards.append(RldsShard(join_inside(folder, file_name), length))
    return shards


def unflatten(
    node: Mapping[str, Any], flat: Mapping[str, Feature], name: str = "", depth: int = 0
) -> Any:
    """Restore the nested values of an episode from its flat lists.

    Args:
        node: A node of the tree in `features.json`.
        flat: The flat lists of one record.
        name: The path of the node, which is the name of its flat list.
        depth: The number of lists (Datasets and Sequences) above the node.

    Returns:
        For an inner node, a nested dict. For a leaf, an array with `depth` leading dimensions.
        Images and texts are bytes, or a list of bytes if `depth` is 1. A value that cannot be read
        is a str that says why.

    Raises:
        KeyError, ValueError: If the flat lists do not fit the tree.
    """
    if "featuresDict" in node:
        prefix = f"{name}/" if name else ""
        children = node["featuresDict"]["features"]
        return {key: unflatten(child, flat, prefix + key, depth) for key, child in children.items()}
    if "sequence" in node:
        return unflatten(node["sequence"]["feature"], flat, name, depth + 1)
    if depth and -1 in _get_tensor_shape(node):
        return VARYING_SHAPE

    # A leaf. Lists of lists have their values below another name.
    key = f"{name}/ragged_flat_values" if depth > 1 else name
    if key not in flat:
        raise ValueError(f"feature {name!r} is missing")
    values = _convert_leaf(node, flat[key], name)
    if isinstance(values, str):
        return values

    # Divide the flat values into rows, from the innermost level of lists to the outermost.
    for level in reversed(range(depth - 1)):
        values = _restore_level(values, flat, name, level)
        if isinstance(values, str):
            return values

    is_in_list = depth > 0
    if is_in_list:
        return values
    if len(values) != 1:
        raise ValueError(f"feature {name!r} has {len(values)} values where one was expected")
    return values[0]


def _restore_level(
    values: list[bytes] | Array, flat: Mapping[str, Feature], name: str, level: int
) -> list[bytes] | Array | UnreadableReason:
    """Restore one level of a list of lists, if all rows of this level have the same length.

    Args:
        values: The values without this level, one after the other.
        flat: The flat lists of the record.
        name: The path of the leaf.
        level: The level of the rows; 0 is the outermost.

    Returns:
        An array of rows, [num_rows, row_length, ...]. Texts or images stay a flat list, which is
        possible only for rows of one element. For anything else, a str that says why.
    """
    lengths: Any = flat.get(f"{name}/ragged_row_lengths_{level}")
    if lengths is None or sum(lengths) != len(values):
        raise ValueError(f"feature {name!r} has row lengths that do not add up")
    if len(set(lengths)) != 1 or lengths[0] < 1:
        return VARYING_LENGTH

    row_length = int(lengths[0])
    if isinstance(values, list):
        return VARYING_LENGTH if row_length > 1 else values
    return values.reshape(-1, row_length, *values.shape[1:])


def _get_tensor_shape(description: Mapping[str, Any]) -> list[int]:
    """Get the shape of a tensor from its node; a dimension of any size is -1."""
    dimensions = description.get("tensor", {}).get("shape", {}).get("dimensions", [])
    return [int(dimension) for dimension in dimensions]


def _convert_leaf(
    description: Mapping[str, Any], values: Feature, name: str
) -> list[bytes] | Array | UnreadableReason:
    """Convert the flat values of one leaf, or say why they cannot be read.

    The first dimension of the result runs over all elements of all lists above the leaf.
    """
    if "tensor" in description:
        return _convert_tensor(description, values, name)

    has_bytes = isinstance(values, list)
    if has_bytes and ("image" in description or "text" in description):
        return values
    if not has_bytes and "classLabel" in description:
        return values
    return f"it is a {description.get('pythonClassName')}"


def _convert_tensor(
    description: Mapping[str, Any], values: Feature, name: str
) -> list[bytes] | Array | UnreadableReason:
    """Convert the flat values of one tensor to [num_elements, *shape]; see `_convert_leaf`."""
    shape = _get_tensor_shape(description)
    dtype = description["tensor"]["dtype"]
    encoding = description["tensor"].get("encoding", "none")
    if dtype in ("string", "object"):
        is_plain_text = isinstance(values, list) and not shape
        return values if is_plain_text else "it is an array of texts"
    if 0 in shape or dtype not in np.sctypeDict:
        return f"it has {dtype} of shape {shape}"

    if encoding in ("bytes", "zlib"):
        if not isinstance(values, list):
            raise ValueError(f"feature {name!r} should be encoded as {encoding}")
        if encoding == "zlib":
            values = [zlib.decompress(value) for value in values]
        tensors = [np.frombuffer(value, dtype).reshape(shape) for value in values]
        return np.stack(tensors)

    has_bytes = isinstance(values, list) and bool(values)  # an empty list may be of any type
    if has_bytes:
        raise ValueError(f"feature {name!r} holds bytes instead of {dtype}")
    numbers = np.asarray(values, dtype)  # [n]
    if -1 in shape:  # there is one element, because `unflatten` refuses such tensors in a list
        return numbers.reshape(1, *shape)
    if len(numbers) % math.prod(shape):
        raise ValueError(
            f"feature {name!r} has {format_count(len(numbers), 'values')}, not to fill {shape}"
        )
    return numbers.reshape(-1, *shape)
