"""From a recipe to a trained folder: builds the model, its data and its task, and runs the loop.

The result, `OUT/final`, is a Hugging Face folder (config, safetensors, tokenizer) with `coordinates.json` (3D
tokens), for policies `normalizer.json`, and `recipe.json` (what was trained, how, for how long, on what).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import spear
from spear.data.readers.formats import dataset_name
from spear.data.readers.spec import REGISTRY
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.models.devices import choose_device, keep_freed_memory
from spear.models.fast.linear import HAS_BFLOAT16
from spear.train import loop, parallel
from spear.train.build import build
from spear.train.loop import RunOptions
from spear.train.options import Inputs, Optimization, Recipe
from spear.util.ledger import add_files


def train(
    stage: Recipe, out: Path, inputs: Inputs, how: RunOptions | None = None, device: str = "auto"
) -> Path:
    """Run a recipe and return `out/final`.

    device: as for `choose_device`; it replaces that of `how`. Raises `SpearError` for data or a device that
    is missing, or as `build` and `loop.run` do.
    """
    started = time.time()
    earlier = None if inputs.init is None else _made_by(inputs.init)
    place = choose_device(device)
    how = dataclasses.replace(how or RunOptions(), device=place)
    if place.type == "cpu":
        keep_freed_memory()
    parallel.start(place)
    settled = for_device(stage.optimization, place)
    if settled != stage.optimization and not how.quiet and parallel.rank() == 0:
        print("note: this CPU does not compute in bfloat16: training in float32", file=sys.stderr)
    stage = dataclasses.replace(stage, optimization=loop.divided(settled, out))
    model, task, save = build(stage, inputs, how.seed)
    averaged = loop.run(task, stage.optimization, out, how, _about(stage, inputs))
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for key, value in averaged.items():
            parameters[key].copy_(value)
    if parallel.is_sharded(model):
        parallel.unshard(model)
    final = out / "final"
    if parallel.rank() == 0:
        torch.nn.Module.to(model, "cpu", torch.float32)  # wherever and in whatever precision it was trained
        part = out / ".part-final"
        shutil.rmtree(part, ignore_errors=True)
        save(part)
        written = {
            "recipe": dataclasses.asdict(stage),
            "seed": how.seed,
            "init": earlier,
            "minutes": round((time.time() - started) / 60, 2),
            "processes": parallel.world(),
            "sharded": how.sharded,
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "spear": spear.__version__,
            "torch": torch.__version__,
        }
        (part / "recipe.json").write_text(json.dumps(written, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        part.replace(final)
    parallel.wait()
    return final


def for_device(opt: Optimization, device: torch.device) -> Optimization:
    """What is asked for; in float32 on a CPU that does not compute in bfloat16."""
    if opt.precision == "fp32" or device.type != "cpu" or HAS_BFLOAT16:
        return opt
    return dataclasses.replace(opt, precision="fp32", frozen_precision="fp32")


_MAY_CHANGE = ("optimization", "batch_size", "description", "starts_from")
"""Fields of a recipe that may change while a run is continued."""


def _about(stage: Recipe, inputs: Inputs) -> dict[str, Any]:
    """What a run is of, as JSON gives it back: its recipe, what it learns from and what it begins with."""
    recipe = {k: v for k, v in dataclasses.asdict(stage).items() if k not in _MAY_CHANGE}
    stores = [(name, f"{len(store)} episodes, share {share:g}") for name, store, share in inputs.episodes]
    given = {"--labels": inputs.labels, "--init": inputs.init, "--moge": inputs.moge}
    marks: dict[str, str | None] = dict.fromkeys(given)
    for name, folder in given.items():
        if folder is not None:
            digest = hashlib.sha256()
            add_files(digest, folder, ("*.parquet", "*.safetensors"))
            marks[name] = digest.hexdigest()[:12]
    about: dict[str, Any] = json.loads(json.dumps({**recipe, "--episodes": stores, **marks}))
    return about


def _made_by(folder: Path) -> Any:
    """What a trained folder says about itself; nothing where somebody else saved it."""
    path = folder / "recipe.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise SpearError(f"{path}: not JSON ({error}): copy the folder again, or remove this file") from error


def mixture(
    folders: Sequence[Path], stores: Sequence[EpisodeStore], shares: Sequence[float]
) -> list[tuple[str, EpisodeStore, float]]:
    """Datasets with their names and shares of each batch, as `Inputs.episodes`.

    shares: one for each; none: those of the list of known datasets where all are in it, otherwise equal ones.
    Several datasets and their shares are said on stderr.
    """
    sources = [store.source(0).partition("/")[0] for store in stores]
    known = [REGISTRY[name].weight if name in REGISTRY else None for name in sources]
    chosen = list(shares) or [w for w in known if w is not None]
    if len(chosen) != len(stores):
        chosen = [1.0] * len(stores)
    if len(stores) > 1 and os.environ.get("RANK", "0") == "0":
        parts = (f"{name} {share / sum(chosen):.1%}" for name, share in zip(sources, chosen, strict=True))
        print(f"mixture: {', '.join(parts)}", file=sys.stderr)
    return list(zip(map(dataset_name, folders), stores, chosen, strict=True))
