"""How a step of nano-vlm-2 on a CPU slows down as training goes on: with tensors of ever new sizes, and with
sizes filled up to few ones, as `spear train` does.

    python -m experiments.tensor_sizes --labels runs/labels

Each way in a process of its own, in turn; processor time of a new batch and its step, one thread.
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
from spear.models.weights.folders import locate
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

WAYS = {"new": (1, 1), "few": (vlm.PAD_LENGTH_TO_MULTIPLE, vlm.PAD_NUM_TARGETS_TO_MULTIPLE)}
"""Sizes → multiples of what they are."""


def measure(labels: Path, init: str, steps: int) -> list[float]:
    """Milliseconds of each step."""
    torch.set_num_threads(1)
    keep_freed_memory()
    stage = get_recipe("nano-vlm-2").with_changes(steps=steps)
    _, task, _ = build(stage, TrainingInputs([labels], [], locate(init)))
    step = Stepper(task, stage.optimization, seed=0)
    times = []
    for number in range(steps):
        begun = time.process_time()
        step(number, [task.batch(number)])
        times.append(1000 * (time.process_time() - begun))
    return times


def main(
    labels: Path = Path("runs/labels"),
    init: str = "nano-vlm",
    steps: int = 800,
    rounds: int = 1,
    way: str = "",
) -> None:
    """Measure, and print a table.

    Args:
        labels: folder of labelled images. init: the model that is trained on. steps: per process.
        rounds: processes of each way. way: used by the processes that are started.
    """
    if way:
        vlm.PAD_LENGTH_TO_MULTIPLE, vlm.PAD_NUM_TARGETS_TO_MULTIPLE = WAYS[way]
        print(json.dumps(measure(labels, init, steps)))
        return
    found: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for _ in range(rounds):
        for name, runs in found.items():
            options = [f"--labels={labels}", f"--init={init}", f"--steps={steps}", f"--way={name}"]
            command = [sys.executable, __file__, *options]
            runs.append(
                json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
            )
    print("| sizes are | ms per step, first quarter | last quarter |\n|---|---|---|")
    part = steps // 4
    ends = {name: [statistics.fmean(run[-part:]) for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        first = statistics.fmean(statistics.fmean(run[:part]) for run in runs)
        print(f"| {name} | {first:.0f} | {statistics.fmean(ends[name]):.0f} |")
    ratios = [new / few for new, few in zip(ends["new"], ends["few"], strict=True)]
    print(
        f"new ÷ few, last quarter: {statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
    )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
