"""The commands show their help at once, and refuse bad input in one line with exit code 2."""

import ast
import errno
import io
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import spear
from refusals import Command
from serve_here import SPEAR_CLI_CODE
from spear import embodiments
from spear.cli import COMMANDS, load_command, main, renamed
from spear.cli.parsing import get_options_class
from spear.embodiments import droid
from spear.models.weights.folders import BUNDLED_WEIGHTS
from spear.util.options import list_option_names


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in another process, which must succeed."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_the_overview_names_all_commands_without_heavy_modules() -> None:
    code = (
        "import sys; from spear.cli import main; assert main(['--help']) == 0;"
        "heavy = {'torch', 'transformers', 'mujoco', 'av', 'jinja2', 'pyarrow'};"
        "assert not heavy & set(sys.modules)"
    )

    process = run_python(code)

    for name in COMMANDS:
        assert f"spear {name}" in process.stdout


def test_the_list_of_recipes_and_mistakes_need_no_heavy_modules() -> None:
    code = (
        "import sys; from spear.cli import main;"
        "main(['recipes']); main(['train', 'nano-vla', '--set', 'lr=-1']);"
        "assert not {'torch', 'transformers', 'mujoco'} & set(sys.modules)"
    )

    process = run_python(code)

    assert "nano-vlm-2" in process.stdout
    assert len(process.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*name.split(), "--help"])

    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"    spear {name}" in text  # an example is indented by four spaces
    assert "\n\n\n" not in text
    assert "(default: None)" not in text


def check_names_exactly(words: list[str], text: str) -> None:
    """The text must list the commands that begin with the first of the words, and no others."""
    first_word = words[0]
    for name in COMMANDS:
        if name != first_word:
            is_listed = f"  spear {name} " in text
            assert is_listed == name.startswith(f"{first_word} ")


@pytest.mark.parametrize("argv", [["data"], ["convert", "-h"]])
def test_a_group_names_its_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0

    check_names_exactly(argv, capsys.readouterr().out)


def test_a_command_names_the_commands_that_begin_with_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])

    check_names_exactly(["evaluate"], capsys.readouterr().out)


NANO = BUNDLED_WEIGHTS / "nano"  # an existing folder of other files than results
CARROT = "PutCarrotOnPlate-v1"  # the name in ManiSkill 2 of a task of ManiSkill 3


