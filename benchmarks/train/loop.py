"""Training speed: the training loop with its data loading ÷ the bare network.

    python benchmarks/train/loop.py --episodes runs/episodes --labels runs/labels

Both sides do the same work on the same model: forward, backward, gradient clipping, optimizer step
and averaging, on the same batches, whose prompts differ in length. The loop decodes, augments and
tokenizes them in a loader process, and writes a log; the bare side takes them from memory.
Checkpoints are not measured. Rounds of both sides alternate, so that a change of the machine's
speed affects both. The loader is stopped while the bare side is measured, and the batches that it
had loaded in advance are used up before a round of the loop is measured.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.train import loop
from spear.train.build import build
from spear.train.log import Logger
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

NUM_WARM_UP_STEPS = 3
# Steps of the loop that are not measured: as many as the loader may have loaded batches for, and a
# few more.
NUM_UNMEASURED_STEPS = 6


@dataclass
class LoopRound:
    """A measured round of the loop: its batches, its time, and how long it waited for batches."""

    batches: list[loop.Batch]
    duration_s: float
    waited_s: float


def measure_loop(
    stepper: Stepper, loader: Iterator[loop.Batch], logger: Logger, first_step: int, num_steps: int
) -> LoopRound:
    """Run the loop, and measure all but its first steps."""
    batches: list[loop.Batch] = []
    start = time.perf_counter()
    waited_s = 0.0
    for index in range(NUM_UNMEASURED_STEPS + num_steps):
        if index == NUM_UNMEASURED_STEPS:
            batches = []
            start = time.perf_counter()
            waited_s = 0.0
        wait_start = time.perf_counter()
        batch = next(loader)
        waited_s += time.perf_counter() - wait_start
        step = first_step + index
        logger.log(step, stepper(step, [batch]))
        batches.append(batch)
    return LoopRound(batches, time.perf_counter() - start, waited_s)


def measure_bare_network(stepper: Stepper, batches: list[loop.Batch]) -> float:
    """Return the seconds that the same steps take with batches in memory."""
    start = time.perf_counter()
    for batch in batches:
        stepper(0, [batch])
    return time.perf_counter() - start


def print_results(
    bare_s: list[float], loop_s: list[float], waiting: list[float], num_samples: int
) -> None:
    """Print both speeds in samples per second, and their ratio."""
    ratios = [bare / whole for bare, whole in zip(bare_s, loop_s, strict=True)]
    print("| | samples/s | |\n|---|---|---|")
    print(f"| bare network | {num_samples / statistics.median(bare_s):.1f} | |")
    print(
        f"| training loop | {num_samples / statistics.median(loop_s):.1f} | waits for data "
        f"{statistics.median(waiting):.1%} |"
    )
    print(
        f"| loop ÷ bare | {statistics.median(ratios):.3f} | {min(ratios):.3f} … {max(ratios):.3f}, "
        f"{len(ratios)} rounds |"
    )


def main(
    episodes: Path,
    labels: Path | None = None,
    steps: int = 60,
    rounds: int = 5,
    threads: int = 2,
    batch_size: int = 64,
) -> None:
    """Measure both sides, and print a table.

    Args:
        episodes: folder of demonstrations (`spear record`).
        labels: folder of labeled images; with it, 3D questions are asked as in the recipe.
        steps: steps per round.
        rounds: rounds of either side.
        threads: of PyTorch.
        batch_size: robot steps per training step.
    """
    torch.set_num_threads(threads)
    recipe = get_recipe("nano-vla").with_changes(batch_size=batch_size)
    if labels is None:
        recipe = recipe.with_changes(question_images=0)
    label_folders = [] if labels is None else [labels]
    inputs = TrainingInputs(label_folders, [WeightedStore("sim", EpisodeStore(episodes), 1.0)])
    _, task, _ = build(recipe, inputs)
    stepper = Stepper(task, recipe.optimization, seed=0)
    for _ in range(NUM_WARM_UP_STEPS):
        stepper(0, [task.batch(0)])

    bare_s: list[float] = []
    loop_s: list[float] = []
    waiting: list[float] = []
    steps_per_round = NUM_UNMEASURED_STEPS + steps
    with tempfile.TemporaryDirectory() as folder:
        loader = loop.load_pieces(task, 0, 10**5, workers=1)
        with Logger(Path(folder), first_step=0, num_steps=steps_per_round * rounds) as logger:
            next(loader)  # starts the loader process
            (process,) = multiprocessing.active_children()
            assert process.pid is not None
            try:
                for round_number in range(rounds):
                    os.kill(process.pid, signal.SIGCONT)
                    first_step = round_number * steps_per_round
                    measured = measure_loop(stepper, loader, logger, first_step, steps)
                    loop_s.append(measured.duration_s)
                    waiting.append(measured.waited_s / measured.duration_s)

                    os.kill(process.pid, signal.SIGSTOP)
                    bare_s.append(measure_bare_network(stepper, measured.batches))
            finally:
                os.kill(process.pid, signal.SIGCONT)
    print_results(bare_s, loop_s, waiting, num_samples=batch_size * steps)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
