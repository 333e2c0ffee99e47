"""The training stages of recipes.toml, by name: what learns, on what, for how long."""

import tomllib
from pathlib import Path
from typing import Any

from spear.errors import check_known, notice
from spear.train.options import Optimization, Recipe

_EMPTY = Recipe("", "vla", "", "", Optimization(steps=0, lr=0.0), batch_size=1)


def _load() -> dict[str, Recipe]:
    found: dict[str, Recipe] = {}
    for name, table in tomllib.loads(
        Path(__file__).with_suffix(".toml").read_text("utf-8")
    ).items():
        like = found.get(table.pop("like", ""), _EMPTY)
        keys: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in table.items()}
        found[name] = like.with_fields(name=name, **keys)
    return found


RECIPES = _load()


def get_recipe(name: str, **changes: Any) -> Recipe:
    """The recipe of that name, changed; says what is gone where a mapping of its own takes another's place.

    Raises `SpearError` with the nearest name when there is none, and as `Recipe.with_changes` does.
    """
    check_known("recipe", RECIPES, name)
    found = RECIPES[name].with_changes(**changes)
    for key, value in changes.items():
        was = getattr(RECIPES[name], key, None) or getattr(RECIPES[name].optimization, key, None)
        if isinstance(value, dict) and value and (gone := dict(was or {}).keys() - value.keys()):
            notice(
                f"{key} replaces all of recipe {name}'s: {', '.join(sorted(gone))} is not set any more"
            )
    return found
