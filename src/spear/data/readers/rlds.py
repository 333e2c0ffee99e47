"""RLDS datasets as TFDS writes them (Open X-Embodiment): read without TensorFlow.

A dataset is a folder with `dataset_info.json` (splits and shards), `features.json` (the nested types) and
TFRecord shards; one record is one episode, its steps flattened into lists. `read_rlds` gives `Episode`s in
our conventions by a `DatasetSpec`; `read_raw` gives the nested arrays that tensorflow_datasets would, images
still encoded. Shards are read one after the other, in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear.data.readers.bad import OnBad
from spear.data.readers.layout import episodes_from
from spear.data.readers.spec import Layout, find_spec
from spear.data.readers.splits import split_ranges
from spear.data.readers.tfds_features import unflatten
from spear.data.readers.tfrecord import parse_example, read_records
from spear.errors import SpearError
from spear.types import Episode


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
    def lengths(self) -> dict[str, list[int]]:
        """Split name -> number of episodes in each of its shards."""
        return {name: [length for _, length in shards] for name, shards in self.splits.items()}


def is_rlds(path: str | Path) -> bool:
    """Whether `path` is an RLDS folder, or holds one version folder that is."""
    return bool(_version_folders(Path(path)))


def _version_folders(path: Path) -> list[Path]:
    if (path / "features.json").is_file():
        return [path]
    return sorted(p.parent for p in path.glob("*/features.json")) if path.is_dir() else []


def open_rlds(path: str | Path) -> RldsFolder:
    """Read the description of an RLDS folder (or of the one version folder in it)."""
    found = _version_folders(Path(path))
    if not found:
        raise SpearError(
            f"not an RLDS folder: {path}: no features.json in it; give the folder of one version"
        )
    if len(found) > 1:
        raise SpearError(f"several datasets: {path}: choose one of {', '.join(p.name for p in found)}")
    folder = found[0]
    info = _read_json(folder / "dataset_info.json")
    features = _read_json(folder / "features.json")
    try:
        if info.get("fileFormat", "tfrecord") != "tfrecord":
            raise SpearError(f"unknown file format {info['fileFormat']!r}: {folder}: convert it to tfrecord")
        splits = {split["name"]: _shards(folder, info["name"], split) for split in info["splits"]}
        return RldsFolder(folder, info["name"], info.get("version", ""), splits, features)
    except (KeyError, TypeError, ValueError) as error:
        raise SpearError(
            f"unreadable: {folder / 'dataset_info.json'}: {error!r}; copy the folder again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SpearError(f"unreadable: {path}: {error}; an RLDS folder needs this file") from error
    if not isinstance(content, dict):
        raise SpearError(f"unreadable: {path}: it holds no JSON object; copy the folder again")
    return content


def _shards(folder: Path, dataset: str, split: Mapping[str, Any]) -> list[tuple[Path, int]]:
    lengths = [int(n) for n in split.get("shardLengths", [])]
    template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    count = len(lengths)
    return [
        (
            folder
            / template.format(
                DATASET=dataset,
                SPLIT=split["name"],
                FILEFORMAT="tfrecord",
                SHARD_X_OF_Y=f"{index:05d}-of-{count:05d}",
                SHARD_INDEX=f"{index:05d}",
                NUM_SHARDS=f"{count:05d}",
            ),
            length,
        )
        for index, length in enumerate(lengths)
    ]


def read_raw(
    path: str | Path | RldsFolder, split: str = "train", on_bad: OnBad | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, example) of each episode of a split, in order.

    An example is nested as in `features.json`; below "steps" each array has the steps as its first dimension;
    images and texts are bytes (lists of bytes below "steps"). A broken record, or a shard with fewer records
    than it should have, raises SpearError, or is reported to `on_bad` and passed over.
    """
    folder = path if isinstance(path, RldsFolder) else open_rlds(path)
    for name, first, end in split_ranges(folder.lengths, split, folder.path):
        before = 0
        for file, length in folder.splits[name]:
            low, high = max(first - before, 0), min(end - before, length)
            for index, record in read_records(file, low, high, on_bad) if low < high else ():
                try:
                    example = unflatten(folder.features, parse_example(record))
                except (ValueError, KeyError) as error:
                    broken = SpearError(f"broken record: {file} record {index}: {error}; copy the file again")
                    if on_bad is None:
                        raise broken from error
                    on_bad(broken)
                else:
                    yield f"{folder.name}/{name}#{before + index}", example
            before += length


def read_rlds(
    path: str | Path,
    split: str = "train",
    dataset: Layout = None,
    on_bad: OnBad | None = None,
) -> Iterator[Episode]:
    """Episodes of an RLDS split in our conventions, at their own rate, checked (see `check_episode`).

    The layout is `dataset`, else the folder's own `spear.json`, else the registry's entry of that name (see
    `spear.data.readers.spec`). Motions are derived from the states (see `episode_from`). Whatever is wrong
    with an episode raises SpearError naming it, or, with `on_bad`, is reported there and the episode is left
    out.
    """
    folder = open_rlds(path)
    spec = find_spec(folder.name, folder.path, given=dataset)
    found = ((source, example["steps"]) for source, example in read_raw(folder, split, on_bad))
    yield from episodes_from(found, spec, on_bad)
