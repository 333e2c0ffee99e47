"""Canonical actions, which mean the same for every robot, and the check of whole episodes.

A canonical action consists of a translation in the base frame, a rotation in the end-effector frame
(unit quaternion) and an absolute gripper command (1 open, 0 closed). Here it is a NumPy row [8], as
`Action.to_vector` arranges it. If an episode has actions, these are used. Otherwise they are
derived from the states: an action is then the motion to the next state. Actions are derived once,
when an episode is written (`with_canonical_actions`).

A mask says which actions of an episode are known. For example, the last action of an episode is not
known if it would have to be derived from a next state.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np
import torch

from spear.errors import SpearError, format_count
from spear.geometry import (
    UNIT_NORM_TOLERANCE,
    action_between_poses,
    quat_canonical,
    quat_multiply,
    quat_normalize,
    quat_slerp,
)
from spear.gripper import infer_commands_between_openings
from spear.types import ACTION_DIM, CONTROL_RATE_HZ, Array, Episode

HORIZON = 5  # the number of actions in a chunk (the paper)
ACTION_RULES_VERSION = 4
"""Increase this number whenever a change of the code turns the same recording into other steps or
actions. Datasets that were prepared with an earlier number are then prepared again."""
TIME_TOLERANCE_STEPS = 1e-6  # larger than the rounding error of times in resampling
OPENING_TOLERANCE = 1e-3  # how far an opening may be outside 0 … 1


class MaskedActions(NamedTuple):
    """Canonical actions, of an episode or of a chunk, and a mask that says which of them count.

    Attributes:
        actions: [N, 8] float32.
        mask: [N] bool, False for actions that are not known.
    """

    actions: Array
    mask: Array


def derive_actions(position: Array, rotation: Array, command: Array) -> Array:
    """Derive actions from poses: action t leads from pose t to pose t + 1.

    Args:
        position: [T, 3] end-effector positions, m, base frame.
        rotation: [T, 4] end-effector orientations, unit quaternions, base frame.
        command: [T] gripper commands.

    Returns:
        [T, 8] actions, float32. The last row has its gripper command, but no motion, because the
        next pose is not known. The caller should mask it.
    """
    actions = np.zeros((len(position), ACTION_DIM), np.float32)
    actions[:, 3] = 1  # the real part of the identity quaternion
    positions = torch.as_tensor(np.asarray(position, np.float64))
    rotations = torch.as_tensor(np.asarray(rotation, np.float64))
    translation, delta_rotation = action_between_poses(
        positions[:-1], rotations[:-1], positions[1:], rotations[1:]
    )
    actions[:-1, :3] = translation.numpy()
    actions[:-1, 3:7] = quat_normalize(delta_rotation).numpy()
    actions[:, 7] = command
    return actions


def get_or_derive_actions(episode: Episode) -> MaskedActions:
    """Get the canonical actions of an episode, at its own rate, and which of them are known.

    If the episode has no actions, they are derived: motions from its states, and gripper commands
    from the motion of its gripper (`infer_commands_between_openings`). Then the last action is
    unknown.
    """
    is_known = episode.action_mask
    if is_known is None:
        is_known = np.ones(len(episode), bool)
    if episode.action is not None:
        return MaskedActions(episode.action, is_known)

    # After the last step, the opening is taken to stay, so that every step has a command.
    openings = np.append(episode.gripper, episode.gripper[-1])  # [T + 1]
    command = infer_commands_between_openings(openings, episode.rate_hz)  # [T]
    last_step = len(episode) - 1
    has_next_state = np.arange(len(episode)) < last_step  # [T]
    actions = derive_actions(episode.position, episode.rotation, command)
    return MaskedActions(actions, is_known & has_next_state)


def compose_action_groups(action_groups: Array) -> Array:
    """Compose the actions of each group to one: their whole motion, and the last gripper command.

    Args:
        action_groups: [T, k, 8] for each of T observations, the k actions that the robot executes
            after it.

    Returns:
        [T, 8] one action per group, float32.
    """
    composed = np.array(action_groups[:, -1], np.float32)  # [T, 8], with the last gripper command
    # Translations are in the base frame, so they add up. Each rotation is about the axes of the end
    # effector at its own step, so the next one is multiplied from the right.
    composed[:, :3] = action_groups[:, :, :3].sum(axis=1)
    rotations = torch.as_tensor(np.asarray(action_groups[:, :, 3:7], np.float64))  # [T, k, 4]
    rotation = functools.reduce(quat_multiply, rotations.unbind(dim=1))  # [T, 4]
    composed[:, 3:7] = quat_canonical(rotation).numpy()
    return composed


def with_canonical_actions(episode: Episode) -> Episode:
    """Add the canonical actions and their mask to an episode. Stores contain such episodes only."""
    actions, is_known = get_or_derive_actions(episode)
    return dataclasses.replace(episode, action=actions, action_mask=is_known)


def extract_chunk_up_to_unknown(
    actions: Array, is_known: Array, step: int, horizon: int = HORIZON
) -> MaskedActions:
    """Extract the action chunk that starts at a step.

    The chunk has the known actions from `step` on, up to the episode's end or the first unknown
    action. Further actions of the chunk are masked. They are no motion, and keep the gripper's
    command.

    Args:
        actions: [T, 8] actions of an episode.
        is_known: [T] bool, which of the actions are known.
        step: The first step of the chunk.
        horizon: H, the number of actions in the chunk.

    Returns:
        Actions [H, 8], and a mask [H] that says which of them are training targets.
    """
    is_known_in_chunk = is_known[step : step + horizon]  # fewer than H at the episode's end
    if is_known_in_chunk.all():
        num_targets = len(is_known_in_chunk)
    else:
        num_targets = int(is_known_in_chunk.argmin())  # the first unknown action

    chunk = np.zeros((horizon, ACTION_DIM), np.float32)
    chunk[:, 3] = 1  # the real part of the identity quaternion
    chunk[:num_targets] = actions[step : step + num_targets]
    # The gripper's command is that of the last target, or of `step` if there is no target.
    last_target_step = step + max(num_targets, 1) - 1
    chunk[num_targets:, 7] = actions[last_target_step, 7]
    is_target = np.arange(horizon) < num_targets  # [H]
    return MaskedActions(chunk, is_target)


def resample_episode(episode: Episode, rate_hz: float = CONTROL_RATE_HZ) -> Episode:
    """Resample an episode to another rate.

    Below, T is the number of source steps (of `episode`) and N the number of new steps. A new step
    covers the source steps whose time overlaps with its own.

    - Positions and openings are interpolated linearly, and rotations by slerp.
    - The image of a new step is the last one that was taken before the step's time.
    - The motion of an action is derived from the resampled states, and its gripper command is the
      command of the last source step that the new step covers.
    - A new step is masked if any source step that it covers is masked.

    Returns:
        The resampled episode; the episode itself if it has this rate already.
    """
    if np.isclose(episode.rate_hz, rate_hz):
        return episode

    # The last new step starts at the last source step, or less than one new step before it.
    num_source_steps = len(episode)
    last_source_step = num_source_steps - 1
    last_new_step = np.floor(last_source_step * rate_hz / episode.rate_hz + TIME_TOLERANCE_STEPS)
    num_steps = int(last_new_step) + 1

    # Times are measured in source steps. Each new step starts at one time and ends at the next.
    times = np.arange(num_steps + 1) * episode.rate_hz / rate_hz  # [N + 1]
    times = np.minimum(times, last_source_step)
    starts = times[:-1]  # [N]
    ends = times[1:]  # [N]

    # States lie between the source steps before and after their time.
    step_before = np.floor(starts).astype(int)  # [N]
    step_after = np.minimum(step_before + 1, last_source_step)  # [N]
    fraction = starts - step_before  # [N], of the way from the step before to the step after
    fraction_column = fraction[:, None]  # [N, 1]
    position = (1 - fraction_column) * episode.position[step_before]
    position = position + fraction_column * episode.position[step_after]  # [N, 3]
    rotations = torch.tensor(episode.rotation)  # [T, 4]
    fraction_tensor = torch.as_tensor(fraction, dtype=rotations.dtype)
    rotation = quat_slerp(rotations[step_before], rotations[step_after], fraction_tensor)
    quaternion = quat_canonical(quat_normalize(rotation)).numpy()  # [N, 4]
    gripper = np.interp(starts, np.arange(num_source_steps), episode.gripper)  # [N]

    # A new step covers the source steps from `step_before` to `last_covered_step`.
    # This is the last source step that starts before the new step's end.
    last_covered_step = np.ceil(ends - TIME_TOLERANCE_STEPS).astype(int) - 1  # [N]
    last_covered_step = np.maximum(last_covered_step, step_before)
    is_source_known = episode.action_mask  # [T]
    if is_source_known is None:
        is_source_known = np.ones(num_source_steps, bool)
    is_known = np.empty(num_steps, bool)
    for step in range(num_steps):
        covered_steps = slice(step_before[step], last_covered_step[step] + 1)
        is_known[step] = is_source_known[covered_steps].all()

    action = None
    if episode.action is not None:
        command = episode.action[last_covered_step, 7]
        action = derive_actions(position, quaternion, command)
        is_known[-1] = False  # the state after the last new step is not known

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
    """Check an episode, and convert its arrays to the form that all other code expects.

    Returns:
        The episode with float32 arrays, unit quaternions (w >= 0) and gripper openings in [0, 1].

    Raises:
        SpearError: If the episode has no steps or no images, arrays of different lengths, numbers
            that are not finite, a quaternion whose norm is further than 1e-3 from 1, an empty
            instruction, a rate that is not positive, or a gripper opening outside [0, 1] by more
            than 1e-3. The message names the episode and, if there is one, the bad step.
    """
    source = episode.source
    num_steps = len(episode)
    if num_steps == 0:
        raise make_empty_episode_error(source)
    check_instruction(episode.instruction, source)
    if not (np.isfinite(episode.rate_hz) and episode.rate_hz > 0):
        raise SpearError(
            f"{source} has {episode.rate_hz} steps per second, which is no rate. Give a number "
            "above 0 as rate_hz."
        )
    _check_every_step_has_images(episode)

    gripper = _validate_array(source, "gripper", episode.gripper, (num_steps,))
    checked = dataclasses.replace(
        episode,
        position=_validate_array(source, "position", episode.position, (num_steps, 3)),
        rotation=_validate_array(source, "rotation", episode.rotation, (num_steps, 4)),
        gripper=_clip_opening(source, "gripper", gripper),
    )
    return validate_rotations_and_actions(checked)


def _check_every_step_has_images(episode: Episode) -> None:
    """Raise SpearError unless each camera has an encoded image of every step.

    The images are not decoded.
    """
    source = episode.source
    if not episode.images:
        raise SpearError(f"{source} has no camera. Give the images of at least one.")
    for camera, images in episode.images.items():
        _check_length(source, f"camera {camera!r}", len(images), len(episode))
        if b"" in images:
            step = images.index(b"")
            raise SpearError(
                f"{source} has an empty image at step {step} of the camera {camera!r}. Leave the "
                "episode out."
            )


def check_instruction(text: str, source: str) -> None:
    """Raise SpearError if the instruction of the episode `source` has no words."""
    if not any(character.isalnum() for character in text):
        raise SpearError(
            f"{source} has an empty instruction. Say what the robot does, or leave the episode out."
        )


def make_empty_episode_error(source: str) -> SpearError:
    """The error for an episode without steps."""
    return SpearError(f"{source} has no steps. Leave the episode out.")


def validate_rotations_and_actions(episode: Episode) -> Episode:
    """Check and normalize the rotations and actions of an episode, as `validate_episode` does.

    Call this after a change of the rotations or actions of an episode that was checked before.
    """
    source = episode.source
    num_steps = len(episode)
    fields: dict[str, Any] = {"rotation": _normalize_rotation(source, "rotation", episode.rotation)}
    if episode.action is not None:
        action = _validate_array(source, "action", episode.action, (num_steps, ACTION_DIM)).copy()
        action[:, 3:7] = _normalize_rotation(source, "action rotation", action[:, 3:7])
        action[:, 7] = _clip_opening(source, "action gripper", action[:, 7])
        fields["action"] = action
    if episode.action_mask is not None:
        mask = np.asarray(episode.action_mask, bool)
        _check_length(source, "action_mask", len(mask), num_steps)
        fields["action_mask"] = mask
    return dataclasses.replace(episode, **fields)


def find_first(mask: Any) -> int | None:
    """Find the index of the first True of a mask [N]; None if all are False."""
    return int(mask.argmax()) if mask.any() else None


def _check_length(source: str, field: str, length: int, num_steps: int) -> None:
    if length != num_steps:
        raise SpearError(
            f"{field} of {source} has {format_count(length, 'rows')}, but the episode has "
            f"{num_steps} steps. Give one row for each step."
        )


def _validate_array(source: str, field: str, values: Array, shape: tuple[int, ...]) -> Array:
    """Convert an array to float32. Raise SpearError for a wrong shape, or a number not finite.

    Args:
        source: The name of the episode, for the message.
        field: The field of the episode, for the message.
        values: The array.
        shape: The shape that it should have, [T, ...].
    """
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise SpearError(
            f"{field} of {source} has the shape {array.shape}, not {shape}. Give an array of this "
            "shape."
        )
    is_finite = np.isfinite(array.reshape(shape[0], -1)).all(axis=1)  # [T]
    step = find_first(~is_finite)
    if step is not None:
        raise SpearError(
            f"{field} of {source} is NaN or infinite at step {step}. Leave the episode out."
        )
    return array


def compute_and_check_norms(quaternion: Array, source: str, field: str) -> Array:
    """Compute the norms of quaternions [T, 4], and check that they are within 1e-3 of 1.

    Args:
        quaternion: [T, 4] the quaternions.
        source: The name of the episode, for the message.
        field: What the quaternions are, for the message.

    Returns:
        [T] the norms.

    Raises:
        SpearError: If a norm is further from 1. The message names the episode and the step.
    """
    norm: Array = np.linalg.norm(quaternion.astype(np.float64), axis=1)
    step = find_first(np.abs(norm - 1) > UNIT_NORM_TOLERANCE)
    if step is not None:
        raise SpearError(
            f"{field} of {source} is a quaternion of norm {norm[step]:.4g} at step {step}, so it "
            "is no rotation. Check its rotation_format in spear.json (ours is w x y z), or "
            "leave the episode out."
        )
    return norm


def _normalize_rotation(source: str, field: str, quaternion: Array) -> Array:
    """Normalize quaternions [T, 4] to norm 1 and w >= 0, after checking their norms."""
    norms = compute_and_check_norms(quaternion, source, field)  # [T]
    unit = quaternion / norms[:, None]  # [T, 4]
    real_part = unit[:, :1]  # [T, 1]
    return np.where(real_part < 0, -unit, unit).astype(np.float32)


def _clip_opening(source: str, field: str, opening: Array) -> Array:
    """Clip openings [T] to 0 … 1. Raise SpearError if one is outside by more than the tolerance."""
    is_outside = (opening < -OPENING_TOLERANCE) | (opening > 1 + OPENING_TOLERANCE)
    step = find_first(is_outside)
    if step is not None:
        raise SpearError(
            f"{field} of {source} is {opening[step]:.4g} at step {step}. It must be from 0 "
            "(closed) to 1 (open)."
        )
    return np.clip(opening, 0, 1)
