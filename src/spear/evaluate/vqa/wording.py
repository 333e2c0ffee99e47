"""Understand what a question asks, and find the wording in which the model was taught to answer it.

A *taught wording* is one of the prompt templates with which the model was trained. A question in
other words is recognized by rules. Its words are divided in two groups. Words of `VOCABULARY`, of
which questions consist, tell the type: "far" asks for a distance, "corners" for a box. Other words
are names of objects, if they follow an article, a preposition or the like. The model is then asked
about these objects in a taught wording of this type. If no word tells the type, the model was not
taught to answer the question.
"""

import itertools
import re
import tomllib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from spear.labels.questions.templates import KEYPOINT_NAMES, UNIT_TEMPLATES, with_article
from spear.labels.questions.types import PROMPT_TEMPLATES
from spear.question_types import ANSWER_FORMS

_WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
WORDS = {kind: frozenset(words) for kind, words in _WORDS.items()}
"""Kind of words → the words (words.toml says what each kind is)."""
VOCABULARY = frozenset().union(*WORDS.values())
"""The words of questions. They are no part of a name, except for those in `_find_end_of_name`."""
WORDS_BEFORE_NAMES = WORDS["determiners"] | WORDS["name_prepositions"]
"""The words after which a name may begin."""
EXAMPLE_TYPES = ("distance", "box_vertices")  # types of the examples in `describe_untaught`
KEYPOINT_OF_WORD = {
    "closest": "closest",
    "nearest": "closest",
    "farthest": "furthest",
    "furthest": "furthest",
}
"""Word of a question → keypoint, a key of `KEYPOINT_NAMES`."""

# A token is 's, a word (perhaps with hyphens), or a single punctuation mark.
_TOKENS = re.compile(r"'s\b|[a-z0-9]+(?:-[a-z0-9]+)*|[^\sa-z0-9]")
_PIXEL = r"(?:<loc\d{4}>){2}"  # an image point in PaliGemma's tokens: one per coordinate


@dataclass(frozen=True)
class ParsedQuestion:
    """A question of a type that the model was taught.

    Attributes:
        question_type: one of `spear.question_types`.
        names: the names of its objects, in the order of the gaps {x} and {y} of prompt templates.
        prompt: the question in a taught wording.
        is_taught_wording: whether the question already had a taught wording.
    """

    question_type: str
    names: list[str]
    prompt: str
    is_taught_wording: bool


def understand_question(
    question: str, taught_types: Collection[str] | None = None
) -> ParsedQuestion | None:
    """Find out what a question asks.

    Args:
        question: the question, in any words.
        taught_types: the types of questions that the model was taught; None for all.

    Returns:
        What the question asks; None if it has none of these types.

    Example:
        >>> parsed = understand_question("At what distance is the red cube?")
        >>> parsed.question_type, parsed.names, parsed.prompt
        ('distance', ['red cube'], 'How far is the red cube from the camera?')
        >>> understand_question("What color is the sky?") is None
        True
    """
    known_types = [name for name in ANSWER_FORMS if taught_types is None or name in taught_types]
    for question_type in known_types:
        names = match_templates(question, question_type)
        if names is not None:
            return ParsedQuestion(question_type, names, question, is_taught_wording=True)

    words = _read_words(question)
    if words is None:
        return None
    likely_type = _find_type(words, known_types)
    if likely_type is None:
        return None
    names = _order_names(words, likely_type)
    # Gap → name; a question about one object has no y.
    gaps = dict(zip("xy", [with_article(name) for name in names], strict=False))
    template = PROMPT_TEMPLATES[likely_type][0]
    prompt = template.format(p=_choose_keypoint(words), **gaps)
    return ParsedQuestion(likely_type, names, prompt, is_taught_wording=False)


def match_templates(question: str, question_type: str) -> list[str] | None:
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
        match = re.fullmatch(_to_pattern(prompt, question_type), text, re.IGNORECASE)
        if match:
            names = match.groupdict()  # gap ("x" or "y") → name
            return [names[gap] for gap in sorted(names)]
    return None


def _to_pattern(prompt: str, question_type: str) -> str:
    """Convert a prompt template to a regular expression.

    Its gaps {x} and {y} become groups of the same names, which match the names of objects. Its gap
    {p} matches the name of any keypoint, or a pixel.
    """
    keypoints: list[str] = []
    for words in KEYPOINT_NAMES.values():
        keypoints += [re.escape(word) for word in words]
    point = "|".join(keypoints) if question_type == "keypoint" else _PIXEL
    pattern = re.escape(prompt.rstrip("?"))
    pattern = pattern.replace(r"\{p\}", f"(?:{point})")
    # After its article, a name goes on until a comma, or until words such as " and the" that
    # introduce the second object. \1 is the name of the gap, x or y.
    name = r"(?:(?:the|an?) )?(?P<\1>(?:(?! (?:from|and|to) (?:the|an?) )[^?,])+)"
    return re.sub(r"\\{([xy])\\}", name, pattern)


class _Words(NamedTuple):
    """The words of a question, divided in names and other words.

    Attributes:
        names: the names of objects, in the order of the question.
        question_words: the words and punctuation marks that belong to no name, in the order of the
            question.
        between_names: those of `question_words` that stand between the first two names.
    """

    names: list[str]
    question_words: list[str]
    between_names: list[str]


