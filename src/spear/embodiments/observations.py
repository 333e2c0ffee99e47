"""Reads and checks the observations of robots.

An observation is a map of keys to values. An embodiment reads the robot's own keys with the
functions below, and converts them to the keys of `spear.types.Policy`, which are defined here.
`validate_observation` then checks the converted observation. Its result is a `CheckedObservation`,
whose values are not checked again on their way to the network.

A policy calls the images of one camera a view: "external", "wrist" or another name.
"""

import itertools
import re
from collections.abc import Collection, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch

from spear.errors import SpearError, format_count, make_unknown_name_error
from spear.geometry import validate_unit_quat
from spear.types import ACTION_DIM, CONTROL_CHARACTERS, STATE_DIM, Array, Policy, WidthAndHeight

Observation = Mapping[str, Any]
ObservationT = TypeVar("ObservationT", bound=dict[str, Any])

IMAGE_KEY = "observation/image"
WRIST_IMAGE_KEY = "observation/wrist_image"
STATE_KEY = "observation/state"
PROMPT_KEY = "prompt"
SEED_KEY = "seed"
COMMITTED_KEY = "committed"

REQUIRED_KEYS = {
    IMAGE_KEY: "the external camera's image, uint8 [height, width, 3]",
    STATE_KEY: "8 numbers, which are end-effector position (m, base frame), quaternion (w x y z) "
    "and gripper opening (0 … 1)",
    PROMPT_KEY: "the instruction in words",
}
"""Key → description of its value, for the keys that every observation of `spear.types.Policy` has.
"""

DEFAULT_IMAGE_SIZES: Mapping[str, WidthAndHeight] = {"external": (280, 210), "wrist": (112, 112)}
"""View → (width, height) in pixels, for a policy that does not say which views it takes."""

MIN_IMAGE_SIDE_PX = 16
MAX_IMAGE_SIDE_PX = 4096
MAX_ASPECT_RATIO = 8  # the longer side of an image divided by the shorter side
OPENPI_SIDE_PX = 224  # width and height of the images that openpi's clients send
OPENPI_CONTENT_SIDES_PX = (125, 126, 168)
"""Heights of the camera's image within openpi's padded square: 126 for 16:9 (125 for 672 x 376
pixels, as of a ZED camera), and 168 for 4:3. For an upright image, these are its widths."""
MAX_REACH_M = 10.0  # no arm reaches further from its base
MAX_PROMPT_CHARS = 1000  # more than the model reads: its own limit, in tokens, is lower
MAX_GRIPPER_OVERSHOOT = 0.1  # a reading at most this far beyond 0 … 1 is noise and gets clipped
_MAX_QUOTED_CHARS = 40  # of a wrong text in a message
_MAX_KEY_CHARS = 80  # of an unknown key in a message


class CheckedObservation(dict[str, Any]):
    """An observation of `spear.types.Policy` whose values have all been checked.

    Attributes:
        robot: which robot sent the observation, if a policy answers several robots. The drift
            monitor compares each robot separately.
    """

    robot: Hashable = None


def validate_observation(observation: Observation) -> CheckedObservation:
    """Check an observation that has the keys of `spear.types.Policy`.

    Any camera is accepted here, because only the policy knows which views it takes.

    Args:
        observation: key → value.

    Returns:
        The observation, with normalized quaternions. Gripper openings that are at most 0.1 beyond
        0 … 1 are clipped.

    Raises:
        SpearError: a key is missing or unknown, or a value is wrong. The message names the key.

    Example:
        >>> from spear.embodiments import load
        >>> sorted(validate_observation(load("generic").example()))
        ['observation/image', 'observation/state', 'observation/wrist_image', 'prompt']
    """
    camera_keys = [key for key in observation if is_camera_key(key)]
    optional_keys = [WRIST_IMAGE_KEY, SEED_KEY, COMMITTED_KEY, *camera_keys]
    check_keys(observation, REQUIRED_KEYS, optional_keys)
    state_numbers = read_numbers(observation, STATE_KEY, STATE_DIM)
    for key in camera_keys:
        read_image(observation, key)
    checked_values = {
        **make_policy_observation(
            observation, STATE_KEY, state_numbers, rotation=state_numbers[3:7]
        ),
        **read_optional_seed(observation),
        **read_optional_committed(observation),
    }
    return CheckedObservation({**observation, **checked_values})


