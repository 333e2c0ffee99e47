"""What is known of each robot dataset, as data: where its columns are and what they mean.

A dataset that is not here is described in a file `spear.json` in its RLDS folder, with the fields of
`DatasetSpec` (where the file says nothing, those of the entry that "like" names are taken over):

    {"like": "bridge_dataset", "instruction": "language_instruction", "rate_hz": 10,
     "images": {"external": "observation/image", "wrist": "observation/wrist_image"},
     "position": "observation/state[0:3]", "rotation": "observation/state[3:7]",
     "rotation_format": "quat_xyzw", "gripper": "observation/state[7]", "gripper_range": [0.0, 0.08]}

A column is a path below "steps", with an optional range of its last dimension: "observation/state[0:3]".
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from spear.errors import SpearError, unknown_name

RotationFormat = Literal["euler_xyz", "quat_wxyz", "quat_xyzw"]
"""euler_xyz: roll, pitch, yaw about fixed axes, rad (R = Rz Ry Rx)."""
SPEC_FILE = "spear.json"


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset's layout and conventions.

    images           our camera name -> column of encoded images.
    image_aspect     our camera name -> true width / height, where the stored images were squeezed.
    instruction      column of the instruction (its first row counts).
    position         column of the end-effector position, metres, base frame (x forward, y left, z up).
    rotation         column of its orientation in the base frame, in `rotation_format`.
    tool_rotation    quaternion (w, x, y, z) that turns the dataset's end-effector frame into ours, multiplied
                     from the right. Ours is parallel to the base frame when the gripper points straight down
                     and its fingers close along y.
    gripper          column of the measured opening; `gripper_range` is its (closed, open) reading.
    command          column of the absolute gripper command, or None; `command_range` likewise.
    rate_hz          steps per second.
    weight           share of the paper's mixture, %; None where unknown.
    facts            field -> where we know it from.
    """

    name: str
    images: Mapping[str, str]
    instruction: str
    position: str
    rotation: str
    rotation_format: RotationFormat
    gripper: str
    gripper_range: tuple[float, float]
    rate_hz: float
    command: str | None = None
    command_range: tuple[float, float] = (0.0, 1.0)
    tool_rotation: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    image_aspect: Mapping[str, float] = field(default_factory=dict)
    weight: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


_WIDOWX_CODE = "rail-berkeley/bridge_data_robot, transformation_utils.py and widowx_controller.py"

REGISTRY: Mapping[str, DatasetSpec] = {
    spec.name: spec
    for spec in (
        DatasetSpec(
            name="bridge_dataset",
            images={"external": "observation/image_0"},
            image_aspect={"external": 4 / 3},
            instruction="language_instruction",
            position="observation/state[0:3]",
            rotation="observation/state[3:6]",
            rotation_format="euler_xyz",
            gripper="observation/state[6]",
            gripper_range=(0.0, 1.0),
            command="action[6]",
            command_range=(0.0, 1.0),
            rate_hz=5.0,
            weight=18.0,
            facts={
                "images": "BridgeData V2 paper: camera 0 is the fixed over-the-shoulder view; others vary",
                "image_aspect": "rail-berkeley/bridge_data_v2 squashes 640 x 480 images to squares",
                "rotation": f"{_WIDOWX_CODE}: R = Rz Ry Rx, relative to a gripper that points down",
                "tool_rotation": f"{_WIDOWX_CODE}: the reference pose turns the tool's x axis (forward) down "
                "and leaves y, along which the fingers close: the identity in our frame",
                "gripper": f"{_WIDOWX_CODE}: 1 open, 0 closed; readings reach 1.01",
                "motion": "logged motions are relative to the previous target, not to the pose reached, and "
                "rotate about base axes: integrated, they drift from the states (see the tests), so motions "
                "are derived from the states, as Octo and OpenVLA do",
                "rate_hz": "BridgeData V2 paper: 5 Hz",
                "weight": "the paper: 18 %",
            },
        ),
    )
}


def find_spec(name: str, folder: Path) -> DatasetSpec:
    """The layout of dataset `name`: by the `spear.json` in its folder, or else by the registry.

    Raises SpearError for an unknown dataset (suggesting the nearest name) and for a bad `spear.json`.
    """
    path = folder / SPEC_FILE
    if not path.is_file():
        if name not in REGISTRY:
            hint = f"describe yours in {path} (fields: see spear.data.oxe)"
            raise SpearError(f"{unknown_name('dataset', name, REGISTRY)}; {hint}")
        return REGISTRY[name]
    try:
        fields = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SpearError(f"unreadable: {path}: {error}; it must be a JSON object") from error
    return _from_fields(fields, name, path)


def _from_fields(fields: dict[str, Any], name: str, path: Path) -> DatasetSpec:
    known = [f.name for f in dataclasses.fields(DatasetSpec)]
    like = fields.pop("like", None)
    for key in fields:
        if key not in known:
            raise unknown_name(f"key (in {path})", key, [*known, "like"])
    base: dict[str, Any] = {"name": name}
    if like is not None:
        if like not in REGISTRY:
            raise unknown_name(f"dataset (like, in {path})", like, REGISTRY)
        base = {**vars(REGISTRY[like]), **base}
    fields = {**base, **fields}
    missing = [
        f.name
        for f in dataclasses.fields(DatasetSpec)
        if f.name not in fields and f.default is f.default_factory is dataclasses.MISSING
    ]
    if missing:
        names = ", ".join(missing)
        raise SpearError(f'incomplete: {path}: add {names}, or name a similar dataset as "like"')
    example = json.loads(json.dumps(vars(REGISTRY["bridge_dataset"])))
    for key, value in fields.items():
        if key != "name" and value != vars(DatasetSpec).get(key, ...) and not _alike(value, example[key]):
            raise SpearError(f"wrong value: {path}: {key} must look like {json.dumps(example[key])}")
    spec = DatasetSpec(**fields)
    if spec.rotation_format not in get_args(RotationFormat):
        raise unknown_name(f"rotation_format (in {path})", spec.rotation_format, get_args(RotationFormat))
    return spec


def _alike(value: Any, example: Any) -> bool:
    """Whether two JSON values are of the same kind; an example's list gives the length."""
    if isinstance(example, dict):
        return isinstance(value, Mapping) and all(
            _alike(v, next(iter(example.values()))) for v in value.values()
        )
    if isinstance(example, list):
        return isinstance(value, list | tuple) and len(value) == len(example) and _alike(value[0], example[0])
    if isinstance(example, str):
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool)


_COLUMN = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")


def column(steps: Mapping[str, Any], where: str, source: str) -> Any:
    """The rows of a column, e.g. "observation/state[0:3]" -> [T, 3], "action[6]" -> [T].

    Raises SpearError naming the column and what there is instead.
    """
    match = _COLUMN.match(where)
    if not match:
        raise SpearError(f"unreadable column {where!r}: write it like observation/state[0:3]")
    node: Any = steps
    for part in match["path"].split("/"):
        if not isinstance(node, Mapping) or part not in node:
            there = ", ".join(sorted(node)) if isinstance(node, Mapping) else "nothing below it"
            raise SpearError(f"no column {where!r}: {source}: no {part!r} (there is: {there})")
        node = node[part]
    if match["first"] is None:
        return node
    first = int(match["first"])
    end = first + 1 if match["end"] is None else int(match["end"])
    if getattr(node, "ndim", 0) != 2 or node.shape[1] < end:
        shape = getattr(node, "shape", "no array")
        raise SpearError(f"no column {where!r}: {source}: {match['path']} is {shape}")
    return node[:, first:end] if match["end"] else node[:, first]
