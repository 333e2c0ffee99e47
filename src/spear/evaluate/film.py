"""Films of episodes: both cameras side by side, with the instruction and the outcome written above them."""

import functools
import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spear.errors import SpearError, import_optional
from spear.types import Array

HEIGHT = 420
"""Pixel height of the pictures in a film (twice the external camera's, so that it upscales cleanly)."""
BAR = 44
"""Pixel height of the caption bar."""
GREEN, RED, WHITE, GREY = (88, 214, 141), (255, 121, 108), (245, 246, 248), (30, 33, 39)


def import_encoder() -> Any:
    """PyAV. Raises `SpearError` where it is missing, or was built without H.264, as PyPI's never is."""
    av = import_optional("av", "report", "a film")
    if "libx264" not in av.codecs_available:
        raise SpearError("a film: this PyAV has no H.264 encoder: pip install --upgrade av")
    return av


def compose_frame(
    external: Array, wrist: Array | None, caption: str, outcome: bool | None = None
) -> Array:
    """One film frame: [h, w, 3] uint8 with even sides, the external view left, the wrist view right,
    `caption` above and, where the episode has ended, its outcome."""
    views = np.concatenate([_scale(view) for view in (external, wrist) if view is not None], axis=1)
    width = views.shape[1]
    frame = Image.new("RGB", (width + width % 2, HEIGHT + BAR), GREY)
    frame.paste(Image.fromarray(views), (0, BAR))
    draw = ImageDraw.Draw(frame)
    badge = "" if outcome is None else ("success" if outcome else "failure")
    badge_width = 120 if badge else 20
    room = frame.width - badge_width - 14
    font = next(
        (f for f in map(_font, range(24, 10, -1)) if f.getlength(caption) <= room), _font(11)
    )
    draw.text((14, BAR // 2), caption, WHITE, font, anchor="lm")
    if badge:
        draw.text(
            (frame.width - 14, BAR // 2), badge, GREEN if outcome else RED, _font(24), anchor="rm"
        )
    return np.asarray(frame)


def encode_film(frames: Iterable[Array], rate_hz: float) -> bytes:
    """Frames [h, w, 3] uint8 of one size -> an MP4 file with H.264. The last frame stays for a second, so
    that a looping film shows its outcome. Raises as `encoder` does."""
    av = import_encoder()
    buffer, rate = io.BytesIO(), Fraction(rate_hz).limit_denominator(1000)
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "26", "preset": "veryfast"})
        for index, image in enumerate(frames):
            if not index:
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
            frame = np.ascontiguousarray(image)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for _ in range(round(rate_hz)):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def _scale(image: Array) -> Array:
    size = round(image.shape[1] * HEIGHT / image.shape[0]), HEIGHT
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
