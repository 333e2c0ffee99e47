"""Converts the columns of any dataset to our `Episode`, by the dataset's `DatasetLayout`.

In this file, `steps` are the columns of one episode, a row is what the dataset recorded at one
step, and `source` is the name of the episode for error messages.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from spear.data.actions import (
    derive_actions,
    find_first,
    validate_episode,
    validate_rotations_and_actions,
)
from spear.data.readers.bad_rows import (
    list_good_rows_or_all_if_most_are_bad,
    mark_complete_rows,
    mark_zeros_for_missing_poses,
    mask_actions_before_gaps,
    record_repairs,
    select_rows,
)
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
    NO_OFFSET,
    DatasetLayout,
    RotationFormat,
)
from spear.data.readers.joint_angles import compute_tip_poses
from spear.data.readers.rotation_formats import mark_rotations, to_quaternion
from spear.embodiments.kinematics import compute_franka_ee_poses
from spear.errors import SpearError
from spear.geometry import quat_canonical, quat_multiply, quat_rotate
from spear.gripper import binarize_commands, delay_openings_logged_from_commands
from spear.types import MAX_EE_SPEED_M_S, MAX_EE_TURN_RAD_S, Array, Episode
from spear.util.images import check_jpeg_is_complete, decode_image, encode_jpeg
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS

MAX_MEDIAN_ANGLE_RAD = 4 * math.pi  # wrists turn once or twice; larger angles are degrees
# A gripper's readings may overshoot their declared range. An overshoot is a fraction of this range.
MAX_UNCOUNTED_OVERSHOOT = 0.1  # up to here a clipped reading is no repair: grippers are inexact
MAX_GRIPPER_OVERSHOOT = 0.3  # a larger one refuses the episode; BC-Z's readings reach 0.25
IDLE_SPEED_M_S = 2e-3  # an arm that is slower counts as standing still
IDLE_TURN_RAD_S = 1e-2  # an arm that turns more slowly counts as not turning
IDLE_OPENING_CHANGE = 1e-2  # a gripper that changes less in one step counts as standing still
JPEG_END = b"\xff\xd9"  # the last bytes of every complete JPEG
PNG_END = b"IEND\xaeB`\x82"  # the last bytes of every complete PNG


def build_episode(steps: Steps, layout: DatasetLayout, source: str) -> Episode:
    """Build an `Episode` in our conventions from the columns of a dataset.

    Actions: If `layout.action` names a column of canonical actions, these are used unchanged.
    Otherwise, if the dataset logs gripper commands, actions consist of the motions between the
    states and of these commands. The last action is then masked, because no state follows it. If
    the dataset has neither, the episode has no actions.

    Rows that lack a number or a pose are dropped, and the actions before them are masked. Actions
    of steps at which a policy controlled the robot instead of a person are masked as well.

    Args:
        steps: The columns of one episode.
        layout: What the columns mean.
        source: The name of the episode.

    Raises:
        SpearError: If a column is missing, or the episode is bad: for example, its pose jumps (more
            than 3 m/s or 10 rad/s between two steps), or one of its images is cut off.
    """
    assert layout.rate_hz is not None
    # States and images of the good rows, checked.
    recorded_steps = steps
    steps, rows = drop_bad_rows_unless_most_are_bad(recorded_steps, layout, source)
    position, rotation, rotation_format = read_poses_in_recorded_frames(steps, layout, source)
    _check_angle_unit(rotation, rotation_format, source)
    gripper, command = read_measured_and_commanded_openings(steps, layout, source)
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
            action_mask=_mark_usable_actions(steps, layout, rows, source),
            # The recording's last row says how the episode ended, even if that row is a bad one.
            success=read_success(recorded_steps, layout, source),
        )
    )
    _check_jumps(episode, rows)

    episode = _convert_to_our_frames(episode, layout)

    # Canonical actions of the dataset, or actions derived from states and gripper commands. Layouts
    # with canonical actions have no `drop_idle` (`dataset_layout.DEPENDENT_FIELDS`).
    if layout.action is not None:
        return _with_recorded_actions_mask_and_source(episode, steps, layout, source)
    if command is not None:
        command = binarize_commands(command, episode.rate_hz)
    if layout.drop_idle:
        moving_steps = _find_moving_steps(episode, command)
        episode = _select_steps(episode, moving_steps)
        if command is not None:
            command = command[moving_steps]
    return episode if command is None else _with_derived_actions(episode, command)


class RemainingRows(NamedTuple):
    """The rows of an episode that were not dropped.

    Attributes:
        steps: The columns of the remaining rows.
        indices: [T] the indices of the remaining rows in the recording, ascending.
    """

    steps: Steps
    indices: Array


def drop_bad_rows_unless_most_are_bad(
    steps: Steps, layout: DatasetLayout, source: str
) -> RemainingRows:
    """Drop the rows of an episode that lack a number or a pose (see `spear.data.readers.bad_rows`).

    The dropped rows are recorded as repairs. If most rows are bad, all of them remain.
    """
    numbers = _read_needed_numbers(steps, layout, source)
    position = numbers[layout.position]
    rotation = numbers[layout.rotation]
    num_rows = len(position)
    is_good = mark_complete_rows(values for values in numbers.values() if len(values) == num_rows)
    if len(rotation) == num_rows:  # otherwise building the episode refuses the columns
        pose_columns = [position.reshape(num_rows, -1), rotation.reshape(num_rows, -1)]
        pose = np.concatenate(pose_columns, axis=1)  # [T, d]
        # With infinity for a missing number, its row counts neither as zero nor as near zero.
        pose_without_nan = np.nan_to_num(pose, nan=np.inf)
        is_good &= ~mark_zeros_for_missing_poses(pose_without_nan)
        assert layout.rotation_format is not None
        is_good &= mark_rotations(rotation, layout.rotation_format)
    rows = list_good_rows_or_all_if_most_are_bad(is_good)
    record_repairs(num_dropped_rows=num_rows - len(rows))
    return RemainingRows(select_rows(steps, rows, num_rows), rows)


def _read_needed_numbers(steps: Steps, layout: DatasetLayout, source: str) -> dict[Any, Array]:
    """Read the columns of numbers from which an episode is built: name of a column → numbers.

    Numbers may be NaN or infinite.
    """
    columns = (
        layout.position,
        layout.rotation,
        layout.gripper,
        layout.command,
        layout.action,
    )
    numbers: dict[Any, Array] = {}
    for column in columns:
        if column is not None:
            numbers[column] = read_numbers(steps, column, source, allow_missing=True)
    return numbers


def _mark_usable_actions(
    steps: Steps, layout: DatasetLayout, rows: Array, source: str
) -> Array | None:
    """Mask the actions before dropped rows, and those of a policy that controlled the robot.

    Args:
        steps: The columns of the rows that remain.
        layout: What the columns mean.
        rows: [T] the indices of these rows in the recording.
        source: The name of the episode.

    Returns:
        [T] bool, False for actions that nothing should be learned from. None if all actions are
        usable and the layout has no column that says which of them a policy chose.
    """
    is_before_kept_row = mask_actions_before_gaps(rows)
    if layout.autonomous is None:
        return is_before_kept_row

    modes = read_numbers(steps, layout.autonomous, source).reshape(-1)  # [T]
    is_demonstrated = modes != layout.autonomous_value
    if is_before_kept_row is None:  # no row was dropped
        return is_demonstrated
    return is_before_kept_row & is_demonstrated


def _with_derived_actions(episode: Episode, gripper_command: Array) -> Episode:
    """Add actions that consist of the motions between states and of gripper commands [T]."""
    action = derive_actions(episode.position, episode.rotation, gripper_command)
    last_step = len(episode) - 1
    is_known = np.arange(len(episode)) < last_step  # [T]; no state follows the last step
    if episode.action_mask is not None:
        is_known &= episode.action_mask
    return validate_rotations_and_actions(
        dataclasses.replace(episode, action=action, action_mask=is_known)
    )


def _convert_to_our_frames(episode: Episode, layout: DatasetLayout) -> Episode:
    """Convert the poses of an episode from the dataset's end-effector and base frames to ours."""
    tool_rotation = torch.tensor(layout.tool_rotation, dtype=torch.float32)
    recorded_rotation = torch.as_tensor(episode.rotation)
    rotation = quat_multiply(recorded_rotation, tool_rotation)
    position = episode.position
    if layout.tool_offset != NO_OFFSET:  # in the recorded end-effector frame
        tool_offset = torch.tensor(layout.tool_offset, dtype=torch.float32)
        position = position + quat_rotate(recorded_rotation, tool_offset).numpy()
    if layout.base_rotation != IDENTITY_ROTATION:
        base_rotation = torch.tensor(layout.base_rotation, dtype=torch.float32)
        rotation = quat_multiply(base_rotation, rotation)
        position = quat_rotate(base_rotation, torch.as_tensor(position)).numpy()
    return dataclasses.replace(
        episode, position=position, rotation=quat_canonical(rotation).numpy()
    )


