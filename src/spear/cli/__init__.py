"""The command line: `spear COMMAND …`.

A command is a function of one argument, a dataclass of options (`spear.util.options`). The
function's docstring is the command's help. Only the module of the command that the user names is
imported. Heavy packages are imported inside the command's function, so that help appears at once.
"""

import ast
import difflib
import functools
import importlib
import io
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import spear
from spear.cli import renamed
from spear.cli.parsing import parse_options
from spear.errors import (
    Notice,
    SpearError,
    VerdictError,
    escape_control_characters,
    is_first_process,
    make_missing_extra_message,
)
from spear.util.files import DISK_FULL_ERRNOS, DISK_FULL_MESSAGE

COMMANDS: dict[str, str] = {
    "label": "label:label",
    "label show": "label:show",
    "questions": "label:make_questions",
    "ask": "basics:ask",
    "record": "basics:record",
    "record simpler": "basics:record_simpler",
    "record libero": "basics:record_libero",
    "demo": "basics:demo",
    "recipes": "train:recipes",
    "train": "train:train",
    "evaluate": "evaluate:evaluate",
    "evaluate data": "evaluate:evaluate_data",
    "evaluate simpler": "evaluate:evaluate_simpler",
    "evaluate libero": "evaluate:evaluate_libero",
    "evaluate compare": "evaluate:compare",
    "evaluate reference": "evaluate:reference",
    "evaluate vqa": "evaluate:evaluate_vqa",
    "serve": "serve:serve",
    "data inspect": "data:inspect",
    "data describe": "data:describe",
    "data prepare": "data:prepare",
    "data export": "data:export",
    "data audit": "data:audit",
    "data datasets": "data:datasets",
    "convert backbones": "convert:convert_backbones",
    "convert vlm": "convert:convert_vlm",
    "convert pi0": "convert:convert_pi0",
    "convert mapped": "convert:convert_mapped",
    "convert expected": "convert:convert_expected",
    "convert roles": "convert:convert_roles",
    "export onnx": "export:export_onnx",
    "estimate-memory": "train:estimate_memory",
    "diagnose": "diagnose:diagnose",
    "doctor": "basics:doctor",
}
"""Command -> its function as FILE:FUNCTION, a file of this folder; in the order of the help."""

PRINTS_HELP_WITHOUT_ARGUMENTS = ("label",)
"""Commands that print their help when the user gives no arguments. They could run without any, but
nobody should begin their work by accident."""

DESCRIPTION = (
    "SPEAR-1: label images with 3D, train the VLM that understands them, "
    "train a robot policy on it."
)
HELP_OPTIONS = ("-h", "--help", "--help-all")
SECONDS_FOR_FIRST_PROCESS = 5
"""How long the other processes of a run wait before they report an error. The first process reports
the error meanwhile and ends, and `torchrun` then ends the others silently."""

MODULES_OF_EXTRA = {
    "sim": ("mujoco", "gymnasium"),
    "rlds": ("crc32c", "google"),
    "serve": ("websockets", "msgpack", "prometheus_client"),
    "vla-eval": ("vla_eval",),
}
"""Extra of this package -> modules that it installs and that plain `import` statements load.

`import_optional` names the extra of a missing module by itself; this table serves the others."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, and return its exit code (see `run_reporting_errors`)."""
    args = list(sys.argv[1:] if argv is None else argv)
    return run_reporting_errors(lambda: _dispatch(args))


