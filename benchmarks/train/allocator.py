"""A training step on a CPU by three allocators: glibc's, glibc's that keeps freed memory (`spear train`'s),
and jemalloc where it is installed: time at the beginning and at the end, memory.

    python benchmarks/train/allocator.py --episodes runs/episodes --labels runs/labels
    python benchmarks/train/allocator.py --labels runs/labels --name nano-vlm-2 --steps 400 --rounds 1

Each way in processes of its own, in turn; processor time (the system's for the process included), one
thread, every step on another batch, all of them made before.
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
from typing import Any

import torch
import tyro

from spear.data.store.episode_store import EpisodeStore
from spear.models.devices import bfloat16_is_fast, keep_freed_memory
from spear.models.weights.folders import locate
from spear.train.build import build
from spear.train.optimize import Stepper
from spear.train.options import Inputs
from spear.train.recipes import recipe

WAYS = ("given back", "kept", "jemalloc")
NO_DECAY = "dirty_decay_ms:-1,muzzy_decay_ms:-1,narenas:1"


def measure(name: str, episodes: Path, labels: Path, steps: int) -> dict[str, Any]:
    """Milliseconds of each step, page faults per step, the most memory that the process had (MB), and the
    last loss."""
    torch.set_num_threads(1)
    stage = recipe(name)
    if not bfloat16_is_fast(torch.device("cpu")):
        stage = stage.changed(precision="fp32")  # as `spear train` does
    robots = [("sim", EpisodeStore(episodes), 1.0)] if stage.kind == "vla" else []
    init = locate("nano" if stage.kind == "vla" else "nano-vlm")
    _, task, _ = build(stage, Inputs([labels], robots, init))
    step = Stepper(task, stage.optimization, seed=0)
    batches = [task.batch(i) for i in range(steps)]
    before, times = resource.getrusage(resource.RUSAGE_SELF), []
    for number, batch in enumerate(batches):
        begun = time.process_time()
        loss = step(number, batch)["loss"]
        times.append(1000 * (time.process_time() - begun))
    after = resource.getrusage(resource.RUSAGE_SELF)
    faults = (after.ru_minflt - before.ru_minflt) / steps
    return {"ms": times, "faults": faults, "most": after.ru_maxrss / 1024, "loss": float(loss)}


def main(
    name: str = "nano-vla",
    episodes: Path = Path("runs/episodes"),
    labels: Path = Path("runs/labels"),
    steps: int = 60,
    rounds: int = 3,
    way: str = "",
) -> None:
    """Measure, and print a table.

    Args:
        name: the recipe. episodes: folder of demonstrations. labels: folder of labelled images.
        steps: per process. rounds: processes of each way. way: used by the processes that are started.
    """
    if way:
        if way == "kept" and not keep_freed_memory():
            raise SystemExit("no glibc here: there is nothing to compare")
        print(json.dumps(measure(name, episodes, labels, steps)))
        return
    library = ctypes.util.find_library("jemalloc")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS if way != "jemalloc" or library}
    for _ in range(rounds):
        for one, results in found.items():
            options = [f"--name={name}", f"--episodes={episodes}", f"--labels={labels}", f"--steps={steps}"]
            preload = {"LD_PRELOAD": str(library), "MALLOC_CONF": NO_DECAY} if one == "jemalloc" else {}
            command = [sys.executable, __file__, *options, f"--way={one}"]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env={**os.environ, **preload})
            results.append(json.loads(done.stdout))
    quarter = max(1, steps // 4)
    print(
        "| freed memory is | ms per step, first quarter | last quarter | page faults per step | most memory |"
    )
    print("|---" * 5 + "|")
    ends: dict[str, list[float]] = {}
    for one, results in found.items():
        first = statistics.median(statistics.median(r["ms"][:quarter]) for r in results)
        ends[one] = [statistics.median(r["ms"][-quarter:]) for r in results]
        faults, most = (statistics.median(r[key] for r in results) for key in ("faults", "most"))
        row = f"{first:.0f} | {statistics.median(ends[one]):.0f} | {faults:,.0f} | {most:,.0f} MB"
        print(f"| {one} | {row} |")
    for one in ends.keys() - {"kept"}:
        ratios = [a / b for a, b in zip(ends[one], ends["kept"], strict=True)]
        middle = statistics.median(ratios)
        print(f"{one} ÷ kept, last quarter: {middle:.3f} ({min(ratios):.3f} … {max(ratios):.3f})")
    print("same losses:", len({r["loss"] for results in found.values() for r in results}) == 1)


if __name__ == "__main__":
    tyro.cli(main)
