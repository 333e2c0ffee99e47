"""What a user gives to be labelled, as items: listed one after the other, each with a key that stays the
same.

An `Item` says where an image is and how to read it, and holds no pixels, so that listing is cheap and any
process can read any item. `find` lists files, folders, globs, tar shards, Parquet files and videos; robot
episodes and the simulator are listed by `spear.labels.sources`.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from spear.errors import RetryableError, SpearError
from spear.labels.images import load_image
from spear.labels.pipeline import Work, admit
from spear.labels.video import VIDEOS, find_frames, is_take, read_frames, take_videos
from spear.types import Array, Frame
from spear.util.images import encode_jpeg

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm")
"""Endings of files that are images."""

Content = bytes | Array | Frame | SpearError
"""What a reader gives: an encoded image, its pixels [h, w, 3] uint8 RGB, a whole frame, or why there is
none."""
Reader = Callable[[str, Sequence[Any]], Iterator[Content]]
"""(path, places in it) → the content of each place. A function of a module, so that processes can share
it."""


class Item(NamedTuple):
    """An image that is not read yet.

    key     names it, and stays the same from run to run; the source of its label.
    reader  reads it, together with the items next to it of the same path.
    path    the file or folder that it is in.
    place   where in there; None for a file of its own.
    """

    key: str
    reader: Reader
    path: str
    place: Any = None


def find(argument: str, rate: float = 1.0) -> Iterator[Item]:
    """The images behind one argument, in an order that stays the same, without reading them.

    Args:
        argument: an image, a tar shard, a Parquet file with images, a video, a folder of any of these (hidden
            files and files with other endings are passed over; an EgoExo4D take gives the frames of its
            cameras), or a glob of all that.
        rate: frames per second of video.

    Raises:
        SpearError: nothing there, nothing in there that is an image, or an archive that cannot be listed.
    """
    if os.path.isdir(argument):
        items = _walk(argument, rate)
        first = next(items, None)
        if first is None:
            raise SpearError(f"{argument}: no image, tar shard, Parquet file or video in this folder")
        yield first
        yield from items
    elif os.path.isfile(argument):
        listing = _listing(argument, rate)
        if listing is None:
            raise SpearError(f"{argument}: not an image ({', '.join(IMAGES)}), .tar, .parquet or video")
        yield from listing
    elif glob.has_magic(argument):
        names = sorted(glob.glob(argument, recursive=True))
        if not names:
            raise SpearError(f"{argument}: nothing matches this pattern")
        for name in names:
            listing = _walk(name, rate) if os.path.isdir(name) else _listing(name, rate)
            yield from listing or ()
    else:
        raise SpearError(f"{argument}: no such file or folder")


def _walk(folder: str, rate: float) -> Iterator[Item]:
    if is_take(folder):
        for video in take_videos(folder):
            yield from find_video(video, rate)
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        yield from (_walk(entry.path, rate) if entry.is_dir() else _listing(entry.path, rate)) or ()


def _listing(path: str, rate: float) -> Iterator[Item] | None:
    """The items of a file by its ending; None for an ending that is none of ours."""
    ending = os.path.splitext(path)[1].lower()
    if ending in IMAGES:
        return iter([Item(path, read_file, path)])
    if ending == ".tar":
        return find_tar(path)
    if ending == ".parquet":
        return find_parquet(path)
    if ending in VIDEOS:
        return find_video(path, rate)
    return None


def read_file(path: str, places: Sequence[None]) -> Iterator[Content]:
    """An image file."""
    for _ in places:
        yield Path(path).read_bytes()


def find_tar(path: str) -> Iterator[Item]:
    """The images in an uncompressed tar file (a WebDataset shard, for instance)."""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and os.path.splitext(member.name)[1].lower() in IMAGES:
                    place = (member.offset_data, member.size)
                    yield Item(f"{path}/{member.name}", read_tar, path, place)
                tar.members = []  # type: ignore[attr-defined] # the list of what was seen would grow without end
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a broken header for the end
                raise tarfile.ReadError("it ends within a file")
    except (tarfile.TarError, OSError) as error:
        raise SpearError(
            f"{path}: not a whole, uncompressed tar file ({error}): copy or unpack it"
        ) from error


def read_tar(path: str, places: Sequence[tuple[int, int]]) -> Iterator[Content]:
    """Images in a tar file, by (offset, size) in bytes."""
    with open(path, "rb") as file:
        for offset, size in places:
            file.seek(offset)
            yield file.read(size)


def find_parquet(path: str) -> Iterator[Item]:
    """The rows of a Parquet file that has a column of encoded images, as Hugging Face `datasets` writes
    them."""
    file = _parquet(path)
    column = _image_column(file.schema_arrow, path)
    row = 0
    for group in range(file.num_row_groups):
        for place in range(file.metadata.row_group(group).num_rows):
            yield Item(f"{path}#{row}", read_parquet, path, (column, group, place))
            row += 1


def read_parquet(path: str, places: Sequence[tuple[str, int, int]]) -> Iterator[Content]:
    """Images in a Parquet file, by (column, row group, row in it)."""
    for column, group, row in places:
        value = _row_group(path, column, group)[row].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        yield value if isinstance(value, bytes) else SpearError("this row has no image: fill it in")


@lru_cache(maxsize=1)
def _row_group(path: str, column: str, group: int) -> pa.ChunkedArray:
    return _parquet(path).read_row_group(group, columns=[column], use_threads=False)[column]


def _parquet(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise SpearError(f"{path}: not a Parquet file ({reason}): copy it again, or leave it out") from error


def _image_column(schema: pa.Schema, path: str) -> str:
    """The column named image, or the only one of bytes (as they are, or as {bytes, path})."""

    def is_bytes(kind: pa.DataType) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    def is_image(kind: pa.DataType) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and is_bytes(kind.field("bytes").type)
        return is_bytes(kind)

    columns = [field.name for field in schema if is_image(field.type)]
    if "image" in columns:
        return "image"
    if len(columns) == 1:
        return str(columns[0])
    found = f"several columns of bytes ({', '.join(columns)})" if columns else "no column of image bytes"
    raise SpearError(f"{path}: {found}: name the one with the images `image`")


def find_video(path: str, rate: float) -> Iterator[Item]:
    """The frames of a video, `rate` per second (see `spear.labels.video`), keyed by their frame number."""
    for index, time in find_frames(path, rate):
        yield Item(f"{path}#{index}", read_frames, path, time)


def read(items: Sequence[Item], longest: int | None = None) -> list[Work]:
    """Read images, encode them as they are kept, and begin their `Work`; what cannot be read is set aside.

    Args:
        items: in the order of `find`, so that neighbours in one file are read together.
        longest: images with a longer side are made smaller, aspect kept, until it is this long (pixels);
            frames with ground truth stay as they are. None leaves all as they are.
    """
    works: list[Work] = []
    for (reader, path), group in groupby(items, key=lambda item: (item.reader, item.path)):
        members = list(group)
        contents = _contents(partial(reader, path, [item.place for item in members]), len(members))
        works += [_work(item.key, content, longest) for item, content in zip(members, contents, strict=True)]
    return works


def _contents(call: Callable[[], Iterator[Content]], count: int) -> list[Content]:
    """What a reader gives; when it breaks down, that is the reason for all that it did not give."""
    contents: list[Content] = []
    reason = SpearError("the file ends before this image: copy it again")
    try:
        contents.extend(call())
    except SpearError as error:
        reason = error
    except OSError as error:
        reason = RetryableError(f"cannot be read: {error.strerror or error}")
    except pa.ArrowException as error:
        reason = SpearError(f"cannot be read: {error}")
    return contents + [reason] * (count - len(contents))


def _work(key: str, content: Content, longest: int | None) -> Work:
    if isinstance(content, bytes):
        try:
            content = load_image(content, key)
        except SpearError as error:
            content = error
    if isinstance(content, SpearError):
        work = Work(key, None)
        work.set_aside(content)
        return work
    if isinstance(content, Frame):
        work = admit(dataclasses.replace(content, source=key))
    else:
        work = admit(Frame(image=shrink(content, longest), source=key))
    if work.frame is not None and work.reason is None:
        work.encoded = encode_jpeg(work.frame.image)
    return work


def shrink(image: Array, longest: int | None) -> Array:
    """[h, w, 3] uint8, made smaller until its longer side is `longest` pixels; aspect kept."""
    height, width = image.shape[:2]
    if longest is None or max(height, width) <= longest:
        return image
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0))