def run_reporting_errors(work: Callable[[], object]) -> int:
    """Run a command or a script; report errors and notices in one line each, on stderr.

    Args:
        work: what to run.

    Returns:
        The exit code: 0; 1 where `spear doctor` or `spear diagnose` finds something wrong; 2 for
        bad input or a file that cannot be read or written; 3 for a question that the data cannot
        answer; 130 when interrupted.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The encoding of a terminal or a log may lack characters that we print.
        sys.stdout.reconfigure(errors="replace")
    with warnings.catch_warnings():
        warnings.simplefilter("always", Notice)
        warnings.showwarning = _WarningPrinter(warnings.showwarning)
        try:
            try:
                work()
            finally:
                _flush_stdout()
            return 0
        except BrokenPipeError:  # the reader of our output, such as `head`, has read enough
            return 0
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except Exception as error:
            message = _explain(error)
            if message is None:  # a mistake in this package: show the traceback
                raise
            if not is_first_process():
                time.sleep(SECONDS_FOR_FIRST_PROCESS)
            label = "" if isinstance(error, VerdictError) else "error: "
            print(f"{label}{escape_control_characters(message)}", file=sys.stderr)
            return getattr(error, "code", 2)


class _WarningPrinter:
    """Replaces `warnings.showwarning`.

    It prints each different `Notice` once, in one line, and gives other warnings to
    `print_warning`, which prints them as Python does.
    """

    def __init__(self, print_warning: Callable[..., None]) -> None:
        self._print_warning = print_warning
        self._printed_notices: set[str] = set()

    def __call__(self, message: Warning | str, *details: Any, **options: Any) -> None:
        if not isinstance(message, Notice):
            self._print_warning(message, *details, **options)
        elif str(message) not in self._printed_notices:
            self._printed_notices.add(str(message))
            line = f"note: {escape_control_characters(str(message))}"
            print(line, file=sys.stderr, flush=True)


def _flush_stdout() -> None:
    """Write the output that Python still buffers, while an error of writing can be reported."""
    if sys.stdout is None:  # Python was started with its output closed
        return
    try:
        sys.stdout.flush()
    except OSError:
        # Python writes the buffer again when it exits. To the null device that write succeeds;
        # otherwise Python would print a traceback.
        null_device = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null_device, sys.stdout.fileno())
        raise


def _explain(error: Exception) -> str | None:
    """Return one line about an error that the user or the machine caused.

    Returns None for any other error, which is a mistake in this package.
    """
    if isinstance(error, SpearError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return _explain_missing_module(error)
    if isinstance(error, OSError):
        return _explain_os_error(error)
    # The error is recognized by its class's name, because importing safetensors would slow down
    # the commands that need no weights.
    if type(error).__name__ == "SafetensorError":
        if "No space left" in str(error) or "Disk quota" in str(error):
            return DISK_FULL_MESSAGE
        return f"the weights cannot be read or written ({error}). Check the file and the disk."
    # Python before 3.13 raises this for a symbolic link that leads to itself.
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return f"{error}. Check the path."
    return None


def _explain_missing_module(error: ModuleNotFoundError) -> str | None:
    """Return which extra installs the missing module; None if `MODULES_OF_EXTRA` lacks it."""
    package = (error.name or "").split(".")[0]
    for extra, modules in MODULES_OF_EXTRA.items():
        if package in modules:
            return make_missing_extra_message("this command", package, extra)
    return None


def _explain_os_error(error: OSError) -> str | None:
    """Return one line about an error of a file or the disk; None if the error names neither."""
    is_disk_full = error.errno in DISK_FULL_ERRNOS
    if error.filename is None:
        return DISK_FULL_MESSAGE if is_disk_full else None
    if is_disk_full:
        return f"{error.filename} cannot be written, because {DISK_FULL_MESSAGE}"
    return f"{error.filename} cannot be opened ({error.strerror}). Check the path."


def _dispatch(args: list[str]) -> None:
    """Print the help or the version, or run a command."""
    if not args or args[0] in HELP_OPTIONS:
        print(_format_overview(DESCRIPTION, list(COMMANDS)))
    elif args[0] == "--version":
        print(spear.__version__)
    elif args[0].startswith("-"):
        raise SpearError(
            f"unknown option {args[0]}. Give a command first, as in `spear train {args[0]}`, or "
            "run spear --help for the list."
        )
    elif _is_group(args[0]) and (len(args) == 1 or args[1] in HELP_OPTIONS):
        title = f"The commands that begin with spear {args[0]}:"
        print(_format_overview(title, _list_subcommands(args[0])))
    else:
        name = resolve_command(args)
        num_name_words = len(name.split())
        option_words = args[num_name_words:]
        renamed.check_no_former_options(name, option_words)
        if not option_words and name in PRINTS_HELP_WITHOUT_ARGUMENTS:
            option_words = ["--help"]
        function = load_command(name)
        function(*parse_options(name, function, option_words, _make_full_help(name)))


def resolve_command(args: Sequence[str]) -> str:
    """Return the longest command name that the arguments begin with.

    The first argument must not begin with a dash: `_dispatch` handles options without a command.

    Raises:
        SpearError: the command is unknown (the message suggests a similar one), or the name is a
            former one.
    """
    renamed.check_no_former_command(args)
    words = [word for word in args[:2] if not word.startswith("-")]  # names have one or two words
    for name in (" ".join(words), words[0]):
        if name in COMMANDS:
            return name
    raise _make_unknown_command_error(" ".join(words))


def _make_unknown_command_error(name: str) -> SpearError:
    """Make the error for a command that does not exist."""
    similar_names = difflib.get_close_matches(name, [*COMMANDS, "--version", "--help"], n=1)
    suggestion = f" Did you mean spear {similar_names[0]}?" if similar_names else ""
    return SpearError(f"unknown command {name!r}.{suggestion} Run spear --help for the list.")


def load_command(name: str) -> Callable[..., None]:
    """Import and return the function of a command."""
    module, _, function = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(f"spear.cli.{module}"), function)


def _make_full_help(name: str) -> str:
    """Return the command's whole help: its docstring, and the commands that begin with its name."""
    module, _, function = COMMANDS[name].partition(":")
    docstring = _read_docstrings(module)[function]
    subcommands = _list_subcommands(name)
    if not subcommands:
        return docstring
    lines = "\n".join(_format_summary_lines(subcommands))
    return f"{docstring}\n\nOther commands that begin with it:\n{lines}"


@functools.cache
def _read_docstrings(module: str) -> dict[str, str]:
    """Return the docstrings of a file's functions, without importing what the file imports."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text("utf-8"))
    return {
        node.name: ast.get_docstring(node) or ""
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
    }


def _list_subcommands(word: str) -> list[str]:
    """Return the two-word commands whose first word is `word`."""
    return [name for name in COMMANDS if name.startswith(f"{word} ")]


def _is_group(word: str) -> bool:
    """Return whether `word` is the first word of commands, but no command by itself ("data")."""
    return word not in COMMANDS and bool(_list_subcommands(word))


def _format_overview(title: str, names: Sequence[str]) -> str:
    """Return the help page that lists these commands."""
    advice = "`spear COMMAND --help` explains a command, with an example."
    return "\n".join([title, "", *_format_summary_lines(names), "", advice])


def _format_summary_lines(names: Sequence[str]) -> list[str]:
    """Return a line per command, with the first line of its help."""
    width = max(len(name) for name in names) + 1
    lines = []
    for name in names:
        summary = _make_full_help(name).splitlines()[0]
        lines.append(f"  spear {name:<{width}} {summary}")
    return lines
