"""Made-up episodes for `benchmarks/data/loader.py`, and loaders that decode them."""

from __future__ import annotations

import functools
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

VIEWS = {"external": (210, 280), "wrist": (112, 112)}  # height, width
NUM_CORES = 2
RECORDED_HZ = 10.0
MAX_SHIFT_PX = 100  # of the moving image
NUM_BARE_BATCHES = 4  # that are decoded per order, so that handing them over costs nothing
ORDER = "decode"  # what a decoding process gets
DONE = "done"  # what it answers
TIME_TOLERANCE_S = 1e-3
OBJECTS = ("carrot", "spoon", "mug", "sponge")
INSTRUCTIONS = [f"put the {name} on the plate" for name in OBJECTS]


def make_detailed_episode(
    index: int, num_steps: int, size: tuple[int, int] = (480, 640)
) -> Episode:
    """An episode at 10 Hz whose images have detail at all scales and move.

    Otherwise JPEG and AV1 would have little work to do.
    """
    rng = np.random.default_rng(index)
    images = {camera: _make_moving_images(rng, num_steps, size) for camera in VIEWS}
    times_s = np.arange(num_steps) / RECORDED_HZ
    zeros = 0 * times_s
    position = np.stack(
        [0.3 + 0.1 * np.sin(times_s + index), 0.1 * np.cos(times_s), 0.2 + zeros], axis=1
    )
    rotation = np.stack([np.cos(times_s / 9), zeros, zeros, np.sin(times_s / 9)], axis=1)
    return Episode(
        images=images,
        position=position,
        rotation=rotation,
        gripper=(times_s % 2 > 1).astype(float),
        instruction=INSTRUCTIONS[index % len(INSTRUCTIONS)],
        rate_hz=RECORDED_HZ,
        source=f"made#{index}",
    )


def _make_moving_images(
    rng: np.random.Generator, num_steps: int, size: tuple[int, int]
) -> list[bytes]:
    """Windows of one large noise image, which move through it, as JPEG."""
    height, width = size
    canvas = np.zeros((height + 2 * MAX_SHIFT_PX, width + 2 * MAX_SHIFT_PX, 3))
    for num_cells in (8, 30, 120):
        noise = Image.fromarray(rng.integers(0, 256, (num_cells, num_cells, 3), np.uint8))
        canvas += np.asarray(noise.resize(canvas.shape[1::-1], Image.Resampling.BICUBIC)) / 3
    picture = np.clip(canvas + rng.normal(0, 3, canvas.shape), 0, 255).astype(np.uint8)

    images: list[bytes] = []
    shifts = (MAX_SHIFT_PX + 90 * np.sin(np.arange(num_steps) / 9)).astype(int)
    for shift in shifts:
        left = 2 * MAX_SHIFT_PX - shift
        images.append(encode_jpeg(picture[shift : shift + height, left : left + width]))
    return images


class OurTask:
    """What `spear.train.tasks.VlaTask.batch` makes, without its network."""

    def __init__(self, mixture: Mixture, batch_size: int) -> None:
        self.samples = TrainingSamples(mixture, VIEWS)
        self.normalizer = Normalizer.fit([(store, 1.0) for store in mixture.stores])
        coordinates = np.random.default_rng(0).normal(size=4000)
        tokenizer = CoordinateTokenizer.fit(coordinates)
        self.processor = Processor.build(get_preset("nano"), INSTRUCTIONS, tokenizer)
        self.batch_size = batch_size

    def batch(self, step: int) -> dict[str, Any]:
        raw = self.samples.batch(step, self.batch_size)
        return encode_robot_batch(self.processor, self.normalizer, raw)


