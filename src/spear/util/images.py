"""Reading, fitting and writing images."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, features

from spear.errors import SpearError, summarize_error
from spear.types import Array, WidthAndHeight
from spear.util.files import refuse_lfs_pointer

JPEG_MAGIC_BYTES = b"\xff\xd8\xff"
IMAGE_MAGIC_BYTES = (JPEG_MAGIC_BYTES, b"\x89PNG")
"""The first bytes of JPEG and PNG files."""

_COMMON_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".mpo",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
)
IMAGE_SUFFIXES = (*_COMMON_SUFFIXES, ".avif") if features.check("avif") else _COMMON_SUFFIXES
"""Suffixes of the images that folders and archives are searched for. (Pillow decodes AVIF since
version 11.3.)"""

# Values of EXIF orientation. 1 is upright. Orientations 2 to 4 mirror the image or turn it by 180°,
# which keeps its size. Orientations 5 to 8 exchange width and height.
_SAME_SIZE_ORIENTATIONS = (2, 3, 4)
_EXCHANGED_SIZE_ORIENTATIONS = (5, 6, 7, 8)
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # turns by 90°; every other one is its own inverse

_LOST_DATA_WARNINGS = ("premature end", "bad huffman code", "bad arithmetic code", "instead of rst")
"""Parts of libjpeg's warnings about lost data, in lower case. Its other warnings, such as those
about extraneous bytes before a marker, are harmless."""

MAX_PIXELS = 2**26
"""Larger images are refused before they are decoded. A photo of 64 million pixels passes, and none
takes more than about 0.6 GiB of memory while it is read."""

_STRIP_PIXELS = 2**22  # images are converted in strips of about this size, which saves memory

_MAX_12_BIT = 4095
"""Largest value of 12 bits. A 16-bit image without a brighter pixel is refused. It may be a dark
image, or its camera may have only 10 or 12 bits, and the file does not say which of the two."""


def decode_image(encoded: bytes, name: str = "an image", out: Array | None = None) -> Array:
    """Decode a JPEG or PNG of a robot's camera to [h, w, 3] uint8 RGB, writable.

    EXIF orientation is ignored. Transparency is dropped, because a camera's pixels have none:
    simulators write an alpha channel that says nothing about what a camera sees.

    Plain JPEGs are decoded by libjpeg-turbo (`simplejpeg`), which gives the same numbers as Pillow
    in half the time. Pillow decodes every other image (PNG; JPEG in CMYK, of extreme size, or
    broken), or raises the error that says why it cannot.

    Args:
        encoded: the content of the file.
        name: the image's name in messages.
        out: an array that is filled and returned if it has the image's size and the image is a
            plain JPEG.

    Raises:
        SpearError: the image is broken.
    """
    if encoded.startswith(JPEG_MAGIC_BYTES):
        try:
            height, width, color_space, _ = simplejpeg.decode_jpeg_header(encoded)
            is_plain = color_space in ("YCbCr", "RGB", "Gray")
            if is_plain and height * width <= MAX_PIXELS:
                if out is not None and out.shape == (height, width, 3):
                    simplejpeg.decode_jpeg(encoded, buffer=out)
                    return out
                return np.asarray(simplejpeg.decode_jpeg(encoded))
        except ValueError as error:
            _raise_if_data_are_lost(error, name)
    return load_image(encoded, name, keep_stored_orientation=True, keep_transparent_colors=True)


def check_jpeg_is_complete(encoded: bytes, name: str) -> None:
    """Check that a JPEG has all of its data, without decoding it at full size.

    A camera that loses packets writes a JPEG whose data end early, although the end marker is
    there. Decoders fill the rest of the image with gray, and only warn.

    Args:
        encoded: the content of the file; anything but a JPEG passes.
        name: the image's name in messages.

    Raises:
        SpearError: data are missing.
    """
    if not encoded.startswith(JPEG_MAGIC_BYTES):
        return
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        if height * width > MAX_PIXELS:  # whoever decodes it refuses it
            return
        # Decode at an eighth of the size, which still reads all data.
        simplejpeg.decode_jpeg(encoded, colorspace="GRAY", min_factor=8, min_height=1, min_width=1)
    except ValueError as error:
        _raise_if_data_are_lost(error, name)


def _raise_if_data_are_lost(warning: ValueError, name: str) -> None:
    """Raise `SpearError` for a decoder's warning that means lost data; ignore others."""
    reason = summarize_error(warning)
    if any(words in reason.lower() for words in _LOST_DATA_WARNINGS):
        raise SpearError(
            f"{name} is not a readable image ({reason}), because a part of it is missing. "
            "Record it again."
        ) from warning


