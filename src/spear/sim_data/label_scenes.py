"""Labeling simulated scenes, with the simulator's ground truth instead of the three models.

A view is one of the cameras that see a scene: "external" or "wrist". `label_scenes` writes a folder
that contains, for each view, the subfolder `VIEW/` (shards of labels, `spear.labels.store`) and the
subfolder `depth/VIEW/` (images with metric depth, on which a depth encoder is pretrained).

The scenes are divided into jobs. A job writes one shard of each view.

`list_scenes` and `render_scenes` let `spear label` label scenes as one more kind of input,
`sim:SEED-SEED`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import spear
from spear.labels.inputs import Content, Item
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.store import (
    count_labeled_images,
    remove_questions,
    remove_temporary_files,
    write_images_with_coarse_depth,
    write_labels,
)
from spear.types import Frame, LabeledImage, WidthAndHeight
from spear.util import processes
from spear.util.files import check_empty_or_own_folder, write_text
from spear.util.held_out import FIRST_TRAIN_SEED
from spear.util.progress import ProgressBar
from spear.util.run_lock import acquire_run_lock
from spear.util.run_settings import record_or_check_settings

IMAGE_SIZE_PX = (840, 630)  # width, height of `sim:` images; the paper labeled images of this size
MAX_SCENES_PER_JOB = 32  # and so, labels in a shard
OPTION_OF_SETTING = {
    "first_seed": "--first-seed",
    "sizes": "--preset, by its image sizes,",
    "suites": "--suites",
    "world": "--world",
}
"""Key of the settings -> the option that sets it, for messages."""
NUM_INSTRUCTION_SCENES = 2000  # scenes from which the instructions are collected
INSTRUCTIONS_FILE = "wording.txt"
"""The file of the simulator's instructions. It is written first, so a folder that contains it is a
folder of scene labels."""

NumImagesInFolder = int
"""The number of labeled images in a folder, of all views, whichever call labeled them."""
SceneJob = tuple[str, range]
"""The kind of a job's scenes (what kinds there are depends on the simulator), and their seeds."""
RenderScenes = Callable[[SceneJob], Iterator[tuple[str, list[Frame]]]]
"""A job → (view, frames of the job's scenes) for each view. The function must be picklable, because
it runs in other processes."""
LabelFrames = Callable[[Iterator[Frame]], Iterator[LabeledImage]]
"""Frames with ground truth → a label for each frame, in order. The function must be picklable,
because it runs in other processes."""


@dataclass(frozen=True)
class SceneSource:
    """What labeling needs of a simulator.

    Attributes:
        render: Renders the scenes of one job.
        views: The names of the views that `render` yields.
        settings: Everything that the labels depend on, as JSON values. A continued run must have
            the same settings.
        collect_instructions: Returns the instructions for `INSTRUCTIONS_FILE`.
    """

    render: RenderScenes
    views: Sequence[str]
    settings: Mapping[str, Any]
    collect_instructions: Callable[[], Sequence[str]]


def list_scenes(seeds: range) -> Iterator[Item]:
    """List the scenes of these seeds as items, for `spear.labels.sources.list_items`."""
    for seed in seeds:
        yield Item(f"sim:{seed}", render_scenes, path="", location=seed)


def render_scenes(path: str, seeds: Sequence[int]) -> Iterator[Content]:
    """Render clutter scenes (many objects, no task), seen by the external camera.

    Args:
        path: Empty, because a scene is in no file. A reader of items must have this argument.
        seeds: The scenes' seeds.
    """
    from spear.sim.render import render_clutter_frame

    for seed in seeds:
        yield render_clutter_frame(seed, "external", IMAGE_SIZE_PX)


