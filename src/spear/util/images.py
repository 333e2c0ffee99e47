"""Reading, fitting and writing images."""

import base64
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, features

from spear.errors import SpearError, summarize_error
from spear.types import Array
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

# Values of EXIF orientation. 1 is upright; 2 to 4 mirror or turn by 180°, which keeps the size; 5
# to 8 exchange width and height.
_SAME_SIZE_ORIENTATIONS = (2, 3, 4)
_EXCHANGED_SIZE_ORIENTATIONS = (5, 6, 7, 8)
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # the others are their own inverses


_JPEG_DAMAGE = ("premature end", "bad huffman code", "bad arithmetic code", "instead of rst")
"""Parts of libjpeg's warnings about lost data, in lower case. Others, such as extraneous bytes
before a marker, are harmless."""

_MAX_12_BIT = 4095  # a brightest pixel of 16 bits that is no brighter leaves the scale open


def decode_image(encoded: bytes, name: str = "an image", out: Array | None = None) -> Array:
    """Decode a JPEG or PNG of a robot's camera to [h, w, 3] uint8 RGB, writable, as it is stored.

    Transparency is dropped, because a camera's pixels have none: simulators write an alpha channel
    that says nothing about what a camera sees.

    JPEGs are decoded by libjpeg-turbo itself, in half of the time that Pillow takes around it for
    the same numbers. Pillow decodes what is not plain (CMYK, of no sane size, broken), or says why
    it cannot.

    Args:
        encoded: the content of the file.
        name: the image's name in messages.
        out: an array that is filled and returned if it has the image's size.

    Raises:
        SpearError: the image is broken.
    """
    if encoded.startswith(JPEG_MAGIC_BYTES):
        try:
            height, width, color_space, _ = simplejpeg.decode_jpeg_header(encoded)
            is_plain = color_space in ("YCbCr", "RGB", "Gray")
            if is_plain and height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                if out is not None and out.shape == (height, width, 3):
                    simplejpeg.decode_jpeg(encoded, buffer=out)
                    return out
                return np.asarray(simplejpeg.decode_jpeg(encoded))
        except ValueError as error:
            _raise_if_data_are_lost(error, name)
    return load_image(encoded, name, stored=True, keep_transparent_colors=True)


def check_jpeg_is_complete(encoded: bytes, name: str) -> None:
    """Check that a JPEG has all of its data, without decoding it at full size.

    Cameras that lose packets write JPEGs that end early but close properly. Decoders fill the rest
    with gray, and only warn.

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
        if height * width > (Image.MAX_IMAGE_PIXELS or 0):  # whoever decodes it refuses it
            return
        simplejpeg.decode_jpeg(encoded, colorspace="GRAY", min_factor=8, min_height=1, min_width=1)
    except ValueError as error:
        _raise_if_data_are_lost(error, name)


def _raise_if_data_are_lost(warning: ValueError, name: str) -> None:
    """Raise `SpearError` for a decoder's warning that means lost data; ignore others."""
    reason = summarize_error(warning)
    if any(words in reason.lower() for words in _JPEG_DAMAGE):
        raise SpearError(
            f"{name}: not a readable image ({reason}): a part of it is missing; record it again"
        ) from warning


class Placement(NamedTuple):
    """Where an image of one size is placed in one of another size, in pixels of the latter."""

    scale: float
    left: int
    top: int
    width: int
    height: int


def compute_placement(source: tuple[int, int], target: tuple[int, int]) -> Placement:
    """Where `fit_image` places an image. Sizes are (width, height).

    >>> compute_placement((640, 480), (280, 280))
    Placement(scale=0.4375, left=0, top=35, width=280, height=210)
    """
    scale = min(target[0] / source[0], target[1] / source[1])
    width = max(1, round(source[0] * scale))
    height = max(1, round(source[1] * scale))
    left = (target[0] - width) // 2
    top = (target[1] - height) // 2
    return Placement(scale, left, top, width, height)


