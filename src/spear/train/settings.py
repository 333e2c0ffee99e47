"""The settings of a recipe with their meanings, which the docstrings of its classes say."""

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

from spear.train.options import UNUSED_KEYS, Optimization, QuestionMix, Recipe

IDENTITY_KEYS = ("name", "kind", "description")


@dataclass(frozen=True)
class Setting:
    """A key of `--set`, with the recipe's value as `--set` takes it."""

    key: str
    value: str
    meaning: str


def describe_settings(recipe: Recipe) -> list[Setting]:
    """Return the settings that have an effect in a recipe of this kind.

    Example:
        >>> from spear.train.recipes import get_recipe
        >>> settings = describe_settings(get_recipe("nano-post"))
        >>> [setting.meaning for setting in settings if setting.key == "lr"]
        ['peak learning rate.']
    """
    settings: list[Setting] = []
    for owner in (recipe, recipe.optimization, recipe.questions):
        meanings = _read_meanings(type(owner))
        for field in dataclasses.fields(owner):
            value = getattr(owner, field.name)
            is_hidden = field.name in (*IDENTITY_KEYS, *UNUSED_KEYS[recipe.kind])
            if is_hidden or isinstance(value, Optimization | QuestionMix):
                continue
            settings.append(Setting(field.name, _format_value(value), meanings[field.name]))
    return settings


def _read_meanings(owner: type) -> dict[str, str]:
    """Return what a class's docstring says of each field: its names, spaces, and the meaning.

    The lines of a meaning after the first are indented.
    """
    names = [field.name for field in dataclasses.fields(owner)]
    name = "|".join(sorted(names, key=len, reverse=True))
    entry = re.compile(rf"((?:{name})(?:, (?:{name}))*) +(.+)")
    lines_of_field: dict[str, list[str]] = {}
    current: list[str] = []
    for line in (inspect.getdoc(owner) or "").splitlines():
        match = entry.match(line)
        if match is not None:
            current = [match[2]]
            for field_name in match[1].split(", "):
                lines_of_field[field_name] = current
        elif line.startswith(" "):
            current.append(line.strip())
        else:
            current = []
    return {name: " ".join(lines_of_field.get(name, [])) for name in names}


def _format_value(value: Any) -> str:
    """Return a value as `--set` takes it.

    >>> _format_value((1, 4)), _format_value("bf16"), _format_value(None)
    ('[1,4]', 'bf16', 'null')
    """
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))
