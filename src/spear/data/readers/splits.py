"""Which episodes: the split syntax of TFDS ("train[:20%]+val"), for every format that has named splits."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from spear.errors import SpearError, check_known, format_count

_SPLIT = re.compile(r"^(?P<name>[\w-]+)(\[(?P<first>-?[\d_]+%?)?:(?P<end>-?[\d_]+%?)?\])?$")


def parse_split(
    lengths: Mapping[str, int], split: str, where: str | Path
) -> list[tuple[str, int, int]]:
    """TFDS split syntax as (split name, first episode, end) ranges, boundaries as TFDS rounds them (but -1%
    of ten episodes, which are none: TFDS takes all ten).

    "train", "train[:20%]", "train[5:]", "train[-3:]", "train+val[:50%]", "all".

    lengths  split name -> number of episodes; where is the dataset, for messages. Raises SpearError for what
    is not such a text, an unknown split, a range beyond the episodes, and ranges that overlap.
    """
    ranges = []
    for part in re.split(r"\s*\+\s*", split.strip()):
        if part == "all":
            ranges += [(name, 0, total) for name, total in lengths.items()]
            continue
        match = _SPLIT.match(part)
        bounds = [] if match is None else [b for b in (match["first"], match["end"]) if b]
        if match is None or part.endswith("[:]") or len({b.endswith("%") for b in bounds}) > 1:
            raise SpearError(
                f"unreadable split {split!r}: {where}: write it like train or train[:20%]"
            )
        name = match["name"]
        check_known(f"split (of {where})", lengths, name)
        total = lengths[name]
        first, end = _place(match["first"], 0, total), _place(match["end"], total, total)
        if not (0 <= first <= total and 0 <= end <= total):
            raise SpearError(
                f"split {split!r} reaches beyond the {format_count(total, 'episodes')} of {where}"
            )
        ranges.append((name, first, end))
    if any(count_shared_episodes([one], ranges[:number]) for number, one in enumerate(ranges)):
        raise SpearError(f"split {split!r} has episodes of {where} twice: name each of them once")
    return ranges


def count_shared_episodes(
    ranges: Iterable[tuple[str, int, int]], others: Sequence[tuple[str, int, int]]
) -> int:
    """How many episodes are in both, ranges as `parse_split` gives them."""
    pairs = ((a, b) for a in ranges for b in others if a[0] == b[0])
    return sum(max(0, min(a[2], b[2]) - max(a[1], b[1])) for a, b in pairs)


def _place(bound: str | None, otherwise: int, total: int) -> int:
    """A bound like 5, -3 or 20% as the number of an episode; what is beyond the episodes stays beyond."""
    if not bound:
        return otherwise
    value = int(bound.removesuffix("%"))
    if bound.endswith("%"):
        value = round(value * total / 100) if abs(value) <= 100 else total + 1
    return value + total if bound.startswith("-") else value
