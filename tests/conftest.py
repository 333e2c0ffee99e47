"""Fixtures and settings that all tests share."""

import gc
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from spear.cli import main

settings.register_profile("spear", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("spear")
torch.set_num_threads(1)
gc.disable()  # nothing that is imported is garbage, and looking for it takes a tenth of the time


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference outputs (SPEAR_SHARED); skips the test without it."""
    default = Path(__file__).parents[1] / ".." / "shared"
    path = Path(os.environ.get("SPEAR_SHARED", default)).resolve()
    if not path.is_dir():
        pytest.skip(f"reference data not found at {path} (set SPEAR_SHARED)")
    return path


def list_words(arguments: Sequence[str | Sequence[str]]) -> list[str]:
    """Return a command's words from words and lists of words."""
    words: list[str] = []
    for argument in arguments:
        if isinstance(argument, str):
            words.append(argument)
        else:
            words.extend(argument)
    return words


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, given as words and lists of words, that must succeed.

    Returns what it prints on stdout.
    """

    def run(*arguments: str | Sequence[str]) -> str:
        capsys.readouterr()
        assert main(list_words(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_refused_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, given as words and lists of words, that must be refused.

    Returns what it prints on stderr, which must be one line.
    """

    def run(*arguments: str | Sequence[str]) -> str:
        capsys.readouterr()
        assert main(list_words(arguments)) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        return message

    return run


@pytest.fixture(scope="session")
def loaded_nano() -> Any:
    from spear.policy import Spear1Policy

    return Spear1Policy.load("nano")


@pytest.fixture
def nano(loaded_nano: Any) -> Any:
    """The shipped policy, a `Spear1Policy` that all tests share, with its noise restarted.

    Tests leave it as it is otherwise.
    """
    loaded_nano.reset()
    return loaded_nano


@pytest.fixture
def tiny_published_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Presets and an encoder as small as the checkpoints of `published_checkpoints`."""
    from published_checkpoints import register_tiny_sizes

    register_tiny_sizes(monkeypatch)


@pytest.fixture(scope="module")
def renderer() -> Any:
    """The simulator's `Renderer`; skips the test where rendering does not work."""
    pytest.importorskip("mujoco")
    from spear.errors import SpearError
    from spear.sim.render import get_thread_renderer

    try:
        return get_thread_renderer()
    except SpearError as error:
        pytest.skip(str(error))
