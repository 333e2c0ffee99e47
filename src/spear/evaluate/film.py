"""Films of episodes: both cameras side by side, with instruction and outcome written above."""

import functools
import io
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from spear.errors import SpearError, import_optional
from spear.types import Array

# Height of the images in a film. It is twice the height of the external camera's image, so that
# this image is enlarged by a whole factor.
HEIGHT_PX = 420
BAR_HEIGHT_PX = 44  # of the caption bar
MARGIN_PX = 14  # distance of text from the sides of the film
BADGE_WIDTH_PX = 120  # room for the outcome at the right end of the caption bar
MIN_FONT_PX = 11  # for the longest captions
MAX_FONT_PX = 24

# Colors as (red, green, blue).
GREEN = (88, 214, 141)
RED = (255, 121, 108)
WHITE = (245, 246, 248)
GREY = (30, 33, 39)


def import_pyav() -> Any:
    """Import PyAV.

    Raises:
        SpearError: PyAV is missing, or was built without the H.264 encoder, which every wheel on
            PyPI has.
    """
    av = import_optional("av", extra="report", feature="a film")
    if "libx264" not in av.codecs_available:
        raise SpearError("this PyAV has no H.264 encoder for a film. Run pip install --upgrade av.")
    return av


def compose_frame(
    external: Array, wrist: Array | None, caption: str, success: bool | None = None
) -> Array:
    """Compose one frame of a film.

    The external view is on the left, the wrist view on the right, and the caption bar above them.

    Args:
        external: [h, w, 3] uint8 image of the external camera.
        wrist: [h, w, 3] uint8 image of the wrist camera; None if there is none.
        caption: Text at the left of the caption bar.
        success: Whether the episode succeeded, which is written at the right of the caption bar;
            None while the episode goes on.

    Returns:
        [h, w, 3] uint8 with even height and width, as H.264 requires.
    """
    views = [_scale_to_film_height(external)]
    if wrist is not None:
        views.append(_scale_to_film_height(wrist))
    image = np.concatenate(views, axis=1)
    width = image.shape[1]
    even_width = width + width % 2
    frame = Image.new("RGB", (even_width, HEIGHT_PX + BAR_HEIGHT_PX), GREY)
    frame.paste(Image.fromarray(image), (0, BAR_HEIGHT_PX))

    # The caption ends before the badge; without a badge, 20 px before the right side.
    right_space_px = 20 if success is None else BADGE_WIDTH_PX
    font = _choose_largest_fitting_font(caption, frame.width - right_space_px - MARGIN_PX)
    draw = ImageDraw.Draw(frame)
    # Anchors: "lm" is the middle of the text's left side, "rm" of its right side.
    draw.text((MARGIN_PX, BAR_HEIGHT_PX // 2), caption, WHITE, font, anchor="lm")
    if success is not None:
        badge = "success" if success else "failure"
        color = GREEN if success else RED
        position = (frame.width - MARGIN_PX, BAR_HEIGHT_PX // 2)
        draw.text(position, badge, color, _load_font(MAX_FONT_PX), anchor="rm")
    return np.asarray(frame)


def encode_film(frames: Iterable[Array], rate_hz: float) -> bytes:
    """Encode a film as an MP4 file with H.264.

    The last frame stays for a second, so that a film in a loop shows its outcome.

    Args:
        frames: Frames [h, w, 3] uint8, all of one size.
        rate_hz: Frames per second.

    Returns:
        The bytes of the file.

    Raises:
        SpearError: The encoder is missing, see `import_pyav`.
    """
    av = import_pyav()
    buffer = io.BytesIO()
    rate = Fraction(rate_hz).limit_denominator(1000)
    with av.open(buffer, "w", format="mp4") as container:
        # x264's quality (0 is lossless, 51 the worst), and its compromise of speed and file size.
        options = {"crf": "26", "preset": "veryfast"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        for index, image in enumerate(frames):
            if index == 0:
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = "yuv420p"
            frame = np.ascontiguousarray(image)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for _ in range(round(rate_hz)):  # the last frame again, for a second
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # the packets that the encoder still buffers
    return buffer.getvalue()


def _scale_to_film_height(image: Array) -> Array:
    """Scale an image [h, w, 3] to the height `HEIGHT_PX`, with the same aspect ratio."""
    width = round(image.shape[1] * HEIGHT_PX / image.shape[0])
    return np.asarray(Image.fromarray(image).resize((width, HEIGHT_PX), Image.Resampling.LANCZOS))


def _choose_largest_fitting_font(
    text: str, width_px: int
) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the largest font in which a text fits into a width; the smallest font if none does."""
    for size in range(MAX_FONT_PX, MIN_FONT_PX, -1):
        font = _load_font(size)
        if font.getlength(text) <= width_px:
            return font
    return _load_font(MIN_FONT_PX)


@functools.cache
def _load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
