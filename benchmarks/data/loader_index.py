"""Start-up of training on a mixture of the paper's size: 24 datasets, 45 million frames (goal:
under 10 s).

    python benchmarks/data/loader_index.py

Writes prepared datasets of this size with made-up numbers and images of zeros, which take no space
on the disk because the files are sparse. Then a fresh process opens them as `spear train` does,
fits the normalization, and draws the steps of a batch. About 5 GB of disk are needed meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tyro

from spear.cli import run_reporting_errors
from spear.data.actions import HORIZON
from spear.data.mixture import Mixture
from spear.data.normalize import NUM_AXES, Normalizer, write_sketches
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.data.store.prepare import MAX_SHARD_MIB
from spear.data.store.shard import write_shard_files
from spear.data.store.stats import QuantileSketch
from spear.types import Episode

CAMERAS = ("external", "wrist")
BATCH_SIZE = 2048
MEMORY_FIELDS = {"memory of its own, MB": "RssAnon", "mapped files, MB": "RssFile"}


def write_dataset(
    folder: Path, number: int, num_frames: int, episode_steps: int, step_bytes: int
) -> None:
    """Write a prepared dataset and its statistics, with images of zeros."""
    max_episodes = max(1, MAX_SHARD_MIB * 2**20 // (step_bytes * episode_steps))
    num_episodes = max(1, round(num_frames / episode_steps))
    folder.mkdir(parents=True)
    shard_by_num_episodes: dict[int, Path] = {}  # shards that can be copied
    for shard, first in enumerate(range(0, num_episodes, max_episodes)):
        shard_episodes = min(max_episodes, num_episodes - first)
        path = folder / f"episodes-{shard:05d}.arrow"
        if shard_episodes in shard_by_num_episodes:
            shutil.copyfile(shard_by_num_episodes[shard_episodes], path)
        else:
            episodes = _make_episodes(number, shard_episodes, episode_steps, step_bytes)
            write_shard_files(path, episodes, {})
            shard_by_num_episodes[shard_episodes] = path
        with open(path.with_suffix(".images"), "wb") as file:
            file.truncate(shard_episodes * episode_steps * step_bytes)

    sketch = QuantileSketch()
    sketch.add(np.random.default_rng(number).normal(size=100_000))
    write_sketches(EpisodeStore(folder), [sketch] * NUM_AXES)


def _make_episodes(
    number: int, num_episodes: int, num_steps: int, step_bytes: int
) -> list[Episode]:
    """The episodes of a shard, which differ in their texts only."""
    zeros = np.zeros((num_steps, 3), np.float32)
    rotation = np.tile(np.array([1, 0, 0, 0], np.float32), (num_steps, 1))
    gripper = zeros[:, 0]
    image = bytes(step_bytes // len(CAMERAS))
    episodes: list[Episode] = []
    for index in range(num_episodes):
        episode = Episode(
            images={camera: [image] * num_steps for camera in CAMERAS},
            position=zeros,
            rotation=rotation,
            gripper=gripper,
            instruction=f"put object {index} on the plate",
            rate_hz=5.0,
            source=f"dataset_{number}/train#{index}",
            action=np.concatenate([zeros, rotation, gripper[:, None]], axis=1),
            action_mask=np.arange(num_steps) < num_steps - 1,
        )
        episodes.append(episode)
    return episodes


@contextmanager
def measure_time(measurements: dict[str, float], name: str) -> Iterator[None]:
    """Add the time that a part takes, and its processor time, to the measurements."""
    start_s = time.perf_counter()
    processor_start_s = time.process_time()
    yield
    measurements[f"{name}: s"] = time.perf_counter() - start_s
    measurements[f"{name}: s of the processor"] = time.process_time() - processor_start_s


def measure_start(root: Path) -> dict[str, float]:
    """Open everything and draw the steps of a batch; measure time and memory."""
    measurements: dict[str, float] = {}
    with measure_time(measurements, "all"):
        with measure_time(measurements, "open"):
            folders = sorted(root.iterdir())
            sources = [WeightedStore(folder.name, EpisodeStore(folder), 1.0) for folder in folders]
        with measure_time(measurements, "mixture"):
            mixture = Mixture(sources)
        with measure_time(measurements, "normalization"):
            Normalizer.fit([(source.store, source.weight) for source in sources])
        with measure_time(measurements, "first batch"):
            for sample in mixture.sample(0, BATCH_SIZE):
                mixture.read_state_and_chunk(sample, HORIZON)

    measurements["valid steps"] = len(mixture)
    measurements["episodes"] = sum(len(store) for _, store, _ in sources)
    status_lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in status_lines)
    for name, field in MEMORY_FIELDS.items():
        measurements[name] = int(status[field].split()[0]) / 1024
    return measurements


def print_sizes(root: Path, num_frames: int, num_datasets: int) -> None:
    """Print how large the files are, and how much of the disk they take."""
    file_stats = [path.stat() for path in root.glob("*/episodes-*")]
    size_gb = sum(stat.st_size for stat in file_stats) / 1e9
    # `st_blocks` counts blocks of 512 bytes.
    disk_gb = sum(512 * stat.st_blocks for stat in file_stats) / 1e9
    print(
        f"{num_frames} frames in {num_datasets} datasets, {len(file_stats)} files: "
        f"{size_gb:.0f} GB, {disk_gb:.2f} without the images",
        flush=True,
    )


def main(
    frames: int = 45_000_000,
    datasets: int = 24,
    episode_steps: int = 60,
    step_bytes: int = 30_000,
    root: Path | None = None,
) -> None:
    """Measure the start-up.

    Args:
        frames: of all datasets together. datasets: how many.
        episode_steps: steps of an episode. step_bytes: of its images together, which determines the
            number of files.
        root: open the datasets in this folder instead of making them (what the fresh process does).
    """
    if root is not None:
        print(json.dumps(measure_start(root)))
        return

    with tempfile.TemporaryDirectory() as folder:
        start_s = time.perf_counter()
        for number in range(datasets):
            dataset_folder = Path(folder) / f"dataset_{number:02d}"
            write_dataset(dataset_folder, number, frames // datasets, episode_steps, step_bytes)
        print_sizes(Path(folder), frames, datasets)
        os.sync()  # otherwise the system would still write while the datasets are opened
        print(f"made in {time.perf_counter() - start_s:.0f} s", flush=True)

        command = [sys.executable, __file__, "--root", folder]
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        for name, value in json.loads(process.stdout).items():
            print(f"{name:<40} {value:12,.2f}")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
