"""What a user sees when something is wrong, or was put right: one line of what, where and what to do."""

import difflib
import importlib
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class SpearError(Exception):
    """Bad input. The message is one line: what was wrong, where, what to do. The CLI exits with `code`."""

    code = 2


class UndecidedError(SpearError):
    """Nothing is wrong that could be shown, nor is it shown to be right."""

    code = 3


class RetryableError(SpearError):
    """A `SpearError` whose cause may pass, such as a service that cannot be reached: later it may go well."""


def unknown_name_error(kind: str, name: str, known: Iterable[str]) -> SpearError:
    """A `SpearError` for a name that does not exist, suggesting the nearest one that does, or its initials.

    >>> unknown_name("preset", "nanno", ["nano", "small"]).args[0]
    "unknown preset 'nanno': did you mean 'nano'? known: nano, small"
    """
    names = sorted(known)
    initials = "".join(part[:1] for part in name.split("_"))  # of learning_rate: lr
    near = (
        [initials] if initials in names else difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    )
    hint = f"did you mean {near[0]!r}? " if near else ""
    return SpearError(f"unknown {kind} {name!r}: {hint}known: {', '.join(names)}")


def check_known(kind: str, known: Collection[str], *names: str) -> None:
    """Raises `unknown_name_error` for the first of the names that does not exist."""
    for name in names:
        if name not in known:
            raise unknown_name_error(kind, name, known)


def import_optional(module: str, extra: str, what: str) -> Any:
    """An optional module. Raises `SpearError`, which names the extra that brings it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpearError(missing_extra_message(what, error.name or module, extra)) from error


def missing_extra_message(what: str, module: str, extra: str) -> str:
    """What is said where the module that an extra of this package brings is missing."""
    return f"{what} needs {module}: pip install 'spear-vla[{extra}]'"


def summarize_error(error: BaseException | str) -> str:
    """The first line of an error's message; its type when it has none. Of pydantic's errors the first key
    ("features.state.dtype") and what is wrong with it, in a few words."""
    from pydantic_core import ValidationError

    if isinstance(error, ValidationError):
        first = error.errors()[0]
        words = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return f"{'.'.join(map(str, first['loc']))} {words}".strip()
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def format_count(number: int, things: str) -> str:
    """A number and what it counts, a plural in -s: "1 image", "1,000 images"."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


class Notice(UserWarning):
    """What was done with an input that could be better, in one line. The CLI shows it as "note: …"."""


_SAYING: ContextVar[bool] = ContextVar("saying notices", default=True)


@contextmanager
def suppress_notices() -> Iterator[None]:
    """Inside, `notice` says nothing: for inputs that are ours and no user's."""
    before = _SAYING.set(False)
    try:
        yield
    finally:
        _SAYING.reset(before)


def disable_notices() -> None:
    """From now on `notice` says nothing in this process, since another one does the same work."""
    _SAYING.set(False)


def is_first_process() -> bool:
    """Whether this process speaks for its run: it is alone, or the first one that `torchrun` started."""
    return os.environ.get("RANK", "0") == "0"


def notice(message: str) -> bool:
    """Warn with a `Notice`, as if from the caller's caller, in the first process; returns whether it did."""
    said = _SAYING.get() and is_first_process()
    if said:
        warnings.warn(message, Notice, stacklevel=3)
    return said
