"""Frames are converted to RGB by the color space that the video names, with any release of PyAV."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spear.data.readers.video import read_frames

av: Any = pytest.importorskip("av")

HEIGHT_PX = 64
SQUARE_PX = 64  # width of the square of each color
COLORS = np.array([(220, 40, 40), (40, 200, 60), (40, 60, 210), (230, 210, 40), (128, 128, 128)])
"""The colors of the squares of the test image, from left to right: RGB, 0 … 255."""
LUMA_WEIGHTS = {
    "BT.709": (1, 0.2126, 0.0722),
    "BT.470BG": (5, 0.299, 0.114),
    "SMPTE 170M": (6, 0.299, 0.114),
    "SMPTE 240M": (7, 0.212, 0.087),
    "BT.2020": (9, 0.2627, 0.0593),
}
"""Name of a color space -> its number in FFmpeg, and the weights of red and blue in the luma."""
LIMITED_RANGE = 1  # FFmpeg's number: luma levels run from 16 to 235
FULL_RANGE = 2  # FFmpeg's number: luma levels run from 0 to 255


def convert_to_yuv420(rgb: np.ndarray, space: str, is_full: bool) -> np.ndarray:
    """Convert an image to YUV 4:2:0, which has U and V for every second pixel in each direction.

    Args:
        rgb: [h, w, 3] values 0 to 1.
        space: A key of `LUMA_WEIGHTS`.
        is_full: Whether levels use the full range 0 … 255.

    Returns:
        [1.5 h, w] uint8, the planes Y, U and V one after the other.
    """
    _, red_weight, blue_weight = LUMA_WEIGHTS[space]
    green_weight = 1 - red_weight - blue_weight
    luma = rgb @ np.array([red_weight, green_weight, blue_weight])  # [h, w]
    half_rgb = rgb[::2, ::2]  # [h / 2, w / 2, 3]
    half_luma = luma[::2, ::2]
    blue_difference = (half_rgb[..., 2] - half_luma) / (2 * (1 - blue_weight))
    red_difference = (half_rgb[..., 0] - half_luma) / (2 * (1 - red_weight))

    # In the limited range, luma has the levels 16 … 235 and chroma 16 … 240.
    luma_levels = luma * 255 if is_full else luma * (235 - 16) + 16
    chroma_range = 255 if is_full else 240 - 16
    blue_levels = chroma_range * blue_difference + 128
    red_levels = chroma_range * red_difference + 128
    planes = [luma_levels, blue_levels, red_levels]
    levels = np.concatenate([plane.reshape(-1) for plane in planes])
    width = rgb.shape[1]
    return np.clip(levels.round(), 0, 255).astype(np.uint8).reshape(-1, width)


def write_colors(path: Path, space: str, is_full: bool) -> None:
    """Write a video of one frame, in which squares of `COLORS` stand side by side."""
    line = np.repeat(COLORS / 255, SQUARE_PX, axis=0)  # [w, 3]
    rgb = np.repeat(line[None], HEIGHT_PX, axis=0)  # [h, w, 3]
    planes = convert_to_yuv420(rgb, space, is_full)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "5"})
        stream.width = rgb.shape[1]
        stream.height = HEIGHT_PX
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        for tagged in (stream.codec_context, frame):
            tagged.colorspace = LUMA_WEIGHTS[space][0]
            tagged.color_range = FULL_RANGE if is_full else LIMITED_RANGE
        frame.pts = 0
        frame.time_base = Fraction(1, 10)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("space", LUMA_WEIGHTS)
@pytest.mark.parametrize("is_full", [False, True], ids=["limited range", "full range"])
def test_colors_are_those_of_the_color_space(tmp_path: Path, space: str, is_full: bool) -> None:
    write_colors(tmp_path / "colors.mp4", space, is_full)

    ((_, image),) = read_frames(tmp_path / "colors.mp4", start_s=0.0, end_s=1.0)

    centers = image[HEIGHT_PX // 2, SQUARE_PX // 2 :: SQUARE_PX].astype(int)  # [5, 3]
    assert abs(centers - COLORS).max() <= 4  # compression changes levels a little
