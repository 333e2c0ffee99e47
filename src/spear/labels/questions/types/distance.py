"""Questions for the distance of an object.

The answer has 1 number: the Euclidean distance from the camera to the center of the object's box
(our choice of end points).
"""

from spear.labels.questions.interface import QuestionType, make_drafter_about_one_object
from spear.labels.questions.measures import (
    compute_error_scales_of_distances,
    measure_distance_errors,
)
from spear.labels.questions.positions import compute_distance_from_camera
from spear.types import LabeledImage, LabeledObject, Segments

PROMPTS = (
    "How far is {x} from the camera?",
    "Estimate the distance between the camera and {x}",
    "What is the distance to {x}?",
    "Provide the distance from the camera to {x}",
    "How far away is {x}?",
    "Give the camera to object distance of {x}",
)


def _make_true_answer(o: LabeledObject, label: LabeledImage) -> Segments:
    return [compute_distance_from_camera(o)]


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=make_drafter_about_one_object("objects_3d", _make_true_answer),
    measure=measure_distance_errors,
    compute_error_scales=compute_error_scales_of_distances,
    facts=(("relative", "median error of a distance"),),
)
