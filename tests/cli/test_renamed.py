"""Former names of commands and options: each is refused in one line that gives the new name."""

from collections.abc import Iterator

import pytest

from experiments.ablations.__main__ import main as run_ablations
from experiments.ablations.rows import AblationOptions
from refusals import Command
from spear.cli import load_command
from spear.cli.parsing import get_options_class
from spear.cli.renamed import NEW_COMMANDS, NEW_OPTIONS
from spear.util.options import list_option_names


def list_renamed_options() -> Iterator[tuple[str, str, str]]:
    """Yield (command, former option, new option) for every former option."""
    for command, new_options in NEW_OPTIONS.items():
        for former, new in new_options.items():
            yield command, former, new


@pytest.mark.parametrize("former", NEW_COMMANDS)
def test_a_former_command_is_refused_with_its_new_name(
    former: str, run_refused_command: Command
) -> None:
    message = run_refused_command(former.split())

    assert message.startswith(f"error: spear {former} is now {NEW_COMMANDS[former]}.")


@pytest.mark.parametrize(("command", "former", "new"), list_renamed_options())
def test_a_former_option_is_refused_with_its_new_name(
    command: str, former: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from spear.cli import main

    if command == "experiments.ablations":
        code = run_ablations([former, "1"])
    else:
        code = main([*command.split(), former, "1"])

    assert code == 2
    assert capsys.readouterr().err == f"error: {former} is now {new}.\n"


@pytest.mark.parametrize("command", NEW_OPTIONS)
def test_new_options_exist_and_former_ones_do_not(command: str) -> None:
    options_class: type | None = AblationOptions
    if command != "experiments.ablations":
        options_class = get_options_class(load_command(command))
    assert options_class is not None

    options = list_option_names(options_class)

    assert set(NEW_OPTIONS[command].values()) <= set(options)
    assert not set(NEW_OPTIONS[command]) & set(options)


@pytest.mark.parametrize(
    ("former", "new"),  # a former command line; the beginning of the one that replaces it
    [
        ("serve nano", "spear serve --policy nano"),
        ("serve nano --ui", "spear serve --policy nano"),
        ("evaluate data mine held-out", "spear evaluate data --policy mine --episodes held-out"),
        ("evaluate vqa nano-vlm sim", "spear evaluate vqa --model nano-vlm --labels sim"),
    ],
)
def test_arguments_that_have_become_options_are_refused_with_them(
    former: str, new: str, run_refused_command: Command
) -> None:
    assert f" is now {new}." in run_refused_command(former.split())
