"""The images in files, as items: listed one after the other, each with a key that stays the same.

An `Item` says where an image is and how to read it, and holds no pixels, so listing is cheap and
any process can read any item. `find` lists image files, folders, globs, tar shards, Parquet files
and videos; robot episodes, RGB-D scenes and the simulator are listed by `spear.labels.sources`.
"""

import dataclasses
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
from PIL import Image

from spear.data.readers.video import open_video
from spear.errors import RetryableError, SpearError, notice
from spear.labels.pipeline import PendingImage, admit_frame
from spear.labels.store import explain_read_errors
from spear.types import Array, Frame
from spear.util.images import encode_jpeg, load_image_and_orientation

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".mpo",
    ".png",
    ".webp",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
"""Endings of files that are images, and of those that are videos."""
UNSUPPORTED_SUFFIX = re.compile(
    r"\.(hei[cf]|hif|avif|jxl|jp2|gif|raw|dng|cr[23]|nef|arw|orf|rw2|exr|p[gn]m|tga"
    r"|3g[p2]|mpe?g|m?ts|wmv|flv|ogv|t?[gx]z|bz2|zip|7z|rar)"
)
"""Endings of files that may hold pictures, which nobody here reads."""
TAKE_VIDEO_FOLDER = "frame_aligned_videos"
"""The folder of an EgoExo4D take with one video per camera, and smaller copies in
`downscaled/448`."""
_NOT_COLOUR = re.compile(r"_(1201-[12]|211-1)\.mp4$")
"""Streams of the Aria glasses that are not its colour camera (214-1): those for tracking, and of
the eyes."""

Content = bytes | Array | Frame | SpearError
"""What a reader gives: an encoded image, pixels [h, w, 3] uint8 RGB, a frame, or why there is
none."""
Reader = Callable[[str, Sequence[Any]], Iterator[Content]]
"""(path, places in it) → the content of each place. A function of a module, for other processes."""


class Item(NamedTuple):
    """An image that is not read yet.

    key     names it, and stays the same from run to run; the source of its label.
    reader  reads it, together with the items next to it of the same path.
    path    the file or folder that it is in.
    place   where in there; None for a file of its own.
    stamp   of what it is read from: while it is the same, so is the image. None where nothing can
    change.
    """

    key: str
    reader: Reader
    path: str
    place: Any = None
    stamp: str | None = None


def compute_stamp(*paths: str | Path) -> str:
    """Sizes (bytes) and times of change (ns) of files. A copy of a file has another one: see
    `digest`."""
    return " ".join(f"{said.st_size}:{said.st_mtime_ns}" for said in map(os.stat, paths))


def list_images(argument: str, rate: float = 1.0, besides: Path | None = None) -> Iterator[Item]:
    """The images behind one argument, in an order that stays the same, without reading them.

    argument: an image, a tar shard, a Parquet file with images, a video, a folder of any of these
    (hidden files, other endings and folders of labels are passed over; an EgoExo4D take gives the
    frames of its cameras), or a glob of all that. rate: frames per second of video.

    Raises `SpearError`: nothing there, no image in there, or an archive that cannot be listed.
    """
    entered, unread = {os.path.realpath(besides)} if besides else set(), Counter[str]()
    names: Iterable[str] = [argument]
    if not os.path.exists(argument):
        if not glob.has_magic(argument):
            raise SpearError(f"{argument}: no such file or folder")
        if not (matching := sorted(glob.glob(argument, recursive=True))):
            raise SpearError(f"{argument}: nothing matches this pattern")
        # A folder comes before what is in it, which has been listed then.
        names = (
            m for m in matching if entered.isdisjoint(map(str, Path(os.path.realpath(m)).parents))
        )
    items = chain.from_iterable(_listing(name, rate, entered, unread) for name in names)
    if (first := next(items, None)) is None:
        raise SpearError(
            f"{argument}: no image ({', '.join(IMAGE_SUFFIXES)}), .tar, .parquet or video there"
        )
    yield first
    yield from items
    if unread:
        kinds = ", ".join(f"{number} {ending}" for ending, number in sorted(unread.items()))
        notice(f"{argument}: files that are not read: {kinds}: convert or unpack them")


def _take_videos(folder: str) -> list[str]:
    """The videos of a take's colour cameras: of full size, or the smaller copies if these are
    all."""
    for place in (folder, os.path.join(folder, "downscaled", "448")):
        if names := sorted(
            n for n in glob.glob("*.mp4", root_dir=place) if not _NOT_COLOUR.search(n)
        ):
            return [os.path.join(place, name) for name in names]
    return []


