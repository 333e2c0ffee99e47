"""The help shows the right options and defaults, and commands print lists of recipes."""

import pytest

from refusals import Command
from spear.cli import main


def read_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that prints its help, and return the help."""
    with pytest.raises(SystemExit) as stop:
        main([*words])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_label_without_arguments_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "usage: spear label" in read_help(capsys, "label")


def test_rarely_used_options_are_shown_by_help_all_only(
    capsys: pytest.CaptureFixture[str],
) -> None:
    short_help = read_help(capsys, "serve", "--help")
    whole_help = read_help(capsys, "serve", "--help-all")

    assert "--batch-timeout-ms" not in short_help
    assert "Use --help-all to see 3 more options." in short_help
    assert "--batch-timeout-ms" in whole_help
    assert "Use --help-all" not in whole_help


def test_a_rarely_used_option_can_be_given(run_refused_command: Command) -> None:
    message = run_refused_command(["serve", "--policy", "nano", "--batch-timeout-ms", "-1"])

    assert "--batch-timeout-ms -1 is out of range. Give at least 0." in message


def test_choices_are_shown_in_braces(capsys: pytest.CaptureFixture[str]) -> None:
    help_text = read_help(capsys, "ask", "--help")

    assert "--view {external,wrist}" in help_text
    assert "--decode {mode,mean,median}" in help_text


def test_defaults_of_dataclasses_inside_are_those_of_the_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    help_text = " ".join(read_help(capsys, "evaluate", "--help").split())

    assert "runs/evaluate" in help_text  # the class `EpisodeOptions` itself has None


def test_recipes_lists_all_recipes(run_command: Command) -> None:
    output = run_command("recipes")

    assert "nano-vlm-2" in output
    assert "finetune-lora" in output


def test_recipes_shows_the_settings_of_one_with_their_meanings(run_command: Command) -> None:
    output = run_command("recipes", "nano-post")

    assert "\nbatch_size=32\n" in output
    assert "\nlr=0.0003\n    peak learning rate.\n" in output
    assert "smooth_tokens" not in output  # it has no effect on a policy


def test_every_setting_of_every_recipe_has_a_meaning() -> None:
    from spear.train.recipes import RECIPES
    from spear.train.settings import list_settings

    for recipe in RECIPES.values():
        for setting in list_settings(recipe):
            assert setting.meaning, setting.key
