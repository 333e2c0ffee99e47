"""From the step arrays of any dataset to our `Episode`, by what its `DatasetSpec` says of its columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.data.actions import binarize_gripper, derive_actions
from spear.data.episode import check_episode
from spear.data.readers.bad import OnBad, each
from spear.data.readers.franka import franka_pose
from spear.data.readers.rotations import FORMS, pose_matrix
from spear.data.readers.spec import (
    ANGLE_UNITS,
    ANGLES,
    LENGTH_UNITS,
    DatasetSpec,
    RotationFormat,
    column,
    require,
)
from spear.errors import SpearError
from spear.geometry import quat_canonical, quat_multiply
from spear.types import Array, Episode
from spear.util.images import decode_image, encode_jpeg

FASTEST = 3.0
"""Metres per second that an end-effector can move and still be believed (our choice; a Franka does 1.7)."""
FASTEST_TURN = 10.0
"""Radians per second that it can turn and still be believed (our choice; a Franka's wrist does 2.6)."""
_ENDS = (b"\xff\xd9", b"IEND\xaeB`\x82")
"""What a whole JPEG and a whole PNG end with."""


def episode_from(steps: Mapping[str, Any], spec: DatasetSpec, source: str) -> Episode:
    """Our `Episode` from the nested step arrays of a dataset laid out as `spec` says.

    Canonical actions are taken as they are where `spec.action` names their column. Otherwise motions come
    from the states, and gripper commands from the logged ones where the dataset has them: the last step leads
    nowhere known and is masked. Raises SpearError for a missing column or a bad episode, among them one whose
    pose jumps (more than 3 m/s or 10 rad/s between two steps), or one of whose images is cut off.
    """
    *_, gripper_column, span, rate_hz = require(spec)
    position, rotation, layout = recorded_pose(steps, spec, source)
    episode = check_episode(
        Episode(
            images={
                camera: unsquash(_pictures(steps, key, source), spec.image_aspect.get(camera))
                for camera, key in spec.images.items()
            },
            position=position,
            rotation=to_quaternion(rotation, layout, source),
            gripper=to_opening(_numbers(steps, gripper_column, source), *span),
            instruction=_instruction(column(steps, spec.instruction, source)),
            rate_hz=rate_hz,
            source=source,
        )
    )
    _check_jumps(episode)
    tool = torch.tensor(spec.tool_rotation, dtype=torch.float32)
    rotation = quat_canonical(quat_multiply(torch.as_tensor(episode.rotation), tool)).numpy()
    episode = dataclasses.replace(episode, rotation=rotation)
    if spec.action is not None:
        return _with_actions(episode, steps, spec)
    if spec.command is None:
        return episode
    logged = _numbers(steps, spec.command, source)
    command = binarize_gripper(to_opening(logged, *spec.command_range))
    mask = np.arange(len(episode)) < len(episode) - 1
    action = derive_actions(episode.position, rotation, command)
    return check_episode(dataclasses.replace(episode, action=action, action_mask=mask))


def episodes_from(
    found: Iterable[tuple[str, Mapping[str, Any]]], spec: DatasetSpec, on_bad: OnBad | None
) -> Iterator[Episode]:
    """`episode_from` of every (source, step arrays); bad episodes as `spear.data.readers.bad.each` has it."""
    return each(lambda one: episode_from(one[1], spec, one[0]), found, on_bad)


def recorded_pose(
    steps: Mapping[str, Any], spec: DatasetSpec, source: str
) -> tuple[Array, Array, RotationFormat]:
    """Recorded positions [T, 3], m, orientations [T, d], angles in rad, and how these are written, by the
    layout."""
    assert spec.position is not None and spec.rotation is not None and spec.rotation_format is not None
    position = _numbers(steps, spec.position, source)
    turn = ANGLE_UNITS[spec.angle_unit]
    if spec.rotation_format == "franka_joints":
        return (*franka_pose(position * turn, source), "quat_wxyz")
    rotation = _numbers(steps, spec.rotation, source)
    if spec.rotation_format in ANGLES:
        rotation = rotation * turn
    return position * LENGTH_UNITS[spec.length_unit], rotation, spec.rotation_format


def _with_actions(episode: Episode, steps: Mapping[str, Any], spec: DatasetSpec) -> Episode:
    """The episode with what else its dataset holds in our own terms."""
    assert spec.action is not None
    name = episode.source
    parts: dict[str, Any] = {"action": np.asarray(column(steps, spec.action, name))}
    if spec.action_mask is not None:
        parts["action_mask"] = np.asarray(column(steps, spec.action_mask, name), bool).reshape(-1)
    if spec.success is not None:
        last = int(np.asarray(column(steps, spec.success, name)).reshape(-1)[-1])
        parts["success"] = None if last < 0 else bool(last)
    if spec.source is not None:
        parts["source"] = bytes(column(steps, spec.source, name)[0]).decode("utf-8", "replace")
    return check_episode(dataclasses.replace(episode, **parts))


def _numbers(steps: Mapping[str, Any], where: str, source: str) -> Array:
    """A column of numbers, [T] or [T, d] float64."""
    try:
        return np.asarray(column(steps, where, source), np.float64)
    except (TypeError, ValueError) as error:
        raise SpearError(f"no numbers in column {where!r}: {source}: name another column") from error


def _pictures(steps: Mapping[str, Any], where: str, source: str) -> Sequence[bytes]:
    """A column of encoded images. One that does not end as it should is decoded, to see whether it is
    whole."""
    images: Sequence[bytes] = column(steps, where, source)
    for step, image in enumerate(images):
        if not isinstance(image, bytes):
            raise SpearError(f"no images in column {where!r}: {source}: name another column")
        if image and not image.endswith(_ENDS):
            decode_image(image, f"{source} step {step} column {where!r}")
    return images


def _instruction(rows: Any) -> str:
    """The first row as text: bytes, a text, or Unicode code points padded with zeros."""
    if not len(rows):
        return ""
    first = rows[0]
    if isinstance(first, np.ndarray):
        return "".join(chr(int(c)) for c in first.reshape(-1) if c).strip()
    return (first if isinstance(first, str) else bytes(first).decode("utf-8", "replace")).strip()


def _check_jumps(episode: Episode) -> None:
    moved = np.linalg.norm(np.diff(episode.position, axis=0), axis=1)
    if len(moved) and moved.max() * episode.rate_hz > FASTEST:
        step = int(moved.argmax())
        raise SpearError(
            f"jump: {episode.source} step {step + 1}: the end-effector is {moved[step]:.3g} m from where it was "
            "a step before; leave the episode out, or check the column and its unit (length_unit)"
        )
    cosine = np.abs((episode.rotation[1:] * episode.rotation[:-1]).sum(1)).clip(max=1)
    turned = 2 * np.arccos(cosine)
    if len(turned) and turned.max() * episode.rate_hz > FASTEST_TURN:
        step = int(turned.argmax())
        raise SpearError(
            f"jump: {episode.source} step {step + 1}: the end-effector is turned by {np.degrees(turned[step]):.3g}° "
            "from a step before; leave the episode out, or check the column and how its rotations are written"
        )


def to_quaternion(values: Array, layout: RotationFormat, source: str = "") -> Array:
    """Orientations [T, d] in a dataset's layout, angles in rad, to quaternions [T, 4] (w, x, y, z).

    Raises SpearError when d is not what the layout has (see `RotationFormat`).
    """
    tensor = torch.as_tensor(np.asarray(values, np.float64))
    width, convert = FORMS[layout]
    if tensor.ndim != 2 or tensor.shape[1] != width:
        shape = tuple(tensor.shape)
        raise SpearError(f"wrong shape: {source}: rotation is {shape}, but {layout} needs {width} columns")
    if layout.startswith("matrix4"):
        _check_pose(tensor, layout, source)
    return convert(tensor).numpy()


def _check_pose(values: torch.Tensor, layout: RotationFormat, source: str) -> None:
    columns = layout == "matrix4_columns"
    pose = pose_matrix(values, columns)
    matrix, last = pose[:, :3, :3], torch.tensor([0.0, 0, 0, 1], dtype=pose.dtype)
    error = (matrix @ matrix.transpose(1, 2) - torch.eye(3, dtype=pose.dtype)).abs().amax((1, 2))
    row = (pose[:, 3] - last).abs().amax(1)
    bad = ~((error < 1e-2) & (row < 1e-3) & (torch.linalg.det(matrix) > 0))
    if bad.any():
        step, line = int(bad.int().argmax()), "column" if columns else "row"
        raise SpearError(
            f"not a rotation: {source} step {step}: the 16 numbers are no pose written {line} after {line}; "
            "leave it out, or check the layout"
        )


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
        widened.append(encode_jpeg(np.asarray(image)))
    return widened
