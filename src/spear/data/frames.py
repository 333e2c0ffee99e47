"""Versions of the frames in which poses are written.

A dataset's layout, or a robot's embodiment, says where the base frame and the end-effector frame
are. If that was wrong and is corrected, the same joint angles become another pose. Therefore each
known dataset and robot has a version of its frames. Prepared stores record it in `request.json`,
normalization statistics, and with them policies, in `normalizer.json`. Data and policies of
different versions are never mixed, and a policy acts in the version that it was trained with.

    droid                 2  tool not turned by 45°, tips of a Robotiq 2F-85 (1: Franka's hand)
    fractal20220817_data  2  tool turned by half a turn about x (1: the identity)
    jaco_play             2  tool, its tips and base turned into our frames (1: the identity)

Every other dataset has version 1. What was made before versions were recorded has version 1, too.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from spear.data.readers.dataset_layout import FRAME_FIELDS, REGISTRY, DatasetLayout
from spear.errors import SpearError

Frames = Mapping[str, int]
"""Name of a dataset or robot → version of its frames."""
UNHASHED_FIELDS: dict[str, Any] = {
    "frames": {},
    "logged_rotation_frame": None,
    "logged_translation_unit": None,
    "logged_rotation_unit": None,
}
"""Values that replace those of fields of layouts on which no prepared episode depends."""
LATER_FIELDS = (
    "base_rotation",
    "gripper_opening",
    "tool_offset",
    "autonomous",
    "autonomous_value",
    *UNHASHED_FIELDS,
)
"""Fields of layouts that are not part of the hash unless they differ from their defaults."""
LAYOUT_DEFAULTS = vars(DatasetLayout(name=""))


def get_current_version(name: str) -> int:
    """Get the version that the frames of a dataset or robot have now; 1 if it is not known."""
    layout = REGISTRY.get(name)
    return 1 if layout is None else layout.frames[name]


def find_outdated_frames(frames: Frames) -> list[str]:
    """List the datasets and robots of which a newer version of the frames is known."""
    return [name for name, version in frames.items() if version < get_current_version(name)]


def merge_frames(sources: Iterable[tuple[str, Frames]]) -> dict[str, int]:
    """Merge the frames of data or policies that are used together.

    Args:
        sources: (name for messages, frames) of each.

    Returns:
        All frames.

    Raises:
        SpearError: If two sources have different versions of the same frames.
    """
    merged: dict[str, int] = {}
    owner: dict[str, str] = {}
    for source, frames in sources:
        for name, version in frames.items():
            if merged.setdefault(name, version) != version:
                raise SpearError(
                    f"{owner[name]} has version {merged[name]} of the frames of {name}, but "
                    f"{source} has version {version}, and poses of different frames cannot be "
                    "mixed. Prepare or train the older one again."
                )
            owner.setdefault(name, source)
    return merged


def resolve_frames(recorded: Frames | None, is_simulator_only: bool) -> Frames | None:
    """Resolve the frames of a policy.

    Args:
        recorded: What its statistics record; None if they were made before there were versions.
        is_simulator_only: Whether it saw the built-in simulator only, whose frames never changed.

    Returns:
        Its frames; None if they are not known, and are the first version of what it learned from.
    """
    if recorded is None and is_simulator_only:
        return {}
    return recorded


def read_store_frames(request: Mapping[str, Any]) -> Frames:
    """Read the frames of a prepared store from its `request.json`.

    A store that was prepared before versions were recorded has the first version of the known
    dataset that its path or its layout is of.
    """
    if "frames" in request:
        return dict(request["frames"])

    folder_names = Path(str(request.get("path", ""))).parts
    frames: dict[str, int] = {}
    for name in REGISTRY:
        if get_current_version(name) == 1:
            continue
        hashes = {_hash_first_version(name, folder) for folder in (name, *folder_names)}
        if name in folder_names or request.get("layout") in hashes:
            frames[name] = 1
    return frames


def _hash_first_version(name: str, folder_name: str) -> str:
    """Hash the layout of a dataset as it was with the first version of its frames."""
    defaults = {field: LAYOUT_DEFAULTS[field] for field in FRAME_FIELDS}
    return hash_layout(dataclasses.replace(REGISTRY[name], name=folder_name, **defaults))


def hash_layout(layout: DatasetLayout | None) -> str:
    """Hash what a layout says of the columns."""
    if layout is None:
        return hash_text("None")

    layout = dataclasses.replace(layout, facts={}, weight=None, **UNHASHED_FIELDS)
    # The text is that of earlier versions, so that their folders stay valid: with the old name of
    # the class, and without the fields that came later.
    text = repr(layout).replace("DatasetLayout(", "DatasetSpec(", 1)
    for name in LATER_FIELDS:
        default = LAYOUT_DEFAULTS[name]
        text = text.replace(f", {name}={default!r}", "", 1)
    return hash_text(text)


def hash_text(text: str) -> str:
    """Hash a text, SHA-256 in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()
