"""The layout of each robot dataset, as data: where its columns are and what they mean.

The registry, `oxe.toml`, has one entry per published dataset. Any other dataset is described by a
file `spear.json` in its folder, with the fields of `DatasetLayout`. The file's key "like" may name
an entry of the registry: fields that the file does not give come from this entry.
docs/howto/describe.md has an example.

A column is named by its path among the recorded values of a step, which may be followed by a range
of its last dimension: "observation/state[0:3]". In the name of a LeRobot column, dots become
slashes: "observation.images.top" becomes "observation/images/top".
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

from spear.embodiments.urdf import UrdfArm, check_joint_names, read_urdf_arm
from spear.errors import (
    SpearError,
    check_known,
    make_unknown_name_error,
    notice,
    summarize_error,
)
from spear.util.files import read_json
from spear.util.foreign_paths import join_inside

AngleFormat = Literal["euler_xyz", "euler_XYZ", "euler_ZYX", "rotation_vector"]
LoggedFormat = (
    AngleFormat
    | Literal["quat_wxyz", "quat_xyzw"]
    | Literal["6d_columns", "6d_rows", "matrix4_columns", "matrix4_rows"]
)
"""The formats of logged rotations, that is, of the rotations in a dataset's own actions.

euler_xyz        roll, pitch, yaw: angles about the fixed axes x, y, z (R = Rz Ry Rx).
euler_XYZ        angles about the moving axes x, y, z (R = Rx Ry Rz).
euler_ZYX        yaw, pitch, roll: the same rotation as euler_xyz, with its angles in reverse order.
rotation_vector  axis times angle.
quat_wxyz, quat_xyzw   unit quaternion, scalar first or last.
6d_columns, 6d_rows    the first two columns, or rows, of the matrix, one after the other.
matrix4_columns, matrix4_rows   the 16 numbers of a homogeneous pose, by columns or by rows.
"""
RecordedOnly = Literal["euler_zxy", "franka_joints", "urdf_joints"]
"""Formats that only recorded orientations have, not logged rotations.

The audit, which compares the columns of a dataset with each other, does not test these formats. No
other numbers look like joint angles. Angles about z, x, y could also be roll, pitch, yaw in a base
frame with other axes, and rotations alone cannot decide between the two.

euler_zxy        angles about the fixed axes z, x, y in that order (R = Ry Rx Rz).
franka_joints    a Franka's seven joint angles, in one column for positions and rotations
                 (`compute_franka_ee_poses`).
urdf_joints      joint angles of an arm that a URDF describes, in one column for positions and
                 rotations (`spear.data.readers.joint_angles`). Logged targets may be joint angles
                 of the same arm, too.
"""
RotationFormat = LoggedFormat | RecordedOnly
RECORDED_ONLY: tuple[str, ...] = get_args(RecordedOnly)
ANGLE_FORMATS = (*get_args(AngleFormat), *RECORDED_ONLY)
"""Formats whose numbers are angles, in rad or degrees (`DatasetLayout.angle_unit`)."""
URDF_JOINTS = "urdf_joints"
LAYOUT_FILE = "spear.json"
REGISTRY_FILE = "oxe.toml"
UNIT_NORM_TOLERANCE = 1e-3  # how far the norm of a layout's quaternion may be from 1


def _validate_two_readings(closed_and_open: tuple[float, float]) -> tuple[float, float]:
    closed_reading, open_reading = closed_and_open
    if closed_reading == open_reading:
        raise ValueError("give two different readings, of closed and of open")
    return closed_and_open


def _validate_unit_norm(quaternion: tuple[float, ...]) -> tuple[float, ...]:
    if abs(math.hypot(*quaternion) - 1) > UNIT_NORM_TOLERANCE:
        raise ValueError("give a unit quaternion (w, x, y, z)")
    return quaternion


Positive = Annotated[float, Field(gt=0)]
Opening = Annotated[float, Field(ge=0, le=1)]
AspectRatio = Annotated[float, Field(ge=0.1, le=10)]
ClosedAndOpenReadings = Annotated[tuple[float, float], AfterValidator(_validate_two_readings)]
"""The readings of a gripper: first when it is closed, then when it is open."""
Quaternion = Annotated[tuple[float, float, float, float], AfterValidator(_validate_unit_norm)]
Offset = tuple[float, float, float]
"""A position in the dataset's end-effector frame, m."""
FrameVersion = Annotated[int, Field(ge=1)]
IDENTITY_ROTATION = (1.0, 0.0, 0.0, 0.0)
NO_OFFSET = (0.0, 0.0, 0.0)


