"""What is known of each robot dataset, as data: where its columns are and what they mean.

The datasets are in `oxe.toml`. One that is not there is described in a file `spear.json` in its folder, with
the fields of `DatasetSpec` (where the file says nothing, those of the entry that "like" names are taken
over):

    {"like": "bridge_dataset", "instruction": "language_instruction", "rate_hz": 10,
     "images": {"external": "observation/image", "wrist": "observation/wrist_image"},
     "position": "observation/state[0:3]", "rotation": "observation/state[3:7]",
     "rotation_format": "quat_xyzw", "gripper": "observation/state[7]", "gripper_range": [0.0, 0.08]}

A column is a path below the steps, with an optional range of its last dimension: "observation/state[0:3]".
LeRobot's dots are steps of the path: its "observation.images.top" is "observation/images/top".
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from spear.errors import SpearError, unknown_name

RotationFormat = Literal[
    "euler_xyz",
    "euler_XYZ",
    "euler_zxy",
    "euler_zyx",
    "rotation_vector",
    "quat_wxyz",
    "quat_xyzw",
    "matrix4_columns",
    "matrix4_rows",
    "franka_joints",
]
"""How an orientation is written down.

euler_xyz        roll, pitch, yaw: angles about the fixed axes x, y, z (R = Rz Ry Rx).
euler_zyx        yaw, pitch, roll: euler_xyz with its columns the other way round.
euler_XYZ        angles about the moving axes x, y, z (R = Rx Ry Rz).
euler_zxy        angles about the fixed axes z, x, y in that order (R = Ry Rx Rz).
rotation_vector  axis times angle.
quat_wxyz, quat_xyzw   unit quaternion, scalar first or last.
matrix4_columns, matrix4_rows   the 16 numbers of a homogeneous pose, column after column or row after row.
franka_joints    none: the pose follows from a Franka's seven joint angles, which are the column of positions
                 and of rotations (`spear.data.readers.franka`).
"""
ANGLES = ("euler_xyz", "euler_zyx", "euler_XYZ", "euler_zxy", "rotation_vector", "franka_joints")
"""Formats that have a unit."""
LENGTH_UNITS = {"m": 1.0, "cm": 1e-2, "mm": 1e-3}
"""Unit -> metres."""
ANGLE_UNITS = {"rad": 1.0, "deg": math.pi / 180}
"""Unit -> radians."""
UNIT_TOLERANCE = 1e-3
"""How far the norm of `tool_rotation` may be from 1 (our choice)."""
RECORDED_ONLY = ("franka_joints", "euler_zxy")
"""Formats of recorded orientations alone, which the audit believes and makes quaternions first: joint angles
are nothing else, and angles about z, x, y are the mirror image of roll, pitch, yaw about other axes, which
rotations alone cannot tell."""
ActionKind = Literal["delta", "absolute", "velocity"]
ActionFrame = Literal["base", "ee"]
SPEC_FILE = "spear.json"


@dataclass(frozen=True)
class DatasetSpec:
    """One dataset's layout and conventions. None is "not known"; `facts` says what is behind a value.

    robot            the arm.
    images           our camera name -> column of encoded images.
    image_aspect     our camera name -> true width / height, where the stored images were squeezed.
    instruction      column of the instruction (its first row counts).
    position         column of the end-effector position, base frame (x forward, y left, z up).
    rotation         column of its orientation in the base frame, in `rotation_format`.
    length_unit      of positions and of logged translations; see `LENGTH_UNITS`.
    angle_unit       of the numbers in `rotation` and `logged_rotation` where these are angles; see
                     `ANGLE_UNITS`.
    tool_rotation    quaternion (w, x, y, z) that turns the dataset's end-effector frame into ours, multiplied
                     from the right. Ours is parallel to the base frame when the gripper points straight down
                     and its fingers close along y.
    gripper          column of the measured opening; `gripper_range` is its (closed, open) reading.
    command          column of the absolute gripper command, or None; `command_range` likewise.
    rate_hz          steps per second.
    logged_translation, logged_rotation   columns of the logged arm actions. Training does not use them, as
                     motions are derived from the states.
    logged_rotation_format, logged_kind, logged_frame   what they mean: change per step, target or velocity;
                     in the base or the end-effector frame.
    action           column of canonical actions [T, 8] (`Action.to_vector`), in datasets that we wrote;
                     `action_mask`, `success` and `source` are columns of the same parts of an `Episode`.
    weight           share of the training mixture, %.
    facts            field -> where we know it from.
    """

    name: str
    robot: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    image_aspect: Mapping[str, float] = field(default_factory=dict)
    instruction: str = "language_instruction"
    position: str | None = None
    rotation: str | None = None
    rotation_format: RotationFormat | None = None
    length_unit: str = "m"
    angle_unit: str = "rad"
    tool_rotation: tuple[float, float, float, float] = (1.0, 0.0, 0.0, 0.0)
    gripper: str | None = None
    gripper_range: tuple[float, float] | None = None
    command: str | None = None
    command_range: tuple[float, float] = (0.0, 1.0)
    rate_hz: float | None = None
    logged_translation: str | None = None
    logged_rotation: str | None = None
    logged_rotation_format: RotationFormat | None = None
    logged_kind: ActionKind | None = None
    logged_frame: ActionFrame | None = None
    action: str | None = None
    action_mask: str | None = None
    success: str | None = None
    source: str | None = None
    weight: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


Layout = DatasetSpec | Path | None
"""A layout, a file that describes one (see `read_spec`), or None: the dataset's own."""
_EXAMPLES: Mapping[str, Any] = {
    "images": {"external": "observation/image_0"},
    "image_aspect": {"external": 1.3333333333333333},
    "tool_rotation": [1.0, 0.0, 0.0, 0.0],
    "gripper_range": [0.0, 1.0],
    "command_range": [0.0, 1.0],
    "rate_hz": 5.0,
    "weight": 18.0,
    "facts": {"rate_hz": "our robot's manual"},
}
"""What a field looks like; those that are not here are texts."""
_NEEDED = ("position", "rotation", "rotation_format", "gripper", "gripper_range", "rate_hz")
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "rotation_format": get_args(RotationFormat),
    "logged_rotation_format": tuple(f for f in get_args(RotationFormat) if f not in RECORDED_ONLY),
    "length_unit": tuple(LENGTH_UNITS),
    "angle_unit": tuple(ANGLE_UNITS),
    "logged_kind": get_args(ActionKind),
    "logged_frame": get_args(ActionFrame),
}


