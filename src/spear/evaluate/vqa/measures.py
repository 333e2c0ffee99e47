"""How far an answer about 3D is from the truth, in each sense that its family has; and the baselines.

relative         distance between the answer and the truth, in percent of how far from the camera the thing
                 is: between the centres (means of the eight vertices) for a box, between the points for a
                 keypoint, between the offsets for an offset (percent of the mean distance of its two
                 objects), the absolute difference for a distance, the mean of the two for a chain of thought.
                 Back-projection: mean distance of the image points, in percent of the image (x of its width,
                 y of its height).
error            the same in millimetres, where the labels are metric.
vertex_relative, vertex  mean distance of a box's vertices, in the order in which the question wants them.
iou              3D intersection over union of the true box and the box nearest to the answered vertices.
iou_25, iou_50   whether that is at least 0.25, 0.5.
closer           whether the words of a chain of thought name the right one as the closer.
consistent       whether these words are what its own two distances say, right or wrong.
pixels           mean distance of a back-projection's image points, in pixels of the labelled image.

Two baselines say what answering without seeing would score (our choice). `constant_guess` knows where things
usually are. `depth_guess` knows where in the image things usually are, how large, and how far away this scene
is, but not which object is where. Which of two is closer they guess as the first named, or the second,
whichever is right more often.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from spear.evaluate.stats import Estimate
from spear.labels.fit.box3d import compute_iou_3d, fit_nearest_box
from spear.labels.questions.answers import compute_distance
from spear.models.readout import replace_numbers
from spear.types import Array, LabeledImage, Pixel, Question, Segments


@dataclass(frozen=True)
class Measure:
    """How a measure is summed up over questions, and said.

    statistic  "median", "mean", or "rate" of what is either 0 or 1; an answer with the wrong grammar counts
               as an infinite error in a median, and else 0.
    unit       of its values; a rate is said in percent.
    """

    title: str
    unit: str
    statistic: Literal["median", "mean", "rate"]

    @property
    def average(self) -> Callable[[Any], Any]:
        """What sums it up."""
        return np.median if self.statistic == "median" else np.mean

    def to_text(self, value: float | Estimate) -> str:
        """A value with its unit; an estimate as "12.3 mm [10.1, 14.0]"."""
        form = ".0%" if self.statistic == "rate" else ".1f" if self.unit else ".2f"
        unit = f" {self.unit}" if self.unit else ""
        return (
            value.to_text(form, 1.0, unit)
            if isinstance(value, Estimate)
            else format(value, form) + unit
        )


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
"""Family → its measures that a failed answer counts in."""


def extract_numbers(segments: Segments) -> Array:
    """The 3D numbers of an answer."""
    return np.array([s for s in segments if isinstance(s, float)])


def extract_image_points(segments: Segments) -> Array:
    """[n, 2] the image locations of an answer, as fractions (x, y)."""
    return np.array([(s.x, s.y) for s in segments if isinstance(s, Pixel)]).reshape(-1, 2)


def is_grammatical(question: Question, answer: Segments) -> bool:
    """Whether an answer has exactly as many numbers and image points as the truth (24 numbers for a box)."""
    return all(
        len(of(answer)) == len(of(question.segments))
        for of in (extract_numbers, extract_image_points)
    )


def compute_error_scales(question: Question, label: LabeledImage) -> Array:
    """For each number of the true answer the distance from the camera that its error is taken relative to."""
    truth = extract_numbers(question.segments)
    if question.family == "box_vertices":
        return np.full(24, np.linalg.norm(truth.reshape(8, 3).mean(0)))
    if question.family == "keypoint":
        return np.full(3, np.linalg.norm(truth))
    if question.family == "offset":
        found = {o.name: compute_distance(o) for o in label.objects if o.box3d is not None}
        return np.full(3, np.mean([found[name] for name in question.objects]))
    return np.abs(truth)


def measure_answer(question: Question, answer: Segments, label: LabeledImage) -> dict[str, float]:
    """All measures of an answer to a question about `label`; only failed rates when its grammar is wrong."""
    if not is_grammatical(question, answer):
        return dict.fromkeys(RATES.get(question.family, ()), 0.0)
    if question.family == "back_projection":
        apart = extract_image_points(answer) - extract_image_points(question.segments)
        pixels = np.linalg.norm(apart * (label.width, label.height), axis=1)
        return {
            "relative": 100 * float(np.linalg.norm(apart, axis=1).mean()),
            "pixels": float(pixels.mean()),
        }
    truth, said, far = (
        extract_numbers(question.segments),
        extract_numbers(answer),
        compute_error_scales(question, label),
    )
    found: dict[str, float] = {}
    if question.family in ("distance", "chain_of_thought"):
        off = np.abs(said - truth)
        found["relative"] = 100 * float((off / far).mean())
        error = float(off.mean())
    else:
        apart = (said - truth).reshape(-1, 3)
        error = float(np.linalg.norm(apart.mean(0)))
        found["relative"] = 100 * error / float(far[0])
    if label.unit == "metre":
        found["error"] = 1000 * error
    if question.family == "box_vertices":
        vertex = float(np.linalg.norm(apart, axis=1).mean())
        found["vertex_relative"] = 100 * vertex / float(far[0])
        if label.unit == "metre":
            found["vertex"] = 1000 * vertex
        overlap = compute_iou_3d(
            fit_nearest_box(said.reshape(8, 3)), fit_nearest_box(truth.reshape(8, 3))
        )
        found |= {"iou": overlap, "iou_25": float(overlap >= 0.25), "iou_50": float(overlap >= 0.5)}
    if question.family == "chain_of_thought":
        named, (first, second) = find_closer_named(answer, question.objects), question.objects
        for name, (one, other) in (("closer", truth), ("consistent", said)):
            found[name] = float(named == (first if one < other else second))
    return found


def find_closer_named(answer: Segments, names: Sequence[str]) -> str | None:
    """Which of two objects a chain of thought calls the closer: the first named after its last number."""
    places = [i for i, s in enumerate(answer) if isinstance(s, float)]
    rest = "".join(str(s) for s in answer[places[-1] + 1 if places else 0 :])
    text = " ".join(rest.casefold().split())
    found = {name: re.search(rf"(?<!\w){re.escape(name.casefold())}(?!\w)", text) for name in names}
    said = {name: (match.start(), -len(name)) for name, match in found.items() if match}
    return min(said, key=lambda name: said[name]) if said else None


def guess_constants(questions: Sequence[Question]) -> list[Segments]:
    """The best single answer to all of a family's questions: the median of each of their true numbers."""
    if questions[0].family == "back_projection":
        middle = np.median([extract_image_points(q.segments) for q in questions], axis=0)
        return [[Pixel(float(x), float(y)) for x, y in middle]] * len(questions)
    return _guess(questions, [1.0] * len(questions))


def guess_from_depth(
    questions: Sequence[Question], labels: Sequence[LabeledImage]
) -> list[Segments] | None:
    """The same in units of the depth of each question's image, which is the median z of its boxed objects'
    centres; None for image locations, which have none."""
    if questions[0].family == "back_projection":
        return None
    boxes = [[o.box3d for o in label.objects if o.box3d is not None] for label in labels]
    return _guess(questions, [float(np.median([box.center[2] for box in some])) for some in boxes])


def _guess(questions: Sequence[Question], units: Sequence[float]) -> list[Segments]:
    pairs = list(zip(questions, units, strict=True))
    usual = np.median([extract_numbers(q.segments) / unit for q, unit in pairs], axis=0)
    return [_words(q, replace_numbers(q.segments, usual * unit), questions) for q, unit in pairs]


def _words(question: Question, guess: Segments, questions: Sequence[Question]) -> Segments:
    """A worded guess that ends in the more frequent conclusion."""
    if question.family != "chain_of_thought":
        return guess
    first = [np.subtract(*extract_numbers(q.segments)) < 0 for q in questions]
    closer = question.objects[0 if np.mean(first) >= 0.5 else 1]
    return [*guess[:-1], f" so the {closer} is closer"]
