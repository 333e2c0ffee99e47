"""The images in files, as items: listed one after the other, each with a key that stays the same.

An `Item` says where an image is and how to read it, and contains no pixels, so listing is cheap and
any process can read any item. `list_images` lists image files, folders, globs, tar shards, Parquet
files and videos. `spear.labels.sources` lists robot episodes, RGB-D scenes and scenes of the
simulator.
"""

import glob
import hashlib
import os
import pickle
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import chain, count, groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from spear.data.readers.video import open_video, to_rgb
from spear.errors import RetryableError, SpearError, notice
from spear.labels.store import explain_read_errors
from spear.types import Array, Frame
from spear.util.files import refuse_lfs_pointer
from spear.util.images import IMAGE_SUFFIXES, can_open_image

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
UNSUPPORTED_SUFFIX = re.compile(
    r"\.(hei[cf]|hif|avif|jxl|jp2|gif|raw|dng|cr[23]|nef|arw|orf|rw2|exr|p[gn]m|tga"
    r"|3g[p2]|mpe?g|m?ts|wmv|flv|ogv|t?[gx]z|bz2|zip|7z|rar)"
)
"""Suffixes of files that may contain pictures. In folders they are ignored, and a notice names
them, except for those in `IMAGE_SUFFIXES`."""
TAKE_VIDEO_FOLDER = "frame_aligned_videos"
"""The folder of an EgoExo4D take with one video per camera, and smaller copies in
`downscaled/448`."""
_NOT_COLOR_CAMERA = re.compile(r"_(1201-[12]|211-1)\.mp4$")
"""Streams of the Aria glasses that are not the color camera (214-1) but track, or show the eyes."""

Content = bytes | Array | Frame | SpearError
"""What a reader gives: an encoded image, pixels [h, w, 3] uint8 RGB, a frame, or why there is
none."""
Reader = Callable[[str, Sequence[Any]], Iterator[Content]]
"""(path, locations in it) → the content of each location. A function of a module, for other
processes."""


class Item(NamedTuple):
    """An image that is not read yet.

    Attributes:
        key: Names the image, and stays the same from run to run; the source of its label.
        reader: Reads it, together with the items next to it of the same path.
        path: The file or folder that it is in.
        location: Where in there; None for a file with one image.
        stamp: The stamp of the file or folder. While it is the same, so is the image. None where
            nothing can change.
    """

    key: str
    reader: Reader
    path: str
    location: Any = None
    stamp: str | None = None


def compute_stamp(*paths: str | Path) -> str:
    """Sizes (bytes) and modification times (ns) of files.

    The copy of a file has another stamp than the file; `hash_content` tells whether the contents
    are equal.
    """
    stats = [os.stat(path) for path in paths]
    return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def list_images(
    argument: str, rate: float = 1.0, excluded_folder: Path | None = None
) -> Iterator[Item]:
    """List the images behind one argument, in an order that stays the same, without reading them.

    Args:
        argument: An image (whatever its suffix), a tar shard, a Parquet file with images, a video,
            a folder of any of these, or a glob of all that. Of a folder, hidden files, files of
            other kinds and folders of labels are ignored. An EgoExo4D take gives the frames of its
            cameras.
        rate: Frames per second of video.
        excluded_folder: A folder that is not entered.

    Raises:
        SpearError: There is nothing, or no image in it, or an archive cannot be listed.
    """
    listing = _Listing(rate)
    if excluded_folder:
        listing.entered_folders.add(os.path.realpath(excluded_folder))
    paths = [argument] if os.path.exists(argument) else _match_pattern(argument)

    has_images = False
    for path in paths:
        # A folder comes before what is in it, which has been listed then.
        if path != argument and listing.has_entered_parent(path):
            continue
        if path == argument and _is_image_of_other_suffix(path):
            items = iter([_make_file_item(path)])
        else:
            items = listing.list_path(path)
        for item in items:
            has_images = True
            yield item

    if not has_images:
        suffixes = ", ".join(IMAGE_SUFFIXES)
        raise SpearError(
            f"{argument} contains no images. Give image files ({suffixes}), .tar or .parquet "
            "files, or videos."
        )
    if listing.num_unsupported:
        kinds = [f"{number} {suffix}" for suffix, number in sorted(listing.num_unsupported.items())]
        notice(
            f"{argument} contains files of unsupported formats ({', '.join(kinds)}), which were "
            "ignored. "
            "Convert or unpack them."
        )


def _is_image_of_other_suffix(path: str) -> bool:
    """Whether a file that was named by itself is an image, though folders are not searched for
    files of its suffix."""
    suffix = os.path.splitext(path)[1].lower()
    has_own_reader = suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".tar", ".parquet")
    return os.path.isfile(path) and not has_own_reader and can_open_image(path)


def _make_file_item(path: str) -> Item:
    stamp = compute_stamp(path) if os.path.isfile(path) else None
    return Item(path, read_file, path, stamp=stamp)


