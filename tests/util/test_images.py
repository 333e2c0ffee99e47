"""Every image format is read exactly, broken images are refused, and files have the format of their
names.

`decode_image` reads images of robots ("steps of a dataset"), and `load_image` photos.
"""

import io
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, features

from data_tiny import assemble_png
from refusals import refuses
from spear.errors import SpearError
from spear.types import Array
from spear.util.images import decode_image, encode_image_file, load_image

# A picture of four quarters, each of one color, so that lossy formats keep the colors, and every
# orientation of the picture looks different.
QUARTERS = np.array([[[220, 30, 30], [30, 200, 40]], [[40, 40, 210], [240, 240, 60]]], np.uint8)
PICTURE = QUARTERS.repeat(16, axis=0).repeat(24, axis=1)  # [32, 48, 3]
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


def encode(image: Image.Image, image_format: str = "PNG", **options: object) -> bytes:
    """Encode an image with Pillow; options: those of the format."""
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def encode_16_bit_png(values: Array) -> bytes:
    """Make a PNG of 16 bits per channel from [h, w] or [h, w, 3]. Pillow cannot write colors so."""
    height, width = values.shape[:2]
    no_filter = b"\0"  # each row begins with the number of its filter
    rows = b"".join(no_filter + row.astype(">u2").tobytes() for row in values)
    color_type = 2 if values.ndim == 3 else 0  # RGB or gray
    return assemble_png((width, height, 16, color_type), zlib.compress(rows))


def sample_quarters(image: Array) -> Array:
    """Return the colors [2, 2, 3] in the middle of the four quarters of an image."""
    height, width = image.shape[:2]
    rows = [height // 4, 3 * height // 4]
    columns = [width // 4, 3 * width // 4]
    return image[np.ix_(rows, columns)].astype(int)


# Formats and modes


@pytest.mark.parametrize(
    ("encode_picture", "tolerance"),  # how far a color from 0 to 255 may be off
    [
        (lambda image: encode(image), 0),
        (lambda image: encode(image, "BMP"), 0),
        (lambda image: encode(image, "WEBP", lossless=True), 0),
        (lambda image: encode(image, "JPEG", quality=95), 6),
        (lambda image: encode(image.convert("CMYK"), "JPEG", quality=95), 6),
        (lambda image: encode(image.convert("CMYK"), "TIFF"), 1),
        (lambda image: encode(image.convert("YCbCr"), "JPEG", quality=95), 6),
        (lambda image: encode(image.quantize(8)), 2),
        (lambda image: encode(image.convert("RGBA")), 0),
        (lambda image: encode(image.quantize(8), "GIF"), 2),
        # 257 times a value of 8 bits is the same brightness in 16 bits.
        (lambda image: encode_16_bit_png(np.asarray(image).astype(np.uint16) * 257), 0),
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
def test_colors_survive_every_format(
    encode_picture: Callable[[Image.Image], bytes], tolerance: int
) -> None:
    image = load_image(encode_picture(Image.fromarray(PICTURE)))

    assert image.shape == PICTURE.shape
    assert image.dtype == np.uint8
    assert image.flags.writeable
    assert np.abs(sample_quarters(image) - QUARTERS).max() <= tolerance


@pytest.mark.parametrize("read", [load_image, decode_image], ids=["photo", "step of a dataset"])
@pytest.mark.parametrize(
    ("dtype", "factor", "image_format"),
    [
        (np.uint8, 1, "PNG"),
        (np.uint16, 257, "PNG"),
        (np.uint16, 257, "TIFF"),
        (np.int32, 257, "TIFF"),
    ],
)
def test_gray_images_get_three_equal_channels(
    read: Callable[[bytes], Array], dtype: type, factor: int, image_format: str
) -> None:
    gray = PICTURE[..., 1]
    stored = gray.astype(dtype) * dtype(factor)

    image = read(encode(Image.fromarray(stored), image_format))

    assert (image == gray[..., None]).all()


def test_images_of_one_bit_are_black_and_white() -> None:
    one_bit = Image.fromarray(PICTURE[..., 1]).convert("1")

    assert set(np.unique(load_image(encode(one_bit)))) <= {0, 255}


@pytest.fixture
def alpha() -> Array:
    """The upper half of the picture is transparent, and the lower left quarter half transparent."""
    alpha = np.full(PICTURE.shape[:2], 255, np.uint8)
    alpha[:16] = 0
    alpha[16:, :24] = 128
    return alpha


def test_transparent_colors_are_laid_on_white(alpha: Array) -> None:
    transparent = Image.fromarray(np.dstack([PICTURE, alpha]))

    quarters = sample_quarters(load_image(encode(transparent)))

    assert (quarters[0] == 255).all()  # the upper two
    half_white = QUARTERS[1, 0] / 2 + 127.5
    assert np.abs(quarters[1, 0] - half_white).max() <= 1
    assert (quarters[1, 1] == QUARTERS[1, 1]).all()


def test_transparent_gray_is_laid_on_white(alpha: Array) -> None:
    gray = Image.fromarray(np.dstack([PICTURE[..., 0], alpha]))
    assert gray.mode == "LA"  # gray with alpha

    quarters = sample_quarters(load_image(encode(gray)))

    assert (quarters[0] == 255).all()


# EXIF orientation -> function that turns the stored pixels upright.
TO_UPRIGHT: dict[int, Callable[[Array], Array]] = {
    1: lambda picture: picture,
    2: lambda picture: picture[:, ::-1],
    3: lambda picture: picture[::-1, ::-1],
    4: lambda picture: picture[::-1],
    5: lambda picture: picture.swapaxes(0, 1),
    6: lambda picture: np.rot90(picture, -1),
    7: lambda picture: picture[::-1, ::-1].swapaxes(0, 1),
    8: lambda picture: np.rot90(picture, 1),
}


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])  # Pillow turns TIFF files by itself
@pytest.mark.parametrize("orientation", TO_UPRIGHT)
def test_exif_orientation_is_applied_to_photos_only(orientation: int, image_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation

    data = encode(Image.fromarray(PICTURE), image_format, exif=exif)

    assert (load_image(data) == TO_UPRIGHT[orientation](PICTURE)).all()
    assert (decode_image(data) == PICTURE).all()


# What is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(np.full((4, 4), 70000, np.int32)), "TIFF"), "more than 16 bits"),
        # 60,000 pixels square, 8 bits per channel, and 2 for RGB.
        (assemble_png((60_000, 60_000, 8, 2), data=b""), "exceeds limit"),
    ],
    ids=["floating point", "32 bits", "enormous"],
)
def test_pixels_without_meaning_and_enormous_images_are_refused(data: bytes, message: str) -> None:
    refuses(message, load_image, data)


@pytest.mark.filterwarnings("ignore:Image size")
def test_an_image_beyond_the_pixel_limit_is_refused_before_it_is_decoded() -> None:
    header = (13_300, 13_300, 1, 0)  # width, height, bits per channel, and 0 for gray
    bomb = assemble_png(header, data=b"")

    refuses("13300 x 13300 pixels, more than the 67,108,864", load_image, bomb)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "1", "I;16"])
