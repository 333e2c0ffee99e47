"""A training step of the nano recipes in bfloat16 and in float32, in turn, with and without AMX's tiles.

    python benchmarks/train/step.py
    python benchmarks/train/step.py --recipes nano-vla nano-vlm-2 --limits "" --rounds 5

Makes a few labels and demonstrations, then runs each way in processes of its own, one after the other: one
thread, batches in memory, processor time of a step. limits: values of ONEDNN_MAX_CPU_ISA, "" for none.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import tyro

from spear.cli import guarded
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.models.devices import keep_freed_memory
from spear.models.presets import PRESETS
from spear.policy import locate
from spear.sim.record import record_episodes
from spear.sim_data.label_scenes import label_scenes
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import TrainingInputs
from spear.train.recipes import get_recipe

WAYS = ("bf16", "fp32")


def make(root: Path) -> None:
    """Labels of 12 scenes, and two demonstrations."""
    sizes = dict(PRESETS["nano"].image_sizes)
    label_scenes(root / "labels", 12, sizes, first_seed=10_000, workers=1)
    tasks = [("put_on", 10_000), ("stack_cube", 10_001)]
    write_episodes(
        record_episodes(tasks, sizes["external"], sizes["wrist"], workers=1), root / "episodes"
    )


def measure(root: Path, name: str, precision: str, steps: int) -> list[float]:
    """Milliseconds of each step after three to warm up."""
    torch.set_num_threads(1)
    keep_freed_memory()
    stage = get_recipe(name).with_changes(precision=precision)
    acts = stage.kind == "vla"
    episodes = [("made", EpisodeStore(root / "episodes"), 1.0)] if acts else []
    asks = not acts or stage.question_images
    init = locate("nano") if acts else None
    _, task, _ = build(stage, TrainingInputs([root / "labels"] if asks else (), episodes, init))
    step = Stepper(task, stage.optimization, seed=0)
    batches = [task.batch(i) for i in range(3)]
    times = []
    for number in range(3 + steps):
        begun = time.process_time()
        step(number, batches[number % 3])
        times.append(1000 * (time.process_time() - begun))
    return times[3:]


def main(
    recipes: tuple[str, ...] = ("nano-post",),
    limits: tuple[str, ...] = ("", "AVX512_CORE_BF16"),
    steps: int = 9,
    rounds: int = 3,
    way: tuple[str, ...] = (),
) -> None:
    """Measure, and print a table.

    Args:
        recipes: of policies or SPEAR-VLM. limits: see above. steps: per process. rounds: processes of a way.
        way: used by the processes that are started.
    """
    if way:
        print(json.dumps(measure(Path(way[0]), way[1], way[2], steps)))
        return
    with tempfile.TemporaryDirectory() as root:
        make(Path(root))
        print("| recipe | oneDNN may use | bf16, ms | fp32, ms | bf16 ÷ fp32 |")
        print("|---|---|---|---|---|")
        for name in recipes:
            for limit in limits:
                found: dict[str, list[float]] = {precision: [] for precision in WAYS}
                for _ in range(rounds):
                    for precision, medians in found.items():
                        words = ["--steps", str(steps), "--way", root, name, precision]
                        more = {"ONEDNN_MAX_CPU_ISA": limit} if limit else {}
                        done = subprocess.run(
                            [sys.executable, __file__, *words],
                            env={**os.environ, **more},
                            stdout=subprocess.PIPE,
                            check=True,
                        )
                        medians.append(statistics.median(json.loads(done.stdout.splitlines()[-1])))
                ratios = [a / b for a, b in zip(*found.values(), strict=True)]
                cells = [
                    f"{statistics.median(m):.0f} ({min(m):.0f}–{max(m):.0f})"
                    for m in found.values()
                ]
                span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
                print(f"| {name} | {limit or 'all'} | {' | '.join(cells)} | {span} |", flush=True)


if __name__ == "__main__":
    sys.exit(guarded(lambda: tyro.cli(main)))
