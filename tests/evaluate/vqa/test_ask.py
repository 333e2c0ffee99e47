"""One question about one image: what is understood, how sure the answer is, what is not in the picture."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from refusals import refuses
from spear.errors import Notice
from spear.evaluate.options import QuestionOptions
from spear.evaluate.vqa.ask import ask_question, load_labeled_images, load_picture, parse_question
from spear.evaluate.vqa.calibration import CALIBRATION_FILE, Certainty, Trust, compute_spread_factor
from spear.evaluate.vqa.run import evaluate_vqa
from spear.labels.questions.templates import PROMPT_TEMPLATES
from spear.models.weights.folders import BUNDLED_WEIGHTS, is_simulator_only
from spear.policy import VlmBundle, load_vlm
from spear.question_types import QUESTION_TYPES
from spear.util.fingerprints import fingerprint_checkpoint

NANO = BUNDLED_WEIGHTS / "nano"


@pytest.fixture(scope="module")
def nano() -> VlmBundle:
    return load_vlm("nano")


def test_every_wording_is_understood() -> None:
    for family in QUESTION_TYPES:
        for prompt in PROMPT_TEMPLATES[family]:
            question = prompt.format(x="the red cube", y="a mug", p="nearest")
            names = ["red cube", "mug"] if "{y}" in prompt else ["red cube"]
            for said in (question, question.lower() + " ", f"Up to scale: {question}"):
                assert parse_question(said) == (family, names)
    for name in ("zebra", "salt and pepper shaker"):
        assert parse_question(f"How far away is a {name}") == ("distance", [name])
    far = "How far away is the gripper"
    for question in (
        "What do you think of it?",
        f"{far} from the cup?",
        f"{far} relative to the cup",
    ):
        assert parse_question(question) is None


def test_an_answer_says_how_sure_it_is_or_that_there_is_no_such_thing(nano: VlmBundle) -> None:
    picture, trust = load_picture("sim:7", nano.processor.image_sizes["external"]), Trust.load(NANO)
    answer, said = ask_question(nano, picture.image, "How far away is the plate?", trust=trust)
    assert answer is not None and "80% interval" in said and answer.distribution is not None
    value, _, low, high = map(float, re.findall(r"[\d.]+", said))
    assert low < value < high and answer.values == pytest.approx(answer.distribution.read("median"))
    for name in ("zebra", "carrot"):
        answer, said = ask_question(
            nano, picture.image, f"How far away is the {name}?", trust=trust
        )
        assert answer is None and said.startswith(f"not in the picture: {name}")
    far = "How far away is the plate?"
    for question, family in (
        ("What is the weather?", None),
        ("Plate?", "distance"),
        (far, "keypoint"),
    ):
        assert "not known" in ask_question(nano, picture.image, question, family, trust=trust)[1]
    few = replace(trust, factors={})
    assert (
        "not measured"
        in ask_question(nano, picture.image, "How far away is the plate?", trust=few)[1]
    )
    assert (
        ask_question(nano, picture.image, "How far away is the zebra?")[0] is not None
    )  # never measured, never said


def test_a_wrist_camera_is_asked_as_one(nano: VlmBundle, run_command: Callable[..., str]) -> None:
    (label,) = load_labeled_images("sim:7", 1, "wrist", nano.processor)
    said = run_command(
        "ask", "sim:7", f"How far away is the {label.objects[0].name}?", "--view", "wrist"
    )
    assert (
        float(said.split()[0]) < 0.5 and "interval" not in said
    )  # from the other camera all is further


def test_the_shipped_calibration_holds_on_other_scenes(nano: VlmBundle) -> None:
    options = QuestionOptions(per_image=1, families=("distance", "keypoint", "box_vertices"))
    labels = load_labeled_images("sim:300", 24, "external", nano.processor)
    for name, vlm in (("nano", nano), ("nano-vlm", load_vlm("nano-vlm"))):
        trust = Trust.load(BUNDLED_WEIGHTS / name)
        assert trust is not None and trust.tells_absent
        found = evaluate_vqa(vlm, labels, options, trust).calibration
        for family in options.families:
            assert 0.6 < found[family].coverage["spear ask, 80%"].value < 0.95, (name, family)


def test_intervals_are_not_judged_by_the_images_that_they_were_measured_on(nano: VlmBundle) -> None:
    labels = load_labeled_images("sim:1199", 3, "external", nano.processor)
    with pytest.warns(Notice, match="calibrated on 1 of"):
        found = evaluate_vqa(
            nano, labels, QuestionOptions(families=("distance",)), Trust.load(NANO)
        ).calibration
    assert (
        "50%" in found["distance"].coverage and "spear ask, 80%" not in found["distance"].coverage
    )


def test_the_factor_is_the_smallest_that_holds_so_many() -> None:
    rng = np.random.default_rng(0)
    sure = [
        Certainty(np.zeros(3), np.full(3, 0.1), 0.2 * np.abs(rng.normal(size=3)))
        for _ in range(2000)
    ]
    assert compute_spread_factor(sure) == pytest.approx(
        2 * 1.2816, rel=0.05
    )  # of a normal, 80 % lie within 1.28 sigma


def test_trust_is_kept_beside_the_weights_and_changes_no_action(tmp_path: Path) -> None:
    assert (
        Trust.load(tmp_path) is None and not is_simulator_only(tmp_path) and is_simulator_only(NANO)
    )
    (tmp_path / "recipe.json").write_text('{"simulator_only": true}')
    (tmp_path / "config.json").write_text("{}")
    before, trust = (
        fingerprint_checkpoint(tmp_path),
        Trust("2 images of sim", {"distance": 1.5}, 0.9, 0.1),
    )
    trust.save(tmp_path)
    assert (
        Trust.load(tmp_path) == trust
        and fingerprint_checkpoint(tmp_path) == before
        and is_simulator_only(tmp_path)
    )
    (tmp_path / "config.json").write_text("[]")
    with pytest.warns(Notice, match="config.json"):
        assert Trust.load(tmp_path) is None
    (tmp_path / CALIBRATION_FILE).write_text("{}")
    refuses(CALIBRATION_FILE, Trust.load, tmp_path)
    for key, bad in (("names_present", "often"), ("factors", {"distance": -1}), ("files", 3)):
        (tmp_path / CALIBRATION_FILE).write_text(json.dumps(asdict(trust) | {key: bad}))
        refuses(f"{CALIBRATION_FILE}.*{key}", Trust.load, tmp_path)
    (tmp_path / "recipe.json").write_text("[]")
    refuses("recipe.json", is_simulator_only, tmp_path)