def _listing(path: str, rate: float, entered: set[str], unread: Counter[str]) -> Iterator[Item]:
    """The items of a folder, or of a file by its ending; none for an ending that is none of ours,
    and of a folder that was entered before (a link may lead back)."""
    ending = os.path.splitext(path)[1].lower()
    unread.update([ending] if UNSUPPORTED_SUFFIX.fullmatch(ending) else [])
    if os.path.isdir(path):
        if (real := os.path.realpath(path)) in entered:
            return
        entered.add(real)
        if os.path.isfile(os.path.join(path, "run.json")) and any(
            Path(path).rglob("labels-*.parquet")
        ):
            notice(f"{path}: left out, it holds labels: for its images, give its labels-*.parquet")
            return
    if os.path.isdir(os.path.join(path, TAKE_VIDEO_FOLDER)):
        for video in _take_videos(os.path.join(path, TAKE_VIDEO_FOLDER)):
            yield from list_video_frames(video, rate)
    elif os.path.isdir(path):
        for name in sorted(os.listdir(path)):
            if not name.startswith("."):
                yield from _listing(os.path.join(path, name), rate, entered, unread)
    elif ending in IMAGE_SUFFIXES:
        yield Item(
            path, read_file, path, stamp=compute_stamp(path) if os.path.isfile(path) else None
        )
    elif ending == ".tar":
        yield from list_tar(path)
    elif ending == ".parquet":
        yield from list_parquet(path)
    elif ending in VIDEO_SUFFIXES:
        yield from list_video_frames(path, rate)


def read_file(path: str, places: Sequence[None]) -> Iterator[Content]:
    """An image file."""
    for _ in places:
        yield Path(path).read_bytes()


def list_tar(path: str) -> Iterator[Item]:
    """The images in an uncompressed tar file (a WebDataset shard, for instance)."""
    try:
        with tarfile.open(path, "r:") as tar:
            stamp = compute_stamp(path)
            for member in tar:
                if member.isfile() and os.path.splitext(member.name)[1].lower() in IMAGE_SUFFIXES:
                    place = member.offset_data, member.size
                    yield Item(f"{path}/{member.name}", read_tar, path, place, stamp)
                tar.members = []  # type: ignore[attr-defined] # the list of what was seen would grow without end
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(
                b"\0"
            ):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("it ends within a file")
    except (tarfile.TarError, OSError) as error:
        raise SpearError(
            f"{path}: not a whole, plain tar file ({error}): copy or unpack it"
        ) from error


def read_tar(path: str, places: Sequence[tuple[int, int]]) -> Iterator[Content]:
    """Images in a tar file, by (offset, size) in bytes."""
    with open(path, "rb") as file:
        for offset, size in places:
            file.seek(offset)
            yield file.read(size)


def list_parquet(path: str) -> Iterator[Item]:
    """The rows of a Parquet file with a column of encoded images, as Hugging Face `datasets` writes
    it."""
    with explain_read_errors(Path(path), "copy it again, or leave it out"):
        file = pq.ParquetFile(path)
    column = _image_column(file.schema_arrow, path)
    number, stamp = count(), compute_stamp(path)
    for group in range(file.num_row_groups):
        for place in range(file.metadata.row_group(group).num_rows):
            yield Item(f"{path}#{next(number)}", read_parquet, path, (column, group, place), stamp)


