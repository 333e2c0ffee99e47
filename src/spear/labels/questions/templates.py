"""The prompt templates of questions (templates.toml), and which objects a name in them may mean."""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _read_section(section: str) -> Mapping[str, tuple[str, ...]]:
    return {name: tuple(words) for name, words in _DATA[section].items()}


PROMPT_TEMPLATES = _read_section("prompts")
"""Question type → its templates."""
KEYPOINT_NAMES = _read_section("points")
"""Keypoint → the words for it."""
UNIT_TEMPLATES = _read_section("units")
"""Unit → how a question states it."""
EVERYDAY_NAMES = _read_section("names")["everyday"]
"""Names of things that "exists" asks about when they are absent."""
SYNONYM_GROUPS = tuple(frozenset(words) for words in _DATA["names"]["same"])
"""Groups of words that people use for the same thing."""

_END_OF_NOUN = re.compile(
    r"[(\[,;:]"
    r"|\b(?:of|on|in|at|by|with|without|from|for|to|under|over|behind|beside|inside|near|next"
    r"|above|below|holding|wearing|carrying|containing|full)\b"
)
"""What ends the part of a name whose last word is its noun."""
_MEASURE = re.compile(r"^(?:an? )?(?:pair|piece|slice|bunch|set|stack|pile|group)s? of ")
_PLURAL_ENDINGS = (
    (r"s$", ""),
    (r"(?<=[sxzoh])es$", ""),
    (r"ies$", "y"),
    (r"ves$", "f"),
    (r"ves$", "fe"),
)
"""Endings of plurals, and of their singulars."""


def with_article(name: str, definite: bool = True) -> str:
    """A name with its article.

    Example:
        >>> with_article("carrot"), with_article("eggplant", definite=False)
        ('the carrot', 'an eggplant')
    """
    if definite:
        return f"the {name}"
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def is_a(name: str, kind: str, exact: bool = False) -> bool:
    """Whether `kind` also means an object of this name.

    It does if it has the same noun and no further word that the name lacks. Case does not count,
    nor does a number at the end, which detectors add.

    Args:
        name: The object's name.
        kind: What is asked for.
        exact: Whether plurals, and words for the same thing (`SYNONYM_GROUPS`), count as other
            nouns.

    Example:
        >>> [is_a(name, "cube") for name in ("red cube", "cubes", "cube on the tray", "cube stand")]
        [True, True, True, False]
        >>> is_a("cube", "red cube")
        False
    """
    object_meaning = _parse_name(name)
    kind_meaning = _parse_name(kind)
    if exact:
        is_same_noun = object_meaning.noun == kind_meaning.noun
    else:
        is_same_noun = bool(object_meaning.forms & kind_meaning.forms)
    return is_same_noun and kind_meaning.other_words <= object_meaning.other_words


class _NameMeaning(NamedTuple):
    """A name's noun, everything that the noun may be written as, and the words that narrow it."""

    noun: str
    forms: frozenset[str]
    other_words: frozenset[str]


@lru_cache(4096)
def _parse_name(name: str) -> _NameMeaning:
    name = " ".join(name.casefold().replace("_", " ").split())
    name = re.sub(r"[\s#-]*\d+$", "", name) or name  # the number that detectors add
    name = _MEASURE.sub("", name)

    # The noun is the last word before what only describes it
    head = _END_OF_NOUN.split(name)[0]
    head_words = re.findall(r"\w+", head) or re.findall(r"\w+", name) or [name]
    noun = head_words[-1]
    words = set(re.findall(r"\w+", _END_OF_NOUN.sub(" ", name)))

    forms = {noun}
    for ending, singular_ending in _PLURAL_ENDINGS:
        forms.add(re.sub(ending, singular_ending, noun))
    synonym_forms = {
        f"#{number}" for number, group in enumerate(SYNONYM_GROUPS) if not forms.isdisjoint(group)
    }
    return _NameMeaning(
        noun, frozenset(forms | synonym_forms), frozenset(words - {"a", "an", "the", noun})
    )
