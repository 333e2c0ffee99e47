"""Words of questions that all question types share, and which objects a name may mean.

The words are in templates.toml. The prompt templates of each question type are in its file in the
folder `types`.

The noun of a name is the word that says what kind of object it is: "cube" in "red cube on the
tray". The other words describe the object.
"""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _read_section(section: str) -> Mapping[str, tuple[str, ...]]:
    return {name: tuple(words) for name, words in _DATA[section].items()}


KEYPOINT_NAMES = _read_section("points")
"""Name of a keypoint in labels → the words for the keypoint in questions."""
UNIT_TEMPLATES = _read_section("units")
"""Unit → templates that state the unit, with the gap {} for the prompt."""
EVERYDAY_NAMES = _read_section("names")["everyday"]
"""Names of objects. The question types "exists" and "count" ask about those that the image does not
show."""
SYNONYM_GROUPS = tuple(frozenset(words) for words in _DATA["names"]["same"])
"""Groups of words that people use for the same thing."""

_END_OF_NOUN = re.compile(
    r"[(\[,;:]"
    r"|\b(?:of|on|in|at|by|with|without|from|for|to|under|over|behind|beside|inside|near|next"
    r"|above|below|holding|wearing|carrying|containing|full)\b"
)
"""Matches what follows a name's noun: "of" in "cup of tea", or a bracket. The noun is the last word
before it."""
_MEASURE = re.compile(r"^(?:an? )?(?:pair|piece|slice|bunch|set|stack|pile|group)s? of ")
"""Matches the beginning of names such as "a pair of scissors", whose noun follows "of"."""
_PLURAL_ENDINGS = (
    (r"s$", ""),
    (r"(?<=[sxzoh])es$", ""),
    (r"ies$", "y"),
    (r"ves$", "f"),
    (r"ves$", "fe"),
)
"""Pairs of a plural's ending and its singular's ending."""


def with_article(name: str, definite: bool = True) -> str:
    """A name with its article.

    Example:
        >>> with_article("carrot"), with_article("eggplant", definite=False)
        ('the carrot', 'an eggplant')
    """
    if definite:
        return f"the {name}"
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def can_be_called(object_name: str, asked_name: str, exact_noun: bool = False) -> bool:
    """Whether the name in a question may also mean an object with another name.

    This is so if both have the same noun, and the asked name has no other word that the object's
    name lacks. Case is ignored, and so is a number at the end, which detectors add ("cup 2").

    Args:
        object_name: The object's name.
        asked_name: The name in a question.
        exact_noun: With True, plurals and synonyms (`SYNONYM_GROUPS`) are different nouns. With
            False, they are the same noun.

    Example:
        >>> [can_be_called(name, "cube") for name in ("red cube", "cubes", "cube on the tray")]
        [True, True, True]
        >>> can_be_called("cube stand", "cube")
        False
        >>> can_be_called("cube", "red cube")
        False
    """
    object_meaning = _parse_name(object_name)
    asked_meaning = _parse_name(asked_name)
    if exact_noun:
        is_same_noun = object_meaning.noun == asked_meaning.noun
    else:
        is_same_noun = bool(object_meaning.forms & asked_meaning.forms)
    return is_same_noun and asked_meaning.other_words <= object_meaning.other_words


class _NameMeaning(NamedTuple):
    """The parts of a name.

    Attributes:
        noun: The word that says what kind of object it is.
        forms: The noun, its possible singulars, and a mark such as "#3" for each group of synonyms
            that contains one of them. Two nouns mean the same if they have a form in common.
        other_words: The other words, without articles.
    """

    noun: str
    forms: frozenset[str]
    other_words: frozenset[str]


@lru_cache(4096)
def _parse_name(name: str) -> _NameMeaning:
    """Divide a name into its noun and its other words."""
    name = " ".join(name.casefold().replace("_", " ").split())
    name = re.sub(r"[\s#-]*\d+$", "", name) or name  # drop the number that detectors add
    name = _MEASURE.sub("", name)

    # The head is the part of the name before a word such as "of", or before a bracket. The noun is
    # the last word of the head, or of the whole name if the head is empty.
    head = _END_OF_NOUN.split(name)[0]
    head_words = re.findall(r"\w+", head) or re.findall(r"\w+", name) or [name]
    noun = head_words[-1]
    words = set(re.findall(r"\w+", _END_OF_NOUN.sub(" ", name)))  # without words such as "of"

    forms = {noun}
    for ending, singular_ending in _PLURAL_ENDINGS:
        forms.add(re.sub(ending, singular_ending, noun))
    synonym_forms = {
        f"#{number}" for number, group in enumerate(SYNONYM_GROUPS) if forms.intersection(group)
    }
    other_words = words - {"a", "an", "the", noun}
    return _NameMeaning(noun, frozenset(forms | synonym_forms), frozenset(other_words))
