"""How often `spear ask` understands the questions of a list."""

import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear.evaluate.vqa.classifier import QuestionTypeClassifier, load_examples
from spear.evaluate.vqa.skeleton import MODEL_NAMES
from spear.evaluate.vqa.wording import ParsedQuestion, understand_question
from spear.labels.questions.templates import KEYPOINT_NAMES

NUM_FOLDS = 5  # of the cross-validation

Understand = Callable[[str], ParsedQuestion | None]
"""A function that finds out what a question asks; None if the question was not taught."""


@dataclass(frozen=True)
class ListedQuestion:
    """A question of a list, and what it asks.

    Attributes:
        question: the question.
        question_type: its type; None for none that any model is taught.
        names: the names of its objects; for an offset from the first object to the second.
        point: the point of its object, for a keypoint: "centre", "closest" or "furthest".
        pixel: (x, y) of its pixel, px.
        is_absent: whether it asks about an object that is in no scene of the simulator.
    """

    question: str
    question_type: str | None = None
    names: tuple[str, ...] = ()
    point: str | None = None
    pixel: tuple[float, ...] | None = None
    is_absent: bool = False

    def group(self, taught_types: Collection[str]) -> str:
        """Return "untaught", "absent" or "taught", for a model that was taught some types."""
        if self.question_type not in taught_types:
            return "untaught"
        return "absent" if self.is_absent else "taught"


def load_list(file: Path) -> list[ListedQuestion]:
    """Load a list of questions from a TOML file (tests/evaluate/vqa/validation_questions.toml)."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    questions = [ListedQuestion(question) for question in tables["untaught"]]
    questions += [_read_row(row) for row in tables["paraphrases"]]
    questions += [_read_row(row, is_absent=True) for row in tables["absent"]]
    return questions


def _read_row(row: Mapping[str, Any], is_absent: bool = False) -> ListedQuestion:
    """Read a question from a row of the file."""
    pixel = tuple(map(float, row["pixel"])) if "pixel" in row else None
    names = tuple(name.casefold() for name in row["objects"])
    return ListedQuestion(row["ask"], row["type"], names, row.get("point"), pixel, is_absent)


def is_right(listed: ListedQuestion, taught_types: Collection[str], understand: Understand) -> bool:
    """Return whether a question is understood, or refused if it was not taught."""
    parsed = understand(listed.question)
    if listed.question_type not in taught_types:
        return parsed is None
    if parsed is None or parsed.question_type != listed.question_type:
        return False
    if listed.point and not any(
        f"the {word} point" in parsed.prompt for word in KEYPOINT_NAMES[listed.point]
    ):
        return False
    names = [name.casefold() for name in parsed.names]
    listed_names = [MODEL_NAMES.get(name, name) for name in listed.names]
    if listed.question_type == "chain_of_thought":  # the order of its objects does not matter
        return set(names) == set(listed_names)
    return names == listed_names and parsed.pixel == listed.pixel


def find_misses(
    questions: Sequence[ListedQuestion], taught_types: Collection[str]
) -> list[ListedQuestion]:
    """Find the questions of a list that are not understood, or not refused."""

    def understand(question: str) -> ParsedQuestion | None:
        return understand_question(question, taught_types)

    return [listed for listed in questions if not is_right(listed, taught_types, understand)]


def find_cross_validated_misses(
    questions: Sequence[ListedQuestion], taught_types: Collection[str]
) -> list[ListedQuestion]:
    """Find the misses when each fifth of the questions is judged by a classifier of the others."""
    misses: list[ListedQuestion] = []
    examples = load_examples()
    for fold in range(NUM_FOLDS):
        judged = questions[fold::NUM_FOLDS]
        hidden = {listed.question for listed in judged}
        classifier = QuestionTypeClassifier.fit(
            example for example in examples if example.question not in hidden
        )

        def understand(
            question: str, classifier: QuestionTypeClassifier = classifier
        ) -> ParsedQuestion | None:
            return understand_question(question, taught_types, classifier=classifier)

        misses += [listed for listed in judged if not is_right(listed, taught_types, understand)]
    return misses