def missing(spec: DatasetSpec) -> list[str]:
    """Fields without which no episode can be read."""
    return [name for name in ("images", *_NEEDED) if not getattr(spec, name)]


def require(spec: DatasetSpec) -> tuple[str, str, RotationFormat, str, tuple[float, float], float]:
    """(position, rotation, rotation_format, gripper, gripper_range, rate_hz), all known.

    Raises SpearError naming what is not known of the dataset, and why.
    """
    unknown = missing(spec)
    if unknown:
        why = "; ".join(f"{name} ({spec.facts[name]})" if name in spec.facts else name for name in unknown)
        raise SpearError(
            f"not enough is known of dataset {spec.name!r}: {why}: say it in a {SPEC_FILE} in its folder"
        )
    position, rotation, layout, gripper, span, rate = (getattr(spec, name) for name in _NEEDED)
    return position, rotation, layout, gripper, span, rate


def find_spec(
    name: str, folder: Path, defaults: Mapping[str, Any] | None = None, given: Layout = None
) -> DatasetSpec:
    """The layout of dataset `name`: as given, or by the `spear.json` in its folder, or else by the registry.

    given     a layout, or a file like `spear.json` with one.
    defaults  what the format of the dataset says itself (its rate, its column of instructions): before what
              the registry says, and behind `spear.json`.
    Raises SpearError for an unknown dataset (suggesting the nearest name), for one of which too little is
    known, and for a bad `spear.json`.
    """
    path = given if isinstance(given, Path) else folder / SPEC_FILE
    if isinstance(given, DatasetSpec):
        spec = given
    elif path.is_file() or given is not None:
        spec = read_spec(path, name, defaults)
    elif name in REGISTRY:
        spec = dataclasses.replace(REGISTRY[name], **(defaults or {}))
    else:
        hint = f"describe yours in {path} (fields: see spear.data.readers.spec)"
        raise SpearError(f"{unknown_name('dataset', name, REGISTRY)}; {hint}")
    require(spec)
    return spec


def read_spec(path: Path, name: str, defaults: Mapping[str, Any] | None = None) -> DatasetSpec:
    """The layout that a JSON file describes (see `spear.data.readers.spec`). Raises SpearError for a bad
    one."""
    try:
        fields = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise SpearError(f"unreadable: {path}: {error}; it must be a JSON object") from error
    like = fields.pop("like", None)
    known = [f.name for f in dataclasses.fields(DatasetSpec)]
    for key in fields:
        if key not in known:
            raise unknown_name(f"key (in {path})", key, [*known, "like"])
    if like is not None and like not in REGISTRY:
        raise unknown_name(f"dataset (like, in {path})", str(like), REGISTRY)
    base = vars(REGISTRY[like]) if like is not None else {}
    spec = _spec({**base, **(defaults or {}), "name": name, **fields}, path)
    unknown = missing(spec)
    if unknown:
        names = ", ".join(unknown)
        raise SpearError(f'incomplete: {path}: add {names}, or name a similar dataset as "like"')
    return spec


