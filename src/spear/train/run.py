"""From a recipe to a trained folder: builds the model, its data and its task, and runs the loop.

The result, `OUT/final`, is a Hugging Face folder (config, safetensors, tokenizer) with `coordinates.json` (3D
tokens), for policies `normalizer.json` and `seen.json`, and `recipe.json` (what was trained, how, on what).
"""

import dataclasses
import filecmp
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

import spear
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import check_holds_no_input, get_dataset_name
from spear.data.store.episode_store import EpisodeStore
from spear.errors import is_first_process, notice
from spear.models.devices import choose_device, keep_freed_memory
from spear.models.weights.folders import (
    hash_files,
    is_simulator_only,
    read_provenance,
    write_provenance,
)
from spear.models.weights.load import StoredCheckpoint
from spear.train import build, loop, parallel
from spear.train.checkpoint import find_newest
from spear.train.loop import RunOptions
from spear.train.options import Recipe, TrainingInputs
from spear.util.files import check_writable
from spear.util.fingerprints import hash_file_ends, list_files_recursively
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import to_plain_json

EPISODES = "--episodes", "cameras, images or instructions of --episodes"
TEXTS = "config.json", "coordinates.json", "processor.json", "tokenizer.json", "wording.txt"
"""What a run is of, besides its recipe and weights; earlier checkpoints have `--episodes` alone."""


def train(
    stage: Recipe,
    out: Path,
    inputs: TrainingInputs,
    how: RunOptions | None = None,
    device: str = "auto",
) -> Path:
    """Run a recipe and return `out/final`. Episodes that failed are left out, unless the run began with them.

    device: as for `choose_device`; it replaces that of `how`. Raises `SpearError` for data or a device that
    is missing, or as `build` and `loop.run` do.
    """
    how = how or RunOptions()
    found, key = find_newest(out / "checkpoints"), EPISODES[0]
    if (
        not found or found[1]["settings"]["about"].get(key) != _of_episodes(inputs)[key]
    ):  # did not begin so
        kept = [
            (name, store.select_demonstrations(), share) for name, store, share in inputs.episodes
        ]
        inputs = dataclasses.replace(inputs, episodes=kept)
    asked = stage.optimization
    stage, place, about = check(stage, out, inputs, how, device)
    begun_with = None if inputs.init is None else read_provenance(inputs.init)
    how = dataclasses.replace(how, device=place)
    if place.type == "cpu":
        keep_freed_memory()
    opt, single, steps = stage.optimization, parallel.get_world_size() == 1, asked.steps
    why = "as it began" if found else "faster on this CPU"
    changing = {"batch_size": stage.batch_size}
    earlier = (
        loop.list_earlier_settings(found[1], {**dataclasses.asdict(opt), **changing})
        if found
        else []
    )
    size = (
        stage.batch_size / opt.accumulate / parallel.get_world_size() if stage.committed else 0
    )  # `with_mistakes`
    otherwise = found is not None and earlier != found[1]["earlier"]
    was = ", ".join(f"{name} {value}" for name, value in earlier[-1].items()) if otherwise else ""
    notes = {
        f"training in float32, {why}": opt.precision != asked.precision,
        f"a batch keeps its pieces: accumulate is {opt.accumulate}": opt.accumulate
        != asked.accumulate,
        f"goes on otherwise than before: {was}": otherwise,
        f"lr is not reached: warmup takes {asked.warmup} steps of {steps}": 0
        < steps
        < asked.warmup,
        f"committed learns from smaller mistakes: {size:g} samples in a piece": 0 < size < 4,
        "--parallel fsdp: there is one process, which holds all (see torchrun)": how.sharded
        and single,
    }
    for words in (w for w, so in notes.items() if so):
        notice(words)
    model, task, save = build.build(stage, inputs, how.seed)
    averaged = loop.run(task, opt, out, how, about, changing)
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for key, value in averaged.items():
            parameters[key].copy_(value)
    if parallel.is_sharded(model):
        parallel.unshard(model)
    final, found = out / "final", find_newest(out / "checkpoints")
    if parallel.get_rank() == 0:
        torch.nn.Module.to(
            model, "cpu", torch.float32
        )  # wherever and in whatever precision it was trained
        learned = (begun_with or {}).get("learned", "").split()
        learned += (
            mark for _, store, _ in inputs.episodes for mark in store.episode_fingerprints()
        )
        learned += samples.marks() if (samples := getattr(task, "questions", None)) else ()
        written = {
            "recipe": dataclasses.asdict(stage),
            "earlier": earlier,  # what it said before it was changed
            "seed": how.seed,
            "init": begun_with
            and {key: said for key, said in begun_with.items() if key != "learned"},
            "simulator_only": _simulator_only(inputs),
            "learned": " ".join(dict.fromkeys(learned)),
            "minutes": round(found[1]["minutes"], 2) if found else 0.0,
            "processes": parallel.get_world_size(),
            "sharded": how.sharded and not single,
            "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "spear": spear.__version__,
            "torch": torch.__version__,
        }
        with acquire_run_lock(out, "training into"):
            part = out / ".part-final"
            if (
                not final.is_dir() and (part / "recipe.json").is_file()
            ):  # it ended as this was put in place
                part.replace(final)
            shutil.rmtree(part, ignore_errors=True)
            save(part)
            write_provenance(part, written)
            if final.is_dir() and _same(part, final):  # a calibration stays
                (part / "recipe.json").replace(final / "recipe.json")
            else:
                for own in final.glob("*"):  # a card, say
                    if (
                        own.suffix not in (".json", ".safetensors")
                        and not (part / own.name).exists()
                    ):
                        (shutil.copytree if own.is_dir() else shutil.copy2)(own, part / own.name)
                shutil.rmtree(final, ignore_errors=True)
                part.replace(final)
            shutil.rmtree(part, ignore_errors=True)
    parallel.wait_for_all_processes()
    return final


