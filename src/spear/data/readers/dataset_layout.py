"""What is known of each robot dataset, as data: where its columns are and what they mean.

The datasets are in `oxe.toml`. One that is not there is described in a file `spear.json` in its folder, with
the fields of `DatasetLayout`, the rest from the entry that "like" names (docs/finetune.md has an example).

A column is a path below the steps, with an optional range of its last dimension: "observation/state[0:3]".
LeRobot's dots are steps of the path: its "observation.images.top" is "observation/images/top".
"""

import dataclasses
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import field
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from spear.errors import SpearError, check_known, summarize_error, unknown_name_error
from spear.util.files import read_json

AngleFormat = Literal["euler_xyz", "euler_XYZ", "euler_ZYX", "rotation_vector"]
LoggedFormat = (
    AngleFormat
    | Literal["quat_wxyz", "quat_xyzw"]
    | Literal["6d_columns", "6d_rows", "matrix4_columns", "matrix4_rows"]
)
"""How a logged rotation is written down.

euler_xyz        roll, pitch, yaw: angles about the fixed axes x, y, z (R = Rz Ry Rx).
euler_ZYX        yaw, pitch, roll: euler_xyz with its columns the other way round (not SciPy's "zyx").
euler_XYZ        angles about the moving axes x, y, z (R = Rx Ry Rz).
rotation_vector  axis times angle.
quat_wxyz, quat_xyzw   unit quaternion, scalar first or last.
6d_columns, 6d_rows   the first two columns, or rows, of the matrix, one after the other.
matrix4_columns, matrix4_rows   the 16 numbers of a homogeneous pose, column after column or row after row.
"""
RecordedOnly = Literal["euler_zxy", "franka_joints"]
"""Formats of recorded orientations alone. The audit does not judge them: nothing else looks like joint
angles, and rotations alone cannot tell angles about z, x, y from roll, pitch, yaw about other axes.

euler_zxy        angles about the fixed axes z, x, y in that order (R = Ry Rx Rz).
franka_joints    a Franka's seven joint angles, the column of both positions and rotations (`franka_pose`).
"""
RotationFormat = LoggedFormat | RecordedOnly
RECORDED_ONLY: tuple[str, ...] = get_args(RecordedOnly)
ANGLE_FORMATS = (*get_args(AngleFormat), *RECORDED_ONLY)
"""Formats that have a unit."""
LAYOUT_FILE = "spear.json"


def _two_readings(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] == span[1]:
        raise ValueError("give two different readings, of closed and of open")
    return span


def _unit_norm(quaternion: tuple[float, ...]) -> tuple[float, ...]:
    if abs(math.hypot(*quaternion) - 1) > 1e-3:
        raise ValueError("give a unit quaternion (w, x, y, z)")
    return quaternion


Positive = Annotated[float, Field(gt=0)]
Range = Annotated[tuple[float, float], AfterValidator(_two_readings)]
"""The readings of closed and of open."""
Quaternion = Annotated[tuple[float, float, float, float], AfterValidator(_unit_norm)]


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class DatasetLayout:
    """One dataset's layout and conventions. None is "not known"; `facts` says what is behind a value.

    robot, rate_hz   the arm, and steps per second.
    images           our camera name -> column of encoded images.
    image_aspect     our camera name -> true width / height, where the stored images were squeezed.
    instruction      column of the instruction, the same in all steps.
    position         column of the end-effector position, base frame (x forward, y left, z up).
    rotation         column of its orientation in the base frame, in `rotation_format`.
    length_unit      of positions and of logged translations; see `util.units`.
    angle_unit       of the numbers in `rotation` and `logged_rotation` where angles; see `util.units`.
    tool_rotation    quaternion (w, x, y, z) from the right, from the dataset's end-effector frame to ours:
                     parallel to the base frame when the gripper points down and its fingers close along y.
    gripper          column of the measured opening; `gripper_range` is its (closed, open) reading.
    command          column of the absolute gripper command, or None; `command_range` likewise. A `gripper`
                     column that is part of an action is one.
    logged_translation, logged_rotation   columns of the logged arm actions, which only the audit uses.
    logged_rotation_format, logged_kind, logged_frame   what they mean: change per step, target or velocity;
                     in the base or the end-effector frame.
    drop_idle        leave out the steps at which neither arm nor gripper moves.
    newest           the last version of the dataset that is in order, where later ones are not.
    success          column whose last row says how the episode ended: a number (0 failed, below 0 not known),
                     or a path with a folder "success" or "failure"; neither: not known.
    action           column of canonical actions [T, 8] (`Action.to_vector`), in datasets that we wrote;
                     `action_mask` and `source` are columns of the same parts of an `Episode`.
    weight, facts    share of the training mixture, %; field -> where we know it from.
    """

    name: str
    robot: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    image_aspect: Mapping[str, Annotated[float, Field(ge=0.1, le=10)]] = field(default_factory=dict)
    instruction: str = "language_instruction"
    position: str | None = None
    rotation: str | None = None
    rotation_format: RotationFormat | None = None
    length_unit: Literal["m", "cm", "mm"] = "m"
    angle_unit: Literal["rad", "deg"] = "rad"
    tool_rotation: Quaternion = (1.0, 0.0, 0.0, 0.0)
    gripper: str | None = None
    gripper_range: Range | None = None
    command: str | None = None
    command_range: Range = (0.0, 1.0)
    rate_hz: Positive | None = None
    logged_translation: str | None = None
    logged_rotation: str | None = None
    logged_rotation_format: LoggedFormat | None = None
    logged_kind: Literal["delta", "absolute", "velocity"] | None = None
    logged_frame: Literal["base", "ee"] | None = None
    drop_idle: bool = False
    newest: str | None = None
    success: str | None = None
    action: str | None = None
    action_mask: str | None = None
    source: str | None = None
    weight: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


