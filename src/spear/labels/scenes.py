"""Simulator scenes → 3D-labelled images: the labeller at work, with the simulator's truth as its models.

Writes a folder with `external/` and `wrist/` (shards of `spear.labels.store`) and the same two under `depth/`
(images with metric depth, for pretraining the encoder).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from spear.errors import SpearError
from spear.labels.depth import write_depth
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.pipeline import label
from spear.labels.store import write_shards
from spear.types import Array, Frame, LabeledImage
from spear.util.files import check_own, write_text
from spear.util.progress import ProgressBar

Size = tuple[int, int]
Labelled = Callable[[Iterator[Frame]], Iterator[LabeledImage]]
"""Frames with ground truth → their labels, one for each, in order. A function of a module, for other
processes."""
SCENES_PER_JOB = 256
WORDING = "wording.txt"
"""The instructions that the simulator gives: the first file that is written, by which such a folder is
known."""
Job = tuple[str, int, int, int, dict[str, Size], Labelled]
"""Folder, number, first seed, how many scenes, sizes, how to label."""


def label_frames(frames: Iterator[Frame]) -> Iterator[LabeledImage]:
    """Frames with ground truth → labels, through the same pipeline that real models fill."""
    return label(frames, GroundTruthDetector(), GroundTruthSegmenter(), GroundTruthPointMap())


def label_scenes(
    out: Path,
    scenes: int,
    sizes: dict[str, Size],
    first_seed: int,
    workers: int = 2,
    labelled: Labelled = label_frames,
    quiet: bool = False,
) -> int:
    """Label `scenes` clutter scenes from seed `first_seed` on, one image per view of `sizes`; returns the
    images.

    sizes  view ("external", "wrist") → (width, height). A job of `SCENES_PER_JOB` scenes that is finished is
           kept,
    so an interrupted run continues where it was. labelled  how; the depth images are true whatever it is.

    Raises `SpearError`, before anything is written, for a folder that holds other files, other scenes or
    sizes.
    """
    jobs: list[Job] = [
        (str(out), index, first_seed + start, min(SCENES_PER_JOB, scenes - start), sizes, labelled)
        for index, start in enumerate(range(0, scenes, SCENES_PER_JOB))
    ]
    check_own(out, WORDING, "label")
    _refuse_others(out, jobs, sizes)
    write_text(out / WORDING, "".join(f"{line}\n" for line in wording()))
    todo = [job for job in jobs if not _finished(job)]
    before = scenes - sum(count for _, _, _, count, _, _ in todo)
    with contextlib.ExitStack() as stack:
        made: Iterator[int] = map(_job, todo)
        if workers > 1:
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(workers))
            made = pool.imap_unordered(_job, todo)
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
                _, _, seed, count, *_ = jobs[index]
                if (rows, found) == (count, size) and first["source"].endswith(f"sim/clutter/{seed}/{view}"):
                    continue
            raise SpearError(
                f"{path}: holds {rows} images of {found[0]}×{found[1]} pixels from {first['source']} on, of a run with "
                "other settings: label into another folder, or use its settings"
            )


def wording(draws: int = 2000) -> list[str]:
    """The instructions that the simulator gives, for the vocabulary of a small tokenizer."""
    import numpy as np

    from spear.sim.scene import FAMILIES, TRAIN_SEED, sample_scene

    seeds = np.random.default_rng(0).integers(TRAIN_SEED, TRAIN_SEED + 1_000_000, draws)
    return sorted({sample_scene(FAMILIES[i % 4], int(seed)).instruction for i, seed in enumerate(seeds)})


def _finished(job: Job) -> bool:
    out, index, _, _, sizes, _ = job
    return all((Path(out) / view / f"labels-{index:05d}.parquet").is_file() for view in sizes)


def _job(job: Job) -> int:
    from spear.sim.frames import frame_of
    from spear.sim.render import Renderer
    from spear.sim.scene import clutter_scene
    from spear.sim.world import World

    out, index, first, count, sizes, labelled = job
    renderer = Renderer()
    worlds: dict[int, Any] = {}
    for view, size in sizes.items():
        maps: list[Array] = []

        def frames(view: str = view, size: Size = size, maps: list[Array] = maps) -> Iterator[Frame]:
            for seed in range(first, first + count):
                if seed not in worlds:
                    worlds[seed] = World(clutter_scene(seed))
                frame = frame_of(worlds[seed], view, size, renderer)
                assert frame.depth is not None
                maps.append(frame.depth)
                yield frame

        labels = list(labelled(frames()))
        depth = [(item.image, map_) for item, map_ in zip(labels, maps, strict=True)]
        write_depth(depth, Path(out) / "depth" / view / f"depth-{index:05d}.parquet")
        part = Path(out) / view / f".part-{index:05d}"
        shutil.rmtree(part, ignore_errors=True)
        (path,) = write_shards(labels, part, shard_size=count)
        path.replace(Path(out) / view / f"labels-{index:05d}.parquet")
        part.rmdir()
    renderer.close()
    return count
