"""Questions for the image locations of an object's 3D box.

The answer has 8 pixels: where the vertices of the box appear in the image.
"""

from spear.labels.questions.interface import Measure, QuestionType, make_drafter_about_one_object
from spear.labels.questions.measures import measure_image_point_errors
from spear.labels.questions.positions import get_box3d, project_to_pixels
from spear.types import LabeledImage, LabeledObject, Segments

PROMPTS = (
    "Project the 3D bounding box of {x} into the image",
    "Where do the eight vertices of the 3D box of {x} appear in the image?",
    "Give the image locations of the 3D box corners of {x}",
    "Provide the 2D projection of the 3D bounding box of {x}",
    "Mark the corners of the 3D box around {x} in the image",
    "At which pixels are the 3D box vertices of {x}?",
)


def _make_true_answer(o: LabeledObject, label: LabeledImage) -> Segments | None:
    """The image locations of the box's vertices; None unless all eight are inside the image."""
    locations = project_to_pixels(get_box3d(o).vertices, label)
    visible_locations = [location for location in locations if location is not None]
    return [*visible_locations] if len(visible_locations) == 8 else None


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=make_drafter_about_one_object("objects_3d", _make_true_answer),
    measure=measure_image_point_errors,
    measures={"pixels": Measure("image points off by", "px", "median")},
    num_figures=3,
)
