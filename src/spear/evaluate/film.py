"""Films of episodes: both cameras side by side, with the instruction and the outcome written above
them.
"""

import functools
import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spear.errors import SpearError, import_optional
from spear.types import Array

HEIGHT = (
    420  # px, of the images in a film: twice the external camera's, so that it upscales cleanly
)
BAR = 44  # px, height of the caption bar
MARGIN_PX = 14  # between text and the sides of the film
BADGE_WIDTH_PX = 120  # room for the outcome
MIN_FONT_SIZE = 11
MAX_FONT_SIZE = 24

GREEN = (88, 214, 141)
RED = (255, 121, 108)
WHITE = (245, 246, 248)
GREY = (30, 33, 39)


def import_encoder() -> Any:
    """Import PyAV. Raises `SpearError` if it is missing, or was built without H.264, as PyPI's
    never is.
    """
    av = import_optional("av", "report", "a film")
    if "libx264" not in av.codecs_available:
        raise SpearError("a film: this PyAV has no H.264 encoder: pip install --upgrade av")
    return av


def compose_frame(
    external: Array, wrist: Array | None, caption: str, success: bool | None = None
) -> Array:
    """Compose one frame of a film, [h, w, 3] uint8 with even sides.

    The external view is on the left, the wrist view on the right, `caption` above them, and the
    outcome where the episode has ended.

    success: Whether the episode succeeded; None while it goes on.
    """
    views = [_scale_to_height(external)]
    if wrist is not None:
        views.append(_scale_to_height(wrist))
    image = np.concatenate(views, axis=1)
    width = image.shape[1]
    frame = Image.new("RGB", (width + width % 2, HEIGHT + BAR), GREY)
    frame.paste(Image.fromarray(image), (0, BAR))

    badge_width = 20 if success is None else BADGE_WIDTH_PX
    font = _fit_font(caption, frame.width - badge_width - MARGIN_PX)
    draw = ImageDraw.Draw(frame)
    draw.text((MARGIN_PX, BAR // 2), caption, WHITE, font, anchor="lm")
    if success is not None:
        badge = "success" if success else "failure"
        color = GREEN if success else RED
        position = (frame.width - MARGIN_PX, BAR // 2)
        draw.text(position, badge, color, _load_font(MAX_FONT_SIZE), anchor="rm")
    return np.asarray(frame)


def encode_film(frames: Iterable[Array], rate_hz: float) -> bytes:
    """Encode frames [h, w, 3] uint8 of one size as an MP4 file with H.264.

    The last frame stays for a second, so that a looping film shows its outcome. Raises as
    `import_encoder`.
    """
    av = import_encoder()
    buffer = io.BytesIO()
    rate = Fraction(rate_hz).limit_denominator(1000)
    with av.open(buffer, "w", format="mp4") as container:
        options = {"crf": "26", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        for index, image in enumerate(frames):
            if index == 0:
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = np.ascontiguousarray(image)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for _ in range(round(rate_hz)):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def _scale_to_height(image: Array) -> Array:
    width = round(image.shape[1] * HEIGHT / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, HEIGHT), Image.Resampling.LANCZOS))


def _fit_font(text: str, width_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font in which a text is at most so wide; the smallest if none is."""
    for size in range(MAX_FONT_SIZE, MIN_FONT_SIZE, -1):
        font = _load_font(size)
        if font.getlength(text) <= width_px:
            return font
    return _load_font(MIN_FONT_SIZE)


@functools.cache
def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
