"""A training step on a CPU with and without `keep_freed_memory`, and with jemalloc where it is installed:
time, and pages that the system had to hand out.

    python -m experiments.memory_allocator --episodes runs/episodes --labels runs/labels

Each way in processes of its own, in turn; processor time (the system's for the process included) of
nano-vla's step on ever new batches, one thread.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore
from spear.models.devices import keep_freed_memory
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

JEMALLOC = {
    "LD_PRELOAD": ctypes.util.find_library("jemalloc") or "",
    "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:16",
}
WAYS: dict[str, dict[str, str]] = {"given back": {}, "kept": {}, "jemalloc": JEMALLOC}
"""What becomes of freed memory -> variables of the process."""


def measure(
    episodes: Path, labels: Path, batch_size: int, steps: int
) -> tuple[list[float], float, float]:
    """Milliseconds of each step, page faults per step, and the most memory that the process had, MB."""
    torch.set_num_threads(1)
    stage = get_recipe("nano-vla").with_changes(batch_size=batch_size)
    _, task, _ = build(stage, TrainingInputs([labels], [("sim", EpisodeStore(episodes), 1.0)]))
    step = Stepper(task, stage.optimization, seed=0)
    for number in range(steps):
        step(0, [task.batch(number)])
    before, times = resource.getrusage(resource.RUSAGE_SELF), []
    for number in range(steps, 2 * steps):
        batch, begun = task.batch(number), time.process_time()
        step(0, [batch])
        times.append(1000 * (time.process_time() - begun))
    after = resource.getrusage(resource.RUSAGE_SELF)
    return times, (after.ru_minflt - before.ru_minflt) / steps, after.ru_maxrss / 1024


def main(
    episodes: Path = Path("runs/episodes"),
    labels: Path = Path("runs/labels"),
    batch_size: int = 32,
    steps: int = 60,
    rounds: int = 3,
    way: str = "",
) -> None:
    """Measure, and print a table.

    Args:
        episodes: folder of demonstrations. labels: folder of labelled images.
        batch_size: robot steps per training step. steps: that are measured in a process, after as many that
        are not. rounds: processes of each way.
        way: used by the processes that are started.
    """
    if way:
        if way == "kept" and not keep_freed_memory():
            raise SystemExit("no glibc here: there is nothing to compare")
        print(json.dumps(measure(episodes, labels, batch_size, steps)))
        return
    ways = {name: own for name, own in WAYS.items() if "" not in own.values()}
    found: dict[str, list[tuple[list[float], float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, results in found.items():
            options = [f"--episodes={episodes}", f"--labels={labels}", f"--batch-size={batch_size}"]
            command = [sys.executable, __file__, *options, f"--steps={steps}", f"--way={name}"]
            env = {**os.environ, **ways[name]}
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=env)
            results.append(json.loads(done.stdout))
    print(
        "| freed memory is | ms per step (least–most of the medians) | page faults per step | most memory |"
    )
    print("|---" * 4 + "|")
    medians = {
        name: [statistics.median(times) for times, _, _ in some] for name, some in found.items()
    }
    for name, some in found.items():
        each, faults = medians[name], statistics.median(f for _, f, _ in some)
        most = statistics.median(m for _, _, m in some)
        span = f"{statistics.median(each):.0f} ({min(each):.0f}–{max(each):.0f})"
        print(f"| {name} | {span} | {faults:,.0f} | {most:,.0f} MB |")
    for name in [name for name in found if name != "kept"]:
        ratios = [a / b for a, b in zip(medians[name], medians["kept"], strict=True)]
        print(
            f"{name} ÷ kept: {statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})"
        )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
