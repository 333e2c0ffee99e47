"""A loader that `benchmarks/data/loader.py` compares with: tf.data, as Octo and openpi read RLDS.

    python loader_tf.py FOLDER BATCH_SIZE THREADS CAMERA=WIDTHxHEIGHT …

Needs tensorflow and pyarrow, and nothing of this project. First it writes the episodes of a LeRobot
v3.0 folder with images in Parquet as TFRecords, one example per episode, and prints "ready". Then
for each line with seconds on standard input it loads batches for that time, and prints the number
of samples, the seconds and the processor seconds.

The pipeline parses examples in parallel, gathers chunks of five actions, flattens episodes to
steps, shuffles the steps while their images are still encoded, decodes in parallel, resizes images
of another size with bars and antialiasing (Lanczos, as dlimp does for Octo and OpenVLA), batches
and prefetches.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow as tf

HORIZON = 5
SHUFFLE_BUFFER = 1000  # steps
NUM_SHARDS = 8
NUM_PREFETCHED = 4  # batches
CAMERAS = ("external", "wrist")
NUMBER_COLUMNS = ("observation.state", "action")
NUMBERS_PER_ROW = 8


def write_records(folder: Path, out: Path) -> list[str]:
    """Write the episodes of a LeRobot folder as TFRecords; returns the files."""
    instructions = read_instructions(folder / "meta/tasks.parquet")
    paths = [
        str(out / f"data.tfrecord-{index:05d}-of-{NUM_SHARDS:05d}") for index in range(NUM_SHARDS)
    ]
    writers = [tf.io.TFRecordWriter(path) for path in paths]
    for number, rows in split_episodes(pq.read_table(folder / "data")):
        instruction = instructions[rows.column("task_index")[0].as_py()]
        example = make_example(rows, instruction)
        writers[number % NUM_SHARDS].write(example.SerializeToString())
    for writer in writers:
        writer.close()
    return paths


def read_instructions(file: Path) -> dict[int, str]:
    """Task index -> instruction; the column of instructions has whatever name pandas gave it."""
    tasks = pq.read_table(file).to_pydict()
    indices = tasks.pop("task_index")
    (instructions,) = tasks.values()
    return dict(zip(indices, instructions, strict=True))


def split_episodes(rows: pa.Table) -> Iterator[tuple[int, pa.Table]]:
    """(number, rows) of each episode, from the rows of all of them in order."""
    numbers = rows.column("episode_index").to_pylist()
    first = 0
    while first < len(numbers):
        end = first
        while end < len(numbers) and numbers[end] == numbers[first]:
            end += 1
        yield numbers[first], rows.slice(first, end - first)
        first = end


def make_example(rows: pa.Table, instruction: str) -> Any:
    """A tf.train.Example of one episode, with its steps as flat lists."""
    features: dict[str, Any] = {}
    for camera in CAMERAS:
        cells = rows.column(f"observation.images.{camera}").to_pylist()
        features[camera] = bytes_feature([cell["bytes"] for cell in cells])
    for name in NUMBER_COLUMNS:
        numbers: list[float] = []
        for row in rows.column(name).to_pylist():
            numbers.extend(row)
        features[name] = tf.train.Feature(float_list=tf.train.FloatList(value=numbers))
    features["text"] = bytes_feature([instruction.encode()] * rows.num_rows)
    return tf.train.Example(features=tf.train.Features(feature=features))


def bytes_feature(values: list[bytes]) -> Any:
    return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))


def parse_steps(record: tf.Tensor) -> dict[str, tf.Tensor]:
    """An episode's steps, each with its chunk of actions."""
    spec = {name: tf.io.VarLenFeature(tf.string) for name in (*CAMERAS, "text")}
    for name in NUMBER_COLUMNS:
        spec[name] = tf.io.VarLenFeature(tf.float32)
    parsed = tf.io.parse_single_example(record, spec)
    steps = {name: tf.sparse.to_dense(values) for name, values in parsed.items()}
    for name in NUMBER_COLUMNS:
        steps[name] = tf.reshape(steps[name], [-1, NUMBERS_PER_ROW])

    num_steps = tf.shape(steps["action"])[0]
    chunk_steps = tf.range(num_steps)[:, None] + tf.range(HORIZON)[None]
    steps["action"] = tf.gather(steps["action"], tf.minimum(chunk_steps, num_steps - 1))
    return steps


def decode_step(
    step: dict[str, tf.Tensor], sizes: dict[str, tuple[int, int]]
) -> dict[str, tf.Tensor]:
    """Decode the images of a step to their camera's (height, width), as exactly as ours."""
    decoded = dict(step)
    for camera in CAMERAS:
        image = tf.io.decode_jpeg(step[camera], channels=3, dct_method="INTEGER_ACCURATE")
        height, width = sizes[camera]
        decoded[camera] = fit_image(image, height, width)
    return decoded


def fit_image(image: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """Resize an image [h, w, 3] with its aspect ratio; one that has the size stays unchanged."""

    def resize() -> tf.Tensor:
        padded = tf.image.resize_with_pad(image, height, width, method="lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(padded), 0, 255), tf.uint8)

    has_size = tf.reduce_all(tf.shape(image)[:2] == [height, width])
    return tf.cond(has_size, lambda: image, resize)


def make_pipeline(
    paths: list[str], batch_size: int, num_threads: int, sizes: dict[str, tuple[int, int]]
) -> Iterator[Any]:
    """Batches from TFRecords, without end."""
    data = tf.data.Dataset.from_tensor_slices(paths).repeat()
    data = data.interleave(
        tf.data.TFRecordDataset, cycle_length=NUM_SHARDS, num_parallel_calls=num_threads
    )
    data = data.map(parse_steps, num_parallel_calls=num_threads)
    data = data.flat_map(tf.data.Dataset.from_tensor_slices).shuffle(SHUFFLE_BUFFER)
    data = data.map(lambda step: decode_step(step, sizes), num_parallel_calls=num_threads)
    data = data.batch(batch_size).prefetch(NUM_PREFETCHED)
    options = tf.data.Options()
    options.threading.private_threadpool_size = num_threads
    options.deterministic = False
    return iter(data.with_options(options))


def run_turn(batches: Iterator[Any], batch_size: int, duration_s: float) -> None:
    """Load batches for a time, and print the measurement."""
    for _ in range(2 * NUM_PREFETCHED):  # what was made ahead
        next(batches)

    num_samples = 0
    processor_start_s = time.process_time()
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < duration_s:
        next(batches)
        num_samples += batch_size
    measured_s = time.perf_counter() - start_s
    print(num_samples, measured_s, time.process_time() - processor_start_s, flush=True)


def main(folder: str, batch_size: int, num_threads: int, sizes: dict[str, tuple[int, int]]) -> None:
    """Write the records, then measure on request."""
    tf.config.set_visible_devices([], "GPU")
    with tempfile.TemporaryDirectory() as out:
        paths = write_records(Path(folder), Path(out))
        batches = make_pipeline(paths, batch_size, num_threads, sizes)
        next(batches)
        print("ready", flush=True)
        for line in sys.stdin:
            run_turn(batches, batch_size, float(line))


def parse_sizes(texts: list[str]) -> dict[str, tuple[int, int]]:
    """Parse CAMERA=WIDTHxHEIGHT to camera -> (height, width)."""
    sizes: dict[str, tuple[int, int]] = {}
    for text in texts:
        camera, _, size_text = text.partition("=")
        width, _, height = size_text.partition("x")
        sizes[camera] = (int(height), int(width))
    return sizes


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), parse_sizes(sys.argv[4:]))
