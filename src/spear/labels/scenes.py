"""Simulator scenes → 3D-labelled images: the labeller at work, with the simulator's truth as its models.

Writes a folder with `external/` and `wrist/` (shards of `spear.labels.store`) and the same two under `depth/`
(images with metric depth, for pretraining the encoder).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import spear
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.pipeline import label
from spear.labels.store import sweep, write_depth, write_labels
from spear.types import Frame, LabeledImage
from spear.util import processes
from spear.util.files import check_own, write_text
from spear.util.ledger import alone, same_settings
from spear.util.progress import ProgressBar

Size = tuple[int, int]
Labelled = Callable[[Iterator[Frame]], Iterator[LabeledImage]]
"""Frames with ground truth → their labels, one for each, in order. A function of a module, for other
processes."""
SCENES_PER_JOB = 256
WORDING = "wording.txt"
"""The instructions that the simulator gives, by which such a folder is known: the first file in it."""


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
    """Frames with ground truth → labels."""
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

    sizes     view ("external", "wrist") → (width, height).
    labelled  how frames are labelled; the depth images are true whatever it is.

    Raises `SpearError`: before anything is written, for a folder that holds other files, other scenes or
    sizes.
    """
    jobs = [
        Job(out, index, first_seed + start, min(SCENES_PER_JOB, scenes - start), sizes, labelled)
        for index, start in enumerate(range(0, scenes, SCENES_PER_JOB))
    ]
    check_own(out, WORDING, "label")
    settings = {"spear": spear.__version__, "scenes": scenes, "first_seed": first_seed, "sizes": dict(sizes)}
    advice = "use fewer --workers, and run the same command again"
    with alone(out, "labelling into", WORDING, "run.json"):
        if not (out / WORDING).is_file():
            write_text(out / WORDING, "".join(f"{line}\n" for line in wording()))
        same_settings(out / "run.json", settings, begun=any(out.glob("*/labels-*.parquet")))
        for view in sizes:
            sweep(out / view)
            sweep(out / "depth" / view)
        todo = [job for job in jobs if not all(job.shard(view).is_file() for view in sizes)]
        before = scenes - sum(job.count for job in todo)
        with (
            processes.pool(workers if workers > 1 else 0, __name__, advice) as pool,
            ProgressBar("labelling", scenes, "scenes", before, quiet) as bar,
        ):
            for count in processes.in_order(pool, _make, todo, workers):
                bar.update(bar.done + count)
    return scenes * len(sizes)


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
    worlds = [World(clutter_scene(seed)) for seed in range(job.first, job.first + job.count)]
    for view, size in job.sizes.items():
        frames = [frame_of(world, view, size, renderer) for world in worlds]
        labels = list(job.labelled(iter(frames)))
        depth = [(item.image, frame.depth) for item, frame in zip(labels, frames, strict=True)]
        write_depth(depth, job.out / "depth" / view / f"depth-{job.index:05d}.parquet")
        write_labels(labels, job.shard(view))
    renderer.close()
    return job.count
