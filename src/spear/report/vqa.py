"""What a SPEAR-VLM knows in 3D, as a page: tables, calibration plots, its best, usual and worst answers
drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from html import escape
from math import isfinite

import numpy as np

from spear.evaluate.vqa.calibration import LEVELS
from spear.evaluate.vqa.measures import MEASURES
from spear.evaluate.vqa.scores import Asked, Scores
from spear.labels.questions.generate import spoken
from spear.report.draw import PREDICTION, TRUTH, draw_answers
from spear.report.page import Section, data_uri, grid, page, paragraph, table
from spear.report.plot import Line, plot
from spear.types import Array
from spear.util.images import decode_image, encode_jpeg

WIDTH = 576
"""Pixels across of a drawing, at least."""
SHOWN = 6
"""Drawings of each kind."""


def vqa_page(scores: Scores, checkpoint: str, questions: str) -> str:
    """One self-contained document about an evaluation of `checkpoint` on `questions`."""
    sections = [
        Section("How far off", _how_far(scores)),
        *([Section("Boxes, drawn", _boxes(scores))] if "box_vertices" in scores.families else []),
        *([Section("Is it as sure as it may be?", _calibration(scores))] if scores.calibration else []),
        *([Section("Which number to say", _readings(scores))] if scores.readings else []),
        *([Section("Points, drawn", points)] if (points := _points(scores)) else []),
        Section("In words", _words(scores)),
    ]
    lead = paragraph(
        f"{checkpoint}, asked {len(scores.asked):,} questions about {scores.images:,} images of {questions}. "
        f"Numbers are read off the probabilities of the 3D tokens by their {scores.decode}. Intervals are 95 %."
    )
    return page(f"3D questions: {checkpoint}", lead, _facts(scores), sections)


def draw(asked: Asked, scale: int | None = None) -> Array:
    """The answer (orange) and the truth (green) on the image: [scale·h, scale·w, 3] uint8.

    What lies behind the camera, or has no place in the image, is left out.
    """
    label = asked.label
    answers = [(asked.question.segments, TRUTH), (asked.answer, PREDICTION)]
    image = decode_image(label.image, label.source)
    return draw_answers(image, label.intrinsics, answers, scale or max(1, round(WIDTH / label.width)))


def caption(asked: Asked) -> str:
    """The question, and how far off the answer is."""
    measures = asked.measures
    words = [MEASURES[n].say(measures[n]) for n in ("error", "pixels", "relative") if n in measures]
    if "iou" in measures:
        words.append(f"IoU {measures['iou']:.2f}")
    return (
        f"{asked.question.prompt} — off by {', '.join(words)}"
        if words
        else f"{asked.question.prompt} — broken"
    )


def _facts(scores: Scores) -> list[tuple[str, str]]:
    facts = []
    for family, name, what in (
        ("box_vertices", "error", "median error of a box's centre"),
        ("box_vertices", "relative", "of the distance, median error of a box's centre"),
        ("box_vertices", "iou_25", "of the boxes overlap the truth by IoU 0.25 or more"),
        ("distance", "relative", "median error of a distance"),
        ("chain_of_thought", "closer", "of the time it names the closer of two"),
    ):
        s = scores.families.get(family)
        if s is not None and name in s.measures:
            m = MEASURES[name]
            guess = f"; a constant guess: {m.say(s.constant[name])}" if name in s.constant else ""
            facts.append((m.say(s.measures[name].value), what + guess))
    return facts


def _how_far(scores: Scores) -> str:
    return (
        table(*scores.rows())
        + paragraph(
            "Of a box the error is that of its centre; of two distances the mean of both; of back-projected boxes "
            "that of the eight image points, relative to the image's width and height. Constant guess: the best "
            "single answer for all of these questions. Depth only: the same in units of each image's median "
            "depth, for one that knows how far away the scene is, and nothing else. Grammar: answers with exactly "
            "as many numbers as they need, held to it and free.",
            soft=True,
        )
        + "<h3>More about them</h3>"
        + table(*scores.detail_rows())
    )


def _boxes(scores: Scores) -> str:
    return paragraph("Green is the truth, orange the answer; the near face is drawn thicker.") + _extremes(
        [a for a in scores.asked if a.question.family == "box_vertices"]
    )


def _points(scores: Scores) -> str:
    parts = []
    for family in ("keypoint", "back_projection"):
        rows = [a for a in scores.asked if a.question.family == family]
        if rows:
            parts.append(
                f"<h3>{escape(family.replace('_', ' ').capitalize())}</h3>{_extremes(rows, 3, 'h4')}"
            )
    return "".join(parts)


def _extremes(rows: Sequence[Asked], shown: int = SHOWN, head: str = "h3") -> str:
    """The best, those around the median and the worst, by relative error, each about another image."""
    ranked = sorted((a for a in rows if "relative" in a.measures), key=lambda a: a.measures["relative"])
    middle = max(0, len(ranked) // 2 - shown // 2)
    parts, seen = [], set()
    for title, some in (("Worst", ranked[::-1]), ("Around the median", ranked[middle:]), ("Best", ranked)):
        chosen: list[str] = []
        for a in some:
            if len(chosen) < shown and (a.image, a.question.objects) not in seen:
                seen.add((a.image, a.question.objects))
                chosen.append(_figure(a))
        if chosen:
            parts.append(f"<{head}>{title}</{head}>{grid(chosen)}")
    return "".join(parts)


def _figure(asked: Asked) -> str:
    words = escape(caption(asked))
    source = data_uri(encode_jpeg(draw(asked), quality=85), "image/jpeg")
    return (
        f'<figure><img loading="lazy" src="{source}" alt="{words}"><figcaption>{words}</figcaption></figure>'
    )


def _calibration(scores: Scores) -> str:
    names = {family: family.replace("_", " ") for family in scores.calibration}
    covered = [
        Line(names[f], [(100 * a, 100 * b) for a, b in zip(LEVELS, c.curve, strict=True)])
        for f, c in scores.calibration.items()
    ]
    bands = [Line(names[f], [(b.spread, b.error) for b in c.bands]) for f, c in scores.calibration.items()]
    values = [v for line in bands for point in line.points for v in point if v > 0 and isfinite(v)]
    low, high = (min(values) / 1.2, max(values) * 1.2) if values else (0.1, 10.0)
    return (
        paragraph(
            "The model gives every number a probability for each of its bins. Left: how often the truth lies in the "
            "central interval that holds so much of the probability. Below the diagonal it is surer than it may be. "
            "Right: numbers of similar predicted spread (half the central 68 %), and the error that 68 % of them "
            "stay below; on the diagonal both are equal. Where a line rises, the model knows which of its answers "
            "to trust. Each number's probabilities are given the numbers said before it: the error of a box's first "
            "vertex is not in the spread of the others, which follow from it."
        )
        + grid(
            [
                plot(covered, "central interval", "truths in it", (0.0, 100.0)),
                plot(
                    bands,
                    "predicted spread, of the distance",
                    "error, of the distance",
                    (low, high),
                    True,
                    True,
                ),
            ],
            wide=True,
        )
        + table(*scores.certainty_rows())
        + paragraph(
            "Central 50 %: the truths in that interval. Off by: the mean distance of the left curve from the "
            "diagonal. Surer half: the median error of the half "
            "of the answers with the smaller mean spread.",
            soft=True,
        )
    )


def _readings(scores: Scores) -> str:
    return table(*scores.reading_rows()) + paragraph(
        "Median errors, relative to the distance, of the same answers read in three ways: the likeliest bin (mode), "
        "the expected value (mean), the value with half of the probability below it (median). Saved: how much "
        "smaller the mean error is than that of the mode.",
        soft=True,
    )


def _words(scores: Scores) -> str:
    """A few answers of every family as they would be read out: evenly spread from the best to the worst."""
    rows = []
    for family in scores.families:
        some = sorted(
            (a for a in scores.asked if a.question.family == family and "relative" in a.measures),
            key=lambda a: a.measures["relative"],
        )
        for i in np.unique(np.linspace(0, len(some) - 1, min(4, len(some))).astype(int)) if some else ():
            a = some[i]
            answer = spoken(dataclasses.replace(a.question, segments=a.answer))
            rows.append(
                [
                    a.question.prompt,
                    _short(spoken(a.question)),
                    _short(answer),
                    f"{a.measures['relative']:.1f} %",
                ]
            )
    return table(["question", "truth", "answer", "off by"], rows)


def _short(text: str, most: int = 64) -> str:
    return text if len(text) <= most else f"{text[: most - 2].rstrip()} …"
