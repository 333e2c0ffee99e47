"""Images: exact, three channels, broken ones are named."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from spear.errors import SpearError
from spear.util.images import decode_image, encode_jpeg, encode_picture


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


def test_a_jpeg_keeps_small_colours() -> None:
    image = np.full((16, 16, 3), 90, np.uint8)
    image[6:9, 6:9] = (200, 30, 30)
    again = decode_image(encode_jpeg(image))
    assert np.abs(again.astype(int) - image).mean() < 3
    assert abs(int(again[7, 7, 0]) - 200) < 25


def test_a_picture_is_written_as_its_name_says() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(encode_picture(pixels, "box.PNG")), pixels)
    assert encode_picture(pixels, "box.jpg")[:3] == b"\xff\xd8\xff"
    for name in ("box.txt", "box.psd", "box"):  # Pillow reads .psd and does not write it
        with pytest.raises(SpearError, match=r"end it in \.png or \.jpg"):
            encode_picture(pixels, name)
    with pytest.raises(SpearError, match=r"box\.xbm: cannot be drawn"):
        encode_picture(pixels, "box.xbm")
