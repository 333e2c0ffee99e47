"""Measures of how far answers to 3D questions are from the truth, and two baselines.

Each question type has some of these measures:

relative         error in percent of the object's distance from the camera. What the error is,
                 depends on the question type:
                 - box: distance between the centers (means of the eight vertices);
                 - keypoint: distance between the points;
                 - offset: distance between the offsets, in percent of the mean distance of the two
                   objects from the camera;
                 - distance: absolute difference;
                 - chain of thought: mean absolute difference of its two distances;
                 - back-projection: mean distance of the image points, in percent of the image (x in
                   percent of the width, y in percent of the height).
error            the same error in millimeters, if labels are in meters.
vertex_relative  mean distance of a box's vertices, each from the true vertex with the same number,
                 in percent of the box's distance from the camera.
vertex           the same distance in millimeters, if labels are in meters.
iou              3D intersection over union of the true box and the box nearest to the answered
                 vertices.
iou_25           whether the intersection over union is at least 0.25.
iou_50           whether the intersection over union is at least 0.5.
closer           whether the words of a chain of thought name the right object as the closer one.
consistent       whether these words follow from the two distances in the same answer, even if
                 these are wrong.
pixels           mean distance of a back-projection's image points, in pixels of the labeled image.

Two baselines answer without seeing the image (our choice). `guess_constants` knows where objects
usually are. `guess_from_depth` knows where in the image objects usually are, how large they are,
and how far away this scene is, but not which object is where. To say which of two objects is
closer, the baselines always name the first object of the question or always the second, whichever
is right more often.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from spear.errors import SpearError
from spear.evaluate.stats import Estimate
from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box
from spear.labels.questions.answers import compute_distance
from spear.models.readout import replace_numbers
from spear.question_types import ANSWER_FORMS
from spear.types import Array, LabeledImage, Pixel, Question, Segments

MM_PER_M = 1000


@dataclass(frozen=True)
class Measure:
    """How a measure is summarized over questions, and written.

    title      name of the measure in tables.
    unit       unit of its values; "" without a unit. A rate is written in percent.
    statistic  how values are summarized: "median", "mean", or "rate" for values that are 0 or 1. An
               answer with the wrong grammar counts as an infinite error in a median, and as 0 in a
               mean or rate.
    """

    title: str
    unit: str
    statistic: Literal["median", "mean", "rate"]

    @property
    def average(self) -> Callable[[Any], Any]:
        """The function that summarizes the values of several questions."""
        return np.median if self.statistic == "median" else np.mean

    def to_text(self, value: float | Estimate) -> str:
        """Format a value with its unit, an estimate for example as "12.3 mm [10.1, 14.0]"."""
        if self.statistic == "rate":
            format_spec = ".0%"
        elif self.unit:
            format_spec = ".1f"
        else:
            format_spec = ".2f"
        unit = f" {self.unit}" if self.unit else ""
        if isinstance(value, Estimate):
            return value.to_text(format_spec, unit=unit)
        return format(value, format_spec) + unit


MEASURES: Mapping[str, Measure] = {
    "relative": Measure("error, of the distance", "%", "median"),
    "error": Measure("error", "mm", "median"),
    "pixels": Measure("image points off by", "px", "median"),
    "vertex_relative": Measure("vertices off by, of the distance", "%", "median"),
    "vertex": Measure("vertices off by", "mm", "median"),
    "iou": Measure("3D overlap (mean IoU)", "", "mean"),
    "iou_25": Measure("IoU at least 0.25", "", "rate"),
    "iou_50": Measure("IoU at least 0.5", "", "rate"),
    "closer": Measure("names the closer of two", "", "rate"),
    "consistent": Measure("says what its own distances say", "", "rate"),
}
RATES = {"box_vertices": ("iou_25", "iou_50"), "chain_of_thought": ("closer", "consistent")}
"""Question type → its rates, in which an answer with the wrong grammar counts as 0."""


def extract_numbers(segments: Segments) -> Array:
    """Return the 3D numbers of an answer, [number of numbers]."""
    return np.array([segment for segment in segments if isinstance(segment, float)])


def extract_image_points(segments: Segments) -> Array:
    """Return the image points of an answer: [number of points, 2], x and y as fractions (0 … 1)."""
    points = [(segment.x, segment.y) for segment in segments if isinstance(segment, Pixel)]
    return np.array(points).reshape(-1, 2)


def is_grammatical(question: Question, answer: Segments) -> bool:
    """Return whether an answer has as many numbers and image points as the true answer.

    A box, for example, has 24 numbers.
    """
    num_numbers = len(extract_numbers(question.segments))
    num_points = len(extract_image_points(question.segments))
    has_all_numbers = len(extract_numbers(answer)) == num_numbers
    has_all_points = len(extract_image_points(answer)) == num_points
    return has_all_numbers and has_all_points


def compute_error_scales(question: Question, label: LabeledImage) -> Array:
    """Return the distance from the camera to which the error of each number is relative.

    Args:
        question: The question with its true answer.
        label: The labeled image that the question is about.

    Returns:
        [number of numbers in the answer], in the unit of the label.
    """
    truth = extract_numbers(question.segments)
    if question.question_type == "box_vertices":
        center = truth.reshape(8, 3).mean(0)
        return np.full(24, np.linalg.norm(center))
    if question.question_type == "keypoint":
        return np.full(3, np.linalg.norm(truth))
    if question.question_type == "offset":
        distances = {o.name: compute_distance(o) for o in label.objects if o.box3d is not None}
        return np.full(3, np.mean([distances[name] for name in question.objects]))
    return np.abs(truth)  # the numbers are distances from the camera themselves


def measure_answer(question: Question, answer: Segments, label: LabeledImage) -> dict[str, float]:
    """Compute all measures of an answer.

    Args:
        question: The question with its true answer.
        answer: The answer to be measured.
        label: The labeled image that the question is about.

    Returns:
        Measure → value. For an answer with the wrong grammar, these are only the rates (`RATES`),
        with value 0.
    """
    if not is_grammatical(question, answer):
        return dict.fromkeys(RATES.get(question.question_type, ()), 0.0)
    if question.question_type == "back_projection":
        return _measure_image_points(question, answer, label)
    if question.question_type == "distance":
        return _measure_distances(question, answer, label)
    if question.question_type == "chain_of_thought":
        measures = _measure_distances(question, answer, label)
        return measures | _measure_conclusion(question, answer)
    if question.question_type == "box_vertices":
        measures = _measure_points(question, answer, label)
        return measures | _measure_overlap(question, answer)
    if question.question_type in ("keypoint", "offset"):
        return _measure_points(question, answer, label)
    raise SpearError(
        f"question type {question.question_type} has no measures. Ask a type of 3D question."
    )


def _measure_image_points(
    question: Question, answer: Segments, label: LabeledImage
) -> dict[str, float]:
    """Compute the measures of a back-projection."""
    offset = extract_image_points(answer) - extract_image_points(question.segments)
    pixels = np.linalg.norm(offset * (label.width, label.height), axis=1)
    return {
        "relative": 100 * float(np.linalg.norm(offset, axis=1).mean()),
        "pixels": float(pixels.mean()),
    }


def _measure_distances(
    question: Question, answer: Segments, label: LabeledImage
) -> dict[str, float]:
    """Compute the errors of one or two distances."""
    difference = np.abs(extract_numbers(answer) - extract_numbers(question.segments))
    scales = compute_error_scales(question, label)
    measures = {"relative": 100 * float((difference / scales).mean())}
    if label.unit == "metre":
        measures["error"] = MM_PER_M * float(difference.mean())
    return measures


def _measure_points(question: Question, answer: Segments, label: LabeledImage) -> dict[str, float]:
    """Compute the errors of one point, or of a box's center and vertices."""
    difference = extract_numbers(answer) - extract_numbers(question.segments)
    offsets = difference.reshape(-1, 3)  # [1 or 8 points, 3]
    distance = float(compute_error_scales(question, label)[0])  # the same for all numbers
    error = float(np.linalg.norm(offsets.mean(0)))  # of a box: of its center
    measures = {"relative": 100 * error / distance}
    if label.unit == "metre":
        measures["error"] = MM_PER_M * error
    if question.question_type == "box_vertices":
        vertex_error = float(np.linalg.norm(offsets, axis=1).mean())
        measures["vertex_relative"] = 100 * vertex_error / distance
        if label.unit == "metre":
            measures["vertex"] = MM_PER_M * vertex_error
    return measures


