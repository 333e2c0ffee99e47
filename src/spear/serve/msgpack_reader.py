"""Reads msgpack without copying what is large: binaries are views of the message.

The package `msgpack` copies each binary, so that a message of 16 MiB would take twice its size, in
thousands of pieces that leave holes in the memory.
"""

import struct
from typing import Any

from spear.errors import SpearError

MAX_NESTING = 8  # levels of maps and lists below a key
MAX_VALUES = 1000  # in the lists and maps of a message; larger data come as arrays
MAX_TEXT_BYTES = 2**20  # of all texts of a message
MAX_KEY_BYTES = 1024  # of a key that is a binary
_MAX_QUOTED_CHARS = 80
_MAX_READ_NESTING = MAX_NESTING + 3  # an array is a map with a list in it
# Number of bytes that a length is written in -> how to read the length.
_UNPACK_LENGTH = {1: struct.Struct(">B"), 2: struct.Struct(">H"), 4: struct.Struct(">I")}

# The first byte of a value says what it is. Those below are followed by a number or by a length.
_NUMBERS = {
    0xCA: struct.Struct(">f"),
    0xCB: struct.Struct(">d"),
    0xCC: struct.Struct(">B"),
    0xCD: struct.Struct(">H"),
    0xCE: struct.Struct(">I"),
    0xCF: struct.Struct(">Q"),
    0xD0: struct.Struct(">b"),
    0xD1: struct.Struct(">h"),
    0xD2: struct.Struct(">i"),
    0xD3: struct.Struct(">q"),
}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
# First byte -> number of bytes that the following length is written in.
_NUM_LENGTH_BYTES_OF_BINARY = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_NUM_LENGTH_BYTES_OF_TEXT = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_NUM_LENGTH_BYTES_OF_LIST = {0xDC: 2, 0xDD: 4}
_NUM_LENGTH_BYTES_OF_MAP = {0xDE: 2, 0xDF: 4}
_EXTENSIONS = (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8)
# The first byte of a short map, list or text also has its length: for a list of two, 0x92.
_FIRST_SHORT_MAP = 0x80
_FIRST_SHORT_LIST = 0x90
_FIRST_SHORT_TEXT = 0xA0
_LAST_SHORT_TEXT = 0xBF
# A byte below 0x80 is itself a number from 0 to 127; one from 0xE0 on, a number from -32 to -1.
_FIRST_NEGATIVE = 0xE0


def read_msgpack_with_views(data: bytes) -> Any:
    """Read one value.

    Args:
        data: its bytes, and no others.

    Returns:
        None, a bool, int, float, str, list or dict, or for a binary a read-only memoryview.

    Raises:
        SpearError: the value has an extension or is nested too deeply; the error names its key.
        ValueError: the bytes are broken, or have too many values or too much text.
    """
    reader = _Reader(data)
    value = reader.read_value()
    reader.check_end()
    return value


