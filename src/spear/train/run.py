"""From a recipe to a trained folder: build the model, its data and its task, and run the loop.

The result, `OUT/final`, is a Hugging Face folder (config, safetensors, tokenizer) with three
additions: `coordinates.json` (3D tokens), `recipe.json` (the origin of the result: what was
trained, how, and on what), and for policies `normalizer.json` and `seen.json`.

A run is identified by what it is made from, its *run settings* (`_list_run_settings`). The newest
checkpoint in the run's folder is continued only by a command with the same run settings.
"""

import dataclasses
import filecmp
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch

import spear
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import check_holds_no_input, get_dataset_name
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.errors import is_first_process, notice
from spear.models.devices import keep_freed_memory, prepare_device
from spear.models.weights.folders import (
    hash_files,
    is_simulator_only,
    read_provenance,
    write_provenance,
)
from spear.models.weights.load import StoredCheckpoint
from spear.train import build, loop, parallel
from spear.train.checkpoint import SavedCheckpoint, find_newest_checkpoint
from spear.train.loop import EPISODES_KEY, RunOptions
from spear.train.optimize import Task
from spear.train.options import Optimization, Recipe, TrainingInputs
from spear.util.files import check_writable
from spear.util.fingerprints import hash_names_sizes_and_tails, list_files_recursively
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import to_plain_json

# Names of run settings in checkpoints. Messages to the user quote these names.
DEPTH_ENCODER_KEY = "--moge"  # the former name of --init-depth-encoder
EPISODE_CONTENT_KEY = "cameras, images or instructions of --episodes"  # not in old checkpoints

# Which files of a folder of labels or weights a run depends on: large files and texts.
DATA_FILES = ("*.parquet", "*.safetensors")
TEXT_FILES = (
    "config.json",
    "coordinates.json",
    "processor.json",
    "tokenizer.json",
    "wording.txt",
)
# `spear.flow.perturb_and_correct` makes committed actions wrong by differences between the
# samples of a piece. Fewer samples than this give it too few differences.
MIN_SAMPLES_FOR_MISTAKES = 4


def train(
    recipe: Recipe,
    out: Path,
    inputs: TrainingInputs,
    options: RunOptions | None = None,
    device: str = "auto",
) -> Path:
    """Train a recipe; continue the run in `out` if there is one.

    Failed episodes are left out, unless the run that is continued was started with them.

    Args:
        recipe: what to train.
        out: the run's folder.
        inputs: what to learn from and to start from.
        options: seed, workers and so on; `options.device` is not used.
        device: the device's name, as `prepare_device` takes it.

    Returns:
        `out/final`, the folder of the result.

    Raises:
        SpearError: for data or a device that is missing, and as `build` and `loop.run` do.
    """
    # Which run this is: a new one, or the one that the newest checkpoint continues.
    options = options or RunOptions()
    checkpoint = find_newest_checkpoint(out / "checkpoints")
    if not _has_same_episodes(inputs, checkpoint):
        inputs = _drop_failed_episodes(inputs)
    requested_opt = recipe.optimization  # before it is adapted to the device and to a resumed run
    recipe, torch_device, run_settings = validate_run(recipe, out, inputs, options, device)
    init_origin = None if inputs.init is None else read_provenance(inputs.init)
    options = dataclasses.replace(options, device=torch_device)
    if torch_device.type == "cpu":
        keep_freed_memory()

    # Notices about settings that differ from the requested ones, or from those the run had before.
    opt = recipe.optimization
    changeable_settings = {"batch_size": recipe.batch_size}
    earlier_settings: list[dict[str, Any]] = []
    new_settings = {**dataclasses.asdict(opt), **changeable_settings}
    if checkpoint is not None:
        _, checkpoint_state = checkpoint
        earlier_settings = loop.list_earlier_settings(checkpoint_state, new_settings)
    _notice_changed_optimization(requested_opt, opt, is_resumed=checkpoint is not None)
    _notice_settings_changed_by_continuation(checkpoint, earlier_settings, new_settings)
    _notice_settings_without_effect(recipe, requested_opt.steps, options)

    # Build and train.
    model, task, save = build.build(recipe, inputs, options.seed, is_checked=True)
    ema_weights = loop.run(task, opt, out, options, run_settings, changeable_settings)
    _load_weights_and_unshard(model, ema_weights)

    # Save the result.
    if parallel.get_rank() == 0:
        # The result is always saved from the CPU and in float32.
        torch.nn.Module.to(model, "cpu", torch.float32)
        origin = {
            "recipe": dataclasses.asdict(recipe),
            "earlier": earlier_settings,
            "seed": options.seed,
            "init": _drop_learned_fingerprints(init_origin),
            "simulator_only": _is_simulator_only(inputs),
            "learned": _join_learned_fingerprints(init_origin, inputs, task),
            "minutes": _read_minutes_of_run(out),
            **_list_machine_properties(options),
        }
        _save_result(out, save, origin)
    parallel.wait_for_all_processes()
    return out / "final"


