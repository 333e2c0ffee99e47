"""From the columns of any dataset to our `Episode`, by what its `DatasetLayout` says of them."""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.data.actions import derive_actions, find_first, validate_actions, validate_episode
from spear.data.readers.bad_rows import find_good_rows, mask_gaps, record_repairs, select_rows
from spear.data.readers.columns import (
    Steps,
    count_steps,
    read_column,
    read_encoded_images,
    read_numbers,
    read_text,
)
from spear.data.readers.dataset_layout import (
    ANGLE_FORMATS,
    IDENTITY_ROTATION,
    DatasetLayout,
    RotationFormat,
)
from spear.data.readers.rotation_formats import to_quaternion
from spear.embodiments.kinematics import franka_pose
from spear.errors import SpearError
from spear.geometry import quat_canonical, quat_multiply, quat_rotate
from spear.gripper import binarize_commands, observed_openings
from spear.types import MAX_EE_SPEED_M_S, MAX_EE_TURN_RAD_S, Array, Episode
from spear.util.images import check_jpeg_is_complete, decode_image, encode_jpeg
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS

MAX_MEDIAN_ANGLE_RAD = 4 * math.pi  # wrists turn once or twice; larger angles are degrees
# Gripper readings may lie outside their declared range. Up to this part of the range they are not
# counted as clipped readings, because most grippers are this inexact.
MAX_UNCOUNTED_OVERSHOOT = 0.1
MAX_GRIPPER_OVERSHOOT = 0.3  # part of a declared range; BC-Z's readings overshoot by 0.25
IDLE_SPEED_M_S = 2e-3  # below it the arm does not move
IDLE_TURN_RAD_S = 1e-2  # below it the arm does not turn
IDLE_OPENING_CHANGE = 1e-2  # per step; below it the gripper does not move
JPEG_END = b"\xff\xd9"
PNG_END = b"IEND\xaeB`\x82"


def build_episode(steps: Steps, layout: DatasetLayout, source: str) -> Episode:
    """Build an `Episode` in our conventions from the columns of a dataset.

    If `layout.action` names a column of canonical actions, they are used unchanged. Otherwise the
    motions come from the states, and the gripper commands from the logged ones if the dataset has
    them; the last step leads to no known state and is masked. Rows whose orientation is no rotation
    are dropped, and the steps before them are masked.

    Args:
        steps: The columns of one episode.
        layout: What the columns mean.
        source: The name of the episode, for error messages.

    Raises:
        SpearError: If a column is missing, or the episode is bad: among other reasons, its pose
            jumps (more than 3 m/s or 10 rad/s between two steps), or one of its images is cut off.
    """
    assert layout.rate_hz is not None
    # States and images of the good rows, checked.
    recorded_steps = steps
    steps, rows = drop_bad_rows(recorded_steps, layout, source)
    position, rotation, rotation_format = read_pose(steps, layout, source)
    _check_angle_unit(rotation, rotation_format, source)
    gripper, command = read_openings(steps, layout, source)
    episode = validate_episode(
        Episode(
            images={
                camera: _read_images(steps, layout, camera, source) for camera in layout.images
            },
            position=position,
            rotation=to_quaternion(rotation, rotation_format, source),
            gripper=gripper,
            instruction=read_instruction(steps, layout, source),
            rate_hz=layout.rate_hz,
            source=source,
            action_mask=mask_gaps(rows),
            success=read_success(recorded_steps, layout, source),
        )
    )
    _check_jumps(episode, rows)

    episode = _to_our_frames(episode, layout)

    # Actions: canonical ones of the dataset, or derived from states and gripper commands.
    if layout.action is not None:
        return _add_canonical_actions(episode, steps, layout, source)
    if command is not None:
        command = binarize_commands(command, episode.rate_hz)
    if layout.drop_idle:
        moving_steps = _find_moving_steps(episode, command)
        episode = _select_steps(episode, moving_steps)
        command = None if command is None else command[moving_steps]
    return episode if command is None else _add_derived_actions(episode, command)


def drop_bad_rows(steps: Steps, layout: DatasetLayout, source: str) -> tuple[Steps, Array]:
    """Drop the rows of an episode whose orientation is no rotation (see `find_good_rows`).

    Returns:
        The columns without these rows, and the numbers [T] of the rows that they still have.
    """
    _, rotation, rotation_format = read_pose(steps, layout, source)
    rows = find_good_rows(rotation, rotation_format)
    return select_rows(steps, rows, len(rotation)), rows


def _add_derived_actions(episode: Episode, command: Array) -> Episode:
    """Add the motions that follow from the states, with logged gripper commands [T]."""
    action = derive_actions(episode.position, episode.rotation, command)
    is_known = np.arange(len(episode)) < len(episode) - 1
    if episode.action_mask is not None:
        is_known &= episode.action_mask
    return validate_actions(dataclasses.replace(episode, action=action, action_mask=is_known))


