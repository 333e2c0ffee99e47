"""Folders of checkpoints: where they are by name, what they have seen, and what was saved together."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, StrictBool

from spear.errors import SpearError, notice
from spear.util.files import read_json_as

BUNDLED_WEIGHTS = Path(__file__).parents[2] / "weights"
"""Where the weights that come with the package lie: a folder per name."""
_PIECE, _PIECES = 2**16, 64
"""A larger file is known by its size and so many pieces of so many bytes, spread over all of it."""
_APART = "recipe.json", "README.md", "calibration.json"
"""Files that are written later, or by hand."""


def locate(name: str | Path) -> Path:
    """The folder of a checkpoint: a folder itself (or a run's, whose `final` is taken), or a shipped name.

    Raises `SpearError` when there is none, or none yet.
    """
    path, shipped = Path(name), BUNDLED_WEIGHTS / str(name)
    if path.is_dir():
        if path != shipped and (shipped / "config.json").is_file():
            notice(
                f"{path}: this folder is taken, not the weights of that name that come with the package"
            )
        if ((final := path / "final") / "config.json").is_file():
            steps = (
                read_provenance(final)
                .get("recipe", {})
                .get("optimization", {})
                .get("steps", math.inf)
            )
            if any(
                int(saved.name[5:]) > steps
                for saved in path.glob("checkpoints/step-" + 8 * "[0-9]")
            ):
                notice(
                    f"{path}: weights of step {steps:,}, newer are not finished: give its command again"
                )
            return final
        if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
            raise SpearError(f"{path}: its training is not finished: give the same command again")
        return path
    if (shipped / "config.json").is_file():
        return shipped
    names = ", ".join(sorted(p.parent.name for p in BUNDLED_WEIGHTS.glob("*/config.json")))
    known = f"the name of one that comes with this package: {names}"
    raise SpearError(f"no model {str(name)!r}: give a folder with a trained one, or {known}")


def is_simulator_only(folder: Path) -> bool:
    """Whether the model in a folder learned from nothing but the built-in simulator: those that come with the
    package, and those whose training says so. Raises `SpearError` for a broken recipe.json."""
    said = read_provenance(folder).get("simulator_only", False)
    return said or folder.resolve().is_relative_to(BUNDLED_WEIGHTS.resolve())


class Provenance(BaseModel, extra="allow"):
    """What of a recipe.json is asked for; files: of `hash_files`; learned: fingerprints of training data."""

    recipe: dict[str, Any] = {}
    files: dict[str, str] = {}
    learned: str = ""
    simulator_only: StrictBool = False


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """What a trained folder says about itself (recipe.json); nothing where somebody else saved it."""
    path = folder / "recipe.json"
    if not path.is_file():
        return {}
    return read_json_as(Provenance, path, "copy the folder again, or remove this file").model_dump(
        exclude_unset=True
    )


def write_provenance(folder: Path, said: Mapping[str, Any]) -> None:
    """Write what a folder says about itself, and of which files it is whole; the last thing that is saved."""
    text = json.dumps({**said, "files": hash_files(folder)}, indent=1)
    (folder / "recipe.json").write_text(text, encoding="utf-8")


def hash_files(folder: Path) -> dict[str, str]:
    """The files that make up the model in a folder: name → a short hash."""
    found = {}
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name not in _APART):
        size = path.stat().st_size
        digest = hashlib.sha256(str(size).encode())
        with path.open("rb") as file:
            for place in range(0, size, max(_PIECE, size // _PIECES)):
                file.seek(place)
                digest.update(file.read(_PIECE))
        found[path.name] = digest.hexdigest()[:12]
    return found


def warn_about_changed_files(folder: Path) -> None:
    """Say on stderr which files of a trained or converted folder are not those that were saved together.

    Weights with the normalizer.json or the words of another training fit by shape, and act wrongly.
    """
    if other := find_changed_files(folder, read_provenance(folder).get("files", {})):
        notice(
            f"{folder}: {', '.join(other)}: not as saved with the rest: copy the whole folder again"
        )


def find_changed_files(folder: Path, saved: Mapping[str, str]) -> list[str]:
    """Which files of a folder are missing, or others than when these were its `hash_files`."""
    here = hash_files(folder) if saved else {}
    return [name for name in saved if here.get(name) != saved[name]]
