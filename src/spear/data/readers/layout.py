"""From the step arrays of any dataset to our `Episode`, by what its `DatasetSpec` says of its columns."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.data.actions import check_actions, check_episode, derive_actions, first_bad
from spear.data.readers.spec import ANGLES, DatasetSpec, RotationFormat
from spear.embodiments.kinematics import franka_pose
from spear.errors import SpearError
from spear.geometry import (
    euler_to_quat,
    matrix_to_quat,
    quat_canonical,
    quat_exp,
    quat_multiply,
)
from spear.gripper import binarize_commands, observed_openings
from spear.types import CONTROL_CHARACTERS, MAX_EE_SPEED_M_S, MAX_EE_TURN_RAD_S, Array, Episode
from spear.util.images import decode_image, encode_jpeg
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS

Steps = Mapping[str, Any]
"""An episode's columns, nested: arrays, steps first; images and texts: lists of bytes; a str: why not."""
Sources = Iterator[tuple[str, Steps | SpearError]]
"""(source, steps) of one episode after the other, or the reason why it cannot be read."""
MOST_RAD = 4 * math.pi
"""Angles beyond this in most steps are degrees: wrists turn once or twice (our choice)."""
SLACK = 0.1
"""Part of a declared range by which a gripper's reading may lie outside of it (our choice)."""
STILL, STILL_TURN, STILL_GRIPPER = 2e-3, 1e-2, 1e-2
"""Metres and radians per second, and change of opening per step, below which a step is idle (our choice)."""
_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
"""What a whole JPEG and a whole PNG end with."""
_COLUMN = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")


def episode_from(steps: Steps, spec: DatasetSpec, source: str) -> Episode:
    """Our `Episode` from the nested step arrays of a dataset laid out as `spec` says.

    Canonical actions are taken as they are where `spec.action` names their column. Otherwise motions come
    from the states, and gripper commands from the logged ones where the dataset has them: the last step leads
    nowhere known and is masked. Raises SpearError for a missing column or a bad episode, among them one whose
    pose jumps (more than 3 m/s or 10 rad/s between two steps), or one of whose images is cut off.
    """
    assert spec.rate_hz is not None
    position, rotation, form = recorded_pose(steps, spec, source)
    if form in ANGLES and len(rotation) and np.median(np.abs(rotation).max(axis=-1)) > MOST_RAD:
        raise SpearError(
            f"orientations up to {np.abs(rotation).max():.3g} rad: {source}: say angle_unit deg"
        )
    gripper, command = openings(steps, spec, source)
    episode = check_episode(
        Episode(
            images={camera: _images(steps, spec, camera, source) for camera in spec.images},
            position=position,
            rotation=to_quaternion(rotation, form, source),
            gripper=gripper,
            instruction=instruction(steps, spec, source),
            rate_hz=spec.rate_hz,
            source=source,
            success=success(steps, spec, source),
        )
    )
    _check_jumps(episode)
    tool = torch.tensor(spec.tool_rotation, dtype=torch.float32)
    turned = quat_canonical(quat_multiply(torch.as_tensor(episode.rotation), tool)).numpy()
    episode = dataclasses.replace(episode, rotation=turned)
    if spec.action is not None:
        own: dict[str, Any] = {"action": numbers(steps, spec.action, source)}
        if spec.action_mask is not None:
            own["action_mask"] = numbers(steps, spec.action_mask, source).reshape(-1) != 0
        if spec.source is not None:
            own["source"] = _text(steps, spec.source, source)
        return check_actions(dataclasses.replace(episode, **own))
    command = None if command is None else binarize_commands(command, episode.rate_hz)
    if spec.drop_idle:
        episode, command = _without_idle(episode, command)
    if command is None:
        return episode
    action = derive_actions(episode.position, episode.rotation, command)
    known = np.arange(len(episode)) < len(episode) - 1
    return check_actions(dataclasses.replace(episode, action=action, action_mask=known))


def column(steps: Steps, where: str, source: str) -> Any:
    """The rows of a column: "state[0:3]" -> [T, 3], "action[6]" -> [T]. SpearError says what there is."""
    path, span = split_column(where)
    node: Any = steps
    parts = path.split("/")
    while parts:
        # A name may have slashes in it itself: the longest that is there is meant.
        names = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        if (
            name := next((n for n in names if isinstance(node, Mapping) and n in node), None)
        ) is None:
            there = ", ".join(sorted(node)) if isinstance(node, Mapping) else "nothing below it"
            raise SpearError(f"no column {where!r}: {source}: no {parts[0]!r} (there is: {there})")
        node, parts = node[name], parts[name.count("/") + 1 :]
    if isinstance(node, str):
        raise SpearError(f"no column {where!r}: {source}: it cannot be read: {node}")
    if span is None:
        return node
    if getattr(node, "ndim", 0) != 2 or node.shape[1] < span.stop:
        shape = getattr(node, "shape", "no array")
        raise SpearError(f"no column {where!r}: {source}: {path} is {shape}")
    return node[:, span] if ":" in where[len(path) :] else node[:, span.start]


