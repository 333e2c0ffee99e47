"""Videos have the colors of their color space, with every release of PyAV."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spear.data.readers.video import read_frames

av: Any = pytest.importorskip("av")

HEIGHT_PX = 64
SQUARE_PX = 64
COLORS = np.array([(220, 40, 40), (40, 200, 60), (40, 60, 210), (230, 210, 40), (128, 128, 128)])
LUMA_WEIGHTS = {
    "BT.709": (1, 0.2126, 0.0722),
    "BT.470BG": (5, 0.299, 0.114),
    "SMPTE 170M": (6, 0.299, 0.114),
    "SMPTE 240M": (7, 0.212, 0.087),
    "BT.2020": (9, 0.2627, 0.0593),
}
"""Name of a color space -> its number in FFmpeg, and the weights of red and blue in the luma."""


def convert_to_yuv420(rgb: np.ndarray, space: str, is_full: bool) -> np.ndarray:
    """[1.5 h, w] uint8: the planes Y, U and V of an image [h, w, 3] of values 0 to 1."""
    _, red_weight, blue_weight = LUMA_WEIGHTS[space]
    luma = rgb @ np.array([red_weight, 1 - red_weight - blue_weight, blue_weight])
    blue = (rgb[::2, ::2, 2] - luma[::2, ::2]) / (2 * (1 - blue_weight))
    red = (rgb[::2, ::2, 0] - luma[::2, ::2]) / (2 * (1 - red_weight))
    luma_levels = luma * 255 if is_full else luma * 219 + 16
    chroma_range = 255 if is_full else 224
    planes = [luma_levels, chroma_range * blue + 128, chroma_range * red + 128]
    levels = np.concatenate([plane.reshape(-1) for plane in planes])
    return np.clip(levels.round(), 0, 255).astype(np.uint8).reshape(-1, rgb.shape[1])


def write_colors(path: Path, space: str, is_full: bool) -> None:
    """Write a video of one frame, whose squares have `COLORS`."""
    rgb = np.repeat(COLORS / 255, SQUARE_PX, axis=0)[None].repeat(HEIGHT_PX, axis=0)
    planes = convert_to_yuv420(rgb, space, is_full)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width = rgb.shape[1]
        stream.height = HEIGHT_PX
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        for tagged in (stream.codec_context, frame):
            tagged.colorspace = LUMA_WEIGHTS[space][0]
            tagged.color_range = 2 if is_full else 1
        frame.pts = 0
        frame.time_base = Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("space", LUMA_WEIGHTS)
@pytest.mark.parametrize("is_full", [False, True], ids=["limited range", "full range"])
def test_colors_are_those_of_the_color_space(tmp_path: Path, space: str, is_full: bool) -> None:
    write_colors(tmp_path / "colors.mp4", space, is_full)

    ((_, image),) = read_frames(tmp_path / "colors.mp4", 0.0, 1.0)

    centers = image[HEIGHT_PX // 2, SQUARE_PX // 2 :: SQUARE_PX].astype(int)
    assert abs(centers - COLORS).max() <= 4
