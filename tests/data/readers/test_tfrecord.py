"""TFRecord: every kind of feature is read, what is broken is named by file and record."""

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tiny import write_records
from refusals import refuses
from spear.data.readers.tfrecord import load_example_class, parse_example, read_records

values = st.one_of(
    st.lists(st.binary(max_size=300), min_size=1, max_size=4),
    st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50),
)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=20), values, max_size=5))
def test_every_kind_of_feature_is_read(features: dict[str, Any]) -> None:
    example = load_example_class()()
    for key, items in features.items():
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(items[0])]
        getattr(example.features.feature[key], kind).value.extend(items)
    parsed = parse_example(example.SerializeToString())
    assert {key: list(items) for key, items in parsed.items()} == features
    with pytest.raises(ValueError, match="pars"):
        parse_example(example.SerializeToString() + b"\x0a\x7f")


def test_records_are_read_in_a_range_and_a_broken_one_is_named_or_passed_over(
    tmp_path: Path,
) -> None:
    records = [bytes([i]) * i for i in range(6)]
    path = write_records(tmp_path / "a.tfrecord", records)
    assert list(read_records(path, 0, 6)) == list(enumerate(records))
    assert list(read_records(path, 2, 5)) == list(enumerate(records))[2:5]
    path = write_records(tmp_path / "a.tfrecord", [b"zero", b"one", b"two"])

    def damage(path: Path, at: int) -> None:
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)

    damage(path, 12 + 4 + 4 + 12 + 1)  # a byte of "one"
    zero, one, two = read_records(path, 0, 3)
    assert (
        zero == (0, b"zero")
        and two == (2, b"two")
        and "a.tfrecord record 1: its checksum" in str(one[1])
    )
    assert list(read_records(path, 2, 3)) == [(2, b"two")]
    damage(path, 12 + 4 + 4)  # its length: nothing behind it can be found
    zero, one, two = read_records(path, 0, 3)
    assert zero == (0, b"zero") and "record 1: the checksum of its length" in str(one[1])
    assert [two[0]] == [place for place, _ in read_records(path, 2, 3)] == [
        2
    ] and "record 2: " in str(two[1])


@pytest.mark.parametrize("cut", [0, 1, 5, 18, 19])
def test_a_truncated_file_is_named(tmp_path: Path, cut: int) -> None:
    path = write_records(tmp_path / "a.tfrecord", [b"zero", b"one"] if cut else [b"zero"])
    os.truncate(path, path.stat().st_size - cut)
    zero, one = read_records(path, 0, 2)
    assert zero == (0, b"zero") and "a.tfrecord record 1: the file ends" in str(one[1])
    refuses(r"cannot read: .*b\.tfrecord", list, read_records(tmp_path / "b.tfrecord", 0, 1))
