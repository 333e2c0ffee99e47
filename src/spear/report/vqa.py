"""Makes the page about what a SPEAR-VLM knows in 3D.

The page has tables, plots of calibration, and drawings of the best, median and worst answers.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from spear.evaluate.vqa.calibration import CURVE_LEVELS
from spear.evaluate.vqa.measures import format_measure
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.report.draw import PREDICTION_COLOR, TRUTH_COLOR, draw_answers
from spear.report.labels import format_answer_briefly
from spear.report.page import Fact, render, replace_underscores
from spear.report.plot import GREY, LOG_SPACE_FACTOR, Axis, Line, draw_chart
from spear.util.images import decode_image, to_jpeg_data_uri

CaptionedImage = tuple[str, str]
"""An image as a data URI, and its caption."""

MIN_FIGURE_WIDTH_PX = 576  # about; images are enlarged by whole numbers
CAPTION_MEASURES = ("error", "pixels", "relative")
"""Measures (keys of `measures.MEASURES`) that a figure's caption names."""
NUM_ANSWERS_IN_WORDS = 4  # answers of each question type in the list of answers
MAX_ANSWER_CHARS = 64  # longer answers are cut off
CALIBRATION_CHART_SIZE_PX = (460, 340)


def make_vqa_page(scores: Scores, checkpoint: str, questions_in_words: str) -> str:
    """Make one self-contained page about an evaluation of `checkpoint` on `questions_in_words`."""
    figures_by_type = []
    for name, question_type in QUESTION_TYPE_BY_NAME.items():
        if question_type.num_figures > 0 and name in scores.type_scores:
            figures_by_type.append(
                (name, _draw_worst_median_and_best(scores, name, question_type.num_figures))
            )
    return render(
        "vqa.html",
        title=f"3D questions: {checkpoint}",
        facts=_list_facts(scores),
        scores=scores,
        checkpoint=checkpoint,
        questions=questions_in_words,
        figures_by_type=figures_by_type,
        charts=_draw_calibration(scores) if scores.calibration else [],
        in_words=_tabulate_some_answers(scores),
    )


def draw_answer_and_truth(answered: AnsweredQuestion) -> CaptionedImage:
    """Draw an answer (orange) and the truth (green) on the image.

    An answer that lies behind the camera or has no place in the image is not drawn. The caption
    contains the question, and the error of the answer.
    """
    label = answered.label
    image = decode_image(label.image, label.source)
    scale = max(1, round(MIN_FIGURE_WIDTH_PX / label.width))
    answers = [(answered.question.segments, TRUTH_COLOR), (answered.answer, PREDICTION_COLOR)]
    drawing = to_jpeg_data_uri(draw_answers(image, label.intrinsics, answers, scale))

    errors = []
    for name in CAPTION_MEASURES:
        if name in answered.measures:
            errors.append(format_measure(name, answered.measures[name]))
    if "iou" in answered.measures:
        errors.append(f"IoU {answered.measures['iou']:.2f}")
    verdict = f"off by {', '.join(errors)}" if errors else "broken"
    return drawing, f"{answered.question.prompt} — {verdict}"


def _list_facts(scores: Scores) -> list[Fact]:
    """Return the large numbers at the page's top, each with its meaning."""
    facts = []
    for name, question_type in QUESTION_TYPE_BY_NAME.items():
        score = scores.type_scores.get(name)
        if score is None:
            continue
        for measure, description in question_type.facts:
            if measure not in score.measures:
                continue
            if measure in score.constant:
                constant_guess = format_measure(measure, score.constant[measure])
                description += f"; a constant guess: {constant_guess}"
            facts.append((format_measure(measure, score.measures[measure].value), description))
    return facts


def _sort_answers_with_error_best_first(
    scores: Scores, question_type: str
) -> list[AnsweredQuestion]:
    """Return the answers of a question type that have an error, the best first."""
    answers = []
    for answer in scores.answers:
        if answer.question.question_type == question_type and "relative" in answer.measures:
            answers.append(answer)
    return sorted(answers, key=lambda answer: answer.measures["relative"])


