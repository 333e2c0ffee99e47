"""Versions of the frames in which poses are written.

A dataset's layout, or a robot's embodiment, says where the base frame and the end-effector frame
are. If the layout was wrong and is corrected, the same recording becomes other poses. Therefore
the frames of each known dataset and robot have a version. A prepared store records the versions of
its frames in `request.json`, and a policy records them in its normalization statistics
(`normalizer.json`). Data and policies of different versions are never mixed, and a policy acts in
the version that it was trained with.

    dataset               version  difference from version 1
    droid                 2        The tool is a Robotiq 2F-85. Version 1 assumed Franka's hand,
                                   which is turned by 45° and shorter.
    fractal20220817_data  2        The tool is rotated by half a turn about x.
    jaco_play             2        The tool and the base are rotated, and the tool has an offset.

The frames of every other dataset have version 1. Data and policies that were made before versions
were recorded have version 1, too.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spear.data.readers.dataset_layout import FRAME_FIELDS, REGISTRY, DatasetLayout
from spear.errors import SpearError

FrameVersions = Mapping[str, int]
"""Name of a dataset or robot → version of its frames."""
CONSTANTS_IN_HASH: dict[str, Any] = {
    "frames": {},
    "logged_rotation_frame": None,
    "logged_translation_unit": None,
    "logged_rotation_unit": None,
}
"""Fields of a layout that do not influence prepared episodes → the constant that is hashed in place
of the field's value."""
LATER_FIELDS = (
    "base_rotation",
    "gripper_opening",
    "tool_offset",
    "autonomous",
    "autonomous_value",
    "urdf",
    "tip",
    "joints",
    "arm",
    *CONSTANTS_IN_HASH,
)
"""Fields of a layout that are hashed only if they differ from their defaults. Earlier versions of
this program did not have these fields, and folders that they prepared should remain valid.

The fields in `CONSTANTS_IN_HASH` are among them: a field whose constant is its default does not
enter the hash at all."""
LAYOUT_DEFAULTS = vars(DatasetLayout(name=""))  # all fields but the name have a default


def get_newest_frame_version(dataset_or_robot: str) -> int:
    """Get the newest version of the frames of a dataset or robot; 1 if the name is not known."""
    layout = REGISTRY.get(dataset_or_robot)
    return 1 if layout is None else layout.frames[dataset_or_robot]


def list_names_with_outdated_frames(frames: FrameVersions) -> list[str]:
    """List the datasets and robots in `frames` whose frames have a newer version."""
    return [name for name, version in frames.items() if version < get_newest_frame_version(name)]


def merge_frame_versions(sources: Iterable[tuple[str, FrameVersions]]) -> dict[str, int]:
    """Merge the frames of data or policies that are used together.

    Args:
        sources: (name for messages, frames) of each dataset or policy.

    Returns:
        The frames of all sources together.

    Raises:
        SpearError: If two sources have different versions of the same frames.
    """
    merged: dict[str, int] = {}
    first_source: dict[str, str] = {}  # name → the first source that has these frames
    for source, frames in sources:
        for name, version in frames.items():
            merged.setdefault(name, version)
            first_source.setdefault(name, source)
            if merged[name] != version:
                raise SpearError(
                    f"{first_source[name]} has version {merged[name]} of the frames of {name}, but "
                    f"{source} has version {version}, and poses of different frames cannot be "
                    "mixed. Prepare or train the older one again."
                )
    return merged


def fill_in_frame_versions_if_simulator_only(
    recorded_frames: FrameVersions | None, is_simulator_only: bool
) -> FrameVersions | None:
    """Fill in the frames of a policy of the simulator, and so decide in which frames it acts.

    Args:
        recorded_frames: The frames that its statistics record; None if the statistics were made
            before versions were recorded.
        is_simulator_only: Whether the policy learned from the built-in simulator only, whose frames
            never changed.

    Returns:
        The frames. {} means that the policy learned no frames that have several versions, so it
        acts in the newest version of all. None means that nobody knows what the policy learned, so
        it acts in the first version of all.
    """
    if recorded_frames is None and is_simulator_only:
        return {}
    return recorded_frames


def read_store_frame_versions(request: Mapping[str, Any]) -> FrameVersions:
    """Find the frames of a prepared store.

    If the store was prepared before versions were recorded, its frames have version 1. They belong
    to the known dataset that the request's path names, or whose layout has the request's hash.

    Args:
        request: The content of the store's `request.json`.
    """
    if "frames" in request:
        return dict(request["frames"])

    folder_names = Path(str(request.get("path", ""))).parts
    frames: dict[str, int] = {}
    for name in REGISTRY:
        if get_newest_frame_version(name) == 1:
            continue
        # The hash of a layout depends on the layout's name. That is the dataset's name, or the name
        # of a folder in the dataset's path.
        hashes = {_hash_layout_of_frame_version_1(name, part) for part in (name, *folder_names)}
        if name in folder_names or request.get("layout") in hashes:
            frames[name] = 1
    return frames


def _hash_layout_of_frame_version_1(name: str, folder_name: str) -> str:
    """Hash a known dataset's layout as it was before its frames were corrected.

    In that layout, the fields that describe frames (`FRAME_FIELDS`) have their defaults, so it does
    not convert frames.

    Args:
        name: The known dataset.
        folder_name: The layout's name in the hash, which may be that of the dataset's folder.
    """
    default_fields = {field: LAYOUT_DEFAULTS[field] for field in FRAME_FIELDS}
    layout = dataclasses.replace(REGISTRY[name], name=folder_name, **default_fields)
    return hash_layout_for_preparation(layout)


def hash_layout_for_preparation(layout: DatasetLayout | None) -> str:
    """Hash the fields of a layout on which prepared episodes depend.

    The hashed text is the one that earlier versions of this program hashed, so that folders that
    they prepared stay valid: it has the old name of the class, and lacks fields that came later.
    """
    if layout is None:
        return hash_text("None")

    hashed_layout = dataclasses.replace(layout, facts={}, weight=None, **CONSTANTS_IN_HASH)
    text = repr(hashed_layout).replace("DatasetLayout(", "DatasetSpec(", 1)
    for name in LATER_FIELDS:
        default = LAYOUT_DEFAULTS[name]
        text = text.replace(f", {name}={default!r}", "", 1)
    return hash_text(text)


def hash_text(text: str) -> str:
    """Hash a text with SHA-256, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
