"""What is wrong is said in one line, by everything that refuses; what is right is not warned of."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from spear.errors import SpearError

Command = Callable[..., str]
"""What the fixtures `done` and `refused` are: a command's words -> what it says."""


def refuses(words: str, call: Callable[..., Any], *given: Any, **named: Any) -> str:
    """This call must be refused in one line that matches `words`, which it returns."""
    __tracebackhide__ = True
    with pytest.raises(SpearError, match=words or None) as caught:
        call(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@contextmanager
def no_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, module=r"torch\."
        )  # of its compiler
        yield
