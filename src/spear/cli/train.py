"""The commands `recipes`, `train` and `estimate-memory`."""

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spear.cli.data import open_or_prepare_episodes, parse_usable_split
from spear.errors import SpearError, format_count, is_first_process
from spear.train.options import (
    EstimateMemoryOptions,
    RecipesOptions,
    TrainingInputs,
    TrainOptions,
    check_inputs,
)
from spear.util.options import parse_key_values

if TYPE_CHECKING:
    from spear.train.memory import MemoryEstimate
    from spear.train.options import Recipe


SHOWN_WIDTH = 100  # of the texts about settings, in characters


class DoesNotFitError(SpearError):
    """The recipe or the inference needs more memory than the GPU has."""

    code = 1


def recipes(options: RecipesOptions) -> None:
    """List the recipes of training, or the settings of one with their defaults and meanings.

    Change a setting with --set KEY=VALUE of spear train, where it has no option of its own.

    Examples:
        spear recipes
        spear recipes nano-post
    """
    from spear.train.recipes import RECIPES, get_recipe
    from spear.train.settings import list_settings

    if options.recipe is None:
        for known_recipe in RECIPES.values():
            print(f"{known_recipe.name:<17} {known_recipe.description}")
        return

    recipe = get_recipe(options.recipe)
    print(f"{recipe.name}: {recipe.description}\n")
    indent = " " * 4
    for setting in list_settings(recipe):
        print(f"{setting.key}={setting.value}")
        print(
            textwrap.fill(
                setting.meaning, SHOWN_WIDTH, initial_indent=indent, subsequent_indent=indent
            )
        )


def train(options: TrainOptions) -> None:
    """Train one stage; the same command continues a run that was stopped.

    Use `spear recipes` to show the recipes. Several processes train together under torchrun; for
    Slurm, Kubernetes and Ray there are scripts in examples/cluster.

    Examples:
        spear train nano-post --episodes my_rlds_folder --init nano --lr 1e-4 --batch-size 64
        spear train nano-vlm-2 --labels runs/labels --init runs/nano-vlm-1/final
        spear train nano-post --episodes my_rlds_folder --init nano --out runs/my_robot
        torchrun --nproc-per-node 8 --no-python spear train post-train-bridge … --parallel fsdp
    """
    from spear.models.presets import get_preset
    from spear.train.recipes import get_recipe

    # Check the recipe and its options before importing anything heavy.
    changes = parse_key_values(
        options.set,
        preset=options.preset,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        warmup=options.warmup_steps,
    )
    recipe = get_recipe(options.recipe, **changes)
    get_preset(recipe.preset)
    check_inputs(recipe, options)
    out = options.out or Path("runs") / recipe.name

    # Check the run, its weights and its data before preparing the data.
    from transformers.utils.logging import disable_progress_bar

    from spear.policy import locate_checkpoint
    from spear.train import run
    from spear.train.loop import RunOptions

    disable_progress_bar()
    init = locate_checkpoint(options.init) if options.init else None
    depth_encoder = (
        locate_checkpoint(options.init_depth_encoder) if options.init_depth_encoder else None
    )
    run_options = RunOptions(
        seed=options.seed,
        workers=options.workers,
        save_every=options.save_steps,
        sharded=options.parallel == "fsdp",
    )
    inputs_without_episodes = TrainingInputs(options.labels, (), init, depth_encoder)
    run.validate_run(recipe, out, inputs_without_episodes, run_options, options.device)
    _check_demonstrations(options)

    # Prepare the data, and train.
    stores = [
        open_or_prepare_episodes(path, out / "data", options.split) for path in options.episodes
    ]
    episodes = run.weigh_datasets(options.episodes, stores, options.sampling_weights)
    inputs = TrainingInputs(options.labels, episodes, init, depth_encoder)
    final = run.train(recipe, out, inputs, run_options, options.device)
    if is_first_process():
        print(f"trained: {final}")


def _check_demonstrations(options: TrainOptions) -> None:
    """Check that the episodes have the split of --split, and the camera that a policy needs."""
    from spear.data.readers.formats import list_cameras

    for path in options.episodes:
        parse_usable_split(path, options.split)
    has_external_camera = any("external" in list_cameras(path) for path in options.episodes)
    if options.episodes and not has_external_camera:
        raise SpearError(
            "--episodes has no camera external, which a policy acts by. Name one of the cameras "
            "external in spear.json."
        )


