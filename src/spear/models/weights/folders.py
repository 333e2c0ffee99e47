"""Folders of checkpoints: where they are by name, and what they have seen."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spear.errors import SpearError, notice
from spear.util.files import read_json

SHIPPED = Path(__file__).parents[2] / "weights"
"""Where the weights that come with the package lie: a folder per name."""


def locate(name: str | Path) -> Path:
    """The folder of a checkpoint: a folder itself (or a run's, whose `final` is taken), or a shipped name.

    Raises `SpearError` when there is none.
    """
    path, shipped = Path(name), SHIPPED / str(name)
    if path.is_dir():
        if path != shipped and (shipped / "config.json").is_file():
            notice(f"{path}: this folder is taken, not the weights of that name that come with the package")
        return path / "final" if (path / "final" / "config.json").is_file() else path
    if (shipped / "config.json").is_file():
        return shipped
    names = ", ".join(sorted(p.parent.name for p in SHIPPED.glob("*/config.json")))
    known = f"the name of one that comes with this package: {names}"
    raise SpearError(f"no model {str(name)!r}: give a folder with a trained one, or {known}")


def simulator_only(folder: Path) -> bool:
    """Whether the model in a folder learned from nothing but the built-in simulator: those that come with the
    package, and those whose training says so. Raises `SpearError` for a broken recipe.json."""
    said = made_by(folder).get("simulator_only") is True
    return said or folder.resolve().is_relative_to(SHIPPED.resolve())


def made_by(folder: Path) -> Mapping[str, Any]:
    """What a trained folder says about itself (recipe.json); nothing where somebody else saved it."""
    path = folder / "recipe.json"
    return read_json(path, "copy the folder again, or remove this file") if path.is_file() else {}
