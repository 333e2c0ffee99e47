"""Messages: what is sent arrives, and nothing that arrives can hurt."""

import msgpack
import numpy as np
import pytest

from refusals import refuses
from spear.serve.wire import decode, encode


def test_what_is_sent_arrives_and_what_cannot_be_sent_is_said() -> None:
    sent = {
        "image": np.arange(24, dtype=np.uint8).reshape(2, 4, 3),
        "state": np.linspace(0, 1, 8, dtype=">f8"),
        "empty": np.zeros((0, 3), np.float32),
        "strided": np.arange(10)[::2],
        "flag": np.bool_(True),
        "half": np.float16(0.5),
        "nested": {"ms": 1.5, "list": [1, "two", None]},
        "prompt": "stack the cubes · größer",
    }
    got = decode(encode(sent))
    assert list(got) == list(sent)
    for key, value in sent.items():
        np.testing.assert_array_equal(got[key], value)
        if isinstance(value, np.ndarray | np.generic):
            assert got[key].dtype == value.dtype and type(got[key]) is type(value)
    refuses("complex", encode, {"a": np.zeros(2, np.complex64)})
    refuses("a set", encode, {"a": {1}})


def packed(**changes: object) -> bytes:
    """A message whose "image" is an array with some of its parts changed."""
    array = {b"__ndarray__": True, b"data": b"\0" * 12, b"dtype": "|u1", b"shape": [2, 2, 3]}
    return msgpack.packb({"image": {**array, **{k.encode(): v for k, v in changes.items()}}})


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"", "message: cannot be unpacked"),
        (encode({"a": 1})[:-1], "message: cannot be unpacked"),
        (encode({"a": 1}) + b"\0", "message: cannot be unpacked"),
        (b"\x91" * 3000 + b"\xc0", "message: cannot be unpacked"),
        (b"\x81\xa1a" * 300 + b"\xc0", "a: .* 8 deep"),
        (b"\x81\xa1a" + b"\x91" * 300 + b"\xc0", "a: .* 8 deep"),
        (b"\xdf\xff\xff\xff\xff", "message: cannot be unpacked"),
        (msgpack.packb([1, 2]), "message: a list"),
        (msgpack.packb({b"a": 1}), "message: key"),
        (msgpack.packb({1: 1}), "message: cannot be unpacked"),
        (msgpack.packb({"t": msgpack.Timestamp(0)}), "t: "),
        (msgpack.packb({"a\nb": {b"__ndarray__": 1, b"dtype": "|O"}}), r"'a\\nb': "),
        (msgpack.packb({"a": {"b\n": msgpack.Timestamp(0)}}), r"a/'b\\n': "),
        (packed(shape="2\n2"), r"image: .*'2\\n2'"),
        (packed(data="text"), "image: "),
        (packed(data=b"\0" * 11), "image: 11 bytes"),
        (packed(shape=[2, -2, -3]), "image: "),
        (packed(shape=[2**40, 2**40]), "image: 12 bytes"),
        (packed(shape=[0, 2**63]), "image: "),
        (packed(shape=[1] * 40), "image: "),
        (packed(dtype="|O"), r"image: .*'\|O'"),
        (packed(dtype="f1"), "image: .*'f1'"),
        (packed(dtype="u1,u1"), "image: .*'u1,u1'"),
        (packed(dtype=5), "image: .*'5'"),
        (msgpack.packb({"s": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}), "s: "),
        (msgpack.packb({"s": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}), "s: 300"),
    ],
)
def test_what_is_no_message_is_refused_by_name(data: bytes, where: str) -> None:
    refuses(f"^{where}", decode, data)
