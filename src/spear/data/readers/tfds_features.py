"""From the flat lists of a `tf.train.Example` back to the nested arrays that `features.json` describes.

TFDS writes a feature `a: {b: Tensor}` as the flat list "a/b"; a Dataset or Sequence adds one leading
dimension to everything below it. Lists of lists of varying length ("ragged") come with their row lengths.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from spear.data.readers.tfrecord import Feature
from spear.types import Array


def unflatten(
    description: Mapping[str, Any], features: Mapping[str, Feature], name: str = "", depth: int = 0
) -> Any:
    """Nested dicts of numpy arrays (and of bytes, or lists of bytes, for images and texts).

    description  a node of `features.json`; features the flat lists of one example; name the path so far;
    depth the number of sequences above. Raises KeyError or ValueError for what does not fit the description.
    """
    if "featuresDict" in description:
        children = description["featuresDict"]["features"]
        return {
            key: unflatten(child, features, f"{name}/{key}" if name else key, depth)
            for key, child in children.items()
        }
    if "sequence" in description:
        return unflatten(description["sequence"]["feature"], features, name, depth + 1)
    if depth > 1:
        return _ragged(description, features, name, depth)
    if name not in features:
        raise ValueError(f"feature {name!r} is missing")
    values = _leaf(description, features[name], name)
    if depth and -1 in _shape(description):
        raise ValueError(f"feature {name!r} has another shape at every step, which cannot be read")
    return values if depth else _only(values, name)


def _shape(description: Mapping[str, Any]) -> list[int]:
    return [int(n) for n in description.get("tensor", {}).get("shape", {}).get("dimensions", [])]


def _only(values: list[bytes] | Array, name: str) -> Any:
    if len(values) != 1:
        raise ValueError(f"feature {name!r} has {len(values)} values where one was expected")
    return values[0]


def _ragged(description: Mapping[str, Any], features: Mapping[str, Feature], name: str, depth: int) -> Any:
    """Lists in lists: split the flat values by the row lengths, from the innermost outwards."""
    key = f"{name}/ragged_flat_values"
    if key not in features:
        raise ValueError(f"feature {name!r} is missing")
    rows: Any = _leaf(description, features[key], name)
    for level in reversed(range(depth - 1)):
        lengths = features.get(f"{name}/ragged_row_lengths_{level}")
        if lengths is None or sum(lengths) != len(rows):
            raise ValueError(f"feature {name!r} has row lengths that do not add up")
        ends = np.cumsum([0, *lengths])
        rows = [rows[a:b] for a, b in itertools.pairwise(ends)]
    return rows


def _leaf(description: Mapping[str, Any], values: Feature, name: str) -> list[bytes] | Array:
    """All values of one feature, the first dimension running over whatever sequence it is in."""
    if "tensor" not in description:
        if "classLabel" in description and not isinstance(values, list):
            return values
        if isinstance(values, list) and ("image" in description or "text" in description):
            return values
        raise ValueError(
            f"feature {name!r} is of a kind that cannot be read: {description.get('pythonClassName')}"
        )
    tensor = description["tensor"]
    shape = _shape(description)
    dtype, encoding = tensor["dtype"], tensor.get("encoding", "none")
    if dtype in ("string", "object"):
        if shape or not isinstance(values, list):
            raise ValueError(f"feature {name!r} is an array of texts, which cannot be read")
        return values
    if encoding in ("bytes", "zlib"):
        if not isinstance(values, list):
            raise ValueError(f"feature {name!r} should be encoded as {encoding}")
        return np.stack([_decode(value, encoding, dtype, name).reshape(shape) for value in values])
    if isinstance(values, list) and values:
        raise ValueError(f"feature {name!r} holds bytes instead of {dtype}")
    flat = np.asarray(values, dtype)
    if -1 in shape:
        return flat.reshape(1, *shape)
    if len(flat) % math.prod(shape):
        raise ValueError(f"feature {name!r} has {len(flat)} values, which do not fill {shape}")
    return flat.reshape(-1, *shape)


def _decode(value: bytes, encoding: str, dtype: str, name: str) -> Array:
    try:
        return np.frombuffer(zlib.decompress(value) if encoding == "zlib" else value, dtype)
    except zlib.error as error:
        raise ValueError(f"feature {name!r} cannot be decompressed: {error}") from error
