"""Start-up of training on a mixture of the paper's size: 24 datasets, 45 million frames (goal: under 10 s).

    python benchmarks/data/loader_index.py

Writes such prepared datasets with made-up numbers and images of zeros, which take no place on the disk (the
files are sparse). Then a fresh process opens them as `spear train` does, takes the normalisation, and draws
a batch's steps. About 5 GB of disk are needed for a while.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tyro

from spear.cli import run_reporting_errors
from spear.data.mixture import Mixture
from spear.data.normalize import Normalizer, write_sketches
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.prepare import MAX_SHARD_MIB
from spear.data.store.shard import write_shard
from spear.data.store.stats import QuantileSketch
from spear.types import Episode

CAMERAS = ("external", "wrist")


def write_dataset(
    folder: Path, number: int, frames: int, episode_steps: int, step_bytes: int
) -> None:
    """A prepared dataset and its statistics, its images zeros."""
    per_shard = max(1, (MAX_SHARD_MIB << 20) // (step_bytes * episode_steps))
    count = max(1, round(frames / episode_steps))
    folder.mkdir(parents=True)
    written: dict[int, Path] = {}  # by how many episodes are in the shard
    for shard, first in enumerate(range(0, count, per_shard)):
        episodes, path = min(per_shard, count - first), folder / f"episodes-{shard:05d}.arrow"
        if episodes in written:
            shutil.copyfile(written[episodes], path)
        else:
            write_shard(path, _episodes(number, episodes, episode_steps, step_bytes), {})
            written[episodes] = path
        size = episodes * episode_steps * step_bytes
        with open(path.with_suffix(".images"), "wb") as file:
            file.truncate(size)
    sketch = QuantileSketch()
    sketch.add(np.random.default_rng(number).normal(size=100_000))
    write_sketches(EpisodeStore(folder), [sketch] * 6)


def _episodes(number: int, count: int, steps: int, step_bytes: int) -> list[Episode]:
    """The episodes of a shard."""
    zeros = np.zeros((steps, 3), np.float32)
    turn = np.tile(np.array([1, 0, 0, 0], np.float32), (steps, 1))
    acted = np.concatenate([zeros, turn, zeros[:, :1]], axis=1)
    known = np.arange(steps) < steps - 1
    images = {camera: [bytes(step_bytes // len(CAMERAS))] * steps for camera in CAMERAS}
    episodes = []
    for e in range(count):
        words, name = f"put object {e} on the plate", f"dataset_{number}/train#{e}"
        episodes.append(Episode(images, zeros, turn, zeros[:, 0], words, 5.0, name, acted, known))
    return episodes


def start(root: Path) -> dict[str, float]:
    """Open everything and draw a batch of 2048 steps; seconds of each part, and what it took in memory."""
    marks = [(time.perf_counter(), time.process_time())]
    sources = [(p.name, EpisodeStore(p), 1.0) for p in sorted(root.iterdir())]
    marks.append((time.perf_counter(), time.process_time()))
    mixture = Mixture(sources)
    marks.append((time.perf_counter(), time.process_time()))
    Normalizer.fit([(store, weight) for _, store, weight in sources])
    marks.append((time.perf_counter(), time.process_time()))
    for sample in mixture.draw(0, 2048):
        mixture.read_arrays(sample, 5)
    marks.append((time.perf_counter(), time.process_time()))
    found: dict[str, float] = {
        "valid steps": len(mixture),
        "episodes": sum(len(s) for _, s, _ in sources),
    }
    for name, before, after in zip(
        ("open", "mixture", "normalisation", "first batch"), marks, marks[1:], strict=False
    ):
        found[f"{name}: s"], found[f"{name}: s of the processor"] = (
            after[0] - before[0],
            after[1] - before[1],
        )
    found["all: s"] = marks[-1][0] - marks[0][0]
    found["all: s of the processor"] = marks[-1][1] - marks[0][1]
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    for name, key in (("memory of its own, MB", "RssAnon"), ("mapped files, MB", "RssFile")):
        found[name] = int(status[key].split()[0]) / 1024
    return found


def main(
    frames: int = 45_000_000,
    datasets: int = 24,
    episode_steps: int = 60,
    step_bytes: int = 30_000,
    root: Path | None = None,
) -> None:
    """Measure.

    Args:
        frames: of all datasets together. datasets: how many.
        episode_steps: steps of an episode. step_bytes: of its images together, which says how many files
            there are.
        root: open what is in this folder instead of making it (what the fresh process does).
    """
    if root is not None:
        print(json.dumps(start(root)))
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        for number in range(datasets):
            write_dataset(
                Path(folder) / f"dataset_{number:02d}",
                number,
                frames // datasets,
                episode_steps,
                step_bytes,
            )
        files = [path.stat() for path in Path(folder).glob("*/episodes-*")]
        size, taken = (
            sum(f.st_size for f in files) / 1e9,
            sum(512 * f.st_blocks for f in files) / 1e9,
        )
        sizes = f"{size:.0f} GB, {taken:.2f} without the images"
        print(f"{frames} frames in {datasets} datasets, {len(files)} files: {sizes}", flush=True)
        os.sync()  # else the system writes while we open
        print(f"made in {time.perf_counter() - begun:.0f} s", flush=True)
        command = [sys.executable, __file__, "--root", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for name, value in json.loads(done.stdout).items():
            print(f"{name:<40} {value:12,.2f}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