def read_parquet(path: str, places: Sequence[tuple[str, int, int]]) -> Iterator[Content]:
    """Images in a Parquet file, by (column, row group, row in it)."""
    for column, group, row in places:
        value = read_row_group(path, column, group)[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        yield value if isinstance(value, bytes) else SpearError("this row has no image: fill it in")


@lru_cache(maxsize=1)
def read_row_group(path: str, column: str, group: int) -> pa.ChunkedArray:
    return pq.ParquetFile(path).read_row_group(group, columns=[column], use_threads=False)[column]


def _image_column(schema: pa.Schema, path: str) -> str:
    """The column named image, or the only one of bytes (as they are, or as {bytes, path})."""

    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_image(kind.field("bytes").type)
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    columns = [field.name for field in schema if is_image(field.type)]
    if "image" in columns:
        return "image"
    if len(columns) == 1:
        return str(columns[0])
    found = (
        f"several columns of bytes ({', '.join(columns)})"
        if columns
        else "no column of image bytes"
    )
    raise SpearError(f"{path}: {found}: name the one with the images `image`")


def list_video_frames(path: str, rate: float) -> Iterator[Item]:
    """The frames of a video that are shown at 0, 1/rate, 2/rate, … s, keyed by their frame number,
    which supposes a constant frame rate. A rate above the video's gives every frame once.

    Raises `SpearError`: not a video, or one that does not say how long it is.
    """
    with open_video(path) as (container, stream):
        per_second = float(stream.average_rate or stream.guessed_rate or rate)
        frames = stream.frames or round((container.duration or 0) / 1e6 * per_second)
    if not frames:
        raise SpearError(f"{path}: this video does not say how long it is: remux it to .mp4")
    stamp = compute_stamp(path)
    for index, _ in groupby(int(number / rate * per_second + 1e-6) for number in count()):
        if index >= frames:
            return
        yield Item(f"{path}#{index}", read_video_frames, path, index / per_second, stamp)


def read_video_frames(path: str, times: Sequence[float]) -> Iterator[Array]:
    """The frames [h, w, 3] uint8 RGB of a video shown at rising `times` (s), each decoded once.

    Raises `SpearError` at a time after the last frame that is there, and where the video breaks.
    """
    wanted = list(times)
    with open_video(path) as (container, stream):
        start = float((stream.start_time or 0) * stream.time_base)
        half = 0.5 / float(stream.average_rate or 1000)
        container.seek(int((start + wanted[0]) / stream.time_base), stream=stream)
        # The frame shown at a time is the last that does not come after it.
        for shown, following in pairwise(chain(container.decode(stream), [None])):
            end = shown.time + 3 * half if following is None else following.time - half
            while wanted and wanted[0] < end - start:
                # Turned as the camera (a phone held upright, say) has noted.
                quarters = round(getattr(shown, "rotation", 0) / 90)
                wide = round(shown.width * (stream.sample_aspect_ratio or 1))  # in square pixels
                pixels = shown.to_ndarray(format="rgb24", width=wide)
                yield np.ascontiguousarray(np.rot90(pixels, quarters))
                wanted.pop(0)
            if not wanted:
                return
    raise SpearError(f"{path}: the video ends before {wanted[0]:.2f} s: copy it again")


def read_images(items: Sequence[Item], longest: int | None = None) -> list[PendingImage]:
    """Read images, encode them as they are kept, and begin their `Work`; what cannot be read is
    skipped.

    items    in the order of `find`, so that neighbours in one file are read together.
    longest  images with a longer side are made smaller, aspect kept, until it is this long
    (pixels); frames
             with ground truth stay as they are. None leaves all as they are.
    """
    return [
        _work(item.key, content, longest)
        for item, content in zip(items, read_contents(items), strict=True)
    ]


def hash_content(content: Content) -> str:
    """A short hash of what a reader gives."""
    return hashlib.sha256(pickle.dumps(content, protocol=5)).hexdigest()[:16]


def read_contents(items: Sequence[Item]) -> Iterator[Content]:
    """What the readers give; when one breaks down, that is the reason for all that it did not
    give."""
    for (reader, path), group in groupby(items, key=lambda item: (item.reader, item.path)):
        places = [item.place for item in group]
        missing = len(places)
        reason = SpearError("the file ends before this image: copy it again")
        try:
            for content in reader(path, places):
                missing -= 1
                yield content
        except SpearError as error:
            reason = error
        except OSError as error:
            reason = RetryableError(f"cannot be read: {error.strerror or error}")
        except pa.ArrowException as error:
            reason = SpearError(f"cannot be read: {error}")
        yield from [reason] * missing


def _work(key: str, content: Content, longest: int | None) -> PendingImage:
    hashed = hash_content(content)
    try:
        if isinstance(content, SpearError):
            raise content
        content, turned = (
            load_image_and_orientation(content, key)
            if isinstance(content, bytes)
            else (content, False)
        )
    except SpearError as error:
        return PendingImage(key, None, error, content_hash=hashed)
    frame = (
        content
        if isinstance(content, Frame)
        else Frame(shrink_image(content, longest), is_turned=turned)
    )
    work = admit_frame(dataclasses.replace(frame, source=key))
    work.content_hash = hashed
    if work.error is None:
        work.encoded = encode_jpeg(frame.image)
    return work


def shrink_image(image: Array, longest: int | None) -> Array:
    """[h, w, 3] uint8, made smaller until its longer side is `longest` pixels; aspect kept."""
    height, width = image.shape[:2]
    if longest is None or max(height, width) <= longest:
        return image
    scale = longest / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    )
