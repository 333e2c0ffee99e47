"""Checkpoints of a run: everything needed to continue as if it had never stopped. No pickle.

A checkpoint is a folder `step-00001000/` with `model.safetensors`, `ema.safetensors`, `optimizer.safetensors`
and `state.json`. It is written under a temporary name and renamed, so it is either whole or absent.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from spear.errors import SpearError

_NAME = re.compile(r"step-(\d{8})$")


def find_latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`, or None."""
    found = [p for p in folder.glob("step-*") if _NAME.search(p.name) and (p / "state.json").is_file()]
    return max(found, default=None, key=lambda p: p.name)


def save(
    folder: Path,
    step: int,
    model: torch.nn.Module,
    ema: dict[str, torch.Tensor] | None,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` and delete all but the newest `keep`."""
    final = folder / f"step-{step:08d}"
    part = folder / f".part-{final.name}-{os.getpid()}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_file(_tensors(model), part / "model.safetensors")
    if ema is not None:
        save_file({k: v.contiguous() for k, v in ema.items()}, part / "ema.safetensors")
    save_file(_optimizer_tensors(optimizer), part / "optimizer.safetensors")
    (part / "state.json").write_text(json.dumps({**state, "step": step}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in sorted(p for p in folder.glob("step-*") if _NAME.search(p.name))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(
    path: Path, model: torch.nn.Module, ema: dict[str, torch.Tensor] | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Put a checkpoint back into `model`, `ema` and `optimizer` (in place); returns its state."""
    try:
        state: dict[str, Any] = json.loads((path / "state.json").read_text())
        weights = load_file(path / "model.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        averaged = load_file(path / "ema.safetensors") if ema is not None else {}
    except (OSError, ValueError, SafetensorError) as err:
        raise SpearError(
            f"checkpoint {path} cannot be read ({err}): delete that folder to continue from the one before"
        ) from err
    with torch.no_grad():
        current = _tensors(model)
        if set(current) != set(weights) or any(current[k].shape != weights[k].shape for k in current):
            raise SpearError(f"checkpoint {path} is of another model: use a new --out folder")
        for key, tensor in current.items():
            tensor.copy_(weights[key])
        if ema is not None:
            for key, tensor in ema.items():
                tensor.copy_(averaged[key])
    _restore_optimizer(optimizer, moments)
    return state


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, tied ones once, as contiguous tensors that share the model's memory."""
    seen: set[int] = set()
    out: dict[str, torch.Tensor] = {}
    for key, tensor in model.state_dict(keep_vars=False).items():
        if tensor.data_ptr() in seen and tensor.numel() > 0:
            continue
        seen.add(tensor.data_ptr())
        out[key] = tensor.contiguous()
    return out


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.contiguous().clone()
        for index, entries in state.items()
        for name, value in entries.items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    entries: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        index, name = key.split(".", 1)
        entries.setdefault(int(index), {})[name] = value
    state = optimizer.state_dict()
    optimizer.load_state_dict({"state": entries, "param_groups": state["param_groups"]})
