"""Floating-point operations of each nano stage: how many steps without 3D are equal compute.

    spear label --scenes 64 --out runs/labels
    spear record --episodes 8 --out runs/episodes
    python benchmarks/train/flops.py --labels runs/labels --episodes runs/episodes

PyTorch counts them (`FlopCounterMode`: matrix products, convolutions, attention) in whole training
steps, forward and backward, on random weights. The result is the mean of a few batches, whose texts
differ in length. It is a count, so the machine and what else runs on it do not matter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

SHARED_STAGES = ("nano-siglip", "nano-vlm-0")
STAGES_WITH_3D = ("nano-depth", "nano-vlm-1", "nano-vlm-2", "nano-vla")
STAGE_WITHOUT_3D = "nano-vla-no-3d"


def count_operations_per_step(name: str, labels: Path, episodes: Path, num_batches: int) -> float:
    """Return the mean number of floating-point operations of a recipe's training step."""
    recipe = get_recipe(name)
    stores = [WeightedStore("sim", EpisodeStore(episodes), 1.0)] if recipe.kind == "vla" else []
    _, task, _ = build(recipe, TrainingInputs([labels], stores))
    stepper = Stepper(task, recipe.optimization, seed=0)

    total = 0
    for step in range(num_batches):
        batch = task.batch(step)
        with FlopCounterMode(display=False) as counter:
            stepper(step, [batch])
        total += counter.get_total_flops()
    return total / num_batches


def main(labels: Path, episodes: Path, batches: int = 3) -> None:
    """Count the operations of every nano stage, and print a table.

    Args:
        labels: folder of labeled images (`spear label`).
        episodes: folder of demonstrations (`spear record`).
        batches: batches per recipe.
    """
    torch.set_num_threads(1)
    print("| recipe | GFLOP per step | steps | PFLOP |\n|---|---|---|---|")
    operations_of_stage: dict[str, float] = {}
    for name in (*SHARED_STAGES, *STAGES_WITH_3D, STAGE_WITHOUT_3D):
        per_step = count_operations_per_step(name, labels, episodes, batches)
        num_steps = get_recipe(name).optimization.steps
        total = per_step * num_steps
        operations_of_stage[name] = total
        print(
            f"| `{name}` | {per_step / 1e9:.1f} | {num_steps:,} | {total / 1e15:.3f} |", flush=True
        )

    with_3d = sum(operations_of_stage[name] for name in STAGES_WITH_3D)
    without_3d = operations_of_stage[STAGE_WITHOUT_3D]
    print(f"\nAfter {' and '.join(SHARED_STAGES)}: {with_3d / 1e15:.3f} PFLOP with 3D, ", end="")
    print(f"{without_3d / 1e15:.3f} without ({without_3d / with_3d:.2f} times as many).")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
