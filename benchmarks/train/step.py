"""A training step of the nano recipes in bfloat16 and in float32, with and without AMX's tiles.

    python benchmarks/train/step.py
    python benchmarks/train/step.py --recipes nano-vla nano-vlm-2 --limits "" --rounds 5

The script makes a few labels and demonstrations, and then measures each case in processes of its
own, one after the other: the processor time of a step, on one thread, with batches in memory. The
limits are values of ONEDNN_MAX_CPU_ISA, "" for none.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from spear.cli import run_reporting_errors
from spear.data.store.episode_store import EpisodeStore, WeightedStore, append_episodes
from spear.models.devices import keep_freed_memory
from spear.models.presets import PRESETS
from spear.policy import locate_checkpoint
from spear.sim.record import record_episodes
from spear.sim_data.label_scenes import label_scenes
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

NUM_WARM_UP_STEPS = 3
NUM_BATCHES = 3  # in memory, used in turn


def make_data(root: Path) -> None:
    """Label 12 scenes, and record two demonstrations."""
    sizes = dict(PRESETS["nano"].image_sizes)
    label_scenes(root / "labels", 12, sizes, first_seed=10_000, workers=1)
    tasks = [("put_on", 10_000), ("stack_cube", 10_001)]
    append_episodes(record_episodes(tasks, sizes, workers=1), root / "episodes")


def measure_steps(root: Path, name: str, precision: str, num_steps: int) -> list[float]:
    """Return the processor time of each step after the warm-up, in ms."""
    torch.set_num_threads(1)
    keep_freed_memory()
    recipe = get_recipe(name).with_changes(precision=precision)
    is_policy = recipe.kind == "vla"
    needs_labels = not is_policy or recipe.question_images > 0
    inputs = TrainingInputs(
        labels=[root / "labels"] if needs_labels else [],
        episodes=[WeightedStore("made", EpisodeStore(root / "episodes"), 1.0)] if is_policy else [],
        init=locate_checkpoint("nano") if is_policy else None,
    )
    _, task, _ = build(recipe, inputs)
    stepper = Stepper(task, recipe.optimization, seed=0)

    batches = [task.batch(number) for number in range(NUM_BATCHES)]
    times_ms = []
    for step in range(NUM_WARM_UP_STEPS + num_steps):
        start = time.process_time()
        stepper(step, [batches[step % NUM_BATCHES]])
        times_ms.append(1000 * (time.process_time() - start))
    return times_ms[NUM_WARM_UP_STEPS:]


def measure_in_process(root: str, name: str, precision: str, limit: str, num_steps: int) -> float:
    """Return the median time of a step in a process of its own, in ms."""
    environment = dict(os.environ)
    if limit:
        environment["ONEDNN_MAX_CPU_ISA"] = limit
    command = [sys.executable, __file__, "--steps", str(num_steps)]
    done = subprocess.run(
        [*command, "--worker", root, name, precision],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
    )
    return statistics.median(json.loads(done.stdout.splitlines()[-1]))


def format_range(values: Sequence[float], digits: int) -> str:
    """Return the median, the smallest and the largest value, as "12 (11–14)"."""
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main(
    recipes: tuple[str, ...] = ("nano-post",),
    limits: tuple[str, ...] = ("", "AVX512_CORE_BF16"),
    steps: int = 9,
    rounds: int = 3,
    worker: tuple[str, ...] = (),
) -> None:
    """Measure, and print a table.

    Args:
        recipes: of policies or SPEAR-VLM.
        limits: what oneDNN may use, see above.
        steps: steps per process.
        rounds: processes per case.
        worker: of the processes that this script starts: data folder, recipe and precision.
    """
    if worker:
        root, name, precision = worker
        print(json.dumps(measure_steps(Path(root), name, precision, steps)))
        return

    with tempfile.TemporaryDirectory() as root:
        make_data(Path(root))
        print("| recipe | oneDNN may use | bf16, ms | fp32, ms | bf16 ÷ fp32 |")
        print("|---|---|---|---|---|")
        for name in recipes:
            for limit in limits:
                bf16_ms: list[float] = []
                fp32_ms: list[float] = []
                for _ in range(rounds):  # in turn, so that a change of speed affects both
                    bf16_ms.append(measure_in_process(root, name, "bf16", limit, steps))
                    fp32_ms.append(measure_in_process(root, name, "fp32", limit, steps))
                ratios = [bf16 / fp32 for bf16, fp32 in zip(bf16_ms, fp32_ms, strict=True)]
                print(
                    f"| {name} | {limit or 'all'} | {format_range(bf16_ms, 0)} | "
                    f"{format_range(fp32_ms, 0)} | {format_range(ratios, 2)} |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
