"""Messages: msgpack maps with arrays in them, as openpi-client packs them. No pickle, nothing is executed.

An array is a map {b"__ndarray__": True, b"data": bytes, b"dtype": "<f4", b"shape": [...]}, a numpy scalar
{b"__npgeneric__": True, b"data": value, b"dtype": ...}. Only booleans, integers and floats are accepted.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from spear.errors import SpearError

_TYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_DEPTH = 8
"""The most dimensions of an array, and the deepest nesting of maps and lists."""
_VALUES = 1000
"""The most values in the lists and maps of a message: what is many is an array (our choice)."""


def encode(message: Mapping[str, Any]) -> bytes:
    """A message as bytes. Values: numbers, texts, lists, maps, numpy arrays and scalars."""
    return msgpack.packb(message, default=_pack)


def decode(data: bytes) -> dict[str, Any]:
    """The inverse of `encode`; arrays are read-only views. Raises `SpearError` naming the bad key.

    What it costs is bounded: lists and maps are counted while they are unpacked.
    """
    left = _VALUES

    def counted(values: list[Any]) -> list[Any]:
        nonlocal left
        left -= 1 + len(values)
        if left < 0:
            raise ValueError(f"more than {_VALUES} values in lists and maps")
        return values

    def unique(pairs: list[Any]) -> dict[Any, Any]:
        made = dict(counted(pairs))
        if len(made) < len(pairs):
            raise ValueError("a map with a key twice")
        return made

    hooks = {"list_hook": counted, "object_pairs_hook": unique}
    try:
        message = msgpack.unpackb(data, max_array_len=_VALUES, max_map_len=_VALUES, **hooks)
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        how = "pack one map as openpi-client does, with arrays as arrays"
        raise SpearError(f"message: cannot be unpacked ({reason}): {how}") from error
    if not isinstance(message, dict):
        raise SpearError(f"message: a {type(message).__name__}: send a map of keys to values")
    return {_key(key, "message"): _value(value, _shown(key)) for key, value in message.items()}


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise SpearError(f"{where}: key {_shown(key)}: keys must be texts")
    return key


def _shown(what: Any) -> str:
    """A part of a message for an error, which is one line however odd it is."""
    text = str(what)[:80]
    return text if text.isprintable() else repr(text)


def _value(value: Any, where: str, depth: int = 0) -> Any:
    if depth > _DEPTH:
        key = where.split("/")[0]
        raise SpearError(
            f"{key}: maps or lists more than {_DEPTH} deep: send numbers, texts or arrays"
        )
    if isinstance(value, dict):
        if b"__ndarray__" in value:
            return _array(value, where)
        if b"__npgeneric__" in value:
            return _scalar(value, where)
        return {
            _key(k, where): _value(v, f"{where}/{_shown(k)}", depth + 1) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_value(v, where, depth + 1) for v in value]
    if isinstance(value, msgpack.ExtType | msgpack.Timestamp):
        raise SpearError(
            f"{where}: a msgpack extension: send numbers, texts, lists, maps or arrays"
        )
    return value


def _array(packed: dict[Any, Any], where: str) -> np.ndarray[Any, Any]:
    dtype, shape, data = _dtype(packed, where), packed.get(b"shape"), packed.get(b"data")
    if not isinstance(data, bytes):
        raise SpearError(f"{where}: an array without bytes: pack it as openpi-client does")
    sizes = shape if isinstance(shape, list) else [None]
    if len(sizes) > _DEPTH or any(type(n) is not int or n < 0 for n in sizes):
        raise SpearError(
            f"{where}: an array of shape {_shown(shape)}: give up to {_DEPTH} whole numbers"
        )
    if math.prod(sizes) * dtype.itemsize != len(data):
        given = f"{len(data)} bytes for an array {dtype} {str(sizes)[:80]}"
        raise SpearError(f"{where}: {given}: the message was cut or mispacked")
    try:
        return np.frombuffer(data, dtype).reshape(sizes)
    except ValueError as error:  # an empty array with absurd other sizes
        raise SpearError(f"{where}: an array of shape {str(sizes)[:80]}: {error}") from error


def _scalar(packed: dict[Any, Any], where: str) -> np.generic:
    value, dtype = packed.get(b"data"), _dtype(packed, where)
    if not isinstance(value, bool | int | float):
        raise SpearError(f"{where}: a numpy scalar that is a {type(value).__name__}: send a number")
    try:
        scalar: np.generic = dtype.type(value)
        fits = dtype.kind == "f" or scalar == value
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise SpearError(f"{where}: {str(value)[:40]} does not fit {dtype}: send another type")
    return scalar


def _dtype(packed: dict[Any, Any], where: str) -> np.dtype[Any]:
    name = packed.get(b"dtype")
    if not isinstance(name, str) or not _TYPE.fullmatch(name):
        raise SpearError(
            f"{where}: an array of type {str(name)[:40]!r}: send booleans, integers or floats"
        )
    return np.dtype(name)


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "biuf":
        raise SpearError(
            f"cannot send an array of type {value.dtype}: only booleans, integers and floats"
        )
    if isinstance(value, np.ndarray):
        parts = {b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
        return {b"__ndarray__": True, **parts}
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise SpearError(
        f"cannot send a {type(value).__name__}: only numbers, texts, lists, maps and arrays"
    )