class VideoTask:
    """The same steps out of AV1 videos, in open files, resized if they are larger."""

    def __init__(self, folder: Path, mixture: Mixture, batch_size: int) -> None:
        self.dataset = open_lerobot(folder)
        self.mixture = mixture
        self.batch_size = batch_size
        self.rows_per_step = round(self.dataset.info.fps / CONTROL_RATE_HZ)
        self.open = functools.lru_cache(maxsize=None)(self._open)

    @staticmethod
    def _open(path: Path) -> Any:
        import av

        container = av.open(str(path))
        container.streams.video[0].thread_count = 1  # two processes have two cores
        return container

    def decode_frame(self, sample: Sample, camera: str) -> Array:
        videos = self.dataset.episodes[sample.episode].videos
        span = videos[f"observation.images.{camera}"]
        row = self.rows_per_step * sample.step
        time_s = span.start_s + row / self.dataset.info.fps
        container = self.open(span.file)
        stream = container.streams.video[0]
        container.seek(int((time_s - TIME_TOLERANCE_S) / stream.time_base), stream=stream)
        height, width = VIEWS[camera]
        for frame in container.decode(stream):
            if frame.time > time_s - TIME_TOLERANCE_S:
                return fit_image(frame.to_ndarray(format="rgb24"), height, width)
        raise AssertionError(f"{span.file}: no frame at {time_s} s")

    def batch(self, step: int) -> dict[str, Any]:
        samples = self.mixture.sample(step, self.batch_size)
        arrays = [self.mixture.read_state_and_chunk(sample, HORIZON) for sample in samples]
        batch: dict[str, Any] = {}
        for index, column in enumerate(zip(*arrays, strict=True)):
            batch[f"numbers {index}"] = torch.from_numpy(np.stack(column))
        for camera in VIEWS:
            frames = [self.decode_frame(sample, camera) for sample in samples]
            batch[camera] = torch.from_numpy(np.stack(frames))
        return batch


def load_with_processes(task: Any) -> Iterator[int]:
    """Load batches with two loader processes; yields the number of samples in each."""
    for _ in loop.load_pieces(task, 0, 10**5, workers=NUM_CORES):
        yield task.batch_size


def decode_in_memory(mixture: Mixture, store: EpisodeStore, batch_size: int) -> Iterator[int]:
    """Decode and resize the images of some batches, which are in memory, with two processes.

    Args:
        mixture: Draws the samples.
        store: The mixture's one dataset, at its rate or at a multiple of it.
        batch_size: The number of samples in a batch.

    Yields:
        The number of samples decoded.
    """
    images = _collect_images(mixture, store, batch_size)
    context = multiprocessing.get_context("fork")
    pipes: list[Any] = []
    for number in range(NUM_CORES):
        pipe, worker_pipe = context.Pipe()
        share = images[number::NUM_CORES]
        context.Process(target=_decode_on_order, args=(worker_pipe, share), daemon=True).start()
        pipes.append(pipe)

    # One order is always waiting, so that no core does.
    for pipe in pipes:
        pipe.send(ORDER)
    while True:
        for pipe in pipes:
            pipe.send(ORDER)
        for pipe in pipes:
            pipe.recv()
        yield len(images) // len(VIEWS)


def _collect_images(
    mixture: Mixture, store: EpisodeStore, batch_size: int
) -> list[tuple[bytes, tuple[int, int]]]:
    """(encoded image, size) of all cameras of the samples of some batches."""
    images: list[tuple[bytes, tuple[int, int]]] = []
    for training_step in range(NUM_BARE_BATCHES):
        for sample in mixture.sample(training_step, batch_size):
            rows_per_step = round(store.rates_hz[sample.episode] / CONTROL_RATE_HZ)
            for camera, size in VIEWS.items():
                encoded = store.image(sample.episode, rows_per_step * sample.step, camera)
                images.append((encoded or b"", size))
    return images


def _decode_on_order(pipe: Any, images: list[tuple[bytes, tuple[int, int]]]) -> None:
    while True:
        pipe.recv()
        for encoded, (height, width) in images:
            fit_image(decode_image(encoded), height, width)
        pipe.send(DONE)
