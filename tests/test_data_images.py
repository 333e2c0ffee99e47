"""Images: broken ones are named, jitter changes light only."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from spear.data.images import decode_image, jitter
from spear.errors import SpearError


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_decoding_is_exact_and_gives_three_channels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(png(pixels)), pixels)
    np.testing.assert_array_equal(decode_image(png(pixels[..., 0])), np.repeat(pixels[..., :1], 3, axis=2))


def test_a_broken_image_is_named() -> None:
    for broken in (b"no image", png(np.zeros((9, 9, 3), np.uint8))[:40]):
        with pytest.raises(SpearError, match="broken image: episode 3 step 4"):
            decode_image(broken, "episode 3 step 4")


def test_jitter_is_photometric_and_bounded() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 11, 3)).astype(np.uint8)
    np.testing.assert_array_equal(jitter(image, np.full(5, 0.5), 1.0), image)
    brighter = jitter(image, np.array([1, 0.5, 0.5, 0.5, 0.5]), 1.0)
    np.testing.assert_array_equal(brighter, np.clip(np.rint(image + 25.5), 0, 255))
    flat = jitter(np.full((4, 4, 3), 100, np.uint8), np.random.default_rng(1).random(5), 1.0)
    assert (flat == flat[0, 0]).all() and np.abs(flat.astype(int) - 100).max() < 45