def _to_our_frames(episode: Episode, layout: DatasetLayout) -> Episode:
    """Turn poses from the end-effector and base frames of a dataset to ours."""
    tool_rotation = torch.tensor(layout.tool_rotation, dtype=torch.float32)
    rotation = quat_multiply(torch.as_tensor(episode.rotation), tool_rotation)
    position = episode.position
    if layout.base_rotation != IDENTITY_ROTATION:
        base_rotation = torch.tensor(layout.base_rotation, dtype=torch.float32)
        rotation = quat_multiply(base_rotation, rotation)
        position = quat_rotate(base_rotation, torch.as_tensor(position)).numpy()
    return dataclasses.replace(
        episode, position=position, rotation=quat_canonical(rotation).numpy()
    )


def _check_angle_unit(rotation: Array, rotation_format: RotationFormat, source: str) -> None:
    """Raise SpearError for angles of which most are too large for radians."""
    if rotation_format not in ANGLE_FORMATS or not len(rotation):
        return
    if np.median(np.abs(rotation).max(axis=-1)) > MAX_MEDIAN_ANGLE_RAD:
        raise SpearError(
            f"orientations up to {np.abs(rotation).max():.3g} rad: {source}: say angle_unit deg"
        )


def _add_canonical_actions(
    episode: Episode, steps: Steps, layout: DatasetLayout, source: str
) -> Episode:
    """Add the canonical actions of a dataset that we wrote, with their mask and source."""
    assert layout.action is not None
    fields: dict[str, Any] = {"action": read_numbers(steps, layout.action, source)}
    if layout.action_mask is not None:
        is_known = read_numbers(steps, layout.action_mask, source).reshape(-1) != 0
        if episode.action_mask is not None:
            is_known &= episode.action_mask
        fields["action_mask"] = is_known
    if layout.source is not None:
        fields["source"] = read_text(steps, layout.source, source)
    return validate_actions(dataclasses.replace(episode, **fields))


def read_pose(
    steps: Steps, layout: DatasetLayout, source: str
) -> tuple[Array, Array, RotationFormat]:
    """Read the recorded end-effector poses.

    Returns:
        Positions [T, 3] (m, base frame), orientations [T, d] (angles in rad), and the format of
        the orientations.
    """
    assert layout.position is not None
    assert layout.rotation is not None
    assert layout.rotation_format is not None
    position = read_numbers(steps, layout.position, source)
    radians_per_unit = ANGLE_UNITS[layout.angle_unit]
    if layout.rotation_format == "franka_joints":
        position_m, quaternion = franka_pose(position * radians_per_unit, source)
        return position_m, quaternion, "quat_wxyz"

    rotation = read_numbers(steps, layout.rotation, source)
    if layout.rotation_format in ANGLE_FORMATS:
        rotation = rotation * radians_per_unit
    position_m = position * LENGTH_UNITS[layout.length_unit]
    return position_m, rotation, layout.rotation_format


def read_openings(steps: Steps, layout: DatasetLayout, source: str) -> tuple[Array, Array | None]:
    """Read the measured and the commanded openings of the gripper.

    Returns:
        Openings [T] and commands [T], 0 closed to 1 open; None instead of commands if the dataset
        logs none. If both agree but for rounding, nothing was measured: see `observed_openings`.

    Raises:
        SpearError: If a reading is outside its declared range by more than 30 % of the range.
    """
    if layout.gripper_opening is not None:
        return np.full(count_steps(steps), layout.gripper_opening), None

    assert layout.gripper is not None
    assert layout.gripper_range is not None
    opening = _read_opening(steps, layout.gripper, "gripper_range", layout.gripper_range, source)
    if layout.command is not None:
        command = _read_opening(
            steps, layout.command, "command_range", layout.command_range, source
        )
    elif layout.gripper.startswith("action"):
        command = opening
    else:
        return opening, None
    return observed_openings(opening, command), command


def _read_opening(
    steps: Steps, column: str, range_key: str, closed_and_open: tuple[float, float], source: str
) -> Array:
    """Read a gripper column as openings [T] in 0 … 1, by its readings when closed and when open."""
    readings = read_numbers(steps, column, source)
    if readings.size != len(readings):
        raise SpearError(
            f"no column {column!r}: {source}: it has the shape {readings.shape}, not one number"
        )

    readings = readings.reshape(-1)
    closed, opened = closed_and_open
    opening = (readings - closed) / (opened - closed)
    overshoot = np.maximum(-opening, opening - 1)
    record_repairs(num_clipped_readings=int((overshoot > MAX_UNCOUNTED_OVERSHOOT).sum()))
    step = find_first(overshoot > MAX_GRIPPER_OVERSHOOT)
    if step is not None:
        raise SpearError(
            f"out of range: {source} step {step}: {column} is {readings[step]:.4g}, but "
            f"{range_key} is [{closed:g}, {opened:g}]; in this episode it runs from "
            f"{readings.min():.4g} to {readings.max():.4g}: "
            "give its readings when closed, then when open"
        )
    return np.clip(opening, 0, 1)


