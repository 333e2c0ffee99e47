"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A record is: length (uint64), masked CRC32C of the length, the bytes, masked CRC32C of the bytes; all little
endian. An Example is a protobuf map from name to a list of bytes, floats or integers.
"""

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spear.errors import SpearError, format_count
from spear.types import Array

Feature = list[bytes] | Array
"""Values of one feature, flat: bytes, float32 [n], or int64 [n]."""


def read_records(
    path: Path, start: int, stop: int, last: int | None = None
) -> Iterator[tuple[int, bytes | SpearError]]:
    """(index, bytes) of records `start` to `stop` of a file, checked; those before are passed over unread.
    Behind the `last` that it should have comes a SpearError in the place of all that follow.

    In the place of a record whose checksum is wrong comes the SpearError that names file and record, as for
    all behind a broken length or the file's end. Raises SpearError for a file that cannot be opened.
    """

    def broken(index: int, why: str) -> SpearError:
        return SpearError(f"broken record: {path} record {index}: {why}; copy the file again")

    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            for index in range(stop):
                header = file.read(12)
                if why := _broken_length(header, size - file.tell()):
                    for lost in range(max(start, index), stop):
                        yield (
                            lost,
                            broken(lost, why if lost == index else "it is behind a broken one"),
                        )
                    return
                length = struct.unpack("<Q", header[:8])[0]
                if index < start:
                    file.seek(length + 4, 1)
                else:
                    body = file.read(length)
                    good = _masked_crc(body) == struct.unpack("<I", file.read(4))[0]
                    yield index, body if good else broken(index, "its checksum does not match")
            if stop == last and file.tell() < size:
                yield stop, broken(stop, "dataset_info.json does not know of it")
    except OSError as error:
        raise SpearError(
            f"cannot read: {path}: {error.strerror}; is the download complete?"
        ) from error


def record_sums(path: Path) -> bytes:
    """The lengths and checksums of a file's records, which tell it from others without reading these."""
    found, size = [], path.stat().st_size
    with open(path, "rb") as file:
        while not _broken_length(header := file.read(12), size - file.tell()):
            file.seek(struct.unpack("<Q", header[:8])[0], 1)
            found.append(header + file.read(4))
    return b"".join(found)


def _broken_length(header: bytes, left: int) -> str:
    """What is wrong with the header of a record, of which so many bytes should follow; "" if nothing is."""
    if len(header) < 12:
        return "the file ends before it"
    length, crc = struct.unpack("<QI", header)
    if _masked_crc(header[:8]) != crc:
        return "the checksum of its length does not match"
    return (
        f"the file ends {format_count(length + 4 - left, 'bytes')} too early"
        if length + 4 > left
        else ""
    )


def _masked_crc(data: bytes) -> int:
    from crc32c import crc32c

    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def example_class() -> Any:
    """The class of `tf.train.Example` messages."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    pool = descriptor_pool.DescriptorPool()
    published = Path(__file__).with_name("example.textproto").read_text("utf-8")
    pool.Add(text_format.Parse(published, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialised `tf.train.Example`. Raises ValueError when it is not one."""
    from google.protobuf.message import DecodeError

    try:
        found = example_class().FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(str(error)) from error
    features: dict[str, Feature] = {}
    for name, feature in found.items():
        kind = feature.WhichOneof("kind")
        values = (
            getattr(feature, kind).value if kind else []
        )  # a feature without values has no kind
        numbers = {"float_list": np.float32, "int64_list": np.int64}
        features[name] = np.array(values, numbers[kind]) if kind in numbers else list(values)
    return features