def fit_image(image: Array, height: int, width: int, bars: bool = True) -> Array:
    """Bring an image to a size without stretching it: depth depends on the aspect (the paper).

    The image is scaled with antialiasing, and padded with black bars. PyTorch does it in a sixth of
    Pillow's time, for the same numbers but for one level in 0.2 % of them.

    Args:
        image: [h, w, 3] uint8 RGB.
        height: of the result, in pixels.
        width: of the result, in pixels.
        bars: whether to pad; without bars, a later call adds them.

    Returns:
        [height, width, 3] uint8; without bars one of the sides may be smaller.

    Raises:
        SpearError: the image is another kind of array.
    """
    _check_image(image)
    source_height, source_width = image.shape[:2]
    if (source_height, source_width) == (height, width):
        return image
    import torch  # here, because the commands' lists and help work without it

    placement = compute_placement((source_width, source_height), (width, height))
    contiguous = np.require(image, requirements=["C", "W"])
    planes = torch.from_numpy(contiguous).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        planes, (placement.height, placement.width), mode="bilinear", antialias=True
    )[0]
    if bars:
        right = width - placement.width - placement.left
        bottom = height - placement.height - placement.top
        scaled = torch.nn.functional.pad(scaled, (placement.left, right, placement.top, bottom))
    return scaled.permute(1, 2, 0).numpy()


def _check_image(image: Array) -> None:
    """Raise `SpearError` if an image is not [h, w, 3] uint8."""
    is_array = isinstance(image, np.ndarray)
    if is_array and image.dtype == np.uint8 and image.shape[2:] == (3,) and image.size:
        return
    description = f"{image.dtype} {image.shape}" if is_array else type(image).__name__
    raise SpearError(f"wrong image type: {description}: give a uint8 array of shape [h, w, 3].")


def can_open_image(path: str | Path) -> bool:
    """Whether a file begins as an image that `load_image` decodes, whatever its suffix."""
    try:
        with Image.open(path):
            return True
    except Exception:  # on broken files decoders raise errors of many types
        return False


def find_image_format(name: str) -> str:
    """Pillow's name for the format of a file, by its suffix.

    Raises:
        SpearError: the suffix is none of PNG and JPEG files.
    """
    image_format = Image.registered_extensions().get(Path(name).suffix.lower(), "")
    if image_format not in ("PNG", "JPEG"):
        raise SpearError(f"{name}: not a name for a picture. End it in .png or .jpg.")
    return image_format


