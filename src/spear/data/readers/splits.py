"""Parses the split syntax of TFDS, such as "train[:20%]+val", for datasets of any format.

A split is a named part of a dataset. TFDS is TensorFlow Datasets.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from spear.errors import SpearError, check_known, format_count

# For example "train", "train[20%:]" or "train[-3:-1]".
_RANGE_TEXT = re.compile(r"^(?P<name>[\w-]+)(\[(?P<first>-?[\d_]+%?)?:(?P<end>-?[\d_]+%?)?\])?$")


class EpisodeRange(NamedTuple):
    """The episodes `first` to `end` (exclusive) of a named split, counted within the split."""

    split: str
    first: int
    end: int


def parse_split(lengths: Mapping[str, int], split: str, dataset: str | Path) -> list[EpisodeRange]:
    """Parse TFDS split syntax into ranges of episodes.

    Percentages are rounded to episodes as TFDS rounds them, with one exception: "train[-1%:]" of
    ten episodes selects no episode here, whereas TFDS takes all ten.

    Args:
        lengths: The name of each split → its number of episodes.
        split: For example "train", "train[:20%]", "train[5:]", "train[-3:]", "train+val[:50%]" or
            "all".
        dataset: The dataset's name or folder, for error messages.

    Returns:
        The ranges in the order in which `split` names them.

    Raises:
        SpearError: If the text cannot be parsed, names an unknown split, reaches beyond the
            episodes, or selects an episode twice.

    Example:
        >>> parse_split({"train": 10}, "train[:20%]", "bridge")
        [EpisodeRange(split='train', first=0, end=2)]
    """
    ranges: list[EpisodeRange] = []
    for range_text in re.split(r"\s*\+\s*", split.strip()):
        if range_text == "all":
            new_ranges = [EpisodeRange(name, 0, total) for name, total in lengths.items()]
        else:
            new_ranges = [_parse_range(range_text, lengths, split, dataset)]
        ranges.extend(new_ranges)

    for index, episode_range in enumerate(ranges):
        if count_shared_episodes([episode_range], ranges[:index]):
            raise SpearError(
                f"split {split!r} has episodes of {dataset} twice. Name each of them once."
            )
    return ranges


def _parse_range(
    range_text: str, lengths: Mapping[str, int], split: str, dataset: str | Path
) -> EpisodeRange:
    """Parse one part of a split, such as "train[:20%]"."""
    match = _RANGE_TEXT.match(range_text)
    says_nothing = range_text.endswith("[:]")  # all episodes, for which the name alone stands
    if match is None or says_nothing or _mixes_units(match["first"], match["end"]):
        raise SpearError(f"{split!r} is no split of {dataset}. Write it like train or train[:20%].")

    name = match["name"]
    check_known("split", lengths, name, location=str(dataset))
    total = lengths[name]
    first = _resolve_bound(match["first"], default=0, total=total)
    end = _resolve_bound(match["end"], default=total, total=total)
    if not (0 <= first <= total and 0 <= end <= total):
        raise SpearError(
            f"split {split!r} reaches beyond the {format_count(total, 'episodes')} of {dataset}. "
            "Give a smaller one."
        )
    return EpisodeRange(name, first, end)


def _mixes_units(first: str | None, end: str | None) -> bool:
    """Whether one bound is a percentage and the other bound a number of episodes."""
    if first is None or end is None:
        return False
    return first.endswith("%") != end.endswith("%")


def _resolve_bound(bound: str | None, default: int, total: int) -> int:
    """Resolve a bound like "5", "-3" or "20%" to an episode number, which may be out of range.

    Args:
        bound: The text of the bound; None if the range leaves it open.
        default: The episode number of an open bound.
        total: The number of episodes of the split.
    """
    if bound is None:
        return default

    value = int(bound.removesuffix("%"))
    if bound.endswith("%"):
        # TFDS refuses more than 100 %. `total + 1` is out of range, so the caller refuses it, too.
        is_out_of_range = abs(value) > 100
        value = total + 1 if is_out_of_range else round(value * total / 100)
    if bound.startswith("-"):  # counted from the end
        value += total
    return value


def count_shared_episodes(
    ranges: Iterable[tuple[str, int, int]], other_ranges: Iterable[tuple[str, int, int]]
) -> int:
    """Count the episodes that are in both lists of (split, first, end) ranges."""
    other_ranges = list(other_ranges)
    num_shared = 0
    for split, first, end in ranges:
        for other_split, other_first, other_end in other_ranges:
            if split == other_split:
                overlap_first = max(first, other_first)
                overlap_end = min(end, other_end)
                num_shared += max(0, overlap_end - overlap_first)
    return num_shared