def _check_angle_unit(rotation: Array, rotation_format: RotationFormat, source: str) -> None:
    """Raise SpearError if most rows of `rotation` [T, d] have an angle too large for radians."""
    if rotation_format not in ANGLE_FORMATS or not len(rotation):
        return
    largest_angles_rad = np.abs(rotation).max(axis=-1)  # [T]
    if np.median(largest_angles_rad) > MAX_MEDIAN_ANGLE_RAD:
        raise SpearError(
            f"{source} has orientations up to {largest_angles_rad.max():.3g} rad, more than a "
            "turn. If they are degrees, set angle_unit to deg in spear.json."
        )


def _with_recorded_actions_mask_and_source(
    episode: Episode, steps: Steps, layout: DatasetLayout, source: str
) -> Episode:
    """Add the recorded actions, which are canonical already, with their mask and source.

    Datasets that this program wrote have such columns.
    """
    assert layout.action is not None
    fields: dict[str, Any] = {"action": read_numbers(steps, layout.action, source)}
    if layout.action_mask is not None:
        is_known = read_numbers(steps, layout.action_mask, source).reshape(-1) != 0
        if episode.action_mask is not None:
            is_known &= episode.action_mask
        fields["action_mask"] = is_known
    if layout.source is not None:
        fields["source"] = read_text(steps, layout.source, source)
    return validate_rotations_and_actions(dataclasses.replace(episode, **fields))


