"""Fixtures and settings that all tests share."""

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from spear.cli import main

# No test fails because the machine is busy, so nothing that Hypothesis does depends on time.
settings.register_profile(
    "spear",
    derandomize=True,
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("spear")
torch.set_num_threads(1)

# Imports leave no garbage, and looking for it would take a tenth of the time of collecting tests.
gc.disable()


def pytest_collection_finish() -> None:
    """Collect garbage again, but seldom, and never look at what was imported before the tests."""
    gc.freeze()
    gc.set_threshold(5_000)  # 700 by default, at which looking takes a twentieth of the tests' time
    gc.enable()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and reference outputs; a test is skipped if the folder is missing.

    The environment variable SPEAR_SHARED names the folder.
    """
    default = Path(__file__).parents[1] / ".." / "shared"
    path = Path(os.environ.get("SPEAR_SHARED", default)).resolve()
    if not path.is_dir():
        pytest.skip(f"reference data not found at {path} (set SPEAR_SHARED)")
    return path


def list_words(arguments: Sequence[str | Sequence[str]]) -> list[str]:
    """Join the arguments of a command, which are words and lists of words, to one list of words."""
    words: list[str] = []
    for argument in arguments:
        if isinstance(argument, str):
            words.append(argument)
        else:
            words.extend(argument)
    return words


@pytest.fixture
def run_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command, which must succeed, and returns the command's stdout.

    Its arguments are the words of the command, and lists of words.
    """

    def run(*arguments: str | Sequence[str]) -> str:
        capsys.readouterr()
        assert main(list_words(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def run_refused_command(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command, which must be refused, and returns the one line on stderr.

    Its arguments are the words of the command, and lists of words.
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
    """The shipped policy, loaded once. Tests use `nano` instead."""
    from spear.policy import Spear1Policy

    return Spear1Policy.load("nano")


@pytest.fixture
def nano(loaded_nano: Any) -> Any:
    """The shipped policy, a `Spear1Policy` that all tests share and must not change.

    Its noise starts anew for each test.
    """
    loaded_nano.reset()
    return loaded_nano


@pytest.fixture(scope="module")
def tiny_published_presets() -> Iterator[None]:
    """Makes the tiny presets and the tiny encoder of `published_checkpoints` known by name."""
    from published_checkpoints import register_tiny_sizes

    with pytest.MonkeyPatch.context() as patch:
        register_tiny_sizes(patch)
        yield


@pytest.fixture(scope="module")
def renderer() -> Any:
    """The simulator's `Renderer`; a test is skipped on machines that cannot render."""
    pytest.importorskip("mujoco")
    from spear.errors import SpearError
    from spear.sim.render import get_thread_renderer

    try:
        return get_thread_renderer()
    except SpearError as error:
        pytest.skip(str(error))
