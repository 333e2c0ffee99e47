"""Frames of videos at a rate, by PyAV; and where an EgoExo4D take keeps its videos."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.types import Array

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
"""Endings of files that are videos."""
FOLDER_OF_TAKE = "frame_aligned_videos"
"""In an EgoExo4D take: the folder with one video per camera, and smaller copies in `downscaled/448`."""
_NOT_COLOUR = re.compile(r"_(1201-[12]|211-1)\.mp4$")
"""Streams of the Aria glasses that are not its colour camera (214-1): those for tracking, and of the eyes."""


def is_take(folder: str) -> bool:
    """Whether a folder is an EgoExo4D take (`takes/<take_name>`)."""
    return os.path.isdir(os.path.join(folder, FOLDER_OF_TAKE))


def take_videos(folder: str) -> list[str]:
    """The videos of a take's colour cameras, by name: those of full size, or the smaller copies if only these
    are there."""
    videos = os.path.join(folder, FOLDER_OF_TAKE)
    for place in (videos, os.path.join(videos, "downscaled", "448")):
        names = sorted(os.listdir(place)) if os.path.isdir(place) else []
        found = [
            n for n in names if n.endswith(".mp4") and not n.startswith(".") and not _NOT_COLOUR.search(n)
        ]
        if found:
            return [os.path.join(place, name) for name in found]
    return []


def find_frames(path: str, rate: float) -> Iterator[tuple[int, float]]:
    """(frame number, time in s from the start) of the frames shown at times 0, 1/rate, 2/rate, … of a video.

    The frame number supposes a constant frame rate. No frame is listed twice, so a rate above the video's
    gives every frame once.

    Raises:
        SpearError: not a video, or one that does not say how long it is.
    """
    if rate <= 0:
        raise SpearError(f"video rate {rate}: give the frames per second, more than 0")
    with _open(path) as container:
        stream = container.streams.video[0]
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / 1e6
        else:
            raise SpearError(f"{path}: this video does not say how long it is: remux it to .mp4")
        per_second = float(stream.average_rate or stream.guessed_rate or rate)
    count = stream.frames or round(seconds * per_second)
    last = -1
    number = 0
    while (index := int(number / rate * per_second + 1e-6)) < count:
        if index != last:
            yield index, index / per_second
        last = index
        number += 1


def read_frames(path: str, times: Sequence[float]) -> Iterator[Array | SpearError]:
    """The frames [h, w, 3] uint8 RGB shown at rising `times` (s from the start), each decoded once.

    A time after the last frame that is there gives a `SpearError`; so do all times of a video that breaks.
    """
    import av

    wanted = list(times)
    with _open(path) as container:
        stream = container.streams.video[0]
        start = float((stream.start_time or 0) * stream.time_base)
        half = 0.5 / float(stream.average_rate or 1000)
        shown: Any = None
        try:
            container.seek(int((start + wanted[0]) / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                # The frame shown at a time is the last that does not come after it.
                while wanted and shown is not None and frame.time - start > wanted[0] + half:
                    yield _pixels(shown)
                    wanted.pop(0)
                if not wanted:
                    return
                shown = frame
        except av.FFmpegError as error:
            reason = f"{path}: broken video ({error.strerror}): copy it again"
        else:
            reason = f"{path}: the video ends before {{time:.2f}} s: copy it again"
            end = shown.time - start + 3 * half if shown is not None else -1.0
            while wanted and wanted[0] <= end:
                yield _pixels(shown)
                wanted.pop(0)
    for time in wanted:
        yield SpearError(reason.format(time=time))


def _pixels(frame: Any) -> Array:
    """[h, w, 3] uint8 RGB, turned as the camera (a phone held upright, say) has noted."""
    quarters = round(getattr(frame, "rotation", 0) / 90)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))


def _open(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise SpearError(f'{path}: videos need PyAV: pip install "spear-vla[label]"') from error
    try:
        container = av.open(path)
    except (av.FFmpegError, OSError) as error:
        raise SpearError(f"{path}: not a video ({error.strerror}): copy it again, or leave it out") from error
    if not container.streams.video:
        container.close()
        raise SpearError(f"{path}: no picture in this video: leave it out")
    return container