def _find_moving_steps(episode: Episode, command: Array | None) -> list[int]:
    """Find the steps at which the arm or the gripper moves, or its command changes; and the last.

    Motion is measured from where the last moving step leads. Otherwise the steps of a slow drift
    would all be idle, and add up to a jump.
    """
    command_change = np.zeros(len(episode))
    if command is not None:
        command_change = np.diff(command, prepend=command[:1])

    moving_steps: list[int] = []
    reached_step = 0
    for step in range(len(episode) - 1):
        ends = [reached_step, step + 1]
        distance_m = np.linalg.norm(np.diff(episode.position[ends], axis=0))
        turn_rad = _angles_between_steps(episode.rotation[ends])[0]
        is_moving = (
            distance_m * episode.rate_hz > IDLE_SPEED_M_S
            or turn_rad * episode.rate_hz > IDLE_TURN_RAD_S
            or np.ptp(episode.gripper[ends]) > IDLE_OPENING_CHANGE
            or command_change[step] != 0
        )
        if is_moving:
            moving_steps.append(step)
            reached_step = step + 1
    moving_steps.append(len(episode) - 1)
    return moving_steps


def _select_steps(episode: Episode, steps: list[int]) -> Episode:
    """Keep only some steps of the states and images of an episode without actions.

    A step is masked if any step from it to the next one that is kept is.
    """
    action_mask = episode.action_mask
    if action_mask is not None:
        action_mask = np.logical_and.reduceat(action_mask, steps)
    return dataclasses.replace(
        episode,
        images={
            camera: [images[step] for step in steps] for camera, images in episode.images.items()
        },
        position=episode.position[steps],
        rotation=episode.rotation[steps],
        gripper=episode.gripper[steps],
        action_mask=action_mask,
    )


def _read_images(steps: Steps, layout: DatasetLayout, camera: str, source: str) -> list[bytes]:
    """Read a camera's encoded images.

    An image that does not end like a JPEG or PNG is decoded, to see whether it is cut off; one that
    does may still lack data. Images that the dataset squeezed get their true aspect ratio back,
    because depth depends on it.
    """
    column = layout.images[camera]
    aspect = layout.image_aspect.get(camera)
    images: list[bytes] = []
    for step, encoded in enumerate(read_encoded_images(steps, column, source)):
        name = f"{source} step {step} camera {camera!r}"
        ends_well = encoded.endswith((JPEG_END, PNG_END))
        if encoded and (aspect is not None or not ends_well):
            pixels = decode_image(encoded, name)
            if aspect is not None:
                height = len(pixels)
                width = round(height * aspect)
                resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
                encoded = encode_jpeg(np.asarray(resized))
        else:
            check_jpeg_is_complete(encoded, name)
        images.append(encoded)
    return images


def read_instruction(steps: Steps, layout: DatasetLayout, source: str) -> str:
    """Read what the robot was asked to do; "" if the text is empty."""
    return read_text(steps, layout.instruction, source)


def read_success(steps: Steps, layout: DatasetLayout, source: str) -> bool | None:
    """Read from the last row of a column how the episode ended; see `DatasetLayout.success`."""
    column = layout.success
    if column is None:
        return None

    if isinstance(read_column(steps, column, source), list):
        folders = read_text(steps, column, source).split("/")
        outcomes = {"success", "failure"}.intersection(folders)
        return outcomes == {"success"} if outcomes else None

    last_row = read_numbers(steps, column, source).reshape(-1)[-1:]
    if not len(last_row) or last_row[0] < 0:
        return None
    return bool(last_row[0])


def _check_jumps(episode: Episode, rows: Array) -> None:
    """Raise SpearError for a pose that changes faster than any arm can move.

    A wrong column, unit or rotation format is the usual reason.

    Args:
        episode: The episode at its own rate.
        rows: [T] the numbers of its rows in the recording; where some are missing, more time passed
            between two steps.
    """
    num_rows_between = np.diff(rows)
    distances_m = np.linalg.norm(np.diff(episode.position, axis=0), axis=1) / num_rows_between
    if distances_m.max(initial=0) * episode.rate_hz > MAX_EE_SPEED_M_S:
        step = int(distances_m.argmax())
        jump = f"moved by {distances_m[step]:.3g} m"
        raise _jump_error(episode, rows[step + 1], jump, "its unit (length_unit)")

    turns_rad = _angles_between_steps(episode.rotation) / num_rows_between
    if turns_rad.max(initial=0) * episode.rate_hz > MAX_EE_TURN_RAD_S:
        step = int(turns_rad.argmax())
        jump = f"turned by {turns_rad[step]:.3g} rad"
        raise _jump_error(episode, rows[step + 1], jump, "how its rotations are written")


def _jump_error(episode: Episode, row: int, jump: str, cause: str) -> SpearError:
    """The error for a pose that jumps to a row of the recording."""
    return SpearError(
        f"jump: {episode.source} step {row}: the end-effector is {jump} in one step; "
        f"leave it out, or check rate_hz, the column and {cause}"
    )


def _angles_between_steps(rotation: Array) -> Array:
    """[T - 1] angles between consecutive quaternions [T, 4], rad; exactly 0 for equal ones."""
    distance = np.linalg.norm(rotation[1:] - rotation[:-1], axis=1)
    distance_to_negative = np.linalg.norm(rotation[1:] + rotation[:-1], axis=1)
    return 4 * np.arcsin(np.minimum(distance, distance_to_negative) / 2)