@dataclass(frozen=True, config=ConfigDict(strict=True, allow_inf_nan=False))
class DatasetLayout:
    """The layout and the conventions of one dataset.

    A field that is None is not known, or the dataset has no such column.

    name             the dataset's name.
    robot            the arm.
    rate_hz          steps per second.
    images           our camera name → column of encoded images.
    image_aspect     our camera name → true width / height, if the stored images were squeezed.
    instruction      column of the instruction, which is the same in all steps.
    position         column of the end-effector position, base frame (x forward, y left, z up).
    rotation         column of the end-effector orientation, base frame.
    rotation_format  format of the numbers in the column `rotation`.
    urdf             file of the URDF of the arm, in the folder of the layout file, if the numbers
                     are joint angles ("urdf_joints").
    tip              link of the URDF whose poses are meant: the one between the finger tips.
    joints           names of the URDF's joints in the order of the numbers. Without them, the
                     dataset's metadata name the numbers, or their order is from base to tip.
    arm              the joints from the base to the tip. `resolve_layout` reads them from the URDF.
    length_unit      unit of positions. It is also the unit of logged translations, unless
                     `logged_translation_unit` is given.
    angle_unit       unit of the numbers in `rotation`, if they are angles. It is also the unit of
                     logged rotations, unless `logged_rotation_unit` is given.
    tool_rotation    quaternion (w, x, y, z) by which orientations are multiplied from the right. It
                     leads from the dataset's end-effector frame to ours, which is parallel to the
                     base frame when the gripper points down and its fingers close along y.
    tool_offset      position of our end-effector, which is between the finger tips, in the
                     dataset's end-effector frame, m.
    base_rotation    quaternion (w, x, y, z) by which orientations are multiplied from the left, and
                     which rotates positions. It leads from the dataset's base frame to ours (x
                     forward, y left, z up).
    gripper          column of the measured opening. If the column is part of an action, it is also
                     the gripper command.
    gripper_range    readings of the column `gripper` when closed and when open.
    command          column of the absolute gripper command.
    command_range    readings of the column `command` when closed and when open.
    gripper_opening  the opening, 0 closed to 1 open, of a gripper that never moves and therefore
                     has no column.
    logged_translation, logged_rotation   columns of the arm's part of the dataset's own actions.
                     Only the audit reads them.
    logged_rotation_format   format of the numbers in `logged_rotation`.
    logged_kind      whether a logged action is the change in one step ("delta"), the target
                     ("absolute") or a velocity.
    logged_frame     frame of logged translations and rotations: base or end-effector.
    logged_rotation_frame   frame of logged rotations, if it is not `logged_frame`. "angles" means
                     that the logged angles are added to the recorded angles, number by number.
    logged_translation_unit   meters (per second, if the kind is velocity) that a logged 1 stands
                     for, if logged actions are in a controller's own unit.
    logged_rotation_unit   likewise for logged rotations, in radians.
    autonomous       column that says which steps a policy did instead of a person. Nothing is
                     learned from the actions of these steps.
    autonomous_value   the value of the column `autonomous` at steps that a policy did.
    frames           name of a dataset or robot → version of its frames (`spear.data.frames`).
    drop_idle        whether to remove the steps at which neither arm nor gripper moves.
    newest           the last correct version of the dataset, if later versions are broken.
    success          column whose last row says how the episode ended. The row is a number (0
                     failed, above 0 succeeded, below 0 not known), or a path with a folder
                     "success" or "failure" (without such a folder, not known).
    action           column of canonical actions [T, 8] (`Action.to_vector`), in datasets that this
                     program wrote.
    action_mask, source   columns of these fields of an `Episode`, in datasets that have `action`.
    weight           fraction of the published training mixture, %.
    facts            field → how we know its value, or what is known of it if it is missing.
    """

    name: str
    robot: str | None = None
    images: Mapping[str, str] = field(default_factory=dict)
    image_aspect: Mapping[str, AspectRatio] = field(default_factory=dict)
    instruction: str = "language_instruction"
    position: str | None = None
    rotation: str | None = None
    rotation_format: RotationFormat | None = None
    urdf: str | None = None
    tip: str | None = None
    joints: tuple[str, ...] | None = None
    arm: UrdfArm | None = None
    length_unit: Literal["m", "cm", "mm"] = "m"
    angle_unit: Literal["rad", "deg"] = "rad"
    tool_rotation: Quaternion = IDENTITY_ROTATION
    tool_offset: Offset = NO_OFFSET
    base_rotation: Quaternion = IDENTITY_ROTATION
    gripper: str | None = None
    gripper_range: ClosedAndOpenReadings | None = None
    gripper_opening: Opening | None = None
    command: str | None = None
    command_range: ClosedAndOpenReadings = (0.0, 1.0)
    rate_hz: Positive | None = None
    logged_translation: str | None = None
    logged_rotation: str | None = None
    logged_rotation_format: LoggedFormat | Literal["urdf_joints"] | None = None
    logged_kind: Literal["delta", "absolute", "velocity"] | None = None
    logged_frame: Literal["base", "ee"] | None = None
    logged_rotation_frame: Literal["base", "ee", "angles"] | None = None
    logged_translation_unit: Positive | None = None
    logged_rotation_unit: Positive | None = None
    autonomous: str | None = None
    autonomous_value: float = 1.0
    frames: Mapping[str, FrameVersion] = field(default_factory=dict)
    drop_idle: bool = False
    newest: str | None = None
    success: str | None = None
    action: str | None = None
    action_mask: str | None = None
    source: str | None = None
    weight: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)


