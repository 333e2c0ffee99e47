"""The commands: help at once, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spear.cli import COMMANDS, load, main, options_of


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail; returns its one line."""
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


def test_help_needs_none_of_the_heavy_modules() -> None:
    code = (
        "import sys; from spear.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'transformers', 'mujoco', 'av', 'jinja2', 'pyarrow'} & set(sys.modules);"
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
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"    spear {name}" in said
    assert options_of(load(name)) is None or "(required)" in said or "default" in said


@pytest.mark.parametrize("argv", [["data"], ["convert", "-h"], ["evaluate", "--help"]])
def test_a_word_that_many_commands_begin_with_names_them(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.suppress(SystemExit):  # evaluate is a command as well
        main(argv)
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert (f"  spear {name} " in said) == name.startswith(f"{argv[0]} ") or name == argv[0]


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
        (["questions", "x", "--seed", "-1"], "--seed -1"),
        (["record", "--families", "stack_cubes"], "did you mean 'stack_cube'?"),
        (["record", "--first-seed", "5"], "kept for testing"),
        (["record", "--episodes", "0"], "--episodes 0"),
        (["label", "photos", "--shard-size", "0"], "--shard-size 0"),
        (["train", "nano-vla", "--steps", "-1"], "steps"),
        (["train", "nano-vla", "--set", "lr=.001"], "lr"),
        (["train", "nano-vla", "--set", "schedule=cosin"], "did you mean 'cosine'?"),
        (["train", "nano-vla", "--set", "frozen=vlm"], "frozen"),
        (["train", "nano-vla", "--set", "pairs=[1]"], "pairs"),
        (["train", "nano-vla", "--set", "moge=1"], "moge"),
        (["ask", "sim:7", "how far?", "--draw", "box.txt"], "end it in .png or .jpg"),
        (["evaluate", "--families", "put_in", "--policy", "expert"], "did you mean 'put_"),
        (["evaluate", "--policy", "expert", "--first-seed", "9999"], "held-out seeds"),
        (["evaluate", "--scenes", "x"], "see `spear evaluate --help`"),
        (["train"], "RECIPE"),
        (["evaluate", "--scenes"], "Missing value for argument '--scenes'"),
        (["evaluate", "--policy", "/nowhere"], "no model '/nowhere'"),
        (["evaluate", "--compare", "/nowhere.json", "--policy", "expert"], "no such file"),
        (["ask", "x.png", "how far?", "--model", "/nowhere"], "no model '/nowhere'"),
        (["data", "inspect", "/nowhere"], "no such folder: /nowhere"),
        (["data", "prepare", "/nowhere", "--out", "/tmp/never"], "no such folder: /nowhere"),
        (["demo", "--data", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert hint in fails(capsys, *argv)


def test_a_broken_record_is_skipped_and_a_folder_of_them_refused(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rlds"
    shutil.copytree(shared / "data/bridge_v2_sample/1.0.0", folder)
    (record,) = folder.glob("*.tfrecord*")
    whole = record.read_bytes()
    record.chmod(0o644)
    record.write_bytes(whole[:5000] + bytes(64) + whole[5064:])
    command = ["data", "prepare", str(folder), "--workers", "0", "--out"]
    assert main([*command, str(tmp_path / "most")]) == 0
    said = capsys.readouterr()
    assert "24 episodes" in said.out and "1 skipped" in said.out and record.name in said.err
    record.write_bytes(whole[:5000])
    assert main([*command, str(tmp_path / "none")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]  # before it, how far the work was
    assert line.startswith("error: ")
    assert record.name in line
    assert not (tmp_path / "none").exists()


def test_what_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for name in [n for n in sys.modules if n.startswith(("spear.sim", "spear.evaluate.closed"))]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'spear-vla[sim]'" in fails(capsys, "evaluate", "--policy", "expert", "--scenes", "1")


def test_interrupting_leaves_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spear.data.inspect.inspect", interrupted)
    assert main(["data", "inspect", "x"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the error does not name the file, and where it is not Python's own."""
    weights = type("SafetensorError", (Exception,), {})
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        weights("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):

        def full(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("spear.cli.data.datasets", full)
        assert "the disk is full: free some space" in fails(capsys, "data", "datasets")
