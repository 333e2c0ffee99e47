"""What robots' files are made of: a robot, reading its observation strictly, following a chunk of actions.

This is the one place where observations are checked. A robot reads its own keys with the functions below;
`check` does it for an observation that is in SPEAR-1's own words already. The result is a `Checked`, which is
not looked at again on its way to the network.
"""

import re
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch

from spear.errors import SpearError, check_known, unknown_name_error
from spear.geometry import (
    apply_action,
    check_unit_quat,
    quat_canonical,
    quat_conjugate,
    quat_multiply,
)
from spear.types import ACTION_DIM, CONTROL_CHARACTERS, STATE_DIM, Array, Policy

Observation = Mapping[str, Any]
Shown = TypeVar("Shown", bound=dict[str, Any])
IMAGE, STATE, PROMPT, SEED = "observation/image", "observation/state", "prompt", "seed"
WRIST, COMMITTED = "observation/wrist_image", "committed"
REQUIRED = {
    IMAGE: "the external camera's image, uint8 [height, width, 3]",
    STATE: "end-effector position (m, base frame), quaternion (w x y z), gripper opening 0 … 1: 8 numbers",
    PROMPT: "the instruction in words",
}
"""What every observation of `spear.types.Policy` has."""
IMAGE_SIZES: Mapping[str, tuple[int, int]] = {"external": (280, 210), "wrist": (112, 112)}
"""The cameras of a policy that does not say which it takes: view → (width, height), pixels."""

SHORTEST_SIDE = 16
LONGEST_SIDE = 4096
WIDEST = 8
"""Images have sides of so many pixels, none more than `WIDEST` times longer than the other (our choice)."""
REACH = 10.0
"""Metres from the base that no arm exceeds (our choice)."""
LONGEST_PROMPT = 1000
"""Characters of an instruction (our choice; the model's own limit, in tokens, is smaller)."""


class Checked(dict[str, Any]):
    """An observation of `spear.types.Policy` whose values have all been checked.

    robot  who sent it, where several are answered: a policy checks each by itself.
    """

    robot: Hashable = None


@dataclass(frozen=True)
class Control:
    """One way to command a robot.

    about    what a row of the result is, with units and frames: clients are told.
    rate_hz  rows per second.
    convert  (actions [H, 8] of `spear.types.Action`, state [8] and the robot's own observation from which
             they were predicted) → [N, n] rows for the robot; left out, they are the actions themselves.
    """

    about: str
    rate_hz: float
    convert: Callable[[Array, Array, Observation], Array] = lambda actions, state, observation: (
        actions
    )


@dataclass(frozen=True)
class Embodiment:
    """A robot.

    required   observation key → what it is; every one must be there.
    observe    the robot's observation → that of `spear.types.Policy`; raises `SpearError` naming the key.
    controls   name → `Control`; the first is the default.
    example    an observation as the robot sends it, the same at every call.
    optional   as `required`, for keys that may be there, the seed always; any other key is refused.
    greeting   control's name → the server's first message, for clients that want another than `Service`'s.
    direct_reply  request → the text that answers it without the policy, None where it is an observation.
    """

    required: Mapping[str, str]
    observe: Callable[[Observation], dict[str, Any]]
    controls: Mapping[str, Control]
    example: Callable[[], dict[str, Any]]
    optional: Mapping[str, str] = field(default_factory=dict)
    greeting: Callable[[str], dict[str, Any]] | None = None
    direct_reply: Callable[[Observation], str | None] = lambda request: None

    def __post_init__(self) -> None:
        about = "a whole number that fixes what is random in the answer"
        object.__setattr__(self, "optional", {**self.optional, SEED: about})

    def read(self, observation: Any) -> Checked:
        """The robot's observation as SPEAR-1 wants it. Raises `SpearError` naming the key that is wrong."""
        if not isinstance(observation, Mapping):
            raise SpearError(
                f"observation: a {type(observation).__name__}: send a map of keys to values"
            )
        _check_keys(observation, self.required, self.optional)
        return check({**self.observe(observation), **seed(observation)})

    def control(self, name: str | None) -> tuple[str, Control]:
        """A control by name, the default for None. Raises `SpearError` for an unknown one."""
        name = next(iter(self.controls)) if name is None else name
        check_known("control", self.controls, name)
        return name, self.controls[name]


