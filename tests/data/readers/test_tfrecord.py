"""TFRecord files: every kind of feature is read, and errors name the file and the broken record."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tiny import write_records
from refusals import refuses
from spear.data.readers.tfrecord import load_example_class, parse_example, read_records

HEADER_BYTES = 12  # a record's length and the checksum of the length
CHECKSUM_BYTES = 4  # the checksum of a record's body, behind the body
VALUE_KINDS = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
"""Python type of a value -> the kind of the feature in an Example."""
# The values of one feature: a list of one of these types.
feature_values = st.one_of(
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50),
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=20), feature_values, max_size=5))
def test_every_kind_of_feature_is_read(features: dict[str, Any]) -> None:
    example = load_example_class()()
    for name, values in features.items():
        kind = VALUE_KINDS[type(values[0])]
        getattr(example.features.feature[name], kind).value.extend(values)

    parsed = parse_example(example.SerializeToString())

    assert {name: list(values) for name, values in parsed.items()} == features


def test_bytes_that_are_no_example_are_refused() -> None:
    announces_too_many_bytes = b"\x0a\x7f"  # a field of 127 bytes, which are missing

    with pytest.raises(ValueError, match="pars"):
        parse_example(announces_too_many_bytes)


def test_records_are_read_in_a_range(tmp_path: Path) -> None:
    records = [bytes([index]) * index for index in range(6)]
    path = write_records(tmp_path / "a.tfrecord", records)

    all_records = list(read_records(path, start=0, stop=6))
    middle_records = list(read_records(path, start=2, stop=5))

    assert all_records == list(enumerate(records))
    assert middle_records == all_records[2:5]


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of the byte at a position of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def three_records(tmp_path: Path) -> Path:
    """A file of three records, of which the tests break record 1, b"one"."""
    return write_records(tmp_path / "a.tfrecord", [b"zero", b"one", b"two"])


LENGTH_POSITION_OF_RECORD_1 = HEADER_BYTES + len(b"zero") + CHECKSUM_BYTES
"""Position in the file of the first byte of the length of record 1: it follows record 0."""
BODY_POSITION_OF_RECORD_1 = LENGTH_POSITION_OF_RECORD_1 + HEADER_BYTES
"""Position in the file of the first byte of the body of record 1."""


def test_a_broken_record_is_named_and_the_next_one_is_read(three_records: Path) -> None:
    flip_bit(three_records, BODY_POSITION_OF_RECORD_1)

    record_0, record_1, record_2 = read_records(three_records, start=0, stop=3)

    assert record_0 == (0, b"zero")
    assert "a.tfrecord is broken (its checksum" in str(record_1[1])
    assert record_2 == (2, b"two")


def test_a_broken_record_before_the_range_does_not_matter(three_records: Path) -> None:
    flip_bit(three_records, BODY_POSITION_OF_RECORD_1)

    assert list(read_records(three_records, start=2, stop=3)) == [(2, b"two")]


def test_nothing_behind_a_broken_length_can_be_found(three_records: Path) -> None:
    flip_bit(three_records, LENGTH_POSITION_OF_RECORD_1)

    record_0, (index_1, error_1), (index_2, error_2) = read_records(three_records, start=0, stop=3)

    assert record_0 == (0, b"zero")
    assert index_1 == 1
    assert "is broken (the checksum of its length" in str(error_1)
    assert index_2 == 2
    assert "record 2 of " in str(error_2)


def test_a_broken_length_before_the_range_loses_the_range(three_records: Path) -> None:
    """The length of record 1 says where record 2 begins."""
    flip_bit(three_records, LENGTH_POSITION_OF_RECORD_1)

    ((index, error),) = read_records(three_records, start=2, stop=3)

    assert index == 2
    assert "record 2 of " in str(error)


BYTES_OF_RECORD_1 = HEADER_BYTES + len(b"one") + CHECKSUM_BYTES


@pytest.mark.parametrize(
    "num_bytes_left",
    [
        0,
        1,  # a part of the header
        HEADER_BYTES + 2,  # a part of the body
        BYTES_OF_RECORD_1 - 1,  # a part of the checksum
    ],
)
def test_a_truncated_record_is_named(tmp_path: Path, num_bytes_left: int) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero", b"one"])
    num_bytes_cut = BYTES_OF_RECORD_1 - num_bytes_left
    os.truncate(path, path.stat().st_size - num_bytes_cut)

    record_0, (_, error) = read_records(path, start=0, stop=2)

    assert record_0 == (0, b"zero")
    assert "a.tfrecord is broken (the file ends" in str(error)


def test_a_missing_record_is_named(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero"])

    record_0, (_, error) = read_records(path, start=0, stop=2)

    assert record_0 == (0, b"zero")
    assert "a.tfrecord is broken (the file ends" in str(error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    records = read_records(tmp_path / "b.tfrecord", start=0, stop=1)

    refuses(r"b\.tfrecord cannot be read", list, records)