class Placement(NamedTuple):
    """Where a scaled source image lies in a target image.

    Attributes:
        scale: size in the target divided by size in the source.
        left: distance of the scaled image from the target's left edge, in pixels.
        top: distance of the scaled image from the target's top edge, in pixels.
        width: width of the scaled image, in pixels.
        height: height of the scaled image, in pixels.
    """

    scale: float
    left: int
    top: int
    width: int
    height: int


def compute_placement(source_size: WidthAndHeight, target_size: WidthAndHeight) -> Placement:
    """Return where `fit_image` places an image of one size in an image of another.

    Sizes are (width, height) in pixels. The scaled image is centered.

    >>> compute_placement((640, 480), (280, 280))
    Placement(scale=0.4375, left=0, top=35, width=280, height=210)
    """
    source_width, source_height = source_size
    target_width, target_height = target_size
    scale = min(target_width / source_width, target_height / source_height)
    width = max(1, round(source_width * scale))
    height = max(1, round(source_height * scale))
    left = (target_width - width) // 2
    top = (target_height - height) // 2
    return Placement(scale, left, top, width, height)


def fit_image(image: Array, height: int, width: int, has_bars: bool = True) -> Array:
    """Fit an image into a size without stretching it.

    The aspect ratio is kept, as in the paper, because estimates of depth depend on it. The image is
    scaled with antialiasing, and padded with black bars. PyTorch scales in a sixth of Pillow's
    time; 0.2 % of its values differ, by one of 256 levels.

    Args:
        image: [h, w, 3] uint8 RGB.
        height: height of the result, in pixels.
        width: width of the result, in pixels.
        has_bars: whether black bars pad the result to this size.

    Returns:
        [height, width, 3] uint8; without bars one of the sides may be smaller. If the image has
        this size already, it is returned itself.

    Raises:
        SpearError: the image is another kind of array.
    """
    _check_image(image)
    source_height, source_width = image.shape[:2]
    if (source_height, source_width) == (height, width):
        return image
    import torch  # takes seconds, so that commands which only show lists or help do without it

    placement = compute_placement((source_width, source_height), (width, height))
    contiguous = np.require(image, requirements=["C", "W"])  # PyTorch wants writable memory, too
    planes = torch.from_numpy(contiguous).permute(2, 0, 1)[None]  # [1, 3, h, w]
    scaled = torch.nn.functional.interpolate(
        planes, (placement.height, placement.width), mode="bilinear", antialias=True
    )[0]  # [3, placement.height, placement.width]
    if has_bars:
        right = width - placement.width - placement.left
        bottom = height - placement.height - placement.top
        scaled = torch.nn.functional.pad(scaled, (placement.left, right, placement.top, bottom))
    return scaled.permute(1, 2, 0).numpy()  # [height, width, 3]


def _check_image(image: Array) -> None:
    """Raise `SpearError` if an image is not [h, w, 3] uint8."""
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8:
        has_three_channels = image.ndim == 3 and image.shape[2] == 3
        if has_three_channels and image.size > 0:
            return
    description = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
    raise SpearError(f"{description} is no image. Give a uint8 array of shape [h, w, 3].")


def can_open_image(path: str | Path) -> bool:
    """Return whether a file begins like an image that `load_image` decodes, whatever its suffix."""
    try:
        with Image.open(path):
            return True
    except Exception:  # decoders raise errors of many types for broken files
        return False


def get_image_format(file_name: str) -> str:
    """Return Pillow's name for the format that a file's suffix names: "PNG" or "JPEG".

    Raises:
        SpearError: the suffix is that of another format, or is missing.
    """
    image_format = Image.registered_extensions().get(Path(file_name).suffix.lower(), "")
    if image_format not in ("PNG", "JPEG"):
        raise SpearError(f"{file_name} is no name for a picture. End it in .png or .jpg.")
    return image_format


