"""The one change of an image that keeps geometry true: another exposure."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

from spear.types import Array

FitImage = Callable[[Array, int, int], Array]
"""(image [h, w, 3] uint8, height, width) -> [height, width, 3] uint8, aspect kept by cropping or padding."""
JITTER_DRAWS = 5
"""Random numbers that `jitter` takes."""


def jitter(image: Array, draws: Array, strength: float) -> Array:
    """Another exposure of the same scene: brightness, contrast and colour balance, by five draws in [0, 1).

    image [h, w, 3] uint8 -> the same shape. At strength 1: brightness ± 10 % of the range, contrast ± 20 %,
    each channel's gain ± 5 % (our choice). The same draws give the same change in every view.
    """
    return np.asarray(Image.fromarray(image).point(jitter_table(draws, strength)))


def jitter_table(draws: Array, strength: float) -> list[int]:
    """What `jitter` makes of each of the 256 values of red, then green, then blue."""
    offset, contrast, *gains = (2 * draws - 1) * strength
    level = np.arange(256, dtype=np.float32)[:, None]
    gain = 1 + 0.05 * np.array(gains, np.float32)
    table = ((level - 128) * (1 + 0.2 * contrast) + 128 + 25.5 * offset) * gain  # [256, 3]
    return [int(value) for value in np.clip(np.rint(table), 0, 255).T.ravel()]
