"""What is wrong is refused in one line, and what is right has no warning."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from spear.errors import SpearError

Command = Callable[..., str]
"""The fixtures `run_command` and `run_refused_command`: a command's words -> what it prints."""


def refuses(pattern: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """Call a function that must raise a `SpearError` of one line, which matches a pattern.

    Returns:
        The line.
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
        of_the_compiler = r"torch\."
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=of_the_compiler)
        yield