def encode_image_file(image: Array, file_name: str) -> bytes:
    """Encode [h, w, 3] uint8 RGB in the format that the suffix of `file_name` says."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, get_image_format(file_name))
    return buffer.getvalue()


def encode_png(image: Array) -> bytes:
    """Encode [h, w, 3 or 4] uint8 as PNG, with the fastest compression."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def encode_jpeg(image: Array, quality: int = 95) -> bytes:
    """Encode [h, w, 3] uint8 RGB as JPEG.

    Color has full resolution, because it distinguishes small objects.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def to_jpeg_data_uri(image: Array) -> str:
    """Encode [h, w, 3] uint8 RGB as a data URI, for the source of an image in a page."""
    return to_data_uri(encode_jpeg(image, quality=88), "image/jpeg")


def to_data_uri(data: bytes, mime: str) -> str:
    """Encode data as a URI that contains the data, for a page that needs no other file.

    >>> to_data_uri(b"hello", "text/plain")
    'data:text/plain;base64,aGVsbG8='
    """
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def load_image(
    source: str | Path | bytes,
    name: str = "",
    largest_allowed_side_px: int | None = None,
    keep_stored_orientation: bool = False,
    keep_transparent_colors: bool = False,
) -> Array:
    """Load an image file as [h, w, 3] uint8 RGB, turned upright by its EXIF orientation.

    CMYK, palette and gray images become RGB. 16-bit images lose the lower byte of each value.
    Transparent parts are laid on white. Of an animation the first frame is loaded. Color profiles
    are not applied. (Our choice.)

    A 16-bit image whose values fit into 12 bits is refused: without its lower bytes it would be
    nearly black, and nothing says by how much to brighten it.

    Args:
        source: a path, or the content of the file.
        name: the image's name in messages; by default the path.
        largest_allowed_side_px: an image with a longer side is refused before its pixels are
            decoded.
        keep_stored_orientation: whether to ignore the EXIF orientation, because depth, intrinsics
            or other views belong to the pixels as they are stored.
        keep_transparent_colors: whether to drop transparency instead of laying the image on white.

    Raises:
        SpearError: the file is missing, is no image, or is broken or truncated; the image is
            enormous by its header (it has more than `MAX_PIXELS`); or the brightness of its
            pixels is not known (floating point, more than 16 bits, or few of 16 bits used).
    """
    image, _ = load_image_and_is_turned_invisibly(
        source, name, largest_allowed_side_px, keep_stored_orientation, keep_transparent_colors
    )
    return image


def load_image_and_is_turned_invisibly(
    source: str | Path | bytes,
    name: str = "",
    largest_allowed_side_px: int | None = None,
    keep_stored_orientation: bool = False,
    keep_transparent_colors: bool = False,
) -> tuple[Array, bool]:
    """Load an image, with the arguments and errors of `load_image`, and its `Frame.is_turned`.

    Returns:
        The image [h, w, 3] uint8, and whether its EXIF orientation turns or mirrors it in a way
        that its size does not show. If an orientation exchanges the width and height of an image
        that is not square, the size shows it, so the second value is False.
    """
    if not name:
        name = "image" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpearError(f"{name} cannot be read ({reason}). Check the path.") from error
    check_jpeg_is_complete(data, name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_num_pixels(image, name)
            if largest_allowed_side_px and max(image.size) > largest_allowed_side_px:
                width, height = image.size
                raise SpearError(
                    f"{name} has {width} x {height} pixels. Send sides of at most "
                    f"{largest_allowed_side_px}."
                )
            return _read_pixels(image, name, keep_stored_orientation, keep_transparent_colors)
    except SpearError:
        raise
    except Exception as error:  # decoders raise errors of many types for broken files
        refuse_lfs_pointer(data, name)
        reason = summarize_error(error).partition(" <_io.")[0]  # without Python's name of the file
        raise SpearError(
            f"{name} is not a readable image ({reason}). Replace it by a JPEG or PNG."
        ) from error


def check_num_pixels(image: Image.Image, name: str) -> None:
    """Raise `SpearError` if an image, which is opened and not decoded yet, is enormous."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise SpearError(
            f"{name} has {width} x {height} pixels, more than the {MAX_PIXELS:,} that are read. "
            "Scale the image down."
        )


