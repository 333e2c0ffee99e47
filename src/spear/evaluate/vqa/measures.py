"""How far an answer about 3D is from the truth, in each measure that its question type has;
baselines.

relative         distance between the answer and the truth, in percent of the object's distance from
                 the camera. For a box the distance is between the centers (means of the eight
                 vertices); for a keypoint between the points; for an offset between the offsets, in
                 percent of the mean distance of its two objects; for a distance it is the absolute
                 difference; for a chain of thought the mean of its two distances' differences; for
                 a back-projection the mean distance of the image points, in percent of the image (x
                 of its width, y of its height).
error            the same in millimeters, where the labels are metric.
vertex_relative, vertex  mean distance of a box's vertices, in the order in which the question wants
                 them.
iou              3D intersection over union of the true box and the box nearest to the answered
                 vertices.
iou_25, iou_50   whether that is at least 0.25, 0.5.
closer           whether the words of a chain of thought name the right object as the closer one.
consistent       whether these words follow from its own two distances, right or wrong.
pixels           mean distance of a back-projection's image points, in pixels of the labeled image.

Two baselines answer without seeing the image (our choice). `guess_constants` knows where objects
usually are. `guess_from_depth` knows where in the image objects usually are, how large they are,
and how far away this scene is, but not which object is where. Which of two objects is closer, the
baselines guess as the first named or the second, whichever is right more often.
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

    title      its name in tables.
    unit       of its values; a rate is written in percent.
    statistic  "median", "mean", or "rate" of what is either 0 or 1. An answer with the wrong
               grammar counts as an infinite error in a median, and else as 0.
    """

    title: str
    unit: str
    statistic: Literal["median", "mean", "rate"]

    @property
    def average(self) -> Callable[[Any], Any]:
        """The function that summarizes it."""
        return np.median if self.statistic == "median" else np.mean

    def to_text(self, value: float | Estimate) -> str:
        """A value with its unit; an estimate as "12.3 mm [10.1, 14.0]"."""
        if self.statistic == "rate":
            format_spec = ".0%"
        else:
            format_spec = ".1f" if self.unit else ".2f"
        unit = f" {self.unit}" if self.unit else ""
        if isinstance(value, Estimate):
            return value.to_text(format_spec, 1.0, unit)
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
"""Question type → its measures that an answer with the wrong grammar counts in."""


def extract_numbers(segments: Segments) -> Array:
    """The 3D numbers of an answer, [n]."""
    return np.array([segment for segment in segments if isinstance(segment, float)])


def extract_image_points(segments: Segments) -> Array:
    """The image points of an answer, [n, 2], as fractions (x, y)."""
    points = [(segment.x, segment.y) for segment in segments if isinstance(segment, Pixel)]
    return np.array(points).reshape(-1, 2)


def is_grammatical(question: Question, answer: Segments) -> bool:
    """Whether an answer has as many numbers and image points as the truth (24 numbers for a
    box).
    """
    num_numbers = len(extract_numbers(question.segments))
    num_points = len(extract_image_points(question.segments))
    has_numbers = len(extract_numbers(answer)) == num_numbers
    return has_numbers and len(extract_image_points(answer)) == num_points


def compute_error_scales(question: Question, label: LabeledImage) -> Array:
    """For each number of the true answer the distance from the camera that its error is relative
    to.
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
    return np.abs(truth)


def measure_answer(question: Question, answer: Segments, label: LabeledImage) -> dict[str, float]:
    """All measures of an answer to a question about `label`.

    For an answer with the wrong grammar these are the rates only, and they are 0.
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
    offset = extract_image_points(answer) - extract_image_points(question.segments)
    pixels = np.linalg.norm(offset * (label.width, label.height), axis=1)
    return {
        "relative": 100 * float(np.linalg.norm(offset, axis=1).mean()),
        "pixels": float(pixels.mean()),
    }