def label_scenes(  # noqa: PLR0913  the options of its command
    out: Path,
    num_scenes: int,
    sizes: Mapping[str, WidthAndHeight],
    first_seed: int,
    workers: int = 2,
    label_frames: LabelFrames = label_with_ground_truth,
    world: str = "default",
    shows_robot: bool = True,
) -> NumImagesInFolder:
    """Label clutter scenes, one image per view.

    A later call with more scenes continues where this one ended.

    Args:
        out: Folder to write to.
        num_scenes: How many scenes to label.
        sizes: View ("external", "wrist") → width and height of its images, in pixels.
        first_seed: Seed of the first scene; the other scenes have the seeds that follow.
        workers: Number of processes that label; with fewer than two, this process labels.
        label_frames: Labels frames.
        world: The surroundings of the scenes (`spear.sim.worlds`).
        shows_robot: Whether the images show the robot's arm.

    Raises:
        SpearError: The world does not exist, or the folder has other files or labels of other
            settings.
    """
    from spear.sim.world import SIMULATOR_VERSION
    from spear.sim.worlds import DEFAULT_WORLD, validate_world

    validate_world(world)
    # Defaults are not recorded, so that folders of older versions can be continued.
    settings = {"first_seed": first_seed, "sizes": dict(sizes), "simulator": SIMULATOR_VERSION}
    if world != DEFAULT_WORLD:
        settings["world"] = world
    if not shows_robot:
        settings["shows_robot"] = False
    simulator = SceneSource(
        render=partial(_render_clutter, sizes, world, shows_robot),
        views=tuple(sizes),
        settings=settings,
        collect_instructions=collect_instructions,
    )
    seeds = range(first_seed, first_seed + num_scenes)
    jobs = split_into_jobs("clutter", seeds, MAX_SCENES_PER_JOB)  # the only kind here
    return label_scene_jobs(out, jobs, simulator, workers, label_frames)


def split_into_jobs(kind: str, seeds: range, max_scenes_per_job: int) -> list[SceneJob]:
    """Divide the scenes of one kind into jobs of at most `max_scenes_per_job` scenes."""
    step = max_scenes_per_job
    return [(kind, seeds[i : i + step]) for i in range(0, len(seeds), step)]


def make_task_settings(seeds: range, size: WidthAndHeight, simulator: str) -> dict[str, Any]:
    """Return the settings of labels of a benchmark's tasks.

    Args:
        seeds: Seeds of the scenes of each task.
        size: Width and height of the images, px.
        simulator: The simulator's packages, with their versions.
    """
    return {
        "scenes": len(seeds),
        "first_seed": seeds[0],
        "size": size,
        "simulator": simulator,
    }


def label_benchmark_tasks(
    out: Path,
    jobs: Sequence[SceneJob],
    render: RenderScenes,
    settings: Mapping[str, Any],
    object_names: Iterable[str],
    workers: int,
) -> NumImagesInFolder:
    """Label scenes of a benchmark's tasks, seen by the external camera (see `label_scene_jobs`).

    Args:
        out: Folder to write to.
        jobs: The scenes.
        render: Renders the scenes of one job.
        settings: Everything that the labels depend on.
        object_names: Names of the benchmark's objects, which are written with "the" as its
            instructions.
        workers: Number of processes that label.
    """
    instructions = sorted({f"the {name}" for name in object_names})
    source = SceneSource(render, ["external"], settings, lambda: instructions)
    return label_scene_jobs(out, jobs, source, workers)


def label_scene_jobs(
    out: Path,
    jobs: Sequence[SceneJob],
    simulator: SceneSource,
    workers: int = 2,
    label_frames: LabelFrames = label_with_ground_truth,
) -> NumImagesInFolder:
    """Label simulated scenes. If a run is interrupted, the next call makes only the missing jobs.

    Args:
        out: Folder to write to.
        jobs: The scenes.
        simulator: The simulator of the scenes.
        workers: Number of processes that label; with fewer than two, this process labels.
        label_frames: Labels frames. The depth images contain ground truth in any case.

    Raises:
        SpearError: The folder has other files or labels of other settings. Nothing is written then.
    """
    views = simulator.views
    num_scenes = _count_scenes(jobs)
    check_empty_or_own_folder(out, INSTRUCTIONS_FILE, action="label")
    advice = "use fewer --workers, and run the same command again"

    with acquire_run_lock(out, "labeling into", INSTRUCTIONS_FILE, "run.json"):
        # Mark the folder as one of scene labels, and record or compare the settings.
        if not (out / INSTRUCTIONS_FILE).is_file():
            write_text(
                out / INSTRUCTIONS_FILE,
                "".join(f"{line}\n" for line in simulator.collect_instructions()),
            )
        has_labels = any(out.glob("*/labels-*.parquet"))
        settings = {"spear": spear.__version__, **simulator.settings}
        record_or_check_settings(
            out / "run.json", settings, has_labels, option_names=OPTION_OF_SETTING
        )

        # Clean up after an earlier run, and find the jobs that it did not finish.
        for view in views:
            remove_temporary_files(out / view)
            remove_temporary_files(out / "depth" / view)
        open_jobs = [
            (index, job)
            for index, job in enumerate(jobs)
            if not _is_finished(out, views, index, job)
        ]
        if open_jobs:
            for view in views:
                remove_questions(out / view)

        # Label the scenes of these jobs.
        num_finished = num_scenes - _count_scenes(job for _, job in open_jobs)
        bar = ProgressBar("labeling", num_scenes, "scenes", num_done_before=num_finished)
        label_job = partial(_label_job_and_count_scenes, out, simulator.render, label_frames)
        num_processes = workers if workers > 1 else 0  # with 0, this process labels
        with (
            bar,
            processes.open_worker_pool(num_processes, preload=__name__, advice=advice) as pool,
        ):
            for num_labeled in processes.map_in_order(pool, label_job, open_jobs, workers):
                bar.set_num_done(bar.num_done + num_labeled)

    return sum(count_labeled_images(out / view) for view in views)


