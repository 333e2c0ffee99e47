"""The command line: `spear COMMAND …`. Commands are functions whose docstrings are their help; what is heavy
is imported inside them."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import tyro

import spear
from spear.cli.ablations import ABLATION_COMMANDS
from spear.cli.basics import COMMANDS as BASIC_COMMANDS
from spear.cli.convert import WEIGHT_COMMANDS
from spear.cli.data import DATA_COMMANDS
from spear.cli.evaluate import EVALUATE_COMMANDS
from spear.cli.label import LABEL_COMMANDS
from spear.cli.plan import PLAN_COMMANDS
from spear.cli.serve import SERVE_COMMANDS
from spear.cli.train import TRAIN_COMMANDS
from spear.cli.vla_eval import HARNESS_COMMANDS
from spear.cli.vqa import VQA_COMMANDS
from spear.errors import Notice, SpearError, unknown_name
from spear.util.files import FULL, FULL_DISK

COMMANDS: dict[str, Callable[..., None]] = {
    **LABEL_COMMANDS,
    **BASIC_COMMANDS,
    **TRAIN_COMMANDS,
    **EVALUATE_COMMANDS,
    **VQA_COMMANDS,
    **ABLATION_COMMANDS,
    **SERVE_COMMANDS,
    **HARNESS_COMMANDS,
    **DATA_COMMANDS,
    **WEIGHT_COMMANDS,
    **PLAN_COMMANDS,
}
"""Every command by its words, in the order of the help."""

ABOUT = "SPEAR-1: label images with 3D, train the VLM that understands them, train a robot policy on it."

EXTRAS = {
    "mujoco": "sim",
    "gymnasium": "sim",
    "crc32c": "rlds",
    "google": "rlds",
    "peft": "lora",
    "tensorboard": "train",
    "matplotlib": "report",
    "av": "report",
    "websockets": "serve",
    "msgpack": "serve",
    "vla_eval": "vla-eval",
}
"""Module that may be absent -> the extra of this package that brings it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, 2 for bad input or a file that cannot be read or written (one
    line on stderr), 130 when interrupted.

    A `Notice` is one line on stderr, too.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)  # each is given once already
        warnings.showwarning = functools.partial(_show, warnings.showwarning)
        return _run(argv)


def _show(otherwise: Callable[..., None], message: Warning | str, *where: Any, **more: Any) -> None:
    """A warning: a `Notice` as a line, others as Python shows them."""
    if isinstance(message, Notice):
        print(f"note: {message}", file=sys.stderr, flush=True)
    else:
        otherwise(message, *where, **more)


def _run(argv: Sequence[str] | None) -> int:
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(_overview(ABOUT, list(COMMANDS)))
            return 0
        if args[0] == "--version":
            print(spear.__version__)
            return 0
        if args[0] not in COMMANDS and _group(args[0]) and args[1:2] in ([], ["-h"], ["--help"]):
            print(_overview(f"The commands that begin with spear {args[0]}:", _group(args[0])))
            return 0
        name = _command(args)
        rest = args[len(name.split()) :]
        command = COMMANDS[name]
        _check_options(command, rest)
        arguments = _parse(name, command, rest)
        command(*arguments.args, **arguments.kwargs)
        return 0
    except SpearError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        hint = f"run pip install 'spear-vla[{extra}]'"
        print(f"error: this command needs {error.name}, which is not installed: {hint}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        line = _disk_error(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 2


def _disk_error(error: Exception) -> str | None:
    """The line for an error of reading or writing files; None for another one."""
    if type(error).__name__ == "SafetensorError":  # its class is imported with networks only
        full = "No space left" in str(error) or "Disk quota" in str(error)
        return FULL_DISK if full else f"weights: {error}: check the file and the disk"
    if not isinstance(error, OSError):
        return None
    if error.errno in FULL:
        return FULL_DISK if error.filename is None else f"{error.filename}: {FULL_DISK}"
    return None if error.filename is None else f"{error.filename}: {error.strerror}: check the path"


def _parse(name: str, command: Callable[..., None], args: Sequence[str]) -> inspect.BoundArguments:
    """The arguments of a command; tyro's complaint about them as one `SpearError` line."""

    @functools.wraps(command)
    def collect(*values: Any, **named: Any) -> inspect.BoundArguments:
        return inspect.signature(command).bind(*values, **named)

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(collect, prog=f"spear {name}", args=args, description=_description(name))
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip(" │╭╮╰╯─") for line in complaint.getvalue().splitlines()]
    more = f"spear {name} --help"
    said = " ".join(line for line in lines[1:] if line and not line.startswith(("For full helptext", more)))
    reason = " ".join(said.partition("Argument helptext")[0].split()).rstrip(" .")
    raise SpearError(f"{reason}: see `{more}`")


def _command(args: Sequence[str]) -> str:
    """The longest command name that the arguments start with."""
    words = [w for w in args[:2] if not w.startswith("-")]
    for name in (" ".join(words), words[0] if words else args[0]):
        if name in COMMANDS:
            return name
    raise unknown_name("command", " ".join(words) or args[0], COMMANDS)


def _check_options(command: Callable[..., None], args: Sequence[str]) -> None:
    known = ["help", *(p.replace("_", "-") for p in inspect.signature(command).parameters)]
    for word in args:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("_", "-")
            if name not in known:
                raise unknown_name("option", f"--{name}", [f"--{k}" for k in known])


def _description(name: str) -> str:
    """The docstring up to its arguments, which tyro explains one by one, and the commands that begin with the
    name."""
    own = inspect.cleandoc(COMMANDS[name].__doc__ or "").partition("\nArgs:")[0].strip()
    group = _group(name)
    return own if not group else own + "\n\nOther commands that begin with it:\n" + "\n".join(_lines(group))


def _group(word: str) -> list[str]:
    """The commands that begin with a word and have another one."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def _overview(title: str, names: Sequence[str]) -> str:
    more = "`spear COMMAND --help` explains a command, with an example."
    return "\n".join([title, "", *_lines(names), "", more])


def _lines(names: Sequence[str]) -> list[str]:
    """Commands, each with the first line of its help."""
    width = max(map(len, names)) + 1
    return [f"  spear {name:<{width}} {(COMMANDS[name].__doc__ or '').splitlines()[0]}" for name in names]
