"""From the step arrays of any dataset to our `Episode`, by what its `DatasetLayout` says of its columns."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.data.actions import check_actions, check_episode, derive_actions, find_first
from spear.data.readers.columns import (
    Steps,
    is_depth_png,
    read_column,
    read_numbers,
    read_text,
)
from spear.data.readers.dataset_layout import ANGLE_FORMATS, DatasetLayout, RotationFormat
from spear.data.readers.rotation_formats import to_quaternion
from spear.embodiments.kinematics import franka_pose
from spear.errors import SpearError
from spear.geometry import (
    quat_canonical,
    quat_multiply,
)
from spear.gripper import binarize_commands, observed_openings
from spear.types import MAX_EE_SPEED_M_S, MAX_EE_TURN_RAD_S, Array, Episode
from spear.util.images import decode_image, encode_jpeg
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS

MOST_RAD = 4 * math.pi
"""Angles beyond this in most steps are degrees: wrists turn once or twice (our choice)."""
SLACK = 0.1
"""Part of a declared range by which a gripper's reading may lie outside of it (our choice)."""
STILL, STILL_TURN, STILL_GRIPPER = 2e-3, 1e-2, 1e-2
"""Metres and radians per second, and change of opening per step, below which a step is idle (our choice)."""
_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
"""What a whole JPEG and a whole PNG end with."""


def build_episode(steps: Steps, spec: DatasetLayout, source: str) -> Episode:
    """Our `Episode` from the nested step arrays of a dataset laid out as `spec` says.

    Canonical actions are taken as they are where `spec.action` names their column. Otherwise motions come
    from the states, and gripper commands from the logged ones where the dataset has them: the last step leads
    nowhere known and is masked. Raises SpearError for a missing column or a bad episode, among them one whose
    pose jumps (more than 3 m/s or 10 rad/s between two steps), or one of whose images is cut off.
    """
    assert spec.rate_hz is not None
    position, rotation, form = read_pose(steps, spec, source)
    if (
        form in ANGLE_FORMATS
        and len(rotation)
        and np.median(np.abs(rotation).max(axis=-1)) > MOST_RAD
    ):
        raise SpearError(
            f"orientations up to {np.abs(rotation).max():.3g} rad: {source}: say angle_unit deg"
        )
    gripper, command = read_openings(steps, spec, source)
    episode = check_episode(
        Episode(
            images={camera: _images(steps, spec, camera, source) for camera in spec.images},
            position=position,
            rotation=to_quaternion(rotation, form, source),
            gripper=gripper,
            instruction=read_instruction(steps, spec, source),
            rate_hz=spec.rate_hz,
            source=source,
            success=read_success(steps, spec, source),
        )
    )
    _check_jumps(episode)
    tool = torch.tensor(spec.tool_rotation, dtype=torch.float32)
    turned = quat_canonical(quat_multiply(torch.as_tensor(episode.rotation), tool)).numpy()
    episode = dataclasses.replace(episode, rotation=turned)
    if spec.action is not None:
        own: dict[str, Any] = {"action": read_numbers(steps, spec.action, source)}
        if spec.action_mask is not None:
            own["action_mask"] = read_numbers(steps, spec.action_mask, source).reshape(-1) != 0
        if spec.source is not None:
            own["source"] = read_text(steps, spec.source, source)
        return check_actions(dataclasses.replace(episode, **own))
    command = None if command is None else binarize_commands(command, episode.rate_hz)
    if spec.drop_idle:
        episode, command = _without_idle(episode, command)
    if command is None:
        return episode
    action = derive_actions(episode.position, episode.rotation, command)
    known = np.arange(len(episode)) < len(episode) - 1
    return check_actions(dataclasses.replace(episode, action=action, action_mask=known))


def read_pose(
    steps: Steps, spec: DatasetLayout, source: str
) -> tuple[Array, Array, RotationFormat]:
    """Recorded positions [T, 3], m, orientations [T, d], angles in rad, and how these are written."""
    assert (
        spec.position is not None and spec.rotation is not None and spec.rotation_format is not None
    )
    position = read_numbers(steps, spec.position, source)
    turn = ANGLE_UNITS[spec.angle_unit]
    if spec.rotation_format == "franka_joints":
        return (*franka_pose(position * turn, source), "quat_wxyz")
    rotation = read_numbers(steps, spec.rotation, source)
    if spec.rotation_format in ANGLE_FORMATS:
        rotation = rotation * turn
    return position * LENGTH_UNITS[spec.length_unit], rotation, spec.rotation_format


def read_openings(steps: Steps, spec: DatasetLayout, source: str) -> tuple[Array, Array | None]:
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
    values = read_numbers(steps, where, source)
    if values.size != len(values):
        raise SpearError(
            f"no column {where!r}: {source}: it has the shape {values.shape}, not one number"
        )
    values, (closed, opened) = values.reshape(-1), span
    part = (values - closed) / (opened - closed)
    if (step := find_first((part < -SLACK) | (part > 1 + SLACK))) is not None:
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


def _images(steps: Steps, spec: DatasetLayout, camera: str, source: str) -> list[bytes]:
    """A camera's encoded images. One that does not end as it should is decoded, to see if it is whole.

    Squeezed ones get their camera's width / height back; depth depends on the true proportions.
    """
    where, aspect = spec.images[camera], spec.image_aspect.get(camera)
    images: list[bytes] = []
    for step, encoded in enumerate(read_column(steps, where, source)):
        if not isinstance(encoded, bytes) or is_depth_png(encoded):
            raise SpearError(f"no images in column {where!r}: {source}: name another column")
        if encoded and (aspect is not None or not encoded.endswith(_ENDS)):
            pixels = decode_image(encoded, f"{source} step {step} camera {camera!r}")
            if aspect is not None:
                size = round(len(pixels) * aspect), len(pixels)
                wide = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
                encoded = encode_jpeg(np.asarray(wide))
        images.append(encoded)
    return images


def read_instruction(steps: Steps, spec: DatasetLayout, source: str) -> str:
    """What the robot was asked to do, "" where the text is empty."""
    return read_text(steps, spec.instruction, source)


def read_success(steps: Steps, spec: DatasetLayout, source: str) -> bool | None:
    """What the last row of a column says of how the episode ended; see `DatasetLayout.success`."""
    if (where := spec.success) is None:
        return None
    if isinstance(read_column(steps, where, source), list):
        folders = {*read_text(steps, where, source).split("/")} & {"success", "failure"}
        return folders == {"success"} if folders else None
    last = read_numbers(steps, where, source).reshape(-1)[-1:]
    return bool(last[0]) if len(last) and last[0] >= 0 else None


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
