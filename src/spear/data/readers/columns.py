"""Reads the columns of one episode, whatever format its dataset is in.

A column has one row per step. It is named by its path in the nested columns, which may be followed
by a range of its last dimension: "observation/state[0:3]". `source` always names the episode.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spear.data.actions import find_first
from spear.errors import MAX_LISTED_NAMES, SpearError
from spear.types import CONTROL_CHARACTERS, Array
from spear.util.images import encode_png

Steps = Mapping[str, Any]
"""The columns of an episode: name → column, or → a mapping of further columns. A column is an array
whose first dimension is the step, a list of bytes (images or texts), or, if it cannot be read, a
str that says why."""
UnreadableReason = str
"""Why a column cannot be read; it takes the place of the column's values."""
RawEpisodes = Iterator[tuple[str, Steps | SpearError]]
"""(source, steps) of each episode of a dataset. If the episode cannot be read, an error replaces
its steps."""

# "state", "state[3]" (one number of each row) or "state[0:7]" (the first seven).
_COLUMN = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")
MIN_RAW_IMAGE_SIDE_PX = 8  # smaller uint8 arrays are measurements, for example of touch
_DEPTH_PNG_HEADER = b"PNG\x10\x00"  # signature, then 16 bits per channel, then one channel


def read_column(steps: Steps, column: str, source: str) -> Any:
    """Read the rows of a column.

    Args:
        steps: The columns of an episode.
        column: For example "state[0:3]", which gives [T, 3], or "action[6]", which gives [T].
        source: The name of the episode, for error messages.

    Raises:
        SpearError: If there is no such column. The message lists the columns that exist.
    """
    path, components = parse_column(column)
    values = _resolve_nested_column(steps, path, column, source)
    if isinstance(values, str):
        raise SpearError(
            f"column {column!r} of {source} cannot be read ({values}). Name another column."
        )
    if components is None:
        return values

    is_matrix = getattr(values, "ndim", 0) == 2  # a list of images or texts has no `ndim`
    if not is_matrix or values.shape[1] < components.stop:
        shape = getattr(values, "shape", "no array")
        raise SpearError(
            f"{source} has no column {column!r}, because {path} has the shape {shape}. Name "
            "fewer numbers of it."
        )
    brackets = column.removeprefix(path)  # "[0:3]" or "[6]"
    is_range = ":" in brackets
    return values[:, components] if is_range else values[:, components.start]


def _resolve_nested_column(steps: Steps, path: str, column: str, source: str) -> Any:
    """Follow a path through nested columns.

    A name in `steps` may itself contain slashes, so several parts of the path may be one name.
    """
    values: Any = steps
    path_parts = path.split("/")
    while path_parts:
        name = _find_longest_prefix_in(values, path_parts)
        if name is None:
            advice = "`spear data inspect` lists the columns."
            if isinstance(values, Mapping) and len(values) <= MAX_LISTED_NAMES:
                advice = f"Name one of these columns ({', '.join(sorted(values))})."
            raise SpearError(
                f"{source} has no column {column!r}, because there is no {path_parts[0]!r}. "
                f"{advice}"
            )
        values = values[name]
        num_used_parts = name.count("/") + 1
        path_parts = path_parts[num_used_parts:]
    return values


def _find_longest_prefix_in(values: Any, path_parts: list[str]) -> str | None:
    """Find the longest leading part of a path that is a key of `values`; None if there is none."""
    if not isinstance(values, Mapping):
        return None
    for num_parts in range(len(path_parts), 0, -1):
        name = "/".join(path_parts[:num_parts])
        if name in values:
            return name
    return None


def parse_column(column: str) -> tuple[str, slice | None]:
    """Split the name of a column into its path and the components it selects (None for all)."""
    match = _COLUMN.match(column)
    if match is None:
        raise SpearError(f"{column!r} is no column. Write one like observation/state[0:3].")
    if match["first"] is None:
        return match["path"], None

    first = int(match["first"])
    end = first + 1 if match["end"] is None else int(match["end"])
    return match["path"], slice(first, end)


