"""Checkpoint folders: where they are by name, what they were trained on, and which files belong
together."""

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
"""Where the weights that come with the package are: a folder per name."""

HASHED_BLOCK_BYTES = 2**16
MAX_HASHED_BLOCKS = 64
"""Of a file larger than so many blocks, blocks spread over all of it are hashed, and its size."""

NOT_HASHED = ("recipe.json", "README.md", "calibration.json")
"""Files that are written later, or by hand."""


def locate(name: str | Path) -> Path:
    """Find the folder of a checkpoint.

    Args:
        name: A folder; or the folder of a training, whose `final` is taken; or the name of weights
            that come with the package.

    Raises:
        SpearError: If there is no such model, or its training is not finished.
    """
    path = Path(name)
    bundled = BUNDLED_WEIGHTS / str(name)
    is_bundled = (bundled / "config.json").is_file()
    if path.is_dir():
        if is_bundled and path != bundled:
            notice(
                f"{path}: this folder is used, not the weights of that name that come with the"
                " package."
            )
        superseded_step = _find_superseded_step(path)
        if superseded_step is not None:
            notice(
                f"{path}: these are the weights of step {superseded_step:,}; a longer training is"
                " not finished. Run its command again to use the newer weights."
            )
        return _resolve_training_folder(path)
    if is_bundled:
        return bundled

    bundled_names = sorted(config.parent.name for config in BUNDLED_WEIGHTS.glob("*/config.json"))
    raise SpearError(
        f"no model {str(name)!r}. Give the folder of a trained model, or the name of one that comes"
        f" with this package: {', '.join(bundled_names)}."
    )


def _find_superseded_step(path: Path) -> int | None:
    """Return the step of a training's finished weights if later steps were begun, else None."""
    final = path / "final"
    if not (final / "config.json").is_file():
        return None
    optimization = read_provenance(final).get("recipe", {}).get("optimization", {})
    final_step = optimization.get("steps", math.inf)
    digits = "[0-9]" * 8
    for checkpoint in path.glob(f"checkpoints/step-{digits}"):
        if int(checkpoint.name.removeprefix("step-")) > final_step:
            return final_step
    return None


def _resolve_training_folder(path: Path) -> Path:
    """Return the folder of the finished weights where `path` is that of a training, else `path`."""
    if (path / "final" / "config.json").is_file():
        return path / "final"
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        raise SpearError(
            f"{path}: its training is not finished. Run the same `spear train` command again."
        )
    return path


def is_simulator_only(folder: Path) -> bool:
    """Return whether the model in a folder learned from nothing but the built-in simulator.

    This holds for the weights that come with the package, and for those whose recipe.json says so.
    Raises `SpearError` for a broken recipe.json.
    """
    if read_provenance(folder).get("simulator_only", False):
        return True
    return folder.resolve().is_relative_to(BUNDLED_WEIGHTS.resolve())


class Provenance(BaseModel, extra="allow"):
    """What this package reads of a recipe.json.

    recipe          the recipe that the model was trained by.
    files           of `hash_files`.
    learned         fingerprints of the episodes and images it was trained on.
    simulator_only  whether these came from nothing but the built-in simulator.
    """

    recipe: dict[str, Any] = {}
    files: dict[str, str] = {}
    learned: str = ""
    simulator_only: StrictBool = False


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """Return the recipe.json of a trained folder; an empty one where something else saved it."""
    path = folder / "recipe.json"
    if not path.is_file():
        return {}
    provenance = read_json_as(Provenance, path, "copy the folder again, or remove this file")
    return provenance.model_dump(exclude_unset=True)


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write recipe.json, with the hashes of the folder's files. Call it after all of them are
    saved."""
    text = json.dumps({**provenance, "files": hash_files(folder)}, indent=1)
    (folder / "recipe.json").write_text(text, encoding="utf-8")


def hash_files(folder: Path) -> dict[str, str]:
    """Return the files that make up the model in a folder: name -> a short hash."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in NOT_HASHED:
            hashes[path.name] = _hash_file(path)
    return hashes


def _hash_file(path: Path) -> str:
    size = path.stat().st_size
    stride = max(HASHED_BLOCK_BYTES, size // MAX_HASHED_BLOCKS)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            digest.update(file.read(HASHED_BLOCK_BYTES))
    return digest.hexdigest()[:12]


def warn_about_changed_files(folder: Path) -> None:
    """Give a notice if files of a trained or converted folder are not those that were saved
    together.

    Weights with the normalizer.json or the tokenizer of another training fit by shape, and act
    wrongly.
    """
    changed = find_changed_files(folder, read_provenance(folder).get("files", {}))
    if changed:
        notice(
            f"{folder}: {', '.join(changed)}: not as saved with the other files."
            " Copy the whole folder again."
        )


def find_changed_files(folder: Path, saved_hashes: Mapping[str, str]) -> list[str]:
    """Return which of the files are missing, or have another hash than `hash_files` gave then."""
    if not saved_hashes:
        return []
    present_hashes = hash_files(folder)
    return [name for name, value in saved_hashes.items() if present_hashes.get(name) != value]