def test_strips_of_rows_are_put_together(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # At least 128: the highest bit of each pixel is set, also in the 16-bit image, because darker
    # 16-bit images are refused.
    gray = Image.fromarray(NOISE[..., 0] | 128)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(gray).astype(np.uint16) * 256)
    else:
        image = gray.convert(mode)
    whole = load_image(encode(image))

    monkeypatch.setattr("spear.util.images._STRIP_PIXELS", 300)  # strips of 7 of the 40 rows

    assert (load_image(encode(image)) == whole).all()


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_truncated_images_are_refused(image_format: str, fraction: float) -> None:
    data = encode(Image.fromarray(NOISE), image_format)

    refuses("not a readable image", load_image, data[: int(fraction * len(data))])


@pytest.mark.parametrize("data", [b"no image", encode(Image.fromarray(NOISE))[:40]])
def test_a_broken_image_of_a_dataset_is_named(data: bytes) -> None:
    refuses("episode 3 step 4", decode_image, data, name="episode 3 step 4")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150)
@given(image_format=st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), draw=st.data())
def test_flipped_bytes_end_in_an_image_or_in_one_clear_error(
    image_format: str, draw: st.DataObject
) -> None:
    data = bytearray(encode(Image.fromarray(PICTURE), image_format))
    num_changed = draw.draw(st.integers(1, 6))
    for _ in range(num_changed):
        value = draw.draw(st.integers(0, 255))
        index = draw.draw(st.integers(0, len(data) - 1))
        data[index] = value

    try:
        image = load_image(bytes(data))
    except SpearError as error:
        assert "\n" not in str(error)
    else:
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert image.dtype == np.uint8


# JPEGs, which `decode_image` decodes by libjpeg-turbo

JPEG_OPTIONS = [{}, {"subsampling": 0}, {"subsampling": 2}, {"progressive": True}]


def encode_smooth_jpeg(mode: str, options: dict[str, int]) -> bytes:
    """Make a JPEG of smooth random colors in one of Pillow's modes."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    image = Image.fromarray(noise).resize((67, 45), Image.Resampling.BICUBIC).convert(mode)
    return encode(image, "JPEG", quality=90, **options)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEG_OPTIONS)
def test_jpegs_have_the_numbers_that_pillow_reads(mode: str, options: dict[str, int]) -> None:
    data = encode_smooth_jpeg(mode, options)

    decoded = decode_image(data)

    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    # Pillow gives the same numbers if it uses libjpeg-turbo, too.
    tolerance = 0 if features.check_feature("libjpeg_turbo") else 3
    assert np.abs(decoded - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEG_OPTIONS)
def test_truncated_jpegs_are_refused(mode: str, options: dict[str, int]) -> None:
    data = encode_smooth_jpeg(mode, options)

    refuses("cut", decode_image, data[:-200], name="cut")


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEG_OPTIONS)
def test_jpegs_that_claim_to_be_enormous_are_refused(mode: str, options: dict[str, int]) -> None:
    data = encode_smooth_jpeg(mode, options)
    # The header of the frame is a marker of 2 bytes, 2 bytes of length, 1 of precision, and 2 bytes
    # each of height and width.
    frame_marker = b"\xff\xc2" if "progressive" in options else b"\xff\xc0"
    size_offset = data.index(frame_marker) + 5
    enormous_size = b"\xff\xdc\xff\xdc"  # 65,500 x 65,500 pixels
    enormous = data[:size_offset] + enormous_size + data[size_offset + 4 :]

    refuses("huge", decode_image, enormous, name="huge")


# Writing


def test_a_picture_in_a_png_file_is_exact() -> None:
    np.testing.assert_array_equal(decode_image(encode_image_file(PICTURE, "box.PNG")), PICTURE)


def test_a_picture_in_a_jpg_file_is_a_jpeg() -> None:
    assert encode_image_file(PICTURE, "box.jpg")[:3] == b"\xff\xd8\xff"


@pytest.mark.parametrize("name", ["box.txt", "box.psd", "box", "box.xbm"])  # Pillow reads .psd only
def test_names_of_other_files_are_refused(name: str) -> None:
    refuses(name, encode_image_file, PICTURE, name)
