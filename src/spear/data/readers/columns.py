"""Reading the columns of one episode, whatever format its dataset is in."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from spear.data.actions import find_first
from spear.errors import SpearError
from spear.types import CONTROL_CHARACTERS, Array

Steps = Mapping[str, Any]
"""An episode's columns, nested: arrays, steps first; images and texts: lists of bytes; a str: why not."""
RawEpisodes = Iterator[tuple[str, Steps | SpearError]]
"""(source, steps) of one episode after the other, or the reason why it cannot be read."""
_COLUMN = re.compile(r"^(?P<path>[^\[\]]+)(\[(?P<first>\d+)(:(?P<end>\d+))?\])?$")


def read_column(steps: Steps, where: str, source: str) -> Any:
    """The rows of a column: "state[0:3]" -> [T, 3], "action[6]" -> [T]. SpearError says what there is."""
    path, span = parse_column(where)
    node: Any = steps
    parts = path.split("/")
    while parts:
        # A name may have slashes in it itself: the longest that is there is meant.
        names = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        if (
            name := next((n for n in names if isinstance(node, Mapping) and n in node), None)
        ) is None:
            there = ", ".join(sorted(node)) if isinstance(node, Mapping) else "nothing below it"
            raise SpearError(f"no column {where!r}: {source}: no {parts[0]!r} (there is: {there})")
        node, parts = node[name], parts[name.count("/") + 1 :]
    if isinstance(node, str):
        raise SpearError(f"no column {where!r}: {source}: it cannot be read: {node}")
    if span is None:
        return node
    if getattr(node, "ndim", 0) != 2 or node.shape[1] < span.stop:
        shape = getattr(node, "shape", "no array")
        raise SpearError(f"no column {where!r}: {source}: {path} is {shape}")
    return node[:, span] if ":" in where[len(path) :] else node[:, span.start]


def parse_column(where: str) -> tuple[str, slice | None]:
    """The path of a column, and which of its components are meant; None: all. Raises SpearError."""
    if not (match := _COLUMN.match(where)):
        raise SpearError(f"unreadable column {where!r}: write it like observation/state[0:3]")
    if match["first"] is None:
        return match["path"], None
    first = int(match["first"])
    return match["path"], slice(first, int(match["end"] or first + 1))


def walk_columns(steps: Steps, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(column, values) of nested step arrays."""
    for key, value in sorted(steps.items()):
        if isinstance(value, Mapping):
            yield from walk_columns(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value


def count_steps(steps: Steps) -> int:
    """How many steps there are, by the first column that can be read."""
    return len(
        next((values for _, values in walk_columns(steps) if not isinstance(values, str)), ())
    )


def read_numbers(steps: Steps, where: str, source: str) -> Array:
    """A column of numbers, [T] or [T, d] float64. Raises SpearError naming it, and the step that is NaN."""
    try:
        values = np.asarray(read_column(steps, where, source), np.float64)
    except (TypeError, ValueError) as error:
        raise SpearError(
            f"no numbers in column {where!r}: {source}: name another column"
        ) from error
    if (
        step := find_first(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    ) is not None:
        there = f"{source} step {step}: {where} is {values[step].tolist()}"
        raise SpearError(f"not a number: {there}; leave the episode out")
    return values


def read_text(steps: Steps, where: str, source: str) -> str:
    """What a column says: bytes, texts, or Unicode code points padded with zeros; rows are the same or empty.

    Raises SpearError naming the column for anything else, such as numbers, images or a text that changes.
    """
    try:
        rows = {
            r.tobytes() if isinstance(r, np.ndarray) else r: r
            for r in read_column(steps, where, source)
        }
        texts = [text for text in dict.fromkeys(map(_words, rows.values())) if text]
    except (TypeError, ValueError, OverflowError) as error:
        raise SpearError(f"no text in column {where!r}: {source}: name another column") from error
    if texts[1:]:
        change = f"{where} is {texts[0]!r} and then {texts[1]!r}"
        raise SpearError(
            f"text that changes: {source}: {change}; cut the episode there, or leave it out"
        )
    return "".join(texts)


def _words(row: Any) -> str:
    if isinstance(row, np.ndarray) and row.dtype.kind in "iu":
        row = "".join(chr(int(c)) for c in row.reshape(-1) if c)
    text = row.strip() if isinstance(row, str) else bytes.decode(row, "utf-8", "replace").strip()
    if CONTROL_CHARACTERS.search(text):
        raise ValueError
    return text


def is_depth_png(encoded: bytes) -> bool:
    """Whether it is a PNG of one 16-bit channel: a depth image, no camera's (our choice)."""
    return encoded[1:4] + encoded[24:26] == b"PNG\x10\x00"
