"""What an `Episode` must be: one check, whose errors name the episode and the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.geometry import UNIT_TOLERANCE
from spear.types import ACTION_DIM, Array, Episode


def check_episode(episode: Episode) -> Episode:
    """The same episode with float32 arrays, unit quaternions (w >= 0) and gripper openings in [0, 1].

    Raises SpearError, naming the episode and the step, for: no steps, arrays of different lengths, NaN or
    infinity, a quaternion whose norm is further than 1e-3 from 1, an empty instruction, a rate that is not
    positive, a gripper opening outside [0, 1] by more than 1e-3, no image at all.
    """
    name, steps = episode.source, len(episode)
    if steps == 0:
        raise SpearError(f"empty episode: {name}: it has no steps; leave it out")
    if not episode.instruction.strip():
        raise SpearError(f"empty instruction: {name}: say what the robot does, or leave the episode out")
    if not (np.isfinite(episode.rate_hz) and episode.rate_hz > 0):
        raise SpearError(f"bad rate {episode.rate_hz}: {name}: give the steps per second")
    if not episode.images:
        raise SpearError(f"no camera: {name}: an episode needs at least one camera's images")
    for camera, images in episode.images.items():
        _check_length(name, f"camera {camera!r}", len(images), steps)
        for step, image in enumerate(images):
            if not image:
                raise SpearError(f"empty image: {name} step {step} camera {camera!r}: leave the episode out")
    return check_actions(
        dataclasses.replace(
            episode,
            position=_array(name, "position", episode.position, (steps, 3)),
            rotation=_array(name, "rotation", episode.rotation, (steps, 4)),
            gripper=_opening(name, "gripper", _array(name, "gripper", episode.gripper, (steps,))),
        )
    )


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
        raise SpearError(f"lengths differ: {name}: {what} has {length} rows but there are {steps} steps")


def _array(name: str, what: str, values: Array, shape: tuple[int, ...]) -> Array:
    array = np.asarray(values, np.float32)
    if array.shape != shape:
        raise SpearError(f"wrong shape: {name}: {what} is {array.shape}, expected {shape}")
    bad = ~np.isfinite(array.reshape(shape[0], -1)).all(axis=1)
    if bad.any():
        raise SpearError(
            f"not a number: {name} step {bad.argmax()}: {what} is {array[bad.argmax()].tolist()}"
        )
    return array


def check_norm(quaternion: Array, name: str, what: str) -> Array:
    """[T] the norms of quaternions [T, 4]. Raises SpearError where one is further than 1e-3 from 1."""
    norm: Array = np.linalg.norm(quaternion.astype(np.float64), axis=1)
    bad = np.abs(norm - 1) > UNIT_TOLERANCE
    if bad.any():
        step = int(bad.argmax())
        raise SpearError(
            f"not a rotation: {name} step {step}: {what} quaternion has norm {norm[step]:.4g}, expected 1; "
            "check the layout (w x y z) or leave the episode out"
        )
    return norm


def _unit(name: str, what: str, quaternion: Array) -> Array:
    unit = quaternion / check_norm(quaternion, name, what)[:, None]
    return np.where(unit[:, :1] < 0, -unit, unit).astype(np.float32)


def _opening(name: str, what: str, opening: Array) -> Array:
    bad = (opening < -1e-3) | (opening > 1 + 1e-3)
    if bad.any():
        step = int(bad.argmax())
        raise SpearError(f"out of range: {name} step {step}: {what} is {opening[step]:.4g}, not in 0 … 1")
    return np.clip(opening, 0, 1)
