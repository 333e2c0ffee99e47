"""Labelled images of the tasks' scenes, from the simulator's truth: a folder that `spear train` reads."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from spear.evaluate.simpler.frames import NAMES
from spear.evaluate.simpler.tasks import TASKS
from spear.evaluate.simpler.world import SimplerProcess, assets_hash, check_assets, check_installed
from spear.labels.scenes import Job, jobs_of, label_jobs
from spear.types import Frame

SCENES_PER_JOB = 64
VIEW = "external"


def label_tasks(out: Path, seeds: range, size: tuple[int, int], workers: int = 2) -> int:
    """Label the scenes of these seeds, of all four tasks, at (width, height); returns the images. The rest is
    as in `spear.labels.scenes.label_jobs`. Raises `SpearError` where ManiSkill, its assets or a renderer are
    missing."""
    check_installed()
    assets = check_assets(None)
    jobs = [job for task in TASKS for job in jobs_of(task, seeds, SCENES_PER_JOB)]
    settings = {"scenes": len(seeds), "first_seed": seeds[0], "size": size, "assets": assets_hash(assets)}
    words = lambda: sorted({f"the {name}" for name in NAMES.values()})  # noqa: E731
    return label_jobs(out, jobs, partial(_frames, size, assets), [VIEW], settings, words, workers)


def _frames(size: tuple[int, int], assets: Path, job: Job) -> Iterator[tuple[str, list[Frame]]]:
    task, seeds = job
    process = SimplerProcess(task, assets)
    try:
        yield VIEW, [process.look(seed, size) for seed in seeds]
    finally:
        process.close()
