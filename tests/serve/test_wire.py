"""Messages: what is sent arrives, and nothing that arrives can hurt."""

from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, strategies

from refusals import refuses
from spear.errors import SpearError
from spear.serve.wire import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        np.linspace(0, 1, 8, dtype=">f8"),
        np.zeros((0, 3), np.float32),
        np.arange(10)[::2],
        np.bool_(True),
        np.float16(0.5),
    ],
    ids=["image", "big-endian", "empty", "strided", "bool", "half"],
)
def test_an_array_or_scalar_arrives_as_it_was_sent(value: Any) -> None:
    received = decode(encode({"value": value}))["value"]

    np.testing.assert_array_equal(received, value)
    assert received.dtype == value.dtype
    assert type(received) is type(value)


def test_keys_and_plain_values_arrive_in_order() -> None:
    message = {"nested": {"ms": 1.5, "list": [1, "two", None]}, "prompt": "stack · größer"}

    received = decode(encode(message))

    assert received == message
    assert list(received) == list(message)


@pytest.mark.parametrize(("value", "words"), [(np.zeros(2, np.complex64), "complex"), ({1}, "set")])
def test_values_of_other_types_cannot_be_sent(value: Any, words: str) -> None:
    refuses(words, encode, {"a": value})


def pack_array(**changes: object) -> bytes:
    """A message whose "image" is an array with some of its parts changed."""
    array = {b"__ndarray__": True, b"data": b"\0" * 12, b"dtype": "|u1", b"shape": [2, 2, 3]}
    for name, value in changes.items():
        array[name.encode()] = value
    return msgpack.packb({"image": array})


def pack_scalar(data: object, dtype: str) -> bytes:
    return msgpack.packb({"s": {b"__npgeneric__": True, b"data": data, b"dtype": dtype}})


# Some messages are written in msgpack's bytes: 81 begins a map with one key, 91 a list with one
# entry, and df a map whose length follows in four bytes. "\xa1a" is the text "a", and c0 is None.
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "the message cannot be unpacked"),
        (encode({"a": 1})[:-1], "the message cannot be unpacked"),
        (encode({"a": 1}) + b"\0", "the message cannot be unpacked"),
        (b"\x91" * 3000 + b"\xc0", "the message has .* 8 deep"),
        (msgpack.packb({"a": "x" * (2**20 + 1)}), "the message cannot be unpacked .*text"),
        (msgpack.packb({"a": [bytes(1025)]}), "a has 1025 bytes outside of an array"),
        (msgpack.packb({bytes(1025): 1}), "the message cannot be unpacked .*key"),
        (pack_array(shape=bytes(3)), r"image .*x00"),
        (b"\xdf\xff\xff\xff\xff", "the message cannot be unpacked"),
        (msgpack.packb({1: 1}), "the message cannot be unpacked"),
        (msgpack.packb([1, 2]), "the message is of type list"),
        (msgpack.packb({b"a": 1}), "the message has the key"),
        (b"\x81\xa1a" * 300 + b"\xc0", "a has .* 8 deep"),
        (b"\x81\xa1a" + b"\x91" * 300 + b"\xc0", "a has .* 8 deep"),
        (msgpack.packb({"t": msgpack.Timestamp(0)}), "t is a msgpack extension"),
        (msgpack.packb({"a\nb": {b"__ndarray__": 1, b"dtype": "|O"}}), r"'a\\nb' is "),
        (msgpack.packb({"a": {"b\n": msgpack.Timestamp(0)}}), r"a/'b\\n' is "),
        (pack_array(shape="2\n2"), r"image .*'2\\n2'"),
        (pack_array(data="text"), "image is an array without bytes"),
        (pack_array(data=b"\0" * 11), "image has 11 bytes"),
        (pack_array(shape=[2, -2, -3]), "image is an array of shape"),
        (pack_array(shape=[2**40, 2**40]), "image has 12 bytes"),
        (pack_array(shape=[0, 2**63]), "image has 12 bytes"),
        (pack_array(shape=[1] * 40), "image is an array of shape"),
        (pack_array(dtype="|O"), r"image .*'\|O'"),
        (pack_array(dtype="f1"), "image .*'f1'"),
        (pack_array(dtype="u1,u1"), "image .*'u1,u1'"),
        (pack_array(dtype=5), "image .*'5'"),
        (pack_scalar("x", "<f4"), "s is a NumPy scalar of a str"),
        (pack_scalar(300, "|u1"), "300 in s"),
    ],
)
def test_an_error_names_what_is_wrong_with_a_message(data: bytes, words: str) -> None:
    refuses(f"^{words}", decode, data)


@pytest.mark.parametrize(
    ("packed", "package"),
    [
        ({b"nd": True, b"type": "<f4", b"shape": [1], b"data": bytes(4)}, "msgpack-numpy"),
        ({"__numpy__": "AAAAAA==", "dtype": "<f4", "shape": [1]}, "json-numpy"),
    ],
)
def test_an_array_of_another_packer_is_named(packed: Any, package: str) -> None:
    data = msgpack.packb({"observation/state": packed})

    refuses(f"observation/state is an array as {package} packs it", decode, data)


def test_an_array_is_a_view_of_its_message() -> None:
    message = encode({"image": np.zeros((4, 4, 3), np.uint8)})

    image = decode(message)["image"]

    assert image.base is not None
    assert not image.flags.owndata
    assert not image.flags.writeable


VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers(-(2**63), 2**64 - 1)
    | strategies.floats(allow_nan=False)
    | strategies.text(max_size=300)
    | strategies.binary(max_size=300),
    lambda entries: (
        strategies.lists(entries, max_size=20)
        | strategies.dictionaries(strategies.text(max_size=40), entries)
    ),
    max_leaves=20,
)


@given(VALUES)
def test_values_are_read_as_the_package_msgpack_reads_them(value: Any) -> None:
    packed = msgpack.packb({"a": value})

    try:
        received = decode(packed)
    except SpearError as error:
        assert "deep" in str(error) or "values" in str(error)
    else:
        assert received == msgpack.unpackb(packed)