class RecordedPoses(NamedTuple):
    """End-effector poses in the dataset's base and end-effector frames.

    Attributes:
        position: [T, 3] m.
        rotation: [T, d] orientations in `rotation_format`, angles in rad.
        rotation_format: The format of the orientations, which determines d.
    """

    position: Array
    rotation: Array
    rotation_format: RotationFormat


def read_poses_in_recorded_frames(
    steps: Steps, layout: DatasetLayout, source: str
) -> RecordedPoses:
    """Read the recorded end-effector poses in SI units, in the dataset's frames.

    Orientations stay in the dataset's format. Poses that are recorded as joint angles are computed,
    and their orientations are quaternions.
    """
    assert layout.position is not None
    assert layout.rotation is not None
    assert layout.rotation_format is not None
    radians_per_unit = ANGLE_UNITS[layout.angle_unit]
    # The column of positions [T, 3], or of joint angles in the two formats "…_joints".
    recorded = read_numbers(steps, layout.position, source)
    if layout.rotation_format == "franka_joints":
        joint_angles_rad = recorded * radians_per_unit  # [T, 7]
        position_m, quaternion = compute_franka_ee_poses(joint_angles_rad, source)
        return RecordedPoses(position_m, quaternion, "quat_wxyz")
    if layout.rotation_format == "urdf_joints":
        # `compute_tip_poses` converts the units itself: prismatic joints are not in radians.
        position_m, quaternion = compute_tip_poses(recorded, layout, source)
        return RecordedPoses(position_m, quaternion, "quat_wxyz")

    rotation = read_numbers(steps, layout.rotation, source)
    if layout.rotation_format in ANGLE_FORMATS:
        rotation = rotation * radians_per_unit
    position_m = recorded * LENGTH_UNITS[layout.length_unit]
    return RecordedPoses(position_m, rotation, layout.rotation_format)


