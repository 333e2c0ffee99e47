"""Encoded images in, pixels out, and back."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from spear.errors import SpearError
from spear.types import Array


def decode_image(encoded: bytes, where: str = "an image") -> Array:
    """JPEG or PNG bytes to [h, w, 3] uint8 RGB, writable. Raises SpearError naming `where` when broken."""
    try:
        return np.array(Image.open(io.BytesIO(encoded)).convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise SpearError(f"broken image: {where}: {error}; leave it out") from error


def encode_jpeg(image: Array, quality: int = 95) -> bytes:
    """[h, w, 3] uint8 RGB -> JPEG bytes, colour at full resolution: small objects are told apart by it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()
