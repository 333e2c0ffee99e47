"""The training recipes of recipes.toml, by name."""

import tomllib
from pathlib import Path
from typing import Any

from spear.errors import check_known, notice
from spear.train.options import Optimization, Recipe

_DEFAULTS = Recipe("", "vla", "", "", Optimization(steps=0, lr=0.0), batch_size=1)


def _load_recipes() -> dict[str, Recipe]:
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    recipes: dict[str, Recipe] = {}
    for name, table in tables.items():
        base = recipes.get(table.pop("like", ""), _DEFAULTS)
        values: dict[str, Any] = {}
        for key, value in table.items():
            values[key] = tuple(value) if isinstance(value, list) else value
        recipes[name] = base.with_values(name=name, **values)
    return recipes


RECIPES = _load_recipes()


def get_recipe(name: str, **changes: Any) -> Recipe:
    """Return the recipe of that name, with changes.

    A mapping such as `flow` replaces the recipe's as a whole; a notice names the settings that the
    recipe thereby loses.

    Args:
        name: one of `RECIPES`.
        changes: values by key, as `Recipe.with_changes` takes them.

    Raises:
        SpearError: for an unknown name, naming the nearest, and as `Recipe.with_changes` does.
    """
    check_known("recipe", RECIPES, name)
    original = RECIPES[name]
    recipe = original.with_changes(**changes)

    for key, value in changes.items():
        if not isinstance(value, dict) or not value:
            continue
        settings = getattr(original, key, None) or getattr(original.optimization, key, None) or {}
        dropped = sorted(settings.keys() - value.keys())
        if dropped:
            notice(
                f"{key} replaces all settings of recipe {name} under this key. "
                f"No longer set: {', '.join(dropped)}."
            )
    return recipe