def estimate_memory(options: EstimateMemoryOptions) -> None:
    """Estimate whether a recipe fits on a GPU, what needs the memory, and what makes it fit.

    Needs no GPU and no weights: one training step of the real code runs on tensors without
    contents, and the sizes of those in use are added up. Inference is the recipe named inference.
    The exit code is 1 if the recipe does not fit as it is.

    Examples:
        spear estimate-memory --recipe finetune-lora --gpu 16GB
        spear estimate-memory --recipe post-train-bridge --gpu 80GB --set ema=0
        spear estimate-memory --recipe inference --gpu 8GB
    """
    from spear.train import memory
    from spear.train.recipes import get_recipe

    usable_bytes = memory.estimate_usable_bytes(options.gpu)
    changes = parse_key_values(options.set, preset=options.preset, batch_size=options.batch_size)
    if options.recipe == "inference":
        _print_inference_estimate_and_check_fit(options, usable_bytes)
        return

    recipe = get_recipe(options.recipe, **changes)
    # First the recipe as it is, then with more and more settings that save memory.
    for savings, estimate in memory.plan_memory_savings(recipe):
        if not savings:
            _print_estimate(recipe, estimate)
            print(f"\nusable on {options.gpu}: {_format_gib(usable_bytes)}")
        flags = memory.format_set_option(savings)
        total = _format_gib(estimate.total)
        if estimate.total > usable_bytes:
            continue
        if not savings:
            print("fits")
            return
        raise DoesNotFitError(
            f"{recipe.name} does not fit on {options.gpu} without changes. It fits with {flags} "
            f"({total})."
        )
    # The loop did not return, so `flags` and `total` are those of its last and smallest estimate.
    raise DoesNotFitError(
        f"{recipe.name} does not fit on {options.gpu}, even with {flags} ({total}). Use a "
        "larger GPU, or several with --parallel fsdp."
    )


def _print_inference_estimate_and_check_fit(
    options: EstimateMemoryOptions, usable_bytes: float
) -> None:
    """Print whether inference with a policy of the preset fits on the GPU, in each precision."""
    import torch

    from spear.models.presets import get_preset
    from spear.models.quantize import Quantization
    from spear.train.memory import measure_inference_memory

    if options.set:
        raise SpearError("--set changes recipes, and inference is none. Leave it out.")
    preset = get_preset(options.preset or "spear1")
    fits_in_any_precision = False
    # Quantized models keep embeddings, norms and activations in bfloat16.
    precisions: dict[str, tuple[torch.dtype, Quantization | None]] = {
        "int4": (torch.bfloat16, "int4"),
        "int8": (torch.bfloat16, "int8"),
        "bfloat16": (torch.bfloat16, None),
        "float32": (torch.float32, None),
    }
    for name, (dtype, quantize) in precisions.items():
        estimate = measure_inference_memory(preset, dtype, options.batch_size or 1, quantize)
        fits = estimate.total <= usable_bytes
        fits_in_any_precision = fits_in_any_precision or fits
        verdict = "fits" if fits else "does not fit"
        print(
            f"{name:<9} weights {_format_gib(estimate.weights)} + "
            f"activations {_format_gib(estimate.activations)} = {_format_gib(estimate.total)}: "
            f"{verdict} on {options.gpu} (usable {_format_gib(usable_bytes)})"
        )
    if not fits_in_any_precision:
        raise DoesNotFitError(f"inference does not fit on {options.gpu}. Use a larger GPU.")


def _print_estimate(recipe: "Recipe", estimate: "MemoryEstimate") -> None:
    """Print a table of the memory that a recipe needs."""
    num_pieces = format_count(recipe.optimization.accumulate, "pieces")
    print(f"{recipe.name}, {recipe.preset}, batch {recipe.batch_size} in {num_pieces}\n")
    billions = estimate.num_parameters / 1e9
    trainable_billions = estimate.num_trainable / 1e9
    bytes_by_purpose: dict[str, Any] = {
        f"weights ({billions:.2f} B, {trainable_billions:.2f} B learn)": estimate.weights,
        "gradients": estimate.gradients,
        "optimizer": estimate.moments,
        "EMA weights": estimate.ema,
        "activations, temporaries": estimate.activations,
        "total": estimate.total,
    }
    for purpose, num_bytes in bytes_by_purpose.items():
        print(f"{purpose:<34} {num_bytes / 2**30:8.2f} GiB")


def _format_gib(num_bytes: float) -> str:
    """Return a number of bytes in GiB, with its unit."""
    return f"{num_bytes / 2**30:.1f} GiB"