def _measure_overlap(question: Question, answer: Segments) -> dict[str, float]:
    """Compute the overlap of the answered box with the true box."""
    answered_box = fit_nearest_box(extract_numbers(answer).reshape(8, 3))
    true_box = fit_nearest_box(extract_numbers(question.segments).reshape(8, 3))
    iou = compute_iou_3d(answered_box, true_box)
    return {"iou": iou, "iou_25": float(iou >= 0.25), "iou_50": float(iou >= 0.5)}


def _measure_conclusion(question: Question, answer: Segments) -> dict[str, float]:
    """Compute the measures of the words in which a chain of thought names the closer object."""
    named_object = find_closer_named(answer, question.objects)
    measures = {}
    # "closer" compares with the true distances, "consistent" with the answered ones.
    for measure, segments in (("closer", question.segments), ("consistent", answer)):
        first_distance, second_distance = extract_numbers(segments)
        closer_index = 0 if first_distance < second_distance else 1
        measures[measure] = float(named_object == question.objects[closer_index])
    return measures


def find_closer_named(answer: Segments, names: Sequence[str]) -> str | None:
    """Find which of two objects a chain of thought calls the closer one.

    This is the object that it names first after its last number.

    Args:
        answer: The chain of thought.
        names: The names of the two objects.

    Returns:
        One of the names; None if neither is there.
    """
    conclusion_start = 0  # index of the first segment after the last number
    for index, segment in enumerate(answer):
        if isinstance(segment, float):
            conclusion_start = index + 1
    conclusion = "".join(str(segment) for segment in answer[conclusion_start:])
    text = " ".join(conclusion.casefold().split())

    ranks = {}
    for name in names:
        # The name as whole words.
        match = re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text)
        if match:
            # Earlier names come first. If two begin at the same place, as "cup" and "cup holder",
            # the longer one is meant.
            ranks[name] = (match.start(), -len(name))
    if not ranks:
        return None
    return min(ranks, key=lambda name: ranks[name])


