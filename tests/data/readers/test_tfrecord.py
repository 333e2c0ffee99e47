"""TFRecord: what a protobuf runtime reads, what is broken named by file and record."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from spear.data.readers.tfrecord import parse_example, read_records
from spear.errors import SpearError


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_records(path: Path, records: list[bytes]) -> Path:
    with open(path, "wb") as file:
        for record in records:
            length = struct.pack("<Q", len(record))
            file.write(length + masked(length) + record + masked(record))
    return path


def example_class() -> Any:
    """tf.train.Example as the protobuf runtime knows it, from its published definition."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str | None]) -> descriptor_pb2.DescriptorProto:
        new = file.message_type.add(name=name)
        for label, (key, number, kind, of) in ((field.LABEL_OPTIONAL, f) for f in fields):
            if key.endswith("*"):
                label, key = field.LABEL_REPEATED, key[:-1]
            new.field.add(name=key, number=number, type=kind, label=label, type_name=of and f".t.{of}")
        return new

    message("BytesList", ("value*", 1, field.TYPE_BYTES, None))
    message("FloatList", ("value*", 1, field.TYPE_FLOAT, None))
    message("Int64List", ("value*", 1, field.TYPE_INT64, None))
    lists = ("bytes_list", "BytesList"), ("float_list", "FloatList"), ("int64_list", "Int64List")
    message("Feature", *((key, i + 1, field.TYPE_MESSAGE, of) for i, (key, of) in enumerate(lists)))
    entry = file.message_type.add(name="Features").nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(
        name="value", number=2, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, type_name=".t.Feature"
    )
    file.message_type[-1].field.add(
        name="feature",
        number=1,
        type=field.TYPE_MESSAGE,
        label=field.LABEL_REPEATED,
        type_name=".t.Features.FeatureEntry",
    )
    message("Example", ("features", 1, field.TYPE_MESSAGE, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


EXAMPLE = example_class()
floats = st.floats(width=32, allow_nan=False)
values = st.one_of(
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.lists(floats, min_size=1, max_size=50),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50),
)


@given(st.dictionaries(st.text(max_size=20), values, max_size=5))
def test_parsing_agrees_with_the_protobuf_runtime(features: dict[str, Any]) -> None:
    example = EXAMPLE()
    for key, items in features.items():
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(items[0])]
        getattr(example.features.feature[key], kind).value.extend(items)
    parsed = parse_example(example.SerializeToString())
    assert parsed.keys() == features.keys()
    for key, items in features.items():
        assert list(parsed[key]) == items


@given(st.binary(max_size=60))
def test_garbage_is_a_value_error_at_worst(data: bytes) -> None:
    with contextlib.suppress(ValueError, KeyError):
        parse_example(data)


def test_records_in_range(tmp_path: Path) -> None:
    records = [bytes([i]) * i for i in range(6)]
    path = write_records(tmp_path / "a.tfrecord", records)
    assert list(read_records(path)) == list(enumerate(records))
    assert list(read_records(path, 2, 5)) == list(enumerate(records))[2:5]


def damage(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_broken_record_is_named_or_passed_over(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero", b"one", b"two"])
    damage(path, 12 + 4 + 4 + 12 + 1)  # a byte of "one"
    zero, one, two = read_records(path)
    assert zero == (0, b"zero") and two == (2, b"two")
    assert "a.tfrecord record 1: its checksum" in str(one[1])
    assert list(read_records(path, start=2)) == [(2, b"two")]


def test_a_broken_length_ends_the_file(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero", b"one", b"two"])
    damage(path, 12 + 4 + 4)
    zero, one = read_records(path)
    assert zero == (0, b"zero") and "record 1: the checksum of its length" in str(one[1])


@pytest.mark.parametrize("cut", [1, 5, 18, 19])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero", b"one"])
    os.truncate(path, path.stat().st_size - cut)
    zero, one = read_records(path, 0, 2)
    assert zero == (0, b"zero") and "a.tfrecord record 1: the file ends" in str(one[1])


def test_fewer_records_than_expected_and_no_file(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero"])
    assert "record 1: the file ends before it" in str(list(read_records(path, 0, 2))[1][1])
    with pytest.raises(SpearError, match=r"cannot read: .*b\.tfrecord"):
        list(read_records(tmp_path / "b.tfrecord"))
