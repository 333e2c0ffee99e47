"""The commands: help at once, and one clear line with exit code 2 for bad input."""

import ast
import contextlib
import errno
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest

import spear
from refusals import Command
from serve_here import SPEAR
from spear import embodiments
from spear.cli import COMMANDS, load, main, options_of
from spear.embodiments import droid
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.util.options import list_option_names


def test_help_and_mistakes_need_none_of_the_heavy_modules() -> None:
    """Nor does the list of recipes."""
    code = (
        "import sys; from spear.cli import main; assert main(['--help']) == 0;"
        "assert not {'torch', 'transformers', 'mujoco', 'av', 'jinja2', 'pyarrow'} & set(sys.modules);"
        "main(['train', 'list']); main(['train', 'nano-vla', '--set', 'lr=-1']);"
        "assert not {'torch', 'transformers', 'mujoco'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f"spear {name}" in done.stdout for name in COMMANDS) and "nano-vlm-2" in done.stdout
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"    spear {name}" in said and "\n\n\n" not in said
    assert options_of(load(name)) is None or "(required)" in said or "default" in said


@pytest.mark.parametrize("argv", [["data"], ["convert", "-h"], ["evaluate", "--help"]])
def test_a_group_names_its_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # evaluate is a command as well
        main(argv)
    said = capsys.readouterr().out
    for name in COMMANDS:
        assert (f"  spear {name} " in said) == name.startswith(f"{argv[0]} ") or name == argv[0]


@pytest.mark.parametrize(
    ("command", "hint"),
    [
        ("evalute", "did you mean 'evaluate'?"),
        ("--steps", "unknown option"),
        ("train", "RECIPE"),
        ("train nano-post --init nano --episodes a --shares 0", "--shares 0"),
        ("train nano-vlm2", "'nano-vlm-2'"),
        ("train nano-vla --set batchsize=3", "'batch_size'"),
        ("train nano-vla --set learning_rate=3", "did you mean 'lr'"),
        ("train nano-vla --set 'families=[\"keypont\"]'", "'keypoint'"),
        ("train nano-vla --set lr", "KEY=VALUE"),
        ("train nano-vla --set lr=1 --set ema=0", "--set: given twice"),
        ("train nano-vla --set steps=-1", "key steps"),
        ("label --vocabulary mug", "--vocabulary"),
        ("label photos --scenes 3", "--scenes"),
        ("evaluate vqa nano sim --calibrate --images 1", "--images"),
        ("label nowhere.jpg", "no such file"),
        ("label sim:x", "write a scene as"),
        ("label simpler:10000-10001 photos", "give it alone"),
        ("label show nowhere", "nowhere"),
        ("record --families stack_cubes", "did you mean 'stack_cube'?"),
        ("record --first-seed 5", "kept for testing"),
        ("ask sim:7 'how far?' --draw box.txt", "end it in .png or .jpg"),
        ("ask sim:7 ' '", "empty question"),
        ("ask sim:10000 'how far?'", "held-out seeds"),
        ("ask absent.png 'how far?'", "No such file"),
        (f"ask {__file__} 'how far?'", "not a readable image"),
        ("data prepare /nowhere", "missing: --out PATH"),
        ("data prepare /nowhere --out x", "no such folder: /nowhere"),
        ("demo --data /nowhere", "/nowhere"),
        ("evaluate --families put_in --policy expert", "did you mean 'put_"),
        ("evaluate --policy expert --first-seed 9999", "held-out seeds"),
        ("evaluate --policy expert --scenes 1 --shard 2/2", "2/2"),
        (
            f"evaluate --policy expert --scenes 1 --out {BUNDLED_WEIGHTS / 'nano'}",
            "holds other files",
        ),
        (
            f"train nano-post --init nano --episodes x --out {BUNDLED_WEIGHTS / 'nano'}",
            "holds other files",
        ),
        ("evaluate --scenes x", "--scenes x: give a whole number: see `spear evaluate --help`"),
        ("evaluate --policy /nowhere", "no model '/nowhere'"),
        ("doctor --out /etc/passwd/page.html", "/etc/passwd: is a file"),
        ("evaluate data nano /nowhere --plot /", "/: cannot be written, it is a folder"),
        ("evaluate vqa nano sim --out /etc/passwd/x", "/etc/passwd: is a file"),
        ("evaluate --policy ws://127.0.0.1:9", "ws://127.0.0.1:9"),
        (
            "evaluate simpler --tasks PutCarrotOnPlate-v1 --policy oracle",
            "PutCarrotOnPlateInScene-v1",
        ),
        (
            "evaluate simpler --policy oracle --films x",
            "--films x: give failures or all or a whole num",
        ),
        ("evaluate simpler --policy expert", "oracle"),
        ("evaluate simpler --policy oracle --device cuda", "--device cuda"),
        ("evaluate ablations --rows 3d", "python -m experiments.ablations"),
        ("evaluate vqa nano /nowhere", "/nowhere"),
        ("evaluate vqa nano sim:x", "write sim:SEED"),
        ("serve nano --embodiment droid --control joints", "joint_"),
        ("serve nano --token schlüssel", "--token"),
        ("serve nano --port 99999", "--port 99999"),
        ("vla-eval nano --embodiment maniskill2", "maniskill2_widowx"),
        ("vla-eval nano --port TAKEN", "--port"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    command: str, hint: str, refused: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if command.startswith("vla-eval"):
        pytest.importorskip("vla_eval")
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert hint in refused(*shlex.split(command.replace("TAKEN", str(taken.getsockname()[1]))))
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, refused: Command) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for name in [n for n in sys.modules if n.startswith(("spear.sim", "spear.evaluate.closed"))]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install 'spear-vla[sim]'" in refused(
        "evaluate", "--policy", "expert", "--scenes", "1"
    )


def test_interrupted_is_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spear.audit.inspect.inspect", Mock(side_effect=KeyboardInterrupt))
    assert main(["data", "inspect", "x"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_full_disk_is_one_line(refused: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the error does not name the file, and where it is not Python's own."""
    weights = type("SafetensorError", (Exception,), {})
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        weights("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):
        monkeypatch.setattr(
            "spear.data.readers.dataset_layout.find_missing_fields", Mock(side_effect=error)
        )
        assert "the disk is full: free some space" in refused("data", "datasets")


def test_a_path_that_is_a_loop_of_links_is_one_line(refused: Command, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert str(tmp_path / "loop") in refused(
        "data", "prepare", str(tmp_path / "loop"), "--out", "never"
    )


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["train", "list"]])
def test_output_that_cannot_be_written_is_noticed(argv: list[str]) -> None:
    """Also what Python holds back until its end."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    run = partial(
        subprocess.run, [sys.executable, "-c", SPEAR, *argv], stderr=subprocess.PIPE, text=True
    )
    with open(writer, "wb") as closed, open("/dev/full", "wb") as full:
        done = run(stdout=closed, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        done = run(stdout=full, env=environment)
        assert done.returncode == 2 and done.stderr.count("\n") == 1


@pytest.mark.parametrize("stdout", [None, io.TextIOWrapper(io.BytesIO(), "ascii")])
def test_a_stdout_that_is_closed_or_lacks_our_characters_will_do(
    stdout: io.TextIOWrapper | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", stdout)
    assert main(["evaluate", "reference"]) == 0


def test_a_notice_is_one_line_in_a_command_however_often_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a robot whose every observation has the same fault; the next command says it again."""
    robot = embodiments.load("droid")
    folded = {**robot.example(), droid.JOINTS_KEY: -robot.example()[droid.JOINTS_KEY]}
    monkeypatch.setattr("spear.cli._do", lambda args: [robot.read(folded) for _ in range(3)])
    for _ in range(2):
        assert main([]) == 0 and re.fullmatch(r"note: .*joint 4.*\n", capsys.readouterr().err)


def test_every_option_that_a_text_names_exists() -> None:
    known = {
        "--help",
        "--version",
        "--upgrade",
        "--nproc-per-node",
        "--no-python",
    }  # of pip and torchrun too
    for name in COMMANDS:
        if (options := options_of(load(name))) is not None:
            known.update(list_option_names(options))
    for path in Path(spear.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*[a-z]", node.value))
                assert not named - known, f"{path}:{node.lineno}"
