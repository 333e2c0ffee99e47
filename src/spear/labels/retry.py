"""Images that were set aside for a reason that may pass, tried again: their shard becomes what it would have
been had they gone well at once.

The rows that the shard has are kept, and what is tried again takes its place among them, in the order of the
input.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from spear.labels.engine import Done, Rejected
from spear.labels.store import SCHEMA, tables


def set_aside(known: Mapping[str, Any]) -> list[Rejected]:
    """What was set aside from a shard, in order, by its footer (see `run.FOOTER`)."""
    temporary = set(known.get("temporary", ()))
    return [
        Rejected(source, reason, temporary=number in temporary)
        for number, (source, reason) in enumerate(known["rejected"])
    ]


def to_retry(keys: Sequence[str], aside: Iterable[Rejected]) -> list[int]:
    """Which items of a shard, with these keys, were set aside for a reason that may pass."""
    waiting = deque(aside)
    found = []
    for number, key in enumerate(keys):
        if waiting and waiting[0].source == key and waiting.popleft().temporary:
            found.append(number)
    return found


def merged(
    shard: Path, keys: Sequence[str], aside: Sequence[Rejected], again: Iterable[Done]
) -> Iterator[Done]:
    """All of a shard's images in order, one at a time: those that it has, and those tried `again` in their
    place.

    Args:
        shard: the file, which is read as a whole.
        keys: of all its items.
        aside: what was set aside from it.
        again: batches of the items of `to_retry`.
    """
    tried = set(to_retry(keys, aside))
    new = _one_by_one((keys[number] for number in sorted(tried)), again)
    rows = pa.concat_tables([SCHEMA.empty_table(), *(table.cast(SCHEMA) for table in tables(shard))])
    for number, old in enumerate(_one_by_one(keys, [Done(rows, list(aside))])):
        yield next(new) if number in tried else old


def _one_by_one(keys: Iterable[str], batches: Iterable[Done]) -> Iterator[Done]:
    """Batches of items with these keys, as a batch for each item."""
    source = iter(batches)
    rows, row, aside = SCHEMA.empty_table(), 0, deque[Rejected]()
    for key in keys:
        while row == len(rows) and not aside:
            rows, rejected = next(source)
            row, aside = 0, deque(rejected)
        if aside and aside[0].source == key:
            yield Done(SCHEMA.empty_table(), [aside.popleft()])
        else:
            yield Done(rows.slice(row, 1), [])
            row += 1
