"""The training recipes of recipes.toml, by name.

In that file a recipe is a table of the fields that differ from `_DEFAULTS`, or from the recipe that
its key "like" names.
"""

import tomllib
from pathlib import Path
from typing import Any

from spear.errors import check_known, notice
from spear.train.options import Optimization, Recipe

# The values of keys that neither a recipe nor the one that it is like gives.
_DEFAULTS = Recipe(
    name="",
    kind="vla",
    preset="",
    description="",
    optimization=Optimization(steps=0, lr=0.0),
    batch_size=1,
)


def _load_recipes() -> dict[str, Recipe]:
    """Read all recipes of recipes.toml."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
    recipes: dict[str, Recipe] = {}
    for name, table in tables.items():
        base_name = table.pop("like", "")  # no recipe is named ""
        base = recipes.get(base_name, _DEFAULTS)
        values: dict[str, Any] = {}
        for key, value in table.items():
            # TOML has lists, where recipes have tuples.
            values[key] = tuple(value) if isinstance(value, list) else value
        recipes[name] = base.with_unchecked_changes(name=name, **values)
    return recipes


RECIPES = _load_recipes()


def get_recipe(name: str, **changes: Any) -> Recipe:
    """Return the recipe of that name, with changes.

    If a changed value is a mapping, such as the key "flow" has, it replaces the recipe's whole
    mapping. A notice names the entries that the recipe loses in this way.

    Args:
        name: one of `RECIPES`.
        changes: values by key, as `Recipe.with_changes` takes them.

    Returns:
        The recipe, with a value for each of its keys.

    Raises:
        SpearError: for an unknown recipe, an unknown key or a value that is not allowed.

    Example:
        >>> recipe = get_recipe("nano-post", steps=100)
        >>> recipe.optimization.steps, recipe.preset
        (100, 'nano')
    """
    check_known("recipe", RECIPES, name, advice="`spear recipes` lists them.")
    original = RECIPES[name]
    recipe = original.with_changes(**changes)

    for key, value in changes.items():
        if not isinstance(value, dict) or not value:
            continue
        # The key is a field of the recipe or of its optimization; either may be an empty mapping.
        settings = getattr(original, key, None) or getattr(original.optimization, key, None) or {}
        dropped = sorted(settings.keys() - value.keys())
        if dropped:
            notice(
                f"{key} replaces all settings of recipe {name} under this key. It drops "
                f"{', '.join(dropped)}."
            )
    return recipe
