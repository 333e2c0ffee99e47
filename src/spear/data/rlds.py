"""RLDS datasets as TFDS writes them (Open X-Embodiment): read without TensorFlow.

A dataset is a folder with `dataset_info.json` (splits and shards), `features.json` (the nested types) and
TFRecord shards; one record is one episode, its steps flattened into lists. `read_rlds` gives `Episode`s in
our conventions by a `DatasetSpec`; `read_raw` gives the nested arrays that tensorflow_datasets would, images
still encoded. Shards are read one after the other, in order.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.data.actions import binarize_gripper, derive_actions
from spear.data.episode import check_episode
from spear.data.oxe import DatasetSpec, RotationFormat, column, find_spec
from spear.data.tfds_features import unflatten
from spear.data.tfrecord import OnBad, parse_example, read_records
from spear.errors import SpearError, unknown_name
from spear.geometry import euler_to_quat, quat_canonical, quat_multiply
from spear.images import decode_image
from spear.types import Array, Episode


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


_SPLIT = re.compile(r"^(?P<name>[\w-]+)(\[(?P<selector>[\d_:%a-z-]+)\])?$")
_BOUND = re.compile(r"^(?P<value>-?[\d_]+)?(?P<unit>%|shard)?$")


def split_ranges(folder: RldsFolder, split: str) -> list[tuple[str, int, int]]:
    """TFDS split syntax as (split name, first episode, end) ranges, boundaries as TFDS rounds them.

    "train", "train[:20%]", "train[5:]", "train[-3:]", "train[1shard:2shard]", "train+val[:50%]", "all".
    """
    ranges = []
    for part in re.split(r"\s*\+\s*", split.strip()):
        if part == "all":
            ranges += [(name, 0, _total(folder, name)) for name in folder.splits]
            continue
        match = _SPLIT.match(part)
        if not match:
            raise _bad_split(folder, split)
        if match["name"] not in folder.splits:
            raise unknown_name(f"split (of {folder.path})", match["name"], folder.splits)
        ranges.append((match["name"], *_range(folder, match["name"], match["selector"], split)))
    return ranges


def _range(folder: RldsFolder, name: str, selector: str | None, split: str) -> tuple[int, int]:
    total = _total(folder, name)
    if selector is None:
        return 0, total
    bounds = [_BOUND.match(bound) for bound in selector.split(":")]
    units = {bound["unit"] for bound in bounds if bound and bound["unit"]}
    if not all(bounds) or len(units) > 1 or len(bounds) > 2 or selector == ":":
        raise _bad_split(folder, split)
    unit = units.pop() if units else ""
    values = [None if not b or b["value"] is None else int(b["value"]) for b in bounds]
    if len(values) == 1:
        if unit != "shard" or values[0] is None:
            raise _bad_split(folder, split)
        values = [values[0], values[0] + 1 or None]
    lengths = [length for _, length in folder.splits[name]]
    first, end = (_absolute(value, unit, lengths) for value in values)
    first, end = first or 0, total if end is None else end
    beyond = unit == "%" and any(abs(value or 0) > 100 for value in values)
    if beyond or abs(first) > total or abs(end) > total:
        raise SpearError(f"split {split!r} reaches beyond the {total} episodes of {folder.path}")
    return first + total if first < 0 else first, end + total if end < 0 else end


def _absolute(value: int | None, unit: str, lengths: list[int]) -> int | None:
    if value is None or unit == "":
        return value
    if unit == "%":
        return round(value * sum(lengths) / 100)
    return sum(lengths[:value])


def _bad_split(folder: RldsFolder, split: str) -> SpearError:
    return SpearError(
        f"unreadable split {split!r}: {folder.path}: write it like train, train[:20%] or train[5:]"
    )


def _total(folder: RldsFolder, name: str) -> int:
    return sum(length for _, length in folder.splits[name])


def read_raw(
    path: str | Path | RldsFolder, split: str = "train", on_bad: OnBad | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, example) of each episode of a split, in order.

    An example is nested as in `features.json`; below "steps" each array has the steps as its first dimension;
    images and texts are bytes (lists of bytes below "steps"). A broken record, or a shard with fewer records
    than it should have, raises SpearError, or is reported to `on_bad` and passed over.
    """
    folder = path if isinstance(path, RldsFolder) else open_rlds(path)
    for name, first, end in split_ranges(folder, split):
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
    dataset: DatasetSpec | None = None,
    on_bad: OnBad | None = None,
) -> Iterator[Episode]:
    """Episodes of an RLDS split in our conventions, at their own rate, checked (see `check_episode`).

    The layout is `dataset`, else the folder's own `spear.json`, else the registry's entry of that name (see
    `spear.data.oxe`). Motions are derived from the states (see `episode_from`). Whatever is wrong with an
    episode raises SpearError naming it, or, with `on_bad`, is reported there and the episode is left out.
    """
    folder = open_rlds(path)
    spec = dataset or find_spec(folder.name, folder.path)
    for source, example in read_raw(folder, split, on_bad):
        try:
            yield episode_from(example["steps"], spec, source)
        except SpearError as error:
            if on_bad is None:
                raise
            on_bad(error)


