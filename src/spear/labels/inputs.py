"""Listing the images in files as items, and reading the images of items.

An `Item` says where an image is and how to read it, and contains no pixels, so listing is cheap and
any process can read any item. An item's key names the image and stays the same from run to run.
`list_images` lists image files, folders, globs, tar shards, Parquet files and videos.
`spear.labels.sources` lists robot episodes, RGB-D scenes and scenes of the simulator.
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
from spear.labels.store import translate_read_errors
from spear.types import Array, Frame
from spear.util.files import refuse_lfs_pointer
from spear.util.images import IMAGE_SUFFIXES, can_open_image

COMPRESSED_STARTS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd")  # gzip, bzip2, xz, zstd
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
UNSUPPORTED_SUFFIX = re.compile(
    r"\.(hei[cf]|hif|avif|jxl|jp2|gif|raw|dng|cr[23]|nef|arw|orf|rw2|exr|p[gn]m|tga"
    r"|3g[p2]|mpe?g|m?ts|wmv|flv|ogv|t?[gx]z|bz2|zip|7z|rar)"
)
"""Suffixes of image and video formats and of archives that are not supported. Files with these
suffixes in folders are ignored with a notice. `IMAGE_SUFFIXES` takes precedence: a suffix in both
is supported."""
TAKE_VIDEO_FOLDER = "frame_aligned_videos"
"""The folder of an EgoExo4D take (a recording) with one video per camera. Smaller copies are in the
folder's `downscaled/448`."""
_NOT_COLOR_CAMERA = re.compile(r"_(1201-[12]|211-1)\.mp4$")
"""Names of the videos that the Aria glasses' tracking cameras and eye cameras took. The glasses'
color camera is 214-1."""

Content = bytes | Array | Frame | SpearError
"""What a reader yields for an item: an encoded image, pixels [h, w, 3] uint8 RGB, a frame, or the
error why the image cannot be read."""
Reader = Callable[[str, Sequence[Any]], Iterator[Content]]
"""(path, locations in the file or folder at this path) → the content of each location. A reader is
a function of a module, so that it can be pickled for other processes."""


class Item(NamedTuple):
    """An image that is not read yet.

    Attributes:
        key: Names the image, and stays the same from run to run; it becomes the label's source.
        reader: The function that reads the image, together with neighboring items of the same path.
        path: The file or folder that contains the image.
        location: Where the image is in the file or folder; None for a file with one image.
        stamp: Sizes and modification times of the file or folder (`make_file_stamp`). While the
            stamp is the same, so is the image. None for images that are rendered, which never
            change.
    """

    key: str
    reader: Reader
    path: str
    location: Any = None
    stamp: str | None = None


def make_file_stamp(*paths: str | Path) -> str:
    """The sizes (bytes) and modification times (ns) of files, as text.

    A copy of a file has another stamp than the file, although their contents are equal. To compare
    contents, use `hash_content`.
    """
    stats = [os.stat(path) for path in paths]
    return " ".join(f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)


def list_images(
    argument: str, rate: float = 1.0, excluded_folder: Path | None = None
) -> Iterator[Item]:
    """List the images behind one argument, in an order that stays the same, without reading them.

    Args:
        argument: An image (whatever its suffix), a tar shard, a Parquet file with images, a video,
            a folder that contains any of these, or a glob that matches any of these. In a folder,
            hidden files, files of other kinds and folders of labels are ignored. For an EgoExo4D
            take, the frames of its cameras are listed.
        rate: How many frames per second of a video are listed.
        excluded_folder: A folder that is ignored.

    Raises:
        SpearError: The argument does not exist or contains no image, or an archive is broken.
    """
    listing = _Listing(rate)
    if excluded_folder:
        listing.entered_folders.add(os.path.realpath(excluded_folder))
    paths = [argument] if os.path.exists(argument) else _resolve_glob(argument)

    has_images = False
    for path in paths:
        # A pattern may match a folder and files in the folder. The folder comes first, so its files
        # have been listed already.
        if path != argument and listing.has_entered_any_ancestor(path):
            continue
        if path == argument and _is_image_despite_suffix(path):
            items = iter([_make_file_item(path)])
        else:
            items = listing.list_path(path)
        for item in items:
            has_images = True
            yield item

    if not has_images:
        suffixes = ", ".join(IMAGE_SUFFIXES[:3])
        raise SpearError(
            f"{argument} contains no images. Give images ({suffixes}, …), .tar or .parquet files, "
            "or videos."
        )
    if listing.num_unsupported:
        kinds = [f"{number} {suffix}" for suffix, number in sorted(listing.num_unsupported.items())]
        notice(
            f"{argument} contains files of unsupported formats ({', '.join(kinds)}), which were "
            "ignored. Convert or unpack them."
        )


