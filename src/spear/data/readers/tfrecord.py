"""Reads TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A record consists of a header (the length of its body as uint64, and the masked CRC32C of these
eight bytes), its body, and the masked CRC32C of the body, all little endian. The body is a
serialized Example: a protobuf map from the name of a feature to a list of bytes, floats or
integers.
"""

import functools
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from spear.errors import SpearError, format_count
from spear.types import Array
from spear.util.files import LFS_POINTER_ADVICE, LFS_POINTER_PROBLEM, is_lfs_pointer

Feature = list[bytes] | Array
"""The flat values of one feature: a list of bytes, or an array [n] of float32 or int64."""

HEADER_BYTES = 12  # the length (8) and its checksum (4)
CHECKSUM_BYTES = 4
UNLISTED_RECORD = "dataset_info.json does not know of it"
CRC_MASK_DELTA = 0xA282EAD8  # added to every CRC32C, as the TFRecord format prescribes
NUMBER_DTYPES = {"float_list": np.float32, "int64_list": np.int64}
"""The kind of a feature in an Example → the type of its values."""


def read_records(
    path: Path, start: int, stop: int, num_expected: int | None = None
) -> Iterator[tuple[int, bytes | SpearError]]:
    """Read and check the records `start` to `stop` (exclusive) of a file.

    Args:
        path: The TFRecord file.
        start: The index of the first record to read. The bodies of records before it are skipped.
        stop: The index after the last record to read.
        num_expected: The number of records that the dataset's metadata state for this file; None
            if they state none.

    Yields:
        (index, body) of each record. A SpearError that names file and record replaces the body in
        these cases:

        - The checksum of the body is wrong.
        - The length of the record is broken, or that of a record before it.
        - The record is behind the end of the file.
        - The record is the first that the metadata do not count. It is yielded only if `stop` is
          `num_expected` and the file has more records.

    Raises:
        SpearError: If the file cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            yield from _read_records(file, path, start, stop, num_expected)
    except OSError as error:
        raise SpearError(
            f"{path} cannot be read ({error.strerror}). Check that its download is complete."
        ) from error


def _read_records(
    file: IO[bytes], path: Path, start: int, stop: int, num_expected: int | None
) -> Iterator[tuple[int, bytes | SpearError]]:
    """Yield what `read_records` yields, from an opened file."""
    file_bytes = path.stat().st_size
    for index in range(stop):
        header = file.read(HEADER_BYTES)
        reason = _find_header_error(header, num_bytes_left=file_bytes - file.tell())
        if reason:
            # Without the length of this record, nobody knows where the records behind it begin.
            first_lost = max(start, index)
            for lost_index in range(first_lost, stop):
                lost_reason = reason if lost_index == index else "it is behind a broken one"
                yield lost_index, _make_broken_record_error(path, lost_index, lost_reason)
            return

        length = _decode_body_length(header)
        if index < start:
            file.seek(length + CHECKSUM_BYTES, os.SEEK_CUR)
            continue

        body = file.read(length)
        (checksum,) = struct.unpack("<I", file.read(CHECKSUM_BYTES))
        if _compute_masked_crc(body) == checksum:
            yield index, body
        else:
            yield index, _make_broken_record_error(path, index, "its checksum does not match")

    has_more_records = file.tell() < file_bytes
    if stop == num_expected and has_more_records:
        yield stop, _make_broken_record_error(path, stop, UNLISTED_RECORD)


def _make_broken_record_error(path: Path, index: int, reason: str) -> SpearError:
    """The error for a record that cannot be read, with the cure that fits the reason."""
    if is_lfs_pointer(path):
        return SpearError(
            f"record {index} of {path} cannot be read, because {LFS_POINTER_PROBLEM}. "
            f"{LFS_POINTER_ADVICE}"
        )
    cure = "Delete the file, and download it again; its download broke off or was damaged."
    if reason == UNLISTED_RECORD:
        cure = "Correct shardLengths in dataset_info.json, or choose a --split that ends before it."
    return SpearError(f"record {index} of {path} is broken ({reason}). {cure}")


def read_checksums(path: Path) -> bytes:
    """Read the headers and checksums of a file's records, which identify the file's contents.

    Reading stops at the first header that is broken.
    """
    checksums: list[bytes] = []
    file_bytes = path.stat().st_size
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
        while not _find_header_error(header, num_bytes_left=file_bytes - file.tell()):
            file.seek(_decode_body_length(header), os.SEEK_CUR)
            checksums.append(header + file.read(CHECKSUM_BYTES))
            header = file.read(HEADER_BYTES)
    return b"".join(checksums)


def _decode_body_length(header: bytes) -> int:
    """Decode the number of bytes of a record's body."""
    return int(struct.unpack("<Q", header[:8])[0])


def _find_header_error(header: bytes, num_bytes_left: int) -> str:
    """Say what is wrong with the header of a record, or "" if the record can be read.

    Args:
        header: The bytes of the header; fewer than `HEADER_BYTES` if the file ended.
        num_bytes_left: How many bytes the file has behind the header.
    """
    if len(header) < HEADER_BYTES:
        return "the file ends before it"

    length, checksum = struct.unpack("<QI", header)
    if _compute_masked_crc(header[:8]) != checksum:
        return "the checksum of its length does not match"

    num_missing = length + CHECKSUM_BYTES - num_bytes_left
    if num_missing > 0:
        return f"the file ends {format_count(num_missing, 'bytes')} too early"
    return ""


def _compute_masked_crc(data: bytes) -> int:
    """Compute the checksum of the TFRecord format: the CRC32C rotated by 15 bits, plus a constant.

    The format masks CRCs so that a CRC of bytes which contain a CRC stays a good checksum.
    """
    from crc32c import crc32c

    crc = crc32c(data)
    rotated = (crc >> 15) | (crc << 17)
    return (rotated + CRC_MASK_DELTA) & 0xFFFFFFFF  # the sum modulo 2³²


@functools.cache
def load_example_class() -> Any:
    """Make the class of `tf.train.Example` messages from its published protobuf description."""
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
        The name of each feature → its flat values.

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
        # `kind` is None for a feature without values.
        values = getattr(feature, kind).value if kind else []
        if kind in NUMBER_DTYPES:
            features[name] = np.array(values, NUMBER_DTYPES[kind])
        else:
            features[name] = list(values)
    return features
