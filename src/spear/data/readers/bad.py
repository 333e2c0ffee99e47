"""Bad episodes: the end of everything, or reported and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from spear.errors import SpearError

Item = TypeVar("Item")
Made = TypeVar("Made")
OnBad = Callable[[SpearError], None]
"""Takes the reason why something was passed over; may raise to stop."""


def each(make: Callable[[Item], Made], items: Iterable[Item], on_bad: OnBad | None) -> Iterator[Made]:
    """`make(item)` of every item. A `SpearError` is raised, or, with `on_bad`, reported there and left
    out."""
    for item in items:
        try:
            made = make(item)
        except SpearError as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield made