def _is_image_despite_suffix(path: str) -> bool:
    """Whether a file that the user named is an image, although its suffix is not an image's."""
    suffix = os.path.splitext(path)[1].lower()
    has_own_reader = suffix in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".tar", ".parquet")
    return os.path.isfile(path) and not has_own_reader and can_open_image(path)


def _make_file_item(path: str) -> Item:
    # A broken link has no stamp. An error follows when its item is read.
    stamp = make_file_stamp(path) if os.path.isfile(path) else None
    return Item(path, read_image_file, path, stamp=stamp)


def _resolve_glob(pattern: str) -> list[str]:
    """The paths that match a glob, sorted; `SpearError` if none does or if it is no glob."""
    if not glob.has_magic(pattern):
        raise SpearError(f"{pattern} does not exist. Give an existing file or folder.")
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise SpearError(f"{pattern} matches no file. Check the pattern.")
    return matches


class _Listing:
    """Lists files and folders, and counts the files of unsupported formats.

    A listing enters no folder twice, because links to folders may lead in a circle.

    Attributes:
        rate: How many frames per second of a video are listed.
        entered_folders: The real paths of the folders that were entered, or are to be ignored.
        num_unsupported: Suffix → number of ignored files with this suffix.
    """

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.entered_folders: set[str] = set()
        self.num_unsupported = Counter[str]()

    def has_entered_any_ancestor(self, path: str) -> bool:
        """Whether one of the folders that contain `path` was entered."""
        parents = Path(os.path.realpath(path)).parents
        return any(str(parent) in self.entered_folders for parent in parents)

    def list_path(self, path: str) -> Iterator[Item]:
        """List the items of a folder, or of a file according to its suffix.

        A file whose suffix is not supported has no items.
        """
        suffix = os.path.splitext(path)[1].lower()
        # Which images can be read depends on this machine, so a suffix may be in both lists.
        if suffix not in IMAGE_SUFFIXES and UNSUPPORTED_SUFFIX.fullmatch(suffix):
            self.num_unsupported[suffix] += 1
        if os.path.isdir(path):
            yield from self._list_folder(path)
        elif suffix in IMAGE_SUFFIXES:
            yield _make_file_item(path)
        elif suffix == ".tar":
            yield from list_images_in_tar(path)
        elif suffix == ".parquet":
            yield from list_images_in_parquet(path)
        elif suffix in VIDEO_SUFFIXES:
            yield from list_video_frames(path, self.rate)

    def _list_folder(self, path: str) -> Iterator[Item]:
        """List the images in a folder and its subfolders, each folder once."""
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

        # The folder of an EgoExo4D take (one recording by several cameras) has its videos here.
        video_folder = os.path.join(path, TAKE_VIDEO_FOLDER)
        if os.path.isdir(video_folder):
            for video in _find_color_videos_of_take(video_folder):
                yield from list_video_frames(video, self.rate)
            return
        for name in sorted(os.listdir(path)):
            if not name.startswith("."):
                yield from self.list_path(os.path.join(path, name))


def _find_color_videos_of_take(take_video_folder: str) -> list[str]:
    """The videos of the color cameras of an EgoExo4D take (one recording by several cameras).

    They are the videos of full size, or their smaller copies if only these exist.
    """
    smaller_copies = os.path.join(take_video_folder, "downscaled", "448")
    for video_folder in (take_video_folder, smaller_copies):
        names = []
        for name in glob.glob("*.mp4", root_dir=video_folder):
            if not _NOT_COLOR_CAMERA.search(name):
                names.append(name)
        if names:
            return [os.path.join(video_folder, name) for name in sorted(names)]
    return []


def read_image_file(path: str, locations: Sequence[None]) -> Iterator[Content]:
    """Read an image file; each location is None and stands for the whole file."""
    for _ in locations:
        yield Path(path).read_bytes()


def list_images_in_tar(path: str) -> Iterator[Item]:
    """List the images in an uncompressed tar file (a WebDataset shard, for instance)."""
    try:
        with tarfile.open(path, "r:") as tar:
            stamp = make_file_stamp(path)
            for member in tar:
                suffix = os.path.splitext(member.name)[1].lower()
                if member.isfile() and suffix in IMAGE_SUFFIXES:
                    location = (member.offset_data, member.size)
                    yield Item(f"{path}/{member.name}", read_images_in_tar, path, location, stamp)
                # tarfile appends each member to this list; empty it to bound the memory.
                tar.members = []  # type: ignore[attr-defined]
            _check_tar_is_complete(tar)
    except (tarfile.TarError, OSError) as error:
        refuse_lfs_pointer(Path(path), path)
        raise SpearError(
            f"{path} is not a complete, uncompressed tar file ({error}). "
            f"{_advise_on_unreadable_tar(path)}"
        ) from error


