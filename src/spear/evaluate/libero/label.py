"""Labeled images of LIBERO's tasks, from the simulator's ground truth.

The images show starts of demonstrations (`starts.py`), which differ from all official states, in
other light. Half of them are taken from another camera pose.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from spear.evaluate.libero.environment import REQUIREMENTS, resolve_python
from spear.evaluate.libero.process import LiberoProcess
from spear.evaluate.libero.record import PROTOCOL, begin_at_resting_start
from spear.evaluate.libero.suites import (
    LABELED_SUITES,
    NUM_TASKS,
    format_task_family,
    parse_task,
    resolve_original_suite,
)
from spear.evaluate.simpler.frames import fit_frame_and_drop_cut_instances
from spear.sim.world import GRIPPER_NAME
from spear.sim_data.label_scenes import (
    SceneJob,
    label_benchmark_tasks,
    make_task_settings,
    split_into_jobs,
)
from spear.types import Frame, WidthAndHeight

VIEW = "external"  # the only labeled view
SCENES_PER_JOB = 32  # that one process renders
RENDERED_SIZE_PX = 512
"""Side of the pictures before they are scaled to the policy's size. Masks need pictures without
multisampling, whose edges become smooth by the scaling."""
CAMERA_POSITION_STD_M = 0.04  # noise of a moved camera along each axis
CAMERA_TURN_STD_RAD = math.radians(4)  # noise of a moved camera about each axis
LIGHT_FACTOR = (0.5, 1.3)  # range of the factor on the brightness
LIGHT_TINT = 0.05  # largest change of a single color channel

OBJECT_NAMES = {
    "akita_black_bowl": "black bowl",
    "cookies": "cookie box",
    "flat_stove": "stove",
    "glazed_rim_porcelain_ramekin": "ramekin",
    "new_salad_dressing": "salad dressing",
    "porcelain_mug": "white mug",
    "red_coffee_mug": "red mug",
    "white_yellow_mug": "yellow and white mug",
}
"""LIBERO's name of a kind of object → its name in instructions. Kinds that are not listed keep
their names."""


def label_tasks(
    out: Path, suites: Sequence[str], seeds: range, size: WidthAndHeight, workers: int = 2
) -> int:
    """Label scenes of all tasks of some suites (see `label_scene_jobs`).

    Args:
        out: Output folder.
        suites: Names of the suites; an empty sequence for `LABELED_SUITES`.
        seeds: Seeds of the scenes of each task.
        size: (width, height) of the images, px.
        workers: Number of processes that run at once.

    Returns:
        The number of images.

    Raises:
        SpearError: LIBERO's environment is missing, or a suite is unknown.
    """
    resolve_python()  # a missing environment is reported before the folder is written
    jobs = list_jobs(suites or LABELED_SUITES, seeds)
    settings = make_task_settings(seeds, size, simulator=" ".join(REQUIREMENTS))
    if suites:  # the default is not recorded, so that folders of older versions can be continued
        settings["suites"] = list(suites)
    render = partial(_render_frames, size)
    return label_benchmark_tasks(out, jobs, render, settings, OBJECT_NAMES.values(), workers)


def list_jobs(suites: Sequence[str], seeds: range) -> list[SceneJob]:
    """List the jobs that label the scenes of these seeds in all tasks of the suites.

    Raises:
        SpearError: A suite is unknown.
    """
    jobs: list[SceneJob] = []
    for suite in suites:
        resolve_original_suite(suite)  # raises the error
        for index in range(NUM_TASKS):
            jobs += split_into_jobs(format_task_family(suite, index), seeds, SCENES_PER_JOB)
    return jobs


def render_labeled_frame(
    process: LiberoProcess, task: str, seed: int, size: WidthAndHeight
) -> Frame:
    """Render the scene of a seed, with its ground truth, at the policy's size."""
    begin_at_resting_start(process, seed)
    values = process.render_external_ground_truth(RENDERED_SIZE_PX, sample_appearance_changes(seed))
    frame = Frame(
        image=values["image"],
        depth=values["depth"],
        instances=values["instances"],
        names={number: name_object(name) for number, name in values["names"].items()},
        intrinsics=values["intrinsics"],
        extrinsics=values["extrinsics"],
    )
    return fit_frame_and_drop_cut_instances(frame, size, f"libero/{task}/{seed}")


def sample_appearance_changes(seed: int) -> dict[str, Any]:
    """Sample light and, for half of the seeds, a moved camera.

    Returns:
        The changes for `LiberoTask.render_external_ground_truth` in worker.py.
    """
    rng = np.random.default_rng([seed, 100])  # attempts at a start have the numbers 0, 1, …
    brightness = rng.uniform(*LIGHT_FACTOR)
    changes: dict[str, Any] = {"light": brightness + rng.uniform(-LIGHT_TINT, LIGHT_TINT, 3)}
    if rng.random() < 0.5:
        translation = rng.normal(0, CAMERA_POSITION_STD_M, 3)
        changes["camera"] = (translation, rng.normal(0, CAMERA_TURN_STD_RAD, 3))
    return changes


def name_object(libero_name: str) -> str:
    """Return an object's name in words.

    >>> name_object("akita_black_bowl_1"), name_object("moka_pot_2"), name_object("")
    ('black bowl', 'moka pot', 'robot gripper')
    """
    if not libero_name:
        return GRIPPER_NAME
    kind = re.sub(r"_\d+$", "", libero_name)
    return OBJECT_NAMES.get(kind, kind.replace("_", " "))


def _render_frames(size: WidthAndHeight, job: SceneJob) -> Iterator[tuple[str, list[Frame]]]:
    """Render the frames of one job in a process of its own."""
    task, seeds = job
    suite, index = parse_task(task)
    process = LiberoProcess(suite, index, PROTOCOL.seed, fast_rendering=True)
    with contextlib.closing(process):
        yield VIEW, [render_labeled_frame(process, task, seed, size) for seed in seeds]
