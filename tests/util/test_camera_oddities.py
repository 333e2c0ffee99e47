"""Images as cameras and simulators write them: with lost data, alpha channels and unused bits.

`decode_image` reads images of robots, and `load_image` photos.
"""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from data_tiny import assemble_png
from refusals import refuses
from spear.util.images import check_jpeg_is_complete, decode_image, load_image

JPEG_END_MARKER = b"\xff\xd9"


def make_photo() -> Image.Image:
    """Make a smooth random image of 160 × 120 pixels."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.Resampling.BICUBIC)


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    """Encode an image with Pillow; options: those of the format."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def cut_but_close(jpeg: bytes, fraction: float) -> bytes:
    """Cut off a JPEG and append the end marker, as a camera that loses packets does."""
    num_kept_bytes = int(fraction * len(jpeg))
    return jpeg[:num_kept_bytes] + JPEG_END_MARKER


@pytest.mark.parametrize("fraction", [0.4, 0.7, 0.95])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_that_lacks_data_is_refused(fraction: float, options: dict[str, object]) -> None:
    damaged = cut_but_close(encode(make_photo(), "JPEG", **options), fraction)

    refuses("not a readable image", load_image, damaged)
    refuses("not a readable image", decode_image, damaged)
    refuses("not a readable image", check_jpeg_is_complete, damaged, "frame 3")


def test_a_gray_jpeg_that_lacks_data_is_refused() -> None:
    damaged = cut_but_close(encode(make_photo().convert("L"), "JPEG"), 0.5)

    refuses("frame 3", decode_image, damaged, name="frame 3")


@pytest.mark.parametrize(
    "ending",
    [
        b"\0" * 7 + JPEG_END_MARKER,
        JPEG_END_MARKER + b"\0" * 500,
        JPEG_END_MARKER + b"garbage",
    ],
)
def test_harmless_extra_bytes_are_accepted(ending: bytes) -> None:
    jpeg = encode(make_photo(), "JPEG")

    padded = jpeg.removesuffix(JPEG_END_MARKER) + ending

    assert np.array_equal(decode_image(padded), decode_image(jpeg))
    assert np.array_equal(load_image(padded), load_image(jpeg))
    check_jpeg_is_complete(padded, "frame 3")


@pytest.mark.parametrize("alpha", [0, 100, 255])
def test_a_robots_picture_loses_its_alpha(alpha: int) -> None:
    image = make_photo()
    transparent = image.copy()
    transparent.putalpha(alpha)

    assert np.array_equal(decode_image(encode(transparent, "PNG")), np.asarray(image))


def test_a_gray_picture_of_a_robot_loses_its_alpha() -> None:
    gray = make_photo().convert("L")
    transparent = gray.copy()
    transparent.putalpha(0)

    decoded = decode_image(encode(transparent, "PNG"))

    assert np.array_equal(decoded, np.asarray(gray.convert("RGB")))


def test_a_photo_is_laid_on_white() -> None:
    image = make_photo()
    image.putalpha(0)

    assert (load_image(encode(image, "PNG")) == 255).all()


def encode_16_bit_png(values: np.ndarray) -> bytes:
    """Make a PNG of 16 bits per channel from gray values [h, w] or colors [h, w, 3]."""
    no_filter = b"\0"  # each row begins with the number of its filter
    rows = b"".join(no_filter + row.astype(">u2").tobytes() for row in values)
    height, width = values.shape[:2]
    color_type = 2 if values.ndim == 3 else 0  # RGB or gray
    return assemble_png((width, height, 16, color_type), zlib.compress(rows))


def make_ramp(num_bits: int) -> np.ndarray:
    """Return values [8, 8] from 0 to the largest one of `num_bits` bits."""
    return np.linspace(0, 2**num_bits - 1, 64).reshape(8, 8).round()


@pytest.mark.parametrize("num_bits", [10, 12])
def test_gray_values_that_use_few_of_16_bits_are_refused(num_bits: int) -> None:
    refuses(f"use {num_bits} of 16 bits", load_image, encode_16_bit_png(make_ramp(num_bits)))


def test_colors_that_use_few_of_16_bits_are_refused() -> None:
    colors = np.repeat(make_ramp(12)[..., None], 3, axis=-1)

    refuses("use 12 of 16 bits", load_image, encode_16_bit_png(colors))


def test_a_tiff_that_uses_10_of_16_bits_is_refused() -> None:
    tiff = encode(Image.fromarray(make_ramp(10).astype(np.uint16)), "TIFF")

    refuses("use 10 of 16 bits", load_image, tiff)


def test_gray_values_that_use_all_16_bits_are_scaled() -> None:
    image = load_image(encode_16_bit_png(make_ramp(16)))

    assert image.max() == 255
    assert image.min() == 0


def test_integers_of_32_bits_with_values_of_8_bits_are_read() -> None:
    values = make_ramp(8).astype(np.int32)

    image = load_image(encode(Image.fromarray(values), "TIFF"))

    assert np.array_equal(image[..., 0], values)


def test_a_black_picture_of_16_bits_is_black() -> None:
    image = load_image(encode_16_bit_png(np.zeros((8, 8))))

    assert (image == 0).all()