def guess_constants(questions: Sequence[Question]) -> list[Segments]:
    """Answer all questions of a type in the same way: with the median of their true numbers.

    Args:
        questions: Questions of one type.

    Returns:
        One guess per question.
    """
    if ANSWER_FORMS[questions[0].question_type].num_pixels > 0:
        all_points = [extract_image_points(question.segments) for question in questions]
        median_points = np.median(all_points, axis=0)
        guess = [Pixel(float(x), float(y)) for x, y in median_points]
        return [guess] * len(questions)
    return _guess_in_units(questions, [1.0] * len(questions))


def guess_from_depth(
    questions: Sequence[Question], labels: Sequence[LabeledImage]
) -> list[Segments] | None:
    """Answer all questions of a type in the same way, in units of each image's depth.

    An image's depth is the median z of the centers of its objects' boxes.

    Args:
        questions: Questions of one type.
        labels: The image of each question.

    Returns:
        One guess per question; None if answers are image points, which do not scale with the
        depth.
    """
    if ANSWER_FORMS[questions[0].question_type].num_pixels > 0:
        return None
    depths = []
    for label in labels:
        boxes = [o.box3d for o in label.objects if o.box3d is not None]
        depths.append(float(np.median([box.center[2] for box in boxes])))
    return _guess_in_units(questions, depths)


def _guess_in_units(questions: Sequence[Question], units: Sequence[float]) -> list[Segments]:
    """Answer all questions with the median of their true numbers, each in its own unit.

    Args:
        questions: Questions of one type.
        units: The unit of each question's numbers, as a factor.
    """
    pairs = list(zip(questions, units, strict=True))
    # [questions, numbers]
    scaled_answers = [extract_numbers(question.segments) / unit for question, unit in pairs]
    median_answer = np.median(scaled_answers, axis=0)
    guesses = []
    for question, unit in pairs:
        guess = replace_numbers(question.segments, median_answer * unit)
        guesses.append(_conclude(question, guess, questions))
    return guesses


def _conclude(question: Question, guess: Segments, questions: Sequence[Question]) -> Segments:
    """Give a guessed chain of thought the conclusion that is right more often.

    Args:
        question: The question.
        guess: The guess. If it is no chain of thought, it stays as it is.
        questions: All questions of the type, from which it is known what is right more often.
    """
    if question.question_type != "chain_of_thought":
        return guess
    is_first_closer = []
    for example in questions:
        first_distance, second_distance = extract_numbers(example.segments)
        is_first_closer.append(first_distance < second_distance)
    closer_index = 0 if np.mean(is_first_closer) >= 0.5 else 1
    closer = question.objects[closer_index]
    # The last segment of a chain of thought is its conclusion.
    return [*guess[:-1], f" so the {closer} is closer"]
