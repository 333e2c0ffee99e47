"""What a user sees when something is wrong: one line that says what, where and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpearError(Exception):
    """Bad input. The message is one line: what was wrong, where, and what to do. The CLI exits with 2."""


class TemporaryError(SpearError):
    """A `SpearError` whose cause may pass, such as a service that cannot be reached: later it may go well."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> SpearError:
    """A `SpearError` for a name that does not exist, suggesting the nearest one that does.

    >>> unknown_name("preset", "nanno", ["nano", "small"]).args[0]
    "unknown preset 'nanno': did you mean 'nano'? (known: nano, small)"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return SpearError(f"unknown {kind} {name!r}: {hint}(known: {', '.join(names)})")
