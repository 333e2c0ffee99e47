"""A user's image file, whatever its colour mode, to RGB pixels the right way up."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from spear.errors import SpearError
from spear.types import Array

_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What decoders raise on broken files."""


def load_image(source: str | Path | bytes, name: str = "") -> Array:
    """An image file as [h, w, 3] uint8 RGB, turned as its EXIF orientation says.

    CMYK, palette and grey images become RGB; 16-bit ones lose their lower byte; what is transparent is laid
    on white; of an animation the first frame is taken. Embedded colour profiles are not applied. (Our
    choice.)

    Args:
        source: a path, or the bytes of the file.
        name: what errors call the image; the path when not given.

    Raises:
        SpearError: no such file, not an image, a broken or truncated one, one that claims to be enormous
            (Pillow's limit, 179 million pixels), or pixels with no meaning as brightness (floating point,
            more than 16 bits).
    """
    if isinstance(source, bytes):
        data, name = source, name or "image"
    else:
        name = name or str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise SpearError(f"{name}: cannot read the image ({reason}): check the path") from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return np.array(_rgb(ImageOps.exif_transpose(image), name))
    except _BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].partition(" <_io.")[0]
        raise SpearError(
            f"{name}: not a readable image ({reason}): replace it, or convert it to JPEG or PNG"
        ) from error


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise SpearError(f"{name}: floating-point pixels: convert it to 8 bits, as you want it to look")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise SpearError(f"{name}: pixels of more than 16 bits: convert it to 8 bits")
        image = Image.fromarray((values // 256).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
