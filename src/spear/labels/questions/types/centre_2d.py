"""Questions for the middle of an object in the image. The answer is 1 pixel."""

from spear.labels.questions.interface import QuestionType, make_drafter_about_one_object
from spear.labels.questions.positions import compute_center_2d
from spear.types import LabeledImage, LabeledObject, Segments

PROMPTS = (
    "Point at {x}",
    "Where is the middle of {x} in the image?",
    "Give the pixel at the centre of {x}",
    "Click on {x}",
    "Which image location is the centre of {x}?",
)


def _make_true_answer(o: LabeledObject, label: LabeledImage) -> Segments:
    return [compute_center_2d(o, label)]


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS, draft=make_drafter_about_one_object("objects_2d", _make_true_answer)
)