def _advise_on_unreadable_tar(path: str) -> str:
    """Say what to do about a tar file that cannot be read, by how it begins."""
    try:
        with open(path, "rb") as file:
            start = file.read(max(map(len, COMPRESSED_STARTS)))
    except OSError:
        return "Check that you may read it."
    if any(start.startswith(signature) for signature in COMPRESSED_STARTS):
        return "It is compressed, so unpack it and give the folder."
    return "Its download or copy was interrupted. Repeat it, for example with `rsync --append`."


def _check_tar_is_complete(tar: tarfile.TarFile) -> None:
    """Raise `tarfile.ReadError` unless a tar file that was read to its end is complete.

    A tar file ends with a block of zeros. tarfile itself stops at a broken header without an error.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    last_block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if last_block.strip(b"\0"):
        raise tarfile.ReadError("it ends within a file")


def read_images_in_tar(path: str, locations: Sequence[tuple[int, int]]) -> Iterator[Content]:
    """Read images in a tar file; a location is (offset, size) in bytes."""
    with open(path, "rb") as file:
        for offset, size in locations:
            file.seek(offset)
            yield file.read(size)


def list_images_in_parquet(path: str) -> Iterator[Item]:
    """List the images in a Parquet file, such as Hugging Face `datasets` writes.

    The file must have one column of encoded images. Each row becomes an item.
    """
    advice = "Download this one file again, or leave it out: the others stay usable."
    with translate_read_errors(Path(path), advice):
        file = pq.ParquetFile(path)
    column = _choose_image_column(file.schema_arrow, path)
    stamp = make_file_stamp(path)
    image_number = 0
    for group in range(file.num_row_groups):
        for row in range(file.metadata.row_group(group).num_rows):
            yield Item(
                f"{path}#{image_number}", read_images_in_parquet, path, (column, group, row), stamp
            )
            image_number += 1


def read_images_in_parquet(
    path: str, locations: Sequence[tuple[str, int, int]]
) -> Iterator[Content]:
    """Read images in a Parquet file; a location is (column, row group, row in the group).

    For a row without an image, a `SpearError` is yielded in its place, so that the other rows are
    still read.
    """
    for column, group, row in locations:
        value = read_column_of_row_group(path, column, group)[row].as_py()
        if isinstance(value, dict):  # Hugging Face's {"bytes": …, "path": …}
            value = value.get("bytes")
        if isinstance(value, bytes):
            yield value
        else:
            yield SpearError("this row contains no image. Fill it in.")


@lru_cache(maxsize=1)
def read_column_of_row_group(path: str, column: str, group: int) -> pa.ChunkedArray:
    """Read one column of a row group of a Parquet file.

    The group that was read last is cached, because the rows of a group are read one after another.
    Arrow's threads are not used, because several worker processes read at the same time.
    """
    return pq.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False)[column]


def _choose_image_column(schema: pa.Schema, path: str) -> str:
    """The name of the column with encoded images.

    It is the column named "image", or else the only column that contains bytes, either directly or
    as {bytes, path}.
    """
    columns = [field.name for field in schema if _can_contain_images(field.type)]
    if "image" in columns:
        return "image"
    if len(columns) == 1:
        return str(columns[0])
    problem = "has no column of image bytes"
    if columns:
        problem = f"has several columns of bytes ({', '.join(columns)})"
    raise SpearError(f"{path} {problem}. Name the one with the images `image`.")


def _can_contain_images(kind: pa.DataType) -> bool:
    """Whether values of a type are bytes, or structs with bytes in their field "bytes"."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _can_contain_images(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def list_video_frames(path: str, rate: float) -> Iterator[Item]:
    """List the frames of a video that are shown at 0, 1/rate, 2/rate, … seconds.

    An item's key ends in the number of the frame, counted as if the frame rate were constant. If
    `rate` is higher than the video's frame rate, every frame is listed once.

    Args:
        path: The video.
        rate: How many frames per second to list.

    Raises:
        SpearError: The file is not a video, or does not say how long it is.
    """
    with open_video(path) as (container, stream):
        video_rate = float(stream.average_rate or stream.guessed_rate or rate)
        num_frames = stream.frames or round(_measure_duration_s(container, stream) * video_rate)
    if not num_frames:
        raise SpearError(f"{path} does not say how long the video is. Remux it to .mp4.")
    stamp = make_file_stamp(path)
    # The indices of the frames that are shown at time_number / rate seconds; `groupby` drops
    # repeated indices. Adding 1e-6 corrects the rounding of products that should be integers.
    indices = (int(time_number / rate * video_rate + 1e-6) for time_number in count())
    for index, _ in groupby(indices):
        if index >= num_frames:
            return
        yield Item(f"{path}#{index}", read_video_frames, path, index / video_rate, stamp)


