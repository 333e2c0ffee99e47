"""What answering without seeing would score: two baselines to hold a model's errors against (our choice).

constant    the best single answer to all questions of a family: the componentwise median of the true answers,
            of these very questions. It knows where things usually are.
depth only  the same in units of each image's depth: every number is the median of the truths divided by their
            image's depth, times the depth of the image asked about. The depth of an image is the median of
            how far its boxed objects' centres lie along the camera's z axis. It knows where in the image
            things usually are, how large, and how far away this scene is; not which object is where. Image
            locations have no depth, so back-projection has no such guess.

Which of two is closer is guessed as the first named, or the second, whichever is right more often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from spear.evaluate.vqa.measures import Segments, image_points, numbers
from spear.models.readout import with_numbers
from spear.types import LabeledImage, Pixel, Question


def constant(questions: Sequence[Question]) -> list[Segments]:
    """The constant guess at each of a family's questions."""
    if questions[0].family == "back_projection":
        middle = np.median([image_points(q.segments) for q in questions], axis=0)
        guess = [Pixel(float(x), float(y)) for x, y in middle]
        return [guess for _ in questions]
    values = np.median([numbers(q.segments) for q in questions], axis=0)
    return [_words(q, with_numbers(q.segments, values), questions) for q in questions]


def depth_only(
    questions: Sequence[tuple[int, Question]], labels: Sequence[LabeledImage]
) -> list[Segments] | None:
    """The guess at each of a family's questions, about the image of that index; None for image locations."""
    asked = [q for _, q in questions]
    if asked[0].family == "back_projection":
        return None
    depths = np.array([depth(labels[i]) for i, _ in questions])
    usual = np.median([numbers(q.segments) / d for q, d in zip(asked, depths, strict=True)], axis=0)
    return [_words(q, with_numbers(q.segments, usual * d), asked) for q, d in zip(asked, depths, strict=True)]


def depth(label: LabeledImage) -> float:
    """An image's one depth, in the label's unit: the median z of its boxed objects' centres."""
    return float(np.median([o.box3d.center[2] for o in label.objects if o.box3d is not None]))


def _words(question: Question, guess: Segments, questions: Sequence[Question]) -> Segments:
    """A worded guess that ends in the more frequent conclusion."""
    if question.family != "chain_of_thought":
        return guess
    first = [np.subtract(*numbers(q.segments)) < 0 for q in questions]
    closer = question.objects[0 if np.mean(first) >= 0.5 else 1]
    return [*guess[:-1], f" so the {closer} is closer"]