def check(observation: Observation) -> Checked:
    """Check an observation of `spear.types.Policy`. Raises `SpearError` naming the key, also for one unknown.

    Quaternions are normalised, gripper readings a little beyond 0 … 1 clipped. Which cameras there are, the
    model knows.
    """
    _check_keys(observation, REQUIRED, [WRIST, SEED, COMMITTED, *filter(is_camera, observation)])
    values = numbers(observation, STATE, STATE_DIM)
    for key in observation:
        if is_camera(key):
            image(observation, key)
    own = arm(observation, STATE, values, values[3:7])
    return Checked({**observation, **own, **seed(observation), **committed(observation)})


def _check_keys(
    observation: Observation, required: Mapping[str, str], optional: Collection[str]
) -> None:
    known = {*required, *optional}
    for key in observation:
        if key not in known:
            raise unknown_name_error("observation key", str(key)[:80], known)
    for key, about in required.items():
        if key not in observation:
            raise SpearError(f"observation without {key!r}: send {about}")


def is_camera(key: Any) -> bool:
    """Whether a key of `spear.types.Policy` is a camera's: "observation/image", "observation/…_image"."""
    return isinstance(key, str) and re.fullmatch(r"observation/(.+_)?image", key) is not None


def camera_key(view: str) -> str:
    """The key of a view's images."""
    return IMAGE if view == "external" else f"observation/{view}_image"


def cameras(policy: Policy) -> Mapping[str, tuple[int, int]]:
    """Which cameras a policy takes, and in which size: what it says itself, else `IMAGE_SIZES`."""
    return getattr(policy, "image_sizes", None) or IMAGE_SIZES


def rendered_sizes(policy: Policy) -> dict[str, tuple[int, int]]:
    """Which size each camera of the simulator has for a policy: also those that the policy does not take."""
    return {**IMAGE_SIZES, **cameras(policy)}


def shown_to(policy: Policy, observation: Shown) -> Shown:
    """An observation without the cameras that the policy does not take; one that does not say sees all."""
    own = {*map(camera_key, getattr(policy, "image_sizes", ()))} or observation
    return type(observation)(
        item for item in observation.items() if not is_camera(item[0]) or item[0] in own
    )


def image(observation: Observation, key: str) -> Array:
    """[h, w, 3] uint8, RGB. Raises `SpearError` naming the key for anything else."""
    value = observation[key]
    if (
        not isinstance(value, np.ndarray)
        or value.dtype != np.uint8
        or value.ndim != 3
        or value.shape[2] != 3
    ):
        raise SpearError(f"{key}: {_what(value)}: send an RGB image, uint8 [height, width, 3]")
    short, long = sorted(value.shape[:2])
    if short < SHORTEST_SIDE or long > LONGEST_SIDE or long > WIDEST * short:
        limits = f"sides of {SHORTEST_SIDE} … {LONGEST_SIDE} pixels, none more than {WIDEST} times the other"
        raise SpearError(f"{key}: {value.shape[1]} x {value.shape[0]} pixels: send {limits}")
    return value


def numbers(observation: Observation, key: str, count: int) -> Array:
    """[count] float64, finite; one number may come without a shape. Raises `SpearError` naming the key."""
    value = observation[key]
    if isinstance(value, list) and not all(isinstance(v, int | float | np.generic) for v in value):
        raise SpearError(
            f"{key}: a list of other things: send numbers: {count}"
        )  # texts could take GiB here
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.size != count or array.ndim > 1:
        raise SpearError(f"{key}: {_what(array)}: send numbers: {count}")
    if not np.isfinite(array).all():
        raise SpearError(f"{key}: not finite: {array.tolist()}: check the robot's state")
    return array.astype(np.float64).reshape(count)


def position(values: Array, what: str) -> Array:
    """[..., 3] metres of a point within `REACH` of the base. Raises `SpearError` naming `what`."""
    if np.abs(values).max(initial=0) > REACH:
        raise SpearError(f"{what}: {values.tolist()} is beyond any arm's reach: send metres")
    return values


def radians(values: Array, what: str) -> Array:
    """Angles, or a rotation vector, within a whole turn. Raises `SpearError` naming `what`."""
    if np.abs(values).max() > 2 * np.pi:
        raise SpearError(f"{what}: {values.tolist()}: more than a turn: send radians")
    return values


