"""Training: `spear train`."""

from __future__ import annotations

from pathlib import Path

from spear.cli.data import open_episodes
from spear.train.options import Inputs, TrainOptions, check_inputs


def train(options: TrainOptions) -> None:
    """Train one stage. Stopped at any moment, the same command continues where it was.

    `spear train list` shows the recipes. Several processes train together under torchrun; examples/cluster
    has scripts for Slurm, Kubernetes and Ray.

    Examples:
        spear train nano-vlm-1 --labels runs/labels --init nano-vlm-0 --moge nano-depth
        spear train nano-vlm-2 --labels runs/labels --init runs/nano-vlm-1/final
        spear train nano-post --episodes my_rlds_folder --init nano --out runs/my_robot
        torchrun --nproc-per-node 8 --no-python spear train post-train-bridge … --parallel fsdp
    """
    from spear.models.presets import preset
    from spear.train.recipes import RECIPES, recipe

    if options.recipe == "list":
        for known in RECIPES.values():
            print(f"{known.name:<17} {known.description}")
        return
    stage = recipe(options.recipe).changed(**options.changes())
    preset(stage.preset)
    check_inputs(stage, options)
    out = options.out or Path("runs") / stage.name

    from transformers.utils.logging import disable_progress_bar

    from spear.policy import locate
    from spear.train import run
    from spear.train.loop import RunOptions

    init, moge = (locate(name) if name else None for name in (options.init, options.moge))
    disable_progress_bar()
    stores = [open_episodes(path, out / "data", options.split) for path in options.episodes]
    datasets = run.mixture(options.episodes, stores, options.shares)
    how = RunOptions(seed=options.seed, sharded=options.parallel == "fsdp")
    inputs = Inputs(options.labels, datasets, init, moge)
    print(f"trained: {run.train(stage, out, inputs, how, options.device)}")