def check_keys(
    observation: Observation, required: Mapping[str, str], optional: Collection[str]
) -> None:
    """Raise `SpearError` if an observation has an unknown key, or lacks a required one.

    Args:
        observation: key → value.
        required: required key → description of its value, for the message.
        optional: the keys that an observation may have.
    """
    known_keys = {*required, *optional}
    for key in observation:
        if key not in known_keys:
            raise make_unknown_name_error("observation key", str(key)[:_MAX_KEY_CHARS], known_keys)
    for key, description in required.items():
        if key not in observation:
            raise SpearError(f"the observation has no {key!r}. Send {description}.")


def is_camera_key(key: Any) -> bool:
    """Return whether a key is that of a camera: "observation/image" or "observation/…_image"."""
    return isinstance(key, str) and re.fullmatch(r"observation/(.+_)?image", key) is not None


def get_camera_key(view: str) -> str:
    """Return the key of a view's images.

    >>> get_camera_key("external"), get_camera_key("wrist")
    ('observation/image', 'observation/wrist_image')
    """
    return IMAGE_KEY if view == "external" else f"observation/{view}_image"


def get_view_of_key(key: str) -> str:
    """Return the view of a camera's key, the inverse of `get_camera_key`.

    >>> get_view_of_key("observation/image"), get_view_of_key("observation/wrist_image")
    ('external', 'wrist')
    """
    if key == IMAGE_KEY:
        return "external"
    return key.removeprefix("observation/").removesuffix("_image")


def get_image_sizes(policy: Policy) -> Mapping[str, WidthAndHeight]:
    """Return the sizes of the images that a policy takes: view → (width, height) in pixels.

    They are `DEFAULT_IMAGE_SIZES` if the policy's `image_sizes` is missing or empty.
    """
    return getattr(policy, "image_sizes", None) or DEFAULT_IMAGE_SIZES


def get_rendered_sizes(policy: Policy) -> dict[str, WidthAndHeight]:
    """Return the sizes at which the simulator renders its cameras: view → (width, height).

    These include views that the policy does not take.
    """
    return {**DEFAULT_IMAGE_SIZES, **get_image_sizes(policy)}


def select_cameras(policy: Policy, observation: ObservationT) -> ObservationT:
    """Return a copy of an observation without the views that the policy does not take.

    A policy without an attribute `image_sizes` takes all views.
    """
    image_sizes = getattr(policy, "image_sizes", None)
    observation_type = type(observation)  # dict or `CheckedObservation`
    if not image_sizes:
        return observation_type(observation)
    policy_camera_keys = {get_camera_key(view) for view in image_sizes}
    selected = observation_type()
    for key, value in observation.items():
        if not is_camera_key(key) or key in policy_camera_keys:
            selected[key] = value
    return selected


def read_image(observation: Observation, key: str) -> Array:
    """Read an RGB image, [h, w, 3] uint8. Raises `SpearError` naming the key for anything else."""
    image = observation[key]
    is_rgb = (
        isinstance(image, np.ndarray)
        and image.dtype == np.uint8
        and image.ndim == 3
        and image.shape[2] == 3
    )
    if not is_rgb:
        raise SpearError(
            f"{key} is {_describe(image)}. Send an RGB image, uint8 [height, width, 3]."
        )

    height, width = image.shape[:2]
    short_side, long_side = sorted((height, width))
    is_size_allowed = (
        short_side >= MIN_IMAGE_SIDE_PX
        and long_side <= MAX_IMAGE_SIDE_PX
        and long_side <= MAX_ASPECT_RATIO * short_side
    )
    if not is_size_allowed:
        raise SpearError(
            f"{key} has {width} x {height} pixels. Send sides of {MIN_IMAGE_SIDE_PX} … "
            f"{MAX_IMAGE_SIDE_PX} pixels, none more than {MAX_ASPECT_RATIO} times the other."
        )
    return image


def extract_images_from_map(
    observation: Observation, map_key: str, cameras: Iterable[str], advice: str
) -> dict[str, Any]:
    """Give the images that a client sends in one map keys of their own: "images/primary".

    Args:
        observation: the robot's observation.
        map_key: the key of the map, which must be there.
        cameras: the names that the map must have.
        advice: a sentence that says what to do if it does not have one of them.

    Returns:
        The observation with a key "MAP_KEY/CAMERA" for each camera, which messages then name.
    """
    images = observation[map_key]
    with_images = dict(observation)
    for camera in cameras:
        if not isinstance(images, Mapping) or camera not in images:
            raise SpearError(f"{map_key} has no '{camera}'. {advice}")
        with_images[f"{map_key}/{camera}"] = images[camera]
    return with_images


