"""Batches whose loss or gradient is not finite: kept, to look at and to try again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

FOLDER = "not-finite"
"""Where in a run's folder they are."""


class NotFinite(Exception):
    """A step that was not done, because its loss or its gradient is not finite; the weights are as before.

    what      "loss" or "gradient".
    suspects  which of this process's pieces, from 0, may be why: those with such a loss, or all for a
              gradient.
    values    the loss, its parts and the gradient's norm.
    """

    def __init__(self, what: str, suspects: list[int], values: dict[str, float]) -> None:
        super().__init__(what)
        self.what, self.suspects, self.values = what, suspects, values


def save_batch(out: Path, step: int, number: int, seed: int, batch: dict[str, Any]) -> Path:
    """Write a piece's batch under `out`: its tensors (safetensors), and what else is in it as JSON.

    number: of the piece, which with the seed gives its random numbers
        (`spear.train.optimize.step_generator`).
    """
    tensors, others = _flat(batch)
    path = out / FOLDER / f"step-{step + 1:08d}-piece-{number:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"step": step, "number": number, "seed": seed, "others": others}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, {"batch": json.dumps(about)})
    return path


def load_batch(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """A batch that `save_batch` wrote, and its step (from 0), number and seed."""
    batch: dict[str, Any] = {}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["batch"])
        values = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    for key, value in {**values, **about.pop("others")}.items():
        *folders, name = key.split("/")
        place = batch
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return batch, about


def _flat(batch: dict[str, Any], prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and anything else, by path: "questions/input_ids"."""
    tensors: dict[str, torch.Tensor] = {}
    others: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, dict):
            inner, rest = _flat(value, f"{prefix}{key}/")
            tensors |= inner
            others |= rest
        elif isinstance(value, torch.Tensor):
            tensors[prefix + key] = value
        else:
            others[prefix + key] = value
    return tensors, others