def split_column(where: str) -> tuple[str, slice | None]:
    """The path of a column, and which of its components are meant; None: all. Raises SpearError."""
    if not (match := _COLUMN.match(where)):
        raise SpearError(f"unreadable column {where!r}: write it like observation/state[0:3]")
    if match["first"] is None:
        return match["path"], None
    first = int(match["first"])
    return match["path"], slice(first, int(match["end"] or first + 1))


def leaves(steps: Steps, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(column, values) of nested step arrays."""
    for key, value in sorted(steps.items()):
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def row_count(steps: Steps) -> int:
    """How many steps there are, by the first column that can be read."""
    return len(next((values for _, values in leaves(steps) if not isinstance(values, str)), ()))


def recorded_pose(
    steps: Steps, spec: DatasetSpec, source: str
) -> tuple[Array, Array, RotationFormat]:
    """Recorded positions [T, 3], m, orientations [T, d], angles in rad, and how these are written."""
    assert (
        spec.position is not None and spec.rotation is not None and spec.rotation_format is not None
    )
    position = numbers(steps, spec.position, source)
    turn = ANGLE_UNITS[spec.angle_unit]
    if spec.rotation_format == "franka_joints":
        return (*franka_pose(position * turn, source), "quat_wxyz")
    rotation = numbers(steps, spec.rotation, source)
    if spec.rotation_format in ANGLES:
        rotation = rotation * turn
    return position * LENGTH_UNITS[spec.length_unit], rotation, spec.rotation_format


def numbers(steps: Steps, where: str, source: str) -> Array:
    """A column of numbers, [T] or [T, d] float64. Raises SpearError naming it, and the step that is NaN."""
    try:
        values = np.asarray(column(steps, where, source), np.float64)
    except (TypeError, ValueError) as error:
        raise SpearError(
            f"no numbers in column {where!r}: {source}: name another column"
        ) from error
    if (step := first_bad(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))) is not None:
        there = f"{source} step {step}: {where} is {values[step].tolist()}"
        raise SpearError(f"not a number: {there}; leave the episode out")
    return values


def openings(steps: Steps, spec: DatasetSpec, source: str) -> tuple[Array, Array | None]:
    """Measured and commanded openings [T] of the gripper, 0 closed … 1 open; None where none are commanded.

    Where both are the same but for rounding, nothing was measured: a step then finds what the one before was
    told. Else the state would give its action away, and a policy learn to keep its gripper as it is. Raises
    SpearError for a reading that is outside its declared range by more than `SLACK` of it.
    """
    assert spec.gripper is not None and spec.gripper_range is not None
    found = _opening(steps, spec.gripper, "gripper_range", spec.gripper_range, source)
    if spec.command is not None:
        told = _opening(steps, spec.command, "command_range", spec.command_range, source)
    elif spec.gripper.startswith("action"):
        told = found
    else:
        return found, None
    return observed_openings(found, told), told


def _opening(steps: Steps, where: str, key: str, span: tuple[float, float], source: str) -> Array:
    values = numbers(steps, where, source)
    if values.size != len(values):
        raise SpearError(
            f"no column {where!r}: {source}: it has the shape {values.shape}, not one number"
        )
    values, (closed, opened) = values.reshape(-1), span
    part = (values - closed) / (opened - closed)
    if (step := first_bad((part < -SLACK) | (part > 1 + SLACK))) is not None:
        wrong = f"{where} is {values[step]:.4g}, but {key} is [{closed:g}, {opened:g}]"
        runs = f"in this episode it runs from {values.min():.4g} to {values.max():.4g}"
        cure = "give its readings when closed, then when open"
        raise SpearError(f"out of range: {source} step {step}: {wrong}; {runs}: {cure}")
    return np.clip(part, 0, 1)


def _without_idle(episode: Episode, command: Array | None) -> tuple[Episode, Array | None]:
    """Without the steps at which neither arm nor gripper moves, and the command stays as it was. They are
    measured from where the last step that stays leads: what creeps would add up to a leap of that step."""
    told = np.zeros(len(episode)) if command is None else np.diff(command, prepend=command[:1])
    keep, reached = list[int](), 0
    for step in range(len(episode) - 1):
        ends = [reached, step + 1]
        moved = np.linalg.norm(np.diff(episode.position[ends], axis=0)) * episode.rate_hz > STILL
        moved |= _turned(episode.rotation[ends])[0] * episode.rate_hz > STILL_TURN
        if moved or np.ptp(episode.gripper[ends]) > STILL_GRIPPER or told[step]:
            keep.append(step)
            reached = step + 1
    keep.append(len(episode) - 1)
    parts: dict[str, Any] = {
        n: getattr(episode, n)[keep] for n in ("position", "rotation", "gripper")
    }
    images = {camera: [images[i] for i in keep] for camera, images in episode.images.items()}
    return dataclasses.replace(
        episode, images=images, **parts
    ), None if command is None else command[keep]


def _images(steps: Steps, spec: DatasetSpec, camera: str, source: str) -> list[bytes]:
    """A camera's encoded images. One that does not end as it should is decoded, to see if it is whole.

    Squeezed ones get their camera's width / height back; depth depends on the true proportions.
    """
    where, aspect = spec.images[camera], spec.image_aspect.get(camera)
    images: list[bytes] = []
    for step, encoded in enumerate(column(steps, where, source)):
        if not isinstance(encoded, bytes) or is_depth(encoded):
            raise SpearError(f"no images in column {where!r}: {source}: name another column")
        if encoded and (aspect is not None or not encoded.endswith(_ENDS)):
            pixels = decode_image(encoded, f"{source} step {step} camera {camera!r}")
            if aspect is not None:
                size = round(len(pixels) * aspect), len(pixels)
                wide = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                encoded = encode_jpeg(np.asarray(wide))
        images.append(encoded)
    return images


def is_depth(encoded: bytes) -> bool:
    """Whether it is a PNG of one 16-bit channel: a depth image, no camera's (our choice)."""
    return encoded[1:4] + encoded[24:26] == b"PNG\x10\x00"


def instruction(steps: Steps, spec: DatasetSpec, source: str) -> str:
    """What the robot was asked to do, "" where the text is empty."""
    return _text(steps, spec.instruction, source)


def success(steps: Steps, spec: DatasetSpec, source: str) -> bool | None:
    """What the last row of a column says of how the episode ended; see `DatasetSpec.success`."""
    if (where := spec.success) is None:
        return None
    if isinstance(column(steps, where, source), list):
        folders = {*_text(steps, where, source).split("/")} & {"success", "failure"}
        return folders == {"success"} if folders else None
    last = numbers(steps, where, source).reshape(-1)[-1:]
    return bool(last[0]) if len(last) and last[0] >= 0 else None


def _text(steps: Steps, where: str, source: str) -> str:
    """What a column says: bytes, texts, or Unicode code points padded with zeros; rows are the same or empty.

    Raises SpearError naming the column for anything else, such as numbers, images or a text that changes.
    """
    try:
        rows = {
            r.tobytes() if isinstance(r, np.ndarray) else r: r for r in column(steps, where, source)
        }
        texts = [text for text in dict.fromkeys(map(_words, rows.values())) if text]
    except (TypeError, ValueError, OverflowError) as error:
        raise SpearError(f"no text in column {where!r}: {source}: name another column") from error
    if texts[1:]:
        change = f"{where} is {texts[0]!r} and then {texts[1]!r}"
        raise SpearError(
            f"text that changes: {source}: {change}; cut the episode there, or leave it out"
        )
    return "".join(texts)


def _words(row: Any) -> str:
    if isinstance(row, np.ndarray) and row.dtype.kind in "iu":
        row = "".join(chr(int(c)) for c in row.reshape(-1) if c)
    text = row.strip() if isinstance(row, str) else bytes.decode(row, "utf-8", "replace").strip()
    if CONTROL_CHARACTERS.search(text):
        raise ValueError
    return text


def _check_jumps(episode: Episode) -> None:
    """Raises SpearError for a pose that changes faster than any arm: a wrong column, unit or format."""
    moved = np.linalg.norm(np.diff(episode.position, axis=0), axis=1)
    for change, fastest, what, check in (
        (moved, MAX_EE_SPEED_M_S, "moved by {:.3g} m", "its unit (length_unit)"),
        (
            _turned(episode.rotation),
            MAX_EE_TURN_RAD_S,
            "turned by {:.3g} rad",
            "how its rotations are written",
        ),
    ):
        if change.max(initial=0) * episode.rate_hz > fastest:
            step = int(change.argmax())
            jump = f"jump: {episode.source} step {step + 1}: the end-effector is {what.format(change[step])}"
            raise SpearError(
                f"{jump} in one step; leave it out, or check rate_hz, the column and {check}"
            )


def _turned(rotation: Array) -> Array:
    """[T - 1] angles between quaternions [T, 4] that follow each other, rad; exactly 0 where they are one."""
    apart = (np.linalg.norm(rotation[1:] - sign * rotation[:-1], axis=1) for sign in (1, -1))
    return 4 * np.arcsin(np.minimum(*apart) / 2)


def _from_6d(values: torch.Tensor) -> torch.Tensor:
    """[..., 4, 4] poses in the origin, whose first two rows are the numbers [..., 6]."""
    first, second = values.split(3, dim=-1)
    turn = torch.stack([first, second, torch.linalg.cross(first, second)], dim=-2)
    pose = torch.nn.functional.pad(turn, (0, 1, 0, 1))
    pose[..., 3, 3] = 1
    return pose


def _turn(pose: torch.Tensor) -> torch.Tensor:
    """[..., 4, 4] poses to quaternions [..., 4]."""
    return matrix_to_quat(pose[..., :3, :3].contiguous())


POSES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "6d_columns": lambda v: _from_6d(v).mT,
    "6d_rows": _from_6d,
    "matrix4_columns": lambda v: v.unflatten(-1, (4, 4)).mT,
    "matrix4_rows": lambda v: v.unflatten(-1, (4, 4)),
}
"""Format -> [..., numbers] to homogeneous poses [..., 4, 4], if they are any: see `to_quaternion`."""
FORMS: Mapping[str, tuple[int, Callable[[torch.Tensor], torch.Tensor]]] = {
    "euler_xyz": (3, lambda v: euler_to_quat(v, "xyz")),
    "euler_XYZ": (3, lambda v: euler_to_quat(v, "XYZ")),
    "euler_ZYX": (3, lambda v: euler_to_quat(v.flip(-1), "xyz")),
    "euler_zxy": (3, lambda v: euler_to_quat(v[..., [1, 2, 0]], "zxy")),
    "rotation_vector": (3, lambda v: quat_canonical(quat_exp(v))),
    "quat_wxyz": (4, lambda v: v),
    "quat_xyzw": (4, lambda v: v[..., [3, 0, 1, 2]]),
    "6d_columns": (6, lambda v: _turn(POSES["6d_columns"](v))),
    "6d_rows": (6, lambda v: _turn(POSES["6d_rows"](v))),
    "matrix4_columns": (16, lambda v: _turn(POSES["matrix4_columns"](v))),
    "matrix4_rows": (16, lambda v: _turn(POSES["matrix4_rows"](v))),
}
"""Format -> how many numbers, and [..., numbers], angles in rad, to quaternions [..., 4] (w, x, y, z).

Quaternions keep the length that was written. Joint angles are no such format: see `franka_pose`.
"""