@pytest.mark.parametrize(
    ("command", "hint"),  # the words after "spear"; what the error says, among other words
    [
        ("evalute", "Did you mean spear evaluate?"),
        ("--steps", "unknown option"),
        ("version", "Did you mean spear --version?"),
        ("evaluate --polcy nano", "Did you mean --policy?"),
        ("evaluate --xyz 3", "unknown option --xyz. See `spear evaluate --help`."),
        ("train nano-post --grad-clip 1", "Use --set grad_clip=VALUE."),
        ("train nano-post --lr 1e-4 --set lr=1e-3", "by which lr is 0.0001"),
        ("serve --policy nano --replan-steps 2", "--replan-steps has no effect"),
        ("serve --policy nano --protocol vla-eval --ui", "--ui has no effect"),
        ("serve --policy nano --protocol vla-eval --record a", "--record has no effect"),
        ("serve --policy nano --max-record-gib 5", "Add --record FOLDER."),
        ("label --out labels", "give --num-scenes 1000"),
        ("label photos --no-robot", "--no-robot has no effect with PHOTOS"),
        ("train", "RECIPE is missing"),
        ("train nano-post --init nano --episodes a --sampling-weights 0", "--sampling-weights 0"),
        ("train nano-vlm2", "'nano-vlm-2'"),
        ("train nano-vla --set batchsize=3", "'batch_size'"),
        ("train nano-vla --set learning_rate=3", "Did you mean 'lr'"),
        ("train nano-vla --set 'families=[\"keypont\"]'", "'keypoint'"),
        ("train nano-vla --set lr", "KEY=VALUE"),
        ("train nano-vla --set lr=1 --set ema=0", "--set is given twice"),
        ("train nano-vla --set steps=-1", "key steps"),
        ("label --num-scenes 3 --vocabulary mug", "--vocabulary"),
        ("label photos --num-scenes 3", "--num-scenes"),
        ("evaluate vqa --model nano --labels sim --calibrate --num-images 1", "--num-images"),
        ("evaluate vqa --model nano --labels sim --calibrate --shift light", "Leave out --shift"),
        ("evaluate vqa --model nano --labels sim --shift language", "changes instructions"),
        ("evaluate vqa --model nano --labels photos --shift light", "Give --labels sim"),
        ("label nowhere.jpg", "nowhere.jpg does not exist"),
        ("label sim:x", "is not a scene. Write one as sim:7"),
        ("label simpler:10000-10001 photos", "Give it alone"),
        ("label show nowhere", "nowhere"),
        ("record --tasks stack_cubes", "Did you mean 'stack_cube'?"),
        ("record --first-seed 5", "kept for testing"),
        ("ask sim:7 'how far?' --save-image box.txt", "End it in .png or .jpg"),
        ("ask sim:7 ' '", "empty question"),
        ("ask sim:10000 'how far?'", "held-out seeds"),
        ("ask absent.png 'how far?'", "No such file"),
        (f"ask {__file__} 'how far?'", "not a readable image"),
        ("data prepare /nowhere", "--out is missing. Give it, as in `spear data prepare"),
        ("data prepare /nowhere --out x", "there is no folder /nowhere"),
        ("demo --data /nowhere", "/nowhere"),
        ("evaluate --tasks put_in --policy expert", "Did you mean 'put_"),
        ("evaluate --policy expert --first-seed 9999", "held-out seeds"),
        ("evaluate --policy expert --num-scenes 1 --shard 2/2", "2/2"),
        (f"evaluate --policy expert --num-scenes 1 --out {NANO}", "contains other files"),
        (f"train nano-post --init nano --episodes x --out {NANO}", "contains other files"),
        (
            "evaluate --num-scenes x",
            "--num-scenes cannot be x. Give a whole number. See `spear evaluate --help`.",
        ),
        ("evaluate --num-scenes", "--num-scenes needs a value"),
        ("evaluate --policy /nowhere", "no model '/nowhere'"),
        ("doctor --out /etc/passwd/page.html", "/etc/passwd is a file"),
        (
            "evaluate data --policy nano --episodes /nowhere --report /",
            "/ cannot be written (it is a folder)",
        ),
        ("evaluate vqa --model nano --labels sim --out /etc/passwd/x", "/etc/passwd is a file"),
        ("evaluate --policy ws://127.0.0.1:9", "ws://127.0.0.1:9"),
        (f"evaluate simpler --tasks {CARROT} --policy oracle", "PutCarrotOnPlateInScene-v1"),
        ("evaluate simpler --policy oracle --videos x", "Give failures or all or a whole num"),
        ("evaluate simpler --policy expert", "oracle"),
        ("evaluate simpler --policy oracle --device cuda", "--device cuda"),
        ("evaluate ablations --rows 3d", "python -m experiments.ablations"),
        ("evaluate vqa --model nano --labels /nowhere", "/nowhere"),
        ("evaluate vqa --model nano --labels sim:x", "Write sim:SEED"),
        ("serve --policy nano --embodiment droid --control joints", "joint_"),
        ("serve --policy nano --token schlüssel", "--token"),
        ("serve --policy nano --port 99999", "--port 99999"),
        ("serve --policy nano --protocol vla-eval --embodiment maniskill2", "maniskill2_widowx"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(
    command: str,
    hint: str,
    run_refused_command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "vla-eval" in command:
        pytest.importorskip("vla_eval")
    monkeypatch.chdir(tmp_path)

    message = run_refused_command(shlex.split(command))

    assert hint in message
    assert not list(tmp_path.iterdir())


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port at which another server listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_that_is_taken_is_refused(taken_port: int, run_refused_command: Command) -> None:
    pytest.importorskip("vla_eval")

    assert "--port" in run_refused_command(
        ["serve", "--policy", "nano", "--protocol", "vla-eval", "--port"], str(taken_port)
    )


def test_a_package_that_is_not_installed_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, run_refused_command: Command
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)  # importing mujoco now fails
    # Modules that were imported before would not import mujoco again.
    for name in list(sys.modules):
        if name.startswith(("spear.sim", "spear.evaluate.closed")):
            monkeypatch.delitem(sys.modules, name)

    message = run_refused_command("evaluate", "--policy", "expert", "--num-scenes", "1")

    assert "pip install 'spear-vla[sim]'" in message


def test_interrupted_is_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("spear.audit.inspect.describe_dataset", Mock(side_effect=KeyboardInterrupt))

    assert main(["data", "inspect", "x"]) == 130

    assert capsys.readouterr().err == "interrupted\n"


# The command line recognizes this error of the package safetensors by the name of its class.
SafetensorError = type("SafetensorError", (Exception,), {})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    ],
)
def test_a_full_disk_is_one_line(
    error: Exception, run_refused_command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So is the error of another package, and one that does not name the file."""
    fill_disk = Mock(side_effect=error)
    monkeypatch.setattr("spear.data.readers.dataset_layout.find_missing_fields", fill_disk)

    assert "the disk is full. Free some space" in run_refused_command("data", "datasets")


def test_a_path_that_is_a_loop_of_links_is_one_line(
    run_refused_command: Command, tmp_path: Path
) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")

    assert str(loop) in run_refused_command("data", "prepare", str(loop), "--out", "never")


def run_spear(argv: list[str], stdout: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in another process, which writes its output when it exits."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", SPEAR_CLI_CODE, *argv]
    return subprocess.run(
        command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


with_commands_that_print = pytest.mark.parametrize(
    "argv", [["--help"], ["train", "--help"], ["recipes"]]
)
"""Runs a test with three commands: help of the program, help of a command, and a result."""


@with_commands_that_print
def test_a_reader_that_has_read_enough_is_no_error(argv: list[str]) -> None:
    """A reader such as `head` closes the pipe before the command has written everything."""
    reader, writer = os.pipe()
    os.close(reader)

    with open(writer, "wb") as closed_pipe:
        process = run_spear(argv, closed_pipe)

    assert process.returncode == 0
    assert process.stderr == ""


@with_commands_that_print
def test_output_that_cannot_be_written_is_one_line(argv: list[str]) -> None:
    with open("/dev/full", "wb") as full_disk:  # every write to this device fails
        process = run_spear(argv, full_disk)

    assert process.returncode == 2
    assert process.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "stdout",
    [
        None,  # what Python has if stdout is closed
        io.TextIOWrapper(io.BytesIO(), "ascii"),
    ],
)
def test_a_stdout_that_is_closed_or_lacks_our_characters_will_do(
    stdout: io.TextIOWrapper | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout", stdout)

    assert main(["evaluate", "reference"]) == 0


def test_a_notice_is_one_line_in_a_command_however_often_it_is_given(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command reads three observations with the same fault. The next command prints it again."""
    robot = embodiments.load("droid")
    observation = robot.example()
    # Negative joint angles, of which the fourth is outside a Franka's range.
    wrong_observation = {**observation, droid.JOINTS_KEY: -observation[droid.JOINTS_KEY]}

    def read_three_times(args: list[str]) -> None:
        for _ in range(3):
            robot.read(wrong_observation)

    monkeypatch.setattr("spear.cli._dispatch", read_three_times)

    for _ in range(2):
        assert main([]) == 0
        assert re.fullmatch(r"note: .*joint 4.*\n", capsys.readouterr().err)


OTHER_PROGRAMS_OPTIONS = {
    "--upgrade",
    "--quiet",
    "--nproc-per-node",
    "--no-python",
    "--policy.urdf",
    "--append",
}
"""Options of pip, torchrun and lerobot-train."""
FORMER_OPTIONS = {"--per"}  # the beginning of "--per_image", a key in files of earlier versions
for former_options in renamed.NEW_OPTIONS.values():
    FORMER_OPTIONS.update(former_options)


def test_every_option_that_a_text_names_exists() -> None:
    known_options = {"--help", "--help-all", "--version", *OTHER_PROGRAMS_OPTIONS}
    for name in COMMANDS:
        options_class = get_options_class(load_command(name))
        if options_class is not None:
            known_options.update(list_option_names(options_class))

    known_options.update(FORMER_OPTIONS)
    for path in Path(spear.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named_options = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*[a-z0-9]", node.value))
                assert not named_options - known_options, f"{path}:{node.lineno}"
