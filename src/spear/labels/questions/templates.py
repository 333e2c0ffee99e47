"""The wording of the questions (templates.toml), and which objects a name in them may mean."""

import re
import tomllib
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _tuples(section: str) -> Mapping[str, tuple[str, ...]]:
    return {name: tuple(words) for name, words in _DATA[section].items()}


PROMPT_TEMPLATES = _tuples("prompts")
"""Question family → its wordings."""
KEYPOINT_NAMES = _tuples("points")
"""Keypoint → its names."""
UNIT_TEMPLATES = _tuples("units")
"""Unit → how a question says it."""
EVERYDAY_NAMES = _tuples("names")["everyday"]
"""Names of things that one may ask for in vain."""
SYNONYM_GROUPS = tuple(map(frozenset, _DATA["names"]["same"]))
"""Groups of words that people use for the same thing."""
_ASIDE = re.compile(
    r"[(\[,;:]|\b(?:of|on|in|at|by|with|without|from|for|to|under|over|behind|beside|inside|near|next|above|below|"
    r"holding|wearing|carrying|containing|full)\b"
)
"""What ends the part of a name that has the noun at its end."""
_MEASURE = re.compile(r"^(?:an? )?(?:pair|piece|slice|bunch|set|stack|pile|group)s? of ")
_PLURALS = ((r"s$", ""), (r"(?<=[sxzoh])es$", ""), (r"ies$", "y"), (r"ves$", "f"), (r"ves$", "fe"))


def with_article(name: str, definite: bool = True) -> str:
    """The name with its article: "the carrot", or "a carrot" and "an eggplant"."""
    if definite:
        return f"the {name}"
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"


def is_a(name: str, kind: str, exact: bool = False) -> bool:
    """Whether `kind` also means an object of that name: the same noun, and no word that it lacks.

    So "cube" also means "red cube", "cube (left)", "cubes" and "cube on the tray", and "red cube" no "cube".
    Case does not count, nor a number at the end, which detectors add. exact: plurals, and words for the same
    thing (`SAME`), are other nouns.
    """
    (noun, forms, words), (other, others, narrower) = _meaning(name), _meaning(kind)
    return (noun == other if exact else bool(forms & others)) and narrower <= words


@lru_cache(4096)
def _meaning(name: str) -> tuple[str, frozenset[str], frozenset[str]]:
    """A name's noun; all that it may be written as; and the other words, which narrow it."""
    name = " ".join(name.casefold().replace("_", " ").split())
    name = _MEASURE.sub("", re.sub(r"[\s#-]*\d+$", "", name) or name)
    head = re.findall(r"\w+", _ASIDE.split(name)[0]) or re.findall(r"\w+", name) or [name]
    words = set(re.findall(r"\w+", _ASIDE.sub(" ", name))) - {"a", "an", "the", head[-1]}
    forms = {head[-1]} | {re.sub(end, to, head[-1]) for end, to in _PLURALS}
    forms |= {f"#{i}" for i, group in enumerate(SYNONYM_GROUPS) if forms & set(group)}
    return head[-1], frozenset(forms), frozenset(words)
