"""Instructions that are sentences are distinguished from names of tasks."""

import pytest

from spear.checks.instructions import explain_identifier_as_instruction, looks_like_identifier


@pytest.mark.parametrize("text", ["PickCube-v1", "turn_on_stove", "pick-place-v2", "PnPCanToBin"])
def test_names_of_tasks_look_like_identifiers(text: str) -> None:
    assert looks_like_identifier(text)


@pytest.mark.parametrize(
    "text", ["stop", "Go", "push the block", "把杯子放下", "", "pick up T-shirt"]
)
def test_sentences_do_not_look_like_identifiers(text: str) -> None:
    assert not looks_like_identifier(text)


def test_one_name_for_all_episodes_is_doubtful() -> None:
    doubt = explain_identifier_as_instruction(["open_drawer"] * 3)

    assert doubt is not None
    assert "open_drawer" in doubt


@pytest.mark.parametrize("instructions", [[], ["open_drawer", "lift_cube"], ["lift the cube"] * 2])
def test_several_names_and_sentences_are_not_doubtful(instructions: list[str]) -> None:
    assert explain_identifier_as_instruction(instructions) is None
