"""From a recipe's name to a trained folder: builds the model, its data and its task, and runs the loop.

The result, `OUT/final`, is a Hugging Face folder (config, safetensors, tokenizer) with `coordinates.json` (3D
tokens), for policies `normalizer.json`, and `recipe.json` (what was trained, how, for how long, on what).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import spear
from spear.data.store.episode_store import EpisodeStore
from spear.errors import SpearError
from spear.train import loop, parallel, sharding
from spear.train.allocator import keep_freed_memory
from spear.train.build import build
from spear.train.devices import choose_device, for_device
from spear.train.recipes import Recipe, recipe
from spear.util.ledger import add_files


def train(
    wanted: str | Recipe,
    out: Path,
    labels: Path | None = None,
    episodes: Sequence[tuple[str, EpisodeStore, float]] = (),
    init: Path | None = None,
    moge: Path | None = None,
    seed: int = 0,
    workers: int = 1,
    save_every: int = 500,
    log_every: int = 20,
    quiet: bool = False,
    device: str = "auto",
    sharded: bool = False,
    **overrides: Any,
) -> Path:
    """Run the recipe `wanted` (or that of this name) and return `out/final`.

    labels    folder of labelled images ("depth" and "vlm" recipes; "vla": for the questions alongside).
    episodes  (name, store, weight) of robot demonstrations ("vla").
    init      the `final` folder of the recipe's earlier stage; None starts from random weights.
    moge      the `final` folder of a "depth" recipe, to begin SPEAR-VLM with its encoder.
    device    auto, cpu, cuda or cuda:N (`spear.train.devices`).
    sharded   weights, gradients, moments and averages are divided among the processes
              (`spear.train.sharding`).
    overrides fields of the recipe or of its `Optimization` (steps, lr, batch_size, …).

    Raises `SpearError` for an unknown recipe or field, data or a device that is missing, or as `loop.run`
    does.
    """
    started = time.time()
    stage = (recipe(wanted) if isinstance(wanted, str) else wanted).changed(**overrides)
    earlier = None if init is None else _made_by(init)
    place = choose_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    parallel.start(place)
    settled = for_device(stage.optimization, place)
    in_float32 = settled != stage.optimization
    stage = dataclasses.replace(stage, optimization=settled)
    stage = stage.changed(accumulate=loop.divided(stage.optimization, out).accumulate)
    model, task, save = build(stage, labels, episodes, init, moge, seed)
    if in_float32 and not quiet and parallel.rank() == 0:
        print("note: this CPU does not compute in bfloat16: training in float32", file=sys.stderr)
    about = _about(stage, labels, episodes, init, moge)
    averaged = loop.run(
        task, stage.optimization, out, seed, workers, save_every, log_every, quiet, place, sharded, about
    )
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for key, value in averaged.items():
            parameters[key].copy_(value)
    if sharding.is_sharded(model):
        sharding.unshard(model)
    final = out / "final"
    if parallel.rank() > 0:
        parallel.wait()
        return final
    torch.nn.Module.to(model, "cpu", torch.float32)  # wherever and in whatever it was trained
    part = out / ".part-final"
    shutil.rmtree(part, ignore_errors=True)
    save(part)
    (part / "recipe.json").write_text(
        json.dumps(
            {
                "recipe": dataclasses.asdict(stage),
                "seed": seed,
                "init": earlier,
                "minutes": round((time.time() - started) / 60, 2),
                "processes": parallel.world(),
                "sharded": sharded,
                "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
                "spear": spear.__version__,
                "torch": torch.__version__,
            },
            indent=1,
        )
    )
    shutil.rmtree(final, ignore_errors=True)
    part.replace(final)
    parallel.wait()
    return final


_MAY_CHANGE = ("optimization", "batch_size", "description", "starts_from")
"""Fields of a recipe with other values of which a run may be continued."""


def _about(
    stage: Recipe,
    labels: Path | None,
    episodes: Sequence[tuple[str, EpisodeStore, float]],
    init: Path | None,
    moge: Path | None,
) -> dict[str, Any]:
    """What a run is of, as JSON gives it back: its recipe, what it learns from and what it begins with."""
    recipe = {k: v for k, v in dataclasses.asdict(stage).items() if k not in _MAY_CHANGE}
    stores = [(name, f"{len(store)} episodes, share {weight:g}") for name, store, weight in episodes]
    given = {"--labels": labels, "--init": init, "--moge": moge}
    marks = {name: None if folder is None else _mark(folder) for name, folder in given.items()}
    about: dict[str, Any] = json.loads(json.dumps({**recipe, "--episodes": stores, **marks}))
    return about


def _mark(folder: Path) -> str:
    digest = hashlib.sha256()
    add_files(digest, folder, ("*.parquet", "*.safetensors"))
    return digest.hexdigest()[:12]


def _made_by(folder: Path) -> Any:
    """What a trained folder says about itself; nothing where somebody else saved it."""
    path = folder / "recipe.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise SpearError(f"{path}: not JSON ({error}): copy the folder again, or remove this file") from error
