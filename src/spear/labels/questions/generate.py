"""Generating questions and answers about a labeled image.

There are 3D questions, and 2D questions on which a small VLM is pretrained. The folder `types` has
one file per question type, which says what is asked and what the answer consists of. Numbers in 3D
answers are in the label's unit and in the camera frame (x right, y down, z forward).

3D questions are only about objects whose name is unambiguous in the image and whose label is good
(`find_exclusion_reasons`).
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from spear.errors import SpearError, check_known
from spear.labels.questions.interface import QuestionScene, sample_one
from spear.labels.questions.positions import project_to_pixels
from spear.labels.questions.templates import (
    KEYPOINT_NAMES,
    UNIT_TEMPLATES,
    can_be_called,
    with_article,
)
from spear.labels.questions.types import PROMPT_TEMPLATES, QUESTION_TYPE_BY_NAME
from spear.question_types import QUESTION_TYPES
from spear.types import (
    Array,
    LabeledImage,
    LabeledObject,
    Pixel,
    Question,
    Segments,
    Unit,
    WidthAndHeight,
)

MIN_VISIBLE = 0.7
"""3D questions are about objects whose "visible" score is at least this: the fraction of the
object's outline at which neither the image's edge nor something in front cuts it off. For objects
with a lower score, the median error of the box's center is three times as large (our choice,
measured by benchmarks/labels/accuracy.py)."""
MAX_EDGE = 0.05
"""3D questions are about objects whose "edge" score is at most this: the fraction of the object's
outline that the image's edge cuts off. How far such an object continues outside the image is not
known."""
MIN_SCORES = {
    "visible": MIN_VISIBLE,
    "points": 30.0,  # number (not a fraction) of points to which the box is fitted
    "known": 0.8,  # fraction of the object's pixels that have depth
    "whole": 0.5,  # IoU of the detected 2D box and the tight box around the mask
    "stability": 0.6,  # how little the box changes with its points, see `label_object`
    "compact": 0.4,  # how wide the object is seen, as a fraction of the box's extent in depth
}
"""Name → lowest score of objects that 3D questions may be about (our choice). Objects with lower
scores stay in the labels, with their scores."""
MIN_VISIBLE_2D = 0.6
"""2D questions are about objects of whose outline at least this fraction is visible, by their score
"visible" (our choice)."""
TRIES_PER_QUESTION = 4  # more than one, because many draws allow no question or repeat one


def find_exclusion_reasons(label: LabeledImage) -> list[tuple[str, ...]]:
    """Find the reasons why no 3D question may be about an object, for each object of a label.

    The reasons are "ambiguous" (the object's name also fits another object of the image), "no box",
    "outside" (the center of the object's box is not in the image), and the names of scores that are
    too low (`find_failed_scores`). Questions may be about objects without a reason.
    """
    reasons_of_objects: list[tuple[str, ...]] = []
    for o in label.objects:
        reasons = []
        if not _is_name_unique(o, label):
            reasons.append("ambiguous")
        if o.box3d is None:
            reasons.append("no box")
        else:
            if project_to_pixels(o.box3d.center[None], label) == [None]:
                reasons.append("outside")
            reasons += find_failed_scores(o.scores)
        reasons_of_objects.append(tuple(reasons))
    return reasons_of_objects


def find_failed_scores(scores: Mapping[str, float]) -> tuple[str, ...]:
    """The names of the scores that exclude an object from questions.

    A missing score excludes nothing.
    """
    failed_scores = [name for name, limit in MIN_SCORES.items() if scores.get(name, limit) < limit]
    if scores.get("edge", 0.0) > MAX_EDGE:
        failed_scores.append("edge")
    return tuple(failed_scores)


def _is_name_unique(o: LabeledObject, label: LabeledImage) -> bool:
    """Whether an object's name fits no other object of the image."""
    # The sum counts the object itself, too.
    return sum(can_be_called(other.name, o.name) for other in label.objects) == 1


def find_askable_objects(label: LabeledImage) -> list[LabeledObject]:
    """The objects that 3D questions may be about."""
    objects_with_reasons = zip(label.objects, find_exclusion_reasons(label), strict=True)
    return [o for o, reasons in objects_with_reasons if not reasons]


def generate_questions(
    label: LabeledImage,
    rng: np.random.Generator,
    questions_per_image: tuple[int, int] = (1, 4),
    question_types: Sequence[str] = QUESTION_TYPES,
    depth: Array | None = None,
) -> list[Question]:
    """Generate random questions about an image, with their answers.

    Args:
        label: The image's label.
        rng: The source of all randomness; the same state gives the same questions.
        questions_per_image: (fewest, most) questions. A random number in this range is wanted.
        question_types: The types (`spear.question_types`) from which each question's type is drawn,
            with equal chance.
        depth: The image's depth (`QuestionScene.depth`), which "pixel_point" needs.

    Returns:
        At most `questions_per_image[1]` different questions. If the image does not allow enough
        questions, there are fewer than `questions_per_image[0]`, or none.

    Raises:
        SpearError: A question type is unknown, or `questions_per_image` is not a range with
            1 <= fewest <= most.
    """
    min_questions, max_questions = questions_per_image
    if not 1 <= min_questions <= max_questions:
        raise SpearError(
            f"{questions_per_image} is no range of questions per image. "
            "Give --questions-per-image FEWEST MOST, both at least 1."
        )
    check_known("question type", QUESTION_TYPE_BY_NAME, *question_types)

    objects_2d = []
    for o in label.objects:
        if o.scores.get("visible", 1.0) >= MIN_VISIBLE_2D and _is_name_unique(o, label):
            objects_2d.append(o)
    scene = QuestionScene(label, find_askable_objects(label), objects_2d, depth)

    num_questions = min_questions + int(rng.random() * (max_questions - min_questions + 1))
    questions: dict[tuple[Any, ...], Question] = {}
    for _ in range(TRIES_PER_QUESTION * num_questions):
        question_type = sample_one(question_types, rng)
        draft = QUESTION_TYPE_BY_NAME[question_type].draft(scene, rng)
        if draft is None:
            continue

        # Skip a question that was asked before, even in other words.
        key = (question_type, draft.names, tuple(draft.segments))
        if key in questions:
            continue

        # Put the draft into words. If the answer has numbers in relative units, the prompt says so;
        # meters, whose only template is the bare prompt, are not mentioned.
        prompt = sample_one(PROMPT_TEMPLATES[question_type], rng).format_map(draft.words)
        has_numbers = any(isinstance(segment, float) for segment in draft.segments)
        if has_numbers and len(UNIT_TEMPLATES[label.unit]) > 1:
            prompt = sample_one(UNIT_TEMPLATES[label.unit], rng).format(prompt)
        questions[key] = Question(question_type, prompt, draft.segments, draft.names, label.unit)
        if len(questions) == num_questions:
            break
    return list(questions.values())


def format_answer(segments: Segments, unit: Unit, size: WidthAndHeight | None = None) -> str:
    """Format an answer for people to read.

    Numbers get three decimals and their unit. An answer that consists only of numbers is written as
    points of three numbers each.

    Args:
        segments: The answer, as in `Question.segments`.
        unit: The unit of the numbers.
        size: Width and height of the image in pixels. With it, image locations are written in
            pixels; without it, as PaliGemma's location tokens.

    Example:
        >>> format_answer([0.1, -0.2, 1.0], "metre")
        '(0.100, -0.200, 1.000) m'
    """
    symbol = abbreviate_unit(unit)
    numbers = [f"{segment:.3f}" for segment in segments if isinstance(segment, float)]
    has_only_numbers = len(numbers) == len(segments)
    if has_only_numbers and len(numbers) > 1:
        points = [f"({', '.join(numbers[i : i + 3])})" for i in range(0, len(numbers), 3)]
        return f"{' '.join(points)} {symbol}"
    words = []
    for segment in segments:
        if isinstance(segment, float):
            words.append(f"{segment:.3f} {symbol}")
        elif isinstance(segment, Pixel) and size:
            width, height = size
            words.append(f"({segment.x * width:.0f}, {segment.y * height:.0f}) px")
        else:
            words.append(str(segment).strip())
    return " ".join(words)


def abbreviate_unit(unit: Unit) -> str:
    """The abbreviation of a unit, to write after a number."""
    return "m" if unit == "metre" else "units"


def _fill_prompt_templates(words: Mapping[str, str]) -> Iterator[str]:
    """Fill every prompt template with these words, and with every word for a keypoint."""
    keypoint_words = list(chain.from_iterable(KEYPOINT_NAMES.values()))
    for question_type in QUESTION_TYPE_BY_NAME.values():
        fillings = keypoint_words if question_type.is_about_keypoint else [""]
        for template in question_type.prompts:
            for filling in fillings:
                yield template.format_map({**words, "p": filling})


def iterate_tokenizer_texts(names: Sequence[str]) -> Iterator[str]:
    """Iterate over texts on which a small tokenizer is trained.

    They are all prompt templates filled with all names, the units, and all answers in words.
    """
    answer_texts: list[str] = []
    for question_type in QUESTION_TYPE_BY_NAME.values():
        answer_texts += question_type.answer_texts

    next_names = [*names[1:], *names[:1]]  # the second object of a question is the next name
    for x, y in zip(names, next_names, strict=True):
        for definite in (True, False):
            words = {"x": with_article(x, definite), "y": with_article(y, definite)}
            yield from _fill_prompt_templates(words)
        for template in answer_texts:
            if "{" in template:
                yield template.format(x=x, y=y)
    yield from (text for text in answer_texts if "{" not in text)
    for templates in UNIT_TEMPLATES.values():
        for template in templates:
            yield template.format("")