def encode_image_file(image: Array, name: str) -> bytes:
    """Encode [h, w, 3] uint8 RGB in the format that `find_image_format` finds."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, find_image_format(name))
    return buffer.getvalue()


def encode_png(image: Array) -> bytes:
    """Encode [h, w, 3 or 4] uint8 without loss, and quickly."""
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
    """Encode data as a URI that contains it, in place of a link to a file.

    >>> to_data_uri(b"hello", "text/plain")
    'data:text/plain;base64,aGVsbG8='
    """
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def load_image(
    source: str | Path | bytes,
    name: str = "",
    longest: int | None = None,
    stored: bool = False,
    keep_transparent_colors: bool = False,
) -> Array:
    """Load an image file as [h, w, 3] uint8 RGB, upright as its EXIF orientation says.

    CMYK, palette and gray images become RGB. 16-bit ones lose their lower byte, transparent parts
    are laid on white, and of an animation the first frame is loaded. Color profiles are not
    applied. (Our choice.)

    Images of 16 bits that use only 12 or fewer of them are refused, because they would be nearly
    black and nothing tells their scale.

    Args:
        source: a path, or the content of the file.
        name: the image's name in messages; by default the path.
        longest: the maximal length of a side in pixels; it is checked before the pixels are
            decoded.
        stored: whether to leave the image as it is stored, because depth, intrinsics or other views
            belong to its pixels.
        keep_transparent_colors: whether to drop transparency instead of laying the image on white.

    Raises:
        SpearError: for a missing file, for what is no image, for a broken or truncated image, for
            one that claims to be enormous (Pillow's limit, 179 million pixels), and for pixels
            whose brightness is not known (floating point, more than 16 bits, few bits of 16).
    """
    image, _ = load_image_and_orientation(source, name, longest, stored, keep_transparent_colors)
    return image


def load_image_and_orientation(
    source: str | Path | bytes,
    name: str = "",
    longest: int | None = None,
    stored: bool = False,
    keep_transparent_colors: bool = False,
) -> tuple[Array, bool]:
    """Load an image as `load_image` does, and find out whether its EXIF turns it invisibly.

    Returns:
        The image, and whether its EXIF data turns or mirrors it in a way that its size does not
        show (see `Frame.is_turned`).
    """
    if not name:
        name = "image" if isinstance(source, bytes) else str(source)
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpearError(f"{name}: cannot read the image ({reason}). Check the path.") from error
    check_jpeg_is_complete(data, name)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if longest and max(image.size) > longest:
                width, height = image.size
                raise SpearError(
                    f"{name}: {width} x {height} pixels. Send sides of at most {longest}."
                )
            return _read_pixels(image, name, stored, keep_transparent_colors)
    except SpearError:
        raise
    except Exception as error:  # on broken files decoders raise errors of many types
        refuse_lfs_pointer(data, name)
        reason = summarize_error(error).partition(" <_io.")[0]
        raise SpearError(
            f"{name}: not a readable image ({reason}). Replace it by a JPEG or PNG."
        ) from error


def _read_pixels(
    image: Image.Image, name: str, stored: bool, keep_transparent_colors: bool
) -> tuple[Array, bool]:
    """The pixels of an opened image, and whether its EXIF turns it invisibly."""
    has_16_bit_colors = image.mode in ("RGB", "RGBA") and _has_16_bits_in_file(image)
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)  # for PNG this loads the pixels
    image.load()
    was_turned_by_pillow = orientation != image.getexif().get(ExifTags.Base.Orientation, 1)
    if stored and was_turned_by_pillow:  # Pillow turns TIFF files by itself: turn them back
        inverse = _INVERSE_ORIENTATION.get(orientation, orientation)
        image.getexif()[ExifTags.Base.Orientation] = inverse
        stored = False
    oriented = image if stored else ImageOps.exif_transpose(image)
    upright = _to_rgb(oriented, name, keep_transparent_colors)
    if has_16_bit_colors:
        _check_16_bit_colors(upright, name)

    if orientation in _SAME_SIZE_ORIENTATIONS:
        is_turned_invisibly = True
    else:
        is_square = upright.width == upright.height
        is_turned_invisibly = orientation in _EXCHANGED_SIZE_ORIENTATIONS and is_square
    return np.array(upright), is_turned_invisibly


def _has_16_bits_in_file(image: Image.Image) -> bool:
    """Whether the file of an opened image has 16 bits per color. Its pixels are not loaded yet."""
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    return any(";16" in raw_mode for raw_mode in raw_modes)


def _to_rgb(image: Image.Image, name: str, keep_transparent_colors: bool) -> Image.Image:
    """Convert an image of any mode to RGB, see `load_image`."""
    if image.mode == "F":
        raise SpearError(
            f"{name}: floating-point pixels. Convert it to 8 bits, as you want it to look."
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray(_to_8_bits(np.asarray(image), image.mode, name))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if not keep_transparent_colors:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _to_8_bits(values: Array, mode: str, name: str) -> Array:
    """Scale gray values of 16 or 32 bits to 8 bits.

    Values of at most 255 in 32 bits are 8-bit values. Values that use at most 12 of 16 bits are
    refused: whether the camera has 10 or 12 bits, or the picture is dark, nothing tells.
    """
    lowest = int(values.min())
    brightest = int(values.max())
    if lowest < 0 or brightest > 0xFFFF:
        raise SpearError(f"{name}: pixels of more than 16 bits. Convert it to 8 bits.")
    if mode == "I" and brightest <= 0xFF:
        return values.astype(np.uint8)
    if 0 < brightest <= _MAX_12_BIT:
        raise SpearError(_describe_unused_bits(name, brightest.bit_length(), values.itemsize * 8))
    return (values // 256).astype(np.uint8)


def _check_16_bit_colors(image: Image.Image, name: str) -> None:
    """Refuse colors of 16 bits whose upper byte, which is all that is left of them, is nearly 0."""
    brightest = int(np.asarray(image).max())
    if 0 < brightest <= _MAX_12_BIT >> 8:
        raise SpearError(_describe_unused_bits(name, 8 + brightest.bit_length(), 16))


def _describe_unused_bits(name: str, num_used_bits: int, num_bits: int) -> str:
    return (
        f"{name}: pixels use {num_used_bits} of {num_bits} bits, so the image would be nearly "
        "black: convert it to 8 bits, as you want it to look"
    )
