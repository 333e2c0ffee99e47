"""Reading the columns of one episode, whatever format its dataset is in.

A column is named by a path with an optional range of its last dimension: "observation/state[0:3]".
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spear.data.actions import find_first
from spear.errors import SpearError
from spear.types import CONTROL_CHARACTERS, Array
from spear.util.images import encode_png

Steps = Mapping[str, Any]
"""The columns of an episode, nested: an array with the steps first, a list of bytes for images and
texts, or a str that says why the column cannot be read."""
RawEpisodes = Iterator[tuple[str, Steps | SpearError]]
"""(source, steps) of each episode of a dataset, or why the episode cannot be read."""

_COLUMN = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")
MIN_RAW_IMAGE_SIDE_PX = 8  # smaller arrays are measurements
_DEPTH_PNG_HEADER = b"PNG\x10\x00"  # signature, 16 bits per channel, one channel


def read_column(steps: Steps, column: str, source: str) -> Any:
    """Read the rows of a column.

    Args:
        steps: The columns of an episode.
        column: For example "state[0:3]", which gives [T, 3], or "action[6]", which gives [T].
        source: The name of the episode, for error messages.

    Raises:
        SpearError: If there is no such column; the message lists those that there are.
    """
    path, components = parse_column(column)
    values = _find_values(steps, path, column, source)
    if isinstance(values, str):
        raise SpearError(f"no column {column!r}: {source}: it cannot be read: {values}")
    if components is None:
        return values

    if getattr(values, "ndim", 0) != 2 or values.shape[1] < components.stop:
        shape = getattr(values, "shape", "no array")
        raise SpearError(f"no column {column!r}: {source}: {path} is {shape}")
    is_range = ":" in column[len(path) :]
    return values[:, components] if is_range else values[:, components.start]


def _find_values(steps: Steps, path: str, column: str, source: str) -> Any:
    """Follow a path through nested columns. The names themselves may contain slashes."""
    values: Any = steps
    names = path.split("/")
    while names:
        name = _longest_prefix_in(values, names)
        if name is None:
            known_names = "nothing below it"
            if isinstance(values, Mapping):
                known_names = ", ".join(sorted(values))
            raise SpearError(
                f"no column {column!r}: {source}: no {names[0]!r} (there is: {known_names})"
            )
        values = values[name]
        names = names[name.count("/") + 1 :]
    return values


def _longest_prefix_in(values: Any, names: list[str]) -> str | None:
    """Find the longest leading part of a path that is a key of `values`."""
    if not isinstance(values, Mapping):
        return None
    for count in range(len(names), 0, -1):
        name = "/".join(names[:count])
        if name in values:
            return name
    return None


def parse_column(column: str) -> tuple[str, slice | None]:
    """Split the name of a column into its path and the components it selects (None for all)."""
    match = _COLUMN.match(column)
    if match is None:
        raise SpearError(f"unreadable column {column!r}: write it like observation/state[0:3]")
    if match["first"] is None:
        return match["path"], None

    first = int(match["first"])
    end = int(match["end"] or first + 1)
    return match["path"], slice(first, end)


def walk_columns(steps: Steps, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, values) of all nested columns, in the order of their names."""
    for key, values in sorted(steps.items()):
        if isinstance(values, Mapping):
            yield from walk_columns(values, f"{prefix}{key}/")
        else:
            yield prefix + key, values


def count_steps(steps: Steps) -> int:
    """Count the steps of an episode, by its first readable column."""
    for _, values in walk_columns(steps):
        if not isinstance(values, str):
            return len(values)
    return 0


def read_numbers(steps: Steps, column: str, source: str) -> Array:
    """Read a column of numbers.

    Returns:
        [T] or [T, d] float64.

    Raises:
        SpearError: If the column is missing or holds no numbers, or a number is not finite; the
            message names the column and the step.
    """
    try:
        values = np.asarray(read_column(steps, column, source), np.float64)
    except (TypeError, ValueError) as error:
        raise SpearError(
            f"no numbers in column {column!r}: {source}: name another column"
        ) from error

    row_axes = tuple(range(1, values.ndim))
    step = find_first(~np.isfinite(values).all(axis=row_axes))
    if step is not None:
        raise SpearError(
            f"not a number: {source} step {step}: {column} is {values[step].tolist()}; "
            "leave the episode out"
        )
    return values


def read_text(steps: Steps, column: str, source: str) -> str:
    """Read a column of texts whose rows are all the same, or empty.

    The rows may be bytes, texts, or Unicode code points padded with zeros.

    Raises:
        SpearError: If the column holds anything else, such as numbers or images, or if the text
            changes within the episode.
    """
    try:
        rows = read_column(steps, column, source)
        texts = _find_distinct_texts(rows)
    except (TypeError, ValueError, OverflowError) as error:
        raise SpearError(f"no text in column {column!r}: {source}: name another column") from error

    if len(texts) > 1:
        raise SpearError(
            f"text that changes: {source}: {column} is {texts[0]!r} and then {texts[1]!r}; "
            "cut the episode there, or leave it out"
        )
    return "".join(texts)


def _find_distinct_texts(rows: Any) -> list[str]:
    """Decode the rows that differ from each other, in order, without the empty ones."""
    distinct_rows: dict[Any, Any] = {}
    for row in rows:
        key = row.tobytes() if isinstance(row, np.ndarray) else row
        distinct_rows[key] = row

    texts: dict[str, None] = {}
    for row in distinct_rows.values():
        text = _decode_text(row)
        if text:
            texts[text] = None
    return list(texts)


def _decode_text(row: Any) -> str:
    """Decode one row of a text column. Raises ValueError for what holds control characters."""
    if isinstance(row, np.ndarray) and row.dtype.kind in "iu":
        row = "".join(chr(int(code)) for code in row.reshape(-1) if code)
    text: str = row if isinstance(row, str) else bytes.decode(row, "utf-8", "replace")
    text = text.strip()
    if CONTROL_CHARACTERS.search(text):
        raise ValueError
    return text


def read_encoded_images(steps: Steps, column: str, source: str) -> list[bytes]:
    """Read a column of images.

    Returns:
        The encoded images. Raw pixels, uint8 [T, h, w, 3 or 4], are encoded as PNG.

    Raises:
        SpearError: If the column is missing or has anything else; the message says what it has.
    """
    values = read_column(steps, column, source)
    if are_raw_images(values):
        return [encode_png(pixels) for pixels in values]
    if isinstance(values, np.ndarray):
        raise SpearError(
            f"no images in column {column!r}: {source}: it has {values.dtype} of shape "
            f"{list(values.shape)}. Raw images are uint8 [steps, height, width, 3]; convert them, "
            "or name another column."
        )

    is_list = isinstance(values, list)
    if not is_list or any(not isinstance(row, bytes) or is_depth_png(row) for row in values):
        raise SpearError(f"no images in column {column!r}: {source}: name another column")
    encoded_images: list[bytes] = values
    return encoded_images


def are_raw_images(values: Any) -> bool:
    """Whether a column is an array of pixels, uint8 [T, h, w, 3 or 4], large enough for images."""
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 4:
        return False
    _, height, width, num_channels = values.shape
    return num_channels in (3, 4) and min(height, width) >= MIN_RAW_IMAGE_SIDE_PX


def is_depth_png(encoded: bytes) -> bool:
    """Whether an encoded image is a PNG with one 16-bit channel, which holds depth, not colors."""
    return encoded[1:4] + encoded[24:26] == _DEPTH_PNG_HEADER
