"""Canonical actions, which mean the same for every robot, and the check of whole episodes.

An action consists of a translation in the base frame, a rotation in the end-effector frame (unit
quaternion) and an absolute gripper command (1 open, 0 closed). It is `spear.types.Action`, here as
numpy rows [8]. Logged commands are used if an episode has them. Otherwise actions are derived from
the states, as the motion that in fact followed. That happens once, when an episode is written
(`add_actions`).
"""

import dataclasses
from typing import Any

import numpy as np
import torch

from spear.errors import SpearError, format_count
from spear.geometry import (
    UNIT_NORM_TOLERANCE,
    action_between_poses,
    quat_canonical,
    quat_normalize,
    quat_slerp,
)
from spear.gripper import commands_from_motion
from spear.types import ACTION_DIM, CONTROL_RATE_HZ, Array, Episode

HORIZON = 5  # actions in a chunk (the paper)
ACTION_RULES_VERSION = 4
"""Raised when a recording becomes other steps or actions than before: what was prepared earlier is
then prepared again."""
TIME_TOLERANCE_STEPS = 1e-6  # of the rounding of times, when an episode is resampled
OPENING_TOLERANCE = 1e-3  # by which an opening may be outside 0 … 1


def derive_actions(position: Array, rotation: Array, command: Array) -> Array:
    """Derive actions from poses: action t leads from pose t to pose t + 1.

    Args:
        position: [T, 3] end-effector positions, m, base frame.
        rotation: [T, 4] end-effector orientations, unit quaternions, base frame.
        command: [T] gripper commands.

    Returns:
        [T, 8] actions, float32. The last one stays where it is, because the next pose is not known;
        mask it.
    """
    actions = np.zeros((len(position), ACTION_DIM), np.float32)
    actions[:, 3] = 1
    positions = torch.as_tensor(np.asarray(position, np.float64))
    rotations = torch.as_tensor(np.asarray(rotation, np.float64))
    translation, delta_rotation = action_between_poses(
        positions[:-1], rotations[:-1], positions[1:], rotations[1:]
    )
    actions[:-1, :3] = translation.numpy()
    actions[:-1, 3:7] = quat_normalize(delta_rotation).numpy()
    actions[:, 7] = command
    return actions


def canonicalize_actions(episode: Episode) -> tuple[Array, Array]:
    """Get the canonical actions of an episode at its own rate; derive them if it logs none.

    Without logged commands, the gripper's motion tells its commands (`commands_from_motion`), and
    the last action is not known.

    Returns:
        Actions [T, 8], and which of them are known [T] bool.
    """
    is_known = episode.action_mask
    if is_known is None:
        is_known = np.ones(len(episode), bool)
    if episode.action is not None:
        return episode.action, is_known

    openings = np.append(episode.gripper, episode.gripper[-1])
    command = commands_from_motion(openings, episode.rate_hz)
    is_known = is_known & (np.arange(len(episode)) < len(episode) - 1)
    return derive_actions(episode.position, episode.rotation, command), is_known


def add_actions(episode: Episode) -> Episode:
    """Add the canonical actions and their mask, as stores have them."""
    actions, is_known = canonicalize_actions(episode)
    return dataclasses.replace(episode, action=actions, action_mask=is_known)


def extract_chunk(
    actions: Array, is_known: Array, step: int, horizon: int = HORIZON
) -> tuple[Array, Array]:
    """Extract the action chunk that starts at a step.

    From the episode's end, or the first unknown action on, the chunk stays where it is: no motion,
    and the gripper unchanged. These actions are masked.

    Args:
        actions: [T, 8] actions of an episode.
        is_known: [T] bool, which of them are known.
        step: The first step of the chunk.
        horizon: H, the number of actions in the chunk.

    Returns:
        Actions [H, 8] float32, and which of them are training targets [H] bool.
    """
    is_target = is_known[step : step + horizon]
    num_targets = len(is_target) if is_target.all() else int(is_target.argmin())
    chunk = np.zeros((horizon, ACTION_DIM), np.float32)
    chunk[:, 3] = 1
    chunk[:num_targets] = actions[step : step + num_targets]
    last_step = step + max(num_targets, 1) - 1
    chunk[num_targets:, 7] = actions[last_step, 7]
    return chunk, np.arange(horizon) < num_targets