FRAME_FIELDS = ("tool_rotation", "tool_offset", "base_rotation")
"""Fields that convert the dataset's frames to ours. `spear.data.frames` counts their versions."""
DEPENDENT_FIELDS = {
    "images": ("image_aspect",),
    "gripper": ("command", "command_range", "gripper_opening"),
    "gripper_opening": ("gripper", "gripper_range", "command", "command_range"),
    "logged_frame": ("logged_rotation_frame",),
    "logged_translation": ("logged_translation_unit",),
    "logged_rotation": ("logged_rotation_unit",),
    "action": (
        "command",
        "command_range",
        "tool_rotation",
        "tool_offset",
        "base_rotation",
        "drop_idle",
    ),
    "autonomous": ("autonomous_value",),
    **dict.fromkeys(FRAME_FIELDS, ("frames",)),
}
"""Field → fields that depend on its value. Where a layout file replaces the value of the entry that
it is "like", these fields of the entry no longer apply."""
COLUMN_OF_FIELD = {
    "command_range": "command",
    "logged_translation_unit": "logged_translation",
    "logged_rotation_unit": "logged_rotation",
    "autonomous_value": "autonomous",
    "action_mask": "action",
    "source": "action",
}
"""Field → the field that names the column which it describes."""
REQUIRED_FIELDS = (
    "images",
    "position",
    "rotation",
    "rotation_format",
    "gripper",
    "gripper_range",
    "rate_hz",
)
"""Fields without which no episode can be read."""
GRIPPER_FIELDS = ("gripper", "gripper_range")
"""Required fields that `gripper_opening` replaces."""


def find_missing_fields(layout: DatasetLayout) -> list[str]:
    """List the required fields that the layout does not give."""
    missing_fields = [name for name in REQUIRED_FIELDS if not getattr(layout, name)]
    if layout.gripper_opening is not None:  # which replaces the fields of the gripper's column
        return [name for name in missing_fields if name not in GRIPPER_FIELDS]
    return missing_fields


