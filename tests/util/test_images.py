"""Images: every format is read exactly, broken ones are named, pictures are written as their names say."""

import io
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, features

from data_tiny import assemble_png
from refusals import refuses
from spear.errors import SpearError
from spear.types import Array
from spear.util.images import decode_image, encode_image_file, load_image

# Four flat quarters, so that lossy formats keep their colours and every turn of the image shows.
QUARTERS = np.array([[[220, 30, 30], [30, 200, 40]], [[40, 40, 210], [240, 240, 60]]], np.uint8)
PICTURE = QUARTERS.repeat(16, axis=0).repeat(24, axis=1)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values: Array) -> bytes:
    """A PNG of 16 bits per channel, grey [h, w] or RGB [h, w, 3]: Pillow writes no RGB ones."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return assemble_png((width, height, 16, 2 if values.ndim == 3 else 0), zlib.compress(rows))


def quarters(image: Array) -> Array:
    """The colours [2, 2, 3] at the middles of the quarters."""
    height, width = image.shape[:2]
    return image[np.ix_([height // 4, 3 * height // 4], [width // 4, 3 * width // 4])].astype(int)


@pytest.mark.parametrize(
    ("make", "tolerance"),
    [
        (lambda image: encoded(image), 0),
        (lambda image: encoded(image, "BMP"), 0),
        (lambda image: encoded(image, "WEBP", lossless=True), 0),
        (lambda image: encoded(image, "JPEG", quality=95), 6),
        (lambda image: encoded(image.convert("CMYK"), "JPEG", quality=95), 6),
        (lambda image: encoded(image.convert("CMYK"), "TIFF"), 1),
        (lambda image: encoded(image.convert("YCbCr"), "JPEG", quality=95), 6),
        (lambda image: encoded(image.quantize(8)), 2),
        (lambda image: encoded(image.convert("RGBA")), 0),
        (lambda image: encoded(image.quantize(8), "GIF"), 2),
        (lambda image: png16(np.asarray(image).astype(np.uint16) * 257), 0),
    ],
    ids=[
        "png",
        "bmp",
        "webp",
        "jpeg",
        "cmyk-jpeg",
        "cmyk-tiff",
        "ycbcr",
        "palette",
        "rgba",
        "gif",
        "16-bit",
    ],
)
def test_colours_survive_every_format(make: Callable[[Image.Image], bytes], tolerance: int) -> None:
    image = load_image(make(Image.fromarray(PICTURE)))
    assert image.shape == PICTURE.shape and image.dtype == np.uint8 and image.flags.writeable
    assert np.abs(quarters(image) - QUARTERS).max() <= tolerance


def test_grey_images_get_three_equal_channels() -> None:
    grey = PICTURE[..., 1]
    wide = grey.astype(np.uint16) * 257
    for pixels, kind in (
        (grey, "PNG"),
        (wide, "PNG"),
        (wide, "TIFF"),
        (wide.astype(np.int32), "TIFF"),
    ):
        for read in (load_image, decode_image):  # a photo, and a step of a dataset
            assert (read(encoded(Image.fromarray(pixels), kind)) == grey[..., None]).all()
    assert set(np.unique(load_image(encoded(Image.fromarray(grey).convert("1"))))) <= {0, 255}


def test_what_is_transparent_lies_on_white() -> None:
    pixels = np.dstack([PICTURE, np.full(PICTURE.shape[:2], 255, np.uint8)])
    pixels[:16, :, 3] = 0
    pixels[16:, :24, 3] = 128
    seen = quarters(load_image(encoded(Image.fromarray(pixels))))
    assert (seen[0] == 255).all() and np.abs(seen[1, 0] - (QUARTERS[1, 0] / 2 + 127.5)).max() <= 1
    assert (seen[1, 1] == QUARTERS[1, 1]).all()
    grey = Image.fromarray(np.dstack([PICTURE[..., 0], pixels[..., 3]]))
    assert grey.mode == "LA" and (quarters(load_image(encoded(grey)))[0] == 255).all()


# What must be done to the stored pixels so that the picture stands upright, by EXIF orientation.
UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])  # Pillow turns TIFF files by itself
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied_to_photos_only(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PICTURE), kind, exif=exif)
    assert (load_image(data) == UPRIGHT[orientation](PICTURE)).all() and (
        decode_image(data) == PICTURE
    ).all()


def test_what_is_no_picture_is_refused() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    bad = [
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "more than 16 bits"),
        (assemble_png((60_000, 60_000, 8, 2), b""), "exceeds limit"),
    ]
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "GIF"):
        data = encoded(noise, kind)
        bad += [
            (data[: int(share * len(data))], "not a readable image") for share in (0.01, 0.5, 0.9)
        ]
    for data, words in bad:
        refuses(words, load_image, data)
    for broken in (b"no image", encoded(noise)[:40]):
        refuses("episode 3 step 4", decode_image, broken, "episode 3 step 4")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}]
)
def test_jpegs_have_the_numbers_that_pillow_reads(mode: str, options: dict[str, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    picture = Image.fromarray(noise).resize((67, 45), Image.Resampling.BICUBIC).convert(mode)
    data = encoded(picture, "JPEG", quality=90, **options)
    truth = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(decode_image(data) - truth).max() <= (
        0 if features.check_feature("libjpeg_turbo") else 3
    )
    refuses("cut", decode_image, data[:-200], "cut")
    size = data.index(b"\xff\xc2" if "progressive" in options else b"\xff\xc0") + 5
    refuses("huge", decode_image, data[:size] + b"\xff\xdc\xff\xdc" + data[size + 4 :], "huge")


@settings(max_examples=150)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.data())
def test_flipped_bytes_end_in_an_image_or_one_clear_error(kind: str, draw: st.DataObject) -> None:
    data = bytearray(encoded(Image.fromarray(PICTURE), kind))
    for _ in range(draw.draw(st.integers(1, 6))):
        data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    try:
        image = load_image(bytes(data))
    except SpearError as error:
        assert "\n" not in str(error)
    else:
        assert image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8


def test_a_picture_is_written_as_its_name_says() -> None:
    np.testing.assert_array_equal(decode_image(encode_image_file(PICTURE, "box.PNG")), PICTURE)
    assert encode_image_file(PICTURE, "box.jpg")[:3] == b"\xff\xd8\xff"
    for name in ("box.txt", "box.psd", "box", "box.xbm"):  # Pillow reads .psd and does not write it
        refuses(name, encode_image_file, PICTURE, name)
