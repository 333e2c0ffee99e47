"""Simulator scenes → 3D-labelled images: the labeller at work, with the simulator's truth as its models.

Writes a folder with `external/` and `wrist/` (shards of `spear.labels.store`) and the same two under `depth/`
(images with metric depth, for pretraining the encoder).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import spear
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import label_images
from spear.labels.store import (
    count_labels,
    remove_outdated_questions,
    remove_temporary_files,
    write_depth,
    write_labels,
)
from spear.types import Frame, LabeledImage
from spear.util import processes
from spear.util.files import check_own, write_text
from spear.util.ledger import alone, same_settings
from spear.util.progress import ProgressBar

Size = tuple[int, int]
SceneJob = tuple[str, range]
"""Scenes of a kind, by their seeds."""
RenderScenes = Callable[[SceneJob], Iterator[tuple[str, list[Frame]]]]
"""A job → what each view sees of its scenes. A function of a module, for other processes."""
LabelFrames = Callable[[Iterator[Frame]], Iterator[LabeledImage]]
"""Frames with ground truth → a label for each, in order. A function of a module, for other processes."""
MAX_SCENES_PER_JOB = 32
INSTRUCTIONS_FILE = "wording.txt"
"""The instructions that the simulator gives, by which such a folder is known: the first file in it."""


def label_frames(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    """Frames with ground truth → labels."""
    truth = GroundTruth()
    return label_images(frames, truth, truth, truth)


def label_scenes(
    out: Path,
    scenes: int,
    sizes: Mapping[str, Size],
    first_seed: int,
    workers: int = 2,
    labelled: LabelFrames = label_frames,
) -> int:
    """Label `scenes` clutter scenes from seed `first_seed` on, one image per view; returns the images.

    sizes: view ("external", "wrist") → (width, height). More scenes go on where fewer ended. The rest is as
    in `label_jobs`.
    """
    from spear.sim.world import SIMULATOR

    jobs = split_into_jobs("", range(first_seed, first_seed + scenes), MAX_SCENES_PER_JOB)
    settings = {"first_seed": first_seed, "sizes": dict(sizes), "simulator": SIMULATOR}
    return label_scene_jobs(
        out,
        jobs,
        partial(_clutter, sizes),
        list(sizes),
        settings,
        collect_instructions,
        workers,
        labelled,
    )


def split_into_jobs(kind: str, seeds: range, most: int) -> list[SceneJob]:
    """Scenes of a kind, in jobs of `most`."""
    return [(kind, seeds[i : i + most]) for i in range(0, len(seeds), most)]


def label_scene_jobs(
    out: Path,
    jobs: Sequence[SceneJob],
    frames: RenderScenes,
    views: Sequence[str],
    settings: Mapping[str, Any],
    words: Callable[[], Sequence[str]],
    workers: int = 2,
    labelled: LabelFrames = label_frames,
) -> int:
    """Label simulated scenes; returns how many images the folder holds.

    A job that is finished is kept, so an interrupted run continues where it was. settings: what the labels
    depend on. words: instructions, for `WORDING`. labelled: how frames are labelled; the depth images are
    true whatever it is. Raises `SpearError`, before anything is written, for a folder that holds other files
    or labels of other settings.
    """
    scenes = sum(len(seeds) for _, seeds in jobs)
    check_own(out, INSTRUCTIONS_FILE, "label")
    advice = "use fewer --workers, and run the same command again"
    with alone(out, "labelling into", INSTRUCTIONS_FILE, "run.json"):
        if not (out / INSTRUCTIONS_FILE).is_file():
            write_text(out / INSTRUCTIONS_FILE, "".join(f"{line}\n" for line in words()))
        begun = any(out.glob("*/labels-*.parquet"))
        same_settings(out / "run.json", {"spear": spear.__version__, **settings}, begun=begun)
        for view in views:
            remove_temporary_files(out / view)
            remove_temporary_files(out / "depth" / view)
        todo = [job for job in enumerate(jobs) if not all(_holds(out, view, job) for view in views)]
        for view in views if todo else ():
            remove_outdated_questions(out / view)
        before = scenes - sum(len(seeds) for _, (_, seeds) in todo)
        bar = ProgressBar("labelling", scenes, "scenes", before)
        with bar, processes.pool(workers if workers > 1 else 0, __name__, advice) as pool:
            for made in processes.in_order(
                pool, partial(_make, out, frames, labelled), todo, workers
            ):
                bar.update(bar.done + made)
    return sum(count_labels(out / view) for view in views)


def collect_instructions() -> list[str]:
    """The instructions that the simulator gives, for the vocabulary of a small tokenizer."""
    from spear.sim.scene import FAMILIES, TRAIN_SEED, sample_scene

    seeds = np.random.default_rng(0).integers(TRAIN_SEED, TRAIN_SEED + 1_000_000, 2000)
    return sorted(
        {sample_scene(FAMILIES[i % 4], int(seed)).instruction for i, seed in enumerate(seeds)}
    )


def _shard(out: Path, view: str, index: int) -> Path:
    return out / view / f"labels-{index:05d}.parquet"


def _holds(out: Path, view: str, job: tuple[int, SceneJob]) -> bool:
    index, (_, seeds) = job
    shard = _shard(out, view, index)
    return shard.is_file() and count_labels(shard) >= len(seeds)


def _make(out: Path, frames: RenderScenes, labelled: LabelFrames, job: tuple[int, SceneJob]) -> int:
    """Label the scenes of a job (number, job): shard `number` of every view, which comes last."""
    index, (_, seeds) = job
    for view, seen in frames(job[1]):
        labels = list(labelled(iter(seen)))
        depth = [(item.image, frame.depth) for item, frame in zip(labels, seen, strict=True)]
        write_depth(depth, out / "depth" / view / f"depth-{index:05d}.parquet")
        write_labels(labels, _shard(out, view, index))
    return len(seeds)


def _clutter(sizes: Mapping[str, Size], job: SceneJob) -> Iterator[tuple[str, list[Frame]]]:
    """The frames of clutter scenes of the embedded simulator."""
    from spear.sim.render import frame_of
    from spear.sim.scene import clutter_scene
    from spear.sim.world import World

    worlds = [World(clutter_scene(seed)) for seed in job[1]]
    for view, size in sizes.items():
        yield view, [frame_of(world, view, size) for world in worlds]
