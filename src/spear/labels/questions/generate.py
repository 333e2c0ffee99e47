"""Questions and answers about a labelled image: 3D families, and 2D ones to pretrain a small VLM on.

3D answers (numbers in the label's unit, camera frame: x right, y down, z forward; signs and ends are ours):
    box_vertices      24 numbers: the eight vertices in `box3d.order_vertices` order, x y z each.
    keypoint          3: the closest or furthest of the points of X that are seen, or the centre of its box.
    offset            3: centre of Y minus centre of X, signed.
    distance          1: from the camera to the centre of X, Euclidean.
    back_projection   8 pixels: where the vertices appear in the image.
    chain_of_thought  "the X is d and the Y is e so the X is closer".
    pixel_point       3: the point that a pixel drawn at random shows, where the depth is given (ablation).

The objects asked about are those that a reader can tell apart and whose label is good: see `why_not_asked`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from spear.errors import SpearError, check_known
from spear.labels.fit.quality import find_failed_scores
from spear.labels.questions.answers import DRAFTERS, QuestionScene, draw_one, project_to_pixels
from spear.labels.questions.templates import (
    KEYPOINT_NAMES,
    PROMPT_TEMPLATES,
    UNIT_TEMPLATES,
    is_a,
    with_article,
)
from spear.question_types import QUESTION_TYPES
from spear.types import Array, LabeledImage, LabeledObject, Pixel, Question, Segments, Unit

MIN_VISIBLE_2D = 0.6
"""Objects less of whose outline is seen are not asked about in 2D (our choice)."""


def find_exclusion_reasons(label: LabeledImage) -> list[tuple[str, ...]]:
    """For each object of a label, all that keeps 3D questions from asking about it; empty for a good one.

    "ambiguous": its name also fits another object of the image. "no box". "outside": its centre is not in the
    image. Or the names of the scores in which it fails (`quality.failings`).
    """
    found: list[tuple[str, ...]] = []
    for o in label.objects:
        why = () if _alone(o, label) else ("ambiguous",)
        if o.box3d is None:
            found.append((*why, "no box"))
            continue
        outside = ("outside",) if project_to_pixels(o.box3d.center[None], label) == [None] else ()
        found.append((*why, *outside, *find_failed_scores(o.scores)))
    return found


def _alone(o: LabeledObject, label: LabeledImage) -> bool:
    return sum(is_a(other.name, o.name) for other in label.objects) == 1


def find_askable_objects(label: LabeledImage) -> list[LabeledObject]:
    """The objects that 3D questions are asked about."""
    return [
        o for o, why in zip(label.objects, find_exclusion_reasons(label), strict=True) if not why
    ]


def generate_questions(
    label: LabeledImage,
    rng: np.random.Generator,
    pairs: tuple[int, int] = (1, 4),
    families: Sequence[str] = QUESTION_TYPES,
    depth: Array | None = None,
) -> list[Question]:
    """Ask about an image.

    rng       decides everything random here; the same state gives the same questions.
    pairs     fewest and most questions.
    families  of `QUESTION_TYPES`, `QUESTION_TYPES_2D` and `QUESTION_TYPES_PIXEL`, drawn with
              equal chance.
    depth     of the image, see `answers.Scene`; without it "pixel_point" is not asked.

    Returns up to `pairs[1]` different questions; fewer than `pairs[0]`, or none, when the image does not
    allow more. Raises `SpearError`: an unknown family, and pairs that are not 1 <= fewest <= most.
    """
    fewest, most = pairs
    if not 1 <= fewest <= most:
        raise SpearError(f"pairs {pairs}: questions per image: give 1 <= fewest <= most")
    check_known("question family", DRAFTERS, *families)
    flat = [
        o
        for o in label.objects
        if o.scores.get("visible", 1.0) >= MIN_VISIBLE_2D and _alone(o, label)
    ]
    scene = QuestionScene(label, find_askable_objects(label), flat, depth)
    wanted = fewest + int(rng.random() * (most - fewest + 1))
    questions: dict[tuple[Any, ...], Question] = {}
    for _ in range(4 * wanted):
        family = draw_one(families, rng)
        if (answer := DRAFTERS[family](scene, rng)) is None:
            continue
        words, segments, objects = answer
        key = (family, objects, tuple(segments))
        if key in questions:
            continue
        prompt = draw_one(PROMPT_TEMPLATES[family], rng).format_map(words)
        if len(UNIT_TEMPLATES[label.unit]) > 1 and any(isinstance(s, float) for s in segments):
            prompt = draw_one(UNIT_TEMPLATES[label.unit], rng).format(prompt)
        questions[key] = Question(family, prompt, segments, objects, label.unit)
        if len(questions) == wanted:
            break
    return list(questions.values())


def format_answer(segments: Segments, unit: Unit, size: tuple[int, int] | None = None) -> str:
    """An answer as a person reads it: numbers to three decimals with their unit, in threes where nothing else
    is said; image locations in pixels of an image of `size` (width, height), or as PaliGemma's tokens."""
    measure = abbreviate_unit(unit)
    numbers = [f"{s:.3f}" for s in segments if isinstance(s, float)]
    if 1 < len(numbers) == len(segments):
        points = [f"({', '.join(numbers[i : i + 3])})" for i in range(0, len(numbers), 3)]
        return f"{' '.join(points)} {measure}"
    said = []
    for segment in segments:
        if isinstance(segment, float):
            said.append(f"{segment:.3f} {measure}")
        elif isinstance(segment, Pixel) and size:
            said.append(f"({segment.x * size[0]:.0f}, {segment.y * size[1]:.0f}) px")
        else:
            said.append(str(segment).strip())
    return " ".join(said)


def abbreviate_unit(unit: Unit) -> str:
    """A unit as it stands after a number."""
    return "m" if unit == "metre" else "units"


def iterate_tokenizer_texts(names: Sequence[str]) -> Iterator[str]:
    """Every template with every name, and every worded answer: a small tokenizer is trained on them."""
    points = [word for synonyms in KEYPOINT_NAMES.values() for word in synonyms]
    for x, y in zip(names, [*names[1:], *names[:1]], strict=True):
        for definite in (True, False):
            words = {"x": with_article(x, definite), "y": with_article(y, definite)}
            for family, templates in PROMPT_TEMPLATES.items():
                fillings = points if family == "keypoint" else [""]
                yield from (t.format_map({**words, "p": p}) for t in templates for p in fillings)
        yield f"the {x} is  and the {y} is  so the {x} is closer"
        yield f"{x}, {y}"
    yield from (wording.format("") for wordings in UNIT_TEMPLATES.values() for wording in wordings)
    yield from ("yes", "no", "left", "right", *map(str, range(10)))