def resolve_layout(
    name: str,
    folder: Path,
    layout_file: Path | None = None,
    format_defaults: Mapping[str, Any] | None = None,
) -> DatasetLayout:
    """Find the layout of a dataset.

    Args:
        name: The dataset's name.
        folder: The dataset's folder.
        layout_file: The file that describes the dataset. If it is None, the `spear.json` in the
            folder describes the dataset. If there is none either, the registry does.
        format_defaults: Field → value, as the dataset's own metadata say, such as its rate. These
            values override the registry, and a layout file overrides these values.

    Raises:
        SpearError: If nothing describes the dataset, required fields are missing, two cameras have
            the same column, or the file is bad.
    """
    path = folder / LAYOUT_FILE if layout_file is None else layout_file
    if layout_file is not None or path.is_file():
        layout = read_layout_file(path, name, format_defaults)
    elif name in REGISTRY:
        layout = dataclasses.replace(REGISTRY[name], **(format_defaults or {}))
    else:
        # An RLDS dataset has a folder per version.
        misplaced = folder.parent / LAYOUT_FILE
        if misplaced.is_file() and (folder / "features.json").is_file():
            raise SpearError(
                f"nothing in {folder} says what the columns of {name!r} mean, but there is "
                f"{misplaced}. If it is about this dataset, move it to {path}, or pass "
                f"--layout {misplaced}."
            )
        raise SpearError(
            f"nothing says what the columns of {name!r} mean. `spear data describe {folder}` "
            f"proposes a {LAYOUT_FILE}; for joint angles, give it --urdf and --tip, too."
        )

    check_known("camera", layout.images, *layout.image_aspect, location=f"image_aspect of {path}")
    if len(set(layout.images.values())) < len(layout.images):
        raise SpearError(
            f"two cameras under images in {path} have the same column. Leave one of them out."
        )
    missing_fields = find_missing_fields(layout)
    if missing_fields:
        raise _make_incomplete_layout_error(missing_fields, layout, path)
    return _with_arm(layout, path)


def _with_arm(layout: DatasetLayout, path: Path) -> DatasetLayout:
    """Add the arm whose URDF a layout file names, if the dataset has joint angles.

    Args:
        layout: The layout.
        path: The layout file. The URDF is in its folder: a dataset that others wrote must not name
            any file of this computer.

    Raises:
        SpearError: If the URDF cannot be used, or a key about the joints is missing or wrong.
    """
    if URDF_JOINTS not in (layout.rotation_format, layout.logged_rotation_format):
        return layout
    if layout.rotation_format != URDF_JOINTS or layout.position != layout.rotation:
        raise SpearError(
            f"position and rotation in {path} are not the same column of {URDF_JOINTS}. Name the "
            f"column of the joint angles for both, and {URDF_JOINTS} as rotation_format."
        )
    if layout.urdf is None or layout.tip is None:
        raise SpearError(
            f"{path} has joint angles, but no {'tip' if layout.urdf else 'urdf'}. Give the file of "
            "the arm's URDF as urdf, and its link between the finger tips as tip."
        )
    arm = read_urdf_arm(join_inside(path.parent, layout.urdf), layout.tip)
    if layout.joints is not None:
        check_joint_names(arm, layout.joints, "the key joints", str(path))
    return dataclasses.replace(layout, arm=arm)


def _make_incomplete_layout_error(
    missing_fields: list[str], layout: DatasetLayout, layout_file: Path
) -> SpearError:
    """The error for missing fields, with what the layout's `facts` say about each field."""
    descriptions: list[str] = []
    for field_name in missing_fields:
        if field_name in layout.facts:
            descriptions.append(f"{field_name} ({layout.facts[field_name]})")
        else:
            descriptions.append(field_name)
    return SpearError(
        f"the layout of dataset {layout.name!r} lacks {', '.join(descriptions)}. Add what is "
        f"missing to {layout_file}."
    )


def read_layout_file(
    path: Path, name: str, format_defaults: Mapping[str, Any] | None = None
) -> DatasetLayout:
    """Read a layout from a JSON file. The layout may lack required fields.

    Args:
        path: The file.
        name: The dataset's name.
        format_defaults: See `resolve_layout`.

    Raises:
        SpearError: If the file or one of its keys is bad; the message names both.
    """
    fields = read_json(path, "give a file like spear.json")
    like_name = fields.pop("like", None)
    known_keys = {field.name for field in dataclasses.fields(DatasetLayout)} | {"like"}
    known_keys -= {"weight", "arm"}  # `--sampling-weights` and `resolve_layout` set these
    check_known(
        "key",
        known_keys,
        *fields,
        location=str(path),
        advice="docs/reference/spear-json.md describes all keys.",
    )

    # The registry's entry that "like" names, without fields that depend on what this file replaces.
    base_fields: dict[str, Any] = {}
    if like_name is not None:
        check_known(
            "dataset",
            REGISTRY,
            str(like_name),
            location=f"the key like of {path}",
            advice="`spear data datasets` lists the known ones.",
        )
        base_fields = dict(vars(REGISTRY[like_name]))
    for field_name, dependent_fields in DEPENDENT_FIELDS.items():
        if field_name in fields:
            for dependent_field in dependent_fields:
                base_fields.pop(dependent_field, None)
    if like_name is not None and "images" in fields and "image_aspect" not in fields:
        aspect = REGISTRY[like_name].image_aspect
        if aspect:
            notice(
                f"{path} has its own images, so the image_aspect of {like_name}, "
                f"{json.dumps(dict(aspect))}, is not taken. If your images are squeezed, too, add "
                'it as image_aspect; if not, add "image_aspect": {}.'
            )

    all_fields = {**base_fields, **(format_defaults or {}), "name": name, **fields}
    layout = _make_layout(all_fields, path)
    _check_fields_fit_columns(layout, fields, path)
    return layout


