"""The page on question types has every type once, with a wording of the type and its form."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from spear.labels.questions.types import PROMPT_TEMPLATES
from spear.question_types import (
    ANSWER_FORMS,
    QUESTION_TYPES,
    QUESTION_TYPES_2D,
    QUESTION_TYPES_PIXEL,
)

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "question-types.md"
ROW = re.compile(r"^\| `(\w+)` \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)
GAP_PATTERNS = {"{x}": r"((the|a) )?[\w ]+", "{y}": r"((the|a) )?[\w ]+", "{p}": r"[\w<> ]+"}
SECTIONS = {
    "About objects in 3D": QUESTION_TYPES,
    "About a pixel": QUESTION_TYPES_PIXEL,
    "About the image in 2D": QUESTION_TYPES_2D,
}


class Row(NamedTuple):
    """A row of the page's tables."""

    question: str
    answer: str
    answer_form: str


def read_rows(text: str) -> dict[str, Row]:
    """Read the rows of all tables in a text, by the name of the question type."""
    rows = {}
    for name, question, answer, answer_form in ROW.findall(text):
        rows[name] = Row(question.replace("\\", ""), answer, answer_form)
    return rows


ROWS = read_rows(PAGE.read_text())


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_has_its_types_in_the_order_of_the_code(section: str) -> None:
    _, _, text = PAGE.read_text().partition(f"## {section}\n")
    text, _, _ = text.partition("\n## ")

    assert tuple(read_rows(text)) == SECTIONS[section]


@pytest.mark.parametrize("name", ANSWER_FORMS)
def test_an_example_question_is_a_wording_of_its_type(name: str) -> None:
    patterns = []
    for template in PROMPT_TEMPLATES[name]:
        pattern = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
        for gap, gap_pattern in GAP_PATTERNS.items():
            pattern = pattern.replace(gap, gap_pattern)
        patterns.append(pattern)

    question = ROWS[name].question

    assert any(re.fullmatch(pattern, question) for pattern in patterns)


@pytest.mark.parametrize("name", ANSWER_FORMS)
def test_the_form_of_an_answer_is_that_of_its_type(name: str) -> None:
    answer_form = ANSWER_FORMS[name]

    numbers = re.match(r"(\d+) numbers?\b", ROWS[name].answer_form)
    pixels = re.match(r"(\d+) pixels?\b", ROWS[name].answer_form)

    assert int(numbers[1] if numbers else 0) == answer_form.num_numbers
    assert int(pixels[1] if pixels else 0) == answer_form.num_pixels
    assert (
        "words" in ROWS[name].answer_form or "sentence" in ROWS[name].answer_form
    ) == answer_form.has_words


@pytest.mark.parametrize("name", ANSWER_FORMS)
def test_an_example_answer_has_the_form_of_its_type(name: str) -> None:
    """An answer that the page shortens with "…" has at most as many numbers."""
    answer = ROWS[name].answer
    num_values = len(re.findall(r"-?\d+\.\d+|\(\d+, \d+\) px", answer))
    answer_form = ANSWER_FORMS[name]
    num_values_of_form = answer_form.num_numbers + answer_form.num_pixels

    if "…" in answer:
        assert 0 < num_values < num_values_of_form
    else:
        assert num_values == num_values_of_form
