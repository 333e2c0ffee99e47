"""Questions for a point of an object.

The answer has 3 numbers: the closest or furthest visible point of the object, or the center of its
box.
"""

import numpy as np

from spear.labels.questions.interface import (
    Draft,
    MeasureValues,
    QuestionScene,
    QuestionType,
    Random,
    sample_one,
    sample_words_for_object,
)
from spear.labels.questions.measures import extract_numbers, measure_error_of_mean_point
from spear.labels.questions.templates import KEYPOINT_NAMES
from spear.types import Array, LabeledImage, Question, Segments

PROMPTS = (
    "Provide the 3D coordinates of the {p} point of {x}",
    "Where is the {p} point of {x} in 3D?",
    "Estimate the 3D position of the {p} point of {x}",
    "Give the x, y, z of the {p} point of {x}",
    "What are the 3D coordinates of the {p} point on {x}?",
    "Locate the {p} point of {x} in 3D",
)


def _draft(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask where a keypoint, drawn at random, of an object is."""
    if not scene.objects_3d:
        return None
    o = sample_one(scene.objects_3d, rng)
    keypoint = sample_one(tuple(KEYPOINT_NAMES), rng)
    words = {"x": sample_words_for_object(o, rng), "p": sample_one(KEYPOINT_NAMES[keypoint], rng)}
    return Draft(words, o.keypoints[keypoint].tolist(), (o.name,))


def _compute_error_scales(question: Question, label: LabeledImage) -> Array:
    """Return the distance of the keypoint from the camera, [3]: the same for all numbers."""
    return np.full(3, np.linalg.norm(extract_numbers(question.segments)))


def _measure(question: Question, answer: Segments, label: LabeledImage) -> MeasureValues:
    """Measure the distance between the answered and the true point."""
    distance = float(_compute_error_scales(question, label)[0])  # the same for all numbers
    return measure_error_of_mean_point(question, answer, label, distance)


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=_draft,
    measure=_measure,
    compute_error_scales=_compute_error_scales,
    num_figures=3,
)