def _match_pattern(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        raise SpearError(f"{pattern} does not exist. Give an existing file or folder.")
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise SpearError(f"{pattern} matches no file. Check the pattern.")
    return matches


class _Listing:
    """Lists files and folders, and counts the files that it ignores.

    It enters no folder twice, since links may lead back.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.entered_folders: set[str] = set()
        self.num_unsupported = Counter[str]()

    def has_entered_parent(self, path: str) -> bool:
        parents = Path(os.path.realpath(path)).parents
        return any(str(parent) in self.entered_folders for parent in parents)

    def list_path(self, path: str) -> Iterator[Item]:
        """The items of a folder, or of a file according to its suffix; none for another suffix."""
        suffix = os.path.splitext(path)[1].lower()
        if suffix not in IMAGE_SUFFIXES and UNSUPPORTED_SUFFIX.fullmatch(suffix):
            self.num_unsupported[suffix] += 1
        if os.path.isdir(path):
            yield from self._list_folder(path)
        elif suffix in IMAGE_SUFFIXES:
            yield _make_file_item(path)
        elif suffix == ".tar":
            yield from list_tar(path)
        elif suffix == ".parquet":
            yield from list_parquet(path)
        elif suffix in VIDEO_SUFFIXES:
            yield from list_video_frames(path, self.rate)

    def _list_folder(self, path: str) -> Iterator[Item]:
        real_path = os.path.realpath(path)
        if real_path in self.entered_folders:
            return
        self.entered_folders.add(real_path)

        has_run = os.path.isfile(os.path.join(path, "run.json"))
        if has_run and any(Path(path).rglob("labels-*.parquet")):
            notice(
                f"{path} contains labels and was ignored. To label its images, give its "
                "labels-*.parquet."
            )
            return

        take_folder = os.path.join(path, TAKE_VIDEO_FOLDER)
        if os.path.isdir(take_folder):
            for video in _find_take_videos(take_folder):
                yield from list_video_frames(video, self.rate)
            return
        for name in sorted(os.listdir(path)):
            if not name.startswith("."):
                yield from self.list_path(os.path.join(path, name))


def _find_take_videos(folder: str) -> list[str]:
    """The videos of a take's color cameras: of full size, or the smaller copies if there are no
    others."""
    for video_folder in (folder, os.path.join(folder, "downscaled", "448")):
        names = []
        for name in glob.glob("*.mp4", root_dir=video_folder):
            if not _NOT_COLOR_CAMERA.search(name):
                names.append(name)
        if names:
            return [os.path.join(video_folder, name) for name in sorted(names)]
    return []


def read_file(path: str, locations: Sequence[None]) -> Iterator[Content]:
    """Read an image file."""
    for _ in locations:
        yield Path(path).read_bytes()


def list_tar(path: str) -> Iterator[Item]:
    """List the images in an uncompressed tar file (a WebDataset shard, for instance)."""
    try:
        with tarfile.open(path, "r:") as tar:
            stamp = compute_stamp(path)
            for member in tar:
                suffix = os.path.splitext(member.name)[1].lower()
                if member.isfile() and suffix in IMAGE_SUFFIXES:
                    location = (member.offset_data, member.size)
                    yield Item(f"{path}/{member.name}", read_tar, path, location, stamp)
                tar.members = []  # type: ignore[attr-defined] # this list would grow without end
            _check_tar_ends(tar)
    except (tarfile.TarError, OSError) as error:
        refuse_lfs_pointer(Path(path), path)
        raise SpearError(
            f"{path} is not a complete, uncompressed tar file ({error}). Copy it again, or "
            "unpack it."
        ) from error


def _check_tar_ends(tar: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` unless a tar file ends as it should.

    tarfile itself takes a broken header for the end.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("it ends within a file")


def read_tar(path: str, locations: Sequence[tuple[int, int]]) -> Iterator[Content]:
    """Read images in a tar file, by (offset, size) in bytes."""
    with open(path, "rb") as file:
        for offset, size in locations:
            file.seek(offset)
            yield file.read(size)


def list_parquet(path: str) -> Iterator[Item]:
    """List the images in a Parquet file, such as Hugging Face `datasets` writes.

    It has one column of encoded images, and each row is an item.
    """
    with explain_read_errors(Path(path), "Copy it again, or leave it out."):
        file = pq.ParquetFile(path)
    column = _find_image_column(file.schema_arrow, path)
    stamp = compute_stamp(path)
    number = 0
    for group in range(file.num_row_groups):
        for row in range(file.metadata.row_group(group).num_rows):
            yield Item(f"{path}#{number}", read_parquet, path, (column, group, row), stamp)
            number += 1


def read_parquet(path: str, locations: Sequence[tuple[str, int, int]]) -> Iterator[Content]:
    """Read images in a Parquet file, by (column, row group, row in it)."""
    for column, group, row in locations:
        value = read_row_group(path, column, group)[row].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, bytes):
            yield value
        else:
            yield SpearError("this row contains no image. Fill it in.")


@lru_cache(maxsize=1)
def read_row_group(path: str, column: str, group: int) -> pa.ChunkedArray:
    """One column of a row group; the last one is cached, since neighbors are read one after the
    other."""
    return pq.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False)[column]


def _find_image_column(schema: pa.Schema, path: str) -> str:
    """The column named image, or the only one of bytes (as they are, or as {bytes, path})."""
    columns = [field.name for field in schema if _contains_images(field.type)]
    if "image" in columns:
        return "image"
    if len(columns) == 1:
        return str(columns[0])
    problem = "has no column of image bytes"
    if columns:
        problem = f"has several columns of bytes ({', '.join(columns)})"
    raise SpearError(f"{path} {problem}. Name the one with the images `image`.")


def _contains_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _contains_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def list_video_frames(path: str, rate: float) -> Iterator[Item]:
    """List the frames of a video that are shown at 0, 1/rate, 2/rate, … s.

    The frame number, which is part of the key, supposes a constant frame rate. A rate above the
    video's gives every frame once.

    Args:
        path: The video.
        rate: Frames per second.

    Raises:
        SpearError: The file is not a video, or does not say how long it is.
    """
    with open_video(path) as (container, stream):
        video_rate = float(stream.average_rate or stream.guessed_rate or rate)
        num_frames = stream.frames or round(_measure_duration_s(container, stream) * video_rate)
    if not num_frames:
        raise SpearError(f"{path} does not say how long the video is. Remux it to .mp4.")
    stamp = compute_stamp(path)
    indices = (int(number / rate * video_rate + 1e-6) for number in count())
    for index, _ in groupby(indices):
        if index >= num_frames:
            return
        yield Item(f"{path}#{index}", read_video_frames, path, index / video_rate, stamp)


def _measure_duration_s(container: Any, stream: Any) -> float:
    """Measure how long the pictures of an opened video last, s; 0 if nothing says it.

    The duration of the container is that of its longest stream, which may be sound, and the last
    picture of a screen recording may stay for seconds. Therefore the last packets are looked up.
    """
    if not container.duration:
        return 0.0

    container.seek(container.duration)  # to the last picture that can be decoded alone
    start = stream.start_time or 0
    end = start
    for packet in container.demux(stream):
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
    return float((end - start) * stream.time_base)


def read_video_frames(path: str, times: Sequence[float]) -> Iterator[Array]:
    """Read the frames of a video that are shown at some times, each decoded once.

    Args:
        path: The video.
        times: Rising times, in seconds.

    Yields:
        For each time, the frame [h, w, 3] uint8 RGB.

    Raises:
        SpearError: A time is after the last frame, or the video is broken there.
    """
    remaining_times = list(times)
    with open_video(path) as (container, stream):
        start_s = float((stream.start_time or 0) * stream.time_base)
        half_frame_s = 0.5 / float(stream.average_rate or 1000)
        first = int((start_s + remaining_times[0]) / stream.time_base)
        container.seek(first, stream=stream)

        # The frame shown at a time is the last that does not come after it.
        frames = chain(container.decode(stream), [None])
        for frame, next_frame in pairwise(frames):
            if next_frame is None:
                last_end_s = start_s + _measure_duration_s(container, stream)
                end_s = max(last_end_s, frame.time + 3 * half_frame_s)
            else:
                end_s = next_frame.time - half_frame_s
            while remaining_times and remaining_times[0] < end_s - start_s:
                yield _to_pixels(frame, stream)
                remaining_times.pop(0)
            if not remaining_times:
                return
    raise SpearError(
        f"{path} ends before {remaining_times[0]:.2f} s, earlier than its header says. Write its "
        "header anew with `ffmpeg -i FILE -c copy NEW_FILE`, or leave it out."
    )


def _to_pixels(frame: Any, stream: Any) -> Array:
    """A frame of PyAV as [h, w, 3] uint8 RGB, in square pixels, turned as the camera has noted."""
    num_quarter_turns = round(getattr(frame, "rotation", 0) / 90)  # of a phone held upright, say
    width = round(frame.width * (stream.sample_aspect_ratio or 1))
    pixels = to_rgb(frame, width)
    return np.ascontiguousarray(np.rot90(pixels, num_quarter_turns))


def hash_content(content: Content) -> str:
    """A short hash of what a reader gives."""
    return hashlib.sha256(pickle.dumps(content, protocol=5)).hexdigest()[:16]


def read_contents(items: Iterable[Item]) -> Iterator[Content]:
    """Read the contents of items; where a reader breaks down, its error takes the place of what is
    missing.

    Args:
        items: In the order in which they were listed, so that neighbors in one file are read
            together.
    """
    for (reader, path), group in groupby(items, key=lambda item: (item.reader, item.path)):
        locations = [item.location for item in group]
        num_missing = len(locations)
        reason = SpearError("the file ends before this image. Copy it again.")
        try:
            for content in reader(path, locations):
                num_missing -= 1
                yield content
        except SpearError as error:
            reason = error
        except OSError as error:
            reason = RetryableError(f"cannot be read: {error.strerror or error}")
        except pa.ArrowException as error:
            reason = SpearError(f"cannot be read: {error}")
        yield from [reason] * num_missing
