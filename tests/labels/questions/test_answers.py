"""Every 3D answer follows from its label, and names mean the right objects.

`answer_checker` computes the answers once more, with code that is independent of the code under
test.
"""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from answer_checker import CHECKED_TYPES, find_answer_errors
from spear.labels.fit.box3d import make_box
from spear.labels.questions.generate import generate_questions
from spear.labels.questions.templates import UNIT_TEMPLATES, can_be_called
from spear.question_types import QUESTION_TYPES
from spear.types import LabeledImage, LabeledObject, Question, Unit

NAMES = (
    "bowl", "red cube", "cube", "Cube", "mug 2", "mug", "eggplant", "tin box", "ice cube tray",
    "plate", "bowl of rice", "cup", "mugs", "hand", "hand (left)",
)  # fmt: skip
"""Names of which some mean the same objects, such as "mug 2" and "cup"."""


def find_errors(label: LabeledImage, questions: list[Question]) -> list[str]:
    """What is wrong with questions about an image and with their answers."""
    errors = []
    for question in questions:
        errors += find_answer_errors(label, question)
    return errors


@pytest.mark.parametrize("unit", ["metre", "relative"])
def test_answers_about_scenes(labels: list[LabeledImage], unit: Unit) -> None:
    counts = Counter[str]()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for label in labels:
            label_in_unit = replace(label, unit=unit)
            questions = generate_questions(label_in_unit, rng)
            assert find_errors(label_in_unit, questions) == []
            counts.update(question.question_type for question in questions)

    # Each question type was asked, and so checked, several times.
    assert min(counts[question_type] for question_type in QUESTION_TYPES) > 5


def make_random_object(rng: np.random.Generator) -> LabeledObject:
    """An object with a random box, name and scores. Questions may not be about all such objects."""
    center = np.array([rng.normal(0, 0.25), rng.normal(0, 0.2), rng.uniform(0.3, 1.2)])
    size = rng.uniform(0.02, 0.2, 3)
    box = make_box(center, size, Rotation.from_quat(rng.normal(size=4)).as_matrix())
    scores = {
        "visible": rng.choice([0.65, 0.8, 1]),
        "edge": rng.choice([0, 0, 0, 0.1]),
        "points": rng.choice([20, 40, 300, 300]),
        "stability": rng.choice([0.5, 0.7, 0.9]),
    }
    has_box = rng.random() >= 0.1
    has_scores = rng.random() >= 0.5
    return LabeledObject(
        name=str(rng.choice(NAMES)),
        box2d=np.array([0, 0, 10, 10], np.float32),
        mask_runs=(),
        box3d=box if has_box else None,
        keypoints={
            "closest": box.center * 0.9,
            "furthest": box.center * 1.1,
            "centre": box.center,
        },
        scores=scores if has_scores else {},
    )


@given(st.integers(0, 2**32 - 1))
def test_answers_about_random_labels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    objects = [make_random_object(rng) for _ in range(rng.integers(0, 7))]
    intrinsics = np.array([[150.0, 0, 96], [0, 150, 64], [0, 0, 1]])
    unit = rng.choice(["metre", "relative"])
    label = LabeledImage(
        image=b"",
        width=192,
        height=128,
        intrinsics=intrinsics,
        objects=objects,
        unit=unit,
        source="made up",
    )

    for _ in range(4):
        questions = generate_questions(label, rng, questions_per_image=(4, 4))
        assert find_errors(label, questions) == []


# A name, names of objects that it may mean, and names of objects that it does not mean
@pytest.mark.parametrize(
    ("kind", "meant_names", "other_names"), [
        ("cube", "cube #1, Cube 2, red cube, cube (left), cubes, cube on a tray", "ice cube tray"),
        ("red cube", "big red cube, cube (red), red cubes", "cube, blue cube, red tray"),
        ("cup", "mug, white cup on table, cups of tea, red_mug", "cup holder, teacup"),
        ("bowl of rice", "rice bowl, big bowl of rice", "bowl, rice, bowl of soup"),
        ("hand (left)", "left hand, left hand of the cook", "hand, hand (right)"),
        ("knives", "knife, bread knife", "knave"), ("boxes", "box, tin box", "ox"),
        ("scissors", "pair of scissors, kitchen scissors 2", "hair"),
        ("person", "woman, old man with hat, people", "hat"),
        ("woman", "young woman", "man"), ("tub", "bath tubs", "tubes"), ("7", "7", "8"),
])  # fmt: skip
def test_a_name_means_objects_with_its_noun_and_all_its_words(
    kind: str, meant_names: str, other_names: str
) -> None:
    for name in [kind, *meant_names.split(", ")]:
        assert can_be_called(name, kind), name
    for name in other_names.split(", "):
        assert not can_be_called(name, kind), name


def test_metric_questions_do_not_mention_a_unit(labels: list[LabeledImage]) -> None:
    for seed in range(99):
        for label in labels[:4]:
            for question in generate_questions(label, np.random.default_rng(seed)):
                assert not re.search("relative|scale|metre|unit", question.prompt)


def test_questions_in_relative_units_say_so_in_one_of_the_templates(
    labels: list[LabeledImage],
) -> None:
    """All types but "back_projection" have numbers, so their questions state the unit."""
    rng = np.random.default_rng(0)
    patterns = {}
    for template in UNIT_TEMPLATES["relative"]:
        patterns[template] = re.escape(template).replace(r"\{\}", ".*")  # {} is any prompt

    used_templates = Counter[str]()
    for label in labels * 8:
        for question in generate_questions(replace(label, unit="relative"), rng):
            matching_templates = []
            for template, pattern in patterns.items():
                if re.fullmatch(pattern, question.prompt):
                    matching_templates.append(template)
            has_numbers = CHECKED_TYPES[question.question_type].has_numbers
            num_expected = 1 if has_numbers else 0
            assert len(matching_templates) == num_expected
            assert question.unit == "relative"
            used_templates.update(matching_templates)

    assert len(used_templates) == len(UNIT_TEMPLATES["relative"])
