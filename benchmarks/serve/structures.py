"""Messages of every shape that msgpack has, each with what must become of it: for fuzz.py and the tests.

All kinds of values in all their encodings, also longer ones than needed, nested and mixed; arrays and numpy
scalars as openpi-client packs them, right and with one thing wrong. Whether a message is legal is known
because it was made so, not because our decoder says so.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from spear.embodiments import Embodiment
from spear.embodiments.observations import MAX_IMAGE_SIDE_PX, MAX_PROMPT_CHARS, MIN_IMAGE_SIDE_PX
from spear.errors import SpearError
from spear.serve import wire

INTEGERS = {
    0xCC: "B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: "b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
TYPES = ("|b1", "|u1", "|i1", "<u2", ">i2", "<i4", "<f2", "<f4", ">f4", "<f8", "<i8", ">u8")
DEEPEST, MOST = 8, 1000
"""What a message may have, said once more: levels of lists and maps below a key, values in all of them."""
KINDS = ("nil", "bool", "fixed", "integer", "float", "text", "bytes", "list", "map", "array", "scalar",
         "extension", "not utf-8", "bad array", "bad scalar", "bad key", "key twice", "reserved")  # fmt: skip
LEGAL = 11
"""So many of them are legal."""


@dataclass
class Maker:
    """Makes messages; `legal` says whether the last one is, `values` how many its lists and maps have."""

    rng: np.random.Generator
    legal: bool = True
    values: int = 0
    deepest: int = 0
    kinds: list[str] = field(default_factory=list)

    def message(self, wrong: float = 0.1) -> tuple[bytes, Any]:
        """One map, packed, and what it stands for. wrong: how likely each value is to be no legal one."""
        self.legal, self.values, self.deepest, self.kinds = True, 0, 0, []
        packed, meant = self._map(-1, wrong)
        if self.rng.random() < wrong / 2:  # cut, or followed by something
            packed = (
                packed[: self.rng.integers(len(packed))]
                if self.rng.random() < 0.5
                else packed + b"\xc0"
            )
            self.legal = False
        self.legal = self.legal and self.values <= MOST and self.deepest <= DEEPEST
        return packed, meant

    def value(self, depth: int = 0, wrong: float = 0.1) -> tuple[bytes, Any]:
        """A value of any kind, packed, and what it stands for."""
        rng = self.rng
        legal = rng.random() >= wrong
        kind = KINDS[rng.integers(LEGAL) if legal else rng.integers(LEGAL, len(KINDS))]
        self.legal, self.deepest = self.legal and legal, max(self.deepest, depth)
        self.kinds.append(kind)
        if kind == "nil":
            return b"\xc0", None
        if kind == "bool":
            yes = bool(rng.integers(2))
            return bytes([0xC2 + yes]), yes
        if kind == "fixed":
            number = int(rng.integers(-32, 128))
            return struct.pack("b", number), number
        if kind == "integer":
            head = int(rng.choice(list(INTEGERS)))
            raw = rng.bytes(struct.calcsize(INTEGERS[head]))
            return bytes([head]) + raw, struct.unpack(INTEGERS[head], raw)[0]
        if kind == "float":
            form, first = ((">f", 0xCA), (">d", 0xCB))[rng.integers(2)]
            raw = rng.bytes(struct.calcsize(form))
            return bytes([first]) + raw, struct.unpack(form, raw)[0]
        if kind == "text":
            return self._text(
                "".join(chr(c) for c in rng.choice([32, 97, 0, 10, 246, 0x1F600], rng.integers(6)))
            )
        if kind == "bytes":
            data = rng.bytes(int(rng.integers(40)))
            return self._sized(0xC4, data), data
        if kind == "list":
            return self._list(depth, wrong)
        if kind in ("map", "bad key", "key twice"):
            return self._map(depth, wrong, None if kind == "map" else kind)
        if kind in ("array", "bad array"):
            return self._array(kind == "array")
        if kind in ("scalar", "bad scalar"):
            return self._scalar(kind == "scalar")
        if kind == "extension":
            size = int(rng.choice([1, 2, 4, 8, 16]))
            return bytes([0xD4 + size.bit_length() - 1]) + rng.bytes(1 + size), None
        return (b"\xa2\xc3\x28", None) if kind == "not utf-8" else (b"\xc1", None)

    def _sized(self, head: int, data: bytes) -> bytes:
        """With its length in 1, 2 or 4 bytes, whichever: head is that of 1."""
        width = int(self.rng.integers(3))
        return bytes([head + width]) + struct.pack((">B", ">H", ">I")[width], len(data)) + data

    def _text(self, text: str) -> tuple[bytes, str]:
        data = text.encode()
        short = len(data) < 32 and self.rng.random() < 0.5
        return (bytes([0xA0 + len(data)]) + data if short else self._sized(0xD9, data)), text

    def _head(self, count: int, short: int, head: int) -> bytes:
        self.values += 1 + count
        if count < 16 and self.rng.random() < 0.5:
            return bytes([short + count])
        wide = count >= 1 << 16 or self.rng.random() < 0.5
        return bytes([head + wide]) + struct.pack(">I" if wide else ">H", count)

    def _list(self, depth: int, wrong: float) -> tuple[bytes, list[Any]]:
        count = int(self.rng.choice([0, 1, 2, 5, 40, 1500], p=[0.2, 0.4, 0.2, 0.15, 0.04, 0.01]))
        if count > 5:
            return self._head(count, 0x90, 0xDC) + count * b"\x07", count * [7]
        made = [self.value(depth + 1, wrong) for _ in range(count)]
        return self._head(count, 0x90, 0xDC) + b"".join(p for p, _ in made), [m for _, m in made]

    def _map(
        self, depth: int, wrong: float, bad: str | None = None
    ) -> tuple[bytes, dict[str, Any]]:
        count = int(self.rng.integers(bad is not None, 4))
        made = [(self._text(f"k{i}"), self.value(depth + 1, wrong)) for i in range(count)]
        if bad == "bad key":
            odd = (b"\x05", b"\xc0", b"\xc4\x01a", b"\x90", b"\x80")[self.rng.integers(5)]
            made[0] = ((odd, ""), made[0][1])
        if bad == "key twice":
            made.append(made[0])
        packed = self._head(len(made), 0x80, 0xDE) + b"".join(k + v for (k, _), (v, _) in made)
        return packed, {k: v for (_, k), (_, v) in made}

    def _parts(self, parts: dict[bytes, bytes]) -> bytes:
        """A map with bytes as keys, in any order."""
        keys = list(self.rng.permutation(np.array(list(parts), object)))
        return self._head(len(parts), 0x80, 0xDE) + b"".join(
            self._sized(0xC4, k) + parts[k] for k in keys
        )

    def _array(self, right: bool) -> tuple[bytes, Any]:
        name = str(self.rng.choice(TYPES))
        shape = [int(n) for n in self.rng.integers(0, 4, self.rng.integers(0, 4))]
        data = self.rng.bytes(int(np.prod(shape)) * np.dtype(name).itemsize)
        meant = np.frombuffer(data, name).reshape(shape)
        wrong = None if right else int(self.rng.integers(7))
        name = {0: "|O", 1: "<U4", 2: "f1"}.get(wrong, name)  # type: ignore[arg-type]
        data = data + b"\0" if wrong == 3 else data
        sizes = self._head(len(shape), 0x90, 0xDC) + b"".join(bytes([n]) for n in shape)
        if wrong == 4:
            sizes = self._head(1, 0x90, 0xDC) + b"\xff"
        parts = {
            b"__ndarray__": b"\xc3",
            b"data": self._sized(0xC4, data),
            b"dtype": self._text(name)[0],
        }
        parts[b"shape"] = self._text("8")[0] if wrong == 5 else sizes
        if wrong == 6:
            del parts[(b"data", b"dtype", b"shape")[self.rng.integers(3)]]
        return self._parts(parts), meant

    def _scalar(self, right: bool) -> tuple[bytes, Any]:
        name = str(self.rng.choice(TYPES))
        fits = np.dtype(name).type(self.rng.integers(2))
        data = struct.pack("b", int(fits))
        wrong = None if right else int(self.rng.integers(4))
        if wrong == 0:
            name, data = "|u1", b"\xcd\x01\x2c"
        elif wrong == 1:
            name, data = "<i4", b"\xcb" + struct.pack(">d", 0.5)
        parts = {b"__npgeneric__": b"\xc3", b"data": data, b"dtype": self._text(name)[0]}
        if wrong == 2:
            parts[b"data"] = self._text("1")[0]
        elif wrong == 3:
            del parts[(b"data", b"dtype")[self.rng.integers(2)]]
        return self._parts(parts), fits


def check_message(maker: Maker) -> str:
    """Makes a message and decodes it: "refused" or "accepted". Raises AssertionError where it had to be the
    other, or another thing was understood."""
    packed, meant = maker.message()
    try:
        got = wire.decode(packed)
    except SpearError as error:
        _one_line(error)
        assert not maker.legal, (packed, str(error))
        return "refused"
    assert maker.legal, packed
    assert _same(got, meant), packed
    return "accepted"


def check_observation(maker: Maker, robot: Embodiment, good: dict[str, Any]) -> str:
    """The same for an observation that is good but for one value. What is accepted must be one."""
    maker.message()
    packed, _ = maker.value()
    keys = [*robot.required, *robot.optional]
    key = str(maker.rng.choice([*keys, keys[0] + "s"]))
    others = {k: v for k, v in good.items() if k != key}
    whole = bytes([0x80 + len(others) + 1]) + wire.encode(others)[1:] + maker._text(key)[0] + packed
    try:
        seen = robot.read(wire.decode(whole))
    except SpearError as error:
        _one_line(error)
        return "refused"
    state, words = seen["observation/state"], seen["prompt"]
    assert (
        state.shape == (8,)
        and np.isfinite(state).all()
        and abs(np.linalg.norm(state[3:7]) - 1) < 1e-3
    )
    assert isinstance(words, str) and words.strip() and len(words) <= MAX_PROMPT_CHARS
    assert type(seen.get("seed", 0)) is int
    for name, image in seen.items():
        if name.endswith("image"):
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            assert (
                min(image.shape[:2]) >= MIN_IMAGE_SIDE_PX
                and max(image.shape[:2]) <= MAX_IMAGE_SIDE_PX
            )
    return "accepted"


def _one_line(error: SpearError) -> None:
    assert "\n" not in str(error) and len(str(error)) < 500, error


def _same(got: Any, meant: Any) -> bool:
    if isinstance(meant, dict):
        return list(got) == list(meant) and all(_same(got[k], v) for k, v in meant.items())
    if isinstance(meant, list):
        return len(got) == len(meant) and all(map(_same, got, meant))
    if isinstance(meant, np.ndarray | np.generic):
        same = type(got) is type(meant) and got.dtype == meant.dtype and got.shape == meant.shape
        return bool(same and got.tobytes() == meant.tobytes())
    return type(got) is type(meant) and (got == meant or (got != got and meant != meant))
