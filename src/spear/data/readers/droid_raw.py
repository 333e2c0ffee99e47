"""DROID as it is distributed raw: one folder per episode.

    <lab>/<success or failure>/<day>/<time>/
        trajectory.h5                       action/…, observation/robot_state/…, one row per step
        metadata_<uuid>.json                which camera is which, the task, success
        recordings/MP4/<serial>.mp4         one video per camera; the SVO files beside them cannot be read
    aggregated-annotations-*.json           uuid -> language instructions, in a folder above

The layout is that of droid-dataset/droid, droid/postprocessing/schema.py and trajectory_utils/misc.py.
Columns are the paths in the HDF5 file, with "observation/images/<wrist, ext1, ext2>" and
"language_instruction" added.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spear.data.readers.bad import OnBad, each
from spear.data.readers.layout import episode_from
from spear.data.readers.look import has_below
from spear.data.readers.spec import DatasetSpec, Layout, find_spec
from spear.data.readers.splits import split_ranges
from spear.data.readers.video import read_frames
from spear.errors import SpearError
from spear.types import Array, Episode
from spear.util.images import encode_jpeg

NAME = "droid_raw"
CAMERAS = ("wrist", "ext1", "ext2")
SURPLUS_FRAMES = 2
"""Frames that a video may have after the last step (our choice): the camera stops after the robot."""
_NEEDED = ("action", "observation/robot_state", "observation/controller_info")


def is_droid_raw(path: str | Path) -> bool:
    """Whether raw DROID episodes are at or below `path`."""
    return has_below(path, "trajectory.h5")


def find_droid_raw(path: str | Path) -> dict[str, list[Path]]:
    """Split name -> folders of episodes. Those below a folder "failure" are the split "failure"."""
    found: dict[str, list[Path]] = {"train": [], "failure": []}
    for file in sorted(Path(path).glob("**/trajectory.h5")):
        failed = "failure" in file.resolve().parent.parts
        found["failure" if failed else "train"].append(file.parent)
    return {name: folders for name, folders in found.items() if folders}


def read_droid_raw(
    path: str | Path, split: str = "train", dataset: Layout = None, on_bad: OnBad | None = None
) -> Iterator[Episode]:
    """Episodes of raw DROID recordings, in our conventions; arguments and errors as for `read_rlds`.

    Steps at which the operator had not enabled movement are no demonstration: they are masked.
    """
    spec = find_spec(NAME, Path(path), given=dataset)
    yield from each(lambda folder: _read(folder, spec), _chosen(path, split), on_bad)


def steps_without_images(
    path: str | Path, split: str, on_bad: OnBad | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, step arrays) of episodes, where "enabled" [T] says at which steps the robot could move."""

    def read(folder: Path) -> tuple[str, dict[str, Any]]:
        metadata = _metadata(folder)
        steps = read_steps(folder, metadata, ())
        steps["enabled"] = _enabled(steps, len(steps["language_instruction"]))
        return f"{NAME}/{metadata.get('uuid') or folder.name}", steps

    yield from each(read, _chosen(path, split), on_bad)


def _chosen(path: str | Path, split: str) -> Iterator[Path]:
    """The folders of the episodes that a split names."""
    found = find_droid_raw(path)
    for name, first, end in split_ranges({k: [len(v)] for k, v in found.items()}, split, path):
        yield from found[name][first:end]


def _enabled(steps: Mapping[str, Any], length: int) -> Array:
    """[length] bool: whether the operator had enabled movement; True where that is not recorded."""
    enabled = steps["observation"].get("controller_info", {}).get("movement_enabled")
    if enabled is None or len(enabled) != length:
        return np.ones(length, bool)
    return np.asarray(enabled, bool).reshape(-1)


def _read(folder: Path, spec: DatasetSpec) -> Episode:
    metadata = _metadata(folder)
    source = f"{spec.name}/{metadata.get('uuid') or folder.name}"
    steps = read_steps(folder, metadata, {c.rpartition("/")[2] for c in spec.images.values()})
    episode = episode_from(steps, spec, source)
    mask = episode.action_mask
    if mask is not None:
        mask = mask & _enabled(steps, len(mask))
    success = metadata.get("success")
    return dataclasses.replace(
        episode, action_mask=mask, success=success if isinstance(success, bool) else None
    )


