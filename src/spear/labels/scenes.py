"""Simulator scenes → 3D-labelled images: the labeller at work, with the simulator's truth as its models.

Writes a folder with `external/` and `wrist/` (shards of `spear.labels.store`) and the same two under `depth/`
(images with metric depth, for pretraining the encoder).
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from spear.errors import SpearError
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.pipeline import label
from spear.labels.store import sweep, write_depth, write_labels
from spear.types import Array, Frame, LabeledImage
from spear.util.files import check_own, write_text
from spear.util.ledger import alone
from spear.util.progress import ProgressBar

Size = tuple[int, int]
Labelled = Callable[[Iterator[Frame]], Iterator[LabeledImage]]
"""Frames with ground truth → their labels, one for each, in order. A function of a module, for other
processes."""
SCENES_PER_JOB = 256
WORDING = "wording.txt"
"""The instructions that the simulator gives: the first file that is written, by which such a folder is
known."""


@dataclass(frozen=True)
class Job:
    """`count` scenes from seed `first` on: shard `index` of every view of `sizes`."""

    out: Path
    index: int
    first: int
    count: int
    sizes: Mapping[str, Size]
    labelled: Labelled

    def shard(self, view: str) -> Path:
        return self.out / view / f"labels-{self.index:05d}.parquet"


def label_frames(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    """Frames with ground truth → labels, through the same pipeline that real models fill."""
    return label(frames, GroundTruthDetector(), GroundTruthSegmenter(), GroundTruthPointMap())


def label_scenes(
    out: Path,
    scenes: int,
    sizes: Mapping[str, Size],
    first_seed: int,
    workers: int = 2,
    labelled: Labelled = label_frames,
    quiet: bool = False,
) -> int:
    """Label `scenes` clutter scenes from seed `first_seed` on, one image per view; returns the images.

    A job of `SCENES_PER_JOB` scenes that is finished is kept, so an interrupted run continues where it was.

    Args:
        out: folder to write to.
        scenes, first_seed: which scenes.
        sizes: view ("external", "wrist") → (width, height).
        workers: processes.
        labelled: how frames are labelled; the depth images are true whatever it is.
        quiet: show no progress.

    Raises:
        SpearError: before anything is written, for a folder that holds other files, other scenes or sizes.
    """
    jobs = [
        Job(out, index, first_seed + start, min(SCENES_PER_JOB, scenes - start), sizes, labelled)
        for index, start in enumerate(range(0, scenes, SCENES_PER_JOB))
    ]
    check_own(out, WORDING, "label")
    _refuse_others(out, jobs, sizes)
    with contextlib.ExitStack() as stack:
        stack.enter_context(alone(out, "labelling into"))
        write_text(out / WORDING, "".join(f"{line}\n" for line in wording()))
        for view in sizes:
            sweep(out / view)
            sweep(out / "depth" / view)
        todo = [job for job in jobs if not all(job.shard(view).is_file() for view in sizes)]
        made: Iterator[int] = map(_make, todo)
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            made = pool.imap_unordered(_make, todo)
        before = scenes - sum(job.count for job in todo)
        bar = stack.enter_context(ProgressBar("labelling", scenes, "scenes", before, quiet))
        for count in made:
            bar.update(bar.done + count)
    return scenes * len(sizes)


def _refuse_others(out: Path, jobs: Sequence[Job], sizes: Mapping[str, Size]) -> None:
    """Raises `SpearError` if `out` holds a shard that is not one of these jobs'."""
    for view, size in sizes.items():
        for path in sorted((out / view).glob("labels-*.parquet")):
            index = int(path.stem.removeprefix("labels-"))
            shard = pq.ParquetFile(path)
            (first,) = shard.read_row_group(0, columns=["source", "width", "height"]).slice(0, 1).to_pylist()
            rows, found = shard.metadata.num_rows, (first["width"], first["height"])
            if index < len(jobs):
                job = jobs[index]
                own = first["source"].endswith(f"sim/clutter/{job.first}/{view}")
                if own and (rows, found) == (job.count, size):
                    continue
            raise SpearError(
                f"{path}: holds {rows} images of {found[0]}×{found[1]} pixels from {first['source']} on, "
                "of a run with other settings: label into another folder, or use its settings"
            )


def wording(draws: int = 2000) -> list[str]:
    """The instructions that the simulator gives, for the vocabulary of a small tokenizer."""
    from spear.sim.scene import FAMILIES, TRAIN_SEED, sample_scene

    seeds = np.random.default_rng(0).integers(TRAIN_SEED, TRAIN_SEED + 1_000_000, draws)
    return sorted({sample_scene(FAMILIES[i % 4], int(seed)).instruction for i, seed in enumerate(seeds)})


def _make(job: Job) -> int:
    """Label the scenes of a job, view by view; a view's shard, which marks it as finished, comes last."""
    from spear.sim.render import Renderer, frame_of
    from spear.sim.scene import clutter_scene
    from spear.sim.world import World

    renderer = Renderer()
    worlds: dict[int, Any] = {}
    for view, size in job.sizes.items():
        maps: list[Array] = []

        def frames(view: str = view, size: Size = size, maps: list[Array] = maps) -> Iterator[Frame]:
            for seed in range(job.first, job.first + job.count):
                if seed not in worlds:
                    worlds[seed] = World(clutter_scene(seed))
                frame = frame_of(worlds[seed], view, size, renderer)
                assert frame.depth is not None
                maps.append(frame.depth)
                yield frame

        labels = list(job.labelled(frames()))
        depth = [(item.image, map_) for item, map_ in zip(labels, maps, strict=True)]
        write_depth(depth, job.out / "depth" / view / f"depth-{job.index:05d}.parquet")
        write_labels(labels, job.shard(view))
    renderer.close()
    return job.count
