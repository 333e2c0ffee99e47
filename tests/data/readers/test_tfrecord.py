"""TFRecord: every kind of feature is read, and what is broken is named by file and record."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tiny import write_records
from refusals import refuses
from spear.data.readers.tfrecord import load_example_class, parse_example, read_records

HEADER_BYTES = 12
CHECKSUM_BYTES = 4
VALUE_KINDS = {bytes: "bytes_list", float: "float_list", int: "int64_list"}
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
    with pytest.raises(ValueError, match="pars"):
        parse_example(b"\x0a\x7f")


def test_records_are_read_in_a_range(tmp_path: Path) -> None:
    records = [bytes([index]) * index for index in range(6)]
    path = write_records(tmp_path / "a.tfrecord", records)

    assert list(read_records(path, 0, 6)) == list(enumerate(records))
    assert list(read_records(path, 2, 5)) == list(enumerate(records))[2:5]


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def three_records(tmp_path: Path) -> Path:
    return write_records(tmp_path / "a.tfrecord", [b"zero", b"one", b"two"])


START_OF_RECORD_ONE = HEADER_BYTES + len(b"zero") + CHECKSUM_BYTES


def test_a_broken_record_is_named_and_the_next_one_is_read(three_records: Path) -> None:
    flip_bit(three_records, START_OF_RECORD_ONE + HEADER_BYTES + 1)

    zero, first_bad, two = read_records(three_records, 0, 3)

    assert zero == (0, b"zero")
    assert "a.tfrecord record 1: its checksum" in str(first_bad[1])
    assert two == (2, b"two")


def test_a_broken_record_before_the_range_does_not_matter(three_records: Path) -> None:
    flip_bit(three_records, START_OF_RECORD_ONE + HEADER_BYTES + 1)

    assert list(read_records(three_records, 2, 3)) == [(2, b"two")]


def test_nothing_behind_a_broken_length_can_be_found(three_records: Path) -> None:
    flip_bit(three_records, START_OF_RECORD_ONE)

    zero, first_bad, two = read_records(three_records, 0, 3)

    assert zero == (0, b"zero")
    assert "record 1: the checksum of its length" in str(first_bad[1])
    assert two[0] == 2
    assert "record 2: " in str(two[1])


def test_a_broken_length_before_the_range_loses_the_range(three_records: Path) -> None:
    flip_bit(three_records, START_OF_RECORD_ONE)

    ((index, error),) = read_records(three_records, 2, 3)

    assert index == 2
    assert "record 2: " in str(error)


@pytest.mark.parametrize("num_bytes_cut", [0, 1, 5, 18, 19])
def test_a_truncated_file_is_named(tmp_path: Path, num_bytes_cut: int) -> None:
    records = [b"zero", b"one"] if num_bytes_cut else [b"zero"]
    path = write_records(tmp_path / "a.tfrecord", records)
    os.truncate(path, path.stat().st_size - num_bytes_cut)

    zero, first_bad = read_records(path, 0, 2)

    assert zero == (0, b"zero")
    assert "a.tfrecord record 1: the file ends" in str(first_bad[1])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    refuses(r"cannot read: .*b\.tfrecord", list, read_records(tmp_path / "b.tfrecord", 0, 1))
