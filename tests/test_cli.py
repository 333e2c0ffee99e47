"""The commands: help at once, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import subprocess
import sys

import pytest

from spear.cli import COMMANDS, main


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail; returns its one line."""
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_help_needs_none_of_the_heavy_modules() -> None:
    code = (
        "import sys; from spear.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'transformers', 'mujoco', 'av', 'matplotlib', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"spear {name}" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert f"    spear {name}" in said
    assert "(required)" in said or "default" in said


@pytest.mark.parametrize(
    ("argv", "hint"),
    [
        (["evalute"], "did you mean 'evaluate'?"),
        (["data", "inspekt", "x"], "did you mean 'data inspect'?"),
        (["--steps"], "unknown command"),
        (["train", "nano-vml-2"], "did you mean 'nano-vlm-2'?"),
        (["train", "nano-vla", "--stesp", "3"], "did you mean '--steps'?"),
        (["train", "nano-vla", "--set", "lr"], "KEY=VALUE"),
        (["label", "--preset", "nanno"], "did you mean 'nano'?"),
        (["record", "--preset", "nanno"], "did you mean 'nano'?"),
        (["record", "--families", "stack_cubes"], "did you mean 'stack_cube'?"),
        (["record", "--first-seed", "5"], "kept for testing"),
        (["evaluate", "--families", "put_in", "--policy", "expert"], "did you mean 'put_"),
        (["evaluate", "--policy", "expert", "--first-seed", "9999"], "held-out seeds"),
        (["evaluate", "--policy", "/nowhere"], "no model '/nowhere'"),
        (["evaluate", "--compare", "/nowhere.json", "--policy", "expert"], "no such file"),
        (["evaluate", "vlm", "--model", "/nowhere"], "no model '/nowhere'"),
        (["ask", "x.png", "how far?", "--model", "/nowhere"], "no model '/nowhere'"),
        (["data", "inspect", "/nowhere"], "no such folder: /nowhere"),
        (["data", "prepare", "/nowhere", "--out", "/tmp/never"], "not an RLDS folder"),
        (["demo", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in fails(capsys, *argv)
