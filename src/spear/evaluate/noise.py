"""Degraded images, as a worse camera would take them, for the "noise" axis of the shifts.

Shifts (`spear.sim.shifts`) have three levels. On this axis, each level has stronger blur, more
sensor noise, stronger JPEG compression and a longer inference latency than the level before
(`NOISE_LEVELS`, our choice).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from spear.util.images import decode_image, encode_jpeg

_STREAM = 104
"""First number of this module's random seeds, so that they differ from the seeds of scenes."""


@dataclass(frozen=True)
class NoiseLevel:
    """How bad the camera is, and how late action chunks arrive.

    sensor_std    standard deviation of the Gaussian noise of each pixel and color, of 255.
    blur_px       standard deviation of the Gaussian blur.
    jpeg_quality  quality of the JPEG compression, 1 … 100.
    latency_ms    time from an observation until its action chunk arrives.
    """

    sensor_std: float
    blur_px: float
    jpeg_quality: int
    latency_ms: float


NOISE_LEVELS = {
    1: NoiseLevel(sensor_std=5, blur_px=0.7, jpeg_quality=60, latency_ms=100),
    2: NoiseLevel(sensor_std=12, blur_px=1.5, jpeg_quality=30, latency_ms=200),
    3: NoiseLevel(sensor_std=25, blur_px=2.5, jpeg_quality=12, latency_ms=400),
}


def degrade_image(
    image: NDArray[np.uint8], level: NoiseLevel, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Degrade an image like a worse camera: blur of the lens, noise of the sensor, compression.

    Args:
        image: [h, w, 3] uint8 RGB.
        level: how bad the camera is.
        rng: generator of the sensor's noise.

    Returns:
        [h, w, 3] uint8 RGB.
    """
    blur_per_axis = (level.blur_px, level.blur_px, 0)  # rows and columns, but not across colors
    blurred = gaussian_filter(image.astype(np.float32), sigma=blur_per_axis)
    noisy = blurred + rng.normal(0, level.sensor_std, image.shape).astype(np.float32)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return decode_image(encode_jpeg(pixels, quality=level.jpeg_quality))


def degrade_scene_image(
    image: NDArray[np.uint8], level: NoiseLevel, scene_seed: int
) -> NDArray[np.uint8]:
    """Degrade the only image of a scene, [h, w, 3] uint8 RGB; a seed always gives the same noise.

    Args:
        image: The image.
        level: How bad the camera is.
        scene_seed: The scene's seed.
    """
    return degrade_image(image, level, np.random.default_rng([_STREAM, scene_seed]))


def degrade_images_of_observation(
    observation: Mapping[str, Any], level: NoiseLevel, seed: int, step: int
) -> dict[str, Any]:
    """Return an observation with degraded images.

    Args:
        observation: The observation (`spear.types.Policy`).
        level: How bad the camera is.
        seed: The scene's seed.
        step: The step in the episode. The same seed and step always give the same noise.
    """
    degraded = dict(observation)
    for index, key in enumerate(sorted(observation)):
        value = observation[key]
        if isinstance(value, np.ndarray) and value.ndim == 3:
            rng = np.random.default_rng([_STREAM, seed, step, index])
            degraded[key] = degrade_image(value, level, rng)
    return degraded
