"""Checkpoints: folders with a config and safetensors, checked before they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.utils import logging

from spear.errors import SpearError, first_line, unknown_name
from spear.models.weights.shards import Shards, read_config

Model = TypeVar("Model", bound=PreTrainedModel)
_KINDS = {"spear_vlm": "a SPEAR-VLM", "spear1": "a policy"}
_INSTEAD = {
    "spear_vlm": "give the one that it was trained from",
    "spear1": "train one from it with `spear train … --init`",
}
"""What is needed -> what to do with a checkpoint of the other kind."""


def load(cls: type[Model], folder: Path | str, dtype: torch.dtype | None = None) -> Model:
    """The model of a class saved in a folder by `save_pretrained`, in evaluation mode.

    dtype: None keeps that of the file. Raises SpearError, naming the file, when the folder, a shard or a
    weight is missing, a file is truncated, or the checkpoint is of another architecture or shape.
    """
    folder = Path(folder)
    if dtype is not None and not dtype.is_floating_point:
        raise SpearError(f"wrong dtype: {dtype}: weights are floating-point: give float32 or bfloat16")
    _check(cls, folder)
    try:
        with quiet():
            loaded: Any = cls.from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SpearError(f"cannot load checkpoint: {folder}: {first_line(error)}") from error
    model, info = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            names = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info[problem])
            what = f"{len(names)} {problem.replace('_', ' ')}, first {names[0]}"
            raise SpearError(f"checkpoint does not fit its config: {folder}: {what}: save the model again")
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers without progress bars, and without warnings about weights, which we check ourselves."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def architecture(folder: Path) -> str:
    """The `model_type` of a checkpoint folder. Raises SpearError when its config is missing or broken."""
    return str(read_config(folder).get("model_type"))


def _check(cls: type[PreTrainedModel], folder: Path) -> None:
    """Refuse a folder that is not a whole checkpoint of `cls`."""
    if not folder.is_dir():
        raise SpearError(f"checkpoint not found: {folder}: give a folder with config.json and safetensors")
    kind = architecture(folder)
    assert cls.config_class is not None
    wanted = cls.config_class.model_type
    if kind != wanted and kind in _KINDS and wanted in _KINDS:
        raise SpearError(f"{folder}: is {_KINDS[kind]}; {_KINDS[wanted]} is needed: {_INSTEAD[wanted]}")
    if kind != wanted:
        raise unknown_name(f"architecture in {folder / 'config.json'}:", kind, [wanted])
    shards = Shards.open(folder, wanted)
    for key in shards.weights:
        shards.dtype(key)  # refuses quantised ones
