"""Checkpoint folders: finding them by name, the record of their training, and hashes of files.

A folder's recipe.json, its provenance, says how the model was trained. It also has a hash of each
of the other files, by which we notice files that were changed or copied from another folder.
"""

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
"""The folder of the weights that come with the package. It has a folder for each name."""

AUTHORS_SPEAR1 = "spear1-franka"
"""The name of the authors' weights, INSAIT-Institute/spear1-franka, without its owner."""

HASHED_BLOCK_BYTES = 2**16  # length of one hashed block of a file
MAX_HASHED_BLOCKS = 64
"""About how many blocks of a file are hashed. Of a larger file we hash its size and this many
blocks, which are spread evenly over the file, because hashing all of it would take long."""

NOT_HASHED = ("recipe.json", "README.md", "calibration.json")
"""Files of a checkpoint that are written after the hashing, or edited by hand."""


def locate_checkpoint(name: str | Path) -> Path:
    """Find the folder of a checkpoint.

    Args:
        name: The folder of a checkpoint; or the folder of a training, whose subfolder `final` is
            the checkpoint; or the name of weights that come with the package.

    Raises:
        SpearError: There is no such model, or its training is not finished.
    """
    path = Path(name)
    bundled = BUNDLED_WEIGHTS / str(name)
    is_bundled = (bundled / "config.json").is_file()
    if path.is_dir():
        if is_bundled and path != bundled:
            notice(
                f"the folder {path} is used, not the weights of that name that come with the "
                "package."
            )
        superseded_step = _find_final_step_if_superseded(path)
        if superseded_step is not None:
            notice(
                f"{path} has the weights of step {superseded_step:,}, because a longer training "
                "is not finished. Run its command again to use the newer weights."
            )
        return _resolve_finished_weights_folder(path)
    if is_bundled:
        return bundled

    if str(name).lower().endswith(AUTHORS_SPEAR1):
        raise SpearError(
            f"the authors' SPEAR-1, {name}, cannot be loaded yet, because the names of its tensors "
            "are not known (docs/howto/weights.md). Give the folder of a trained model."
        )
    bundled_names = sorted(config.parent.name for config in BUNDLED_WEIGHTS.glob("*/config.json"))
    raise SpearError(
        f"there is no model {str(name)!r}. Give the folder of a trained model, or the name of "
        f"one that comes with this package ({', '.join(bundled_names)})."
    )


def _find_final_step_if_superseded(training_folder: Path) -> int | None:
    """Return the last step of a finished training if a longer one was begun after it, else None.

    A longer training has checkpoints of later steps in `training_folder`.
    """
    final = training_folder / "final"
    if not (final / "config.json").is_file():
        return None
    optimization = read_provenance(final).get("recipe", {}).get("optimization", {})
    # If the number of steps is not recorded, no checkpoint counts as a later one.
    final_step = optimization.get("steps", math.inf)
    eight_digits = "[0-9]" * 8
    for checkpoint in training_folder.glob(f"checkpoints/step-{eight_digits}"):
        if int(checkpoint.name.removeprefix("step-")) > final_step:
            return final_step
    return None


def _resolve_finished_weights_folder(path: Path) -> Path:
    """Return the folder of the finished weights if `path` is that of a training, else `path`."""
    if (path / "final" / "config.json").is_file():
        return path / "final"
    if (path / "checkpoints").is_dir() and not (path / "config.json").is_file():
        raise SpearError(
            f"the training of {path} is not finished. Run the same `spear train` command again."
        )
    return path


def is_simulator_only(folder: Path) -> bool:
    """Return whether the model in a folder was trained only on data of the built-in simulator.

    The weights that come with the package were. Other weights were if their recipe.json has the key
    `simulator_only` with the value true.

    Raises:
        SpearError: The recipe.json is broken.
    """
    if read_provenance(folder).get("simulator_only", False):
        return True
    return folder.resolve().is_relative_to(BUNDLED_WEIGHTS.resolve())


def read_taught_question_types(folder: Path) -> set[str] | None:
    """Read which types of questions the model in a folder was taught, in all of its stages.

    Returns None if its recipe.json names no types of questions.
    """
    taught_types: set[str] = set()
    provenance: Any = read_provenance(folder)
    while provenance:
        recipe = provenance.get("recipe") or {}
        mix = recipe.get("questions") or {}
        asks_questions = recipe.get("kind") == "vlm" or recipe.get("question_images", 0) > 0
        if asks_questions:
            taught_types.update(mix.get("families") or ())  # the recipe's key for question types
        provenance = provenance.get("init")  # of the model that this training began with
    return taught_types or None


class Provenance(BaseModel, extra="allow"):
    """The part of a recipe.json that this package reads.

    recipe          The recipe of the training.
    files           File name -> hash, from `hash_files`.
    learned         Fingerprints of the episodes and images that the model was trained on.
    simulator_only  Whether all of these came from the built-in simulator.
    """

    recipe: dict[str, Any] = {}
    files: dict[str, str] = {}
    learned: str = ""
    simulator_only: StrictBool = False


def read_provenance(folder: Path) -> Mapping[str, Any]:
    """Return the content of a folder's recipe.json, or an empty dict if the folder has none."""
    path = folder / "recipe.json"
    if not path.is_file():
        return {}
    provenance = read_json_as(Provenance, path, "copy the folder again, or remove this file")
    return provenance.model_dump(exclude_unset=True)


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write recipe.json, with the hashes of the folder's files.

    Call this function after all other files are saved.
    """
    text = json.dumps({**provenance, "files": hash_files(folder)}, indent=1)
    (folder / "recipe.json").write_text(text, encoding="utf-8")


def hash_files(folder: Path) -> dict[str, str]:
    """Return a short hash of each file of the checkpoint in a folder, by file name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in NOT_HASHED:
            hashes[path.name] = _hash_size_and_blocks(path)
    return hashes


def _hash_size_and_blocks(path: Path) -> str:
    """Return a hash of a file's size and of blocks of it; see `MAX_HASHED_BLOCKS`."""
    size = path.stat().st_size
    stride = max(HASHED_BLOCK_BYTES, size // MAX_HASHED_BLOCKS)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in range(0, size, stride):
            file.seek(offset)
            digest.update(file.read(HASHED_BLOCK_BYTES))
    return digest.hexdigest()[:12]


def warn_about_changed_files(folder: Path) -> None:
    """Give a notice if files of a trained or converted folder were not saved together.

    Weights and the normalizer.json or tokenizer of another training have the right shapes, so
    loading raises no error, but the robot acts wrongly.
    """
    changed_files = find_changed_files(folder, read_provenance(folder).get("files", {}))
    if changed_files:
        notice(
            f"{', '.join(changed_files)} in {folder} was not saved with the other files. Copy the "
            "whole folder again."
        )


def find_changed_files(folder: Path, saved_hashes: Mapping[str, str]) -> list[str]:
    """Return the files in `saved_hashes` that are missing or have another hash now."""
    if not saved_hashes:
        return []
    present_hashes = hash_files(folder)
    return [name for name, value in saved_hashes.items() if present_hashes.get(name) != value]
