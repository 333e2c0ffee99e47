"""Films of episodes: both cameras side by side, with the instruction and the outcome written above them."""

import functools
import io
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spear.types import Array

HEIGHT = 420
"""Pixel height of the pictures in a film (twice the external camera's, so that it upscales cleanly)."""
BAR = 44
"""Pixel height of the caption bar."""
GREEN, RED, WHITE, GREY = (88, 214, 141), (255, 121, 108), (245, 246, 248), (30, 33, 39)
MIME = {".mp4": "video/mp4", ".webm": "video/webm"}
"""The kinds of films, by the ending of their files."""


def film_file(folder: Path, name: str) -> Path | None:
    """The film of that name in a folder of results, None where there is none."""
    return next((p for suffix in MIME if (p := folder / f"{name}{suffix}").is_file()), None)


def compose(external: Array, wrist: Array | None, caption: str, outcome: bool | None = None) -> Array:
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
    font = next((f for f in map(_font, range(24, 10, -1)) if f.getlength(caption) <= room), _font(11))
    draw.text((14, BAR // 2), caption, WHITE, font, anchor="lm")
    if badge:
        draw.text((frame.width - 14, BAR // 2), badge, GREEN if outcome else RED, _font(24), anchor="rm")
    return np.asarray(frame)


def encode(frames: Iterable[Array], rate_hz: float) -> tuple[bytes, str]:
    """Frames [h, w, 3] uint8 of one size -> (file bytes, MIME type): MP4 with H.264, else WebM with VP9. The
    last frame stays for a second, so that a looping film shows its outcome."""
    import av

    name, container, mime, options = "libx264", "mp4", "video/mp4", {"crf": "26", "preset": "veryfast"}
    if name not in av.codecs_available:
        name, container, mime, options = "libvpx-vp9", "webm", "video/webm", {"crf": "34", "b": "0"}
    buffer, rate = io.BytesIO(), Fraction(rate_hz).limit_denominator(1000)
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(name, rate=rate, options=options)
        assert isinstance(stream, av.VideoStream)
        for index, image in enumerate(frames):
            if not index:
                stream.height, stream.width, stream.pix_fmt = *image.shape[:2], "yuv420p"
            frame = np.ascontiguousarray(image)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for _ in range(round(rate_hz)):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue(), mime


def _scale(image: Array) -> Array:
    size = round(image.shape[1] * HEIGHT / image.shape[0]), HEIGHT
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
