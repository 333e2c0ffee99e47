"""Which objects a name may mean, by one rule: the same noun, and no word that the object's own name lacks.

So "cube" also means "red cube", "cube (left)", "cubes" and "cube on the tray", and "red cube" no "cube".
"""

from __future__ import annotations

import re
from functools import lru_cache

from spear.labels.questions.templates import SAME

_ASIDE = re.compile(
    r"[(\[,;:]|\b(?:of|on|in|at|by|with|without|from|for|to|under|over|behind|beside|inside|near|next|above|below|"
    r"holding|wearing|carrying|containing|full)\b"
)
"""What ends the part of a name that has the noun at its end."""
_MEASURE = re.compile(r"^(?:an? )?(?:pair|piece|slice|bunch|set|stack|pile|group)s? of ")
_PLURALS = ((r"s$", ""), (r"(?<=[sxzoh])es$", ""), (r"ies$", "y"), (r"ves$", "f"), (r"ves$", "fe"))


def is_a(name: str, kind: str, exact: bool = False) -> bool:
    """Whether `kind` also means an object of that name. Case does not count, nor a number at the end, which
    detectors add. exact: plurals, and words for the same thing (`templates.SAME`), are other nouns."""
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
    forms |= {f"#{i}" for i, group in enumerate(SAME) if forms & set(group)}
    return head[-1], frozenset(forms), frozenset(words)