def opening(observation: Observation, key: str, value: float) -> float:
    """A gripper opening in 0 … 1; readings up to 0.1 beyond are clipped, others refused."""
    if not -0.1 <= value <= 1.1:
        raise SpearError(f"{key}: a gripper reading of {value:g}: send a number from 0 to 1")
    return min(max(value, 0.0), 1.0)


def prompt(observation: Observation, key: str = PROMPT) -> str:
    """The instruction. Raises `SpearError` naming the key."""
    value = observation[key]
    if isinstance(value, str) and len(value) > LONGEST_PROMPT:
        raise SpearError(f"{key}: {len(value)} characters: send at most {LONGEST_PROMPT}")
    if (
        not isinstance(value, str)
        or not any(map(str.isalnum, value))
        or CONTROL_CHARACTERS.search(value)
    ):
        raise SpearError(f"{key}: {_what(value)}: send an instruction in words")
    return value


def seed(observation: Observation) -> dict[str, int]:
    """The entry that fixes the random part of an answer, where there is one. Raises `SpearError` naming the
    key for anything but a whole number."""
    if SEED not in observation:
        return {}
    value = observation[SEED]
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise SpearError(f"{SEED}: {_what(value)}: send a whole number")
    return {SEED: int(value)}


def committed(observation: Observation) -> dict[str, Array]:
    """The entry with the actions [d, 8] that are executed before the answer is there, where there is one.
    Raises `SpearError` naming the key for anything else."""
    if COMMITTED not in observation:
        return {}
    rows = observation[COMMITTED]
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != ACTION_DIM:
        raise SpearError(
            f"{COMMITTED}: {_what(rows)}: send actions as predicted, [d, {ACTION_DIM}]"
        )
    array = (
        numbers({COMMITTED: rows.ravel()}, COMMITTED, rows.size)
        .reshape(rows.shape)
        .astype(np.float32)
    )
    position(array[:, :3], f"{COMMITTED}[0:3]")
    array[:, 3:7] = check_unit_quat(torch.from_numpy(array[:, 3:7]), f"{COMMITTED}[3:7]").numpy()
    array[:, 7] = [opening(observation, f"{COMMITTED}[7]", value) for value in array[:, 7]]
    return {COMMITTED: array}


def state(position: Array, rotation: Array, gripper: float, what: str = "the orientation") -> Array:
    """[8] float32 as `spear.types.Policy` has it: position (m), canonical unit quaternion, opening.

    Raises `SpearError` naming `what` for a quaternion whose norm is not nearly 1.
    """
    array = np.concatenate([position, rotation, [gripper]]).astype(np.float32)
    array[3:7] = check_unit_quat(torch.from_numpy(array[3:7]), what).numpy()
    return array


def arm(
    observation: Observation,
    key: str,
    values: Array,
    rotation: Array,
    camera: str = IMAGE,
    instruction: str = PROMPT,
) -> dict[str, Any]:
    """What SPEAR-1 takes from a robot with one camera. Raises `SpearError` naming the key that is wrong.

    `values`, the robot's numbers under `key`, begin with the position (m) and end with the gripper's opening;
    `rotation` [4] is the orientation of our end-effector frame.
    """
    last = len(values) - 1
    return {
        IMAGE: image(observation, camera),
        STATE: state(
            position(values[:3], f"{key}[0:3]"),
            rotation,
            opening(observation, f"{key}[{last}]", values[last]),
            f"{key}[3:{last}]",
        ),
        PROMPT: prompt(observation, instruction),
    }


def targets(start: Array, actions: Array) -> tuple[Array, Array]:
    """Where a chunk leads: positions [H, 3] (m), orientations [H, 4] after each action, base frame, float64.

    start [8] is the state that the chunk [H, 8] starts from.
    """
    position, rotation = (
        torch.from_numpy(np.float64(start[:3])),
        torch.from_numpy(np.float64(start[3:7])),
    )
    where, turned = [], []
    for move in torch.from_numpy(np.float64(actions)):
        position, rotation = apply_action(position, rotation, move[:3], move[3:7])
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
    return f"the text {value[:40]!r}" if isinstance(value, str) else f"a {type(value).__name__}"