DEPENDENT_FIELDS = {
    "images": ("image_aspect",),
    "gripper": ("command", "command_range"),
    "action": ("command", "command_range", "tool_rotation", "drop_idle"),
}
_NEEDED = (
    "images",
    "position",
    "rotation",
    "rotation_format",
    "gripper",
    "gripper_range",
    "rate_hz",
)


def find_missing_fields(spec: DatasetLayout) -> list[str]:
    """Fields without which no episode can be read, and which are not known."""
    return [name for name in _NEEDED if not getattr(spec, name)]


def find_layout(
    name: str, folder: Path, given: Path | None = None, defaults: Mapping[str, Any] | None = None
) -> DatasetLayout:
    """The layout of dataset `name`: by the given file, by the `spear.json` in its folder, or by the registry.

    defaults  what the dataset's format says itself (its rate …), before the registry and after `spear.json`.
    Raises SpearError for a dataset of which too little is known, a column of two cameras, and a bad file.
    """
    path = given or folder / LAYOUT_FILE
    if path.is_file() or given is not None:
        spec = read_layout_file(path, name, defaults)
    elif name in REGISTRY:
        spec = dataclasses.replace(REGISTRY[name], **(defaults or {}))
    else:
        hint = f"`spear data describe {folder}` proposes a {LAYOUT_FILE}"
        raise SpearError(f"no layout: nothing says what the columns of {name!r} mean: {hint}")
    check_known(f"camera (image_aspect, in {path})", spec.images, *spec.image_aspect)
    if len({*spec.images.values()}) < len(spec.images):
        raise SpearError(
            f"images (in {path}): two cameras are the same column: leave one of them out"
        )
    if unknown := find_missing_fields(spec):
        why = "; ".join(
            f"{key} ({spec.facts[key]})" if key in spec.facts else key for key in unknown
        )
        raise SpearError(f"not enough is known of dataset {spec.name!r}: {why}: say it in {path}")
    return spec


def read_layout_file(
    path: Path, name: str, defaults: Mapping[str, Any] | None = None
) -> DatasetLayout:
    """The layout in a JSON file, perhaps not complete. Raises SpearError, naming file and key, if bad."""
    fields = read_json(path, "give a file like spear.json")
    like = fields.pop("like", None)
    known = {*(f.name for f in dataclasses.fields(DatasetLayout)), "like"} - {
        "weight"
    }  # see --shares
    check_known(f"key (in {path})", known, *fields)
    check_known(f"dataset (like, in {path})", REGISTRY, *([] if like is None else [str(like)]))
    base = dict(vars(REGISTRY[like])) if like is not None else {}
    for own, bound in DEPENDENT_FIELDS.items():  # which says nothing of other columns
        for key in bound if own in fields else ():
            base.pop(key, None)
    spec = _spec({**base, **(defaults or {}), "name": name, **fields}, path)
    needs = {"command_range": "command", "action_mask": "action", "source": "action"}
    for key in (key for key in needs if key in fields and getattr(spec, needs[key]) is None):
        raise SpearError(
            f"{key} (in {path}): of no column: say which as {needs[key]}, or leave it out"
        )
    for key in DEPENDENT_FIELDS["action"] if spec.action is not None else ():
        if key in fields:
            raise SpearError(
                f"{key} (in {path}): actions are taken as they are: leave it, or action, out"
            )
    return spec


def _spec(fields: Mapping[str, Any], path: Path) -> DatasetLayout:
    """A `DatasetLayout` of fields as JSON or TOML have them; the SpearError for a bad value names its key."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    try:
        return DatasetLayout(**values)
    except ValidationError as error:
        key = str(error.errors()[0]["loc"][0])
        choices = [e["ctx"]["expected"] for e in error.errors() if e["type"] == "literal_error"]
        if choices and isinstance(fields[key], str):
            known = re.findall(r"'(\w+)'", " ".join(choices))
            raise unknown_name_error(f"{key} (in {path})", fields[key], known) from error
        why = summarize_error(error).removeprefix(f"{key} ")
        raise SpearError(
            f"wrong value: {path}: {key} is {json.dumps(fields[key])}: {why}"
        ) from error


def _load() -> dict[str, DatasetLayout]:
    file = resources.files("spear.data.readers").joinpath("oxe.toml")
    tables = tomllib.loads(file.read_text("utf-8"))
    families, found = tables.pop("families"), {}
    for name, table in tables.items():
        parts = [families["all"], *(families[family] for family in table.pop("like", ())), table]
        facts = {key: fact for part in parts for key, fact in part.get("facts", {}).items()}
        fields = {key: value for part in parts for key, value in part.items()}
        found[name] = _spec({**fields, "name": name, "facts": facts}, Path(str(file)))
    return found


REGISTRY: Mapping[str, DatasetLayout] = _load()
"""Dataset name -> what is known of it."""
