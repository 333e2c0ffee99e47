"""Training: `spear train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from spear.cli import launching
from spear.cli.arguments import Folder, Name, Number, at_least, open_episodes, recipe_changes
from spear.errors import SpearError


def train(
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")],
    /,
    out: Folder = None,
    labels: Folder = None,
    episodes: tuple[Path, ...] = (),
    split: str = "train",
    weights: tuple[float, ...] = (),
    init: Name = None,
    moge: Name = None,
    preset: Name = None,
    steps: Number = None,
    seed: int = 0,
    device: str = "auto",
    parallel: Literal["ddp", "fsdp"] = "ddp",
    set: tuple[str, ...] = (),
    launch: Annotated[Literal["slurm", "ray", "kubernetes"] | None, arg(metavar="CLUSTER")] = None,
    nodes: int = 1,
    gpus: int = 1,
    job: tuple[str, ...] = (),
    dry_run: bool = False,
) -> None:
    """Train one stage. Stopped at any moment, the same command continues where it was.

    `spear train list` shows the recipes. With --launch it does not train, but writes the script
    (OUT/slurm.sh, ray.sh or kubernetes.yaml) by which a cluster runs this command on many GPUs, again after
    each preemption.

    Examples:
        spear train nano-vlm-1 --labels runs/labels --init nano-vlm-0 --moge nano-depth
        spear train nano-vlm-2 --labels runs/labels --init runs/nano-vlm-1/final
        spear train nano-post --episodes my_rlds_folder --init nano --out runs/my_robot
        spear train post-train-droid --episodes droid/1.0.1 --init runs/vla --launch slurm --nodes 2 --gpus 8 --dry-run
        torchrun --nproc-per-node 8 --no-python spear train post-train-bridge … --parallel fsdp

    Args:
        recipe: Name of the recipe, or list.
        out: Folder for checkpoints, logs and the result (OUT/final); default: runs/RECIPE.
        labels: Folder of labelled images, from spear label.
        episodes: Folders of robot demonstrations: from spear record, or RLDS or LeRobot datasets.
        split: Which episodes of each folder: train, train[:90%], train+val …
        weights: Shares of the folders in each batch, one for each. Without them: those in the list of known
            datasets (spear data datasets) where all are in it, otherwise equal ones.
        init: Where to start from: a trained folder, or the name of weights that come with this package (nano,
            the policy; nano-vlm-0, before it learns 3D). Without it, training starts from random weights.
        moge: Trained folder of a depth recipe, whose encoder SPEAR-VLM begins with, or nano-depth, which
            comes with this package.
        preset: Model size, when it shall not be the recipe's: nano, small or spear1.
        steps: Number of steps, when it shall not be the recipe's.
        seed: Two runs with the same seed give the same weights.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N. Of several processes each takes a GPU of
            its own.
        parallel: What several processes (torchrun) hold: ddp, each the whole model; fsdp, each its share of
            it.
        set: Changes to the recipe as KEY=VALUE, for example batch_size=16 lr=1e-4.
        launch: Write a script for this cluster instead: slurm, ray or kubernetes.
        nodes: Machines that it runs on.
        gpus: GPUs of each, one process per GPU; 0 for machines without.
        job: What the cluster must know, as KEY=VALUE: time, partition, account, cpus, setup (slurm); address
            (ray); image, volume, mount, cpus (kubernetes).
        dry_run: Only print the script.
    """
    given = dict(locals())
    from transformers.utils.logging import disable_progress_bar

    from spear.models.presets import preset as find_preset
    from spear.policy import locate
    from spear.train.inputs import check_inputs
    from spear.train.recipes import RECIPES
    from spear.train.recipes import recipe as find

    if recipe == "list":
        for known in RECIPES.values():
            print(f"{known.name:<17} {known.description}")
        return
    named = {"preset": preset, "steps": steps}
    changes = recipe_changes(set) | {key: value for key, value in named.items() if value is not None}
    stage = find(recipe).changed(**changes)
    find_preset(stage.preset)
    at_least(0, seed=seed)
    check_inputs(stage, labels is not None, bool(episodes), init is not None, moge is not None)
    target = out or Path("runs") / recipe
    if launch:
        launching.write(
            launch, stage, target, launching.command("train", train, given), nodes, gpus, job, dry_run
        )
        return
    if dry_run or job or (nodes, gpus) != (1, 1):
        raise SpearError(
            "--nodes, --gpus, --job and --dry-run are for scripts: say for what with --launch slurm, ray or kubernetes "
            "(here, several processes train together with torchrun)"
        )
    start = locate(init) if init else None
    encoder = locate(moge) if moge else None
    from spear.train.run import train as run

    disable_progress_bar()
    stores = [open_episodes(path, target / "data", split) for path in episodes]
    mixed = zip(episodes, stores, launching.shares(stores, weights), strict=True)
    robots = [(launching.dataset_name(path), store, share) for path, store, share in mixed]
    final = run(
        recipe,
        target,
        labels,
        robots,
        start,
        encoder,
        seed,
        device=device,
        sharded=parallel == "fsdp",
        **changes,
    )
    print(f"trained: {final}")
