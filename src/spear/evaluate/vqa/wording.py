"""Understand what a question asks, and find the wording in which the model was taught to answer it.

A *taught wording* is one of the prompt templates with which the model was trained. A question in
other words is read as a skeleton, "how far is NAME from camera" (skeleton.py). A classifier finds
the type of question to which the skeleton belongs, or that no model is taught such questions
(classifier.py). The model is then asked about the named objects in a taught wording of this type.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

from spear.errors import SpearError
from spear.evaluate.vqa.classifier import QuestionTypeClassifier, fit_classifier
from spear.evaluate.vqa.skeleton import (
    CUES,
    MODEL_NAMES,
    NAME,
    PIXEL,
    PROPERTY,
    Skeleton,
    is_name,
    read_question,
)
from spear.labels.questions.templates import KEYPOINT_NAMES, UNIT_TEMPLATES, with_article
from spear.labels.questions.types import PROMPT_TEMPLATES, QUESTION_TYPE_BY_NAME
from spear.question_types import ANSWER_FORMS
from spear.types import Pixel, WidthAndHeight

EXAMPLE_TYPES = (
    "distance",
    "box_vertices",
)  # types of the examples in `explain_question_is_untaught`
KEYPOINT_OF_WORD = {
    "closest": "closest",
    "nearest": "closest",
    "farthest": "furthest",
    "furthest": "furthest",
    "last": "furthest",
    "maximum": "furthest",
    "minimum": "closest",
}
"""Word of a question → keypoint, a key of `KEYPOINT_NAMES`."""

_BEFORE_START = frozenset(
    ("am", "compared", "from", "minus", "relative", "stand", "standing", "terms", "with")
)
"""Words between the names y and x in questions for the offset from x to y."""
_IMAGE_POINT = r"(?:<loc\d{4}>){2}"  # an image point in PaliGemma's tokens: one per coordinate


@dataclass(frozen=True)
class ParsedQuestion:
    """A question of a type that the model was taught.

    Attributes:
        question_type: one of `spear.question_types`.
        names: the names of its objects, in the order of the gaps {x} and {y} of prompt templates.
        prompt: the question in a taught wording.
        is_taught_wording: whether the question already had a taught wording.
        pixel: (x, y) of the pixel that the question mentions in other words, px; None without one.
    """

    question_type: str
    names: list[str]
    prompt: str
    is_taught_wording: bool
    pixel: tuple[float, float] | None = None


def understand_question(
    question: str,
    taught_types: Collection[str] | None = None,
    image_size: WidthAndHeight | None = None,
    classifier: QuestionTypeClassifier | None = None,
) -> ParsedQuestion | None:
    """Find out what a question asks.

    Args:
        question: the question, in any words.
        taught_types: the types of questions that the model was taught; None for all.
        image_size: (width, height) of the image, px. Without it, the prompt of a question about a
            pixel cannot be in a taught wording.
        classifier: the classifier of questions; None for the one that is fitted to all examples.

    Returns:
        What the question asks; None if it has none of these types.

    Raises:
        SpearError: the question is about a pixel outside the image.

    Example:
        >>> parsed = understand_question("At what distance is the red cube?")
        >>> parsed.question_type, parsed.names, parsed.prompt
        ('distance', ['red cube'], 'How far is the red cube from the camera?')
        >>> understand_question("What color is the sky?") is None
        True
    """
    known_types = [name for name in ANSWER_FORMS if taught_types is None or name in taught_types]
    for question_type in known_types:
        names = find_object_names_by_templates(question, question_type)
        if names is not None:
            return ParsedQuestion(question_type, names, question, is_taught_wording=True)

    reading = read_question(question)
    classifier = classifier or fit_classifier()
    readings = reading.list_readings()
    likeliest = classifier.classify(readings)
    if likeliest is None or PROPERTY in readings[0].words:
        return None
    skeleton, question_type = likeliest
    if question_type not in known_types:
        return None
    pixel = reading.pixel if PIXEL in skeleton.words else None
    return _phrase_in_taught_wording(skeleton, question_type, pixel, image_size)


def _phrase_in_taught_wording(
    skeleton: Skeleton,
    question_type: str,
    pixel: tuple[float, float] | None,
    image_size: WidthAndHeight | None,
) -> ParsedQuestion:
    """Put a question in a taught wording of its type."""
    names = [MODEL_NAMES.get(name, name) for name in _order_names(skeleton, question_type)]
    # Gap → name; a question about one object has no y.
    gaps = dict(zip("xy", [with_article(name) for name in names], strict=False))
    point = _choose_keypoint(skeleton.words)
    if pixel is not None:
        point = _format_pixel(pixel, image_size)
    prompt = PROMPT_TEMPLATES[question_type][0].format(p=point, **gaps)
    return ParsedQuestion(question_type, names, prompt, is_taught_wording=False, pixel=pixel)


def _format_pixel(pixel: tuple[float, float], image_size: WidthAndHeight | None) -> str:
    """Write a pixel as in taught wordings, or in numbers if the size of the image is not known."""
    x, y = pixel
    if image_size is None:
        return f"({x:g}, {y:g})"
    width, height = image_size
    if x >= width or y >= height:
        raise SpearError(
            f"pixel ({x:g}, {y:g}) is outside the image, which has {width} × {height} pixels. Ask "
            "about a pixel inside."
        )
    return str(Pixel(x / width, y / height))


def find_object_names_by_templates(question: str, question_type: str) -> list[str] | None:
    """Match a question with the prompt templates of a question type.

    Returns:
        The names of the question's objects; None if it has no taught wording of this type.
    """
    text = " ".join(question.split())
    # Remove the words that only state the unit of the answer.
    for templates in UNIT_TEMPLATES.values():
        for template in templates:
            prefix, suffix = template.split("{}")
            text = text.removeprefix(prefix).removesuffix(suffix)
    text = text.rstrip(" ?.")

    for prompt in PROMPT_TEMPLATES[question_type]:
        match = _compile_prompt(prompt, question_type).fullmatch(text)
        if match:
            gaps = match.groupdict()  # gap ("x" or "y") → name
            names = [gaps[gap] for gap in sorted(gaps)]
            return names if all(is_name(name, text) for name in names) else None
    return None


@lru_cache(None)
def _compile_prompt(prompt: str, question_type: str) -> re.Pattern[str]:
    """Convert a prompt template to a regular expression, once.

    Its gaps {x} and {y} become groups of the same names, which match the names of objects. Its gap
    {p} matches the name of any keypoint, or a pixel.
    """
    keypoints: list[str] = []
    for words in KEYPOINT_NAMES.values():
        keypoints += [re.escape(word) for word in words]
    is_about_keypoint = QUESTION_TYPE_BY_NAME[question_type].is_about_keypoint
    point = "|".join(keypoints) if is_about_keypoint else _IMAGE_POINT
    pattern = re.escape(prompt.rstrip("?"))
    pattern = pattern.replace(r"\{p\}", f"(?:{point})")
    # After its article, a name goes on until a comma, or until words such as " and the" that
    # introduce the second object. `re.sub` puts the name of the gap, x or y, in place of \1.
    group_of_name = r"(?:(?:the|an?) )?(?P<\1>(?:(?! (?:from|and|to) (?:the|an?) )[^?,])+)"
    escaped_gap = r"\\{([xy])\\}"  # `re.escape` has made \{x\} of {x}
    return re.compile(re.sub(escaped_gap, group_of_name, pattern), re.IGNORECASE)


def _order_names(skeleton: Skeleton, question_type: str) -> list[str]:
    """Order the names as the gaps {x} and {y} of the type's templates.

    A displacement leads from x to y. Questions such as "where is y relative to x", "how far is y
    from x" and "how far is y to x" name y first.
    """
    names = list(dict.fromkeys(skeleton.names))  # each name once
    if not QUESTION_TYPE_BY_NAME[question_type].is_displacement:
        return names
    name_indices = [index for index, word in enumerate(skeleton.words) if word == NAME]
    first, second = (name_indices[skeleton.names.index(name)] for name in names)
    words_before = skeleton.words[:first]
    words_between = skeleton.words[first + 1 : second]
    if any(word in ("connecting", "connects", "subtract") for word in words_before):
        return names  # "what connects x with y", "subtract x from y"
    if "coincide" in words_between:  # "move x so that it coincides with y"
        return names
    if "reach" in words_before and not {"begin", "start", "starting"}.isdisjoint(words_between):
        return names[::-1]  # "to reach y if I start at x"
    is_viewpoint = "are" in words_between and not {"we", "you"}.isdisjoint(words_between)
    if is_viewpoint or not _BEFORE_START.isdisjoint(words_between):
        return names[::-1]
    if "origin" in skeleton.words[second:]:  # "where would y be if x was the origin"
        return names[::-1]
    # "how far is y to x", "where relative to the position of y ..."
    is_after_verb = words_before[-1:] in (["is"], ["are"])
    is_relative_position = {"relative", "of"} <= set(words_before)
    if "to" in words_between and (is_after_verb or is_relative_position):
        return names[::-1]
    return names


def _choose_keypoint(words: Sequence[str]) -> str:
    """Choose the taught word for the point of an object that a question asks about."""
    for word in words:
        if word in KEYPOINT_OF_WORD:
            return KEYPOINT_NAMES[KEYPOINT_OF_WORD[word]][0]
    if "first" in words and not CUES["touching"].isdisjoint(words):
        # "which point would the camera touch first"
        return KEYPOINT_NAMES["closest"][0]
    return KEYPOINT_NAMES["centre"][0]


def explain_question_is_untaught(taught_types: Collection[str] | None = None) -> str:
    """Say in one sentence that a question is none that the model was taught."""
    examples: list[str] = []
    for question_type in EXAMPLE_TYPES:
        if taught_types is None or question_type in taught_types:
            template = PROMPT_TEMPLATES[question_type][0]
            examples.append(f'"{template.format(x="the mug")}"')
    sentence = "the model was not taught to answer this question"
    if not examples:
        return sentence
    return f"{sentence}; it was taught questions such as {' and '.join(examples)}"
