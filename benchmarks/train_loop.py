"""Training speed: the loop with its data pipeline ÷ the bare network on one fixed batch (goal: at least 0.95).

    python benchmarks/train_loop.py --episodes runs/episodes --labels runs/labels

Both sides do the same work on the same model: forward, backward, gradient clipping, optimiser step, averaging. The
bare side repeats one batch that is in memory; the loop decodes, augments and tokenises new ones in a loader process,
logs, and would write checkpoints. Rounds alternate, so that a change of the machine's speed meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
import tyro

from spear.data.episode import EpisodeStore
from spear.train import loop
from spear.train.log import Logger
from spear.train.optimize import Stepper
from spear.train.recipes import recipe
from spear.train.run import build


def main(
    episodes: Path,
    labels: Path | None = None,
    steps: int = 60,
    rounds: int = 5,
    threads: int = 2,
    batch_size: int = 64,
) -> None:
    """Measure.

    Args:
        episodes: folder of demonstrations (`spear record`).
        labels: folder of labelled images; with it, 3D questions are trained alongside as in the recipe.
        steps: steps per round. rounds: rounds of either side. threads: of PyTorch.
        batch_size: robot steps per training step.
    """
    torch.set_num_threads(threads)
    stage = recipe("nano-vla")
    changes = {"batch_size": batch_size} | ({} if labels else {"question_images": 0})
    _, task, _ = build(stage.changed(**changes), labels, [("sim", EpisodeStore(episodes), 1.0)])
    opt = stage.optimization
    step = Stepper(task, opt, seed=0)
    fixed = task.batch(0)
    for _ in range(3):
        step(0, fixed)
    bare, whole = [], []
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        source = loop.batches(task, 0, (rounds + 1) * steps, workers=1)
        logger = Logger(Path(folder), first_step=0, total=steps * rounds, quiet=True)
        for _ in range(steps):  # the loader fills its queue
            step(0, next(source))
        for _ in range(rounds):
            begun = time.perf_counter()
            for _ in range(steps):
                step(0, fixed)
            bare.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            for _ in range(steps):
                logger.log(first, step(first, next(source)))
                first += 1
            whole.append(time.perf_counter() - begun)
    ratios = [b / w for b, w in zip(bare, whole, strict=True)]
    rate = batch_size * steps
    print(f"bare network  {rate / statistics.median(bare):7.1f} samples/s")
    print(f"training loop {rate / statistics.median(whole):7.1f} samples/s")
    print(
        f"ratio {statistics.median(ratios):.3f} (min {min(ratios):.3f}, max {max(ratios):.3f}, {rounds} rounds)"
    )


if __name__ == "__main__":
    tyro.cli(main)