class ValidRun(NamedTuple):
    """What is to be trained, after all checks.

    Attributes:
        recipe: The recipe as it will be trained on the device.
        device: The device of this process.
        run_settings: What the run is made from; see `_list_run_settings`.
    """

    recipe: Recipe
    device: torch.device
    run_settings: dict[str, Any]


def validate_run(
    recipe: Recipe, out: Path, inputs: TrainingInputs, options: RunOptions, device: str
) -> ValidRun:
    """Check a run without reading weights or demonstrations, which may not be prepared yet.

    Raises:
        SpearError: for the first mistake in the recipe, its inputs, the device or the folder `out`.
    """
    torch_device = prepare_device(device)
    check_holds_no_input(out, "train")
    parallel.join_process_group(torch_device)
    opt = loop.resolve_optimization(recipe.optimization, out, torch_device)
    recipe = dataclasses.replace(recipe, optimization=opt)
    build.check(recipe, inputs)
    recipe = build.resolve_normalization(recipe, inputs.init)

    # The result will record the origin of the weights to start from. Reading it here finds broken
    # files before the training.
    for folder in (inputs.init, inputs.init_depth_encoder):
        if folder is not None:
            read_provenance(folder)

    # Without episodes (before they are prepared) all other run settings are compared.
    run_settings = _list_run_settings(recipe, inputs)
    known_settings = dict(run_settings)
    if not inputs.episodes:
        del known_settings[EPISODES_KEY]
        del known_settings[EPISODE_CONTENT_KEY]
    loop.check_and_find_checkpoint_to_resume(out, options.seed, known_settings, opt.steps)
    check_writable(out / "log.jsonl")
    return ValidRun(recipe, torch_device, run_settings)


def _has_same_episodes(inputs: TrainingInputs, checkpoint: SavedCheckpoint | None) -> bool:
    """Return whether the checkpoint's run has exactly these episodes, including the failed ones."""
    if checkpoint is None:
        return False
    _, state = checkpoint
    run_settings = state["settings"]["about"]
    stored_episodes = run_settings.get(EPISODES_KEY)
    if stored_episodes is None:
        return False
    new_episodes = _list_episode_settings(inputs)[EPISODES_KEY]
    return loop.is_same_setting(EPISODES_KEY, stored_episodes, new_episodes)


def _drop_failed_episodes(inputs: TrainingInputs) -> TrainingInputs:
    """Return the inputs without the episodes that are known to have failed."""
    episodes = [
        dataset._replace(store=dataset.store.drop_failed_episodes()) for dataset in inputs.episodes
    ]
    return dataclasses.replace(inputs, episodes=episodes)