def crop_openpi_padding(image: Array) -> Array:
    """Cut off the black bands with which a client of openpi padded an image to a square.

    The model's input gets its own black bars. With both, the scene would be smaller than in
    training.

    Bands are cut off only if all their pixels are black (0), and if they are exactly as high or
    wide as padding makes them. Any other image is returned unchanged.

    Args:
        image: [h, w, 3] uint8.
    """
    is_padded_size = image.shape[:2] == (OPENPI_SIDE_PX, OPENPI_SIDE_PX)
    is_corner_black = not image[0, 0].any()
    if not is_padded_size or not is_corner_black:
        return image

    # Bands may be above and below the content (axis 0), or to its left and right (axis 1).
    for axis, content_side_px in itertools.product((0, 1), OPENPI_CONTENT_SIDES_PX):
        start = (OPENPI_SIDE_PX - content_side_px) // 2
        end = start + content_side_px
        band_before, content, band_after = np.split(image, (start, end), axis)
        are_bands_black = band_before.max() == 0 and band_after.max() == 0
        # If the content's first or last line were black, too, the bands would be wider than this.
        first_line = content.take(0, axis)
        last_line = content.take(-1, axis)
        has_content_at_bands = first_line.max() > 0 and last_line.max() > 0
        if are_bands_black and has_content_at_bands:
            return content
    return image


def read_numbers(observation: Observation, key: str, count: int) -> Array:
    """Read `count` finite numbers as [count] float64. A single number may be a scalar.

    Raises `SpearError` naming the key for anything else.
    """
    value = observation[key]
    advice = f"Send {format_count(count, 'numbers')}."
    # NumPy would pad every text of a list to the longest one, which could take gigabytes. So lists
    # are checked before NumPy converts them.
    if isinstance(value, list) and not _has_only_numbers(value):
        raise SpearError(f"{key} is a list of other things than numbers. {advice}")
    numbers = np.asarray(value)
    is_numeric = numbers.dtype.kind in "fiu"
    if not is_numeric or numbers.size != count or numbers.ndim > 1:
        raise SpearError(f"{key} is {_describe(numbers)}. {advice}")
    if not np.isfinite(numbers).all():
        raise SpearError(f"{key} contains nan or infinity. Check the robot's state.")
    return numbers.astype(np.float64).reshape(count)


def _has_only_numbers(values: list[Any]) -> bool:
    """Return whether all entries of a list are Python's or NumPy's numbers."""
    return all(isinstance(value, int | float | np.generic) for value in values)


def validate_meters(position: Array, name: str) -> Array:
    """Return positions [..., 3] in meters unchanged, after a check of their coordinates.

    Raises `SpearError`, which contains `name`, if no arm can reach a position.
    """
    largest_coordinate_m = np.abs(position).max(initial=0)
    if largest_coordinate_m > MAX_REACH_M:
        raise SpearError(
            f"{name} has a coordinate of {largest_coordinate_m:g} m, which no arm reaches. "
            "Send meters."
        )
    return position


def validate_radians(angles: Array, name: str) -> Array:
    """Return angles, or a rotation vector, unchanged, after a check that they can be radians.

    Raises `SpearError`, which contains `name`, if one is larger than a whole turn.
    """
    largest_angle = np.abs(angles).max()
    if largest_angle > 2 * np.pi:
        raise SpearError(
            f"{name} has an angle of {largest_angle:g}, more than a turn. Send radians."
        )
    return angles


def validate_and_clip_opening(opening: float, name: str) -> float:
    """Return a gripper opening clipped to 0 … 1.

    Raises `SpearError`, which contains `name`, if the opening is further than 0.1 outside.
    """
    if not -MAX_GRIPPER_OVERSHOOT <= opening <= 1 + MAX_GRIPPER_OVERSHOOT:
        raise SpearError(f"{name} is a gripper opening of {opening:g}. Send a number from 0 to 1.")
    return min(max(opening, 0.0), 1.0)


def read_prompt(observation: Observation, key: str = PROMPT_KEY) -> str:
    """Read the instruction.

    Raises `SpearError` naming the key if the value is no text, or has no words, is too long, or has
    control characters.
    """
    prompt = observation[key]
    if isinstance(prompt, str) and len(prompt) > MAX_PROMPT_CHARS:
        raise SpearError(
            f"{key} has {len(prompt)} characters. Send at most {MAX_PROMPT_CHARS} characters."
        )
    has_words = (
        isinstance(prompt, str)
        and any(character.isalnum() for character in prompt)
        and not CONTROL_CHARACTERS.search(prompt)
    )
    if not has_words:
        raise SpearError(f"{key} is {_describe(prompt)}. Send an instruction in words.")
    return prompt


