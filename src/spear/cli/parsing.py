"""Parses the words after a command's name into the command's dataclass of options, with tyro.

tyro explains a mistake in a box of several lines. Our commands say in one line what is wrong and
where help is, so this module catches tyro's text and shortens it. We do not use tyro's application
with sub-commands, because its messages are the same and it would import all commands to run one.
"""

import contextlib
import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from spear.errors import SpearError, format_count
from spear.util.files import check_writable

HELP_OPTIONS = ("-h", "--help", "--help-all")
NO_DEFAULTS = ("None", "", "''", "False")
"""Defaults that the help does not show, as tyro writes them: None, an empty tuple, an empty text,
and a flag that is not set."""
MISSING_PREFIX = "missing: "
"""The beginning of tyro's complaint about missing arguments, after `_extract_complaint`."""
UNRECOGNIZED_PREFIX = "Unrecognized options: "
"""The beginning of tyro's complaint about words that belong to no option."""
PYTHON_TYPES = {"int()": "a whole number", "to float": "a number"}
"""Words in tyro's complaint about a value of the wrong type -> what the user should give."""


def get_options_class(function: Callable[..., None]) -> type | None:
    """Return the dataclass of options that a command's function takes; None if it takes none."""
    return typing.get_type_hints(function).get("options")


def parse_options(
    command: str, function: Callable[..., None], args: Sequence[str], help_text: str
) -> list[Any]:
    """Parse the words after a command's name.

    Args:
        command: the command's name, such as "data inspect".
        function: the command's function.
        args: the words after the command's name.
        help_text: the text that `--help` prints above the options.

    Returns:
        The arguments for `function`: a list with its options, or an empty list if it takes none.

    Raises:
        SpearError: the words have a mistake. The message names the first one, in one line.
        SystemExit: the help was asked for and printed.
    """
    options_class = get_options_class(function)
    _check_options(command, options_class, args)
    for word in HELP_OPTIONS:
        if word in args:
            _print_help_and_exit(command, options_class, help_text, shows_all=word == "--help-all")
    options = _parse_with_tyro(command, options_class, args, help_text)
    if options_class is None:
        return []
    _check_output_files(options_class, options)
    return [options]


