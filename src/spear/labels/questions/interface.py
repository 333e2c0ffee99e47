"""What a question type consists of (`QuestionType`), and functions that several types share.

Each file in the folder `types` defines one question type. Most types ask about one or two objects.
For these, `make_drafter_about_one_object` and `make_drafter_about_two_objects` make the drafter
from a function that computes the answer for given objects.

Random numbers are drawn in a fixed order, the objects first and their wording last, so that a seed
always gives the same questions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from spear.labels.questions.templates import with_article
from spear.types import Array, LabeledImage, LabeledObject, Question, Segments

MIN_RELATIVE_GAP = 0.05
"""No question compares two distances that differ by less than this fraction of the larger one, or
two locations that are nearer to each other than this fraction of the image's width (our choice)."""


@dataclass(frozen=True)
class QuestionScene:
    """What can be asked about in an image.

    Attributes:
        label: The image's label.
        objects_3d: The image's objects that 3D questions may be about.
        objects_2d: The image's objects that 2D questions may be about.
        depth: [rows, columns] the image's depth in the label's unit, 0 or not finite where it is
            unknown. It has one value for each square of `DEPTH_STRIDE_PX` × `DEPTH_STRIDE_PX`
            pixels, that of the square's middle pixel (`store.write_images_with_coarse_depth`). None
            if the image has no depth.
    """

    label: LabeledImage
    objects_3d: Sequence[LabeledObject]
    objects_2d: Sequence[LabeledObject]
    depth: Array | None = None


class Draft(NamedTuple):
    """A question before it has words.

    Attributes:
        words: The words for the gaps of a prompt template: {"x": "the mug", …}.
        segments: The answer, as in `Question.segments`.
        names: The names of the objects that the question is about.
    """

    words: dict[str, str]
    segments: Segments
    names: tuple[str, ...] = ()


T = TypeVar("T")
Random = np.random.Generator
Drafter = Callable[[QuestionScene, Random], Draft | None]
"""Draws what to ask about in a scene; None if the scene does not allow the question that was
drawn."""
MeasureValues = dict[str, float]
"""Name of a measure, such as "relative" → its value for one answer."""
MeasureAnswer = Callable[[Question, Segments, LabeledImage], MeasureValues]
"""Computes measure → value for an answer with the right grammar, from the question with its true
answer, the answer, and the label of the image."""
ComputeErrorScales = Callable[[Question, LabeledImage], Array]
"""Computes, for each number of the true answer, the distance from the camera to which the number's
error is relative, in the unit of the label."""
ConcludeGuess = Callable[[Question, Segments, Sequence[Question]], Segments]
"""Returns a baseline's guess for a question, with words that the baseline chooses. The last
parameter is all questions that the baseline answers."""
ObjectChoice = Literal["objects_3d", "objects_2d"]
"""The attribute of `QuestionScene` from which objects are drawn."""


@dataclass(frozen=True)
class Measure:
    """How a measure is summarized over questions, and written.

    Attributes:
        title: Name of the measure in tables.
        unit: Unit of its values; "" without a unit. A rate is written in percent.
        statistic: How values are summarized: "median", "mean", or "rate" for values that are 0
            or 1. An answer with the wrong grammar counts as an infinite error in a median, and as 0
            in a mean or rate.
    """

    title: str
    unit: str
    statistic: Literal["median", "mean", "rate"]

    @property
    def average(self) -> Callable[[Any], Any]:
        """The function that summarizes the values of several questions."""
        return np.median if self.statistic == "median" else np.mean