def _read_pixels(
    image: Image.Image, name: str, keep_stored_orientation: bool, keep_transparent_colors: bool
) -> tuple[Array, bool]:
    """Return what `load_image_and_is_turned_invisibly` returns, of an opened image."""
    # The bits of the file are known only before the pixels are loaded, and for PNG, reading the
    # EXIF data loads the pixels.
    has_16_bit_colors = image.mode in ("RGB", "RGBA") and _has_16_bits_in_file(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    image.load()

    if keep_stored_orientation:
        _undo_turn_by_pillow(image, orientation)
    else:
        ImageOps.exif_transpose(image, in_place=True)

    rgb = _to_rgb(image, name, keep_transparent_colors)
    if has_16_bit_colors:
        _check_16_bit_colors(rgb, name)

    if orientation in _SAME_SIZE_ORIENTATIONS:
        is_turned_invisibly = True
    else:
        is_square = image.width == image.height
        is_turned_invisibly = orientation in _EXCHANGED_SIZE_ORIENTATIONS and is_square
    return rgb, is_turned_invisibly


def _undo_turn_by_pillow(image: Image.Image, orientation: int) -> None:
    """Turn an image's pixels back if Pillow turned them upright when it loaded them.

    Pillow does so with TIFF files, and then changes their EXIF orientation.

    Args:
        image: the loaded image.
        orientation: the EXIF orientation before the image was loaded.
    """
    orientation_after_loading = image.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation_after_loading == orientation:
        return
    # `exif_transpose` turns an image upright that has the orientation in its EXIF data. So that it
    # turns an upright image back, the inverse orientation is written there.
    inverse = _INVERSE_ORIENTATION.get(orientation, orientation)
    image.getexif()[ExifTags.Base.Orientation] = inverse
    ImageOps.exif_transpose(image, in_place=True)


def _has_16_bits_in_file(image: Image.Image) -> bool:
    """Return whether an image's file has 16 bits per color.

    The image is opened and its pixels are not loaded yet: Pillow forgets its tiles when it loads.
    """
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]  # such as "RGB;16B"
    return any(";16" in raw_mode for raw_mode in raw_modes)


def _to_rgb(image: Image.Image, name: str, keep_transparent_colors: bool) -> Array:
    """Convert an image of any of Pillow's modes to [h, w, 3] RGB, by the rules of `load_image`."""
    if image.mode == "F":
        raise SpearError(
            f"{name} has floating-point pixels. Convert it to 8 bits, as you want it to look."
        )
    has_deep_gray = image.mode == "I" or image.mode.startswith("I;16")
    gray_divisor = _compute_gray_divisor(image, name) if has_deep_gray else 1
    rgb = np.empty((image.height, image.width, 3), np.uint8)
    for rows, strip in _iterate_strips(image):
        if has_deep_gray:
            strip = Image.fromarray((np.asarray(strip) // gray_divisor).astype(np.uint8))
        rgb[rows] = np.asarray(_strip_to_rgb(strip, keep_transparent_colors))
    return rgb


def _iterate_strips(image: Image.Image) -> Iterator[tuple[slice, Image.Image]]:
    """Yield an image in strips of rows, each with its rows."""
    num_rows = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, num_rows):
        bottom = min(top + num_rows, image.height)
        yield slice(top, bottom), image.crop((0, top, image.width, bottom))


def _strip_to_rgb(strip: Image.Image, keep_transparent_colors: bool) -> Image.Image:
    """Convert a strip of 8-bit pixels to RGB; see `load_image` for transparency."""
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        if not keep_transparent_colors:
            white = Image.new("RGBA", strip.size, "white")
            strip = Image.alpha_composite(white, strip)
    return strip.convert("RGB")


def _compute_gray_divisor(image: Image.Image, name: str) -> int:
    """Find by what gray values of 16 or 32 bits are divided to become 8-bit values.

    If the values of a 32-bit image (mode "I") are at most 255, they already are 8-bit values. If
    values fit into 12 bits otherwise, the image is refused (see `_MAX_12_BIT`).
    """
    lowest = 0
    brightest = 0
    num_bits = 0
    for _, strip in _iterate_strips(image):
        values = np.asarray(strip)
        lowest = min(lowest, int(values.min()))
        brightest = max(brightest, int(values.max()))
        num_bits = 8 * values.itemsize
    if lowest < 0 or brightest > 0xFFFF:
        raise SpearError(f"{name} has pixels of more than 16 bits. Convert it to 8 bits.")
    if image.mode == "I" and brightest <= 0xFF:
        return 1
    if 0 < brightest <= _MAX_12_BIT:
        raise SpearError(_describe_unused_bits(name, brightest.bit_length(), num_bits))
    return 256  # leaves the upper byte of 16 bits


def _check_16_bit_colors(rgb: Array, name: str) -> None:
    """Raise `SpearError` if the 16-bit colors of an image's file fitted into 12 bits.

    Pillow has kept only the upper byte of each color in `rgb`.
    """
    brightest_upper_byte = int(rgb.max())
    if 0 < brightest_upper_byte <= _MAX_12_BIT >> 8:
        num_used_bits = 8 + brightest_upper_byte.bit_length()
        raise SpearError(_describe_unused_bits(name, num_used_bits, num_bits=16))


def _describe_unused_bits(name: str, num_used_bits: int, num_bits: int) -> str:
    """Return the message for an image whose values use few of their bits."""
    return (
        f"{name}: pixels use {num_used_bits} of {num_bits} bits, so the image would be nearly "
        "black: convert it to 8 bits, as you want it to look"
    )
