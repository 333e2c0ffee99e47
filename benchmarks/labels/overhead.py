"""Labelling: time per image with all that is not a network ÷ the networks alone (goal: at most 1.1).

    python benchmarks/labels/overhead.py

Detector, segmenter and point map are stand-ins that keep a core busy for a fixed time per image and give back
5 objects in images of 840×630. The one side only calls them, in batches of 8. The other labels a folder of
JPEG files: reading, fitting boxes, encoding, writing Parquet. Both have the same two cores. Rounds alternate,
so that a change of the machine's speed meets both. Starting the workers is not counted: it is done once, not
per image.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import tyro

from spear.cli import run_reporting_errors
from spear.labels.engine import run_local
from spear.labels.inputs import list_images
from spear.labels.options import WorkOptions
from spear.labels.pipeline import detect_objects, predict_point_maps, read_images, segment_objects
from spear.labels.run import label_folder
from stand_ins import StandIn, photos


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
        photos(source, images, (840, 630))
        alone, whole = [], []
        for number in range(rounds):
            alone.append(networks_alone(source, images, seconds, batch_size))
            whole.append(
                labelling(source, Path(folder) / str(number), seconds, batch_size, workers)
            )
            print(
                f"networks {1000 * alone[-1]:.1f} ms, labelling {1000 * whole[-1]:.1f} ms per image"
            )
    a, w = statistics.median(alone), statistics.median(whole)
    print(
        f"networks {1000 * a:.1f} ms · labelling {1000 * w:.1f} ms · ratio {w / a:.3f} (goal: at most 1.1)"
    )


def networks_alone(source: Path, images: int, seconds: float, batch_size: int) -> float:
    """Seconds per image of the three networks, on images that are in memory."""
    model = StandIn(seconds)
    works = read_images(
        [item for item, _ in zip(list_images(str(source)), range(batch_size), strict=False)]
    )
    for stage in (detect_objects, segment_objects, predict_point_maps):
        stage(works, model)
    begun = time.perf_counter()
    batches = images // batch_size
    for _ in range(batches):
        for stage in (detect_objects, segment_objects, predict_point_maps):
            stage(works, model)
    return (time.perf_counter() - begun) / (batches * batch_size)


def labelling(source: Path, out: Path, seconds: float, batch_size: int, workers: int) -> float:
    """Seconds per image of labelling the folder, from the first call of a network until all is on the
    disk."""
    model = StandIn(seconds)
    makers = (lambda: model, lambda: model, lambda: model)
    engine = partial(run_local, makers, workers)
    done = label_folder(
        list_images(str(source)), out, engine, {}, WorkOptions(batch_size=batch_size)
    )
    assert model.begun is not None
    return (time.perf_counter() - model.begun) / done.num_done


if __name__ == "__main__":
    sys.exit(run_reporting_errors(lambda: tyro.cli(main)))
