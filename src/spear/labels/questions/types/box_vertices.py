"""Questions for the 3D box of an object.

The answer has 24 numbers: x, y and z of each of the box's eight vertices, in the order of
`box3d.order_vertices`.
"""

import numpy as np

from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box
from spear.labels.questions.interface import (
    Measure,
    MeasureValues,
    QuestionType,
    make_drafter_about_one_object,
)
from spear.labels.questions.measures import MM_PER_M, extract_numbers, measure_error_of_mean_point
from spear.labels.questions.positions import get_box3d
from spear.types import Array, LabeledImage, LabeledObject, Question, Segments

PROMPTS = (
    "Provide the 3D bounding box coordinates of {x}",  # as the published model was asked
    "Give the eight corners of the 3D box around {x}",
    "What is the 3D bounding box of {x}?",
    "Estimate the 3D bounding box of {x}",
    "Locate {x} in 3D with an oriented bounding box",
    "List the 3D vertices of the box that encloses {x}",
    "Where are the corners of the 3D box of {x}?",
)

MEASURES = {
    "vertex_relative": Measure("vertices off by, of the distance", "%", "median"),
    "vertex": Measure("vertices off by", "mm", "median"),
    "iou": Measure("3D overlap (mean IoU)", "", "mean"),
    "iou_25": Measure("IoU at least 0.25", "", "rate"),
    "iou_50": Measure("IoU at least 0.5", "", "rate"),
}


def _make_true_answer(o: LabeledObject, label: LabeledImage) -> Segments:
    return get_box3d(o).vertices.ravel().tolist()


def _compute_error_scales(question: Question, label: LabeledImage) -> Array:
    """Return the distance of the box's center from the camera, [24]: the same for all numbers."""
    center = extract_numbers(question.segments).reshape(8, 3).mean(0)
    return np.full(24, np.linalg.norm(center))


def _measure(question: Question, answer: Segments, label: LabeledImage) -> MeasureValues:
    """Measure the errors of a box's center (the mean of the vertices), vertices and extent.

    vertex_relative  mean distance of the vertices, each from the true vertex with the same number,
                     in percent of the box's distance from the camera.
    vertex           the same distance in millimeters, if labels are in meters.
    iou              3D intersection over union of the true box and the box nearest to the answered
                     vertices.
    iou_25, iou_50   whether the intersection over union is at least 0.25, or 0.5.
    """
    distance = float(_compute_error_scales(question, label)[0])  # the same for all numbers
    measures = measure_error_of_mean_point(question, answer, label, distance)

    answered_vertices = extract_numbers(answer).reshape(8, 3)
    true_vertices = extract_numbers(question.segments).reshape(8, 3)
    vertex_error = float(np.linalg.norm(answered_vertices - true_vertices, axis=1).mean())
    measures["vertex_relative"] = 100 * vertex_error / distance
    if label.unit == "metre":
        measures["vertex"] = MM_PER_M * vertex_error

    iou = compute_iou_3d(fit_nearest_box(answered_vertices), fit_nearest_box(true_vertices))
    return measures | {"iou": iou, "iou_25": float(iou >= 0.25), "iou_50": float(iou >= 0.5)}


QUESTION_TYPE = QuestionType(
    prompts=PROMPTS,
    draft=make_drafter_about_one_object("objects_3d", _make_true_answer),
    measure=_measure,
    compute_error_scales=_compute_error_scales,
    measures=MEASURES,
    facts=(
        ("error", "median error of a box's center"),
        ("relative", "of the distance, median error of a box's center"),
        ("iou_25", "of the boxes overlap the truth by IoU 0.25 or more"),
    ),
    num_figures=6,
)
