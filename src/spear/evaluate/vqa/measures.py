"""Measures of how far answers to 3D questions are from the truth, and two baselines.

Each question type has some measures. The function that computes them is in the type's file
(`spear.labels.questions.types`), with the measures that only this type has. The others are:

relative  error in percent of the object's distance from the camera (of image locations: in percent
          of the image).
error     the same error in millimeters, if labels are in meters.

Two baselines answer without seeing the image (our choice). `guess_medians` knows where objects
usually are. `guess_medians_in_units_of_depth` knows where in the image objects usually are, how
large they are, and how far away this scene is, but not which object is where. If an answer has
words, the question type chooses those of the baselines (`QuestionType.conclude`).
"""

from collections.abc import Mapping, Sequence

import numpy as np

from spear.errors import SpearError
from spear.evaluate.stats import Estimate
from spear.labels.questions.interface import Measure
from spear.labels.questions.measures import extract_image_points, extract_numbers
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.models.readout import replace_numbers
from spear.question_types import ANSWER_FORMS
from spear.types import Array, LabeledImage, Pixel, Question, Segments, Unit


def _collect_measures() -> dict[str, Measure]:
    measures = {
        "relative": Measure("error, of the distance", "%", "median"),
        "error": Measure("error", "mm", "median"),
    }
    for question_type in QUESTION_TYPE_BY_NAME.values():
        measures.update(question_type.measures)
    return measures


MEASURES: Mapping[str, Measure] = _collect_measures()
"""Name of each measure → how it is summarized and written."""


def choose_main_measure(question_type: str, unit: Unit) -> str:
    """Return the measure of a question type that has the most useful unit: px, mm, or %.

    Args:
        question_type: The question type.
        unit: The unit of the labels.
    """
    if ANSWER_FORMS[question_type].num_pixels > 0:
        return "pixels"
    return "error" if unit == "metre" else "relative"


def format_measure(name: str, value: float | Estimate) -> str:
    """Format a measure's value with its unit, an estimate for example as "12.3 mm [10.1, 14.0]".

    Args:
        name: The name of the measure.
        value: The value of one answer, or a summary over answers.
    """
    measure = MEASURES[name]
    if measure.statistic == "rate":
        format_spec = ".0%"
    elif measure.unit:
        format_spec = ".1f"
    else:
        format_spec = ".2f"
    unit = f" {measure.unit}" if measure.unit else ""
    if isinstance(value, Estimate):
        return value.to_text(format_spec, unit=unit)
    return format(value, format_spec) + unit


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

    Raises:
        SpearError: Answers of this question type have no numbers, or are not scored.
    """
    compute_scales = QUESTION_TYPE_BY_NAME[question.question_type].compute_error_scales
    if compute_scales is None:
        raise SpearError(
            f"errors of question type {question.question_type} are relative to no distance. "
            "Ask a type of 3D question whose answer has numbers."
        )
    return compute_scales(question, label)


def measure_answer(question: Question, answer: Segments, label: LabeledImage) -> dict[str, float]:
    """Compute all measures of an answer.

    Args:
        question: The question with its true answer.
        answer: The answer to be measured.
        label: The labeled image that the question is about.

    Returns:
        Measure → value. For an answer with the wrong grammar, these are only the rates that the
        question type has (`Measure.statistic`), with value 0.

    Raises:
        SpearError: Answers of this question type are not scored.
    """
    question_type = QUESTION_TYPE_BY_NAME[question.question_type]
    if question_type.measure is None:
        raise SpearError(
            f"question type {question.question_type} has no measures. Ask a type of 3D question."
        )
    if not is_grammatical(question, answer):
        rates = {}
        for name, measure in question_type.measures.items():
            if measure.statistic == "rate":
                rates[name] = 0.0
        return rates
    return question_type.measure(question, answer, label)


def guess_medians(questions: Sequence[Question]) -> list[Segments]:
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


def guess_medians_in_units_of_depth(
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
        center_depths = []
        for labeled_object in label.objects:
            if labeled_object.box3d is not None:
                center_depths.append(labeled_object.box3d.center[2])
        depths.append(float(np.median(center_depths)))
    return _guess_in_units(questions, depths)


def _guess_in_units(questions: Sequence[Question], units: Sequence[float]) -> list[Segments]:
    """Answer all questions with the median of their true numbers, measured in own units.

    Args:
        questions: Questions of one type.
        units: For each question, the length that is the unit for its numbers.
    """
    pairs = list(zip(questions, units, strict=True))
    # [questions, numbers]
    scaled_answers = [extract_numbers(question.segments) / unit for question, unit in pairs]
    median_answer = np.median(scaled_answers, axis=0)
    conclude = QUESTION_TYPE_BY_NAME[questions[0].question_type].conclude
    guesses: list[Segments] = []
    for question, unit in pairs:
        guess: Segments = replace_numbers(question.segments, median_answer * unit)
        if conclude is not None:
            guess = conclude(question, guess, questions)
        guesses.append(guess)
    return guesses
