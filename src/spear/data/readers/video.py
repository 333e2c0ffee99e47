"""Reads and writes videos with PyAV, Python's interface to FFmpeg."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError, import_optional
from spear.types import Array
from spear.util.files import advise_on_downloaded_file_error, refuse_lfs_pointer

ENCODER = "libsvtav1"
ENCODER_OPTIONS = {"crf": "30", "g": "2", "preset": "10", "svtav1-params": "lp=1"}
"""LeRobot's settings, with a key frame every second frame ("g"), and one thread ("lp"), which makes
the bytes reproducible."""
MIN_SIDE_PX = 64  # the smallest height or width that the AV1 encoder accepts
COLOR_SPACES_WITHOUT_MATRIX = (0, 2)  # FFmpeg's numbers of RGB and of "not specified"
LIMITED_RANGE = 1  # FFmpeg's number of color values 16 … 235
FULL_RANGE = 2  # FFmpeg's number of color values 0 … 255


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """Open a video. The value of the `with` block is PyAV's container and its stream of pictures.

    Raises:
        SpearError: If the file is missing or broken. If the file breaks off later, the error is
            raised in the `with` block, where frames are read.
    """
    av = import_optional("av", extra="data", feature="a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SpearError(f"the video {path} has no picture. Leave it out.")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        refuse_lfs_pointer(Path(path), path)  # the file, and its name in the message
        reason = str(error.strerror)
        if isinstance(error, FileNotFoundError):
            reason = "there is no such file"
        raise SpearError(
            f"the video {path} cannot be read ({reason}). {advise_on_downloaded_file_error(error)}"
        ) from error


def read_frames(path: Path, start_s: float, end_s: float) -> Iterator[tuple[float, Array]]:
    """Yield (time in s, frame [h, w, 3] uint8 RGB) of all frames with start_s <= time < end_s.

    Raises SpearError as `open_video` does.
    """
    with open_video(path) as (container, stream):
        if start_s > 0:
            container.seek(int(start_s / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is None or frame.time >= end_s:
                return
            if frame.time >= start_s:
                yield frame.time, to_rgb(frame)


def to_rgb(frame: Any, stretched_width_px: int | None = None) -> Array:
    """Convert a frame of PyAV to [h, w, 3] uint8 RGB by the color space that the video names.

    The color space names the matrix that converts YUV to RGB, for example BT.709 for every HD
    camera. PyAV before 17 ignores this matrix unless the color ranges of source and target differ.
    So the target's range, which means nothing for RGB, is set to the range that the source does
    not have.

    Args:
        frame: The frame.
        stretched_width_px: The width to which the frame is stretched; None for its own width. The
            height stays.
    """
    color_ranges: dict[str, int] = {}
    if frame.colorspace not in COLOR_SPACES_WITHOUT_MATRIX:
        is_full_range = frame.color_range == FULL_RANGE
        color_ranges["src_color_range"] = FULL_RANGE if is_full_range else LIMITED_RANGE
        color_ranges["dst_color_range"] = LIMITED_RANGE if is_full_range else FULL_RANGE
    pixels: Array = frame.to_ndarray(format="rgb24", width=stretched_width_px, **color_ranges)
    return pixels


class VideoWriter:
    """Writes an AV1 video to an MP4 file, with the settings of LeRobot.

    The file is complete when the writer is closed.

    Attributes:
        num_frames: The number of frames written so far.
        num_bytes: The number of bytes encoded so far.
    """

    def __init__(self, path: Path, height: int, width: int, rate_hz: float) -> None:
        if height % 2 or width % 2 or min(height, width) < MIN_SIDE_PX:
            raise SpearError(
                f"images of {width} x {height} pixels cannot become a video, because AV1 needs "
                f"even sides of at least {MIN_SIDE_PX}. Write images, or prepare the data "
                "first, with --image-size."
            )
        av = import_optional("av", extra="data", feature="a video")
        if ENCODER not in av.codecs_available:
            raise SpearError(
                "this PyAV has no AV1 encoder. Write images, or run pip install --upgrade av."
            )

        path.parent.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # keeps the encoder from printing its settings
        self.num_frames = 0
        self.num_bytes = 0
        self._container = av.open(str(path), "w", format="mp4")
        rate = Fraction(rate_hz).limit_denominator(1000)
        self._stream: Any = self._container.add_stream(ENCODER, rate=rate, options=ENCODER_OPTIONS)
        self._stream.width = width
        self._stream.height = height
        self._stream.pix_fmt = "yuv420p"
        self._make_frame = av.VideoFrame.from_ndarray

    def write(self, image: Array) -> None:
        """Append a frame [h, w, 3] uint8 RGB."""
        frame = self._make_frame(np.ascontiguousarray(image), format="rgb24")
        # The first frame starts the encoder's threads.
        starts_encoder = self.num_frames == 0
        scheduling = _keep_scheduling() if starts_encoder else nullcontext()
        with scheduling:
            packets = self._stream.encode(frame)
            self._mux(packets)
        self.num_frames += 1

    def _mux(self, packets: Any) -> None:
        """Write encoded packets to the file. The encoder may hold frames back and give none."""
        self.num_bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def close(self) -> None:
        """Write the frames that the encoder still holds, and end the file."""
        if self.num_frames:
            self._mux(self._stream.encode())
        self._container.close()


@contextmanager
def _keep_scheduling() -> Iterator[None]:
    """After the `with` block, restore the scheduling that the calling thread had before (Linux).

    All threads of the process get this scheduling. The reason is SVT-AV1: if root starts it, it
    makes its own threads and the calling thread real-time threads, and no other process would run.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return

    policy = os.sched_getscheduler(0)
    parameters = os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # the thread has ended
                os.sched_setscheduler(int(thread), policy, parameters)
