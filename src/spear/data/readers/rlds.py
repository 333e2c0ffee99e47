"""RLDS datasets as TFDS writes them (Open X-Embodiment): read without TensorFlow.

A dataset is a folder with `dataset_info.json` (splits and shards), `features.json` (the nested types) and
TFRecord shards; one record is one episode, its steps flattened into lists: a feature `a: {b: Tensor}` is the
flat list "a/b", a Dataset or Sequence adds one leading dimension to everything below it, and lists of lists
("ragged") come with their row lengths. Here they become the nested arrays that tensorflow_datasets would
give, images still encoded; one of a kind that cannot be read becomes a str that says why.
"""

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.actions import empty_episode_error
from spear.data.readers.columns import RawEpisodes, Steps, count_steps, walk_columns
from spear.data.readers.dataset_layout import DatasetLayout, find_layout
from spear.data.readers.splits import parse_split
from spear.data.readers.tfrecord import Feature, parse_example, read_records
from spear.errors import SpearError, format_count
from spear.types import Array
from spear.util.files import read_json


@dataclass(frozen=True)
class RldsFolder:
    """What the two JSON files of a dataset folder say.

    splits   split name -> (shard file, number of episodes) in order.
    features the nested feature description, as in `features.json`.
    """

    path: Path
    name: str
    version: str
    splits: Mapping[str, list[tuple[Path, int]]]
    features: Mapping[str, Any]

    @property
    def split_lengths(self) -> dict[str, int]:
        """Split name -> number of episodes."""
        return {name: sum(length for _, length in shards) for name, shards in self.splits.items()}

    def load_layout(self, given: Path | None = None) -> DatasetLayout:
        """What its columns mean; see `find_layout`. Raises SpearError for a version known to be broken."""
        spec = find_layout(self.name, self.path, given)
        if spec.newest is not None and _parts(self.version) > _parts(spec.newest):
            why = spec.facts.get("newest", "")
            raise SpearError(
                f"broken version {self.version}: {self.path}: take {spec.newest} ({why})"
            )
        return spec

    def read_steps(self, split: str, images: Collection[str] | None = None) -> RawEpisodes:
        """The step arrays of each episode of a split, nested as in `features.json`: all images, always. What
        is said once for an episode is a column, too ("episode_metadata/file_path"), the same in all rows."""
        for name, first, end in parse_split(self.split_lengths, split, self.path):
            before = 0
            for file, length in self.splits[name]:
                low, high = max(first - before, 0), min(end - before, length)
                for index, record in read_records(file, low, high, length) if low < high else ():
                    yield f"{self.name}/{name}#{before + index}", self._parse(record, file, index)
                before += length

    def _parse(self, record: bytes | SpearError, file: Path, index: int) -> Steps | SpearError:
        if isinstance(record, SpearError):
            return record
        try:
            episode = unflatten(self.features, parse_example(record))
            steps = episode.pop("steps")
            if not (rows := count_steps(steps)):
                return empty_episode_error(f"{file} record {index}")
            once = {
                n: v
                for n, v in walk_columns(episode)
                if np.size(v) and not isinstance(v, list | str)
            }
            return {name: _in_rows(value, rows) for name, value in once.items()} | steps
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            return SpearError(
                f"broken record: {file} record {index}: {error}; copy the dataset again"
            )


def _in_rows(value: Any, rows: int) -> Any:
    """A text or numbers of an episode as a column of so many rows."""
    return (
        [value] * rows
        if isinstance(value, bytes)
        else np.broadcast_to(value, (rows, *np.shape(value)))
    )


def _parts(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]


def rlds_folders(path: Path) -> list[Path]:
    """A folder itself if it is an RLDS dataset, else those in it: the versions of one."""
    whole = path / "features.json"
    return [path] if whole.is_file() else sorted(p.parent for p in path.glob("*/features.json"))


def open_rlds(path: str | Path) -> RldsFolder:
    """Read the description of an RLDS folder, or of the one version folder in it; SpearError if broken."""
    found = rlds_folders(Path(path))
    if len(found) != 1:
        names = (
            f"choose one of {', '.join(p.name for p in found)}"
            if found
            else "it has no features.json"
        )
        raise SpearError(f"not an RLDS folder: {path}: {names}")
    folder = found[0]
    info, features = (
        read_json(folder / f"{n}.json", "copy it again") for n in ("dataset_info", "features")
    )
    try:
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise SpearError(
                f"unknown file format {info['fileFormat']!r}: {folder}: convert it to tfrecord"
            )
        splits = {
            str(split["name"]): _shards(folder, info["name"], split) for split in info["splits"]
        }
        if not splits:
            raise SpearError(f"no episodes: {folder}: its dataset_info.json names no split")
        return RldsFolder(folder, str(info["name"]), str(info.get("version", "")), splits, features)
    except (KeyError, TypeError, ValueError) as error:
        raise SpearError(
            f"unreadable: {folder}/dataset_info.json: {error!r}; copy it again"
        ) from error


