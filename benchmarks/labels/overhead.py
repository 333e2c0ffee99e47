"""Labeling: time per image with everything that is not a network ÷ the networks alone (goal: at
most 1.1).

    python benchmarks/labels/overhead.py

Detector, segmenter and point map are stand-ins that keep a core busy for a fixed time per image and
give back 5 objects in images of 840×630. The one side only calls them, in batches of 8. The other
labels a folder of JPEG files: reading, fitting boxes, encoding, writing Parquet. Both have the same
two cores. Rounds alternate, so that a change of the machine's speed meets both. Starting the
workers is not counted: it is done once, not per image.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import tyro

from spear.cli import run_reporting_errors
from spear.labels.engine import run_local
from spear.labels.inputs import list_images
from spear.labels.options import WorkOptions
from spear.labels.pipeline import (
    PendingImage,
    detect_and_add_detections,
    predict_and_add_point_maps,
    read_and_encode_images,
    segment_and_add_masks,
)
from spear.labels.run import label_into_folder
from stand_ins import StandIn, write_photos


def main(
    images: int = 240,
    rounds: int = 3,
    milliseconds: float = 50.0,
    batch_size: int = 8,
    workers: int = 2,
    cores: int = 2,
) -> None:
    """Measure.

    Args:
        images: per round of either side.
        rounds: of either side.
        milliseconds: per image, of each of the three stand-ins.
        batch_size: images that go through the networks together.
        workers: processes.
        cores: that either side may use.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    seconds = milliseconds / 1000
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "photos"
        write_photos(source, images, (840, 630))
        network_times_s = []
        labeling_times_s = []
        for number in range(rounds):
            out = Path(folder) / str(number)
            network_s = time_networks(source, images, seconds, batch_size)
            labeling_s = time_labeling(source, out, seconds, batch_size, workers)
            network_times_s.append(network_s)
            labeling_times_s.append(labeling_s)
            print(
                f"networks {1000 * network_s:.1f} ms, labeling {1000 * labeling_s:.1f} ms per image"
            )
    network_s = statistics.median(network_times_s)
    labeling_s = statistics.median(labeling_times_s)
    print(
        f"networks {1000 * network_s:.1f} ms · labeling {1000 * labeling_s:.1f} ms · "
        f"ratio {labeling_s / network_s:.3f} (goal: at most 1.1)"
    )


def time_networks(source: Path, images: int, seconds: float, batch_size: int) -> float:
    """Seconds per image of the three networks, on images that are in memory."""
    model = StandIn(seconds)
    pending = read_and_encode_images(list(islice(list_images(str(source)), batch_size)))
    run_networks(pending, model)  # a warm-up
    start_time = time.perf_counter()
    num_batches = images // batch_size
    for _ in range(num_batches):
        run_networks(pending, model)
    return (time.perf_counter() - start_time) / (num_batches * batch_size)


def run_networks(images: list[PendingImage], model: StandIn) -> None:
    detect_and_add_detections(images, model)
    segment_and_add_masks(images, model)
    predict_and_add_point_maps(images, model)


def time_labeling(source: Path, out: Path, seconds: float, batch_size: int, workers: int) -> float:
    """Seconds per image of labeling the folder, from the first call of a network until all is on
    the disk."""
    model = StandIn(seconds)
    factories = (lambda: model, lambda: model, lambda: model)
    engine = partial(run_local, factories, workers)
    work = WorkOptions(batch_size=batch_size)
    progress = label_into_folder(list_images(str(source)), out, engine, {}, work)
    assert model.start_time is not None
    return (time.perf_counter() - model.start_time) / progress.num_done


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
