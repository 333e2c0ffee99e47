"""Canonical actions: the same meaning for every robot, at 5 Hz, in chunks; and the check of whole episodes.

An action is a translation delta in the base frame, a rotation delta in the end-effector frame (unit
quaternion) and an absolute gripper command (1 open, 0 closed): `spear.types.Action`, here as numpy rows [8].
Logged commands are used when an episode has them; otherwise actions are derived from the states: the step
that was made in fact. That happens once, when an episode is written (`add_actions`).
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

HORIZON = 5
"""Actions in a chunk (the paper)."""
ACTION_RULES_VERSION = 4
"""Raised when a recording becomes other steps or actions than before: what is prepared is then made again."""


def derive_actions(position: Array, rotation: Array, command: Array) -> Array:
    """[T, 8] actions from poses [T, 3] (m) and [T, 4], and gripper commands [T].

    Action t leads from pose t to pose t + 1. The last one leads nowhere known: it stays (mask it).
    """
    actions = np.zeros((len(position), ACTION_DIM), np.float32)
    actions[:, 3] = 1
    where, turn = (torch.as_tensor(np.asarray(x, np.float64)) for x in (position, rotation))
    step, delta = action_between_poses(where[:-1], turn[:-1], where[1:], turn[1:])
    actions[:-1, :3] = step.numpy()
    actions[:-1, 3:7] = quat_normalize(delta).numpy()
    actions[:, 7] = command
    return actions


def canonicalize_actions(episode: Episode) -> tuple[Array, Array]:
    """Canonical actions [T, 8] of an episode at its own rate, and which of them are known [T] bool.

    Without logged ones the gripper was told what it did (`commands_from_motion`). The last is not known.
    """
    known = np.ones(len(episode), bool) if episode.action_mask is None else episode.action_mask
    if episode.action is not None:
        return episode.action, known
    command = commands_from_motion(np.append(episode.gripper, episode.gripper[-1]), episode.rate_hz)
    known = known & (np.arange(len(episode)) < len(episode) - 1)
    return derive_actions(episode.position, episode.rotation, command), known


def add_actions(episode: Episode) -> Episode:
    """The episode with its canonical actions and their mask, as files keep it."""
    actions, known = canonicalize_actions(episode)
    return dataclasses.replace(episode, action=actions, action_mask=known)


def extract_chunk(
    actions: Array, valid: Array, step: int, horizon: int = HORIZON
) -> tuple[Array, Array]:
    """The chunk that starts at `step`: actions [H, 8] float32 and which of them are targets [H] bool.

    From the episode's end or the first invalid action on it stays (no motion, the gripper as it was), masked.
    """
    known = valid[step : step + horizon]
    count = len(known) if known.all() else int(known.argmin())
    out = np.zeros((horizon, ACTION_DIM), np.float32)
    out[:, 3] = 1
    out[:count] = actions[step : step + count]
    out[count:, 7] = actions[step + max(count, 1) - 1, 7]
    return out, np.arange(horizon) < count


def resample_episode(episode: Episode, rate_hz: float = CONTROL_RATE_HZ) -> Episode:
    """At another rate: positions and openings linear, rotations by slerp, images the last that there was.

    Motions are derived from the resampled states, gripper commands are those in force at the end of each new
    step; a new step is masked when any step it covers is. An episode at this rate is returned as it is.
    """
    if np.isclose(episode.rate_hz, rate_hz):
        return episode
    steps = len(episode)
    count = int(np.floor((steps - 1) * rate_hz / episode.rate_hz + 1e-6)) + 1
    when = np.minimum(
        np.arange(count + 1) * episode.rate_hz / rate_hz, steps - 1
    )  # in steps of the source
    low = np.floor(when[:-1]).astype(int)
    high = np.minimum(low + 1, steps - 1)
    part = (when[:-1] - low)[:, None]
    turn = torch.tensor(episode.rotation)
    rotation = quat_slerp(turn[low], turn[high], torch.as_tensor(part[:, 0], dtype=turn.dtype))
    position = (1 - part) * episode.position[low] + part * episode.position[high]
    quaternion = quat_canonical(quat_normalize(rotation)).numpy()
    covered_to = np.maximum(
        np.ceil(when[1:] - 1e-6).astype(int) - 1, low
    )  # last source step of each new one
    known = np.ones(steps, bool) if episode.action_mask is None else episode.action_mask
    mask = np.array([known[a : b + 1].all() for a, b in zip(low, covered_to, strict=True)])
    action = None
    if episode.action is not None:
        action = derive_actions(position, quaternion, episode.action[covered_to, 7])
        mask[-1] = False
    seen = np.floor(when[:-1] + 1e-6).astype(int)
    return dataclasses.replace(
        episode,
        images={camera: [images[i] for i in seen] for camera, images in episode.images.items()},
        position=position.astype(np.float32),
        rotation=quaternion.astype(np.float32),
        gripper=np.interp(when[:-1], np.arange(steps), episode.gripper).astype(np.float32),
        rate_hz=rate_hz,
        action=action,
        action_mask=mask,
    )


def check_episode(episode: Episode) -> Episode:
    """The same episode with float32 arrays, unit quaternions (w >= 0) and gripper openings in [0, 1].

    Raises SpearError, naming the episode and the step, for: no steps, arrays of different lengths, NaN or
    infinity, a quaternion whose norm is further than 1e-3 from 1, an empty instruction, a rate that is not
    positive, a gripper opening outside [0, 1] by more than 1e-3, no image at all.
    """
    name, steps = episode.source, len(episode)
    if steps == 0:
        raise empty_episode_error(name)
    check_instruction(episode.instruction, name)
    if not (np.isfinite(episode.rate_hz) and episode.rate_hz > 0):
        raise SpearError(f"bad rate {episode.rate_hz}: {name}: give the steps per second")
    if not episode.images:
        raise SpearError(f"no camera: {name}: an episode needs at least one camera's images")
    for camera, images in episode.images.items():
        _check_length(name, f"camera {camera!r}", len(images), steps)
        if b"" in images:
            raise SpearError(
                f"empty image: {name} step {images.index(b'')} camera {camera!r}: leave it out"
            )
    shapes = {"position": (steps, 3), "rotation": (steps, 4), "gripper": (steps,)}
    parts: dict[str, Any]
    parts = {
        what: _array(name, what, getattr(episode, what), shape) for what, shape in shapes.items()
    }
    parts["gripper"] = _opening(name, "gripper", parts["gripper"])
    return check_actions(dataclasses.replace(episode, **parts))


def check_instruction(text: str, name: str) -> None:
    """Raises SpearError, naming the episode, for an instruction without words."""
    if not any(map(str.isalnum, text)):
        raise SpearError(
            f"empty instruction: {name}: say what the robot does, or leave the episode out"
        )


def empty_episode_error(name: str) -> SpearError:
    """What is said of an episode without steps."""
    return SpearError(f"empty episode: {name}: it has no steps; leave it out")


def check_actions(episode: Episode) -> Episode:
    """The part of `check_episode` that can go wrong after the states and images have been checked."""
    name, steps = episode.source, len(episode)
    parts: dict[str, Any] = {"rotation": _unit(name, "rotation", episode.rotation)}
    if episode.action is not None:
        action = _array(name, "action", episode.action, (steps, ACTION_DIM)).copy()
        action[:, 3:7] = _unit(name, "action rotation", action[:, 3:7])
        action[:, 7] = _opening(name, "action gripper", action[:, 7])
        parts["action"] = action
    if episode.action_mask is not None:
        parts["action_mask"] = np.asarray(episode.action_mask, bool)
        _check_length(name, "action_mask", len(parts["action_mask"]), steps)
    return dataclasses.replace(episode, **parts)


def _check_length(name: str, what: str, length: int, steps: int) -> None:
    if length != steps:
        raise SpearError(
            f"lengths: {name}: {what} has {format_count(length, 'rows')} but there are {steps} steps"
        )


def find_first(bad: Any) -> int | None:
    """The number of the first row that is bad [N] bool; None where none is."""
    return int(bad.argmax()) if bad.any() else None


def _array(name: str, what: str, values: Array, shape: tuple[int, ...]) -> Array:
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise SpearError(f"wrong shape: {name}: {what} is {array.shape}, expected {shape}")
    if (step := find_first(~np.isfinite(array.reshape(shape[0], -1)).all(axis=1))) is not None:
        raise SpearError(f"not a number: {name} step {step}: {what} is {array[step].tolist()}")
    return array


def check_unit_norm(quaternion: Array, name: str, what: str) -> Array:
    """[T] the norms of quaternions [T, 4]. Raises SpearError where one is further than 1e-3 from 1."""
    norm: Array = np.linalg.norm(quaternion.astype(np.float64), axis=1)
    if (step := find_first(np.abs(norm - 1) > UNIT_NORM_TOLERANCE)) is not None:
        wrong = f"not a rotation: {name} step {step}: {what} quaternion has norm {norm[step]:.4g}, expected 1"
        raise SpearError(f"{wrong}; check the layout (w x y z) or leave the episode out")
    return norm


def _unit(name: str, what: str, quaternion: Array) -> Array:
    unit = quaternion / check_unit_norm(quaternion, name, what)[:, None]
    return np.where(unit[:, :1] < 0, -unit, unit).astype(np.float32)


def _opening(name: str, what: str, opening: Array) -> Array:
    if (step := find_first((opening < -1e-3) | (opening > 1 + 1e-3))) is not None:
        raise SpearError(
            f"out of range: {name} step {step}: {what} is {opening[step]:.4g}, not in 0 … 1"
        )
    return np.clip(opening, 0, 1)
