"""The loader's speed on two cores, divided by that of JPEG decoding (goal 0.8) and of other loaders
(goal 3).

    python benchmarks/data/loader.py
    python benchmarks/data/loader.py --tensorflow-python …/bin/python  # with tensorflow
    python benchmarks/data/loader.py --memory-samples 100000  # memory, instead of speed

All loaders load the same steps of the same made-up episodes with two cameras: as recorded, 640 x
480 at 10 Hz, and as `spear data prepare` makes them for SPEAR-1, 280 x 210 and 112 x 112 at 5 Hz.
Each has two processes or threads.

    ours             what a training step gets from the prepared dataset: drawn, decoded,
                     normalized, tokenized.
    decode           the bare work: two processes decode the same prepared JPEGs, in memory.
    decode recorded  the same with the recorded JPEGs, which are resized: what preparing saves.
    video            the prepared dataset as LeRobot writes it, AV1
                     (`write_lerobot(images="video")`): each step seeks in an open file and decodes
                     from the key frame before it.
    video recorded   the recorded dataset as LeRobot writes it, frames resized after decoding.
    tf               tf.data over TFRecords of whole episodes with the prepared JPEGs
                     (`benchmarks/data/loader_tf.py`).
    tf recorded      what Octo and openpi do: the same with the recorded JPEGs, resized.

Users of LeRobot or RLDS have the recorded episodes, so the goals of 3 are for these. The loaders of
the prepared ones show how much of the difference is the loader and how much is the preparing.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import cast

import torch
import tyro

from loader_data import (
    NUM_CORES,
    VIEWS,
    OurTask,
    VideoTask,
    decode_in_memory,
    load_with_processes,
    make_detailed_episode,
)
from loader_turns import CommandLoader, ForkedLoader, Loader, format_table, measure_in_turns
from spear.cli import run_reporting_errors
from spear.data.mixture import Mixture
from spear.data.options import Conversion
from spear.data.store.episode_store import EpisodeStore, WeightedStore, append_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare
from spear.train import loop

GOALS = {"decode": "0.8", "video recorded": "3", "tf recorded": "3"}
NUM_BATCHES_AHEAD = 5 * NUM_CORES  # that a loader's processes may have made, and a few more
MAX_STEPS = 10**5
SIZE_OPTIONS = tuple(f"{camera}={width}x{height}" for camera, (height, width) in VIEWS.items())


def _record_part(root: Path, number: int, num_episodes: int, num_steps: int) -> None:
    """Write every second of the recorded episodes."""
    episodes = (
        make_detailed_episode(index, num_steps) for index in range(number, num_episodes, NUM_CORES)
    )
    append_episodes(episodes, root / f"part {number}")


def _export_video(root: Path, name: str) -> None:
    write_lerobot(EpisodeStore(root / name), root / f"{name} video", images="video")


def _export_images(root: Path, name: str) -> None:
    write_lerobot(EpisodeStore(root / name), root / f"{name} image", images="image")


def run_in_parallel(jobs: list[partial[None]]) -> None:
    """Run each job in its own process, all at the same time."""
    processes = [multiprocessing.get_context("fork").Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"making the episodes failed ({process.exitcode})")


def make_data(root: Path, num_episodes: int, num_steps: int) -> None:
    """Write the episodes as recorded, and prepared, as stores; print what preparing them takes."""
    run_in_parallel(
        [
            partial(_record_part, root, number, num_episodes, num_steps)
            for number in range(NUM_CORES)
        ]
    )
    stores = [EpisodeStore(root / f"part {number}") for number in range(NUM_CORES)]
    ordered = (stores[index % NUM_CORES][index // NUM_CORES] for index in range(num_episodes))
    append_episodes(ordered, root / "recorded", shard_size=8)

    start_s = time.perf_counter()
    conversion = Conversion(image_size=SIZE_OPTIONS)
    prepare(root / "recorded", root / "prepared", conversion=conversion, workers=NUM_CORES)
    duration_s = time.perf_counter() - start_s

    num_prepared = int(EpisodeStore(root / "prepared").lengths.sum())
    files = [path for path in (root / "prepared").rglob("*") if path.is_file()]
    kib_per_step = sum(file.stat().st_size for file in files) / num_prepared / 1024
    print(
        f"prepared {num_prepared} steps of {num_episodes} episodes, two cameras each, "
        f"{kib_per_step:.1f} KiB a step,"
    )
    print(f"in {duration_s:.1f} s: {num_prepared / duration_s:.0f} steps/s", flush=True)


def measure_memory_mb(pids: list[int]) -> float:
    """Anonymous memory of some processes: without mapped files, which the system can drop."""
    total_kb = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                total_kb += int(line.split()[1])
    return total_kb / 1024


def watch_memory(task: OurTask, num_samples: int) -> None:
    """Print the memory of the loader's processes over many samples."""
    source = loop.load_pieces(cast(loop.Task, task), 0, MAX_STEPS, workers=NUM_CORES)
    num_batches = num_samples // task.batch_size
    interval = max(1, num_batches // 10)
    measured_mb: list[float] = []
    for count in range(1, num_batches + 1):
        next(source)
        if count % interval == 0:
            pids = [process.pid for process in multiprocessing.active_children() if process.pid]
            measured_mb.append(measure_memory_mb([os.getpid(), *pids]))
            print(f"{count * task.batch_size:8d} samples  {measured_mb[-1]:8.0f} MB", flush=True)
    print(f"growth after the first tenth: {measured_mb[-1] - measured_mb[0]:.0f} MB")


def start_loaders(
    root: Path, mixture: Mixture, batch_size: int, tensorflow_python: Path | None
) -> dict[str, Loader]:
    """Export the data as the other loaders need it, and start all loaders."""
    jobs = [partial(_export_video, root, name) for name in ("recorded", "prepared")]
    if tensorflow_python is not None:
        jobs += [partial(_export_images, root, name) for name in ("recorded", "prepared")]
    run_in_parallel(jobs)

    tasks = {
        "ours": OurTask(mixture, batch_size),
        "video": VideoTask(root / "prepared video", mixture, batch_size),
        "video recorded": VideoTask(root / "recorded video", mixture, batch_size),
    }
    stores = {
        "decode": EpisodeStore(root / "prepared"),
        "decode recorded": EpisodeStore(root / "recorded"),
    }
    loaders: dict[str, Loader] = {}
    try:
        for name in ("ours", "decode", "decode recorded", "video", "video recorded"):
            if name in tasks:
                start = partial(load_with_processes, tasks[name])
                loaders[name] = ForkedLoader(start, NUM_BATCHES_AHEAD)
            else:
                start = partial(decode_in_memory, mixture, stores[name], batch_size)
                loaders[name] = ForkedLoader(start, 1)
        if tensorflow_python is not None:
            for name, source in (("tf", "prepared"), ("tf recorded", "recorded")):
                loaders[name] = _start_tensorflow(
                    tensorflow_python, root / f"{source} image", batch_size
                )
    except BaseException:
        stop_loaders(loaders)
        raise
    return loaders


def _start_tensorflow(python: Path, folder: Path, batch_size: int) -> CommandLoader:
    script = Path(__file__).with_name("loader_tf.py")
    command = [str(python), str(script), str(folder), str(batch_size), str(NUM_CORES)]
    return CommandLoader([*command, *SIZE_OPTIONS])


def stop_loaders(loaders: dict[str, Loader]) -> None:
    for loader in loaders.values():
        loader.stop()


def main(
    episodes: int = 12,
    steps: int = 80,
    batch_size: int = 32,
    seconds: float = 2.0,
    rounds: int = 5,
    tensorflow_python: Path | None = None,
    memory_samples: int = 0,
) -> None:
    """Measure the loaders.

    Args:
        episodes: number of made-up episodes. steps: of each, at 10 Hz.
        batch_size: samples in a batch.
        seconds: that each loader works in a round. rounds: of all loaders, taken in turns.
        tensorflow_python: Python with tensorflow and pyarrow; without it, tf.data is not measured.
        memory_samples: if given, load so many samples and watch the memory, instead of the speed.
    """
    start_s = time.perf_counter()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:NUM_CORES])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root, episodes, steps)
        mixture = Mixture([WeightedStore("made", EpisodeStore(root / "prepared"), 1.0)])
        if memory_samples:
            watch_memory(OurTask(mixture, batch_size), memory_samples)
            return

        loaders = start_loaders(root, mixture, batch_size, tensorflow_python)
        try:
            turns = measure_in_turns(loaders, rounds, seconds)
        finally:
            stop_loaders(loaders)

    print(format_table(turns, "ours", GOALS))
    missing = "" if tensorflow_python else "; tf.data was left out (--tensorflow-python)"
    print(
        f"medians (and ranges) of {rounds} rounds in turn, {seconds:g} s each; batches of "
        f"{batch_size}{missing}"
    )
    print(f"all of it took {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
