"""TFRecord files and the `tf.train.Example` messages in them, without TensorFlow.

A record is: length (uint64), masked CRC32C of the length, the bytes, masked CRC32C of the bytes; all little
endian. An Example is a protobuf map from name to a list of bytes, floats or integers. The few lines that walk
its wire format need no protobuf runtime, and packed floats become numpy arrays at once.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spear.errors import SpearError
from spear.types import Array

Feature = list[bytes] | Array
"""Values of one feature, flat: bytes, float32 [n], or int64 [n]."""


def read_records(
    path: Path, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes | SpearError]]:
    """(index, bytes) of records `start` to `stop` of a file, checked; those before are passed over unread.

    In the place of a record whose bytes do not match its checksum comes the SpearError that names file and
    record. After a broken length, or where the file ends before `stop` records, nothing more can be found in
    it: that error is the last item. Raises SpearError for a file that cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            size = path.stat().st_size
            index = 0
            while index < stop if stop is not None else file.tell() < size:
                header = file.read(12)
                why = _broken_length(header, size - file.tell())
                if why:
                    yield index, _broken(path, index, why)
                    return
                length = struct.unpack("<Q", header[:8])[0]
                if index < start:
                    file.seek(length + 4, 1)
                else:
                    body = file.read(length)
                    if _masked_crc(body) == struct.unpack("<I", file.read(4))[0]:
                        yield index, body
                    else:
                        yield index, _broken(path, index, "its checksum does not match")
                index += 1
    except OSError as error:
        raise SpearError(f"cannot read: {path}: {error.strerror}; is the download complete?") from error


def _broken_length(header: bytes, left: int) -> str:
    """What is wrong with the header of a record, of which so many bytes should follow; "" if nothing is."""
    if len(header) < 12:
        return "the file ends before it"
    length, crc = struct.unpack("<QI", header)
    if _masked_crc(header[:8]) != crc:
        return "the checksum of its length does not match"
    return f"the file ends {length + 4 - left} bytes too early" if length + 4 > left else ""


def _broken(path: Path, index: int, why: str) -> SpearError:
    return SpearError(f"broken record: {path} record {index}: {why}; copy the file again")


def _masked_crc(data: bytes) -> int:
    try:
        from crc32c import crc32c
    except ImportError as error:
        raise SpearError("TFRecord needs the crc32c package: pip install 'spear-vla[rlds]'") from error
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def parse_example(data: bytes) -> dict[str, Feature]:
    """The features of a serialised `tf.train.Example`. Raises ValueError or KeyError when it is not one."""
    features: dict[str, Feature] = {}
    view = memoryview(data)
    for number, features_message in _fields(view):
        if number != 1:
            continue
        for _, entry in _fields(_message(features_message)):
            parts = dict(_fields(_message(entry)))
            features[bytes(_message(parts[1])).decode()] = _feature(_message(parts.get(2, view[:0])))
    return features


def _feature(view: memoryview) -> Feature:
    for number, body in _fields(view):
        values = [value for field, value in _fields(_message(body)) if field == 1]
        if number == 1:
            return [bytes(_message(value)) for value in values]
        if number == 2:  # packed, or one fixed32 each
            return np.frombuffer(b"".join(_message(value) for value in values), "<f4")
        if number == 3:
            numbers: list[int] = []
            for value in values:
                numbers.extend([value] if isinstance(value, int) else _varints(value))
            return np.array(numbers, np.uint64).view(np.int64)
    return []  # a feature without values has no kind


def _message(value: memoryview | int) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message was expected")
    return value


def _fields(view: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """(field number, value) pairs of one message: bytes for everything but varints."""
    at, size = 0, len(view)
    while at < size:
        key, at = _varint(view, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(view, at)
            yield key >> 3, value
            continue
        if kind == 2:
            length, at = _varint(view, at)
        elif kind in (1, 5):
            length = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if at + length > size:
            raise ValueError("a field reaches beyond its message")
        yield key >> 3, view[at : at + length]
        at += length


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ValueError("a number is cut off")
        byte = view[at]
        result |= (byte & 0x7F) << shift
        at += 1
        if byte < 0x80:
            return result, at
        shift += 7


def _varints(view: memoryview) -> list[int]:
    values, at = [], 0
    while at < len(view):
        value, at = _varint(view, at)
        values.append(value)
    return values
