"""What each stage of nano costs, in floating-point operations: how many steps without 3D are equal compute.

    spear label --scenes 64 --out runs/labels
    spear record --episodes 8 --out runs/episodes
    python benchmarks/train/flops.py --labels runs/labels --episodes runs/episodes

Counted by PyTorch (`FlopCounterMode`: matrix products, convolutions, attention) in whole training steps,
forward and backward, on random weights; the mean of a few batches, whose texts differ in length. A count, so
the machine and what else runs on it don't matter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

from spear.cli import guarded
from spear.data.store.episode_store import EpisodeStore
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

SHARED = ("nano-siglip", "nano-vlm-0")
WITH_3D = ("nano-depth", "nano-vlm-1", "nano-vlm-2", "nano-vla")
WITHOUT = "nano-vla-no-3d"


def operations(name: str, labels: Path, episodes: Path, batches: int) -> float:
    """Of one training step of a recipe."""
    stores = [("sim", EpisodeStore(episodes), 1.0)] if get_recipe(name).kind == "vla" else []
    _, task, _ = build(get_recipe(name), TrainingInputs([labels], stores))
    step = Stepper(task, get_recipe(name).optimization, seed=0)
    total = 0
    for number in range(batches):
        batch = task.batch(number)
        with FlopCounterMode(display=False) as counter:
            step(number, [batch])
        total += counter.get_total_flops()
    return total / batches


def main(labels: Path, episodes: Path, batches: int = 3) -> None:
    """Count.

    Args:
        labels: folder of labelled images (`spear label`).
        episodes: folder of demonstrations (`spear record`).
        batches: batches per recipe.
    """
    torch.set_num_threads(1)
    print("| recipe | GFLOP per step | steps | PFLOP |\n|---|---|---|---|")
    sums: dict[str, float] = {}
    for name in (*SHARED, *WITH_3D, WITHOUT):
        each, steps = (
            operations(name, labels, episodes, batches),
            get_recipe(name).optimization.steps,
        )
        sums[name] = each * steps
        print(
            f"| `{name}` | {each / 1e9:.1f} | {steps:,} | {each * steps / 1e15:.3f} |", flush=True
        )
    ours = sum(sums[name] for name in WITH_3D)
    print(f"\nAfter {' and '.join(SHARED)}: {ours / 1e15:.3f} PFLOP with 3D, ", end="")
    print(f"{sums[WITHOUT] / 1e15:.3f} without ({sums[WITHOUT] / ours:.2f} times as many).")


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(main)))
