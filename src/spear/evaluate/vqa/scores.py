"""Scores: answers to 3D questions, summarized per question type and per way of reading numbers.

A number of an answer can be read off the probabilities of its bins in several ways
(`models.readout.DECODE_METHODS`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from spear.evaluate.results import build_terminal_table
from spear.evaluate.stats import Estimate, bootstrap
from spear.evaluate.vqa.calibration import (
    Calibration,
    Certainty,
    ScoredAnswer,
    Trust,
    group_by_image,
    measure_calibration,
)
from spear.evaluate.vqa.measures import (
    MEASURES,
    choose_main_measure,
    format_measure,
    guess_medians,
    guess_medians_in_units_of_depth,
    is_grammatical,
    measure_answer,
)
from spear.models.readout import DECODE_METHODS, DecodeMethod
from spear.types import Array, LabeledImage, Question, Segments, Unit
from spear.util.files import write_text

MAIN_MEASURES = ("relative", "error", "pixels")  # the measures of the main table

TableRows = tuple[list[str], list[list[str]]]
"""Headers and cells of a table, as text."""


@dataclass(frozen=True)
class AnsweredQuestion:
    """A question about a labeled image, and the model's answer.

    image      index of the image among all images of the evaluation.
    label      the labeled image.
    question   the question with its true answer.
    answer     the answer that is scored.
    readings   way of reading numbers → the answer with numbers that are read so; empty if the model
               gave no distributions.
    certainty  how sure the model was of its numbers, and how far they were off; None if there is no
               distribution, if the answer has no numbers, or if its grammar is wrong.
    """

    image: int
    label: LabeledImage = field(repr=False)
    question: Question
    answer: Segments
    readings: Mapping[DecodeMethod, Segments] = field(default_factory=dict)
    certainty: Certainty | None = None

    @cached_property
    def measures(self) -> dict[str, float]:
        """The measures of the answer, see `evaluate.vqa.measures`."""
        return measure_answer(self.question, self.answer, self.label)


@dataclass(frozen=True)
class QuestionTypeScore:
    """The scores of one question type.

    n           how many questions were asked.
    images      how many images these questions are about.
    grammar     fraction of well-formed answers if decoding is constrained by the grammar.
    free        fraction of well-formed answers if it is not.
    measures    measure → its summary over the questions (see `MEASURES`), with a 95 % interval that
                resamples images.
    constant    measure → its summary for the baseline `guess_medians`.
    depth_only  measure → its summary for the baseline `guess_medians_in_units_of_depth`;
                empty if this baseline cannot answer the question type.
    """

    n: int
    images: int
    grammar: Estimate
    free: Estimate
    measures: Mapping[str, Estimate]
    constant: Mapping[str, float]
    depth_only: Mapping[str, float]


@dataclass(frozen=True)
class Readings:
    """Comparison of the ways of reading numbers off their probabilities, for one question type.

    The ways read the mode, the mean or the median of a number's distribution.

    error  way → its relative error, percent: the median over all numbers.
    gain   way "mean" or "median" → by which fraction its relative error, the mean over all numbers,
           is smaller than that of the way "mode"; negative if it is larger. The answers are the
           same.
    """

    error: Mapping[DecodeMethod, float]
    gain: Mapping[DecodeMethod, Estimate]

    @property
    def best(self) -> DecodeMethod:
        """The way with the smallest median error."""
        return min(self.error, key=lambda method: self.error[method])


@dataclass(frozen=True)
class Scores:
    """The scores of a whole evaluation.

    unit         unit of the labels and of the model's numbers.
    decode       the way of reading numbers that is scored.
    images       number of images.
    type_scores  question type → its score.
    readings     question type → comparison of the ways of reading its numbers. Types without
                 numbers, or without distributions, are absent.
    calibration  question type → calibration of its numbers, for the same types.
    answers      every question with its answer.
    """

    unit: Unit
    decode: DecodeMethod
    images: int
    type_scores: Mapping[str, QuestionTypeScore]
    readings: Mapping[str, Readings]
    calibration: Mapping[str, Calibration]
    answers: Sequence[AnsweredQuestion]

    def save_without_answers(self, path: Path, run_settings: Mapping[str, object]) -> None:
        """Write the scores as JSON, without the single answers.

        An interrupted write leaves no incomplete file.

        Args:
            path: The file.
            run_settings: Keys and values to write before the scores.
        """
        # `asdict` has no properties, so they are added.
        readings = {}
        for question_type, reading in self.readings.items():
            readings[question_type] = {**asdict(reading), "best": reading.best}
        calibrations = {}
        for question_type, calibration in self.calibration.items():
            calibrations[question_type] = {
                **asdict(calibration),
                "miss": calibration.expected_calibration_error,
            }
        content = {
            **run_settings,
            "unit": self.unit,
            "decode": self.decode,
            "images": self.images,
            "families": {
                question_type: asdict(score) for question_type, score in self.type_scores.items()
            },
            "readings": readings,
            "calibration": calibrations,
        }
        # An interval that is not known is NaN in Python and null in the file.
        plain = json.loads(json.dumps(content), parse_constant=lambda _: None)
        write_text(path, json.dumps(plain, indent=1))

    def tables(self) -> list[Table]:
        """Format the scores for a terminal."""
        title = f"SPEAR-VLM in 3D (questions: {len(self.answers)}, images: {self.images})"
        tables = [
            _to_terminal_table(title, self.rows()),
            _to_terminal_table("More about them", self.detail_rows()),
        ]
        if self.readings:
            tables.append(
                _to_terminal_table("Numbers read off their probabilities", self.reading_rows())
            )
            tables.append(_to_terminal_table("Calibration", self.calibration_rows()))
        return tables

    def rows(self) -> TableRows:
        """Return headers and cells of the main table."""
        headers = [
            "question",
            "n",
            "median error [95 %]",
            "of the distance",
            "constant guess",
            "depth only",
            "grammar",
            "free",
        ]
        rows = []
        for question_type, score in self.type_scores.items():
            measure = choose_main_measure(question_type, self.unit)
            rows.append(
                [
                    _to_words(question_type),
                    str(score.n),
                    _format_measure(measure, score.measures.get(measure)),
                    _format_measure("relative", score.measures.get("relative")),
                    _format_measure(measure, score.constant.get(measure)),
                    _format_measure(measure, score.depth_only.get(measure)),
                    f"{score.grammar.value:.1%}",
                    f"{score.free.value:.1%}",
                ]
            )
        return headers, rows

    def detail_rows(self) -> TableRows:
        """Return headers and cells of the measures that only some question types have."""
        headers = ["question", "what", "value [95 %]", "constant guess", "depth only"]
        rows = []
        for question_type, score in self.type_scores.items():
            for name, estimate in score.measures.items():
                if name in MAIN_MEASURES:
                    continue
                rows.append(
                    [
                        _to_words(question_type),
                        MEASURES[name].title,
                        _format_measure(name, estimate),
                        _format_measure(name, score.constant.get(name)),
                        _format_measure(name, score.depth_only.get(name)),
                    ]
                )
        return headers, rows

    def reading_rows(self) -> TableRows:
        """Return headers and cells of the comparison of the ways of reading numbers.

        The last two columns say which share of the mode's mean error the mean and the median
        save.
        """
        headers = ["question", *DECODE_METHODS, "best", "mean error saved by mean", "by median"]
        rows = []
        for question_type, reading in self.readings.items():
            errors = [f"{reading.error[method]:.2f} %" for method in DECODE_METHODS]
            # Two texts, of "mean" and of "median". Gains are fractions, and errors are in percent.
            gains = [gain.to_text("+.1f", scale=100, unit=" %") for gain in reading.gain.values()]
            rows.append([_to_words(question_type), *errors, reading.best, *gains])
        return headers, rows

    def calibration_rows(self) -> TableRows:
        """Return headers and cells of the calibration.

        They say how often the truth lies in each interval, and how well the spread predicts the
        error.
        """
        intervals: list[str] = []
        for calibration in self.calibration.values():
            intervals += [name for name in calibration.coverage if name not in intervals]
        headers = ["question", "numbers", *intervals, "off by", "surer half", "other half"]
        rows = []
        for question_type, calibration in self.calibration.items():
            coverage = []
            for name in intervals:
                estimate = calibration.coverage.get(name)
                coverage.append("–" if estimate is None else estimate.to_text(".0%"))
            rows.append(
                [
                    _to_words(question_type),
                    str(calibration.n),
                    *coverage,
                    # A difference of fractions, in points. The two errors are in percent already.
                    f"{100 * calibration.expected_calibration_error:.0f} points",
                    f"{calibration.surer:.1f} %",
                    f"{calibration.less_sure:.1f} %",
                ]
            )
        return headers, rows


def _to_terminal_table(title: str, table: TableRows) -> Table:
    headers, rows = table
    return build_terminal_table(title, headers, rows)


def _to_words(question_type: str) -> str:
    return question_type.replace("_", " ")


def _format_measure(name: str, value: Estimate | float | None) -> str:
    return "–" if value is None else format_measure(name, value)


def summarize(
    answers: Sequence[AnsweredQuestion],
    are_free_grammatical_by_type: Mapping[str, Sequence[bool]],
    labels: Sequence[LabeledImage],
    decode: DecodeMethod,
    trust: Trust | None = None,
) -> Scores:
    """Compute the scores per question type.

    Args:
        answers: Every question with its answer.
        are_free_grammatical_by_type: Question type → whether each answer was grammatical when the
            model wrote it freely, without being held to the grammar of the question type.
        labels: The labeled images.
        decode: How the scored numbers were read.
        trust: How far the model can be trusted. If given, its intervals are scored, too.
    """
    factors = trust.factors if trust else {}
    scores = {}
    readings = {}
    calibrations = {}
    for question_type, are_free_grammatical in are_free_grammatical_by_type.items():
        type_answers = [a for a in answers if a.question.question_type == question_type]
        scores[question_type] = _score_question_type(type_answers, are_free_grammatical)
        answers_with_certainty = []
        scored_answers = []
        for answered in type_answers:
            if answered.certainty is not None:
                answers_with_certainty.append(answered)
                relative_error = answered.measures["relative"]
                scored_answers.append(
                    ScoredAnswer(answered.image, answered.certainty, relative_error)
                )
        if scored_answers:
            readings[question_type] = _compare_readings(answers_with_certainty)
            calibrations[question_type] = measure_calibration(
                scored_answers, factors.get(question_type)
            )
    return Scores(labels[0].unit, decode, len(labels), scores, readings, calibrations, answers)


def _score_question_type(
    answers: Sequence[AnsweredQuestion], are_free_grammatical: Sequence[bool]
) -> QuestionTypeScore:
    """Compute the score of one question type.

    Args:
        answers: The questions of this type, with their constrained answers.
        are_free_grammatical: Whether the free answer to each question was grammatical.
    """
    questions = [answered.question for answered in answers]
    image_indices = [answered.image for answered in answers]
    are_grammatical = [is_grammatical(answered.question, answered.answer) for answered in answers]
    measures = {}
    for name, values in _collect_measure_values_counting_failures(answers).items():
        measures[name] = bootstrap(group_by_image(image_indices, values), MEASURES[name].average)
    labels = [answered.label for answered in answers]
    return QuestionTypeScore(
        n=len(answers),
        images=len(set(image_indices)),
        grammar=bootstrap(group_by_image(image_indices, are_grammatical), np.mean),
        free=bootstrap(group_by_image(image_indices, are_free_grammatical), np.mean),
        measures=measures,
        constant=_score_guesses(answers, guess_medians(questions)),
        depth_only=_score_guesses(answers, guess_medians_in_units_of_depth(questions, labels)),
    )


def _collect_measure_values_counting_failures(
    answers: Sequence[AnsweredQuestion],
) -> dict[str, Array]:
    """Collect the values of each measure that some of the answers have.

    Returns:
        Measure → one value per answer. An answer with the wrong grammar has the value of a failure,
        see `Measure.statistic`.
    """
    values_by_measure: dict[str, Array] = {}
    for name, measure in MEASURES.items():
        if not any(name in answered.measures for answered in answers):
            continue
        failure = np.inf if measure.statistic == "median" else 0.0
        dtype: Any = bool if measure.statistic == "rate" else float
        values = [answered.measures.get(name, failure) for answered in answers]
        values_by_measure[name] = np.array(values, dtype)
    return values_by_measure


def _score_guesses(
    answers: Sequence[AnsweredQuestion], guesses: Sequence[Segments] | None
) -> dict[str, float]:
    """Summarize the measures of a baseline's answers to the same questions.

    Args:
        answers: The questions of one type, with the model's answers.
        guesses: The baseline's answer to each question; None if it cannot answer them.

    Returns:
        Measure → its summary over the questions; empty without guesses.
    """
    if guesses is None:
        return {}
    measured = []
    for answered, guess in zip(answers, guesses, strict=True):
        measured.append(measure_answer(answered.question, guess, answered.label))
    scores = {}
    # Guesses never have the wrong grammar, so all of them have the same measures. Only "consistent"
    # is left out, because whether a guess agrees with itself says nothing.
    for name, measure in MEASURES.items():
        if name in measured[0] and name != "consistent":
            scores[name] = float(measure.average([measures[name] for measures in measured]))
    return scores


def _compare_readings(answers: Sequence[AnsweredQuestion]) -> Readings:
    """Compare the errors of the ways of reading numbers, all from the same answers."""
    errors: dict[DecodeMethod, Array] = {}  # way → relative error of each answer, percent
    for method in DECODE_METHODS:
        relative_errors = []
        for answered in answers:
            reading = answered.readings[method]
            measures = measure_answer(answered.question, reading, answered.label)
            relative_errors.append(measures["relative"])
        errors[method] = np.array(relative_errors)

    image_indices = [answered.image for answered in answers]
    gain: dict[DecodeMethod, Estimate] = {}
    for method in DECODE_METHODS[1:]:  # the first one is "mode", with which others are compared
        pairs = np.stack([errors["mode"], errors[method]], axis=1)  # [answers, 2]
        gain[method] = bootstrap(
            group_by_image(image_indices, pairs), _compute_saved_fraction_of_error
        )
    medians = {method: float(np.median(values)) for method, values in errors.items()}
    return Readings(medians, gain)


def _compute_saved_fraction_of_error(flat_pairs: Array) -> float:
    """Compute the fraction of the mode's error that another way of reading saves.

    Args:
        flat_pairs: [2 · answers] error of the mode and error of the other way, by turns.
    """
    mode_error = max(flat_pairs[::2].sum(), 1e-12)
    other_error = flat_pairs[1::2].sum()
    return float(1 - other_error / mode_error)