def to_quaternion(values: Array, layout: RotationFormat, source: str = "") -> Array:
    """Orientations [T, d] in a dataset's layout, angles in rad, to quaternions [T, 4] (w, x, y, z).

    Raises SpearError when d is not what the layout has, and for 6 or 16 numbers of no rotation.
    """
    tensor = torch.as_tensor(np.asarray(values, np.float64))
    width, convert = FORMS[layout]
    if tensor.ndim != 2 or tensor.shape[1] != width:
        shape = tuple(tensor.shape)
        raise SpearError(
            f"wrong shape: {source}: rotation is {shape}, but {layout} needs {width} columns"
        )
    if layout in POSES:
        pose = POSES[layout](tensor)
        matrix, last = pose[:, :3, :3], pose.new_tensor([0, 0, 0, 1])
        error = (matrix @ matrix.mT - torch.eye(3, dtype=pose.dtype)).abs().amax((1, 2))
        row = (pose[:, 3] - last).abs().amax(1)
        bad = ~((error < 1e-2) & (row < 1e-3) & (torch.linalg.det(matrix) > 0))
        if (step := first_bad(bad.numpy())) is not None:
            wrong = f"not a rotation: {source} step {step}: the numbers are no rotation written as {layout}"
            raise SpearError(f"{wrong}; check the layout")
    return convert(tensor).numpy()
