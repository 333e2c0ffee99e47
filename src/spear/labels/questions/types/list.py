"""Questions for all objects from left to right. The answer is their names, with commas between."""

from itertools import pairwise

from spear.labels.questions.interface import (
    MIN_RELATIVE_GAP,
    Draft,
    QuestionScene,
    QuestionType,
    Random,
)
from spear.labels.questions.positions import compute_center_2d

PROMPTS = (
    "Which objects are in the image, from left to right?",
    "List the objects from left to right",
    "Name what you see, left to right",
    "What objects does the image show, from left to right?",
    "Describe the picture from left to right",
)


def _draft(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask for the names of all objects from left to right.

    Return None if an object is nearly above another one, so that their order is not clear.
    """
    names_with_x = [(compute_center_2d(o, scene.label).x, o.name) for o in scene.label.objects]
    names_with_x.sort(key=_get_x)
    if not names_with_x:
        return None
    # Neighbors may be twice as near to each other as two objects that a question compares.
    for (x, _), (next_x, _) in pairwise(names_with_x):
        if next_x - x < MIN_RELATIVE_GAP / 2:
            return None
    names = tuple(name for _, name in names_with_x)
    return Draft({}, [", ".join(names)], names)


def _get_x(x_and_name: tuple[float, str]) -> float:
    x, _ = x_and_name
    return x


QUESTION_TYPE = QuestionType(prompts=PROMPTS, draft=_draft, answer_texts=("{x}, {y}",))
