"""A page about what a SPEAR-VLM knows in 3D: tables, calibration plots, best and worst answers
drawn.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from spear.evaluate.vqa.calibration import CURVE_LEVELS
from spear.evaluate.vqa.measures import MEASURES
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores
from spear.report.draw import PREDICTION_COLOR, TRUTH_COLOR, draw_answers
from spear.report.labels import format_answer_briefly
from spear.report.page import render, replace_underscores
from spear.report.plot import GREY, Axis, Line, draw_chart
from spear.util.images import decode_image, to_jpeg_data_uri

Figure = tuple[str, str]
"""An image as a data URI, and its caption."""

MIN_FIGURE_WIDTH_PX = 576
NUM_FIGURES_BY_TYPE = {"box_vertices": 6, "keypoint": 3, "back_projection": 3}
"""Question type → how many of its answers are drawn of each kind: worst, median, best."""
CAPTION_MEASURES = ("error", "pixels", "relative")
NUM_ANSWERS_IN_WORDS = 4  # of each question type
MAX_ANSWER_CHARS = 64
CALIBRATION_CHART_SIZE_PX = (460, 340)


class _Fact(NamedTuple):
    """A large number at the top of the page: a measure of a question type, and what it is."""

    question_type: str
    measure: str
    description: str


FACTS = (
    _Fact("box_vertices", "error", "median error of a box's center"),
    _Fact("box_vertices", "relative", "of the distance, median error of a box's center"),
    _Fact("box_vertices", "iou_25", "of the boxes overlap the truth by IoU 0.25 or more"),
    _Fact("distance", "relative", "median error of a distance"),
    _Fact("chain_of_thought", "closer", "of the time it names the closer of two"),
)


def make_vqa_page(scores: Scores, checkpoint: str, questions: str) -> str:
    """Make one self-contained page about an evaluation of `checkpoint` on `questions`."""
    drawn = []
    for question_type, num_figures in NUM_FIGURES_BY_TYPE.items():
        if question_type in scores.type_scores:
            drawn.append((question_type, _draw_extremes(scores, question_type, num_figures)))
    return render(
        "vqa.html",
        title=f"3D questions: {checkpoint}",
        facts=_list_facts(scores),
        scores=scores,
        checkpoint=checkpoint,
        questions=questions,
        drawn=drawn,
        charts=_draw_calibration(scores) if scores.calibration else [],
        in_words=_list_answers(scores),
    )


def draw_figure(answered: AnsweredQuestion) -> Figure:
    """Draw an answer (orange) and the truth (green) on the image.

    What lies behind the camera, or has no place in the image, is not drawn. The caption is the
    question, and how far off the answer is.
    """
    label = answered.label
    image = decode_image(label.image, label.source)
    scale = max(1, round(MIN_FIGURE_WIDTH_PX / label.width))
    answers = [(answered.question.segments, TRUTH_COLOR), (answered.answer, PREDICTION_COLOR)]
    drawing = to_jpeg_data_uri(draw_answers(image, label.intrinsics, answers, scale))

    errors = []
    for name in CAPTION_MEASURES:
        if name in answered.measures:
            errors.append(MEASURES[name].to_text(answered.measures[name]))
    if "iou" in answered.measures:
        errors.append(f"IoU {answered.measures['iou']:.2f}")
    verdict = f"off by {', '.join(errors)}" if errors else "broken"
    return drawing, f"{answered.question.prompt} — {verdict}"


def _list_facts(scores: Scores) -> list[tuple[str, str]]:
    facts = []
    for fact in FACTS:
        score = scores.type_scores.get(fact.question_type)
        if score is None or fact.measure not in score.measures:
            continue
        measure = MEASURES[fact.measure]
        description = fact.description
        if fact.measure in score.constant:
            constant_guess = measure.to_text(score.constant[fact.measure])
            description += f"; a constant guess: {constant_guess}"
        facts.append((measure.to_text(score.measures[fact.measure].value), description))
    return facts


def _rank_answers(scores: Scores, question_type: str) -> list[AnsweredQuestion]:
    """Return the answers of a question type that have an error, the best first."""
    answers = []
    for answer in scores.answers:
        if answer.question.question_type == question_type and "relative" in answer.measures:
            answers.append(answer)
    return sorted(answers, key=lambda answer: answer.measures["relative"])


def _draw_extremes(
    scores: Scores, question_type: str, num_figures: int
) -> list[tuple[str, list[Figure]]]:
    """Draw the worst answers, those around the median and the best, each about another object."""
    ranked = _rank_answers(scores, question_type)
    first_median = max(0, len(ranked) // 2 - num_figures // 2)
    candidates_by_title: dict[str, Sequence[AnsweredQuestion]] = {
        "Worst": ranked[::-1],
        "Around the median": ranked[first_median:],
        "Best": ranked,
    }
    figures_by_title = []
    drawn_objects = set()
    for title, candidates in candidates_by_title.items():
        figures: list[Figure] = []
        for answer in candidates:
            objects = (answer.image, answer.question.objects)
            if len(figures) < num_figures and objects not in drawn_objects:
                drawn_objects.add(objects)
                figures.append(draw_figure(answer))
        if figures:
            figures_by_title.append((title, figures))
    return figures_by_title


def _draw_calibration(scores: Scores) -> list[str]:
    """Draw how often the truth lies in the central intervals, and errors over predicted spreads."""
    return [_draw_coverage(scores), _draw_spreads(scores)]


def _draw_coverage(scores: Scores) -> str:
    levels = 100 * np.array(CURVE_LEVELS)
    lines = []
    for question_type, calibration in scores.calibration.items():
        coverage = 100 * np.array(calibration.curve)
        lines.append(Line(replace_underscores(question_type), levels, coverage))
    lines.append(Line("", (0, 100), (0, 100), GREY, dashed=True))

    axis = Axis("central interval", (0.0, 100.0), unit=" %")
    return draw_chart(
        lines, axis, replace(axis, title="truths in it"), size=CALIBRATION_CHART_SIZE_PX
    )


def _draw_spreads(scores: Scores) -> str:
    lines = []
    positive_values = []
    for question_type, calibration in scores.calibration.items():
        spreads = [band.spread for band in calibration.bands]
        errors = [band.error for band in calibration.bands]
        lines.append(Line(replace_underscores(question_type), spreads, errors, dots=True))
        for value in (*spreads, *errors):
            if value > 0 and np.isfinite(value):
                positive_values.append(value)
    ends = (0.1, 10.0)
    if positive_values:
        ends = (min(positive_values) / 1.2, max(positive_values) * 1.2)
    lines.append(Line("", ends, ends, GREY, dashed=True))

    axis = Axis("predicted spread, of the distance", ends, unit=" %", log=True)
    return draw_chart(
        lines, axis, replace(axis, title="error, of the distance"), size=CALIBRATION_CHART_SIZE_PX
    )


def _list_answers(scores: Scores) -> list[list[str]]:
    """List a few answers of every question type in words, spread from the best to the worst."""
    rows = []
    for question_type in scores.type_scores:
        ranked = _rank_answers(scores, question_type)
        if not ranked:
            continue
        num_shown = min(NUM_ANSWERS_IN_WORDS, len(ranked))
        for index in np.unique(np.linspace(0, len(ranked) - 1, num_shown).astype(int)):
            answered = ranked[index]
            question = answered.question
            truth = format_answer_briefly(question.segments, answered.label, MAX_ANSWER_CHARS)
            answer = format_answer_briefly(answered.answer, answered.label, MAX_ANSWER_CHARS)
            error = f"{answered.measures['relative']:.1f} %"
            rows.append([question.prompt, truth, answer, error])
    return rows
