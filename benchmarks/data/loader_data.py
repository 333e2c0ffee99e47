"""Made-up episodes for `benchmarks/data/loader.py`, and batches of them in five ways."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from spear.data.actions import HORIZON
from spear.data.mixture import Mixture, Sample, TrainingSamples
from spear.data.normalize import Normalizer
from spear.data.readers.lerobot import open_lerobot
from spear.data.store.episode_store import EpisodeStore
from spear.models.presets import get_preset
from spear.models.processing import Processor
from spear.tokens import CoordinateTokenizer
from spear.train import loop
from spear.train.tasks import encode_robot_batch
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util.images import decode_image, encode_jpeg, fit_image

VIEWS = {"external": (210, 280), "wrist": (112, 112)}
CORES = 2
RECORDED_HZ = 10.0
WORDS = [f"put the {thing} on the plate" for thing in ("carrot", "spoon", "mug", "sponge")]


def make(index: int, steps: int, size: tuple[int, int] = (480, 640)) -> Episode:
    """An episode at 10 Hz whose images have detail at all scales and move, so that JPEG and AV1 have work to
    do."""
    rng = np.random.default_rng(index)
    images = {}
    for camera in VIEWS:
        canvas = np.zeros((size[0] + 200, size[1] + 200, 3))
        for cells in (8, 30, 120):
            noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
            canvas += np.asarray(noise.resize(canvas.shape[1::-1], Image.Resampling.BICUBIC)) / 3
        still = np.clip(canvas + rng.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8)
        shift = (100 + 90 * np.sin(np.arange(steps) / 9)).astype(int)
        images[camera] = [
            encode_jpeg(still[s : s + size[0], 200 - s : 200 - s + size[1]]) for s in shift
        ]
    t = np.arange(steps) / RECORDED_HZ
    position = np.stack([0.3 + 0.1 * np.sin(t + index), 0.1 * np.cos(t), 0.2 + 0 * t], axis=1)
    rotation = np.stack([np.cos(t / 9), 0 * t, 0 * t, np.sin(t / 9)], axis=1)
    gripper = (t % 2 > 1).astype(float)
    words = WORDS[index % len(WORDS)]
    return Episode(images, position, rotation, gripper, words, RECORDED_HZ, f"made#{index}")


class Ours:
    """What `spear.train.tasks.VlaTask.batch` makes, without its network."""

    def __init__(self, mixture: Mixture, batch_size: int) -> None:
        self.samples = TrainingSamples(mixture, VIEWS)
        self.normalizer = Normalizer.fit([(store, 1.0) for store in mixture.stores])
        values = np.random.default_rng(0).normal(size=4000)
        self.processor = Processor.build(get_preset("nano"), WORDS, CoordinateTokenizer.fit(values))
        self.batch_size = batch_size

    def batch(self, step: int) -> dict[str, Any]:
        return encode_robot_batch(
            self.processor, self.normalizer, self.samples.batch(step, self.batch_size)
        )


class Video:
    """The same steps out of AV1 videos, in open files, brought to size where they are larger."""

    def __init__(self, folder: Path, mixture: Mixture, batch_size: int) -> None:
        self.dataset, self.mixture, self.batch_size = open_lerobot(folder), mixture, batch_size
        self.often = round(self.dataset.info.fps / CONTROL_RATE_HZ)
        self.open = functools.lru_cache(maxsize=None)(self._open)

    @staticmethod
    def _open(path: Path) -> Any:
        import av

        container = av.open(str(path))
        container.streams.video[0].thread_count = 1  # two processes have two cores
        return container

    def frame(self, sample: Sample, camera: str) -> Array:
        path, first, _ = self.dataset.episodes[sample.episode].videos[
            f"observation.images.{camera}"
        ]
        wanted = first + self.often * sample.step / self.dataset.info.fps
        container = self.open(path)
        stream = container.streams.video[0]
        container.seek(int((wanted - 1e-3) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            if frame.time > wanted - 1e-3:
                return fit_image(frame.to_ndarray(format="rgb24"), *VIEWS[camera])
        raise AssertionError(f"{path}: no frame at {wanted} s")

    def batch(self, step: int) -> dict[str, Any]:
        samples = self.mixture.draw(step, self.batch_size)
        arrays = [self.mixture.read_arrays(sample, HORIZON) for sample in samples]
        batch = {
            f"numbers {i}": torch.from_numpy(np.stack(a))
            for i, a in enumerate(zip(*arrays, strict=True))
        }
        for camera in VIEWS:
            batch[camera] = torch.from_numpy(
                np.stack([self.frame(sample, camera) for sample in samples])
            )
        return batch


def loaded(task: Any) -> Iterator[int]:
    """Batches that come from two loader processes; yields how many samples are in each."""
    for _ in loop.load_batches(task, 0, 10**5, workers=CORES):
        yield task.batch_size


def bare(mixture: Mixture, store: EpisodeStore, batch_size: int) -> Iterator[int]:
    """The images of some batches, in memory, decoded and brought to size by two processes, and dropped.

    store  the mixture's one dataset, at its rate or at a multiple of it.
    Yields how many samples were decoded: a few batches each time, so that handing them over costs nothing.
    """
    images = []
    for sample in itertools.chain(*(mixture.draw(step, batch_size) for step in range(4))):
        often = round(store.rates_hz[sample.episode] / CONTROL_RATE_HZ)
        for camera, size in VIEWS.items():
            images.append((store.image(sample.episode, often * sample.step, camera) or b"", size))
    context = multiprocessing.get_context("fork")
    ends = []
    for number in range(CORES):
        here, there = context.Pipe()
        context.Process(target=_decode, args=(there, images[number::CORES]), daemon=True).start()
        ends.append(here)
    for end in ends:  # one order is always waiting, so that no core does
        end.send(True)
    while True:
        for end in ends:
            end.send(True)
        for end in ends:
            end.recv()
        yield len(images) // len(VIEWS)


def _decode(end: Any, images: list[tuple[bytes, tuple[int, int]]]) -> None:
    while True:
        end.recv()
        for encoded, size in images:
            fit_image(decode_image(encoded), *size)
        end.send(True)
