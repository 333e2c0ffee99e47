"""RLDS datasets as TFDS writes them (Open X-Embodiment): read without TensorFlow.

A dataset is a folder with `dataset_info.json` (splits and shards), `features.json` (the nested
types) and TFRecord shards. One record is one episode, with its steps flattened into lists:

- A feature `a: {b: Tensor}` is the flat list "a/b".
- A Dataset or Sequence adds one leading dimension to everything below it.
- Lists of lists ("ragged") come with their row lengths.

This module restores the nested arrays that tensorflow_datasets would give, with images still
encoded. In place of a column that it cannot read it gives a str that says why.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.data.actions import empty_episode_error
from spear.data.readers.columns import RawEpisodes, Steps, count_steps, walk_columns
from spear.data.readers.dataset_layout import DatasetLayout, find_layout
from spear.data.readers.splits import parse_split
from spear.data.readers.tfrecord import Feature, parse_example, read_records
from spear.errors import SpearError, format_count
from spear.types import Array
from spear.util.files import read_json
from spear.util.foreign_paths import fill_path_template, join_inside

TFDS_FILE_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
VARYING_SHAPE = "it has another shape at every step"
VARYING_LENGTH = "it is a list of another length at every step, or of several texts or images"


class RldsShard(NamedTuple):
    """A TFRecord file of a split, and how many episodes it has."""

    file: Path
    num_episodes: int


@dataclass(frozen=True)
class RldsFolder:
    """What the two JSON files of a dataset folder say.

    splits    split name → its shards in order.
    features  the nested feature description, as in `features.json`.
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
        """Load the layout (see `find_layout`). Raises SpearError for a broken version."""
        layout = find_layout(self.name, self.path, layout_file)
        if layout.newest is None:
            return layout
        if _version_numbers(self.version) > _version_numbers(layout.newest):
            reason = layout.facts.get("newest", "")
            raise SpearError(
                f"broken version {self.version}: {self.path}: take {layout.newest} ({reason})"
            )
        return layout

    def read_steps(self, split: str, images: Collection[str] | None = None) -> RawEpisodes:
        """Read the columns of each episode of a split, nested as in `features.json`.

        A value that the dataset stores once per episode ("episode_metadata/file_path") becomes a
        column with the same value in all rows. `images` has no effect, because the images of a
        record cannot be skipped.
        """
        for name, first, end in parse_split(self.split_lengths, split, self.path):
            num_before = 0  # episodes in the shards before
            for file, num_episodes in self.splits[name]:
                start = max(first - num_before, 0)
                stop = min(end - num_before, num_episodes)
                if start < stop:
                    for index, record in read_records(file, start, stop, num_episodes):
                        source = f"{self.name}/{name}#{num_before + index}"
                        yield source, self._parse_record(record, file, index)
                num_before += num_episodes

    def _parse_record(
        self, record: bytes | SpearError, file: Path, index: int
    ) -> Steps | SpearError:
        if isinstance(record, SpearError):
            return record
        try:
            episode = unflatten(self.features, parse_example(record))
            steps = episode.pop("steps")
            num_steps = count_steps(steps)
            if not num_steps:
                return empty_episode_error(f"{file} record {index}")
            return _repeat_episode_values(episode, num_steps) | steps
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            return SpearError(
                f"broken record: {file} record {index}: {error}. Its features.json "
                "describes other records: download both of the same version."
            )


