"""Every 3D answer follows from its label: checked by `answer_checker`, code of its own."""

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from answer_checker import find_answer_errors
from spear.labels.fit.box3d import make_box
from spear.labels.questions.generate import generate_questions
from spear.labels.questions.templates import UNIT_TEMPLATES, is_a
from spear.question_types import QUESTION_TYPES
from spear.types import LabeledImage, LabeledObject, Question

NAMES = (
    "bowl", "red cube", "cube", "Cube", "mug 2", "mug", "eggplant", "tin box", "ice cube tray", "plate",
    "bowl of rice", "cup", "mugs", "hand", "hand (left)",
)  # fmt: skip


def wrong(label: LabeledImage, questions: list[Question]) -> list[str]:
    return [c for q in questions for c in find_answer_errors(label, q)]


def test_answers_about_scenes(labels: list[LabeledImage]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(6):
        rng = np.random.default_rng(seed)
        for unit in ("metre", "relative"):
            for image in labels:
                label = replace(image, unit=unit)
                questions = generate_questions(label, rng)
                assert wrong(label, questions) == []
                seen.update(q.family for q in questions)
    assert min(seen[family] for family in QUESTION_TYPES) > 10


@given(st.integers(0, 2**32 - 1))
def test_answers_about_made_up_labels(seed: int) -> None:
    """Of up to six objects with made-up boxes, names and scores, some of them unfit for questions."""
    rng, objects = np.random.default_rng(seed), []
    for _ in range(rng.integers(0, 7)):
        center = np.array([rng.normal(0, 0.25), rng.normal(0, 0.2), rng.uniform(0.3, 1.2)])
        box = make_box(
            center, rng.uniform(0.02, 0.2, 3), Rotation.from_quat(rng.normal(size=4)).as_matrix()
        )
        scores = {"visible": rng.choice([0.65, 0.8, 1]), "edge": rng.choice([0, 0, 0, 0.1])}
        scores |= {
            "points": rng.choice([20, 40, 300, 300]),
            "stability": rng.choice([0.5, 0.7, 0.9]),
        }
        points = {"closest": box.center * 0.9, "furthest": box.center * 1.1, "centre": box.center}
        name, box2d = str(rng.choice(NAMES)), np.array([0, 0, 10, 10], np.float32)
        found, known = None if rng.random() < 0.1 else box, {} if rng.random() < 0.5 else scores
        objects.append(LabeledObject(name, box2d, (), found, points, known))
    k = np.array([[150.0, 0, 96], [0, 150, 64], [0, 0, 1]])
    label = LabeledImage(b"", 192, 128, k, objects, rng.choice(["metre", "relative"]), "made up")
    for _ in range(4):
        assert wrong(label, generate_questions(label, rng, (4, 4))) == []


@pytest.mark.parametrize(
    ("kind", "also", "not_also"), [
        ("cube", "cube #1, Cube 2, red cube, cube (left), cubes, small cube on the tray", "ice cube tray"),
        ("red cube", "big red cube, cube (red), red cubes", "cube, blue cube, red tray"),
        ("cup", "mug, white cup on table, cups of tea, red_mug", "cup holder, teacup"),
        ("bowl of rice", "rice bowl, big bowl of rice", "bowl, rice, bowl of soup"),
        ("hand (left)", "left hand, left hand of the cook", "hand, hand (right)"),
        ("knives", "knife, bread knife", "knave"), ("boxes", "box, tin box", "ox"),
        ("scissors", "pair of scissors, kitchen scissors 2", "hair"),
        ("person", "woman, old man with hat, people", "hat"),
        ("woman", "young woman", "man"), ("tub", "bath tubs", "tubes"), ("7", "7", "8"),
])  # fmt: skip
def test_names_that_could_mean_another_are_ambiguous(kind: str, also: str, not_also: str) -> None:
    assert [name for name in f"{kind}, {also}".split(", ") if not is_a(name, kind)] == []
    assert [name for name in not_also.split(", ") if is_a(name, kind)] == []


def test_the_wording_says_relative_units_and_only_them(labels: list[LabeledImage]) -> None:
    rng, wordings = np.random.default_rng(0), Counter()
    for image in labels * 8:
        metric = generate_questions(image, np.random.default_rng(int(rng.integers(99))))
        assert not any(re.search("relative|scale|metre|unit", q.prompt) for q in metric)
        for q in generate_questions(replace(image, unit="relative"), rng):
            patterns = {w: re.escape(w).replace(r"\{\}", ".*") for w in UNIT_TEMPLATES["relative"]}
            found = [w for w, pattern in patterns.items() if re.fullmatch(pattern, q.prompt)]
            wordings.update(found)
            assert len(found) == (q.family != "back_projection") and q.unit == "relative"
    assert len(wordings) == len(UNIT_TEMPLATES["relative"])
