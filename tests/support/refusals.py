"""Checks that wrong input is refused in one line, and that right input causes no warning."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from spear.errors import SpearError

Command = Callable[..., str]
"""Type of the fixtures `run_command` and `run_refused_command` (see tests/conftest.py): functions
from the words of a command to what the command prints."""


def refuses(pattern: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Call a function that must raise a `SpearError`, whose message is one line.

    Args:
        pattern: a regular expression that must match in the message; "" matches any.
        function: the function.
        args: its arguments.
        kwargs: its keyword arguments.

    Returns:
        The message.
    """
    __tracebackhide__ = True
    with pytest.raises(SpearError, match=pattern or None) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@contextmanager
def no_warning() -> Iterator[None]:
    """Make warnings errors in the `with` block."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiler_modules = r"torch\."  # PyTorch's compiler uses deprecated functions
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=compiler_modules)
        yield
