"""What robots' files are made of: reading an observation strictly, and following a chunk of actions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from spear.errors import SpearError
from spear.geometry import UNIT_TOLERANCE, apply_step, quat_canonical, quat_conjugate, quat_multiply
from spear.types import Array

LONGEST_SIDE = 4096
SHORTEST_SIDE = 16
"""Images have sides of so many pixels, and none is more than `WIDEST` times longer than the other (our
choice)."""
WIDEST = 8
LONGEST_PROMPT = 1000
"""Characters of an instruction (our choice; the model's own limit, in tokens, is smaller)."""


def image(observation: Mapping[str, Any], key: str) -> Array:
    """[h, w, 3] uint8, RGB. Raises `SpearError` naming the key for anything else."""
    value = observation[key]
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        raise SpearError(f"{key}: {_what(value)}: send an RGB image, uint8 [height, width, 3]")
    short, long = sorted(value.shape[:2])
    if short < SHORTEST_SIDE or long > LONGEST_SIDE or long > WIDEST * short:
        raise SpearError(
            f"{key}: {value.shape[1]} x {value.shape[0]} pixels: "
            f"send sides of {SHORTEST_SIDE} … {LONGEST_SIDE} pixels, none more than {WIDEST} times the other"
        )
    return value


def numbers(observation: Mapping[str, Any], key: str, count: int) -> Array:
    """[count] float64, finite. Raises `SpearError` naming the key. A single number may come without a
    shape."""
    try:
        array = np.asarray(observation[key])
    except ValueError:
        raise SpearError(f"{key}: a list of unequal parts: send {count} numbers") from None
    if array.dtype.kind not in "fiu" or array.size != count or array.ndim > 1:
        raise SpearError(f"{key}: {_what(array)}: send {count} numbers")
    if not np.isfinite(array).all():
        raise SpearError(f"{key}: not finite: {array.tolist()}: check the robot's state")
    return array.astype(np.float64).reshape(count)


def position(values: Array, what: str) -> Array:
    """[3] metres of a point within 10 m of the base, which no arm exceeds; `SpearError` naming `what`."""
    if np.abs(values).max() > 10:
        raise SpearError(f"{what}: {values.tolist()} is beyond any arm's reach: send metres")
    return values


def opening(observation: Mapping[str, Any], key: str, value: float) -> float:
    """A gripper opening in 0 … 1; readings up to 0.1 beyond are clipped, others refused."""
    if not -0.1 <= value <= 1.1:
        raise SpearError(f"{key}: a gripper reading of {value:g}: send a number from 0 to 1")
    return min(max(value, 0.0), 1.0)


def quaternion(values: Array, what: str) -> Array:
    """[4] unit quaternion (w, x, y, z) with w ≥ 0 of one that is nearly so; `SpearError` naming `what`."""
    norm = float(np.linalg.norm(values))
    if abs(norm - 1) > UNIT_TOLERANCE:
        raise SpearError(f"{what}: norm {norm:.4g}: send a unit quaternion (w, x, y, z)")
    return quat_canonical(torch.from_numpy(values / norm)).numpy()


def prompt(observation: Mapping[str, Any], key: str = "prompt") -> str:
    """The instruction. Raises `SpearError` naming the key."""
    value = observation[key]
    if not isinstance(value, str) or not value.strip():
        raise SpearError(f"{key}: {_what(value)}: send an instruction in words")
    if len(value) > LONGEST_PROMPT:
        raise SpearError(f"{key}: {len(value)} characters: send at most {LONGEST_PROMPT}")
    return value


def seed(observation: Mapping[str, Any], key: str = "seed") -> int:
    """What fixes the random part of an answer: a whole number. Raises `SpearError` naming the key."""
    value = observation[key]
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise SpearError(f"{key}: {_what(value)}: send a whole number")
    return int(value)


def state(position: Array, rotation: Array, gripper: float) -> Array:
    """[8] float32 as `spear.types.Policy` has it: position (m), quaternion, opening."""
    return np.concatenate([position, rotation, [gripper]]).astype(np.float32)


def arm(observation: Mapping[str, Any], key: str, values: Array, rotation: Array) -> dict[str, Any]:
    """What our policy takes from a robot with one camera, whose numbers `values` (under `key`) begin with the
    position (m) and end with the opening; rotation [4] is that of our end-effector frame."""
    last = len(values) - 1
    return {
        "observation/image": image(observation, "observation/image"),
        "observation/state": state(
            position(values[:3], f"{key}[0:3]"),
            rotation,
            opening(observation, f"{key}[{last}]", values[last]),
        ),
        "prompt": prompt(observation),
    }


def targets(start: Array, actions: Array) -> tuple[Array, Array]:
    """Where a chunk leads: positions [H, 3] (m) and orientations [H, 4] after each action, base frame,
    float64.

    start [8] is the state that the chunk [H, 8] starts from.
    """
    position, rotation = torch.from_numpy(np.float64(start[:3])), torch.from_numpy(np.float64(start[3:7]))
    moves = torch.from_numpy(np.float64(actions))
    where, turned = [], []
    for move in moves:
        position, rotation = apply_step(position, rotation, move[:3], move[3:7])
        where.append(position)
        turned.append(rotation)
    return torch.stack(where).numpy(), torch.stack(turned).numpy()


def base_rotations(start: Array, actions: Array) -> Array:
    """The actions' rotations about the base frame's axes, [H, 4]: R_next = R(result) · R_now."""
    rotations = torch.from_numpy(targets(start, actions)[1])
    before = torch.cat([torch.from_numpy(np.float64(start[3:7]))[None], rotations[:-1]])
    return quat_canonical(quat_multiply(rotations, quat_conjugate(before))).numpy()


def example_image(width: int, height: int) -> Array:
    """[height, width, 3] uint8: colours that change from corner to corner."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x // width, 255 * y // height, 128 + 0 * x], axis=-1).astype(np.uint8)


def _what(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return "an empty text" if isinstance(value, str) else f"a {type(value).__name__}"
