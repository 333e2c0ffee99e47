"""How often questions in other words are understood, and questions that were not taught refused."""

from pathlib import Path

import pytest

from experiments.asked_questions import (
    ListedQuestion,
    find_cross_validated_misses,
    find_misses,
    load_list,
)
from experiments.asked_questions.__main__ import main
from spear.evaluate.vqa.ask import AskSettings, ask_question, load_or_render_picture
from spear.evaluate.vqa.calibration import Trust
from spear.evaluate.vqa.classifier import EXAMPLES_FILE
from spear.evaluate.vqa.wording import find_object_names_by_templates, understand_question
from spear.labels.questions.types import PROMPT_TEMPLATES
from spear.models.weights.folders import BUNDLED_WEIGHTS, read_taught_question_types
from spear.policy import load_vlm

VALIDATION_FILE = Path(__file__).with_name("validation_questions.toml")
EXAMPLES = load_list(EXAMPLES_FILE)
VALIDATION = load_list(VALIDATION_FILE)
EARLIER = load_list(Path(__file__).with_name("earlier_questions.toml"))
HELD_OUT = load_list(Path(__file__).with_name("held_out_questions.toml"))
TAUGHT_TYPES = frozenset(read_taught_question_types(BUNDLED_WEIGHTS / "nano-vlm") or ())
GROUPS = ("taught", "untaught", "absent")
MIN_RIGHT = 0.95  # smallest fraction of each group


def compute_right_fraction(
    questions: list[ListedQuestion], misses: list[ListedQuestion], group: str
) -> float:
    """Return which fraction of a group's questions is right."""
    num_questions = sum(listed.group(TAUGHT_TYPES) == group for listed in questions)
    num_misses = sum(listed.group(TAUGHT_TYPES) == group for listed in misses)
    return 1 - num_misses / num_questions


@pytest.fixture(scope="module")
def example_misses() -> list[ListedQuestion]:
    """The examples that a classifier of other examples gets wrong."""
    return find_cross_validated_misses(EXAMPLES, TAUGHT_TYPES)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.slow
def test_the_examples_are_understood_when_they_are_cross_validated(
    group: str, example_misses: list[ListedQuestion]
) -> None:
    assert compute_right_fraction(EXAMPLES, example_misses, group) >= MIN_RIGHT


@pytest.mark.parametrize(
    "questions", [VALIDATION, EARLIER, HELD_OUT], ids=["validation", "earlier", "held out"]
)
@pytest.mark.parametrize("group", GROUPS)
def test_questions_of_other_lists_are_understood(
    group: str, questions: list[ListedQuestion]
) -> None:
    misses = find_misses(questions, TAUGHT_TYPES)

    assert compute_right_fraction(questions, misses, group) >= MIN_RIGHT


def test_what_no_model_is_taught_is_refused() -> None:
    misses = find_misses(VALIDATION + EARLIER + HELD_OUT, TAUGHT_TYPES)

    assert [listed.question for listed in misses if listed.group(TAUGHT_TYPES) == "untaught"] == []


@pytest.mark.parametrize("name", ["gripper", "gripper of the robot", "robot's gripper"])
def test_the_gripper_has_the_name_that_models_know(name: str) -> None:
    parsed = understand_question(f"At what distance is the {name}?")

    assert parsed is not None
    assert parsed.names == ["robot gripper"]


@pytest.mark.parametrize(("group", "min_questions"), [("taught", 400), ("untaught", 200)])
def test_there_are_many_examples(group: str, min_questions: int) -> None:
    assert sum(listed.group(TAUGHT_TYPES) == group for listed in EXAMPLES) >= min_questions


def test_no_paraphrase_has_a_taught_wording() -> None:
    for listed in EXAMPLES + VALIDATION:
        if listed.group(TAUGHT_TYPES) == "taught":
            for question_type in PROMPT_TEMPLATES:
                assert find_object_names_by_templates(listed.question, question_type) is None, (
                    listed.question
                )


def test_no_validation_question_is_an_example() -> None:
    questions = {listed.question for listed in EXAMPLES}

    assert questions.isdisjoint(listed.question for listed in VALIDATION)


def test_the_command_counts_the_questions_of_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    main([str(VALIDATION_FILE), "--misses"])

    lines = capsys.readouterr().out.splitlines()
    num_taught = sum(listed.group(TAUGHT_TYPES) == "taught" for listed in VALIDATION)
    assert f"of {num_taught} understood" in lines[0]


@pytest.mark.slow
def test_objects_of_no_scene_are_said_to_be_absent() -> None:
    """The model itself answers, so this takes long."""
    model = load_vlm("nano-vlm")
    trust = Trust.load(BUNDLED_WEIGHTS / "nano-vlm")
    picture = load_or_render_picture("sim:7", model.processor.image_sizes["external"]).image
    settings = AskSettings(trust=trust, taught_types=TAUGHT_TYPES)
    absent = [listed for listed in EXAMPLES + VALIDATION if listed.is_absent]

    num_said = 0
    for listed in absent:
        answer, text = ask_question(model, picture, listed.question, settings=settings)
        num_said += answer is None and text.startswith("not in the picture")

    assert num_said / len(absent) >= MIN_RIGHT


@pytest.mark.slow
def test_questions_about_objects_in_the_picture_are_answered() -> None:
    """The model itself answers, so this takes long."""
    model = load_vlm("nano-vlm")
    trust = Trust.load(BUNDLED_WEIGHTS / "nano-vlm")
    picture = load_or_render_picture("sim:7", model.processor.image_sizes["external"]).image
    settings = AskSettings(trust=trust, taught_types=TAUGHT_TYPES)
    seen_names = ["plate", "robot gripper"]  # nano-vlm sees these in the picture

    num_asked = 0
    num_answered = 0
    for listed in VALIDATION:
        if listed.group(TAUGHT_TYPES) == "taught":
            question = listed.question
            for name, seen_name in zip(listed.names, seen_names, strict=False):
                question = question.replace(name, seen_name)
            answer, _ = ask_question(model, picture, question, settings=settings)
            num_asked += 1
            num_answered += answer is not None

    assert num_answered / num_asked >= 0.9
