"""The rival of `benchmarks/data/loader.py`: robot episodes through tf.data, as Octo and openpi read RLDS.

    python loader_tf.py FOLDER BATCH_SIZE THREADS CAMERA=WIDTHxHEIGHT …

Needs tensorflow and pyarrow, and nothing of this project. First it writes the episodes of a LeRobot v3.0
folder with images in Parquet as TFRecords, one example for an episode, and says "ready". Then for each line
with seconds on standard input it loads batches for so long, and prints: samples, seconds, processor seconds.

The pipeline: examples parsed in parallel, chunks of five actions gathered, episodes flattened to steps, which
are shuffled while still encoded, decoded in parallel and, where they have another size, brought to theirs
with bars, antialiased (Lanczos, as dlimp does for Octo and OpenVLA), batched, prefetched.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import tensorflow as tf

HORIZON, SHUFFLE, SHARDS, PREFETCH = 5, 1000, 8, 4
CAMERAS = ("external", "wrist")


def write_records(folder: Path, out: Path) -> list[str]:
    """The episodes of a LeRobot folder as TFRecords."""
    rows = pq.read_table(folder / "data")
    tasks = pq.read_table(folder / "meta/tasks.parquet").to_pydict()
    words = dict(
        zip(
            tasks["task_index"], next(v for k, v in tasks.items() if k != "task_index"), strict=True
        )
    )
    paths = [str(out / f"data.tfrecord-{i:05d}-of-{SHARDS:05d}") for i in range(SHARDS)]
    writers = [tf.io.TFRecordWriter(path) for path in paths]
    episodes = rows.column("episode_index").to_pylist()
    first = 0
    while first < len(episodes):
        end = first
        while end < len(episodes) and episodes[end] == episodes[first]:
            end += 1
        part = rows.slice(first, end - first)
        feature = {}
        for camera in CAMERAS:
            images = [
                image["bytes"] for image in part.column(f"observation.images.{camera}").to_pylist()
            ]
            feature[camera] = tf.train.Feature(bytes_list=tf.train.BytesList(value=images))
        for name in ("observation.state", "action"):
            numbers = [x for row in part.column(name).to_pylist() for x in row]
            feature[name] = tf.train.Feature(float_list=tf.train.FloatList(value=numbers))
        text = words[part.column("task_index")[0].as_py()].encode()
        feature["text"] = tf.train.Feature(
            bytes_list=tf.train.BytesList(value=[text] * part.num_rows)
        )
        example = tf.train.Example(features=tf.train.Features(feature=feature))
        writers[episodes[first] % SHARDS].write(example.SerializeToString())
        first = end
    for writer in writers:
        writer.close()
    return paths


def steps_of(record: tf.Tensor) -> dict[str, tf.Tensor]:
    """An episode's steps, each with its chunk of actions."""
    spec = {name: tf.io.VarLenFeature(tf.string) for name in (*CAMERAS, "text")}
    spec |= {name: tf.io.VarLenFeature(tf.float32) for name in ("observation.state", "action")}
    steps = {k: tf.sparse.to_dense(v) for k, v in tf.io.parse_single_example(record, spec).items()}
    for name in ("observation.state", "action"):
        steps[name] = tf.reshape(steps[name], [-1, 8])
    count = tf.shape(steps["action"])[0]
    which = tf.minimum(tf.range(count)[:, None] + tf.range(HORIZON)[None], count - 1)
    steps["action"] = tf.gather(steps["action"], which)
    return steps


def decode(step: dict[str, tf.Tensor], sizes: dict[str, tuple[int, int]]) -> dict[str, tf.Tensor]:
    """Encoded images to pixels of their camera's (height, width), as exactly as ours (default: IFAST)."""

    def pixels(encoded: tf.Tensor) -> tf.Tensor:
        return tf.io.decode_jpeg(encoded, channels=3, dct_method="INTEGER_ACCURATE")

    return {k: fit(pixels(v), *sizes[k]) if k in CAMERAS else v for k, v in step.items()}


def fit(image: tf.Tensor, height: int, width: int) -> tf.Tensor:
    """An image [h, w, 3] in the size wanted, aspect kept; one that has it stays as it is."""

    def smaller() -> tf.Tensor:
        padded = tf.image.resize_with_pad(image, height, width, method="lanczos3", antialias=True)
        return tf.cast(tf.clip_by_value(tf.round(padded), 0, 255), tf.uint8)

    return tf.cond(tf.reduce_all(tf.shape(image)[:2] == [height, width]), lambda: image, smaller)


def main(folder: str, batch_size: int, threads: int, sizes: dict[str, tuple[int, int]]) -> None:
    """Write the records, then measure on request."""
    tf.config.set_visible_devices([], "GPU")
    with tempfile.TemporaryDirectory() as out:
        data = tf.data.Dataset.from_tensor_slices(write_records(Path(folder), Path(out))).repeat()
        data = data.interleave(
            tf.data.TFRecordDataset, cycle_length=SHARDS, num_parallel_calls=threads
        )
        data = data.map(steps_of, num_parallel_calls=threads)
        data = data.flat_map(tf.data.Dataset.from_tensor_slices).shuffle(SHUFFLE)
        data = data.map(lambda step: decode(step, sizes), num_parallel_calls=threads)
        data = data.batch(batch_size).prefetch(PREFETCH)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        options.deterministic = False
        source = iter(data.with_options(options))
        next(source)
        print("ready", flush=True)
        for line in sys.stdin:
            for _ in range(2 * PREFETCH):  # what was made ahead
                next(source)
            count, worked, begun = 0, time.process_time(), time.perf_counter()
            while time.perf_counter() - begun < float(line):
                next(source)
                count += batch_size
            print(count, time.perf_counter() - begun, time.process_time() - worked, flush=True)


if __name__ == "__main__":
    wanted = {}
    for word in sys.argv[4:]:
        camera, _, text = word.partition("=")
        wide, high = (int(number) for number in text.split("x"))
        wanted[camera] = (high, wide)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), wanted)
