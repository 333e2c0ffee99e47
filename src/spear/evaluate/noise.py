"""Sensor noise: what a worse camera would show, for the "noise" axis of the shifts
(`spear.sim.shifts`).

Level 1, 2, 3: Gaussian noise with a standard deviation of 5, 12, 25 of 255; blur with a standard
deviation of 0.7, 1.5, 2.5 pixels; JPEG compression of quality 60, 30, 12; and answers that are 100,
200, 400 ms late (our choice).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from spear.util.images import decode_image, encode_jpeg

_STREAM = 104
"""First number of the seeds of the random streams here, so that they differ from those of
scenes."""


@dataclass(frozen=True)
class NoiseLevel:
    """How bad the camera is, and how late the answers."""

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
    """What a worse camera makes of a picture: blurred by the lens, noisy from the sensor,
    compressed.

    Args:
        image: [h, w, 3] uint8 RGB.
        level: how bad the camera is.
        rng: draws the sensor's noise.

    Returns:
        [h, w, 3] uint8 RGB.
    """
    blurred = gaussian_filter(image.astype(np.float32), sigma=(level.blur_px, level.blur_px, 0))
    noisy = blurred + rng.normal(0, level.sensor_std, image.shape).astype(np.float32)
    pixels = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    return decode_image(encode_jpeg(pixels, quality=level.jpeg_quality))


def degrade_observation(
    observation: Mapping[str, Any], level: NoiseLevel, seed: int, step: int
) -> dict[str, Any]:
    """An observation with degraded pictures. The same seed and step always give the same noise."""
    result = dict(observation)
    for index, key in enumerate(sorted(observation)):
        value = observation[key]
        if isinstance(value, np.ndarray) and value.ndim == 3:
            rng = np.random.default_rng([_STREAM, seed, step, index])
            result[key] = degrade_image(value, level, rng)
    return result