def _read_words(question: str) -> _Words | None:
    """Divide the words of a question in names and other words.

    Returns:
        The words; None if the question asks for a property that cannot be measured in an image,
        such as "the weight of the mug".
    """
    tokens = _TOKENS.findall(question.casefold().replace("’", "'"))
    names: list[str] = []
    question_words: list[str] = []
    between_names: list[str] = []
    asks_for_property = False
    index = 0
    while index < len(tokens):
        end = _find_end_of_name(tokens, index)
        if end == index:
            question_words.append(tokens[index])
            if len(names) == 1:
                between_names.append(tokens[index])
            index += 1
            continue
        if _is_in_place_of_name(tokens, index, end):
            is_property = tokens[end : end + 1] == ["of"]  # as "weight" in "the weight of the mug"
            asks_for_property |= is_property
            name = _clean_name(tokens[index:end])
            if not is_property and name not in names:
                names.append(name)
        index = end
    if asks_for_property and not WORDS["box"] & set(question_words):
        return None
    return _Words(names, question_words, between_names)


def _find_end_of_name(tokens: Sequence[str], start: int) -> int:
    """Find the end of a name.

    "box" and "can" are words of `VOCABULARY`, but may also be the last word of a name, as in
    "cardboard box". "can" may also be the only word of a name, if it follows an article.

    Args:
        tokens: The words and punctuation marks of the question.
        start: The index at which the name begins.

    Returns:
        The index behind the name; `start` if no name begins there.
    """
    end = start
    while end < len(tokens) and _is_word_of_name(tokens[end]):
        end += 1
    is_after_article = start > 0 and tokens[start - 1] in WORDS["determiners"]
    next_token = tokens[end] if end < len(tokens) else ""
    may_be_name = end > start or (is_after_article and next_token == "can")
    if next_token in ("box", "can") and may_be_name:
        end += 1
    return end


def _is_word_of_name(token: str) -> bool:
    """Return whether a token may be part of a name: a word that is not in `VOCABULARY`."""
    return token not in VOCABULARY and token[0].isalnum()


def _is_in_place_of_name(tokens: Sequence[str], start: int, end: int) -> bool:
    """Return whether tokens[start:end] stand in a place where questions name objects.

    Such a place is after an article, a preposition, a comma, a colon or a measure ("distance mug").
    Another one is the beginning of the question, if a measure, a colon, a comma or "'s" follows
    ("mug distance", "mug: how far").
    """
    if start == 0:
        next_token = tokens[end] if end < len(tokens) else ""
        return next_token in WORDS["measure"] or next_token in (":", ",", "'s")
    last_token = tokens[start - 1]
    return last_token in WORDS_BEFORE_NAMES | WORDS["measure"] or last_token in (",", ":")


def _clean_name(words: Sequence[str]) -> str:
    """Join the words of a name, without a participle at its end ("mug standing")."""
    kept_words = list(words)
    while len(kept_words) > 1 and kept_words[-1].endswith(("ing", "ed")):
        kept_words.pop()
    return " ".join(kept_words)


def _find_type(words: _Words, known_types: Sequence[str]) -> str | None:
    """Find the type of a question by its words."""
    candidates: list[str] = []
    if len(words.names) == 2:
        candidates = _list_types_of_two(set(words.question_words))
    elif len(words.names) == 1:
        candidates = _list_types_of_one(words.question_words)
    for question_type in candidates:
        if question_type in known_types:
            return question_type
    return None


def _list_types_of_two(words: set[str]) -> list[str]:
    """List the types that a question about two objects may have, the likeliest first."""
    if words & WORDS["comparison"]:
        return ["chain_of_thought"]
    if words & WORDS["offset"] and not words & WORDS["box"]:
        return ["offset"]
    return []


def _list_types_of_one(words: Sequence[str]) -> list[str]:
    """List the types that a question about one object may have, the likeliest first."""
    used = set(words)
    is_3d = bool(used & {"3d", "three"})
    if used & WORDS["box"]:
        if "2d" in used and not is_3d:
            return ["where_2d"]
        return ["back_projection"] if used & (WORDS["image"] | {"2d"}) else ["box_vertices"]

    # A point of the object, in space or in the image.
    is_in_image = bool(used & WORDS["image"]) and not is_3d
    is_asked_to_point = _follows(words, "point", {"at", "to"})
    names_point = bool(used & WORDS["point"]) and not is_asked_to_point
    asks_for_point = bool(used & WORDS["keypoint"]) or names_point
    if asks_for_point and not is_in_image and not _asks_for_free_space(words):
        return ["keypoint"]
    if used & WORDS["distance"] and not names_point:
        return ["distance"]
    if is_asked_to_point or used & WORDS["finding"]:
        return ["centre_2d", "where_2d", "keypoint"]
    return []


def _asks_for_free_space(words: Sequence[str]) -> bool:
    """Return whether "space" means a distance, as in "how much space is between …"."""
    return "space" in words and "between" in words


def _follows(words: Sequence[str], first: str, followers: Collection[str]) -> bool:
    """Return whether one of `followers` directly follows the word `first`."""
    return any(
        word == first and follower in followers for word, follower in itertools.pairwise(words)
    )


def _order_names(words: _Words, question_type: str) -> list[str]:
    """Order the names as the gaps {x} and {y} of the type's templates.

    An offset leads from x to y. Questions such as "where is y relative to x" and "how far is y from
    x" name y first.
    """
    names_y_first = bool({"relative", "respect", "from"} & set(words.between_names))
    if question_type == "offset" and names_y_first:
        return words.names[::-1]
    return words.names


def _choose_keypoint(words: _Words) -> str:
    """Choose the taught word for the point of an object that a question asks about."""
    for word in words.question_words:
        if word in KEYPOINT_OF_WORD:
            return KEYPOINT_NAMES[KEYPOINT_OF_WORD[word]][0]
    return KEYPOINT_NAMES["centre"][0]


def describe_untaught(taught_types: Collection[str] | None = None) -> str:
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
