"""Training speed: the loop with its data pipeline ÷ the bare network (goal: at least 0.95).

    python benchmarks/train/loop.py --episodes runs/episodes --labels runs/labels

Both sides do the same work on the same model: forward, backward, gradient clipping, optimiser step,
averaging, on the same batches, whose prompts differ in length. The loop decodes, augments and tokenises them
in a loader process, and logs; the bare side gets them from memory. Checkpoints are not in it. Rounds
alternate, so that a change of the machine's speed meets both. The loader stands still while the bare side is
measured; what it had made ahead is used up before a round of the loop counts.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

from spear.cli import guarded
from spear.data.store.episode_store import EpisodeStore
from spear.train import loop
from spear.train.build import build
from spear.train.log import Logger
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

AHEAD = 6
"""Steps of the loop that are not counted: as many as the loader may have made batches for, and a little
more."""


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
    stage = get_recipe("nano-vla")
    changes = {"batch_size": batch_size} | ({} if labels else {"question_images": 0})
    inputs = TrainingInputs([labels] if labels else (), [("sim", EpisodeStore(episodes), 1.0)])
    _, task, _ = build(stage.with_changes(**changes), inputs)
    opt = stage.optimization
    step = Stepper(task, opt, seed=0)
    for _ in range(3):
        step(0, [task.batch(0)])
    bare, whole, waited = [], [], []
    first = 0
    with tempfile.TemporaryDirectory() as folder:
        source = loop.load_batches(task, 0, 10**5, workers=1)
        with Logger(Path(folder), first_step=0, total=(AHEAD + steps) * rounds) as logger:
            next(source)
            (loader,) = (process.pid for process in multiprocessing.active_children())
            assert loader is not None
            try:
                for _ in range(rounds):
                    os.kill(loader, signal.SIGCONT)
                    kept: list[loop.Batch] = []
                    waits = 0.0
                    for number in range(AHEAD + steps):
                        if number == AHEAD:
                            begun, waits, kept = time.perf_counter(), 0.0, []
                        asked = time.perf_counter()
                        batch = next(source)
                        waits += time.perf_counter() - asked
                        logger.log(first, step(first, [batch]))
                        kept.append(batch)
                        first += 1
                    whole.append(time.perf_counter() - begun)
                    waited.append(waits / whole[-1])
                    os.kill(loader, signal.SIGSTOP)
                    begun = time.perf_counter()
                    for batch in kept:
                        step(0, [batch])
                    bare.append(time.perf_counter() - begun)
            finally:
                os.kill(loader, signal.SIGCONT)
    ratios = [b / w for b, w in zip(bare, whole, strict=True)]
    rate = batch_size * steps
    print("| | samples/s | |\n|---|---|---|")
    print(f"| bare network | {rate / statistics.median(bare):.1f} | |")
    print(
        f"| training loop | {rate / statistics.median(whole):.1f} | waits for data "
        f"{statistics.median(waited):.1%} |"
    )
    print(
        f"| loop ÷ bare | {statistics.median(ratios):.3f} | {min(ratios):.3f} … {max(ratios):.3f}, "
        f"{rounds} rounds |"
    )


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(main)))
