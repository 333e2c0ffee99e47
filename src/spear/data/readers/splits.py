"""Which episodes: the split syntax of TFDS ("train[:20%]+val"), for every format that has named splits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from spear.errors import SpearError, unknown_name

_SPLIT = re.compile(r"^(?P<name>[\w-]+)(\[(?P<selector>[\d_:%a-z-]+)\])?$")
_BOUND = re.compile(r"^(?P<value>-?[\d_]+)?(?P<unit>%|shard)?$")


def split_ranges(
    lengths: Mapping[str, Sequence[int]], split: str, where: str | Path
) -> list[tuple[str, int, int]]:
    """TFDS split syntax as (split name, first episode, end) ranges, boundaries as TFDS rounds them.

    "train", "train[:20%]", "train[5:]", "train[-3:]", "train[1shard:2shard]", "train+val[:50%]", "all".

    lengths  split name -> number of episodes in each of its files; where is the dataset, for messages.
    Raises SpearError for what is not such a text, an unknown split, and a range beyond the episodes.
    """
    ranges = []
    for part in re.split(r"\s*\+\s*", split.strip()):
        if part == "all":
            ranges += [(name, 0, sum(files)) for name, files in lengths.items()]
            continue
        match = _SPLIT.match(part)
        if not match:
            raise _bad_split(split, where)
        name = match["name"]
        if name not in lengths:
            raise unknown_name(f"split (of {where})", name, lengths)
        ranges.append((name, *_range(lengths[name], match["selector"], split, where)))
    return ranges


def _range(files: Sequence[int], selector: str | None, split: str, where: str | Path) -> tuple[int, int]:
    total = sum(files)
    if selector is None:
        return 0, total
    bounds = [_BOUND.match(bound) for bound in selector.split(":")]
    units = {bound["unit"] for bound in bounds if bound and bound["unit"]}
    if not all(bounds) or len(units) > 1 or len(bounds) > 2 or selector == ":":
        raise _bad_split(split, where)
    unit = units.pop() if units else ""
    values = [None if not b or b["value"] is None else int(b["value"]) for b in bounds]
    if len(values) == 1:
        if unit != "shard" or values[0] is None:
            raise _bad_split(split, where)
        values = [values[0], values[0] + 1 or None]
    first, end = (_absolute(value, unit, files) for value in values)
    first, end = first or 0, total if end is None else end
    beyond = unit == "%" and any(abs(value or 0) > 100 for value in values)
    if beyond or abs(first) > total or abs(end) > total:
        raise SpearError(f"split {split!r} reaches beyond the {total} episodes of {where}")
    return first + total if first < 0 else first, end + total if end < 0 else end


def _absolute(value: int | None, unit: str, files: Sequence[int]) -> int | None:
    if value is None or unit == "":
        return value
    if unit == "%":
        return round(value * sum(files) / 100)
    return sum(files[:value])


def _bad_split(split: str, where: str | Path) -> SpearError:
    return SpearError(f"unreadable split {split!r}: {where}: write it like train, train[:20%] or train[5:]")