def _print_help_and_exit(
    command: str, options_class: type | None, help_text: str, shows_all: bool
) -> None:
    """Print a command's help, and exit. Rarely used options appear only if `shows_all`."""
    import tyro

    from spear.util.options import list_option_help

    option_help = [] if options_class is None else list_option_help(options_class)
    shown_options = [option for option in option_help if shows_all or not option.is_rare]
    num_hidden = len(option_help) - len(shown_options)
    if num_hidden:
        help_text += f"\n\nUse --help-all to see {format_count(num_hidden, 'more options')}."

    # tyro prints the help of a new class, which has only the shown options, in one group.
    fields = []
    for option in shown_options:
        hint: Any = Annotated[option.hint, tyro.conf.arg(help_behavior_hint=_describe_default)]
        metadata = {"help": option.text}
        field = dataclasses.field(default=option.default, metadata=metadata, kw_only=True)
        fields.append((option.name, hint, field))
    tyro.cli(
        dataclasses.make_dataclass("Options", fields),
        prog=f"spear {command}",
        description=help_text,
        args=["--help"],
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _describe_default(default: str) -> str:
    """Return the words about an option's default in the help; empty if the default says nothing."""
    return "" if default in NO_DEFAULTS else f"(default: {default})"


def _check_options(command: str, options_class: type | None, args: Sequence[str]) -> None:
    """Check that a command has all the options in `args`, and that none is given twice.

    Args:
        command: The command's name, for the error.
        options_class: The class of its options; None if it takes none.
        args: The words after the command's name.

    Raises:
        SpearError: An option is unknown, or is given twice.
    """
    from spear.util.options import list_option_names

    known_options = list(HELP_OPTIONS)
    if options_class is not None:
        known_options += list_option_names(options_class)
    seen_options: set[str] = set()
    for word in args:
        if not word.startswith("--"):
            continue
        option = word.partition("=")[0].replace("_", "-")
        if option not in known_options:
            raise _make_unknown_option_error(command, option, known_options)
        if option in seen_options:
            raise SpearError(
                f"{option} is given twice. Write all of its values after one {option}."
            )
        seen_options.add(option)


def _make_unknown_option_error(
    command: str, option: str, known_options: Sequence[str]
) -> SpearError:
    """Make the error for an option that a command does not have."""
    if "--set" in known_options:
        from spear.train.options import list_recipe_keys

        key = option.removeprefix("--").replace("-", "_")
        if key in list_recipe_keys():
            return SpearError(
                f"{option} is a setting of recipes, not an option. Use --set {key}=VALUE."
            )
    similar_options = difflib.get_close_matches(option, known_options, n=1)
    suggestion = f" Did you mean {similar_options[0]}?" if similar_options else ""
    return SpearError(f"unknown option {option}.{suggestion} See `spear {command} --help`.")


def _check_output_files(options_class: type, options: Any) -> None:
    """Check that output files can be written, before the work whose results would be lost.

    All options of the type `OptionalFile` name output files.
    """
    from spear.util.options import OptionalFile

    for field, hint in typing.get_type_hints(options_class, include_extras=True).items():
        file = getattr(options, field)
        if hint == OptionalFile and file:
            check_writable(file)


def _parse_with_tyro(
    command: str, options_class: type | None, args: Sequence[str], help_text: str
) -> Any:
    """Return the options that tyro makes of the words; turn tyro's complaint into a `SpearError`.

    Returns None for a command without options.
    """
    import tyro

    from spear.util.options import set_help_texts

    if options_class is not None:
        set_help_texts(options_class)
    # tyro also parses for a function. One without parameters accepts no words.
    target = options_class or (lambda: None)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                target,
                prog=f"spear {command}",
                args=args,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit:  # tyro has written its complaint
        pass
    reason = _extract_complaint(complaint.getvalue(), command)
    if reason.startswith(MISSING_PREFIX):
        raise _make_missing_arguments_error(command, reason.removeprefix(MISSING_PREFIX), help_text)
    raise SpearError(f"{_simplify_complaint(reason, args)}. See `spear {command} --help`.")


def _make_missing_arguments_error(command: str, reason: str, help_text: str) -> SpearError:
    """Make the error for arguments and options that a command needs and the user did not give.

    Args:
        command: the command's name.
        reason: what tyro says about each of them, ending in "(required)".
        help_text: the command's help, whose first example the message shows.
    """
    missing = []
    for description in reason.split("(required)"):
        # Before each "(required)", tyro writes the argument's name and a word for its value. The
        # text after the last "(required)" has fewer words, and names no argument.
        words = description.split()
        if len(words) > 1:
            missing.append(words[0])
    example = re.search(rf"^ *(spear {command} .*)", help_text, re.MULTILINE)
    verb, pronoun = ("is", "it") if len(missing) == 1 else ("are", "them")
    message = f"{' and '.join(missing)} {verb} missing."
    if example:
        message += f" Give {pronoun}, as in `{example[1].strip()}`."
    return SpearError(f"{message} See `spear {command} --help`.")


def _extract_complaint(text: str, command: str) -> str:
    """Return the sentence that says what is wrong, out of the box that tyro draws.

    The box's title, the option's help and the advice to use --help are removed.
    """
    lines_below_title = text.splitlines()[1:]
    lines = [line.strip(" │╭╮╰╯─|+") for line in lines_below_title]  # without the box's border
    advice_starts = ("For full helptext", f"spear {command} --help", "---")
    sentence_lines = [line for line in lines if line and not line.startswith(advice_starts)]
    sentence, _, _ = " ".join(sentence_lines).partition("Argument helptext")
    sentence = " ".join(sentence.split()).rstrip(" .")
    return sentence.replace(f"Missing from spear {command}: ", MISSING_PREFIX)


def _simplify_complaint(reason: str, args: Sequence[str]) -> str:
    """Return tyro's complaint in the words of the command line, without Python's types.

    Complaints that concern no option's value are returned as they are.
    """
    if reason.startswith(UNRECOGNIZED_PREFIX):
        return _explain_extra_word(reason.removeprefix(UNRECOGNIZED_PREFIX).split(), args)
    # The option in "error parsing --steps: …", for example.
    match = re.search(r"(?:argument '|parsing )(--[\w-]+)", reason)
    if match is None:
        return reason
    option = match[1]
    if "Missing value" in reason:
        return f"{option} needs a value"

    # What the user can give: the choices, which tyro lists as ('first', 'second'), or a number.
    alternatives: list[str] = []
    for choices in re.findall(r"\(('[^)]*)\)", reason):
        words = re.findall(r"'([^']*)'", choices)
        alternatives += [word for word in words if word != "None"]
    for python_type, description in PYTHON_TYPES.items():
        if python_type in reason:
            alternatives.append(description)
    if not alternatives:
        return reason
    values = " ".join(_list_option_values(option, args))
    distinct_alternatives = dict.fromkeys(alternatives)
    return f"{option} cannot be {values}. Give {' or '.join(distinct_alternatives)}"


def _explain_extra_word(words: Sequence[str], args: Sequence[str]) -> str:
    """Say which word belongs to nothing, and to which option before it a user meant to give it."""
    word = words[0] if words else ""
    words_before = args[: args.index(word)] if word in args else []
    options = [word_before for word_before in words_before if word_before.startswith("--")]
    if not options:
        return f"the word {word} is not expected"
    return f"{options[-1]} does not take as many values, and {word} is one too many"


def _list_option_values(option: str, args: Sequence[str]) -> list[str]:
    """Return the value at each occurrence of an option.

    The value follows an equals sign in the option's word, or is the next word.
    """
    values = []
    for index, word in enumerate(args):
        if option not in word:
            continue
        _, _, value = word.partition("=")
        next_word = args[index + 1] if index + 1 < len(args) else ""
        values.append(value or next_word)
    return values
