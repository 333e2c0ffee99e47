"""Messages: msgpack maps with arrays in them, as openpi-client packs them.

Nothing in a message is executed; there is no pickle. An array is a map {b"__ndarray__": True,
b"data": bytes, b"dtype": "<f4", b"shape": [...]}, a NumPy scalar {b"__npgeneric__": True, b"data":
value, b"dtype": ...}. Only booleans, integers and floats are accepted.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import msgpack
import numpy as np

from spear.errors import SpearError
from spear.serve.msgpack_reader import (
    MAX_NESTING,
    make_nesting_error,
    quote,
    read_msgpack_with_views,
)

MAX_DIMENSIONS = 8  # of an array
MAX_BINARY_BYTES = 1024  # of a binary that is not the data of an array
FOREIGN_ARRAY_KEYS = {b"nd": "msgpack-numpy", "nd": "msgpack-numpy", "__numpy__": "json-numpy"}
"""Key of an array that another package packed → that package."""
# NumPy's names of the permitted types: byte order, kind and number of bytes, such as "<f4".
_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_MAX_REASON_CHARS = 100


def encode(message: Mapping[str, Any]) -> bytes:
    """Pack a message.

    Args:
        message: texts → numbers, texts, lists, maps, NumPy arrays and scalars.

    Returns:
        Its bytes.

    Raises:
        SpearError: a value is of another type.
    """
    return msgpack.packb(message, default=_pack)


def decode(data: bytes) -> dict[str, Any]:
    """Unpack a message, the inverse of `encode`.

    What it costs is bounded: values and texts are counted while they are read, and arrays are not
    copied.

    Args:
        data: the message's bytes.

    Returns:
        The message; arrays are read-only views of `data`.

    Raises:
        SpearError: the message is broken, too large or has a value of another type; the error names
            its key.

    Example:
        >>> decode(encode({"state": np.zeros(3)}))
        {'state': array([0., 0., 0.])}
    """
    try:
        message = read_msgpack_with_views(data)
    except ValueError as error:
        reason = " ".join(str(error).split())[:_MAX_REASON_CHARS] or type(error).__name__
        raise SpearError(
            f"the message cannot be unpacked ({reason}). Pack one map as openpi-client does, with "
            "arrays as arrays."
        ) from error
    if not isinstance(message, dict):
        raise SpearError(
            f"the message is of type {type(message).__name__}. Send a map of keys to values."
        )
    decoded = {}
    for key, value in message.items():
        decoded[_validate_key(key, "the message")] = _decode_value(value, quote(key))
    return decoded


def _validate_key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise SpearError(f"{path} has the key {quote(key)}. Keys must be texts.")
    return key


def _decode_value(value: Any, path: str, depth: int = 0) -> Any:
    """Decode a value.

    `path` is where it stands in the message, keys joined by slashes, for errors.
    """
    if depth > MAX_NESTING:
        raise make_nesting_error(path.split("/")[0])
    if isinstance(value, dict):
        if b"__ndarray__" in value:
            return _decode_array(value, path)
        if b"__npgeneric__" in value:
            return _decode_scalar(value, path)
        for key, package in FOREIGN_ARRAY_KEYS.items():
            if key in value:
                raise SpearError(
                    f"{path} is an array as {package} packs it. Pack messages as openpi-client "
                    "does (docs/reference/protocol.md)."
                )
        return {
            _validate_key(key, path): _decode_value(entry, f"{path}/{quote(key)}", depth + 1)
            for key, entry in value.items()
        }
    if isinstance(value, list):
        return [_decode_value(entry, path, depth + 1) for entry in value]
    if isinstance(value, memoryview):
        return _copy_small_binary(value, path)
    return value


def _copy_small_binary(view: memoryview, path: str) -> bytes:
    """Copy a binary that is not an array, so it has to be small."""
    if len(view) > MAX_BINARY_BYTES:
        raise SpearError(
            f"{path} has {len(view)} bytes outside of an array, more than {MAX_BINARY_BYTES}. Send "
            "large data as arrays."
        )
    return bytes(view)


def _decode_array(packed: dict[Any, Any], path: str) -> np.ndarray[Any, Any]:
    dtype = _decode_dtype(packed, path)
    data = packed.get(b"data")
    if not isinstance(data, memoryview):
        raise SpearError(f"{path} is an array without bytes. Pack it as openpi-client does.")

    shape = packed.get(b"shape")
    if not _is_shape(shape):
        raise SpearError(
            f"{path} is an array of shape {quote(shape)}. Give up to {MAX_DIMENSIONS} whole "
            "numbers."
        )
    if math.prod(shape) * dtype.itemsize != len(data):
        raise SpearError(
            f"{path} has {len(data)} bytes for an array {dtype} {quote(shape)}, because the "
            "message was cut or mispacked. Pack it as openpi-client does."
        )
    try:
        return np.frombuffer(data, dtype).reshape(shape)
    except ValueError as error:  # a size is 0, and NumPy cannot hold another one, as in [0, 2**70]
        raise SpearError(
            f"{path} is an array of shape {quote(shape)} ({error}). Pack it as openpi-client does."
        ) from error


def _is_shape(shape: Any) -> TypeGuard[list[int]]:
    """Return whether a value is a list of few enough sizes. Booleans are no sizes."""
    return (
        isinstance(shape, list)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
    )


def _decode_scalar(packed: dict[Any, Any], path: str) -> np.generic:
    value = packed.get(b"data")
    dtype = _decode_dtype(packed, path)
    if not isinstance(value, bool | int | float):
        raise SpearError(f"{path} is a NumPy scalar of a {type(value).__name__}. Send a number.")
    try:
        scalar: np.generic = dtype.type(value)
        is_exact = dtype.kind == "f" or scalar == value
    except (ValueError, OverflowError):
        is_exact = False
    if not is_exact:
        raise SpearError(f"{str(value)[:40]} in {path} does not fit {dtype}. Send another type.")
    return scalar


def _decode_dtype(packed: dict[Any, Any], path: str) -> np.dtype[Any]:
    name = packed.get(b"dtype")
    if not isinstance(name, str) or not _DTYPE.fullmatch(name):
        raise SpearError(
            f"{path} is an array of type {str(name)[:40]!r}. Send booleans, integers or floats."
        )
    return np.dtype(name)


def _pack(value: Any) -> Any:
    """Convert a NumPy array or scalar to a map that msgpack can pack."""
    # NumPy's kinds: b boolean, i signed and u unsigned integer, f float.
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        raise SpearError(
            f"an array of type {value.dtype} cannot be sent. Send booleans, integers or floats."
        )
    if isinstance(value, np.ndarray):
        return {
            b"__ndarray__": True,
            b"data": value.tobytes(),
            b"dtype": value.dtype.str,
            b"shape": value.shape,
        }
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise SpearError(
        f"a value of type {type(value).__name__} cannot be sent. Send numbers, texts, lists, maps "
        "and arrays."
    )
