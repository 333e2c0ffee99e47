"""The rival of `benchmarks/loader.py`: robot episodes through tf.data, as Octo and openpi read RLDS.

    python loader_tf.py PREPARED_FOLDER BATCH_SIZE BATCHES THREADS

Needs tensorflow and pyarrow, and nothing of this project. First it writes the episodes of a prepared dataset (a
LeRobot v3.0 folder with images in Parquet) as TFRecords, one example for an episode. Then for each line on
standard input it prints how many seconds BATCHES batches took.

The pipeline: examples parsed in parallel, chunks of five actions gathered, episodes flattened to steps, which
are shuffled while still encoded, decoded in parallel, batched, prefetched.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
import tensorflow as tf

HORIZON, SHUFFLE, SHARDS = 5, 1000, 8
CAMERAS = ("external", "wrist")


def write_records(folder: Path, out: Path) -> list[str]:
    """The episodes of a LeRobot folder as TFRecords."""
    rows = pq.read_table(folder / "data")
    tasks = pq.read_table(folder / "meta/tasks.parquet").to_pydict()
    words = dict(
        zip(tasks["task_index"], next(v for k, v in tasks.items() if k != "task_index"), strict=True)
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
            images = [image["bytes"] for image in part.column(f"observation.images.{camera}").to_pylist()]
            feature[camera] = tf.train.Feature(bytes_list=tf.train.BytesList(value=images))
        for name in ("observation.state", "action"):
            numbers = [x for row in part.column(name).to_pylist() for x in row]
            feature[name] = tf.train.Feature(float_list=tf.train.FloatList(value=numbers))
        text = words[part.column("task_index")[0].as_py()].encode()
        feature["text"] = tf.train.Feature(bytes_list=tf.train.BytesList(value=[text] * part.num_rows))
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


def decode(step: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    """Encoded images to pixels; they have their size already, the best case for a pipeline that would resize."""
    return {k: tf.io.decode_jpeg(v, channels=3) if k in CAMERAS else v for k, v in step.items()}


def main(folder: str, batch_size: int, batches: int, threads: int) -> None:
    """Write the records, then measure on request."""
    tf.config.set_visible_devices([], "GPU")
    with tempfile.TemporaryDirectory() as out:
        data = tf.data.Dataset.from_tensor_slices(write_records(Path(folder), Path(out))).repeat()
        data = data.interleave(tf.data.TFRecordDataset, cycle_length=SHARDS, num_parallel_calls=threads)
        data = data.map(steps_of, num_parallel_calls=threads)
        data = data.flat_map(tf.data.Dataset.from_tensor_slices).shuffle(SHUFFLE)
        data = data.map(decode, num_parallel_calls=threads).batch(batch_size).prefetch(4)
        options = tf.data.Options()
        options.threading.private_threadpool_size = threads
        options.deterministic = False
        source = iter(data.with_options(options))
        for _ in sys.stdin:
            for _ in range(8):  # what was made ahead
                next(source)
            begun = time.perf_counter()
            for _ in range(batches):
                next(source)
            print(time.perf_counter() - begun, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:5]))