def episode_from(steps: Mapping[str, Any], spec: DatasetSpec, source: str) -> Episode:
    """Our `Episode` from the nested step arrays of a dataset laid out as `spec` says.

    Motions come from the states, gripper commands from the logged ones where the dataset has them: the last
    step leads nowhere known and is masked. Raises SpearError for a missing column or a bad episode.
    """
    position = np.asarray(column(steps, spec.position, source), np.float64)
    words = column(steps, spec.instruction, source)
    instruction = bytes(words[0]).decode("utf-8", "replace").strip() if len(words) else ""
    episode = check_episode(
        Episode(
            images={
                camera: unsquash(column(steps, key, source), spec.image_aspect.get(camera))
                for camera, key in spec.images.items()
            },
            position=position,
            rotation=to_quaternion(column(steps, spec.rotation, source), spec.rotation_format),
            gripper=to_opening(column(steps, spec.gripper, source), *spec.gripper_range),
            instruction=instruction,
            rate_hz=spec.rate_hz,
            source=source,
        )
    )
    tool = torch.tensor(spec.tool_rotation, dtype=torch.float32)
    rotation = quat_canonical(quat_multiply(torch.as_tensor(episode.rotation), tool)).numpy()
    episode = dataclasses.replace(episode, rotation=rotation)
    if spec.command is None:
        return episode
    logged = column(steps, spec.command, source)
    command = binarize_gripper(to_opening(logged, *spec.command_range))
    mask = np.arange(len(episode)) < len(episode) - 1
    action = derive_actions(episode.position, rotation, command)
    return check_episode(dataclasses.replace(episode, action=action, action_mask=mask))


def to_quaternion(values: Array, layout: RotationFormat) -> Array:
    """Orientations [T, 3 or 4] in a dataset's layout to quaternions [T, 4] (w, x, y, z)."""
    tensor = torch.as_tensor(np.asarray(values, np.float64))
    if layout == "euler_xyz":
        return euler_to_quat(tensor, "xyz").numpy()
    if layout == "quat_xyzw":
        tensor = tensor[:, [3, 0, 1, 2]]
    return tensor.numpy()


def to_opening(values: Array, closed: float, opened: float) -> Array:
    """Gripper readings [T] or [T, 1] to openings [T], 0 closed … 1 open, clipped."""
    flat = np.asarray(values, np.float64).reshape(len(values))
    return np.clip((flat - closed) / (opened - closed), 0, 1)


def unsquash(images: Sequence[bytes], aspect: float | None) -> list[bytes]:
    """Give images that were squeezed into another shape their camera's width to height back.

    aspect None leaves them as they are. The height is kept; depth depends on the true proportions.
    """
    if aspect is None:
        return list(images)
    widened = []
    for encoded in images:
        image = Image.fromarray(decode_image(encoded))
        image = image.resize((round(image.height * aspect), image.height), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        widened.append(file.getvalue())
    return widened
