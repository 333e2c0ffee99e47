"""Errors and notices for users. Their messages say what happened, where, and what to do.

A `SpearError` ends the work. A notice (see `notice`) says that an input was usable but could be
better.
"""

import difflib
import importlib
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_OBEYED_BY_TERMINALS = re.compile(
    r"[\x00-\x1f\x7f-\x9f"  # control characters
    r"\u200e\u200f\u2028-\u202e\u2066-\u2069"  # ends of lines, and changes of writing direction
    r"\ud800-\udfff]"  # halves of characters (surrogates), which cannot be printed
)
"""Matches characters that a terminal would obey instead of show."""
_SHORT_ESCAPES = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
MIN_SIMILARITY = 0.7  # of a name that a message suggests, 0 to 1, by difflib (our choice)
MAX_LISTED_NAMES = 6
"""The largest number of names that a message lists."""


class SpearError(Exception):
    """Bad input. The message is one line, which says what is wrong, where, and what to do.

    The command line prints the message and exits with `code`.

    Example:
        >>> from spear.embodiments import load
        >>> try:
        ...     load("so100")
        ... except SpearError as error:
        ...     print(str(error).splitlines()[0])  # doctest: +ELLIPSIS
        unknown embodiment 'so100'...
    """

    code = 2


class VerdictError(SpearError):
    """A command did its work, and what it found is no success.

    The command line prints the message without "error:", because nothing failed, and exits with
    `code`.
    """


class UndecidedError(VerdictError):
    """A check has neither found something wrong nor shown that all is right."""

    code = 3


class UnansweredError(SpearError):
    """A model does not answer a question: it was not taught to, or the object is absent."""

    code = 3


class RetryableError(SpearError):
    """An error whose cause is temporary, such as a service that cannot be reached."""


def make_unknown_name_error(
    kind: str, name: str, known_names: Iterable[str], location: str = "", advice: str = ""
) -> SpearError:
    """Make the error for a name that does not exist. The message suggests a similar known name.

    The message also lists the known names, at most `MAX_LISTED_NAMES` of them, and none if it
    suggests one and there are more. An abbreviation counts as similar to the name with these
    initials, and the beginning of a name to this name.

    Args:
        kind: what is named, for the message: "preset".
        name: the unknown name.
        known_names: the names that exist.
        location: where the name stands, for the message: "spear.json".
        advice: what lists the known names, for the message. It replaces their list if there are
            more than `MAX_LISTED_NAMES`.

    Example:
        >>> print(make_unknown_name_error("preset", "nanno", ["nano", "small"]))
        unknown preset 'nanno'. Did you mean 'nano'? Give nano or small.
        >>> print(make_unknown_name_error("key", "learning_rate", ["lr", "steps"], "a.json"))
        unknown key 'learning_rate' in a.json. Did you mean 'lr'? Give lr or steps.
    """
    known_names = sorted(known_names)
    initials = "".join(word[:1] for word in name.split("_"))  # "lr" of "learning_rate"
    if initials in known_names:
        similar_names = [initials]
    else:
        similar_names = [
            candidate for candidate in known_names if name and candidate.startswith(name)
        ][:1]
        if not similar_names:
            similar_names = difflib.get_close_matches(name, known_names, n=1, cutoff=MIN_SIMILARITY)
    message = f"unknown {kind} {name!r}"
    if location:
        message += f" in {location}"
    message += "."
    if similar_names:
        message += f" Did you mean {similar_names[0]!r}?"
        if not 1 < len(known_names) <= MAX_LISTED_NAMES:
            return SpearError(message)
    if len(known_names) > MAX_LISTED_NAMES and advice:
        return SpearError(f"{message} {advice}")
    return SpearError(f"{message} Give {format_alternatives(known_names)}.")


def format_alternatives(names: Sequence[str]) -> str:
    """List names of which one is to be chosen, at most about `MAX_LISTED_NAMES` of them.

    >>> format_alternatives(["nano", "small", "spear1"])
    'nano, small or spear1'
    >>> format_alternatives(list("abcdefghi"))
    'a, b, c, d, e, f or one of 3 others'
    """
    listed_names = list(names[:MAX_LISTED_NAMES])
    num_others = len(names) - len(listed_names)
    if num_others == 1:
        listed_names.append(names[-1])
    elif num_others:
        listed_names.append(f"one of {format_count(num_others, 'others')}")
    *first_names, last_name = listed_names
    return f"{', '.join(first_names)} or {last_name}" if first_names else last_name


