"""Does a step of nano-vlm-2 on a CPU slow down when tensors have ever new sizes?

    python -m experiments.tensor_sizes --labels runs/labels

Compared are tensors as long as their longest question, and sizes filled up to few ones, as
`spear train` does. Each variant runs in a process of its own, in turn. Measured is the processor
time of a new batch and its step on one thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import tyro

from spear.cli import run_reporting_errors
from spear.models import vlm
from spear.models.devices import keep_freed_memory
from spear.models.weights.folders import locate_checkpoint
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

VARIANTS = {
    "new": (1, 1),
    "few": (vlm.PAD_LENGTH_TO_MULTIPLE, vlm.PAD_NUM_TARGETS_TO_MULTIPLE),
}
"""Sizes → multiples that lengths and numbers of targets are filled up to."""


def measure_steps_ms(labels: Path, init: str, steps: int) -> list[float]:
    """Processor time of each step, milliseconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    recipe = get_recipe("nano-vlm-2").with_changes(steps=steps)
    _, task, _ = build(recipe, TrainingInputs([labels], [], locate_checkpoint(init)))
    stepper = Stepper(task, recipe.optimization, seed=0)
    times_ms = []
    for number in range(steps):
        start = time.process_time()
        stepper(number, [task.batch(number)])
        times_ms.append(1000 * (time.process_time() - start))
    return times_ms


def run_variant(variant: str, labels: Path, init: str, steps: int) -> list[float]:
    """Measure a variant in a process of its own."""
    command = [sys.executable, "-m", "experiments.tensor_sizes"]
    command += [f"--labels={labels}", f"--init={init}", f"--steps={steps}", f"--variant={variant}"]
    result = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(result.stdout)


def main(
    labels: Path = Path("runs/labels"),
    init: str = "nano-vlm",
    steps: int = 800,
    rounds: int = 1,
    variant: str = "",
) -> None:
    """Measure, and print a table.

    Args:
        labels: folder of labeled images.
        init: the model that is trained on.
        steps: per process.
        rounds: processes of each variant.
        variant: used by the processes that are started.
    """
    if variant:
        length_multiple, targets_multiple = VARIANTS[variant]
        vlm.PAD_LENGTH_TO_MULTIPLE = length_multiple
        vlm.PAD_NUM_TARGETS_TO_MULTIPLE = targets_multiple
        print(json.dumps(measure_steps_ms(labels, init, steps)))
        return

    runs: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, variant_runs in runs.items():
            variant_runs.append(run_variant(name, labels, init, steps))

    quarter = steps // 4
    last_quarters: dict[str, list[float]] = {}
    print("| sizes are | ms per step, first quarter | last quarter |\n|---|---|---|")
    for name, variant_runs in runs.items():
        first_quarters = [statistics.fmean(run[:quarter]) for run in variant_runs]
        last_quarters[name] = [statistics.fmean(run[-quarter:]) for run in variant_runs]
        first = statistics.fmean(first_quarters)
        last = statistics.fmean(last_quarters[name])
        print(f"| {name} | {first:.0f} | {last:.0f} |")

    pairs = zip(last_quarters["new"], last_quarters["few"], strict=True)
    ratios = [new / few for new, few in pairs]
    median = statistics.median(ratios)
    print(f"new ÷ few, last quarter: {median:.2f} ({min(ratios):.2f} … {max(ratios):.2f})")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
