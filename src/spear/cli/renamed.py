"""Former names of commands and options: the error for a former name says what replaced it."""

from collections.abc import Sequence

from spear.errors import SpearError

NEW_COMMANDS = {
    "plan": "spear estimate-memory",
    "vla-eval": "spear serve --protocol vla-eval",
    "train list": "spear recipes",
    "convert expected list": "spear convert expected",
    "evaluate ablations": "python -m experiments.ablations",
}
"""Former command -> the command line that replaces it."""

_EPISODE_OPTIONS = {
    "--scenes": "--num-scenes",
    "--replan": "--replan-steps",
    "--films": "--videos",
    "--batch": "--batch-size",
    "--dataset": "--norm-stats",
}
NEW_OPTIONS: dict[str, dict[str, str]] = {
    "label": {
        "--scenes": "--num-scenes",
        "--rate": "--fps",
        "--size": "--max-size",
        "--per-episode": "--frames-per-episode",
        "--per-minute": "--requests-per-minute",
        "--plan": "--dry-run",
        "--copies": "--replicas",
    },
    "label show": {"--images": "--num-images", "--rerun": "--save-rerun"},
    "questions": {"--pairs": "--questions-per-image", "--families": "--question-types"},
    "ask": {"--family": "--question-type", "--draw": "--save-image"},
    "record": {"--families": "--tasks", "--episodes": "--num-episodes"},
    "record simpler": {"--episodes": "--num-episodes"},
    "train": {
        "--save-every": "--save-steps",
        "--shares": "--sampling-weights",
        "--moge": "--init-depth-encoder",
    },
    "evaluate": {**_EPISODE_OPTIONS, "--families": "--tasks"},
    "evaluate simpler": _EPISODE_OPTIONS,
    "evaluate data": {"--plot": "--report", "--dataset": "--norm-stats"},
    "evaluate vqa": {
        "--images": "--num-images",
        "--per-image": "--questions-per-image",
        "--families": "--question-types",
        "--batch": "--batch-size",
    },
    "evaluate compare": {"--out": "--report", "--films": "--videos"},
    "data inspect": {"--out": "--report"},
    "data audit": {"--out": "--report"},
    "data prepare": {"--rate": "--control-hz", "--size": "--image-size"},
    "serve": {
        "--max-batch": "--max-batch-size",
        "--queue": "--max-queue-size",
        "--wait-ms": "--batch-timeout-ms",
        "--dataset": "--norm-stats",
        "--replan": "--replan-steps",
    },
    "experiments.ablations": {
        "--families": "--tasks",
        "--scenes": "--num-scenes",
        "--plan": "--dry-run",
        "--moge": "--init-depth-encoder",
    },
}
"""Command -> former option -> the option that replaces it."""

OPTIONS_OF_ARGUMENTS: dict[str, tuple[str, ...]] = {
    "evaluate data": ("--policy", "--episodes"),
    "evaluate vqa": ("--model", "--labels"),
    "serve": ("--policy",),
}
"""Command -> the options that replace the arguments that the command formerly took by position."""


def check_no_former_command(args: Sequence[str]) -> None:
    """Raise `SpearError` if the arguments begin with the former name of a command."""
    for num_words in (3, 2, 1):
        former = " ".join(args[:num_words])
        if former in NEW_COMMANDS:
            advice = ""
            if former == "evaluate ablations":
                advice = " Run it in a clone of the repository."
            raise SpearError(f"spear {former} is now {NEW_COMMANDS[former]}.{advice}")


def check_no_former_options(command: str, words: Sequence[str]) -> None:
    """Raise `SpearError` for the first former option, or argument, of a command.

    Args:
        command: the command's name, such as "data inspect".
        words: the words after the name.

    Example:
        >>> check_no_former_options("evaluate", ["--policy", "nano", "--scenes", "8"])
        Traceback (most recent call last):
        spear.errors.SpearError: --scenes is now --num-scenes.
    """
    new_options = NEW_OPTIONS.get(command, {})
    for word in words:
        option = word.partition("=")[0].replace("_", "-")
        if option in new_options:
            raise SpearError(f"{option} is now {new_options[option]}.")
    _check_no_former_arguments(command, words)


def _check_no_former_arguments(command: str, words: Sequence[str]) -> None:
    """Raise `SpearError` if a command begins with arguments that have become options."""
    options = OPTIONS_OF_ARGUMENTS.get(command, ())
    arguments: list[str] = []
    for word in words[: len(options)]:
        if word.startswith("-"):
            break
        arguments.append(word)
    if not arguments:
        return
    new_words = [f"{option} {word}" for option, word in zip(options, arguments, strict=False)]
    raise SpearError(
        f"spear {command} {' '.join(arguments)} is now spear {command} {' '.join(new_words)}."
    )