class _Reader:
    """Reads values one after the other, and counts what they cost."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)
        self._position = 0
        self._num_values = 0
        self._num_text_bytes = 0
        self._path: list[str] = []  # the keys of the maps around the value that is read
        self._depth = 0

    def read_value(self) -> Any:
        """Read the next value."""
        head = self._take(1)[0]
        if head < _FIRST_SHORT_MAP:
            return head
        if head >= _FIRST_NEGATIVE:
            return head - 0x100
        if head in _CONSTANTS:
            return _CONSTANTS[head]
        if head in _NUMBERS:
            return self._read_number(_NUMBERS[head])
        return self._read_sized(head)

    def check_end(self) -> None:
        """Raise `ValueError` if bytes are left."""
        num_bytes_left = len(self._data) - self._position
        if num_bytes_left:
            raise ValueError(f"{num_bytes_left} bytes after the end")

    def _read_sized(self, head: int) -> Any:
        """Read a text, a binary, a list or a map."""
        if head < _FIRST_SHORT_LIST:
            return self._read_map(head - _FIRST_SHORT_MAP)
        if head < _FIRST_SHORT_TEXT:
            return self._read_list(head - _FIRST_SHORT_LIST)
        if head <= _LAST_SHORT_TEXT:
            return self._read_text(head - _FIRST_SHORT_TEXT)
        if head in _NUM_LENGTH_BYTES_OF_BINARY:
            return self._take(self._read_length(_NUM_LENGTH_BYTES_OF_BINARY[head]))
        if head in _NUM_LENGTH_BYTES_OF_TEXT:
            return self._read_text(self._read_length(_NUM_LENGTH_BYTES_OF_TEXT[head]))
        if head in _NUM_LENGTH_BYTES_OF_LIST:
            return self._read_list(self._read_length(_NUM_LENGTH_BYTES_OF_LIST[head]))
        if head in _NUM_LENGTH_BYTES_OF_MAP:
            return self._read_map(self._read_length(_NUM_LENGTH_BYTES_OF_MAP[head]))
        if head in _EXTENSIONS:
            path = "/".join(self._path) or "the message"
            raise SpearError(
                f"{path} is a msgpack extension. Send numbers, texts, lists, maps or arrays."
            )
        raise ValueError(f"a value that begins with the byte {head:#x}")

    def _read_list(self, num_entries: int) -> list[Any]:
        self._begin_container(num_entries)
        entries = [self.read_value() for _ in range(num_entries)]
        self._depth -= 1
        return entries

    def _read_map(self, num_entries: int) -> dict[str | bytes, Any]:
        self._begin_container(num_entries)
        entries: dict[str | bytes, Any] = {}
        for _ in range(num_entries):
            key = self._read_key()
            if key in entries:
                raise ValueError("a map with a key twice")
            self._path.append(quote(key))
            entries[key] = self.read_value()
            self._path.pop()
        self._depth -= 1
        return entries

    def _begin_container(self, num_entries: int) -> None:
        """Count the entries of a list or a map before they are read, and go one level deeper.

        The caller goes back up when it has read the entries. The keys of a map are not counted.
        """
        self._num_values += 1 + num_entries
        if self._num_values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values in lists and maps")
        self._depth += 1
        if self._depth > _MAX_READ_NESTING:
            raise make_nesting_error(self._path[0] if self._path else "the message")

    def _read_key(self) -> str | bytes:
        key = self.read_value()
        if isinstance(key, memoryview) and len(key) <= MAX_KEY_BYTES:
            return bytes(key)
        if isinstance(key, str):
            return key
        raise ValueError(f"a key that is a {type(key).__name__}")

    def _read_text(self, num_bytes: int) -> str:
        self._num_text_bytes += num_bytes
        if self._num_text_bytes > MAX_TEXT_BYTES:
            raise ValueError(f"more than {MAX_TEXT_BYTES} bytes of text")
        return str(self._take(num_bytes), "utf-8")

    def _read_number(self, number_format: struct.Struct) -> int | float:
        number: int | float = number_format.unpack(self._take(number_format.size))[0]
        return number

    def _read_length(self, num_length_bytes: int) -> int:
        length: int = _UNPACK_LENGTH[num_length_bytes].unpack(self._take(num_length_bytes))[0]
        return length

    def _take(self, num_bytes: int) -> memoryview:
        """Return the next bytes of the message, and move behind them."""
        end = self._position + num_bytes
        if end > len(self._data):
            raise ValueError(f"{end - len(self._data)} bytes are missing")
        view = self._data[self._position : end]
        self._position = end
        return view


def make_nesting_error(key: str) -> SpearError:
    """Make the error for a value that is nested too deeply."""
    return SpearError(
        f"{key} has maps or lists more than {MAX_NESTING} deep. Send numbers, texts or arrays."
    )


def quote(value: Any) -> str:
    """Return a part of a message for an error, on one line and not too long."""
    if isinstance(value, memoryview):
        value = bytes(value[:_MAX_QUOTED_CHARS])
    text = str(value)[:_MAX_QUOTED_CHARS]
    return text if text.isprintable() else repr(text)