def _measure_duration_s(container: Any, stream: Any) -> float:
    """Measure how long the pictures of an opened video last, in seconds; 0 if this is unknown.

    The container's duration is that of its longest stream, which may be sound. The last picture of
    a screen recording may be shown for seconds. So the end of the last packets is read.
    """
    if not container.duration:
        return 0.0

    container.seek(container.duration)  # to the last key frame
    # `start` and `end` are in units of the stream's time base, as the packets' timestamps are.
    start = stream.start_time or 0
    end = start
    for packet in container.demux(stream):
        if packet.pts is not None:
            end = max(end, packet.pts + (packet.duration or 0))
    return float((end - start) * stream.time_base)


def read_video_frames(path: str, rising_times_s: Sequence[float]) -> Iterator[Array]:
    """Read the frames of a video that are shown at some times, each decoded once.

    Args:
        path: The video.
        rising_times_s: Times in seconds from the start of the video, in rising order.

    Yields:
        For each time, the frame [h, w, 3] uint8 RGB.

    Raises:
        SpearError: A time is after the last frame, or the video is broken there.
    """
    remaining_times_s = list(rising_times_s)
    with open_video(path) as (container, stream):
        start_s = float((stream.start_time or 0) * stream.time_base)
        half_frame_s = 0.5 / float(stream.average_rate or 1000)  # half a ms if the rate is unknown
        first_timestamp = int((start_s + remaining_times_s[0]) / stream.time_base)
        container.seek(first_timestamp, stream=stream)  # to the last key frame before it

        # A frame is yielded for all times before the next frame starts, half a frame less, because
        # listed times are starts of frames and may be rounded down. The last frame has no next one;
        # it is shown until the video ends, or for one and a half frames if that is longer.
        frames = chain(container.decode(stream), [None])
        for frame, next_frame in pairwise(frames):
            if next_frame is None:
                last_end_s = start_s + _measure_duration_s(container, stream)
                end_s = max(last_end_s, frame.time + 3 * half_frame_s)
            else:
                end_s = next_frame.time - half_frame_s
            while remaining_times_s and remaining_times_s[0] < end_s - start_s:
                yield _to_pixels(frame, stream)
                remaining_times_s.pop(0)
            if not remaining_times_s:
                return
    raise SpearError(
        f"{path} ends before {remaining_times_s[0]:.2f} s, earlier than its header says. Write its "
        "header again with `ffmpeg -i FILE -c copy NEW_FILE`, or leave it out."
    )


def _to_pixels(frame: Any, stream: Any) -> Array:
    """Convert a frame of PyAV to [h, w, 3] uint8 RGB.

    The frame is stretched so that its pixels become square, and turned upright as its metadata say.
    """
    num_quarter_turns = round(getattr(frame, "rotation", 0) / 90)  # phones record turned frames
    width = round(frame.width * (stream.sample_aspect_ratio or 1))
    pixels = to_rgb(frame, width)
    return np.ascontiguousarray(np.rot90(pixels, num_quarter_turns))


def hash_content(content: Content) -> str:
    """A short hash of the content that a reader yielded."""
    return hashlib.sha256(pickle.dumps(content, protocol=5)).hexdigest()[:16]


def read_contents(items: Iterable[Item]) -> Iterator[Content]:
    """Read the contents of items.

    Args:
        items: The items. Keep the order in which they were listed, so that items that are neighbors
            in one file are read together.

    Yields:
        The content of each item. If a reader fails, its error is the content of the item at which
        it failed and of the later items of the same file.
    """
    for (reader, path), group in groupby(items, key=lambda item: (item.reader, item.path)):
        locations = [item.location for item in group]
        num_missing = len(locations)
        error_of_missing = SpearError(
            "the file ends before this image, although it had it when the run began. Let no other "
            "program write to it, and run the same command again."
        )
        try:
            for content in reader(path, locations):
                num_missing -= 1
                yield content
        except SpearError as error:
            error_of_missing = error
        except OSError as error:
            error_of_missing = RetryableError(
                f"the file cannot be read ({error.strerror or error}). Label it again."
            )
        except pa.ArrowException as error:
            error_of_missing = SpearError(f"the file cannot be read ({error}). Replace it.")
        yield from [error_of_missing] * num_missing