@dataclass(frozen=True)
class QuestionType:
    """What belongs to a question type: the wording and the answers of its questions, and scores.

    The form of the answers is in `spear.question_types.ANSWER_FORMS`. The functions in
    `spear.labels.questions.measures` measure points, distances and image locations.

    Attributes:
        prompts: Prompt templates with the gaps {x} and {y} for objects, {p} for a keypoint or
            pixel. The first one is used where only one wording is needed. The gap {p} stands for a
            keypoint if the template also has a gap for an object, and for a pixel otherwise.
        draft: Draws what to ask about, and computes the answer from the label.
        is_displacement: Whether the numbers of an answer lead from object {x} to object {y}. If
            not, three numbers are a point in the camera frame, which can be drawn in the image.
        needs_masks: Whether `draft` needs the masks of objects, which take long to read from files.
        measure: Scores one answer: computes its value of each measure. None if answers of this type
            are not scored.
        compute_error_scales: To which distance the errors of numbers are relative; None if answers
            are not scored or have no numbers.
        measures: Name → how to summarize and write this measure, for the measures that only this
            type has. All types also have "relative" and "error".
        conclude: Replaces the words of a baseline's guess by words that the baseline chooses,
            because the guess still has those of the true answer. With None, these words stay.
        facts: (name of a measure, its meaning in words) for the large numbers at the top of the
            report of `spear evaluate vqa`.
        num_figures: How many of the worst, the median and the best answers this report draws, each.
            It can draw points, boxes and image locations.
        answer_texts: Texts with all words of the answers, and with the gaps {x} and {y} for names.
            A small tokenizer is trained on them.
    """

    prompts: tuple[str, ...]
    draft: Drafter
    is_displacement: bool = False
    needs_masks: bool = False
    measure: MeasureAnswer | None = None
    compute_error_scales: ComputeErrorScales | None = None
    measures: Mapping[str, Measure] = field(default_factory=dict)
    conclude: ConcludeGuess | None = None
    facts: tuple[tuple[str, str], ...] = ()
    num_figures: int = 0
    answer_texts: tuple[str, ...] = ()

    @property
    def num_objects(self) -> int:
        """How many objects a question names."""
        return sum(gap in self.prompts[0] for gap in ("{x}", "{y}"))

    @property
    def is_about_keypoint(self) -> bool:
        """Whether a question is about a keypoint of an object."""
        return "{p}" in self.prompts[0] and self.num_objects > 0

    @property
    def is_about_pixel(self) -> bool:
        """Whether a question is about a pixel, whatever object it shows."""
        return "{p}" in self.prompts[0] and self.num_objects == 0


def sample_one(items: Sequence[T], rng: Random) -> T:
    """Draw one of `items`, all with equal chance."""
    return items[int(rng.random() * len(items))]


def sample_words_for_object(o: LabeledObject, rng: Random) -> str:
    """The words for an object in a question."""
    # Earlier versions drew the article here. The draw stays, so that seeds give the same questions.
    rng.random()
    return with_article(o.name)


def make_drafter_about_one_object(
    choice: ObjectChoice, compute_answer: Callable[[LabeledObject, LabeledImage], Segments | None]
) -> Drafter:
    """Make a drafter that asks about one object.

    Args:
        choice: Which objects of the scene may be drawn.
        compute_answer: Computes the answer for an object; None if the object allows no answer.
    """

    def draft(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, choice)
        if not objects:
            return None
        o = sample_one(objects, rng)
        segments = compute_answer(o, scene.label)
        if segments is None:
            return None
        return Draft({"x": sample_words_for_object(o, rng)}, segments, (o.name,))

    return draft


def make_drafter_about_two_objects(
    choice: ObjectChoice,
    compute_answer: Callable[[LabeledObject, LabeledObject, LabeledImage], Segments | None],
    num_tries: int = 1,
) -> Drafter:
    """Make a drafter that asks about two objects.

    Args:
        choice: Which objects of the scene may be drawn.
        compute_answer: Computes the answer for two objects; None if they allow no answer.
        num_tries: How many pairs to draw until one allows an answer.
    """

    def draft(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, choice)
        if len(objects) < 2:
            return None
        for _ in range(num_tries):
            # The second object is 1 to n - 1 places after the first one, so it is another one.
            first = int(rng.random() * len(objects))
            second = first + 1 + int(rng.random() * (len(objects) - 1))
            a = objects[first]
            b = objects[second % len(objects)]
            segments = compute_answer(a, b, scene.label)
            if segments is not None:
                words = {"x": sample_words_for_object(a, rng), "y": sample_words_for_object(b, rng)}
                return Draft(words, segments, (a.name, b.name))
        return None

    return draft