def walk_columns(steps: Steps, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, values) of all nested columns, in the order of their names."""
    for key, values in sorted(steps.items()):
        if isinstance(values, Mapping):
            yield from walk_columns(values, f"{prefix}{key}/")
        else:
            yield prefix + key, values


def count_steps(steps: Steps) -> int:
    """Count the steps of an episode: the rows of its first readable column, or 0 without one."""
    for _, values in walk_columns(steps):
        if not isinstance(values, str):
            return len(values)
    return 0


def read_numbers(steps: Steps, column: str, source: str, allow_missing: bool = False) -> Array:
    """Read a column of numbers.

    Args:
        steps: The columns of an episode.
        column: The name of the column.
        source: The name of the episode, for error messages.
        allow_missing: Whether numbers may be NaN or infinite.

    Returns:
        [T] or [T, d] float64.

    Raises:
        SpearError: If the column is missing, has no numbers, or has a number that is not finite.
            The message names the column and the step.
    """
    try:
        values = np.asarray(read_column(steps, column, source), np.float64)
    except (TypeError, ValueError) as error:
        raise SpearError(
            f"column {column!r} of {source} contains no numbers. Name another column."
        ) from error

    if allow_missing:
        return values
    axes_within_row = tuple(range(1, values.ndim))
    is_finite = np.isfinite(values).all(axis=axes_within_row)  # [T]
    step = find_first(~is_finite)
    if step is not None:
        raise SpearError(
            f"{column} of {source} is NaN or infinite at step {step}. Leave the episode out."
        )
    return values


def read_text(steps: Steps, column: str, source: str) -> str:
    """Read the one text that a column repeats in all rows; rows without text are ignored.

    A row may be bytes, a str, or an array of Unicode code points padded with zeros.

    Returns:
        The text; "" if all rows are empty.

    Raises:
        SpearError: If the column has anything but texts, such as images, or if the text changes
            within the episode.
    """
    try:
        rows = read_column(steps, column, source)
        texts = _list_distinct_texts(rows)
    except (TypeError, ValueError, OverflowError) as error:
        raise SpearError(
            f"column {column!r} of {source} contains no text. Name another column."
        ) from error

    if len(texts) > 1:
        raise SpearError(
            f"{column} of {source} changes from {texts[0]!r} to {texts[1]!r}. Cut the episode "
            "there, or leave it out."
        )
    return "".join(texts)


def _list_distinct_texts(rows: Any) -> list[str]:
    """Decode the rows of a text column, and list each text once, in order, without the empty one.

    Most rows repeat the row before, so rows are compared before they are decoded.
    """
    # Both dicts are sets that keep the order.
    distinct_rows: dict[Any, Any] = {}  # row, in a form that can be a key → the row
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
    """Decode one row of a text column.

    Raises ValueError if the text has control characters, and TypeError if the row is no text.
    """
    if isinstance(row, np.ndarray) and row.dtype.kind in "iu":  # code points padded with zeros
        row = "".join(chr(int(code)) for code in row.reshape(-1) if code)
    # `bytes.decode` raises TypeError for anything but bytes.
    text: str = row if isinstance(row, str) else bytes.decode(row, "utf-8", "replace")
    text = text.strip()
    if CONTROL_CHARACTERS.search(text):
        raise ValueError
    return text


def read_encoded_images(steps: Steps, column: str, source: str) -> list[bytes]:
    """Read a column of images.

    Returns:
        One encoded image per step. Raw pixels, uint8 [T, h, w, 3 or 4], are encoded as PNG.

    Raises:
        SpearError: If the column is missing, or has anything but color images. For an array, the
            message gives its type and shape.
    """
    values = read_column(steps, column, source)
    if are_raw_images(values):
        return [encode_png(pixels) for pixels in values]
    if isinstance(values, np.ndarray):
        raise SpearError(
            f"column {column!r} of {source} contains no images, but {values.dtype} of shape "
            f"{list(values.shape)}. Raw images are uint8 [steps, height, width, 3]; convert "
            "them, or name another column."
        )

    are_color_images = isinstance(values, list) and all(
        isinstance(row, bytes) and not is_depth_png(row) for row in values
    )
    if not are_color_images:
        raise SpearError(f"column {column!r} of {source} contains no images. Name another column.")
    encoded_images: list[bytes] = values
    return encoded_images


def are_raw_images(values: Any) -> bool:
    """Whether a column is an array of pixels, uint8 [T, h, w, 3 or 4], large enough for images."""
    if not isinstance(values, np.ndarray) or values.dtype != np.uint8 or values.ndim != 4:
        return False
    _, height, width, num_channels = values.shape
    return num_channels in (3, 4) and min(height, width) >= MIN_RAW_IMAGE_SIDE_PX


def is_depth_png(encoded: bytes) -> bool:
    """Whether an encoded image is a PNG with one 16-bit channel, which has depth and no colors."""
    signature = encoded[1:4]  # the letters PNG
    depth_and_color_type = encoded[24:26]  # bits per channel, and 0 for one gray channel
    return signature + depth_and_color_type == _DEPTH_PNG_HEADER
