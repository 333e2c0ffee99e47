"""From the words behind a command to its dataclass of options, by tyro.

tyro explains mistakes in boxes of several lines, as argparse does at length. A command of ours says
in one line what is wrong and where help is, so tyro's text is caught and shortened here. (tyro's
sub-command app would not change that, and it would have to import all commands to show one.)
"""

import contextlib
import io
import re
import typing
from collections.abc import Callable, Sequence
from typing import Any

from spear.errors import SpearError, check_known
from spear.util.files import check_writable

PYTHON_TYPES = {"int()": "a whole number", "to float": "a number"}
"""What tyro says of a value of another type -> what to give instead."""


def get_options_class(function: Callable[..., None]) -> type | None:
    """Return the dataclass of options that a command takes; None for a command without options."""
    return typing.get_type_hints(function).get("options")


def parse_options(
    name: str, function: Callable[..., None], args: Sequence[str], help_text: str
) -> list[Any]:
    """Parse a command's words.

    Args:
        name: the command, such as "data inspect".
        function: what the command calls.
        args: the words behind the command's name.
        help_text: what `--help` prints above the options.

    Returns:
        The arguments for `function`: its options, or nothing.

    Raises:
        SpearError: in one line, for the first mistake.
        SystemExit: after printing the help.
    """
    options_class = get_options_class(function)
    _check_option_names(options_class, args)
    options = _parse_with_tyro(name, options_class, args, help_text)
    if options_class is None:
        return []
    _check_output_files(options_class, options)
    return [options]


def _check_option_names(options_class: type | None, args: Sequence[str]) -> None:
    """Check that all options are known, and that none is given twice."""
    from spear.util.options import list_option_names

    known_options = ["--help"]
    if options_class is not None:
        known_options += list_option_names(options_class)
    seen_options: set[str] = set()
    for word in args:
        if not word.startswith("--"):
            continue
        option = word.partition("=")[0].replace("_", "-")
        check_known("option", known_options, option)
        if option in seen_options:
            raise SpearError(
                f"{option} is given twice. Write all of its values after one {option}."
            )
        seen_options.add(option)


def _check_output_files(options_class: type, options: Any) -> None:
    """Check that files can be written, before the work whose results would be lost."""
    from spear.util.options import OptionalFile

    for field, hint in typing.get_type_hints(options_class, include_extras=True).items():
        file = getattr(options, field)
        if hint == OptionalFile and file:
            check_writable(file)


def _parse_with_tyro(
    name: str, options_class: type | None, args: Sequence[str], help_text: str
) -> Any:
    """Return what tyro makes of the words; its complaint becomes a `SpearError`."""
    import tyro

    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                options_class or (lambda: None),
                prog=f"spear {name}",
                description=help_text,
                args=args,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if not stop.code:  # after --help
            raise
    reason = _read_complaint(complaint.getvalue(), name)
    raise SpearError(f"{_simplify(reason, args)}. See `spear {name} --help`.")


def _read_complaint(text: str, name: str) -> str:
    """Return the sentence in tyro's box, without its title and what stands behind it."""
    boilerplate = ("For full helptext", f"spear {name} --help", "---")
    lines = [line.strip(" │╭╮╰╯─|+") for line in text.splitlines()[1:]]
    own_lines = [line for line in lines if line and not line.startswith(boilerplate)]
    sentence, _, _ = " ".join(own_lines).partition("Argument helptext")
    sentence = " ".join(sentence.split()).rstrip(" .")
    return sentence.replace(f"Missing from spear {name}", "missing")


def _simplify(reason: str, args: Sequence[str]) -> str:
    """Return tyro's complaint about an option's value without Python's words for types."""
    match = re.search(r"(?:argument '|parsing )(--[\w-]+)", reason)
    if match is None:
        return reason
    option = match[1]
    if "Missing value" in reason:
        return f"{option} needs a value"

    alternatives: list[str] = []
    for choices in re.findall(r"\(('[^)]*)\)", reason):
        words = re.findall(r"'([^']*)'", choices)
        alternatives += [word for word in words if word != "None"]
    for python_type, description in PYTHON_TYPES.items():
        if python_type in reason:
            alternatives.append(description)
    if not alternatives:
        return reason
    values = " ".join(_values_of(option, args))
    return f"{option} {values}: give {' or '.join(dict.fromkeys(alternatives))}"


def _values_of(option: str, args: Sequence[str]) -> list[str]:
    """Return the word behind each occurrence of an option, or its value behind an equals sign."""
    values = []
    for index, word in enumerate(args):
        if option in word:
            _, equals, value = word.partition("=")
            next_word = args[index + 1] if index + 1 < len(args) else ""
            values.append(value if equals and value else next_word)
    return values
