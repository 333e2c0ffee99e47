"""Encoded images in, pixels out, and back."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.types import Array

FitImage = Callable[[Array, int, int], Array]
"""(image [h, w, 3] uint8, height, width) -> [height, width, 3] uint8, aspect kept by cropping or padding."""


def open_image(encoded: bytes, where: str = "an image") -> Image.Image:
    """JPEG or PNG bytes, decoded, RGB. Raises SpearError naming `where` when broken."""
    try:
        image = Image.open(io.BytesIO(encoded))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise SpearError(f"broken image: {where}: {error}; leave it out") from error


def decode_image(encoded: bytes, where: str = "an image") -> Array:
    """`open_image` as [h, w, 3] uint8, writable."""
    return np.array(open_image(encoded, where))


def picture_format(name: str) -> str:
    """What Pillow calls the format of a file of this name, by its ending. Raises SpearError where it writes
    none."""
    kind = Image.registered_extensions().get(Path(name).suffix.lower(), "")
    if kind not in Image.SAVE:
        raise SpearError(f"{name}: not a name for a picture: end it in .png or .jpg")
    return kind


def encode_picture(image: Array, name: str) -> bytes:
    """[h, w, 3] uint8 RGB -> the bytes of a picture file of this name. Raises SpearError as `picture_format`
    does."""
    buffer = io.BytesIO()
    try:
        Image.fromarray(image).save(buffer, picture_format(name))
    except (OSError, ValueError) as error:
        raise SpearError(f"{name}: cannot be drawn ({error}): end it in .png or .jpg") from error
    return buffer.getvalue()


def encode_jpeg(image: Array, quality: int = 95) -> bytes:
    """[h, w, 3] uint8 RGB -> JPEG bytes, colour at full resolution: small objects are told apart by it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