def read_optional_seed(observation: Observation) -> dict[str, int]:
    """Read the seed, which fixes what is random in the answer to an observation.

    Returns a dict with the seed under its key, which is empty if the observation has no seed.
    Raises `SpearError` if the seed is no whole number.
    """
    if SEED_KEY not in observation:
        return {}
    seed = observation[SEED_KEY]
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise SpearError(f"{SEED_KEY} is {_describe(seed)}. Send a whole number.")
    return {SEED_KEY: int(seed)}


def read_optional_committed(observation: Observation) -> dict[str, Array]:
    """Read the committed prefix: actions [d, 8] with which the next chunk must begin.

    Returns a dict with the actions under their key, which is empty if the observation has none.
    Quaternions are normalized, and openings clipped to 0 … 1. Raises `SpearError` if the value is
    anything but actions.
    """
    if COMMITTED_KEY not in observation:
        return {}
    actions = observation[COMMITTED_KEY]
    if not isinstance(actions, np.ndarray) or actions.shape[1:] != (ACTION_DIM,):
        raise SpearError(
            f"{COMMITTED_KEY} is {_describe(actions)}. "
            f"Send actions as predicted, [d, {ACTION_DIM}]."
        )
    flat_numbers = read_numbers({COMMITTED_KEY: actions.ravel()}, COMMITTED_KEY, actions.size)
    checked = flat_numbers.reshape(actions.shape).astype(np.float32)  # [d, 8]
    validate_meters(checked[:, :3], f"{COMMITTED_KEY}[0:3]")
    quaternions = torch.from_numpy(checked[:, 3:7])
    checked[:, 3:7] = validate_unit_quat(quaternions, f"{COMMITTED_KEY}[3:7]").numpy()
    checked[:, 7] = [
        validate_and_clip_opening(opening, f"{COMMITTED_KEY}[7]") for opening in checked[:, 7]
    ]
    return {COMMITTED_KEY: checked}


def make_state(
    position: Array, rotation: Array, opening: float, rotation_name: str = "the orientation"
) -> Array:
    """Make the state [8] float32 of `spear.types.Policy`.

    Args:
        position: [3] m, base frame.
        rotation: [4] quaternion (w, x, y, z), base frame, whose norm is nearly 1.
        opening: gripper opening, 0 closed to 1 open.
        rotation_name: what an error message calls the rotation.

    Returns:
        [8] position, canonical unit quaternion, opening.

    Raises:
        SpearError: the norm of the quaternion is not nearly 1.
    """
    state = np.concatenate([position, rotation, [opening]]).astype(np.float32)
    state[3:7] = validate_unit_quat(torch.from_numpy(state[3:7]), rotation_name).numpy()
    return state


def make_policy_observation(
    observation: Observation,
    state_key: str,
    values: Array,
    rotation: Array,
    image_key: str = IMAGE_KEY,
    prompt_key: str = PROMPT_KEY,
) -> dict[str, Any]:
    """Convert the observation of a robot with one camera to one of `spear.types.Policy`.

    Args:
        observation: the robot's observation.
        state_key: the key of the robot's state.
        values: the numbers of this state. The first three are the position (m), and the last one is
            the gripper opening. The numbers between them are the orientation in any form.
        rotation: [4] the orientation of our end-effector frame in the base frame, as a quaternion.
        image_key: the key of the robot's image.
        prompt_key: the key of the robot's instruction.

    Returns:
        Image, state [8] and instruction under the keys of `spear.types.Policy`.

    Raises:
        SpearError: a value is wrong. The message names its key.
    """
    last_index = len(values) - 1
    image = crop_openpi_padding(read_image(observation, image_key))
    position = validate_meters(values[:3], f"{state_key}[0:3]")
    opening = validate_and_clip_opening(values[last_index], f"{state_key}[{last_index}]")
    rotation_name = f"{state_key}[3:{last_index}]"
    state = make_state(position, rotation, opening, rotation_name)
    prompt = read_prompt(observation, prompt_key)
    return {IMAGE_KEY: image, STATE_KEY: state, PROMPT_KEY: prompt}


def make_example_image(width: int, height: int) -> Array:
    """Make an image [height, width, 3] uint8 whose colors change from corner to corner."""
    y, x = np.mgrid[0:height, 0:width]
    red = 255 * x // width
    green = 255 * y // height
    blue = np.full_like(x, 128)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def _describe(value: Any) -> str:
    """Describe a value for an error message, in a few words."""
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    if isinstance(value, str):
        return f"the text {value[:_MAX_QUOTED_CHARS]!r}"
    return f"a {type(value).__name__}"
