"""How much faster is a training step on a CPU when the process keeps the memory that it frees?

    python -m experiments.memory_allocator --episodes runs/episodes --labels runs/labels

Compared are a process as it is, one with `keep_freed_memory`, and one with jemalloc if it is
installed. Each variant runs in processes of its own, in turn. Measured are the processor time (with
the system's for the process) of nano-vla's step on ever new batches on one thread, and page faults.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro

from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.models.devices import keep_freed_memory
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

JEMALLOC_LIBRARY = ctypes.util.find_library("jemalloc")
JEMALLOC_VARIABLES = {
    "LD_PRELOAD": JEMALLOC_LIBRARY or "",
    "MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1,lg_extent_max_active_fit:16",
}
KEPT_SETTING = "kept"


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    times_ms     processor time of each step.
    page_faults  per step.
    memory_mb    the most memory that the process had.
    """

    times_ms: list[float]
    page_faults: float
    memory_mb: float


def measure(episodes: Path, labels: Path, batch_size: int, steps: int) -> Measurement:
    """Measure so many steps, after as many that are not measured."""
    torch.set_num_threads(1)
    recipe = get_recipe("nano-vla").with_changes(batch_size=batch_size)
    inputs = TrainingInputs([labels], [WeightedStore("sim", EpisodeStore(episodes), 1.0)])
    _, task, _ = build(recipe, inputs)
    stepper = Stepper(task, recipe.optimization, seed=0)
    for number in range(steps):
        stepper(0, [task.batch(number)])

    usage_before = resource.getrusage(resource.RUSAGE_SELF)
    times_ms = []
    for number in range(steps, 2 * steps):
        batch = task.batch(number)
        start = time.process_time()
        stepper(0, [batch])
        times_ms.append(1000 * (time.process_time() - start))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    page_faults = (usage.ru_minflt - usage_before.ru_minflt) / steps
    return Measurement(times_ms, page_faults, usage.ru_maxrss / 1024)


def run_variant(options: Sequence[str], variables: Mapping[str, str]) -> Measurement:
    """Measure in a process of its own with these environment variables."""
    command = [sys.executable, "-m", "experiments.memory_allocator", *options]
    environment = {**os.environ, **variables}
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
    return Measurement(**json.loads(result.stdout))


def print_table(measurements: Mapping[str, Sequence[Measurement]]) -> None:
    print(
        "| freed memory is | ms per step (least–most of the medians) | page faults per step "
        "| most memory |"
    )
    print("|---" * 4 + "|")
    medians_ms = {}
    for name, processes in measurements.items():
        medians_ms[name] = [statistics.median(process.times_ms) for process in processes]
        median = statistics.median(medians_ms[name])
        step_time = f"{median:.0f} ({min(medians_ms[name]):.0f}–{max(medians_ms[name]):.0f})"
        faults = statistics.median(process.page_faults for process in processes)
        memory = statistics.median(process.memory_mb for process in processes)
        print(f"| {name} | {step_time} | {faults:,.0f} | {memory:,.0f} MB |")

    for name, variant_medians in medians_ms.items():
        if name == KEPT_SETTING:
            continue
        pairs = zip(variant_medians, medians_ms[KEPT_SETTING], strict=True)
        ratios = [variant_ms / kept_ms for variant_ms, kept_ms in pairs]
        median = statistics.median(ratios)
        print(f"{name} ÷ {KEPT_SETTING}: {median:.3f} ({min(ratios):.3f} … {max(ratios):.3f})")


def main(
    episodes: Path = Path("runs/episodes"),
    labels: Path = Path("runs/labels"),
    batch_size: int = 32,
    steps: int = 60,
    rounds: int = 3,
    variant: str = "",
) -> None:
    """Measure, and print a table.

    Args:
        episodes: folder of demonstrations.
        labels: folder of labeled images.
        batch_size: robot steps per training step.
        steps: that are measured in a process, after as many that are not.
        rounds: processes of each variant.
        variant: used by the processes that are started.
    """
    if variant:
        if variant == KEPT_SETTING and not keep_freed_memory():
            raise SystemExit("no glibc here: there is nothing to compare")
        print(json.dumps(asdict(measure(episodes, labels, batch_size, steps))))
        return

    variables: dict[str, dict[str, str]] = {"given back": {}, KEPT_SETTING: {}}
    if JEMALLOC_LIBRARY:
        variables["jemalloc"] = JEMALLOC_VARIABLES
    measurements: dict[str, list[Measurement]] = {name: [] for name in variables}
    for _ in range(rounds):
        for name, processes in measurements.items():
            options = [
                f"--episodes={episodes}",
                f"--labels={labels}",
                f"--batch-size={batch_size}",
                f"--steps={steps}",
                f"--variant={name}",
            ]
            processes.append(run_variant(options, variables[name]))
    print_table(measurements)


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
