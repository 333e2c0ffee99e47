"""The loader's speed on two cores: ours ÷ bare JPEG decoding (goal 0.8), and ours ÷ other ways (goal 3 each).

    python benchmarks/data/loader.py
    python benchmarks/data/loader.py --tensorflow-python …/bin/python   # one with tensorflow and pyarrow
    python benchmarks/data/loader.py --memory-samples 100000            # memory, instead of speed

Everybody loads the same steps of the same made-up episodes: two cameras, 640 x 480, 10 Hz as recorded, and as
`spear data prepare` makes them for SPEAR-1, 280 x 210 and 112 x 112, 5 Hz. Two processes or threads each.

    ours             what a training step gets from the prepared dataset: drawn, decoded, normalised,
                     tokenised.
    decode           the bare work: two processes decode the same prepared JPEGs, which are in memory.
    decode recorded  the same with the recorded JPEGs, which have to be made smaller: what preparing saves.
    video            the prepared dataset as LeRobot writes it, AV1 (`write_lerobot(images="video")`): each
                     step seeks in an open file and decodes from the key frame before it.
    video recorded   the recorded dataset as LeRobot writes it, frames made smaller after decoding.
    tf               tf.data over TFRecords of whole episodes with the prepared JPEGs
                     (`benchmarks/data/loader_tf.py`).
    tf recorded      the way of Octo and openpi: the same with the recorded JPEGs, made smaller after
                     decoding.

Who uses LeRobot or RLDS has the recorded episodes: the goals of 3 are for these. The ways on the prepared
ones show how much of that is the way and how much is the preparing.
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

from loader_data import CORES, VIEWS, Ours, Video, bare, loaded, make
from loader_turns import Command, Forked, Way, in_turn, table
from spear.cli import run_reporting_errors
from spear.data.mixture import Mixture
from spear.data.options import Conversion
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.data.store.prepare import prepare
from spear.train import loop

GOALS = {"decode": "0.8", "video recorded": "3", "tf recorded": "3"}
AHEAD = 5 * CORES
"""Batches that a loader's processes may have made ahead, and a little more."""


def _record(root: Path, number: int, episodes: int, steps: int) -> None:
    """A part of the recorded episodes."""
    write_episodes(
        (make(i, steps) for i in range(number, episodes, CORES)), root / f"part {number}"
    )


def _export(root: Path, name: str, kind: str) -> None:
    write_lerobot(
        EpisodeStore(root / name),
        root / f"{name} {kind}",
        images="video" if kind == "video" else "image",
    )


def side_by_side(jobs: list[partial[None]]) -> None:
    """Do some jobs in a process each, all at once."""
    processes = [multiprocessing.get_context("fork").Process(target=job) for job in jobs]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise SystemExit(f"making the episodes failed ({process.exitcode})")


def make_data(root: Path, episodes: int, steps: int) -> None:
    """The episodes as recorded, and prepared, as stores; says what preparing them takes."""
    side_by_side([partial(_record, root, number, episodes, steps) for number in range(CORES)])
    parts = [EpisodeStore(root / f"part {number}") for number in range(CORES)]
    ordered = (parts[i % CORES][i // CORES] for i in range(episodes))
    write_episodes(ordered, root / "recorded", shard_size=8)
    sizes = tuple(f"{camera}={width}x{height}" for camera, (height, width) in VIEWS.items())
    begun = time.perf_counter()
    prepare(root / "recorded", root / "prepared", conversion=Conversion(size=sizes), workers=CORES)
    took = time.perf_counter() - begun
    frames = int(EpisodeStore(root / "prepared").lengths.sum())
    size = sum(p.stat().st_size for p in (root / "prepared").rglob("*") if p.is_file())
    print(
        f"prepared {frames} steps of {episodes} episodes, two cameras each, "
        f"{size / frames / 1024:.1f} KiB a step,"
    )
    print(f"in {took:.1f} s: {frames / took:.0f} steps/s", flush=True)


def memory_mb(pids: list[int]) -> float:
    """Memory of some processes that is their own: without mapped files, which the system can drop."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def watch_memory(task: Ours, samples: int) -> None:
    """Print the memory of the loader's processes over many samples."""
    source = loop.load_batches(cast(loop.Task, task), 0, 10**5, workers=CORES)
    every = max(1, samples // task.batch_size // 10)
    seen = []
    for count in range(samples // task.batch_size):
        next(source)
        if (count + 1) % every == 0:
            workers = [process.pid for process in multiprocessing.active_children()]
            seen.append(memory_mb([os.getpid(), *(pid for pid in workers if pid)]))
            print(f"{(count + 1) * task.batch_size:8d} samples  {seen[-1]:8.0f} MB", flush=True)
    print(f"growth after the first tenth: {seen[-1] - seen[0]:.0f} MB")


def main(
    episodes: int = 12,
    steps: int = 80,
    batch_size: int = 32,
    seconds: float = 2.0,
    rounds: int = 5,
    tensorflow_python: Path | None = None,
    memory_samples: int = 0,
) -> None:
    """Measure.

    Args:
        episodes: made-up episodes. steps: of each, at 10 Hz.
        batch_size: samples of a batch.
        seconds: that each way works in a round. rounds: of all ways, taken in turn.
        tensorflow_python: Python with tensorflow and pyarrow; without it that way is left out, which is said.
        memory_samples: so many samples are loaded and the memory is watched, instead of the speed.
    """
    begun = time.perf_counter()
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root, episodes, steps)
        recorded, prepared = EpisodeStore(root / "recorded"), EpisodeStore(root / "prepared")
        mixture = Mixture([("made", prepared, 1.0)])
        ours = Ours(mixture, batch_size)
        if memory_samples:
            watch_memory(ours, memory_samples)
            return
        kinds = ["video"] if tensorflow_python is None else ["video", "image"]
        side_by_side(
            [partial(_export, root, n, k) for k in kinds for n in ("recorded", "prepared")]
        )
        videos = {
            name: Video(root / f"{name} video", mixture, batch_size)
            for name in ("prepared", "recorded")
        }
        ways: dict[str, Way] = {}
        try:
            ways["ours"] = Forked(partial(loaded, ours), AHEAD)
            ways["decode"] = Forked(partial(bare, mixture, prepared, batch_size), 1)
            ways["decode recorded"] = Forked(partial(bare, mixture, recorded, batch_size), 1)
            ways["video"] = Forked(partial(loaded, videos["prepared"]), AHEAD)
            ways["video recorded"] = Forked(partial(loaded, videos["recorded"]), AHEAD)
            if tensorflow_python is not None:
                script = [str(tensorflow_python), str(Path(__file__).with_name("loader_tf.py"))]
                for name, source in (("tf", "prepared"), ("tf recorded", "recorded")):
                    options = [str(root / f"{source} image"), str(batch_size), str(CORES)]
                    sizes = [
                        f"{camera}={width}x{height}" for camera, (height, width) in VIEWS.items()
                    ]
                    ways[name] = Command([*script, *options, *sizes])
            taken = in_turn(ways, rounds, seconds)
        finally:
            for way in ways.values():
                way.end()
    print(table(taken, "ours", GOALS))
    missing = "" if tensorflow_python else "; tf.data was left out (--tensorflow-python)"
    print(
        f"medians (and ranges) of {rounds} rounds in turn, {seconds:g} s each; batches of "
        f"{batch_size}{missing}"
    )
    print(f"all of it took {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
