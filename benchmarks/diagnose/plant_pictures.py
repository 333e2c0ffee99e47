"""Faults of what the cameras show. Images are [h, w, 3] uint8 RGB."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from PIL import Image

from planted import ImageSizes, Observation, PlantedFault
from spear.embodiments.observations import IMAGE_KEY, WRIST_IMAGE_KEY, get_camera_key
from spear.types import Array

ImageChange = Callable[[Array], Array]
VIEWS = {"external": ("external",), "wrist": ("wrist",), "both": ("external", "wrist")}
"""The setting `camera` of a fault → the views that it changes."""


def _change_images(camera: str, change: ImageChange) -> PlantedFault:
    """Make a fault that changes each image on its own."""

    def change_observation(observation: Observation) -> Observation:
        changed = dict(observation)
        for key in _find_keys(camera, observation):
            changed[key] = np.ascontiguousarray(change(observation[key]))
        return changed

    return PlantedFault(change_observation=change_observation)


def _find_keys(camera: str, observation: Observation) -> list[str]:
    """Return the keys of a camera's images, without the views that the robot lacks."""
    keys = [get_camera_key(view) for view in VIEWS[camera]]
    return [key for key in keys if key in observation]


def _select_images(camera: str, observation: Observation) -> Observation:
    """Return the entries of a camera's images."""
    return {key: observation[key] for key in _find_keys(camera, observation)}


def _resize(image: Array, width: int, height: int) -> Array:
    """Resize an image without keeping its aspect ratio."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def exchange_cameras() -> PlantedFault:
    """Send each camera's image as the other's."""

    def exchange(observation: Observation) -> Observation:
        images = {
            IMAGE_KEY: observation[WRIST_IMAGE_KEY],
            WRIST_IMAGE_KEY: observation[IMAGE_KEY],
        }
        return {**observation, **images}

    return PlantedFault(change_observation=exchange)


def mirror_camera(camera: str, direction: str) -> PlantedFault:
    """Mirror images left to right ("horizontal") or upside down ("vertical")."""
    axis = {"horizontal": 1, "vertical": 0}[direction]
    return _change_images(camera, lambda image: np.flip(image, axis))


def turn_camera(camera: str, angle_deg: int) -> PlantedFault:
    """Turn images counterclockwise; by quarter turns, or by a smaller angle with black corners."""
    if angle_deg % 90 == 0:
        return _change_images(camera, lambda image: np.rot90(image, angle_deg // 90))

    def turn(image: Array) -> Array:
        turned = Image.fromarray(image).rotate(angle_deg, Image.Resampling.BILINEAR)
        return np.asarray(turned)

    return _change_images(camera, turn)


def crop_camera(camera: str, fraction: float) -> PlantedFault:
    """Keep only the middle of images, and enlarge it to the image's size."""

    def crop(image: Array) -> Array:
        height, width = image.shape[:2]
        top = round((1 - fraction) / 2 * height)
        first_column = round((1 - fraction) / 2 * width)
        return _resize(
            image[top : height - top, first_column : width - first_column], width, height
        )

    return _change_images(camera, crop)


def stretch_camera(camera: str, recorded_width: float) -> PlantedFault:
    """Squeeze or stretch a picture of another aspect ratio into the usual size.

    The camera records `recorded_width` times the usual width, at the usual height.
    """

    def squeeze(image: Array) -> Array:
        height, width = image.shape[:2]
        return _resize(image, round(width / recorded_width), height)

    return _widen_then(camera, recorded_width, squeeze)


def add_bars(camera: str, recorded_width: float) -> PlantedFault:
    """Fit a picture of another aspect ratio into the usual size with black bars.

    As in `stretch_camera`, but the robot's program keeps the aspect ratio, and fills with black.
    """

    def fit(image: Array) -> Array:
        height, width = image.shape[:2]
        usual_width = round(width / recorded_width)
        scale = min(1.0, usual_width / width)
        scaled = _resize(image, round(scale * width), round(scale * height))
        top = (height - scaled.shape[0]) // 2
        first_column = (usual_width - scaled.shape[1]) // 2
        fitted = np.zeros((height, usual_width, 3), np.uint8)
        fitted[top : top + scaled.shape[0], first_column : first_column + scaled.shape[1]] = scaled
        return fitted

    return _widen_then(camera, recorded_width, fit)


def _widen_then(camera: str, recorded_width: float, change: ImageChange) -> PlantedFault:
    """Let a camera record another width, and change its images afterwards."""

    def widen(sizes: ImageSizes) -> ImageSizes:
        widened = dict(sizes)
        for view in VIEWS[camera]:
            width, height = sizes[view]
            widened[view] = (round(recorded_width * width), height)
        return widened

    fault = _change_images(camera, change)
    return PlantedFault(change_image_sizes=widen, change_observation=fault.change_observation)


def exchange_colors(camera: str) -> PlantedFault:
    """Send BGR instead of RGB."""
    return _change_images(camera, lambda image: image[..., ::-1])


def expose_camera(camera: str, factor: float) -> PlantedFault:
    """Multiply the brightness, and clip it at white."""

    def expose(image: Array) -> Array:
        return np.clip(np.rint(factor * image.astype(np.float32)), 0, 255).astype(np.uint8)

    return _change_images(camera, expose)


def freeze_camera(camera: str, first: int, count: int) -> PlantedFault:
    """Repeat the image of observation `first` for `count` observations, again and again.

    After `count` repetitions the camera shows one new image, which is repeated in turn.
    """
    last_images: Observation = {}
    num_observations = 0

    def freeze(observation: Observation) -> Observation:
        nonlocal num_observations
        num_frozen = num_observations - first
        if num_frozen <= 0 or num_frozen % (count + 1) == 0:
            last_images.update(_select_images(camera, observation))
        num_observations += 1
        return {**observation, **last_images}

    return PlantedFault(change_observation=freeze)


def delay_camera(camera: str, num_observations: int) -> PlantedFault:
    """Send the images of `num_observations` observations ago, the first one at the beginning."""
    recent: deque[Observation] = deque(maxlen=num_observations + 1)

    def delay(observation: Observation) -> Observation:
        recent.append(_select_images(camera, observation))
        return {**observation, **recent[0]}

    return PlantedFault(change_observation=delay)


def lose_camera(camera: str, appearance: str) -> PlantedFault:
    """Send no image of a camera ("absent"), or a black one ("black")."""
    if appearance == "black":
        return _change_images(camera, np.zeros_like)
    absent_keys = {get_camera_key(view) for view in VIEWS[camera]}

    def remove(observation: Observation) -> Observation:
        return {key: value for key, value in observation.items() if key not in absent_keys}

    return PlantedFault(change_observation=remove)