def _list_run_settings(recipe: Recipe, inputs: TrainingInputs) -> dict[str, Any]:
    """Describe what a run is made from: its recipe, its data and the weights that it begins with.

    A run is continued only if all of these run settings are the same.

    Returns:
        The run settings by name, with values as they are after writing and reading JSON.
    """
    # These keys of the recipe may change when a run is continued. Of the optimization, however, the
    # freeze schedule has to stay, because EMA weights exist only for the modules that learn.
    changeable_keys = ("optimization", "batch_size", "description")
    settings = {
        key: value
        for key, value in dataclasses.asdict(recipe).items()
        if key not in changeable_keys
    }
    settings["frozen"] = recipe.optimization.frozen
    settings["trained"] = recipe.optimization.trained
    settings.update(_list_episode_settings(inputs))

    init_folders = [] if inputs.init is None else [inputs.init]
    moge_folders = [] if inputs.init_depth_encoder is None else [inputs.init_depth_encoder]
    folders_of_option = {
        "--labels": inputs.labels,
        "--init": init_folders,
        DEPTH_ENCODER_KEY: moge_folders,
    }
    # Hashes of the large files and of the texts, in separate settings, so that an error can say
    # which of them differ. Of large files only the ends are hashed, which would miss a change of
    # weights in the middle. So the last values of every weight are hashed in another setting below.
    for option, folders in folders_of_option.items():
        settings[option] = _compute_short_hash(folders, DATA_FILES)
        settings[f"settings or words of {option}"] = _compute_short_hash(folders, TEXT_FILES)
    for option in ("--init", DEPTH_ENCODER_KEY):
        weights_hash = None
        for folder in folders_of_option[option]:  # one at most
            weights_hash = StoredCheckpoint.open(folder, option).hash_weight_tails()[:12]
        settings[f"weights of {option}"] = weights_hash
    return to_plain_json(settings)


def _list_episode_settings(inputs: TrainingInputs) -> dict[str, Any]:
    """Describe the episodes of all datasets, as run settings by name."""
    datasets = []
    for name, store, weight in inputs.episodes:
        states_and_actions = store.fingerprint_states_and_actions()[:12]
        datasets.append([name, f"{len(store)} episodes ({states_and_actions}), share {weight:g}"])
    contents_hashes = [
        dataset.store.fingerprint_image_lengths_and_instructions()[:12]
        for dataset in inputs.episodes
    ]
    return {EPISODES_KEY: datasets, EPISODE_CONTENT_KEY: contents_hashes}


def _compute_short_hash(folders: Sequence[Path], patterns: Sequence[str]) -> str | None:
    """Return a hash of the files in `folders` whose names match one of `patterns`.

    Of large files only the ends are read. Without folders the result is None.
    """
    return hash_names_sizes_and_tails(folders, patterns)[:12] if folders else None


def _notice_changed_optimization(
    requested_opt: Optimization, opt: Optimization, is_resumed: bool
) -> None:
    """Print notices about settings of the optimization that differ from the requested ones."""
    if opt.precision != requested_opt.precision:
        reason = "as the run began" if is_resumed else "which is faster on this CPU"
        notice(f"training in float32, {reason}.")
    if opt.accumulate != requested_opt.accumulate:
        notice(f"a run keeps the pieces of its batches, so accumulate is {opt.accumulate}.")


def _notice_settings_changed_by_continuation(
    checkpoint: SavedCheckpoint | None,
    settings_changed_so_far: Sequence[Mapping[str, Any]],
    new_settings: Mapping[str, Any],
) -> None:
    """Print a notice if this continuation of the run changes settings of the run.

    Args:
        checkpoint: Where the run continues; None if it begins.
        settings_changed_so_far: The values before each change of settings, those of this
            continuation included (see `loop.list_earlier_settings`).
        new_settings: All settings from now on.
    """
    if checkpoint is None:
        return
    _, state = checkpoint
    if settings_changed_so_far == state["earlier"]:
        return
    # The last entry has the values that this continuation changes.
    earlier_values = dict(settings_changed_so_far[-1])
    last_step = earlier_values.pop("until_step")
    changes = ", ".join(
        f"{name}={value} (now {new_settings[name]})" for name, value in earlier_values.items()
    )
    notice(
        "the run continues with other settings than before. "
        f"Up to step {last_step} it had {changes}."
    )