def _measure_distances(
    question: Question, answer: Segments, label: LabeledImage
) -> dict[str, float]:
    difference = np.abs(extract_numbers(answer) - extract_numbers(question.segments))
    scales = compute_error_scales(question, label)
    measures = {"relative": 100 * float((difference / scales).mean())}
    if label.unit == "metre":
        measures["error"] = MM_PER_M * float(difference.mean())
    return measures


def _measure_points(question: Question, answer: Segments, label: LabeledImage) -> dict[str, float]:
    """The measures of one point, or of a box's vertices."""
    difference = extract_numbers(answer) - extract_numbers(question.segments)
    offsets = difference.reshape(-1, 3)
    distance = float(compute_error_scales(question, label)[0])
    error = float(np.linalg.norm(offsets.mean(0)))
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
    answered_box = fit_nearest_box(extract_numbers(answer).reshape(8, 3))
    true_box = fit_nearest_box(extract_numbers(question.segments).reshape(8, 3))
    iou = compute_iou_3d(answered_box, true_box)
    return {"iou": iou, "iou_25": float(iou >= 0.25), "iou_50": float(iou >= 0.5)}


def _measure_conclusion(question: Question, answer: Segments) -> dict[str, float]:
    named = find_closer_named(answer, question.objects)
    measures = {}
    for measure, segments in (("closer", question.segments), ("consistent", answer)):
        first_distance, second_distance = extract_numbers(segments)
        closer = question.objects[0 if first_distance < second_distance else 1]
        measures[measure] = float(named == closer)
    return measures


def find_closer_named(answer: Segments, names: Sequence[str]) -> str | None:
    """Which of two objects a chain of thought calls the closer: the first named after its last
    number.
    """
    conclusion_start = 0
    for index, segment in enumerate(answer):
        if isinstance(segment, float):
            conclusion_start = index + 1
    conclusion = "".join(str(segment) for segment in answer[conclusion_start:])
    text = " ".join(conclusion.casefold().split())

    ranks = {}
    for name in names:
        match = re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text)
        if match:
            ranks[name] = (match.start(), -len(name))  # of two names in one place the longer one
    return min(ranks, key=lambda name: ranks[name]) if ranks else None


def guess_constants(questions: Sequence[Question]) -> list[Segments]:
    """The best single answer to all questions of a type: the median of each of their true
    numbers.
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
    """The best single answer in units of the depth of each question's image.

    An image's depth is the median z of its boxed objects' centers. None for image points, which
    have no depth.
    """
    if ANSWER_FORMS[questions[0].question_type].num_pixels > 0:
        return None
    depths = []
    for label in labels:
        boxes = [o.box3d for o in label.objects if o.box3d is not None]
        depths.append(float(np.median([box.center[2] for box in boxes])))
    return _guess_in_units(questions, depths)


def _guess_in_units(questions: Sequence[Question], units: Sequence[float]) -> list[Segments]:
    """The median answer, where each question's numbers are measured in a unit of its own."""
    pairs = list(zip(questions, units, strict=True))
    scaled_answers = [extract_numbers(question.segments) / unit for question, unit in pairs]
    median_answer = np.median(scaled_answers, axis=0)
    guesses = []
    for question, unit in pairs:
        guess = replace_numbers(question.segments, median_answer * unit)
        guesses.append(_conclude(question, guess, questions))
    return guesses


def _conclude(question: Question, guess: Segments, questions: Sequence[Question]) -> Segments:
    """A guessed chain of thought with the conclusion that is right more often; others unchanged."""
    if question.question_type != "chain_of_thought":
        return guess
    is_first_closer = []
    for example in questions:
        first_distance, second_distance = extract_numbers(example.segments)
        is_first_closer.append(first_distance - second_distance < 0)
    closer = question.objects[0 if np.mean(is_first_closer) >= 0.5 else 1]
    return [*guess[:-1], f" so the {closer} is closer"]