def _check_fields_fit_columns(layout: DatasetLayout, fields: Mapping[str, Any], path: Path) -> None:
    """Raise SpearError for keys of a file that do not fit the columns that the layout has.

    Args:
        layout: The layout, with the fields of the entry that the file is like.
        fields: Key → value, as the file has them.
        path: The file.
    """
    for key, column in COLUMN_OF_FIELD.items():
        if key in fields and getattr(layout, column) is None:
            raise SpearError(
                f"{path} has {key}, but no {column}. Give the column as {column}, or leave "
                f"{key} out."
            )
    if layout.gripper_opening is not None and (layout.gripper or layout.command):
        raise SpearError(
            f"{path} has gripper_opening and a column of the gripper. Leave one of them out."
        )
    if layout.action is None:
        return

    # The column `action` has canonical actions, in our frames. They are not converted, so settings
    # of a conversion would have no effect.
    for key in DEPENDENT_FIELDS["action"]:
        if key in fields:
            raise SpearError(
                f"{path} has {key} and action, whose numbers are taken without a change. Leave "
                "one of them out."
            )


def _make_layout(fields: Mapping[str, Any], path: Path) -> DatasetLayout:
    """Make a `DatasetLayout` from fields as JSON or TOML have them, with lists for tuples.

    Raises SpearError for a bad value. The message names its key and `path`.
    """
    values: dict[str, Any] = {}
    for key, value in fields.items():
        values[key] = tuple(value) if isinstance(value, list) else value
    try:
        return DatasetLayout(**values)
    except ValidationError as error:
        raise _make_wrong_value_error(error, fields, path) from error


def _make_wrong_value_error(
    error: ValidationError, fields: Mapping[str, Any], path: Path
) -> SpearError:
    """The error for the first wrong value. For a misspelled choice, it names the known choices."""
    details = error.errors()
    key = str(details[0]["loc"][0])  # "loc" is the path to the wrong value
    choices = [
        problem["ctx"]["expected"] for problem in details if problem["type"] == "literal_error"
    ]
    if choices and isinstance(fields[key], str):
        # pydantic lists the choices of a `Literal` as text: "'m', 'cm' or 'mm'".
        known_values = re.findall(r"'(\w+)'", " ".join(choices))
        return make_unknown_name_error(key, fields[key], known_values, str(path))

    reason = summarize_error(error).removeprefix(f"{key} ")
    return SpearError(
        f"{key} in {path} cannot be {json.dumps(fields[key])} ({reason}). Correct this value."
    )


def _load_registry() -> dict[str, DatasetLayout]:
    """Read the registry `oxe.toml`, which has one table per dataset.

    A dataset inherits the fields of the family "all", and of the families that its key "like"
    names. Later families override earlier ones, and the dataset's own table overrides families.
    """
    file = resources.files("spear.data.readers").joinpath(REGISTRY_FILE)
    tables = tomllib.loads(file.read_text("utf-8"))
    families = tables.pop("families")
    layouts: dict[str, DatasetLayout] = {}
    for name, dataset_table in tables.items():
        family_names = ["all", *dataset_table.pop("like", ())]
        frames = {name: dataset_table.pop("frame_version", 1)}
        family_tables = [families[family] for family in family_names]
        facts: dict[str, str] = {}
        fields: dict[str, Any] = {}
        for table in [*family_tables, dataset_table]:
            facts.update(table.get("facts", {}))
            fields.update(table)
        fields.update(name=name, frames=frames, facts=facts)
        layouts[name] = _make_layout(fields, Path(str(file)))
    return layouts


REGISTRY: Mapping[str, DatasetLayout] = _load_registry()
"""Dataset name → its layout."""
