"""Encoded images in, pixels out, and back."""

import base64
import contextlib
import io
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from spear.errors import SpearError, summarize_error
from spear.types import Array

IMAGE_MAGIC_BYTES = (b"\xff\xd8\xff", b"\x89PNG")
"""What JPEG and PNG files begin with."""


def decode_image(encoded: bytes, where: str = "an image", out: Array | None = None) -> Array:
    """JPEG or PNG bytes as [h, w, 3] uint8 RGB, writable. Raises SpearError naming `where` when broken.

    out: an array that is filled and returned, if it has the image's size; else a new one is.
    JPEGs by libjpeg-turbo itself, in half of the time that Pillow takes around it for the same numbers. What
    is not plain (CMYK, of no sane size, broken) `load_image` reads, as stored, or says why not.
    """
    if encoded.startswith(IMAGE_MAGIC_BYTES[0]):
        with contextlib.suppress(ValueError):
            height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
            if colours in ("YCbCr", "RGB", "Gray") and height * width <= (
                Image.MAX_IMAGE_PIXELS or 0
            ):
                fits = out is not None and out.shape == (height, width, 3)
                found = simplejpeg.decode_jpeg(encoded, buffer=out if fits else None)
                return out if out is not None and fits else np.asarray(found)
    return load_image(encoded, where, stored=True)


def compute_placement(
    source: tuple[int, int], target: tuple[int, int]
) -> tuple[float, int, int, int, int]:
    """Where `fit_image` puts an image: its scale, and left, top, width and height in pixels of the target.
    Sizes are (width, height)."""
    scale = min(target[0] / source[0], target[1] / source[1])
    width, height = (max(1, round(side * scale)) for side in source)
    return scale, (target[0] - width) // 2, (target[1] - height) // 2, width, height


def fit_image(image: Array, height: int, width: int, bars: bool = True) -> Array:
    """Bring an image to a size without stretching it (the paper: depth depends on the aspect).

    image [h, w, 3] uint8 RGB -> [height, width, 3] uint8: scaled with antialiasing, then padded with black
    `bars` around it (without: a later call adds them). Raises SpearError for any other kind of array. By
    PyTorch, in a sixth of Pillow's time for the same numbers, but for one level in 0.2 % of them.
    """
    array = isinstance(image, np.ndarray)
    if not array or image.dtype != np.uint8 or image.shape[2:] != (3,) or not image.size:
        what = f"{image.dtype} {image.shape}" if array else type(image).__name__
        raise SpearError(f"wrong image type: {what}: give a uint8 array of shape [h, w, 3]")
    h, w = image.shape[:2]
    if (h, w) == (height, width):
        return image
    import torch  # here: lists and help are shown without it

    _, left, top, across, down = compute_placement((w, h), (width, height))
    planes = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(
        planes, (down, across), mode="bilinear", antialias=True
    )
    around = (left, width - across - left, top, height - down - top) if bars else (0, 0)
    return torch.nn.functional.pad(scaled[0], around).permute(1, 2, 0).numpy()


def find_image_format(name: str) -> str:
    """Pillow's name for the format of a file, by its ending. Raises SpearError for all but PNG and JPEG."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower(), "")
    if kind not in ("PNG", "JPEG"):
        raise SpearError(f"{name}: not a name for a picture: end it in .png or .jpg")
    return kind


def encode_image_file(image: Array, name: str) -> bytes:
    """[h, w, 3] uint8 RGB -> the bytes of a picture file of this name. Raises as `find_image_format` does."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, find_image_format(name))
    return buffer.getvalue()


def encode_jpeg(image: Array, quality: int = 95) -> bytes:
    """[h, w, 3] uint8 RGB -> JPEG bytes, colour at full resolution: small objects are told apart by it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def to_jpeg_data_uri(image: Array) -> str:
    """[h, w, 3] uint8 RGB as a data URI, for an image's source in a page."""
    return to_data_uri(encode_jpeg(image, quality=88), "image/jpeg")


def to_data_uri(data: bytes, mime: str) -> str:
    """What a page holds inside instead of a link to a file."""
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def load_image(
    source: str | Path | bytes, name: str = "", longest: int | None = None, stored: bool = False
) -> Array:
    """An image file as [h, w, 3] uint8 RGB, turned as its EXIF orientation says.

    CMYK, palette and grey images become RGB; 16-bit ones lose their lower byte; what is transparent is laid
    on white; of an animation the first frame is taken. Colour profiles are not applied. (Our choice.)

    source   a path, or the bytes of the file; name: what errors call it, the path when not given.
    longest  the most pixels that a side may have: looked at before the pixels are.
    stored   leaves it as it is stored, where depth, intrinsics or other views belong to its pixels.

    Raises `SpearError` for no such file, not an image, a broken or truncated one, one that claims to be
    enormous (Pillow's limit, 179 million pixels), or pixels with no meaning as brightness (floating point,
    more than 16 bits).
    """
    return load_image_and_orientation(source, name, longest, stored)[0]


def load_image_and_orientation(
    source: str | Path | bytes, name: str = "", longest: int | None = None, stored: bool = False
) -> tuple[Array, bool]:
    """As `load_image`, and `Frame.is_turned`: whether its EXIF says a turn that its size does not show."""
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise SpearError(f"{name}: cannot read the image ({reason}): check the path") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            if longest and max(image.size) > longest:
                size = "{} x {}".format(*image.size)
                raise SpearError(f"{name}: {size} pixels: send sides of at most {longest}")
            said = image.getexif().get(ExifTags.Base.Orientation, 1)
            image.load()
            if stored and said != image.getexif().get(
                ExifTags.Base.Orientation, 1
            ):  # a TIFF turns by itself
                image.getexif()[ExifTags.Base.Orientation] = {6: 8, 8: 6}.get(
                    said, said
                )  # so: back
                stored = False
            seen = _rgb(image if stored else ImageOps.exif_transpose(image), name)
            return np.array(seen), said in (2, 3, 4) or (
                said in (5, 6, 7, 8) and seen.width == seen.height
            )
    except SpearError:
        raise
    except Exception as error:  # on broken files decoders raise errors of many kinds
        reason = summarize_error(error).partition(" <_io.")[0]
        raise SpearError(
            f"{name}: not a readable image ({reason}): replace it by a JPEG or PNG"
        ) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise SpearError(
            f"{name}: floating-point pixels: convert it to 8 bits, as you want it to look"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise SpearError(f"{name}: pixels of more than 16 bits: convert it to 8 bits")
        image = Image.fromarray((values // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")