def resample_episode(episode: Episode, rate_hz: float = CONTROL_RATE_HZ) -> Episode:
    """Resample an episode to another rate.

    Positions and openings are interpolated linearly, rotations by slerp; an image is the last one
    before its time. Motions are derived from the resampled states. A gripper command is the one in
    force at the end of the new step. A new step is masked if any step that it covers is.

    Returns:
        The resampled episode; the episode itself if it has this rate.
    """
    if np.isclose(episode.rate_hz, rate_hz):
        return episode

    # Times are in steps of the source, with one time more than there are new steps.
    num_source_steps = len(episode)
    last_source_step = num_source_steps - 1
    num_steps = int(np.floor(last_source_step * rate_hz / episode.rate_hz + TIME_TOLERANCE_STEPS))
    num_steps += 1
    times = np.arange(num_steps + 1) * episode.rate_hz / rate_hz
    times = np.minimum(times, last_source_step)
    starts = times[:-1]
    ends = times[1:]

    # States, between the source steps before and after.
    step_before = np.floor(starts).astype(int)
    step_after = np.minimum(step_before + 1, last_source_step)
    fraction = starts - step_before
    position = (1 - fraction[:, None]) * episode.position[step_before]
    position = position + fraction[:, None] * episode.position[step_after]
    rotations = torch.tensor(episode.rotation)
    fraction_tensor = torch.as_tensor(fraction, dtype=rotations.dtype)
    rotation = quat_slerp(rotations[step_before], rotations[step_after], fraction_tensor)
    quaternion = quat_canonical(quat_normalize(rotation)).numpy()
    gripper = np.interp(starts, np.arange(num_source_steps), episode.gripper)

    # Actions, and which of them are known.
    last_covered = np.ceil(ends - TIME_TOLERANCE_STEPS).astype(int) - 1
    last_covered = np.maximum(last_covered, step_before)
    is_source_known = episode.action_mask
    if is_source_known is None:
        is_source_known = np.ones(num_source_steps, bool)
    covered = zip(step_before, last_covered, strict=True)
    is_known = np.array([is_source_known[first : last + 1].all() for first, last in covered])
    action = None
    if episode.action is not None:
        action = derive_actions(position, quaternion, episode.action[last_covered, 7])
        is_known[-1] = False

    image_steps = np.floor(starts + TIME_TOLERANCE_STEPS).astype(int)
    return dataclasses.replace(
        episode,
        images={
            camera: [images[step] for step in image_steps]
            for camera, images in episode.images.items()
        },
        position=position.astype(np.float32),
        rotation=quaternion.astype(np.float32),
        gripper=gripper.astype(np.float32),
        rate_hz=rate_hz,
        action=action,
        action_mask=is_known,
    )


def validate_episode(episode: Episode) -> Episode:
    """Check an episode, and bring its arrays into the form that everything else expects.

    Returns:
        The episode with float32 arrays, unit quaternions (w >= 0) and gripper openings in [0, 1].

    Raises:
        SpearError: For an episode without steps or images, arrays of different lengths, NaN or
            infinity, a quaternion whose norm is further than 1e-3 from 1, an empty instruction, a
            rate that is not positive, or a gripper opening outside [0, 1] by more than 1e-3. The
            message names the episode and the step.
    """
    name = episode.source
    num_steps = len(episode)
    if num_steps == 0:
        raise empty_episode_error(name)
    check_instruction(episode.instruction, name)
    if not (np.isfinite(episode.rate_hz) and episode.rate_hz > 0):
        raise SpearError(f"bad rate {episode.rate_hz}: {name}: give the steps per second")
    _check_images(episode)

    gripper = _validate_array(name, "gripper", episode.gripper, (num_steps,))
    checked = dataclasses.replace(
        episode,
        position=_validate_array(name, "position", episode.position, (num_steps, 3)),
        rotation=_validate_array(name, "rotation", episode.rotation, (num_steps, 4)),
        gripper=_clip_opening(name, "gripper", gripper),
    )
    return validate_actions(checked)