def read_steps(folder: Path, metadata: Mapping[str, Any], cameras: Collection[str]) -> dict[str, Any]:
    """The step arrays of one episode, with the frames of these cameras as JPEG."""
    steps: dict[str, Any] = _read_h5(folder / "trajectory.h5")
    state = steps.get("observation", {}).get("robot_state", {}).get("cartesian_position")
    length = 0 if state is None else len(state)
    words = _instruction(folder, metadata)
    steps["language_instruction"] = [words.encode()] * length
    observation = steps.setdefault("observation", {})
    observation["images"] = {
        camera: _frames(folder, metadata, camera, length) for camera in CAMERAS if camera in cameras
    }
    return steps


def _metadata(folder: Path) -> dict[str, Any]:
    files = sorted(folder.glob("metadata_*.json"))
    if not files:
        raise SpearError(f"no metadata: {folder}: metadata_*.json says which camera is which; copy it again")
    try:
        return dict(json.loads(files[0].read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SpearError(f"unreadable: {files[0]}: {error}; copy it again") from error


def _read_h5(path: Path) -> dict[str, Any]:
    """The groups that are needed, as nested dicts of arrays."""
    try:
        import h5py
    except ImportError:
        raise SpearError("raw DROID needs h5py, which is not installed: pip install 'spear-vla[data]'") from None

    def arrays(group: Any) -> dict[str, Any]:
        return {
            key: arrays(value) if isinstance(value, h5py.Group) else np.asarray(value)
            for key, value in group.items()
        }

    steps: dict[str, Any] = {}
    try:
        with h5py.File(path, "r") as file:
            for name in _NEEDED:
                if name in file:
                    *above, last = name.split("/")
                    node = steps
                    for part in above:
                        node = node.setdefault(part, {})
                    node[last] = arrays(file[name])
    except (OSError, RuntimeError, KeyError) as error:
        raise SpearError(f"unreadable: {path}: {error}; copy it again, or leave the episode out") from error
    return steps


def _instruction(folder: Path, metadata: Mapping[str, Any]) -> str:
    """The first annotation of the episode, or else the task that was set; empty when there is neither."""
    for parent in itertools.islice([folder.resolve(), *folder.resolve().parents], 7):
        for file in sorted(parent.glob("aggregated-annotations-*.json")):
            notes = _annotations(file, file.stat().st_mtime_ns).get(str(metadata.get("uuid")), {})
            for key in sorted(notes):
                if str(notes[key]).strip():
                    return str(notes[key]).strip()
    return str(metadata.get("current_task") or "")


@functools.lru_cache(maxsize=2)
def _annotations(file: Path, changed: int) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SpearError(f"unreadable: {file}: {error}; copy it again") from error


def _frames(folder: Path, metadata: Mapping[str, Any], camera: str, length: int) -> list[bytes]:
    """The frames of a camera, one per step; of a stereo pair side by side the left one."""
    serial = metadata.get(f"{camera}_cam_serial")
    if not serial:
        raise SpearError(f"no camera {camera!r}: {folder}: its metadata name none; leave the episode out")
    file = folder / "recordings" / "MP4" / f"{serial}.mp4"
    found = [image for _, image in itertools.islice(read_frames(file), length + SURPLUS_FRAMES + 1)]
    if not length <= len(found) <= length + SURPLUS_FRAMES:
        more = "more than " if len(found) > length else ""
        raise SpearError(
            f"frames and rows differ: {folder}: {file.name} has {more}{min(len(found), length)} frames, but there "
            f"are {length} steps; leave the episode out"
        )
    return [encode_jpeg(_left(image)) for image in found[:length]]


def _left(image: Array) -> Array:
    height, width = image.shape[:2]
    return image[:, : width // 2] if width > 3 * height else image