def _repeat_episode_values(episode: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Turn the texts and numbers that an episode has once into columns of `num_steps` rows."""
    columns: dict[str, Any] = {}
    for name, value in walk_columns(episode):
        if isinstance(value, list | str) or not np.size(value):
            continue
        if isinstance(value, bytes):
            columns[name] = [value] * num_steps
        else:
            columns[name] = np.broadcast_to(value, (num_steps, *np.shape(value)))
    return columns


def _version_numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".") if number.isdecimal()]


def find_rlds_folders(path: Path) -> list[Path]:
    """Find the RLDS folders at a path: the folder itself, or else the versions in it."""
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
        raise SpearError(f"not an RLDS folder: {path}: it has no features.json")
    if len(folders) > 1:
        names = ", ".join(folder.name for folder in folders)
        raise SpearError(f"not an RLDS folder: {path}: choose one of {names}")

    folder = folders[0]
    info = read_json(folder / "dataset_info.json", "download this file anew")
    features = read_json(folder / "features.json", "download this file anew")
    try:
        return _make_folder(folder, info, features)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SpearError(
            f"unreadable: {folder}/dataset_info.json: {error!r}. Download this file anew."
        ) from error


def _make_folder(folder: Path, info: Mapping[str, Any], features: Mapping[str, Any]) -> RldsFolder:
    if info.get("fileFormat", "tfrecord") != "tfrecord":
        raise SpearError(
            f"unknown file format {info['fileFormat']!r}: {folder}: convert it to tfrecord"
        )

    splits: dict[str, list[RldsShard]] = {}
    for split in info["splits"]:
        splits[str(split["name"])] = _list_shards(folder, info["name"], split)
    if not splits:
        raise SpearError(f"no episodes: {folder}: its dataset_info.json names no split")
    version = str(info.get("version", ""))
    return RldsFolder(folder, str(info["name"]), version, splits, features)


def _list_shards(folder: Path, dataset: str, split: Mapping[str, Any]) -> list[RldsShard]:
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
        node: A node of `features.json`.
        flat: The flat lists of one Example.
        name: The path of the node.
        depth: The number of sequences above the node.

    Returns:
        Nested dicts of numpy arrays; bytes or lists of bytes for images and texts; a str that says
        why a column cannot be read.

    Raises:
        KeyError, ValueError: If the lists do not fit the description.
    """
    if "featuresDict" in node:
        prefix = f"{name}/" if name else ""
        children = node["featuresDict"]["features"]
        return {key: unflatten(child, flat, prefix + key, depth) for key, child in children.items()}
    if "sequence" in node:
        return unflatten(node["sequence"]["feature"], flat, name, depth + 1)
    if depth and -1 in _tensor_shape(node):
        return VARYING_SHAPE

    key = f"{name}/ragged_flat_values" if depth > 1 else name
    if key not in flat:
        raise ValueError(f"feature {name!r} is missing")
    values = _convert_leaf(node, flat[key], name)
    if isinstance(values, str):
        return values
    for level in reversed(range(depth - 1)):
        values = _restore_level(values, flat, name, level)
        if isinstance(values, str):
            return values

    if depth:
        return values
    if len(values) != 1:
        raise ValueError(f"feature {name!r} has {len(values)} values where one was expected")
    return values[0]


def _restore_level(
    values: list[bytes] | Array, flat: Mapping[str, Feature], name: str, level: int
) -> list[bytes] | Array | str:
    """Restore one dimension of a ragged list, if all its rows have the same length."""
    lengths: Any = flat.get(f"{name}/ragged_row_lengths_{level}")
    if lengths is None or sum(lengths) != len(values):
        raise ValueError(f"feature {name!r} has row lengths that do not add up")
    if len(set(lengths)) != 1 or lengths[0] < 1:
        return VARYING_LENGTH
    if isinstance(values, list):
        return VARYING_LENGTH if lengths[0] > 1 else values
    return values.reshape(-1, int(lengths[0]), *values.shape[1:])


def _tensor_shape(description: Mapping[str, Any]) -> list[int]:
    dimensions = description.get("tensor", {}).get("shape", {}).get("dimensions", [])
    return [int(dimension) for dimension in dimensions]


def _convert_leaf(
    description: Mapping[str, Any], values: Feature, name: str
) -> list[bytes] | Array | str:
    """Convert all values of one feature, or say why they cannot be read.

    The first dimension of the result runs over all sequences that the feature is in.
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
) -> list[bytes] | Array | str:
    shape = _tensor_shape(description)
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
        return np.stack([np.frombuffer(value, dtype).reshape(shape) for value in values])

    if isinstance(values, list) and values:
        raise ValueError(f"feature {name!r} holds bytes instead of {dtype}")
    numbers = np.asarray(values, dtype)
    if -1 in shape:
        return numbers.reshape(1, *shape)
    if len(numbers) % math.prod(shape):
        raise ValueError(
            f"feature {name!r} has {format_count(len(numbers), 'values')}, not to fill {shape}"
        )
    return numbers.reshape(-1, *shape)
