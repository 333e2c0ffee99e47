"""What a SPEAR-VLM knows in 3D, as a page: tables, calibration plots, its best and worst answers drawn."""

from dataclasses import replace

import numpy as np

from spear.evaluate.vqa.calibration import CURVE_LEVELS
from spear.evaluate.vqa.measures import MEASURES
from spear.evaluate.vqa.scores import AnsweredQuestion, Scores
from spear.report.draw import PREDICTION, TRUTH, draw_answers
from spear.report.labels import say
from spear.report.page import render, spaced
from spear.report.plot import GREY, Axis, Line, chart
from spear.util.images import decode_image, to_jpeg_data_uri

WIDTH = 576
"""Pixels across of a drawing, at least."""
SHOWN = 6
"""Drawings of each kind."""


def vqa_page(scores: Scores, checkpoint: str, questions: str) -> str:
    """One self-contained document about an evaluation of `checkpoint` on `questions`."""
    drawn = [("box_vertices", SHOWN), ("keypoint", 3), ("back_projection", 3)]
    return render(
        "vqa.html",
        title=f"3D questions: {checkpoint}",
        facts=_facts(scores),
        scores=scores,
        checkpoint=checkpoint,
        questions=questions,
        drawn=[
            (family, _extremes(scores, family, n))
            for family, n in drawn
            if family in scores.families
        ],
        charts=_calibration(scores) if scores.calibration else [],
        in_words=_in_words(scores),
    )


def figure(asked: AnsweredQuestion) -> tuple[str, str]:
    """The answer (orange) and the truth (green) on the image, as a data URI; and the caption: the question,
    and how far off the answer is. What lies behind the camera, or has no place in the image, is left out."""
    label, measures = asked.label, asked.measures
    answers = [(asked.question.segments, TRUTH), (asked.answer, PREDICTION)]
    image, scale = decode_image(label.image, label.source), max(1, round(WIDTH / label.width))
    drawn = to_jpeg_data_uri(draw_answers(image, label.intrinsics, answers, scale))
    words = [
        MEASURES[n].to_text(measures[n]) for n in ("error", "pixels", "relative") if n in measures
    ]
    if "iou" in measures:
        words.append(f"IoU {measures['iou']:.2f}")
    off = f"off by {', '.join(words)}" if words else "broken"
    return drawn, f"{asked.question.prompt} — {off}"


def _facts(scores: Scores) -> list[tuple[str, str]]:
    facts = []
    for family, name, what in (
        ("box_vertices", "error", "median error of a box's centre"),
        ("box_vertices", "relative", "of the distance, median error of a box's centre"),
        ("box_vertices", "iou_25", "of the boxes overlap the truth by IoU 0.25 or more"),
        ("distance", "relative", "median error of a distance"),
        ("chain_of_thought", "closer", "of the time it names the closer of two"),
    ):
        if (s := scores.families.get(family)) and name in s.measures:
            m = MEASURES[name]
            guess = (
                f"; a constant guess: {m.to_text(s.constant[name])}" if name in s.constant else ""
            )
            facts.append((m.to_text(s.measures[name].value), what + guess))
    return facts


def _ranked(scores: Scores, family: str) -> list[AnsweredQuestion]:
    """The answers of a family that have an error, the best first."""
    rows = [a for a in scores.answers if a.question.family == family and "relative" in a.measures]
    return sorted(rows, key=lambda a: a.measures["relative"])


def _extremes(scores: Scores, family: str, shown: int) -> list[tuple[str, list[tuple[str, str]]]]:
    """The worst, those around the median and the best, by relative error, each about another object."""
    ranked = _ranked(scores, family)
    middle = max(0, len(ranked) // 2 - shown // 2)
    kinds, seen = [], set()
    for title, some in (
        ("Worst", ranked[::-1]),
        ("Around the median", ranked[middle:]),
        ("Best", ranked),
    ):
        chosen: list[tuple[str, str]] = []
        for a in some:
            if len(chosen) < shown and (a.image, a.question.objects) not in seen:
                seen.add((a.image, a.question.objects))
                chosen.append(figure(a))
        if chosen:
            kinds.append((title, chosen))
    return kinds


def _calibration(scores: Scores) -> list[str]:
    """How often the truth lies in the central intervals, and errors over predicted spreads."""
    found, levels = scores.calibration.items(), 100 * np.array(CURVE_LEVELS)
    covered = [Line(spaced(family), levels, 100 * np.array(c.curve)) for family, c in found]
    bands = [
        Line(spaced(family), [b.spread for b in c.bands], [b.error for b in c.bands], dots=True)
        for family, c in found
    ]
    values = [v for line in bands for v in (*line.x, *line.y) if v > 0 and np.isfinite(v)]
    ends = (min(values) / 1.2, max(values) * 1.2) if values else (0.1, 10.0)
    share = Axis("central interval", (0.0, 100.0), unit=" %")
    spread = Axis("predicted spread, of the distance", ends, unit=" %", log=True)
    covered.append(Line("", (0, 100), (0, 100), GREY, dashed=True))
    bands.append(Line("", ends, ends, GREY, dashed=True))
    plots = ((covered, share, "truths in it"), (bands, spread, "error, of the distance"))
    return [chart(y, x, replace(x, title=t), size=(460, 340)) for y, x, t in plots]


def _in_words(scores: Scores) -> list[list[str]]:
    """A few answers of every family as they would be read out: evenly spread from the best to the worst."""
    rows = []
    for family in scores.families:
        some = _ranked(scores, family)
        for i in (
            np.unique(np.linspace(0, len(some) - 1, min(4, len(some))).astype(int)) if some else ()
        ):
            a = some[i]
            truth, answer = (say(said, a.label, 64) for said in (a.question.segments, a.answer))
            rows.append([a.question.prompt, truth, answer, f"{a.measures['relative']:.1f} %"])
    return rows
