"""Questions for the side of the image on which an object is. The answer is "left" or "right"."""

from spear.labels.questions.interface import QuestionType, make_drafter_about_one_object
from spear.labels.questions.positions import compute_center_2d, name_left_or_right
from spear.types import LabeledImage, LabeledObject, Segments

PROMPTS = (
    "Is {x} on the left or on the right side of the image?",
    "On which side of the image is {x}?",
    "Which half of the picture shows {x}: left or right?",
    "Is {x} left or right of the middle of the image?",
    "Left or right side: where is {x}?",
)


def _make_true_answer(o: LabeledObject, label: LabeledImage) -> Segments | None:
    """The side of the image's middle on which an object is; None if it is near the middle."""
    return name_left_or_right(compute_center_2d(o, label).x - 0.5)


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=make_drafter_about_one_object("objects_2d", _make_true_answer),
    answer_texts=("left", "right"),
)
