"""The loader's speed on two cores: ours ÷ bare JPEG decoding (goal 0.8), and ours ÷ other ways (goal 3 each).

    python benchmarks/loader.py
    python benchmarks/loader.py --tensorflow-python /path/to/venv/bin/python     # with tensorflow and pyarrow in it
    python benchmarks/loader.py --memory-samples 100000                   # memory, instead of speed

Everybody loads the same steps of the same made-up episodes (two cameras, 640 x 480, 10 Hz), prepared once by
`spear data prepare` for SPEAR-1 (280 x 210 and 112 x 112, 5 Hz), with two processes or threads, in rounds that
alternate:

    ours    what a training step gets: drawn, decoded, normalised, tokenised, made by two loader processes.
    bare    two processes decode the same JPEGs, which are in memory, bring them to size, and drop them.
    whole   bare, on the original JPEGs: what training on unprepared data costs at least.
    video   the same dataset as LeRobot writes it, AV1 (`write_lerobot(images="video")`): each step seeks in an
            open file and decodes from the key frame before it. Its two loader processes hand over the pixels.
    tf      the way of Octo and openpi: TFRecords of whole episodes with the prepared JPEGs, tf.data with a
            shuffle buffer, decoding in parallel (`benchmarks/loader_tf.py`).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image

from spear.data.episode import EpisodeStore, write_episodes
from spear.data.lerobot import open_lerobot
from spear.data.lerobot_write import write_lerobot
from spear.data.mixture import Mixture, Sample, TrainingSamples
from spear.data.normalize import Normalizer
from spear.data.prepare import prepare
from spear.images import decode_image, encode_jpeg
from spear.models.presets import preset
from spear.models.processing import Processor, fit_image
from spear.tokens import CoordinateTokenizer
from spear.train import loop
from spear.train.vla import robot_inputs
from spear.types import Array, Episode

VIEWS = {"external": (210, 280), "wrist": (112, 112)}
CORES = 2
WORDS = [f"put the {thing} on the plate" for thing in ("carrot", "spoon", "mug", "sponge")]


def make(index: int, steps: int, size: tuple[int, int] = (480, 640)) -> Episode:
    """An episode at 10 Hz whose images have detail at all scales and move, so that JPEG and AV1 have work to do."""
    rng = np.random.default_rng(index)
    images = {}
    for camera in VIEWS:
        canvas = np.zeros((size[0] + 200, size[1] + 200, 3))
        for cells in (8, 30, 120):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            canvas += np.asarray(noise.resize(canvas.shape[1::-1], Image.Resampling.BICUBIC)) / 3
        still = np.clip(canvas + rng.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8)
        shift = (100 + 90 * np.sin(np.arange(steps) / 9)).astype(int)
        images[camera] = [encode_jpeg(still[s : s + size[0], 200 - s : 200 - s + size[1]]) for s in shift]
    t = np.arange(steps) / 10
    position = np.stack([0.3 + 0.1 * np.sin(t + index), 0.1 * np.cos(t), 0.2 + 0 * t], axis=1)
    rotation = np.stack([np.cos(t / 9), 0 * t, 0 * t, np.sin(t / 9)], axis=1)
    gripper = (t % 2 > 1).astype(float)
    words = WORDS[index % len(WORDS)]
    return Episode(images, position, rotation, gripper, words, 10.0, f"made#{index}")


class Ours:
    """What `spear.train.vla.VlaTask.batch` makes, without its network."""

    def __init__(self, mixture: Mixture, batch_size: int) -> None:
        self.samples = TrainingSamples(mixture, VIEWS, fit_image)
        self.normalizer = Normalizer.fit([(store, 1.0) for store in mixture.stores])
        values = np.random.default_rng(0).normal(size=4000)
        self.processor = Processor.build(preset("nano"), WORDS, CoordinateTokenizer.fit(values))
        self.batch_size = batch_size

    def batch(self, step: int) -> dict[str, Any]:
        return robot_inputs(self.processor, self.normalizer, self.samples.batch(step, self.batch_size))


class Video:
    """The same steps out of AV1 videos, in open files."""

    def __init__(self, folder: Path, mixture: Mixture, batch_size: int) -> None:
        self.dataset, self.mixture, self.batch_size = open_lerobot(folder), mixture, batch_size
        self.open = functools.lru_cache(maxsize=None)(self._open)

    @staticmethod
    def _open(path: Path) -> Any:
        import av

        container = av.open(str(path))
        container.streams.video[0].thread_count = 1  # two processes have two cores
        return container

    def frame(self, sample: Sample, camera: str) -> Array:
        path, first, _ = self.dataset.episodes[sample.episode].videos[f"observation.images.{camera}"]
        wanted = first + sample.step / self.dataset.rate_hz
        container = self.open(path)
        stream = container.streams.video[0]
        container.seek(int((wanted - 1e-3) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time > wanted - 1e-3:
                return frame.to_ndarray(format="rgb24")
        raise AssertionError(f"{path}: no frame at {wanted} s")

    def batch(self, step: int) -> dict[str, Any]:
        samples = self.mixture.draw(step, self.batch_size)
        arrays = [self.mixture.arrays(sample, 5) for sample in samples]
        batch = {
            f"numbers {i}": torch.from_numpy(np.stack(a)) for i, a in enumerate(zip(*arrays, strict=True))
        }
        for camera in VIEWS:
            batch[camera] = torch.from_numpy(np.stack([self.frame(sample, camera) for sample in samples]))
        return batch


def bare(mixture: Mixture, stores: list[EpisodeStore], batch_size: int, batches: int) -> Callable[[], float]:
    """Seconds that two processes take to decode and fit the images of some batches, which they have in memory.

    stores  one for each dataset of the mixture, at its rate or at a multiple of it.
    """
    images = []
    for step in range(batches):
        for sample in mixture.draw(step, batch_size):
            store = stores[sample.source]
            often = round(store.rate_hz(sample.episode) / 5)
            for camera, size in VIEWS.items():
                images.append((store.image(sample.episode, often * sample.step, camera) or b"", size))
    share = [images[i::CORES] for i in range(CORES)]
    context = multiprocessing.get_context("fork")
    ends = []
    for mine in share:
        here, there = context.Pipe()
        context.Process(target=_decode, args=(there, mine), daemon=True).start()
        ends.append(here)

    def round_() -> float:
        begun = time.perf_counter()
        for end in ends:
            end.send(True)
        for end in ends:
            end.recv()
        return time.perf_counter() - begun

    return round_


def _decode(end: Any, images: list[tuple[bytes, tuple[int, int]]]) -> None:
    while True:
        end.recv()
        for encoded, size in images:
            fit_image(decode_image(encoded), *size)
        end.send(True)


def loaded(task: Any, batches: int) -> Callable[[], float]:
    """Seconds that some batches take to come from two loader processes, once what they had made ahead is gone."""
    source: Iterator[Any] = loop.batches(task, 0, 10**9, workers=CORES)

    def round_() -> float:
        for _ in range(5 * CORES):
            next(source)
        begun = time.perf_counter()
        for _ in range(batches):
            next(source)
        return time.perf_counter() - begun

    return round_


def tensorflow(python: Path, folder: Path, batch_size: int, batches: int) -> Callable[[], float]:
    """The same for tf.data, in a Python of its own."""
    script = Path(__file__).with_name("loader_tf.py")
    arguments = [str(python), str(script), str(folder), str(batch_size), str(batches), str(CORES)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None and process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def round_() -> float:
        stdin.write("go\n")
        stdin.flush()
        return float(stdout.readline())

    return round_


def memory_mb(pids: list[int]) -> float:
    """Memory of some processes that is their own: without mapped files, which the system can drop."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def watch_memory(task: Ours, samples: int) -> None:
    """Print the memory of the loader's processes over many samples."""
    source = loop.batches(task, 0, 10**9, workers=CORES)
    every = max(1, samples // task.batch_size // 10)
    seen = []
    for count in range(samples // task.batch_size):
        next(source)
        if (count + 1) % every == 0:
            workers = [process.pid for process in multiprocessing.active_children()]
            seen.append(memory_mb([os.getpid(), *(pid for pid in workers if pid)]))
            print(f"{(count + 1) * task.batch_size:8d} samples  {seen[-1]:8.0f} MB")
    print(f"growth after the first tenth: {seen[-1] - seen[0]:.0f} MB")


def main(
    episodes: int = 30,
    steps: int = 80,
    batch_size: int = 64,
    batches: int = 12,
    rounds: int = 5,
    tensorflow_python: Path | None = None,
    memory_samples: int = 0,
) -> None:
    """Measure.

    Args:
        episodes: made-up episodes. steps: of each, at 10 Hz.
        batch_size: samples of a batch. batches: of a round.
        rounds: rounds of each way, taken in turn.
        tensorflow_python: Python with tensorflow and pyarrow; without it that way is left out.
        memory_samples: so many samples are loaded and the memory is watched, instead of the speed.
    """
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_episodes((make(i, steps) for i in range(episodes)), root / "original", shard_size=8)
        begun = time.perf_counter()
        sizes = {camera: (width, height) for camera, (height, width) in VIEWS.items()}
        prepare(root / "original", root / "prepared", sizes=sizes, fit_image=fit_image, workers=CORES)
        took = time.perf_counter() - begun
        original, store = EpisodeStore(root / "original"), EpisodeStore(root / "prepared")
        frames = int(store.lengths.sum())
        size = sum(p.stat().st_size for p in (root / "prepared").rglob("*") if p.is_file())
        print(
            f"prepare  {frames / took:7.0f} steps/s ({len(VIEWS)} cameras), {size / frames / 1024:.1f} KiB each"
        )
        mixture = Mixture([("made", store, 1.0)])
        ours = Ours(mixture, batch_size)
        if memory_samples:
            watch_memory(ours, memory_samples)
            return
        write_lerobot(store, root / "video", images="video")
        ways = {
            "bare": bare(mixture, [store], batch_size, batches),
            "whole": bare(mixture, [original], batch_size, batches),
            "ours": loaded(ours, batches),
            "video": loaded(Video(root / "video", mixture, batch_size), batches),
        }
        if tensorflow_python is not None:
            ways["tf"] = tensorflow(tensorflow_python, root / "prepared", batch_size, batches)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                taken[name].append(way())
    for name, seconds in taken.items():
        ratios = [other / mine for other, mine in zip(seconds, taken["ours"], strict=True)]
        print(
            f"{name:<8} {batch_size * batches / statistics.median(seconds):7.0f} samples/s   ours ÷ it "
            f"{statistics.median(ratios):5.2f} (min {min(ratios):.2f}, max {max(ratios):.2f}, {rounds} rounds)"
        )


if __name__ == "__main__":
    tyro.cli(main)