def _same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same model; of large files `hash_files` sees but a part."""
    names = hash_files(one)
    return names == hash_files(other) and all(
        filecmp.cmp(one / n, other / n, shallow=False) for n in names
    )


def check(
    stage: Recipe, out: Path, inputs: TrainingInputs, how: RunOptions, device: str
) -> tuple[Recipe, torch.device, dict[str, Any]]:
    """Raises `SpearError` for what is wrong with a run, as far as a moment's look can tell; returns its
    recipe as it is `settled`, its device, and what it is of. Demonstrations may be still to make."""
    place = choose_device(device)
    check_holds_no_input(out, "train")
    parallel.join_process_group(place)
    stage = dataclasses.replace(
        stage, optimization=loop.resolve_optimization(stage.optimization, out, place)
    )
    build.check(stage, inputs)
    stage = dataclasses.replace(stage, normalization=build.normalization(stage, inputs.init))
    for begun_with in filter(None, (inputs.init, inputs.moge)):
        read_provenance(begun_with)  # what they say is a part of the result
    about = _about(stage, inputs)
    known = {k: v for k, v in about.items() if k not in EPISODES or inputs.episodes}
    loop.find_checkpoint_to_resume(out, how.seed, known, stage.optimization.steps)
    check_writable(out / "log.jsonl")
    return stage, place, about


def _about(stage: Recipe, inputs: TrainingInputs) -> dict[str, Any]:
    """What a run is of, as JSON gives it back: its recipe, what it learns from and what it begins with."""
    may_change = ("optimization", "batch_size", "description")  # while a run is continued
    recipe = {k: v for k, v in dataclasses.asdict(stage).items() if k not in may_change}
    given = {"--labels": inputs.labels, "--init": [inputs.init], "--moge": [inputs.moge]}
    marks: dict[str, str | None] = {}
    for name, folders in given.items():
        for key, kinds in (
            (name, ("*.parquet", "*.safetensors")),
            (f"settings or words of {name}", TEXTS),
        ):
            there = [folder for folder in folders if folder is not None]
            marks[key] = hash_file_ends(there, kinds)[:12] if there else None
    for name, folder in (("--init", inputs.init), ("--moge", inputs.moge)):
        marks[f"weights of {name}"] = (
            StoredCheckpoint.open(folder, name).digest()[:12] if folder else None
        )
    opt = {
        k: getattr(stage.optimization, k) for k in ("frozen", "trained")
    }  # else averages would be lost
    return to_plain_json({**recipe, **opt, **_of_episodes(inputs), **marks})


def _of_episodes(inputs: TrainingInputs) -> dict[str, Any]:
    """The part of `_about` that the episodes have, without a look at other files."""
    stores = [
        [n, f"{len(s)} episodes ({s.fingerprint()[:12]}), share {w:g}"]
        for n, s, w in inputs.episodes
    ]
    shown = [s.fingerprint(seen=True)[:12] for _, s, _ in inputs.episodes]
    return dict(zip(EPISODES, (stores, shown), strict=True))


def _simulator_only(inputs: TrainingInputs) -> bool:
    """Whether nothing but the built-in simulator was seen, here and by what this starts from."""
    shards = [
        path
        for folder in inputs.labels
        for path in list_files_recursively(folder, "labels*.parquet")
    ]
    sources = [
        s.as_py() for path in shards for s in pq.read_table(path, columns=["source"])["source"]
    ]
    sources += [store.source(i) for _, store, _ in inputs.episodes for i in range(len(store))]
    before = all(
        is_simulator_only(folder) for folder in (inputs.init, inputs.moge) if folder is not None
    )
    return before and all(source.startswith(("sim:", "sim/")) for source in sources)


def mixture(
    folders: Sequence[Path], stores: Sequence[EpisodeStore], shares: Sequence[float]
) -> list[tuple[str, EpisodeStore, float]]:
    """Datasets with their names and shares of each batch, as `TrainingInputs.episodes`.

    shares: one for each; none: those of the list of known datasets where all are in it, otherwise equal ones.
    """
    names, sources = (
        [*map(get_dataset_name, folders)],
        [store.source(0).partition("/")[0] for store in stores],
    )
    known = [(REGISTRY[name].weight if name in REGISTRY else None) or 0.0 for name in sources]
    chosen = list(shares) or (known if all(known) else [1.0] * len(stores))
    if len(stores) > 1 and is_first_process():
        parts = (
            f"{name} {share / sum(chosen):.1%}" for name, share in zip(names, chosen, strict=True)
        )
        print(f"mixture: {', '.join(parts)}", file=sys.stderr)
        marks = [mark for store in stores for mark in {*store.episode_fingerprints()}]
        if twice := len(marks) - len({*marks}):
            notice(
                f"more than one dataset has {twice} of the episodes, which count in each: give them once"
            )
    return list(zip(names, stores, chosen, strict=True))
