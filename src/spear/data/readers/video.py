"""Videos, by PyAV: opened; and for LeRobot the frames of a stretch of one, and one made of frames."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError, import_optional
from spear.types import Array


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """PyAV's container and stream of a video. Raises SpearError for a bad file, and where it breaks off."""
    av = import_optional("av", "data", "a video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise SpearError(f"{path}: no picture in this video: leave it out")
            yield container, container.streams.video[0]
    except av.FFmpegError as error:
        why = (
            "no such video"
            if isinstance(error, FileNotFoundError)
            else f"broken video ({error.strerror})"
        )
        raise SpearError(f"{path}: {why}: copy it again, or leave it out") from error


def read_frames(path: Path, first: float, end: float) -> Iterator[tuple[float, Array]]:
    """(time in s, frame [h, w, 3] uint8 RGB) of all frames of a video with first <= time < end.

    Raises SpearError as `open_video` does.
    """
    with open_video(path) as (container, stream):
        if first > 0:
            container.seek(int(first / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time is None or frame.time >= end:
                return
            if frame.time >= first:
                yield frame.time, frame.to_ndarray(format="rgb24")


class VideoWriter:
    """An AV1 video in an MP4 file, with the settings of LeRobot (crf 30, a key frame every second frame).

    frames, bytes   what was written so far. The file is complete when the writer is closed.
    """

    def __init__(self, path: Path, height: int, width: int, rate_hz: float) -> None:
        if height % 2 or width % 2 or min(height, width) < 64:
            why = f"no video of {width} x {height} pixels: AV1 needs even sides of at least 64"
            raise SpearError(f"{why}: write images, or prepare the data first, with --size")
        av = import_optional("av", "data", "a video")
        if "libsvtav1" not in av.codecs_available:
            raise SpearError(
                "this PyAV has no AV1 encoder: write images, or pip install --upgrade av"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self.frames = self.bytes = 0
        os.environ.setdefault("SVT_LOG", "1")  # the encoder prints its settings otherwise
        self._container = av.open(str(path), "w", format="mp4")
        rate = Fraction(rate_hz).limit_denominator(1000)
        options = {"crf": "30", "g": "2", "preset": "10", "svtav1-params": "lp=1"}
        stream: Any = self._container.add_stream("libsvtav1", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        self._stream, self._frame = stream, av.VideoFrame.from_ndarray

    def write(self, image: Array) -> None:
        """Append a frame [h, w, 3] uint8 RGB."""
        frame = self._frame(np.ascontiguousarray(image), format="rgb24")
        with (
            nullcontext() if self.frames else _as_urgent_as_before()
        ):  # the first frame starts the encoder
            self._mux(self._stream.encode(frame))
        self.frames += 1

    def _mux(self, packets: Any) -> None:
        self.bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def close(self) -> None:
        """Write out what is waiting, and end the file."""
        if self.frames:
            self._mux(self._stream.encode())
        self._container.close()


@contextmanager
def _as_urgent_as_before() -> Iterator[None]:
    """All threads get the scheduling that the calling one has now (Linux).

    SVT-AV1, started by root, makes its threads and its caller's real-time ones: nothing else would run.
    """
    if not hasattr(os, "sched_setscheduler"):
        yield
        return
    policy, urgency = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        for thread in map(int, os.listdir("/proc/self/task")):
            with suppress(OSError):  # it has ended
                os.sched_setscheduler(thread, policy, urgency)