def _spec(fields: Mapping[str, Any], path: Path) -> DatasetSpec:
    """A `DatasetSpec` of fields as JSON or TOML have them, each checked."""
    empty = vars(DatasetSpec(""))
    for key, value in fields.items():
        if value == empty[key] or (value is None and empty[key] is None and key not in _EXAMPLES):
            continue
        example = _EXAMPLES.get(key, "text")
        if not _alike(value, example):
            raise SpearError(f"wrong value: {path}: {key} must look like {json.dumps(example)}")
        _check_numbers(key, value, path)
        if key == "logged_rotation_format" and value in RECORDED_ONLY:
            raise SpearError(
                f"wrong value: {path}: only recorded orientations are ever in {value}: give {key} how the logged "
                f"rotations are written ({', '.join(_CHOICES[key])}), or leave it out"
            )
        if key in _CHOICES and value not in _CHOICES[key]:
            raise unknown_name(f"{key} (in {path})", value, _CHOICES[key])
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    return DatasetSpec(**values)


def _check_numbers(key: str, value: Any, path: Path) -> None:
    """Raises SpearError for numbers of the right kind that mean nothing: NaN, an empty range, no rate."""
    rows = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, list | tuple)
        else [value]
    )
    numbers = [n for n in rows if isinstance(n, int | float)]
    if not all(map(math.isfinite, numbers)):
        raise SpearError(f"wrong value: {path}: {key} is {value}: give finite numbers")
    if key in ("gripper_range", "command_range") and numbers[0] == numbers[1]:
        raise SpearError(
            f"wrong value: {path}: {key} is {list(value)}: give two readings, of closed and of open"
        )
    if key in ("rate_hz", "image_aspect") and min(numbers, default=1) <= 0:
        raise SpearError(f"wrong value: {path}: {key} is {value}: give more than 0")
    if key == "tool_rotation" and abs(math.hypot(*numbers) - 1) > UNIT_TOLERANCE:
        raise SpearError(f"wrong value: {path}: {key} is {list(value)}: give a unit quaternion (w, x, y, z)")


def _alike(value: Any, example: Any) -> bool:
    """Whether two JSON values are of the same kind; an example's list gives the length."""
    if isinstance(example, dict):
        return isinstance(value, Mapping) and all(
            _alike(v, next(iter(example.values()))) for v in value.values()
        )
    if isinstance(example, list):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(example)
            and all(_alike(v, e) for v, e in zip(value, example, strict=True))
        )
    if isinstance(example, str):
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _load() -> dict[str, DatasetSpec]:
    file = resources.files("spear.data.readers").joinpath("oxe.toml")
    tables = tomllib.loads(file.read_text("utf-8"))
    return {name: _spec({"name": name, **table}, Path(str(file))) for name, table in tables.items()}


REGISTRY: Mapping[str, DatasetSpec] = _load()
"""Dataset name -> what is known of it."""

_COLUMN = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")


def column(steps: Mapping[str, Any], where: str, source: str) -> Any:
    """The rows of a column, e.g. "observation/state[0:3]" -> [T, 3], "action[6]" -> [T].

    Raises SpearError naming the column and what there is instead.
    """
    match = _COLUMN.match(where)
    if not match:
        raise SpearError(f"unreadable column {where!r}: write it like observation/state[0:3]")
    node: Any = steps
    parts = match["path"].split("/")
    while parts:
        # A name may have slashes in it itself: the longest that is there is meant.
        names = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        name = next((n for n in names if isinstance(node, Mapping) and n in node), None)
        if name is None:
            there = ", ".join(sorted(node)) if isinstance(node, Mapping) else "nothing below it"
            raise SpearError(f"no column {where!r}: {source}: no {parts[0]!r} (there is: {there})")
        node, parts = node[name], parts[name.count("/") + 1 :]
    if match["first"] is None:
        return node
    first = int(match["first"])
    end = first + 1 if match["end"] is None else int(match["end"])
    if getattr(node, "ndim", 0) != 2 or node.shape[1] < end:
        shape = getattr(node, "shape", "no array")
        raise SpearError(f"no column {where!r}: {source}: {match['path']} is {shape}")
    return node[:, first:end] if match["end"] else node[:, first]
