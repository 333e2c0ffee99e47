"""The wording of the questions: see templates.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _tuples(section: str) -> Mapping[str, tuple[str, ...]]:
    return {name: tuple(words) for name, words in _DATA[section].items()}


FAMILIES = ("box_vertices", "keypoint", "offset", "distance", "back_projection", "chain_of_thought")
"""The 3D questions about objects."""
FAMILIES_2D = ("what_at", "where_2d", "centre_2d", "exists", "count", "which_side", "left_or_right", "list")
FAMILIES_PIXEL = ("pixel_point",)
"""3D questions that know of no object: the paper's ablation."""

PROMPTS = _tuples("prompts")
"""Question family → its wordings."""
POINTS = _tuples("points")
"""Keypoint → its names."""
UNITS = _tuples("units")
"""Unit → how a question says it."""
EVERYDAY = _tuples("names")["everyday"]
"""Names of things that one may ask for in vain."""
SAME = tuple(map(frozenset, _DATA["names"]["same"]))
"""Groups of words that people use for the same thing."""


def with_article(name: str, definite: bool = True) -> str:
    """The name with its article: "the carrot", or "a carrot" and "an eggplant"."""
    if definite:
        return f"the {name}"
    return f"an {name}" if name[:1].lower() in "aeiou" else f"a {name}"
