"""The command line: `spear COMMAND …`.

A command is a function of one argument, a dataclass of options (`spear.util.options`); its docstring is its
help. Only the module of the command that is asked for is imported, and what is heavy inside the function.
"""

import ast
import contextlib
import functools
import importlib
import io
import os
import re
import sys
import time
import typing
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import spear
from spear.errors import (
    Notice,
    SpearError,
    check_known,
    is_first_process,
    missing_extra_message,
    unknown_name_error,
)
from spear.util.files import DISK_FULL_ERRNOS, DISK_FULL_MESSAGE, check_writable

COMMANDS: dict[str, str] = {
    "label": "label:label",
    "label show": "label:show",
    "questions": "label:ask_about",
    "ask": "basics:ask",
    "record": "basics:record",
    "record simpler": "basics:record_simpler",
    "demo": "basics:demo",
    "train": "train:train",
    "evaluate": "evaluate:evaluate",
    "evaluate data": "evaluate:evaluate_data",
    "evaluate simpler": "evaluate:evaluate_simpler",
    "evaluate compare": "evaluate:compare",
    "evaluate reference": "evaluate:reference",
    "evaluate vqa": "evaluate:evaluate_vqa",
    "serve": "serve:serve",
    "vla-eval": "serve:vla_eval",
    "data inspect": "data:inspect",
    "data describe": "data:describe",
    "data prepare": "data:prepare",
    "data export": "data:export",
    "data audit": "data:audit",
    "data datasets": "data:datasets",
    "convert backbones": "convert:convert_backbones",
    "convert vlm": "convert:convert_vlm",
    "convert expected": "convert:convert_expected",
    "plan": "train:plan",
    "doctor": "basics:doctor",
}
"""Every command by its words, in the order of the help: where it is, as FILE:FUNCTION of this folder."""

MOVED: dict[str, str] = {"evaluate ablations": "python -m experiments.ablations"}
"""Commands that are run in another way now."""

ABOUT = "SPEAR-1: label images with 3D, train the VLM that understands them, train a robot policy on it."

EXTRAS = {
    "sim": ("mujoco", "gymnasium"),
    "rlds": ("crc32c", "google"),
    "serve": ("websockets", "msgpack", "prometheus_client"),
    "vla-eval": ("vla_eval",),
}
"""Extra of this package -> the modules that it brings, where no `need` says so."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code, see `guarded`."""
    return guarded(lambda: _do(list(sys.argv[1:] if argv is None else argv)))


def guarded(work: Callable[[], object]) -> int:
    """Do the work of a command, or of a script. Returns the exit code: 0, 1 where `spear doctor` finds
    something wrong, 2 for bad input or a file that cannot be read or written (one line on stderr, as of a
    `Notice`), 3 for a question that the data cannot answer, 130 when interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # of a terminal or a log without our characters
        sys.stdout.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = functools.partial(_show, set(), warnings.showwarning)
        try:
            try:
                work()
            finally:
                _flush()
            return 0
        except BrokenPipeError:  # whoever read our output, such as `head`, has had enough
            return 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            if (line := _one_line(error)) is None:
                raise
            if not is_first_process():
                time.sleep(
                    5
                )  # of what all meet, the first one speaks: then torchrun ends the others
            print(f"error: {line}", file=sys.stderr)
            return getattr(error, "code", 2)


def _show(
    said: set[str], otherwise: Callable[..., None], message: Warning | str, *where: Any, **more: Any
) -> None:
    """A warning: a `Notice` as a line, if it was not `said` yet; others as Python shows them."""
    if not isinstance(message, Notice):
        otherwise(message, *where, **more)
    elif str(message) not in said:
        said.add(str(message))
        print(f"note: {message}", file=sys.stderr, flush=True)


def _do(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(_overview(ABOUT, list(COMMANDS)))
    elif args[0] == "--version":
        print(spear.__version__)
    elif args[0].startswith("-"):
        raise unknown_name_error("option", args[0], ["--help", "--version"])
    elif args[0] not in COMMANDS and _group(args[0]) and args[1:2] in ([], ["-h"], ["--help"]):
        print(_overview(f"The commands that begin with spear {args[0]}:", _group(args[0])))
    else:
        name = _command(args)
        function = load(name)
        function(*parse(name, function, args[len(name.split()) :]))


def _flush() -> None:
    """What cannot be written is noticed here: when Python ends, nobody could say so in one line."""
    try:
        if sys.stdout is not None:  # as it is where stdout is closed
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _one_line(error: Exception) -> str | None:
    """What to say of an error of the user's or of the machine; None for one of ours."""
    if isinstance(error, SpearError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        absent = (error.name or "").split(".")[0]
        extra = next((extra for extra, brought in EXTRAS.items() if absent in brought), None)
        return missing_extra_message("this command", absent, extra) if extra else None
    if type(error).__name__ == "SafetensorError":  # its class is imported with networks only
        full = "No space left" in str(error) or "Disk quota" in str(error)
        return DISK_FULL_MESSAGE if full else f"weights: {error}: check the file and the disk"
    if isinstance(error, RuntimeError) and str(error).startswith(
        "Symlink loop"
    ):  # Python's before 3.13
        return f"{error}: check the path"
    if not isinstance(error, OSError):
        return None
    if error.errno in DISK_FULL_ERRNOS:
        return (
            DISK_FULL_MESSAGE
            if error.filename is None
            else f"{error.filename}: {DISK_FULL_MESSAGE}"
        )
    return None if error.filename is None else f"{error.filename}: {error.strerror}: check the path"


def load(name: str) -> Callable[..., None]:
    """The function of a command."""
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(f"spear.cli.{module}"), function)


