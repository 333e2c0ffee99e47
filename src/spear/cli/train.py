"""`spear train` and `spear plan` (what a recipe needs of a GPU)."""

from pathlib import Path

from spear.cli.data import check_episodes, open_episodes
from spear.errors import SpearError, format_count, is_first_process
from spear.train.options import PlanOptions, TrainingInputs, TrainOptions, check_inputs
from spear.util.options import parse_key_values


def train(options: TrainOptions) -> None:
    """Train one stage. Stopped at any moment, the same command continues where it was.

    The recipes are shown by `spear train list`. Several processes train together under torchrun; for Slurm,
    Kubernetes and Ray there are scripts in examples/cluster.

    Examples:
        spear train nano-vlm-1 --labels runs/labels --init nano-vlm-0 --moge nano-depth
        spear train nano-vlm-2 --labels runs/labels --init runs/nano-vlm-1/final
        spear train nano-post --episodes my_rlds_folder --init nano --out runs/my_robot
        torchrun --nproc-per-node 8 --no-python spear train post-train-bridge … --parallel fsdp
    """
    from spear.models.presets import get_preset
    from spear.train.recipes import RECIPES, get_recipe

    if options.recipe == "list":
        for known in RECIPES.values():
            print(f"{known.name:<17} {known.description}")
        return
    changes = parse_key_values(options.set, preset=options.preset, steps=options.steps)
    stage = get_recipe(options.recipe, **changes)
    get_preset(stage.preset)
    check_inputs(stage, options)
    out = options.out or Path("runs") / stage.name

    from transformers.utils.logging import disable_progress_bar

    from spear.data.readers.formats import list_cameras
    from spear.policy import locate
    from spear.train import run
    from spear.train.loop import RunOptions

    init, moge = (locate(name) if name else None for name in (options.init, options.moge))
    disable_progress_bar()
    how = RunOptions(
        options.seed, options.workers, options.save_every, sharded=options.parallel == "fsdp"
    )
    run.check_run(stage, out, TrainingInputs(options.labels, (), init, moge), how, options.device)
    for path in options.episodes:
        check_episodes(path, options.split)
    if options.episodes and not any("external" in list_cameras(path) for path in options.episodes):
        raise SpearError(
            "--episodes: no camera external, which a policy acts by: name one so in spear.json"
        )
    stores = [open_episodes(path, out / "data", options.split) for path in options.episodes]
    inputs = TrainingInputs(
        options.labels, run.weigh_datasets(options.episodes, stores, options.shares), init, moge
    )
    final = run.train(stage, out, inputs, how, options.device)
    if is_first_process():
        print(f"trained: {final}")


def plan(options: PlanOptions) -> None:
    """Say whether a recipe fits on a GPU, what takes the memory, and which settings make it fit.

    Needs no GPU and no weights: one training step of the real code is run on tensors without contents, and
    what is alive is added up. Acting is planned too, as the recipe named inference.

    Examples:
        spear plan --recipe finetune-lora --gpu 16GB
        spear plan --recipe post-train-bridge --gpu 80GB --set ema=0
        spear plan --recipe inference --gpu 8GB
    """
    import torch

    from spear.models.presets import get_preset
    from spear.train import memory
    from spear.train.recipes import get_recipe

    capacity = memory.usable_bytes(options.gpu)
    changes = parse_key_values(options.set, preset=options.preset, batch_size=options.batch_size)
    if options.recipe == "inference":
        if options.set:
            raise SpearError("--set changes recipes, and inference is none: leave it out")
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            needed = memory.measure_inference(
                get_preset(options.preset or "spear1"), dtype, options.batch_size or 1
            )
            parts = f"weights {_gib(needed.weights)} + activations {_gib(needed.activations)}"
            word = "fits" if needed.total <= capacity else "does not fit"
            room = f"{options.gpu} (usable {_gib(capacity)})"
            print(f"{name:<9} {parts} = {_gib(needed.total)}: {word} in {room}")
        return
    stage = get_recipe(options.recipe, **changes)
    for changes, needed in memory.plan_memory_savings(stage):
        if not changes:
            pieces = stage.optimization.accumulate
            print(
                f"{stage.name}, {stage.preset}, batch {stage.batch_size} in "
                f"{format_count(pieces, 'pieces')}\n"
            )
            numbers = f"{needed.num_parameters / 1e9:.2f} B, {needed.num_trainable / 1e9:.2f} B learn"
            for name, size in {
                f"weights ({numbers})": needed.weights,
                "gradients": needed.gradients,
                "optimiser": needed.moments,
                "averaged weights": needed.ema,
                "activations, temporaries": needed.activations,
                "together": needed.total,
            }.items():
                print(f"{name:<34} {size / 2**30:8.2f} GiB")
            print(f"\nusable of {options.gpu}: {_gib(capacity)}")
        if needed.total <= capacity:
            extra = (
                f"does not fit as it is; fits with {memory.format_set_option(changes)}: {_gib(needed.total)}"
            )
            print(extra if changes else "fits")
            return
    print(f"does not fit even with {memory.format_set_option(changes)}: {_gib(needed.total)}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