def read_measured_and_commanded_openings(
    steps: Steps, layout: DatasetLayout, source: str
) -> tuple[Array, Array | None]:
    """Read the measured and the commanded openings of the gripper.

    Returns:
        Openings [T] and commands [T], both 0 closed to 1 open. Commands are None if the dataset
        logs none. If both columns agree but for rounding, nothing was measured, and openings follow
        from the commands (see `delay_openings_logged_from_commands`).

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
    return delay_openings_logged_from_commands(opening, command), command


def _read_opening(
    steps: Steps, column: str, range_key: str, closed_and_open: tuple[float, float], source: str
) -> Array:
    """Read a gripper column as openings [T] in 0 … 1.

    Args:
        steps: The columns of one episode.
        column: The gripper column.
        range_key: The field of the layout that gives `closed_and_open`, for error messages.
        closed_and_open: The readings of the column when the gripper is closed and when it is open.
        source: The name of the episode.
    """
    readings = read_numbers(steps, column, source)
    has_one_number_per_step = readings.size == len(readings)
    if not has_one_number_per_step:
        raise SpearError(
            f"column {column!r} of {source} has the shape {readings.shape}, not one number per "
            "step. Select one, as in state[6]."
        )

    readings = readings.reshape(-1)  # [T]
    closed_reading, open_reading = closed_and_open
    opening = (readings - closed_reading) / (open_reading - closed_reading)  # [T]
    overshoot = np.maximum(-opening, opening - 1)  # [T]; negative within the range
    is_counted = overshoot > MAX_UNCOUNTED_OVERSHOOT
    record_repairs(num_clipped_readings=int(is_counted.sum()))
    step = find_first(overshoot > MAX_GRIPPER_OVERSHOOT)
    if step is not None:
        raise SpearError(
            f"{column} of {source} is {readings[step]:.4g} at step {step}, but {range_key} is "
            f"[{closed_reading:g}, {open_reading:g}]. In this episode it runs from "
            f"{readings.min():.4g} to {readings.max():.4g}; give its readings when closed, then "
            "when open."
        )
    return np.clip(opening, 0, 1)


def _find_moving_steps(episode: Episode, command: Array | None) -> list[int]:
    """Find the steps at which the arm or the gripper moves, or the gripper's command changes.

    The last step of the episode is always among them. Motion is measured from the state to which
    the last moving step led, not from the state one step before. Otherwise all steps of a slow
    drift would be idle, and their removal would leave a jump.

    Args:
        episode: The episode.
        command: [T] gripper commands; None if they are not known.
    """
    command_change = np.zeros(len(episode))  # [T] from the step before
    if command is not None:
        command_change = np.diff(command, prepend=command[:1])

    last_step = len(episode) - 1
    moving_steps: list[int] = []
    reached_step = 0  # the state to which the last moving step led
    for step in range(last_step):
        compared_steps = [reached_step, step + 1]
        distance_m = np.linalg.norm(np.diff(episode.position[compared_steps], axis=0))
        turn_rad = _compute_angles_between_steps(episode.rotation[compared_steps])[0]
        opening_change = np.ptp(episode.gripper[compared_steps])
        is_moving = (
            distance_m * episode.rate_hz > IDLE_SPEED_M_S
            or turn_rad * episode.rate_hz > IDLE_TURN_RAD_S
            or opening_change > IDLE_OPENING_CHANGE
            or command_change[step] != 0
        )
        if is_moving:
            moving_steps.append(step)
            reached_step = step + 1
    moving_steps.append(last_step)
    return moving_steps


def _select_steps(episode: Episode, steps: list[int]) -> Episode:
    """Select steps (ascending) of the states and images of an episode that has no actions yet.

    The action of a selected step will lead to the next selected step. It is masked if any recorded
    step on this way is masked.
    """
    action_mask = episode.action_mask
    if action_mask is not None:
        # An action is usable only if the actions of all steps on its way are: from its selected
        # step to the one before the next selected step.
        action_mask = np.logical_and.reduceat(action_mask, steps)  # [len(steps)]
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
    """Read a camera's encoded images, and refuse images that are cut off.

    Decoding an image shows whether it is cut off, but takes time. Images that end like a JPEG or
    PNG are therefore not decoded, only checked for missing data inside. Images that the dataset
    squeezed are resized to their true aspect ratio, because depth depends on it.
    """
    column = layout.images[camera]
    aspect = layout.image_aspect.get(camera)
    images: list[bytes] = []
    for step, encoded in enumerate(read_encoded_images(steps, column, source)):
        name = f"{source} step {step} camera {camera!r}"
        has_proper_end = encoded.endswith((JPEG_END, PNG_END))
        must_decode = aspect is not None or not has_proper_end
        if encoded and must_decode:  # `validate_episode` will refuse empty images
            pixels = decode_image(encoded, name)  # raises SpearError if the image is cut off
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
    """Read whether the episode achieved its task; None if that is not known.

    `DatasetLayout.success` describes the two forms of the column.
    """
    column = layout.success
    if column is None:
        return None

    is_text_column = isinstance(read_column(steps, column, source), list)
    if is_text_column:
        folders = read_text(steps, column, source).split("/")
        outcomes = {"success", "failure"}.intersection(folders)
        return outcomes == {"success"} if outcomes else None

    numbers = read_numbers(steps, column, source).reshape(-1)
    if not len(numbers) or numbers[-1] < 0:  # -1: not known
        return None
    return bool(numbers[-1])


def _check_jumps(episode: Episode, rows: Array) -> None:
    """Raise SpearError for a pose that changes faster than any arm can move.

    A wrong column, unit or rotation format is the usual reason.

    Args:
        episode: The episode at the dataset's rate.
        rows: [T] the index of each step's row in the recording. Where rows were dropped, two steps
            are further apart in time, and their motion is divided by the number of steps.
    """
    num_rows_between = np.diff(rows)  # [T - 1]
    displacements_m = np.diff(episode.position, axis=0)  # [T - 1, 3]
    distances_m = np.linalg.norm(displacements_m, axis=1) / num_rows_between  # [T - 1]
    if distances_m.max(initial=0) * episode.rate_hz > MAX_EE_SPEED_M_S:
        step = int(distances_m.argmax())
        jump = f"moves by {distances_m[step]:.3g} m"
        raise _make_jump_error(episode, rows[step + 1], jump, "its unit (length_unit)")

    turns_rad = _compute_angles_between_steps(episode.rotation) / num_rows_between  # [T - 1]
    if turns_rad.max(initial=0) * episode.rate_hz > MAX_EE_TURN_RAD_S:
        step = int(turns_rad.argmax())
        jump = f"turns by {turns_rad[step]:.3g} rad"
        raise _make_jump_error(episode, rows[step + 1], jump, "how its rotations are written")


def _make_jump_error(episode: Episode, row: int, jump: str, cause: str) -> SpearError:
    """The error for a pose that jumps.

    Args:
        episode: The episode.
        row: The row of the recording at which the pose has jumped.
        jump: How far the pose jumped: "moves by 2 m".
        cause: What may be wrong in the layout.
    """
    return SpearError(
        f"the end-effector of {episode.source} {jump} in one step, at step {row}. Leave the "
        f"episode out, or check rate_hz, the column and {cause} in spear.json."
    )


def _compute_angles_between_steps(rotation: Array) -> Array:
    """Compute the angles [T - 1] in rad between consecutive unit quaternions [T, 4].

    Unit quaternions q and p whose rotations differ by the angle a have |q - p| = 2 sin(a / 4) or,
    as -p is the same rotation, |q + p| = 2 sin(a / 4). Unlike an arc cosine of their product, this
    is exactly 0 for equal quaternions.
    """
    distance = np.linalg.norm(rotation[1:] - rotation[:-1], axis=1)  # [T - 1]
    distance_to_negative = np.linalg.norm(rotation[1:] + rotation[:-1], axis=1)  # [T - 1]
    return 4 * np.arcsin(np.minimum(distance, distance_to_negative) / 2)