def options_of(function: Callable[..., None]) -> type | None:
    """The dataclass of options that a command takes; None for a command without."""
    return typing.get_type_hints(function).get("options")


def parse(name: str, function: Callable[..., None], args: Sequence[str]) -> list[Any]:
    """The options of a command, as its arguments; tyro's complaint about them as one `SpearError` line."""
    import tyro

    from spear.util.options import OptionalFile, list_option_names

    options = options_of(function)
    known = ["--help", *(list_option_names(options) if options else ())]
    given = [word.partition("=")[0].replace("_", "-") for word in args if word.startswith("--")]
    for place, option in enumerate(given):
        check_known("option", known, option)
        if option in given[:place]:
            raise SpearError(f"{option}: given twice: write all of its values after the first one")
    target: Any = options or (lambda: None)
    described: dict[str, Any] = {"prog": f"spear {name}", "description": _help(name)}
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            made = tyro.cli(target, args=args, config=(tyro.conf.OmitArgPrefixes,), **described)
        for field, hint in typing.get_type_hints(options or object, include_extras=True).items():
            if hint == OptionalFile and (
                file := getattr(made, field)
            ):  # before any work, which would be lost
                check_writable(file)
        return [made] if options else []
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip(" │╭╮╰╯─|+") for line in complaint.getvalue().splitlines()]
    more = f"spear {name} --help"
    left_out = "For full helptext", more, "---"
    said = " ".join(line for line in lines[1:] if line and not line.startswith(left_out))
    reason = " ".join(said.partition("Argument helptext")[0].split()).rstrip(" .")
    reason = reason.replace(f"Missing from spear {name}", "missing")
    raise SpearError(f"{_plainly(reason, args)}: see `{more}`")


def _plainly(reason: str, args: Sequence[str]) -> str:
    """tyro's complaint about an option's value, without Python's words for types and choices."""
    found = re.search(r"(?:argument '|parsing )(--[\w-]+)", reason)
    if found is None:
        return reason
    option = found[1]
    given = [
        w.partition("=")[2] or n for w, n in zip(args, [*args[1:], ""], strict=True) if option in w
    ]
    if "Missing value" in reason:
        return f"{option}: needs a value"
    choices = re.findall(r"'([^']*)'", " ".join(re.findall(r"\(('[^)]*)\)", reason)))
    kinds = {"int()": "a whole number", "to float": "a number"}
    wanted = [c for c in dict.fromkeys(choices) if c != "None"]
    wanted += [words for sign, words in kinds.items() if sign in reason]
    return f"{option} {' '.join(given)}: give {' or '.join(wanted)}" if wanted else reason


def _command(args: Sequence[str]) -> str:
    """The longest command name that the arguments start with, the first of which is no option."""
    words = [w for w in args[:2] if not w.startswith("-")]
    for name in (" ".join(words), words[0]):
        if name in MOVED:
            raise SpearError(
                f"spear {name}: this command has moved: clone the repository and run `{MOVED[name]}` in it"
            )
        if name in COMMANDS:
            return name
    raise unknown_name_error("command", " ".join(words), COMMANDS)


def _help(name: str) -> str:
    """The command's docstring, and the commands that begin with its name."""
    module, _, function = COMMANDS[name].partition(":")
    own, group = _docstrings(module)[function], _group(name)
    return (
        own
        if not group
        else own + "\n\nOther commands that begin with it:\n" + "\n".join(_lines(group))
    )


@functools.cache
def _docstrings(module: str) -> dict[str, str]:
    """Those of a file's functions, read without importing what the file imports."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text("utf-8"))
    return {f.name: ast.get_docstring(f) or "" for f in tree.body if isinstance(f, ast.FunctionDef)}


def _group(word: str) -> list[str]:
    """The commands that begin with a word and have another one."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def _overview(title: str, names: Sequence[str]) -> str:
    more = "`spear COMMAND --help` explains a command, with an example."
    return "\n".join([title, "", *_lines(names), "", more])


def _lines(names: Sequence[str]) -> list[str]:
    """Commands, each with the first line of its help."""
    width = max(map(len, names)) + 1
    return [f"  spear {name:<{width}} {_help(name).splitlines()[0]}" for name in names]