def _check_images(episode: Episode) -> None:
    """Raise SpearError unless each camera has a (possibly broken) image of every step."""
    name = episode.source
    if not episode.images:
        raise SpearError(f"no camera: {name}: an episode needs at least one camera's images")
    for camera, images in episode.images.items():
        _check_length(name, f"camera {camera!r}", len(images), len(episode))
        if b"" in images:
            step = images.index(b"")
            raise SpearError(f"empty image: {name} step {step} camera {camera!r}: leave it out")


def check_instruction(text: str, name: str) -> None:
    """Raise SpearError, naming the episode, for an instruction without words."""
    if not any(character.isalnum() for character in text):
        raise SpearError(
            f"empty instruction: {name}: say what the robot does, or leave the episode out"
        )


def empty_episode_error(name: str) -> SpearError:
    """The error for an episode without steps."""
    return SpearError(f"empty episode: {name}: it has no steps; leave it out")


def validate_actions(episode: Episode) -> Episode:
    """Check rotations and actions, the part of `validate_episode` that may change later."""
    name = episode.source
    num_steps = len(episode)
    fields: dict[str, Any] = {"rotation": _normalize_rotation(name, "rotation", episode.rotation)}
    if episode.action is not None:
        action = _validate_array(name, "action", episode.action, (num_steps, ACTION_DIM)).copy()
        action[:, 3:7] = _normalize_rotation(name, "action rotation", action[:, 3:7])
        action[:, 7] = _clip_opening(name, "action gripper", action[:, 7])
        fields["action"] = action
    if episode.action_mask is not None:
        mask = np.asarray(episode.action_mask, bool)
        _check_length(name, "action_mask", len(mask), num_steps)
        fields["action_mask"] = mask
    return dataclasses.replace(episode, **fields)


def find_first(mask: Any) -> int | None:
    """Find the first True of a mask [N]; None if all are False."""
    return int(mask.argmax()) if mask.any() else None


def _check_length(name: str, field: str, length: int, num_steps: int) -> None:
    if length != num_steps:
        raise SpearError(
            f"lengths: {name}: {field} has {format_count(length, 'rows')} "
            f"but there are {num_steps} steps"
        )


def _validate_array(name: str, field: str, values: Array, shape: tuple[int, ...]) -> Array:
    """Convert an array to float32; raise SpearError for another shape, or what is not finite."""
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise SpearError(f"wrong shape: {name}: {field} is {array.shape}, expected {shape}")
    is_finite = np.isfinite(array.reshape(shape[0], -1)).all(axis=1)
    step = find_first(~is_finite)
    if step is not None:
        raise SpearError(f"not a number: {name} step {step}: {field} is {array[step].tolist()}")
    return array


def validate_unit_norm(quaternion: Array, name: str, field: str) -> Array:
    """Check that quaternions [T, 4] have norms within 1e-3 of 1.

    Returns:
        [T] the norms.

    Raises:
        SpearError: For another norm; the message names the episode and the step.
    """
    norm: Array = np.linalg.norm(quaternion.astype(np.float64), axis=1)
    step = find_first(np.abs(norm - 1) > UNIT_NORM_TOLERANCE)
    if step is not None:
        raise SpearError(
            f"not a rotation: {name} step {step}: {field} quaternion has norm {norm[step]:.4g}, "
            "expected 1; check the layout (w x y z) or leave the episode out"
        )
    return norm


def _normalize_rotation(name: str, field: str, quaternion: Array) -> Array:
    """Normalize quaternions [T, 4] to norm 1 and w >= 0, after checking their norms."""
    unit = quaternion / validate_unit_norm(quaternion, name, field)[:, None]
    return np.where(unit[:, :1] < 0, -unit, unit).astype(np.float32)


def _clip_opening(name: str, field: str, opening: Array) -> Array:
    """Clip openings [T] to 0 … 1; raise SpearError for one outside by more than rounding."""
    is_outside = (opening < -OPENING_TOLERANCE) | (opening > 1 + OPENING_TOLERANCE)
    step = find_first(is_outside)
    if step is not None:
        raise SpearError(
            f"out of range: {name} step {step}: {field} is {opening[step]:.4g}, not in 0 … 1"
        )
    return np.clip(opening, 0, 1)
