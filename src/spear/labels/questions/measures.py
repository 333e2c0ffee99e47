"""Measures of points, distances and image locations in answers, which several question types share.

The measures that these functions return are:

relative  error in percent of the distance from the camera. For image locations, it is in percent of
          the image (x in percent of the width, y in percent of the height).
error     the same error in millimeters, if labels are in meters.
pixels    mean distance of image locations, in pixels of the labeled image.
"""

import numpy as np

from spear.labels.questions.interface import MeasureValues
from spear.types import Array, LabeledImage, Pixel, Question, Segments

MM_PER_M = 1000


def extract_numbers(segments: Segments) -> Array:
    """Return the 3D numbers of an answer, [number of numbers]."""
    return np.array([segment for segment in segments if isinstance(segment, float)])


def extract_image_points(segments: Segments) -> Array:
    """Return the image points of an answer: [number of points, 2], x and y as fractions (0 … 1)."""
    points = [(segment.x, segment.y) for segment in segments if isinstance(segment, Pixel)]
    return np.array(points).reshape(-1, 2)


def compute_error_scales_of_distances(question: Question, label: LabeledImage) -> Array:
    """Return the true distances themselves, [number of numbers], as the scales of their errors."""
    return np.abs(extract_numbers(question.segments))


def measure_distance_errors(
    question: Question, answer: Segments, label: LabeledImage
) -> MeasureValues:
    """Measure the mean absolute error of one or more distances from the camera."""
    difference = np.abs(extract_numbers(answer) - extract_numbers(question.segments))
    scales = compute_error_scales_of_distances(question, label)
    measures = {"relative": 100 * float((difference / scales).mean())}
    if label.unit == "metre":
        measures["error"] = MM_PER_M * float(difference.mean())
    return measures


def measure_error_of_mean_point(
    question: Question, answer: Segments, label: LabeledImage, camera_distance: float
) -> MeasureValues:
    """Measure how far the mean of the answer's points is from the mean of the true points.

    Args:
        question: The question with its true answer.
        answer: The answer, which consists of the coordinates of one point or more.
        label: The label of the image.
        camera_distance: The distance from the camera to which the error is relative.
    """
    difference = extract_numbers(answer) - extract_numbers(question.segments)
    offsets = difference.reshape(-1, 3)  # [points, 3]
    error = float(np.linalg.norm(offsets.mean(0)))
    measures = {"relative": 100 * error / camera_distance}
    if label.unit == "metre":
        measures["error"] = MM_PER_M * error
    return measures


def measure_image_point_errors(
    question: Question, answer: Segments, label: LabeledImage
) -> MeasureValues:
    """Measure the mean distance of image locations from the true ones."""
    offset = extract_image_points(answer) - extract_image_points(question.segments)
    pixels = np.linalg.norm(offset * (label.width, label.height), axis=1)
    return {
        "relative": 100 * float(np.linalg.norm(offset, axis=1).mean()),
        "pixels": float(pixels.mean()),
    }
