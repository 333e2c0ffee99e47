"""The settings of a recipe, each with the meaning that the docstring of its class gives.

The classes are `Recipe` and its parts `Optimization` and `QuestionMix`. Their docstrings have an
entry for each field, which this file reads.
"""

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass
from typing import Any

from spear.train.options import UNUSED_KEYS, Optimization, QuestionMix, Recipe

# Fields of `Recipe` that say which recipe it is, and that `--set` does not change.
IDENTITY_KEYS = ("name", "kind", "description")


@dataclass(frozen=True)
class Setting:
    """A key of `--set` with the recipe's value and the meaning of the key."""

    key: str
    value: str  # in the form that `--set` accepts
    meaning: str


def list_settings(recipe: Recipe) -> list[Setting]:
    """Return the recipe's settings, without those that have no effect in a recipe of its kind.

    Example:
        >>> from spear.train.recipes import get_recipe
        >>> settings = list_settings(get_recipe("nano-post"))
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
            settings.append(
                Setting(field.name, _format_for_set_option(value), meanings[field.name])
            )
    return settings


def _read_meanings(owner: type) -> dict[str, str]:
    """Return what the docstring of the class `owner` says about each field, by the field's name.

    An entry of the docstring consists of a field's name (or several, separated by ", "), spaces,
    and the meaning: "lr, warmup  peak learning rate, and steps until it". Further lines of a
    meaning are indented.
    """
    names = [field.name for field in dataclasses.fields(owner)]
    # Longer names come first, so that a name is not taken for the beginning of a longer one.
    any_name = "|".join(sorted(names, key=len, reverse=True))
    entry_pattern = re.compile(rf"((?:{any_name})(?:, (?:{any_name}))*) +(.+)")
    lines_of_field: dict[str, list[str]] = {}
    entry_lines: list[str] = []  # the meaning of the present entry, to which lines are added
    for line in (inspect.getdoc(owner) or "").splitlines():
        match = entry_pattern.match(line)
        if match is not None:
            entry_names, first_line = match.groups()
            entry_lines = [first_line]
            for name in entry_names.split(", "):
                lines_of_field[name] = entry_lines
        elif line.startswith(" "):
            entry_lines.append(line.strip())
        else:
            entry_lines = []  # a line outside of any entry; what follows it belongs to no field
    return {name: " ".join(lines_of_field.get(name, [])) for name in names}


def _format_for_set_option(value: Any) -> str:
    """Return a value in the form that `--set` accepts.

    >>> _format_for_set_option((1, 4)), _format_for_set_option("bf16"), _format_for_set_option(None)
    ('[1,4]', 'bf16', 'null')
    """
    if isinstance(value, str):
        return value
    return json.dumps(value, separators=(",", ":"))