def _draw_worst_median_and_best(
    scores: Scores, question_type: str, num_figures: int
) -> list[tuple[str, list[CaptionedImage]]]:
    """Draw the worst answers, answers around the median, and the best ones.

    Returns:
        (title, figures) for these three groups, of `num_figures` figures each. No object is shown
        twice, so groups may be smaller, and empty groups are left out.
    """
    ranked = _sort_answers_with_error_best_first(scores, question_type)
    first_median = max(0, len(ranked) // 2 - num_figures // 2)
    # Each group takes the first candidates whose object is not shown yet.
    candidates_by_title: dict[str, Sequence[AnsweredQuestion]] = {
        "Worst": ranked[::-1],
        "Around the median": ranked[first_median:],
        "Best": ranked,
    }
    titled_figures = []
    drawn_objects = set()
    for title, candidates in candidates_by_title.items():
        figures: list[CaptionedImage] = []
        for answer in candidates:
            objects = (answer.image, answer.question.objects)
            if len(figures) < num_figures and objects not in drawn_objects:
                drawn_objects.add(objects)
                figures.append(draw_answer_and_truth(answer))
        if figures:
            titled_figures.append((title, figures))
    return titled_figures


def _draw_calibration(scores: Scores) -> list[str]:
    """Draw two charts of whether the model knows how wrong it can be.

    One shows how often the predicted intervals contain the truth. In the other, x is the predicted
    spread of an answer, and y its error.
    """
    return [_draw_coverage(scores), _draw_errors_against_spreads(scores)]


def _draw_coverage(scores: Scores) -> str:
    """Draw how many true values (y) lie in the model's central intervals of each level (x).

    A calibrated model lies on the diagonal: 80 % of the true values are in its 80 % intervals.
    """
    levels = 100 * np.array(CURVE_LEVELS)  # percent
    lines = []
    for question_type, calibration in scores.calibration.items():
        coverage = 100 * np.array(calibration.curve)
        lines.append(Line(replace_underscores(question_type), levels, coverage))
    lines.append(Line("", (0, 100), (0, 100), GREY, dashed=True))

    x_axis = Axis("central interval", (0.0, 100.0), unit=" %")
    y_axis = replace(x_axis, title="truths in it")  # in the central interval
    return draw_chart(lines, x_axis, y_axis, size=CALIBRATION_CHART_SIZE_PX)


def _draw_errors_against_spreads(scores: Scores) -> str:
    """Draw the errors (y) of answers with similar spreads against these predicted spreads (x).

    For a calibrated model both are equal, so its points lie on the diagonal.
    """
    lines = []
    positive_values = []
    for question_type, calibration in scores.calibration.items():
        spreads = [band.spread for band in calibration.bands]
        errors = [band.error for band in calibration.bands]
        lines.append(Line(replace_underscores(question_type), spreads, errors, dots=True))
        for value in (*spreads, *errors):
            if value > 0 and np.isfinite(value):
                positive_values.append(value)
    ends = (0.1, 10.0)  # of a chart without points
    if positive_values:
        low = min(positive_values) / LOG_SPACE_FACTOR
        high = max(positive_values) * LOG_SPACE_FACTOR
        ends = (low, high)
    lines.append(Line("", ends, ends, GREY, dashed=True))

    x_axis = Axis("predicted spread, of the distance", ends, unit=" %", log=True)
    y_axis = replace(x_axis, title="error, of the distance")
    return draw_chart(lines, x_axis, y_axis, size=CALIBRATION_CHART_SIZE_PX)


def _tabulate_some_answers(scores: Scores) -> list[list[str]]:
    """List a few answers of every question type, spread from the best to the worst.

    Returns:
        Table rows of the question, the truth, the answer and its relative error, as texts.
    """
    rows = []
    for question_type in scores.type_scores:
        ranked = _sort_answers_with_error_best_first(scores, question_type)
        if not ranked:
            continue
        num_shown = min(NUM_ANSWERS_IN_WORDS, len(ranked))
        spread_indices = np.linspace(0, len(ranked) - 1, num_shown).astype(int)
        for index in np.unique(spread_indices):
            answered = ranked[index]
            question = answered.question
            truth = format_answer_briefly(question.segments, answered.label, MAX_ANSWER_CHARS)
            answer = format_answer_briefly(answered.answer, answered.label, MAX_ANSWER_CHARS)
            error = f"{answered.measures['relative']:.1f} %"
            rows.append([question.prompt, truth, answer, error])
    return rows
