"""TFRecord files and the `tf.train.Example` messages in them, read without TensorFlow.

A record consists of its length (uint64), the masked CRC32C of the length, its bytes and the masked
CRC32C of the bytes, all little endian. An Example is a protobuf map from a name to a list of bytes,
floats or integers.
"""

import functools
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from spear.errors import SpearError, format_count
from spear.types import Array
from spear.util.files import LFS_POINTER_ADVICE, LFS_POINTER_PROBLEM, is_lfs_pointer

Feature = list[bytes] | Array
"""The values of one feature, flat: bytes, float32 [n] or int64 [n]."""

HEADER_BYTES = 12  # length and its checksum
CHECKSUM_BYTES = 4
UNLISTED_RECORD = "dataset_info.json does not know of it"
CRC_MASK_DELTA = 0xA282EAD8  # of the TFRecord format
NUMBER_DTYPES = {"float_list": np.float32, "int64_list": np.int64}


def read_records(
    path: Path, start: int, stop: int, num_expected: int | None = None
) -> Iterator[tuple[int, bytes | SpearError]]:
    """Read and check some records of a file.

    Args:
        path: The TFRecord file.
        start: The first record to read. Records before it are skipped without reading them.
        stop: The record after the last one to read.
        num_expected: The number of records that the dataset's metadata name for this file.

    Yields:
        (index, bytes) of each record. A record whose checksum is wrong yields a SpearError that
        names file and record, in place of the bytes. So do all records behind a broken length or
        the file's end, and the first record beyond `num_expected`.

    Raises:
        SpearError: If the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            yield from _read_records(file, path, start, stop, num_expected)
    except OSError as error:
        raise SpearError(
            f"cannot read: {path}: {error.strerror}; is the download complete?"
        ) from error


def _read_records(
    file: IO[bytes], path: Path, start: int, stop: int, num_expected: int | None
) -> Iterator[tuple[int, bytes | SpearError]]:
    file_bytes = path.stat().st_size
    for index in range(stop):
        header = file.read(HEADER_BYTES)
        reason = _find_header_error(header, file_bytes - file.tell())
        if reason:
            first_lost = max(start, index)
            for lost in range(first_lost, stop):
                lost_reason = reason if lost == index else "it is behind a broken one"
                yield lost, _broken_record(path, lost, lost_reason)
            return

        length = _record_length(header)
        if index < start:
            file.seek(length + CHECKSUM_BYTES, 1)
            continue

        body = file.read(length)
        (checksum,) = struct.unpack("<I", file.read(CHECKSUM_BYTES))
        if _masked_crc(body) == checksum:
            yield index, body
        else:
            yield index, _broken_record(path, index, "its checksum does not match")

    if stop == num_expected and file.tell() < file_bytes:
        yield stop, _broken_record(path, stop, UNLISTED_RECORD)


def _broken_record(path: Path, index: int, reason: str) -> SpearError:
    if is_lfs_pointer(path):
        return SpearError(f"{path} record {index}: {LFS_POINTER_PROBLEM}. {LFS_POINTER_ADVICE}")
    cure = "Delete the file, and download it anew; its download broke off or was damaged."
    if reason == UNLISTED_RECORD:
        cure = "Correct shardLengths there, or choose a --split that ends before it."
    return SpearError(f"broken record: {path} record {index}: {reason}. {cure}")


def read_checksums(path: Path) -> bytes:
    """Read the lengths and checksums of a file's records, which identify the file."""
    checksums: list[bytes] = []
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        while not _find_header_error(header, file_bytes - file.tell()):
            file.seek(_record_length(header), 1)
            checksums.append(header + file.read(CHECKSUM_BYTES))
            header = file.read(HEADER_BYTES)
    return b"".join(checksums)


def _record_length(header: bytes) -> int:
    return int(struct.unpack("<Q", header[:8])[0])


def _find_header_error(header: bytes, num_bytes_left: int) -> str:
    """Say what is wrong with the header of a record, or "" if the record can be read.

    Args:
        header: The bytes of the header, fewer than `HEADER_BYTES` at the file's end.
        num_bytes_left: How many bytes the file has behind the header.
    """
    if len(header) < HEADER_BYTES:
        return "the file ends before it"

    length, checksum = struct.unpack("<QI", header)
    if _masked_crc(header[:8]) != checksum:
        return "the checksum of its length does not match"

    num_missing = length + CHECKSUM_BYTES - num_bytes_left
    if num_missing > 0:
        return f"the file ends {format_count(num_missing, 'bytes')} too early"
    return ""


def _masked_crc(data: bytes) -> int:
    from crc32c import crc32c

    crc = crc32c(data)
    rotated = (crc >> 15) | (crc << 17)
    return (rotated + CRC_MASK_DELTA) & 0xFFFFFFFF


@functools.cache
def load_example_class() -> Any:
    """Load the class of `tf.train.Example` messages from its published description."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    description = Path(__file__).with_name("example.textproto").read_text("utf-8")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(text_format.Parse(description, descriptor_pb2.FileDescriptorProto()))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def parse_example(data: bytes) -> dict[str, Feature]:
    """Parse a serialized `tf.train.Example`.

    Args:
        data: The bytes of one record.

    Returns:
        Feature name to its flat values.

    Raises:
        ValueError: If the bytes are not an Example.
    """
    from google.protobuf.message import DecodeError

    try:
        message_features = load_example_class().FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(str(error)) from error

    features: dict[str, Feature] = {}
    for name, feature in message_features.items():
        kind = feature.WhichOneof("kind")
        # A feature without values has no kind.
        values = getattr(feature, kind).value if kind else []
        if kind in NUMBER_DTYPES:
            features[name] = np.array(values, NUMBER_DTYPES[kind])
        else:
            features[name] = list(values)
    return features
