"""Questions for the 2D box of an object. The answer has 2 pixels, the box's opposite corners."""

from spear.labels.questions.interface import QuestionType, make_drafter_about_one_object
from spear.labels.questions.positions import to_clipped_pixel
from spear.types import LabeledImage, LabeledObject, Segments

PROMPTS = (
    "Where is {x} in the image?",
    "Detect {x}",
    "Give the 2D bounding box of {x}",
    "Locate {x} in the image",
    "Draw a 2D box around {x}",
)


def _make_true_answer(o: LabeledObject, label: LabeledImage) -> Segments:
    """The top left and the bottom right corner of an object's 2D box."""
    corners = o.box2d.reshape(2, 2).tolist()
    return [to_clipped_pixel(x, y, label) for x, y in corners]


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS, draft=make_drafter_about_one_object("objects_2d", _make_true_answer)
)
