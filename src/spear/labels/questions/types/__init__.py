"""The question types, one file per type.

The file of a type has the type's name in `spear.question_types`, and defines `QUESTION_TYPE`.
"""

import importlib
from collections.abc import Mapping

from spear.labels.questions.interface import QuestionType
from spear.question_types import ANSWER_FORMS


def _load_question_type(name: str) -> QuestionType:
    return importlib.import_module(f"spear.labels.questions.types.{name}").QUESTION_TYPE


QUESTION_TYPE_BY_NAME: Mapping[str, QuestionType] = {
    name: _load_question_type(name) for name in ANSWER_FORMS
}
"""Name of each question type → the type."""
PROMPT_TEMPLATES: Mapping[str, tuple[str, ...]] = {
    name: question_type.prompts for name, question_type in QUESTION_TYPE_BY_NAME.items()
}
"""Name of each question type → its prompt templates, with the gaps {x} and {y} for objects, {p} for
a keypoint or pixel."""
