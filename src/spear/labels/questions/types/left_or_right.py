"""Questions for the side on which one object is, seen from another. The answer is "left" or
"right".
"""

from spear.labels.questions.interface import QuestionType, make_drafter_about_two_objects
from spear.labels.questions.positions import compute_center_2d, name_left_or_right
from spear.types import LabeledImage, LabeledObject, Segments

PROMPTS = (
    "Is {x} to the left or to the right of {y}?",
    "Seen from {y}, is {x} left or right in the image?",
    "On which side of {y} is {x}: left or right?",
    "Relative to {y}, is {x} on the left or on the right?",
    "In the image, is {x} left or right of {y}?",
)


def _make_true_answer(a: LabeledObject, b: LabeledObject, label: LabeledImage) -> Segments | None:
    """The side of object `b` on which object `a` is; None if one is nearly above the other."""
    return name_left_or_right(compute_center_2d(a, label).x - compute_center_2d(b, label).x)


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS, draft=make_drafter_about_two_objects("objects_2d", _make_true_answer)
)