def check_known(
    kind: str, known_names: Collection[str], *names: str, location: str = "", advice: str = ""
) -> None:
    """Raise `make_unknown_name_error` for the first of `names` that is not a known name."""
    for name in names:
        if name not in known_names:
            raise make_unknown_name_error(kind, name, known_names, location, advice)


def import_optional(module: str, extra: str, feature: str) -> Any:
    """Import a module that comes with an extra of this package.

    Args:
        module: the module's name.
        extra: the extra that installs the module, such as "serve".
        feature: what needs the module, for the message.

    Raises:
        SpearError: the module, or one that it imports, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpearError(
            make_missing_extra_message(feature, error.name or module, extra)
        ) from error


def make_missing_extra_message(feature: str, module: str, extra: str) -> str:
    """Return the message for a feature whose module is not installed.

    >>> make_missing_extra_message("the simulator", "mujoco", "sim")
    "the simulator needs mujoco. Install it: pip install 'spear-vla[sim]'"
    """
    return f"{feature} needs {module}. Install it: pip install 'spear-vla[{extra}]'"


def summarize_error(error: BaseException | str) -> str:
    """Return the first line of an error's message, or the error's type if the message is empty.

    A pydantic error becomes the first key that is wrong, and the reason, such as
    "features.state.dtype should be …".
    """
    from pydantic_core import ValidationError

    if isinstance(error, ValidationError):
        first_problem = error.errors()[0]
        key = ".".join(str(name) for name in first_problem["loc"])
        reason = first_problem["msg"].removeprefix("Value error, ").removeprefix("Input ")
        return f"{key} {reason}".strip()
    if isinstance(error, OSError) and error.strerror:  # its text begins with a number
        return ", ".join(str(detail) for detail in (error.strerror, error.filename) if detail)
    # The text of a `KeyError` has quotes around the message.
    text = str(error)
    if isinstance(error, KeyError) and len(error.args) == 1:
        text = str(error.args[0])
    lines = text.strip().splitlines()
    return lines[0] if lines else type(error).__name__


def to_sentence(text: str) -> str:
    """Begin a text with a capital letter and end it with a period.

    >>> to_sentence("copy the folder again")
    'Copy the folder again.'
    """
    return text[:1].upper() + text[1:].removesuffix(".") + "."


def escape_control_characters(text: str, keep_newlines: bool = False) -> str:
    """Escape the characters of a text that a terminal would obey instead of show.

    Text from data of others (instructions, names, reasons) could otherwise clear the screen, set
    the title, hide lines or pretend to be other output. The characters are written as JSON escapes
    them.

    Args:
        text: any text.
        keep_newlines: whether line breaks stay, because the text may have several lines.

    Example:
        >>> print(escape_control_characters("pick\\x1b[2J up\\n"))
        pick\\u001b[2J up\\n
    """

    def escape(match: re.Match[str]) -> str:
        """Return the escape of one character."""
        character = match[0]
        if character == "\n" and keep_newlines:
            return character
        return _SHORT_ESCAPES.get(character, f"\\u{ord(character):04x}")

    return _OBEYED_BY_TERMINALS.sub(escape, text)


def format_count(number: int, unit: str) -> str:
    """Return a number with the word for what it counts, such as "1 image" or "2 images".

    Args:
        number: the number.
        unit: the word in the plural, which ends in -s.

    Example:
        >>> format_count(1, "images"), format_count(1000, "images")
        ('1 image', '1,000 images')
    """
    word = unit.removesuffix("s") if number == 1 else unit
    return f"{number:,} {word}"


class Notice(UserWarning):
    """A warning about an input that was usable but could be better.

    The message says what was done with the input. The command line shows it as "note: …".
    """


_are_notices_enabled: ContextVar[bool] = ContextVar("are notices enabled", default=True)


@contextmanager
def suppress_notices() -> Iterator[None]:
    """Suppress notices in the `with` block, whose inputs do not come from the user."""
    token = _are_notices_enabled.set(False)
    try:
        yield
    finally:
        _are_notices_enabled.reset(token)


def disable_notices() -> None:
    """Suppress notices in this process from now on. Another process does the same work and warns.

    A worker process calls this.
    """
    _are_notices_enabled.set(False)


def is_first_process() -> bool:
    """Return whether this process is the first that `torchrun` started, or its run's only one."""
    return os.environ.get("RANK", "0") == "0"


def notice(message: str) -> bool:
    """Warn with a `Notice`, in the first process, unless notices are suppressed.

    The warning names the line from which the caller was called.

    Returns:
        Whether this call warned.
    """
    should_warn = _are_notices_enabled.get() and is_first_process()
    if should_warn:
        warnings.warn(message, Notice, stacklevel=3)  # 1 is this function, 2 is its caller
    return should_warn
