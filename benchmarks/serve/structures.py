"""Messages of every shape that msgpack has, and what must become of each: for fuzz.py and the
tests.

They contain all kinds of values in all their encodings, also longer ones than needed, nested and
mixed; arrays and NumPy scalars as openpi-client packs them, right and with one thing wrong. Whether
a message is legal is known because it was made so, not because our decoder says so.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from spear.embodiments import Embodiment
from spear.embodiments.observations import (
    MAX_IMAGE_SIDE_PX,
    MAX_PROMPT_CHARS,
    MIN_IMAGE_SIDE_PX,
)
from spear.errors import SpearError
from spear.serve import wire

# What a message may have. These numbers repeat those of `spear.serve.wire`, as an independent
# check.
MAX_DEPTH = 8  # levels of lists and maps below a key
MAX_VALUES = 1000  # in all lists and maps
MAX_ERROR_CHARS = 500

INTEGER_FORMATS = {
    0xCC: "B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: "b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
"""First byte of a packed integer → its format for `struct`."""
FLOAT_FORMATS = ((">f", 0xCA), (">d", 0xCB))
DTYPES = ("|b1", "|u1", "|i1", "<u2", ">i2", "<i4", "<f2", "<f4", ">f4", "<f8", "<i8", ">u8")
CHARACTERS = [32, 97, 0, 10, 246, 0x1F600]
LIST_LENGTHS = [0, 1, 2, 5, 40, 1500]
LIST_LENGTH_PROBABILITIES = [0.2, 0.4, 0.2, 0.15, 0.04, 0.01]

TEXT_HEAD = 0xD9  # heads of values whose length is written in one byte
BYTES_HEAD = 0xC4
SHORT_LIST_HEAD = 0x90  # heads of lists and maps with less than 16 values
SHORT_MAP_HEAD = 0x80
LIST_HEAD = 0xDC
MAP_HEAD = 0xDE

ARRAY_MISTAKES = (
    "objects", "texts", "unknown dtype", "too long", "negative shape", "text as shape",
    "part missing",
)  # fmt: skip
SCALAR_MISTAKES = ("out of range", "not whole", "text", "part missing")
ILLEGAL_KEYS = (b"\x05", b"\xc0", b"\xc4\x01a", b"\x90", b"\x80")


class Packed(NamedTuple):
    """A packed value, and the value that it stands for."""

    data: bytes
    value: Any


@dataclass
class MessageMaker:
    """Makes messages, and knows whether the last one is legal.

    Attributes:
        rng: what draws them.
        is_legal: whether the last message is legal.
        num_values: how many values its lists and maps have.
        depth: how deep they are nested.
    """

    rng: np.random.Generator
    is_legal: bool = True
    num_values: int = 0
    depth: int = 0

    def __post_init__(self) -> None:
        self._legal_makers: list[Callable[[int, float], Packed]] = [
            self._make_nil,
            self._make_bool,
            self._make_small_integer,
            self._make_integer,
            self._make_float,
            self._make_text,
            self._make_bytes,
            self._make_list,
            self._make_map,
            self._make_array,
            self._make_scalar,
        ]
        self._illegal_makers: list[Callable[[int, float], Packed]] = [
            self._make_extension,
            self._make_invalid_utf8,
            self._make_wrong_array,
            self._make_wrong_scalar,
            self._make_map_with_illegal_key,
            self._make_map_with_key_twice,
            self._make_reserved_byte,
        ]

    def make_message(self, illegal_probability: float = 0.1) -> Packed:
        """Make one map. Each of its values is illegal with that probability."""
        self.is_legal = True
        self.num_values = 0
        self.depth = 0
        message = self._make_map(-1, illegal_probability)  # so that its values have depth 0
        data = message.data
        if self.rng.random() < illegal_probability / 2:
            is_cut = self.rng.random() < 0.5
            data = data[: self.rng.integers(len(data))] if is_cut else data + b"\xc0"
            self.is_legal = False
        is_within_limits = self.num_values <= MAX_VALUES and self.depth <= MAX_DEPTH
        self.is_legal = self.is_legal and is_within_limits
        return Packed(data, message.value)

    def make_value(self, depth: int = 0, illegal_probability: float = 0.1) -> Packed:
        """Make a value of any kind."""
        is_legal = self.rng.random() >= illegal_probability
        makers = self._legal_makers if is_legal else self._illegal_makers
        make = makers[self.rng.integers(len(makers))]
        self.is_legal = self.is_legal and is_legal
        self.depth = max(self.depth, depth)
        return make(depth, illegal_probability)

    # Legal values

    def _make_nil(self, *_: Any) -> Packed:
        return Packed(b"\xc0", None)

    def _make_bool(self, *_: Any) -> Packed:
        value = bool(self.rng.integers(2))
        return Packed(bytes([0xC2 + value]), value)

    def _make_small_integer(self, *_: Any) -> Packed:
        value = int(self.rng.integers(-32, 128))
        return Packed(struct.pack("b", value), value)

    def _make_integer(self, *_: Any) -> Packed:
        head = int(self.rng.choice(list(INTEGER_FORMATS)))
        number_format = INTEGER_FORMATS[head]
        data = self.rng.bytes(struct.calcsize(number_format))
        [value] = struct.unpack(number_format, data)
        return Packed(bytes([head]) + data, value)

    def _make_float(self, *_: Any) -> Packed:
        number_format, head = FLOAT_FORMATS[self.rng.integers(2)]
        data = self.rng.bytes(struct.calcsize(number_format))
        [value] = struct.unpack(number_format, data)
        return Packed(bytes([head]) + data, value)

    def _make_text(self, *_: Any) -> Packed:
        characters = self.rng.choice(CHARACTERS, self.rng.integers(6))
        text = "".join(chr(character) for character in characters)
        return Packed(self.pack_text(text), text)

    def _make_bytes(self, *_: Any) -> Packed:
        value = self.rng.bytes(int(self.rng.integers(40)))
        return Packed(self._pack_sized(BYTES_HEAD, value), value)

    def _make_list(self, depth: int, illegal_probability: float) -> Packed:
        count = int(self.rng.choice(LIST_LENGTHS, p=LIST_LENGTH_PROBABILITIES))
        if count > 5:
            head = self._pack_count(count, SHORT_LIST_HEAD, LIST_HEAD)
            return Packed(head + count * b"\x07", count * [7])
        entries = [self.make_value(depth + 1, illegal_probability) for _ in range(count)]
        data = self._pack_count(count, SHORT_LIST_HEAD, LIST_HEAD)
        for entry in entries:
            data += entry.data
        return Packed(data, [entry.value for entry in entries])

    def _make_map(self, depth: int, illegal_probability: float) -> Packed:
        count = int(self.rng.integers(0, 4))
        return self._pack_map(self._make_entries(count, depth, illegal_probability))

    def _make_array(self, *_: Any) -> Packed:
        return self._pack_array(mistake=None)

    def _make_scalar(self, *_: Any) -> Packed:
        return self._pack_scalar(mistake=None)

    # Illegal values

    def _make_extension(self, *_: Any) -> Packed:
        size = int(self.rng.choice([1, 2, 4, 8, 16]))
        head = bytes([0xD4 + size.bit_length() - 1])
        return Packed(head + self.rng.bytes(1 + size), None)

    def _make_invalid_utf8(self, *_: Any) -> Packed:
        return Packed(b"\xa2\xc3\x28", None)

    def _make_wrong_array(self, *_: Any) -> Packed:
        return self._pack_array(str(self.rng.choice(ARRAY_MISTAKES)))

    def _make_wrong_scalar(self, *_: Any) -> Packed:
        return self._pack_scalar(str(self.rng.choice(SCALAR_MISTAKES)))

    def _make_map_with_illegal_key(self, depth: int, illegal_probability: float) -> Packed:
        count = int(self.rng.integers(1, 4))
        entries = self._make_entries(count, depth, illegal_probability)
        key = ILLEGAL_KEYS[self.rng.integers(len(ILLEGAL_KEYS))]
        _, first_value = entries[0]
        entries[0] = (Packed(key, ""), first_value)
        return self._pack_map(entries)

    def _make_map_with_key_twice(self, depth: int, illegal_probability: float) -> Packed:
        count = int(self.rng.integers(1, 4))
        entries = self._make_entries(count, depth, illegal_probability)
        return self._pack_map([*entries, entries[0]])

    def _make_reserved_byte(self, *_: Any) -> Packed:
        return Packed(b"\xc1", None)

    # Encodings

    def pack_text(self, text: str) -> bytes:
        """Pack a text in any of its encodings."""
        data = text.encode()
        if len(data) < 32 and self.rng.random() < 0.5:
            return bytes([0xA0 + len(data)]) + data
        return self._pack_sized(TEXT_HEAD, data)

    def _pack_sized(self, one_byte_head: int, data: bytes) -> bytes:
        """Pack data with their length in 1, 2 or 4 bytes, whichever."""
        width = int(self.rng.integers(3))
        length = struct.pack((">B", ">H", ">I")[width], len(data))
        return bytes([one_byte_head + width]) + length + data

    def _pack_count(self, count: int, short_head: int, head: int) -> bytes:
        """Pack the head of a list or a map, and count its values."""
        self.num_values += 1 + count
        if count < 16 and self.rng.random() < 0.5:
            return bytes([short_head + count])
        is_wide = count >= 1 << 16 or self.rng.random() < 0.5
        return bytes([head + is_wide]) + struct.pack(">I" if is_wide else ">H", count)

    def _make_entries(
        self, count: int, depth: int, illegal_probability: float
    ) -> list[tuple[Packed, Packed]]:
        entries = []
        for index in range(count):
            key = f"k{index}"
            value = self.make_value(depth + 1, illegal_probability)
            entries.append((Packed(self.pack_text(key), key), value))
        return entries

    def _pack_map(self, entries: list[tuple[Packed, Packed]]) -> Packed:
        data = self._pack_count(len(entries), SHORT_MAP_HEAD, MAP_HEAD)
        for key, value in entries:
            data += key.data + value.data
        return Packed(data, {key.value: value.value for key, value in entries})

    def _pack_parts(self, packed_entries: dict[bytes, bytes]) -> bytes:
        """Pack a map with bytes as keys, in any order."""
        data = self._pack_count(len(packed_entries), SHORT_MAP_HEAD, MAP_HEAD)
        for key in self.rng.permutation(np.array(list(packed_entries), object)):
            data += self._pack_sized(BYTES_HEAD, key) + packed_entries[key]
        return data

    def _pack_array(self, mistake: str | None) -> Packed:
        dtype = str(self.rng.choice(DTYPES))
        shape = [int(size) for size in self.rng.integers(0, 4, self.rng.integers(0, 4))]
        data = self.rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        array = np.frombuffer(data, dtype).reshape(shape)

        wrong_dtypes = {"objects": "|O", "texts": "<U4", "unknown dtype": "f1"}
        dtype = wrong_dtypes.get(mistake or "", dtype)
        if mistake == "too long":
            data += b"\0"
        packed_shape = self._pack_count(len(shape), SHORT_LIST_HEAD, LIST_HEAD) + bytes(shape)
        if mistake == "negative shape":
            packed_shape = self._pack_count(1, SHORT_LIST_HEAD, LIST_HEAD) + b"\xff"
        if mistake == "text as shape":
            packed_shape = self.pack_text("8")
        packed_entries = {
            b"__ndarray__": b"\xc3",
            b"data": self._pack_sized(BYTES_HEAD, data),
            b"dtype": self.pack_text(dtype),
            b"shape": packed_shape,
        }
        if mistake == "part missing":
            del packed_entries[(b"data", b"dtype", b"shape")[self.rng.integers(3)]]
        return Packed(self._pack_parts(packed_entries), array)

    def _pack_scalar(self, mistake: str | None) -> Packed:
        dtype = str(self.rng.choice(DTYPES))
        scalar = np.dtype(dtype).type(self.rng.integers(2))
        data = struct.pack("b", int(scalar))
        if mistake == "out of range":
            dtype = "|u1"
            data = b"\xcd" + struct.pack(">H", 300)
        elif mistake == "not whole":
            dtype = "<i4"
            data = b"\xcb" + struct.pack(">d", 0.5)
        elif mistake == "text":
            data = self.pack_text("1")
        packed_entries = {b"__npgeneric__": b"\xc3", b"data": data, b"dtype": self.pack_text(dtype)}
        if mistake == "part missing":
            del packed_entries[(b"data", b"dtype")[self.rng.integers(2)]]
        return Packed(self._pack_parts(packed_entries), scalar)


def check_message(maker: MessageMaker) -> str:
    """Make a message and decode it; return "refused" or "accepted".

    Raises AssertionError if a legal message is refused, if an illegal one is accepted, or if the
    decoded message is another one than was made.
    """
    message = maker.make_message()
    try:
        decoded = wire.decode(message.data)
    except SpearError as error:
        _check_error(error)
        assert not maker.is_legal, (message.data, str(error))
        return "refused"
    assert maker.is_legal, message.data
    assert _is_same(decoded, message.value), message.data
    return "accepted"


def check_observation(maker: MessageMaker, robot: Embodiment, good: dict[str, Any]) -> str:
    """Replace one value of a good observation and read it; return "refused" or "accepted".

    Raises AssertionError if an observation is accepted that a policy could not take.
    """
    maker.make_message()
    value = maker.make_value()
    keys = [*robot.required, *robot.optional]
    misspelled_key = keys[0] + "s"
    key = str(maker.rng.choice([*keys, misspelled_key]))
    other_entries = {name: entry for name, entry in good.items() if name != key}
    head = bytes([SHORT_MAP_HEAD + len(other_entries) + 1])
    message = head + wire.encode(other_entries)[1:] + maker.pack_text(key) + value.data
    try:
        observation = robot.read(wire.decode(message))
    except SpearError as error:
        _check_error(error)
        return "refused"

    state = observation["observation/state"]
    assert state.shape == (8,)
    assert np.isfinite(state).all()
    assert abs(np.linalg.norm(state[3:7]) - 1) < 1e-3
    prompt = observation["prompt"]
    assert isinstance(prompt, str)
    assert prompt.strip()
    assert len(prompt) <= MAX_PROMPT_CHARS
    assert type(observation.get("seed", 0)) is int
    for name, image in observation.items():
        if name.endswith("image"):
            assert image.dtype == np.uint8
            assert image.ndim == 3
            assert image.shape[2] == 3
            assert min(image.shape[:2]) >= MIN_IMAGE_SIDE_PX
            assert max(image.shape[:2]) <= MAX_IMAGE_SIDE_PX
    return "accepted"


def _check_error(error: SpearError) -> None:
    assert "\n" not in str(error), error
    assert len(str(error)) < MAX_ERROR_CHARS, error


def _is_same(decoded: Any, expected: Any) -> bool:
    """Compare values, types and the order of keys; NaN equals NaN."""
    if type(decoded) is not type(expected):
        return False
    if isinstance(expected, dict):
        return list(decoded) == list(expected) and all(
            _is_same(decoded[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return len(decoded) == len(expected) and all(map(_is_same, decoded, expected))
    if isinstance(expected, np.ndarray | np.generic):
        has_same_form = decoded.dtype == expected.dtype and decoded.shape == expected.shape
        return bool(has_same_form and decoded.tobytes() == expected.tobytes())
    are_both_nan = decoded != decoded and expected != expected
    return decoded == expected or are_both_nan
