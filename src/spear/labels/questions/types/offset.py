"""Questions for the displacement from one object to another.

The answer has 3 numbers: the center of the second object minus the center of the first one, signed
(the sign is our choice).
"""

import numpy as np

from spear.labels.questions.interface import (
    MeasureValues,
    QuestionType,
    make_drafter_about_two_objects,
)
from spear.labels.questions.measures import measure_error_of_mean_point
from spear.labels.questions.positions import compute_distance_from_camera, get_box3d
from spear.types import Array, LabeledImage, LabeledObject, Question, Segments

PROMPTS = (
    "Estimate the x, y, z distance between {x} and {y}",  # as the published model was asked
    "What is the x, y, z distance from {x} to {y}?",
    "How far is {y} from {x} along x, y and z?",
    "Give the 3D offset from {x} to {y}",
    "Starting at {x}, how far must one move in x, y, z to reach {y}?",
    "Provide the displacement from {x} to {y} in x, y, z",
)


def _make_true_answer(a: LabeledObject, b: LabeledObject, label: LabeledImage) -> Segments:
    return (get_box3d(b).center - get_box3d(a).center).tolist()


def _compute_error_scales(question: Question, label: LabeledImage) -> Array:
    """Return the mean distance of both objects from the camera, [3]: the same for all numbers."""
    distances = {
        o.name: compute_distance_from_camera(o) for o in label.objects if o.box3d is not None
    }
    return np.full(3, np.mean([distances[name] for name in question.objects]))


def _measure(question: Question, answer: Segments, label: LabeledImage) -> MeasureValues:
    """Measure the distance between the ends of the answered and the true displacement."""
    distance = float(_compute_error_scales(question, label)[0])  # the same for all numbers
    return measure_error_of_mean_point(question, answer, label, distance)


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=make_drafter_about_two_objects("objects_3d", _make_true_answer),
    is_displacement=True,
    measure=_measure,
    compute_error_scales=_compute_error_scales,
)