def _notice_settings_without_effect(recipe: Recipe, steps: int, options: RunOptions) -> None:
    """Print notices about settings that have less effect than the user may expect.

    `steps` is the number of steps that the user requested.
    """
    opt = recipe.optimization
    if 0 < steps < opt.warmup:
        notice(
            f"the peak learning rate is never reached, because warmup takes {opt.warmup} steps "
            f"and the run has {steps}. Use fewer --warmup-steps."
        )
    if recipe.committed:
        piece_size = recipe.batch_size / opt.accumulate / parallel.get_world_size()
        if 0 < piece_size < MIN_SAMPLES_FOR_MISTAKES:
            notice(
                f"committed learns from smaller mistakes, because a piece has {piece_size:g} "
                "samples."
            )
    if options.sharded and parallel.get_world_size() == 1:
        notice("--parallel fsdp has no effect in a single process. Start several with torchrun.")


def _load_weights_and_unshard(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights (by parameter name) into the model, and make a sharded model whole.

    A whole model then exists on process 0 alone (`parallel.gather_on_first_process`).
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    if parallel.is_sharded(model):
        parallel.gather_on_first_process(model)


def _drop_learned_fingerprints(origin: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the origin of the initial weights without the fingerprints of their training data.

    The result's own entry "learned" already contains these fingerprints
    (`_join_learned_fingerprints`).
    """
    if origin is None:
        return None
    return {key: value for key, value in origin.items() if key != "learned"}


def _join_learned_fingerprints(
    init_origin: Mapping[str, Any] | None, inputs: TrainingInputs, task: Task
) -> str:
    """Return the fingerprints of all episodes and images that the result has learned from.

    They include those that the weights of `--init` have learned from. The fingerprints are joined
    by spaces, each once.
    """
    fingerprints = (init_origin or {}).get("learned", "").split()
    for dataset in inputs.episodes:
        fingerprints.extend(dataset.store.list_episode_fingerprints())
    questions = getattr(task, "questions", None)
    if questions is not None:
        fingerprints.extend(questions.list_image_fingerprints())
    return " ".join(dict.fromkeys(fingerprints))


def _is_simulator_only(inputs: TrainingInputs) -> bool:
    """Return whether all training data come from the built-in simulator.

    This includes the data that the weights to start from were trained on.
    """
    sources: list[str] = []
    for folder in inputs.labels:
        for shard in list_files_recursively(folder, "labels*.parquet"):
            sources.extend(pq.read_table(shard, columns=["source"])["source"].to_pylist())
    for dataset in inputs.episodes:
        store = dataset.store
        sources.extend(store.source(index) for index in range(len(store)))
    # Labels of the simulator's scenes have sources such as "sim:42", its episodes "sim/put_on/42".
    if not all(source.startswith(("sim:", "sim/")) for source in sources):
        return False
    return all(
        is_simulator_only(folder)
        for folder in (inputs.init, inputs.init_depth_encoder)
        if folder is not None
    )


def _read_minutes_of_run(out: Path) -> float:
    """Return the minutes that the run took, including the time before it was resumed."""
    checkpoint = find_newest_checkpoint(out / "checkpoints")
    if checkpoint is None:
        return 0.0
    _, state = checkpoint
    return round(float(state["minutes"]), 2)


def _list_machine_properties(options: RunOptions) -> dict[str, Any]:
    """Describe the machine that trained: processes, device and versions."""
    device = options.device or parallel.CPU
    return {
        "processes": parallel.get_world_size(),
        "sharded": options.sharded and parallel.get_world_size() > 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "spear": spear.__version__,
        "torch": torch.__version__,
    }


def _save_result(out: Path, save: Callable[[Path], None], origin: Mapping[str, Any]) -> None:
    """Write the folder `out/final`, and keep files that users added to an earlier one.

    The result is written to another folder, which then replaces `out/final`. So a complete result
    exists at any moment.

    Args:
        out: the run's folder.
        save: writes the model to a folder.
        origin: the content of `recipe.json`.
    """
    final = out / "final"
    unfinished = out / ".part-final"
    with acquire_run_lock(out, "training into"):
        # An earlier process was killed after it had removed `final` and before it renamed the
        # complete new folder (see below), so the renaming is done now.
        if not final.is_dir() and (unfinished / "recipe.json").is_file():
            unfinished.replace(final)
        shutil.rmtree(unfinished, ignore_errors=True)

        save(unfinished)
        write_provenance(unfinished, origin)
        if final.is_dir() and _is_same_model(unfinished, final):
            # The other files stay, because they still fit the model: a calibration, for example.
            (unfinished / "recipe.json").replace(final / "recipe.json")
        else:
            _copy_added_files(final, unfinished)
            shutil.rmtree(final, ignore_errors=True)
            unfinished.replace(final)
        shutil.rmtree(unfinished, ignore_errors=True)


def _is_same_model(first: Path, second: Path) -> bool:
    """Return whether two folders contain the same model, byte for byte.

    The hashes of `hash_files` are not enough, because they cover only a part of large files.
    """
    hashes = hash_files(first)
    if hashes != hash_files(second):
        return False
    return all(filecmp.cmp(first / name, second / name, shallow=False) for name in hashes)


def _copy_added_files(source: Path, target: Path) -> None:
    """Copy files and folders that are no part of the model, such as a model card.

    What `target` has already is not replaced.
    """
    for path in source.glob("*"):
        is_of_model = path.suffix in (".json", ".safetensors")
        if is_of_model or (target / path.name).exists():
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def weigh_datasets(
    folders: Sequence[Path], stores: Sequence[EpisodeStore], weights: Sequence[float]
) -> list[WeightedStore]:
    """Give datasets their names and sampling weights, in the form of `TrainingInputs.episodes`.

    If there are several datasets, they are listed on stderr with their fractions of each batch.

    Args:
        folders: the folders of the datasets.
        stores: the episodes of each folder.
        weights: the sampling weight of each folder. If empty, the weights come from the list of
            known datasets if that has all of them; otherwise they are equal.
    """
    names = [get_dataset_name(folder) for folder in folders]
    weights = list(weights) or _get_known_or_equal_weights(stores)
    if len(stores) > 1 and is_first_process():
        _print_mixture(names, weights)
        _notice_repeated_episodes(stores)
    return [
        WeightedStore(name, store, weight)
        for name, store, weight in zip(names, stores, weights, strict=True)
    ]


def _get_known_or_equal_weights(stores: Sequence[EpisodeStore]) -> list[float]:
    """Return the known sampling weights of all datasets, or equal weights if one is unknown."""
    weights: list[float] = []
    for store in stores:
        dataset_name, _, _ = store.source(0).partition("/")
        dataset = REGISTRY.get(dataset_name)
        if dataset is None or not dataset.weight:
            return [1.0] * len(stores)
        weights.append(dataset.weight)
    return weights


def _print_mixture(names: Sequence[str], weights: Sequence[float]) -> None:
    """Print each dataset's fraction of a batch."""
    total = sum(weights)
    fractions = [
        f"{name} {weight / total:.1%}" for name, weight in zip(names, weights, strict=True)
    ]
    print(f"mixture: {', '.join(fractions)}", file=sys.stderr)


def _notice_repeated_episodes(stores: Sequence[EpisodeStore]) -> None:
    """Print a notice if an episode is in several datasets."""
    fingerprints: list[str] = []
    for store in stores:
        fingerprints.extend(set(store.list_episode_fingerprints()))
    num_repeated = len(fingerprints) - len(set(fingerprints))
    if num_repeated:
        notice(
            f"{num_repeated} of the episodes are in more than one dataset and count in each. "
            "Give them once."
        )
