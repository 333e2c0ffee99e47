"""One question about one image: how it is parsed, how sure the answer is, and absent objects."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from refusals import refuses
from spear.cli import main
from spear.errors import Notice
from spear.evaluate.options import QuestionOptions
from spear.evaluate.vqa.ask import (
    AskSettings,
    ask_question,
    load_or_render_labeled_images,
    load_or_render_picture,
)
from spear.evaluate.vqa.calibration import CALIBRATION_FILE, Certainty, Trust, compute_spread_factor
from spear.evaluate.vqa.run import evaluate_vqa
from spear.evaluate.vqa.wording import ParsedQuestion, understand_question
from spear.labels.questions.types import PROMPT_TEMPLATES
from spear.models.weights.folders import (
    BUNDLED_WEIGHTS,
    is_simulator_only,
)
from spear.policy import VlmBundle, load_vlm
from spear.question_types import QUESTION_TYPES
from spear.types import Array
from spear.util.fingerprints import fingerprint_checkpoint

NANO = BUNDLED_WEIGHTS / "nano"
PLATE_QUESTION = "How far away is the plate?"


@pytest.fixture(scope="module")
def nano() -> VlmBundle:
    """The SPEAR-VLM of the bundled nano model."""
    return load_vlm("nano")


@pytest.fixture(scope="module")
def trust() -> Trust:
    """How far nano can be trusted, as measured when the model was made."""
    nano_trust = Trust.load(NANO)
    assert nano_trust is not None
    return nano_trust


@pytest.fixture(scope="module")
def image(nano: VlmBundle) -> Array:
    """The image of a held-out scene with a plate, and without a zebra or a carrot."""
    return load_or_render_picture("sim:7", nano.processor.image_sizes["external"]).image


# ---- Parsing.


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
def test_every_taught_wording_is_understood_as_it_is(question_type: str) -> None:
    """Also in lower case, and after words that only state the unit."""
    for prompt in PROMPT_TEMPLATES[question_type]:
        question = prompt.format(x="the red cube", y="a mug", p="nearest")
        names = ["red cube", "mug"] if "{y}" in prompt else ["red cube"]
        for variant in (question, question.lower() + " ", f"Up to scale: {question}"):
            parsed = understand_question(variant, [question_type])
            assert parsed == ParsedQuestion(
                question_type, names, prompt=variant, is_taught_wording=True
            )


@pytest.mark.parametrize("name", ["zebra", "salt and pepper shaker"])
def test_any_name_is_understood(name: str) -> None:
    parsed = understand_question(f"How far away is a {name}")

    assert parsed is not None
    assert (parsed.question_type, parsed.names) == ("distance", [name])


@pytest.mark.parametrize(
    ("question", "prompt"),
    [
        (
            "Give me the offset from the can to the ball.",
            "Estimate the x, y, z distance between the can and the ball",
        ),
        (
            "Where is the ball relative to the can, in x, y, z?",
            "Estimate the x, y, z distance between the can and the ball",
        ),
        (
            "Where in space is the farthest point of the jar?",
            "Provide the 3D coordinates of the furthest point of the jar",
        ),
        ("What's the camera's distance to the can?", "How far is the can from the camera?"),
    ],
)
def test_a_paraphrase_is_asked_in_a_taught_wording(question: str, prompt: str) -> None:
    parsed = understand_question(question)

    assert parsed is not None
    assert parsed.prompt == prompt


@pytest.mark.parametrize("question_type", ["distance", "keypoint"])
def test_a_type_that_was_not_taught_is_not_understood(question_type: str) -> None:
    question = PROMPT_TEMPLATES[question_type][0].format(x="the mug", p="nearest")

    assert understand_question(question, set(QUESTION_TYPES) - {question_type}) is None


@pytest.mark.parametrize(
    "question",
    [
        "what's the object at pixel (96, 72)?",
        "what am I looking at at x=96 y=72?",
        "which thing is at row 72, column 96",
    ],
)
def test_a_pixel_is_asked_about_as_a_fraction_of_the_image(question: str) -> None:
    parsed = understand_question(question, image_size=(192, 144))

    assert parsed is not None
    assert (parsed.question_type, parsed.names) == ("what_at", [])
    assert parsed.prompt == "What is at <loc0512><loc0512>?"


def test_a_pixel_outside_the_image_is_refused() -> None:
    question = "What is at (192, 20)?"
    refuses("outside the image", understand_question, question, image_size=(192, 144))


@pytest.mark.parametrize(
    ("question", "names"),
    [
        ("Which cube is closer, the red cube or the blue cube?", ["red cube", "blue cube"]),
        ("I want to grasp the mug, how far is it?", ["mug"]),
        ("How far is the mug on the table?", ["mug"]),
        ("How far is the trash can?", ["trash can"]),
        ("How far is the box from the camera?", ["box"]),
        ("waht is the distnce to the closet", ["closet"]),
        ("camera-to-sponge distance?", ["sponge"]),
        ("Spit out the 3D bbox of the cup of tea", ["cup of tea"]),
    ],
)
def test_names_are_told_from_other_words(question: str, names: list[str]) -> None:
    parsed = understand_question(question)

    assert parsed is not None
    assert parsed.names == names


@pytest.mark.parametrize(
    "question",
    [
        "How far can the robot reach?",
        "How far is it to Paris?",
        "Is the carrot closer to the bowl than to the plate?",
        "How many corners does the cube have?",
        "How far away is the color of the mug?",
    ],
)
def test_words_of_distances_and_boxes_alone_do_not_make_a_taught_question(question: str) -> None:
    assert understand_question(question) is None


# ---- Answers.


def test_an_answer_has_an_interval_around_its_median(
    nano: VlmBundle, image: Array, trust: Trust
) -> None:
    answer, text = ask_question(nano, image, PLATE_QUESTION, settings=AskSettings(trust=trust))

    assert "80% interval" in text
    # The numbers in the text are the answer, 80 (%), and the ends of the interval.
    value, _, low, high = [float(number) for number in re.findall(r"[\d.]+", text)]
    assert low < value < high
    assert answer is not None
    assert answer.distribution is not None
    assert answer.values == pytest.approx(answer.distribution.read_numbers("median"))


@pytest.mark.parametrize("name", ["zebra", "carrot"])
def test_an_object_that_is_not_there_has_no_answer(
    name: str, nano: VlmBundle, image: Array, trust: Trust
) -> None:
    answer, text = ask_question(
        nano, image, f"How far away is the {name}?", settings=AskSettings(trust=trust)
    )

    assert answer is None
    assert text.startswith(f"not in the picture: {name}")


def test_a_model_that_was_not_measured_answers_about_any_object(
    nano: VlmBundle, image: Array
) -> None:
    answer, _ = ask_question(nano, image, "How far away is the zebra?")

    assert answer is not None


@pytest.mark.parametrize(
    ("question", "question_type"),
    [
        ("What is the weather?", None),  # no 3D question
        ("Plate?", "distance"),  # a wording that was not taught
        (PLATE_QUESTION, "keypoint"),  # the wording of another type
    ],
)
def test_how_sure_an_answer_to_another_wording_is_is_not_known(
    question: str, question_type: str | None, nano: VlmBundle, image: Array, trust: Trust
) -> None:
    _, text = ask_question(
        nano, image, question, question_type, settings=AskSettings(trust=trust, is_free=True)
    )

    assert "not known" in text


@pytest.mark.parametrize("question", ["What color is the sky?", "Is the plate heavy?"])
def test_a_question_that_was_not_taught_is_answered_as_such(
    question: str, nano: VlmBundle, image: Array
) -> None:
    answer, text = ask_question(nano, image, question)

    assert answer is None
    assert text.startswith("the model was not taught to answer this question")


def test_a_paraphrase_is_answered_with_its_interval(
    nano: VlmBundle, image: Array, trust: Trust
) -> None:
    answer, text = ask_question(
        nano, image, "At what distance is the plate?", settings=AskSettings(trust=trust)
    )

    expected, _ = ask_question(
        nano, image, "How far is the plate from the camera?", settings=AskSettings(trust=trust)
    )
    assert answer == expected  # the model was asked the same
    assert "80% interval" in text
    assert 'asked as: "How far is the plate from the camera?"' in text


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("What color is the sky?", r"was not taught .*\. Add --free"),
        ("How distant is the elephant?", r"not in the picture: elephant"),
    ],
)
def test_the_command_exits_with_3_without_an_answer(
    question: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["ask", "sim:7", question])

    error_line = capsys.readouterr().err.splitlines()[-1]
    assert code == 3
    assert re.search(message, error_line)


def test_the_command_answers_anything_with_free(run_command: Callable[..., str]) -> None:
    assert run_command("ask", "sim:7", ["What color is the sky?"], "--free")


def test_a_question_type_that_was_not_measured_has_no_interval(
    nano: VlmBundle, image: Array, trust: Trust
) -> None:
    _, text = ask_question(
        nano, image, PLATE_QUESTION, settings=AskSettings(trust=replace(trust, factors={}))
    )

    assert "not measured" in text


def test_a_wrist_camera_is_asked_as_one(nano: VlmBundle, run_command: Callable[..., str]) -> None:
    (label,) = load_or_render_labeled_images(
        "sim:7", num_images=1, view="wrist", processor=nano.processor
    )
    question = f"How far away is the {label.objects[0].name}?"

    output = run_command("ask", "sim:7", question, "--view", "wrist")

    distance_m = float(output.split()[0])
    assert distance_m < 0.5  # every object is farther away from the external camera
    assert "interval" not in output


# ---- Trust.


@pytest.mark.slow  # asks a model about many scenes
@pytest.mark.parametrize("name", ["nano", pytest.param("nano-vlm", marks=pytest.mark.slow)])
def test_the_bundled_calibration_is_right_on_other_scenes(name: str) -> None:
    """About 80 % of the true numbers lie in the intervals of 80 %, also in scenes 300 to 323."""
    model = load_vlm(name)
    options = QuestionOptions(
        questions_per_image=1, question_types=("distance", "keypoint", "box_vertices")
    )
    labels = load_or_render_labeled_images(
        "sim:300", num_images=24, view="external", processor=model.processor
    )
    model_trust = Trust.load(BUNDLED_WEIGHTS / name)

    calibration = evaluate_vqa(model, labels, options, model_trust).calibration

    assert model_trust is not None
    assert model_trust.can_tell_absent
    for question_type in options.question_types:
        coverage = calibration[question_type].coverage["spear ask, 80%"].value
        assert 0.6 < coverage < 0.95  # 24 scenes tell it only roughly


def test_intervals_are_not_scored_on_the_images_that_they_were_measured_on(
    nano: VlmBundle, trust: Trust
) -> None:
    """Nano was calibrated on scene 1199, the first of these three."""
    labels = load_or_render_labeled_images(
        "sim:1199", num_images=3, view="external", processor=nano.processor
    )
    options = QuestionOptions(question_types=("distance",))

    with pytest.warns(Notice, match="calibrated on 1 image"):
        scores = evaluate_vqa(nano, labels, options, trust)

    coverage = scores.calibration["distance"].coverage
    assert "50%" in coverage
    assert "spear ask, 80%" not in coverage


def test_the_spread_factor_covers_80_percent_of_the_truths() -> None:
    rng = np.random.default_rng(0)
    spread = 0.1
    error_std = 0.2
    certainties = []
    for _ in range(2000):
        error = error_std * np.abs(rng.normal(size=3))
        certainty = Certainty(
            probability_below=np.zeros(3),
            relative_spread=np.full(3, spread),
            relative_error=error,
        )
        certainties.append(certainty)

    factor = compute_spread_factor(certainties)

    # 80 % of a normal distribution lie within 1.2816 standard deviations.
    assert factor == pytest.approx(1.2816 * error_std / spread, rel=0.05)


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """A folder with the small files of a model that was trained only in the simulator."""
    (tmp_path / "recipe.json").write_text('{"simulator_only": true}')
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


SAVED_TRUST = Trust(
    measured_on="2 images of sim", factors={"distance": 1.5}, names_present=0.9, names_absent=0.1
)


def test_a_model_that_was_not_measured_has_no_trust(model_folder: Path) -> None:
    assert Trust.load(model_folder) is None


def test_saved_trust_is_loaded_and_changes_no_fingerprint(model_folder: Path) -> None:
    fingerprint = fingerprint_checkpoint(model_folder)

    SAVED_TRUST.save(model_folder)

    assert Trust.load(model_folder) == SAVED_TRUST
    assert fingerprint_checkpoint(model_folder) == fingerprint


def test_the_trust_of_another_model_is_ignored_with_a_notice(model_folder: Path) -> None:
    SAVED_TRUST.save(model_folder)
    (model_folder / "config.json").write_text("[]")

    with pytest.warns(Notice, match=r"config\.json"):
        assert Trust.load(model_folder) is None


def test_a_trust_file_without_fields_is_refused(model_folder: Path) -> None:
    (model_folder / CALIBRATION_FILE).write_text("{}")

    refuses(CALIBRATION_FILE, Trust.load, model_folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [("names_present", "often"), ("factors", {"distance": -1}), ("files", 3)],
)
def test_a_trust_file_with_a_wrong_field_is_refused(
    field: str, value: object, model_folder: Path
) -> None:
    content = asdict(SAVED_TRUST) | {field: value}
    (model_folder / CALIBRATION_FILE).write_text(json.dumps(content))

    refuses(f"{CALIBRATION_FILE}.*{field}", Trust.load, model_folder)


def test_a_model_says_whether_it_has_seen_the_simulator_only(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert is_simulator_only(NANO)
    assert is_simulator_only(model_folder)
    assert not is_simulator_only(tmp_path_factory.mktemp("empty"))


def test_a_broken_recipe_file_is_refused(model_folder: Path) -> None:
    (model_folder / "recipe.json").write_text("[]")

    refuses(r"recipe\.json", is_simulator_only, model_folder)