def collect_instructions() -> list[str]:
    """Collect the instructions of the simulator's tasks, sorted.

    A small tokenizer gets its vocabulary from them.
    """
    from spear.sim.scene import FAMILIES, sample_scene

    # Random scenes of training, of all task families in turn
    end = FIRST_TRAIN_SEED + 1_000_000
    seeds = np.random.default_rng(0).integers(FIRST_TRAIN_SEED, end, NUM_INSTRUCTION_SCENES)
    instructions = set()
    for i, seed in enumerate(seeds):
        family = FAMILIES[i % len(FAMILIES)]
        instructions.add(sample_scene(family, int(seed)).instruction)
    return sorted(instructions)


def _count_scenes(jobs: Iterable[SceneJob]) -> int:
    return sum(len(seeds) for _, seeds in jobs)


def _get_shard(out: Path, view: str, index: int) -> Path:
    """The shard of job number `index` for a view."""
    return out / view / f"labels-{index:05d}.parquet"


def _is_finished(out: Path, views: Sequence[str], index: int, job: SceneJob) -> bool:
    """Whether the shards of job number `index` contain all scenes of the job, for every view."""
    _, seeds = job
    for view in views:
        shard = _get_shard(out, view, index)
        if not shard.is_file() or count_labeled_images(shard) < len(seeds):
            return False
    return True


def _label_job_and_count_scenes(
    out: Path, render: RenderScenes, label_frames: LabelFrames, numbered_job: tuple[int, SceneJob]
) -> int:
    """Label the scenes of a job, and write its shards.

    Args:
        out: Folder to write to.
        render: Renders the scenes of a job.
        label_frames: Labels frames.
        numbered_job: The number of the job, which names the shards, and the job.

    Returns:
        The number of scenes.
    """
    index, job = numbered_job
    for view, frames in render(job):
        labels = list(label_frames(iter(frames)))
        images_with_depth = []
        for label, frame in zip(labels, frames, strict=True):
            assert frame.depth is not None  # the simulator renders it
            images_with_depth.append((label.image, frame.depth))
        write_images_with_coarse_depth(
            images_with_depth, out / "depth" / view / f"depth-{index:05d}.parquet"
        )
        # Write the labels last, because a job with labels counts as finished.
        write_labels(labels, _get_shard(out, view, index))
    _, seeds = job
    return len(seeds)


def _render_clutter(
    sizes: Mapping[str, WidthAndHeight], world: str, shows_robot: bool, job: SceneJob
) -> Iterator[tuple[str, list[Frame]]]:
    """Render the clutter scenes of a job in the embedded simulator.

    Args:
        sizes: View → width and height of its images, in pixels.
        world: The surroundings of the scenes.
        shows_robot: Whether the images show the robot's arm.
        job: The job.

    Yields:
        Each view with its frames of all scenes.
    """
    from spear.sim.render import render_frame
    from spear.sim.scene import sample_clutter_scene
    from spear.sim.world import World
    from spear.sim.worlds import place_in_world, with_invisible_robot

    _, seeds = job
    worlds = []
    for seed in seeds:
        scene = place_in_world(sample_clutter_scene(seed), world)
        worlds.append(World(scene if shows_robot else with_invisible_robot(scene)))
    for view, size in sizes.items():
        yield view, [render_frame(world, view, size) for world in worlds]