def _shards(folder: Path, dataset: str, split: Mapping[str, Any]) -> list[tuple[Path, int]]:
    lengths = [int(n) for n in split.get("shardLengths", [])]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    shards = []
    for index, length in enumerate(lengths):
        number, count = f"{index:05d}", f"{len(lengths):05d}"
        words = {"DATASET": dataset, "SPLIT": split["name"], "FILEFORMAT": "tfrecord"}
        words |= {
            "SHARD_INDEX": number,
            "NUM_SHARDS": count,
            "SHARD_X_OF_Y": f"{number}-of-{count}",
        }
        shards.append((folder / template.format(**words), length))
    return shards


def unflatten(
    node: Mapping[str, Any], flat: Mapping[str, Feature], name: str = "", depth: int = 0
) -> Any:
    """Nested dicts of numpy arrays (and of bytes, or lists of bytes, for images and texts).

    node is one of `features.json`; flat are the lists of one example; name is the path so far, depth the
    number of sequences above. Raises KeyError or ValueError for what does not fit.
    """
    if "featuresDict" in node:
        children, before = node["featuresDict"]["features"].items(), f"{name}/" if name else ""
        return {key: unflatten(child, flat, before + key, depth) for key, child in children}
    if "sequence" in node:
        return unflatten(node["sequence"]["feature"], flat, name, depth + 1)
    if depth and -1 in _shape(node):
        return "it has another shape at every step"
    key = f"{name}/ragged_flat_values" if depth > 1 else name
    if key not in flat:
        raise ValueError(f"feature {name!r} is missing")
    values = _leaf(node, flat[key], name)
    if isinstance(values, str):
        return values
    for level in reversed(range(depth - 1)):
        lengths: Any = flat.get(f"{name}/ragged_row_lengths_{level}")
        if lengths is None or sum(lengths) != len(values):
            raise ValueError(f"feature {name!r} has row lengths that do not add up")
        if len({*lengths}) != 1 or lengths[0] < 1 or (isinstance(values, list) and lengths[0] > 1):
            return "it is a list of another length at every step, or of several texts or images"
        if not isinstance(values, list):
            values = values.reshape(-1, int(lengths[0]), *values.shape[1:])
    if not depth and len(values) != 1:
        raise ValueError(f"feature {name!r} has {len(values)} values where one was expected")
    return values if depth else values[0]


def _shape(description: Mapping[str, Any]) -> list[int]:
    return [int(n) for n in description.get("tensor", {}).get("shape", {}).get("dimensions", [])]


def _leaf(description: Mapping[str, Any], values: Feature, name: str) -> list[bytes] | Array | str:
    """All values of one feature, the first dimension running over whatever sequence it is in; or why not."""
    if "tensor" not in description:
        numbers = "classLabel" in description and not isinstance(values, list)
        if numbers or (
            isinstance(values, list) and ("image" in description or "text" in description)
        ):
            return values
        return f"it is a {description.get('pythonClassName')}"
    tensor, shape = description["tensor"], _shape(description)
    dtype, encoding = tensor["dtype"], tensor.get("encoding", "none")
    if dtype in ("string", "object"):
        return values if isinstance(values, list) and not shape else "it is an array of texts"
    if 0 in shape or dtype not in np.sctypeDict:
        return f"it has {dtype} of shape {shape}"
    if encoding in ("bytes", "zlib"):
        if not isinstance(values, list):
            raise ValueError(f"feature {name!r} should be encoded as {encoding}")
        plain = [zlib.decompress(value) if encoding == "zlib" else value for value in values]
        return np.stack([np.frombuffer(value, dtype).reshape(shape) for value in plain])
    if isinstance(values, list) and values:
        raise ValueError(f"feature {name!r} holds bytes instead of {dtype}")
    flat = np.asarray(values, dtype)
    if -1 in shape:
        return flat.reshape(1, *shape)
    if len(flat) % math.prod(shape):
        raise ValueError(
            f"feature {name!r} has {format_count(len(flat), 'values')}, not to fill {shape}"
        )
    return flat.reshape(-1, *shape)
