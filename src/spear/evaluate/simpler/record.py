"""What is learned from the tasks: demonstrations as `Episode`s (the oracle at work from starts off the
official grid, with disturbances that it recovers from, as `spear.sim.record` has them), and labelled
images."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from spear import embodiments
from spear.errors import check_known
from spear.evaluate.simpler import oracle
from spear.evaluate.simpler.frames import OBJECT_NAMES
from spear.evaluate.simpler.run import ROBOT
from spear.evaluate.simpler.tasks import CAMERA_SIZE, TASKS
from spear.evaluate.simpler.world import SimplerProcess, check_assets, describe_simulator
from spear.sim.record import (
    ArmDisturber,
    Disturbance,
    EpisodeRecorder,
    InterveningPolicy,
    format_episode_source,
)
from spear.sim_data.demonstrations import check_training_seed, record_successes
from spear.sim_data.label_scenes import SceneJob, SceneSource, label_scene_jobs, split_into_jobs
from spear.types import CONTROL_RATE_HZ, Episode, Frame
from spear.util.images import fit_image
from spear.util.processes import map_in_order

SHARD_SIZE = 16
"""Demonstrations that are written at once: a minute or two of recording."""
AFTER = 5
"""Steps that a demonstration goes on after the task was fulfilled: the policy has to leave it so."""
PUSHES = Disturbance(translation=0.02, rotation=math.radians(6), twist=math.radians(20))
"""Smaller than in the embedded simulator: the arm reaches less far."""
VIEW = "external"
SCENES_PER_JOB = 64


def record_demonstrations(
    out: Path,
    tasks: Sequence[str],
    episodes: int,
    first_seed: int,
    height: int,
    workers: int = 2,
    assets: Path | None = None,
    policy: InterveningPolicy | None = None,
) -> dict[str, tuple[int, int]]:
    """Record `episodes` demonstrations of each task (none: all), each task in a folder of its name in `out`;
    how many succeeded, and of how many.

    height  of the pictures, pixels; the whole camera image is scaled to it.
    policy  takes turns with the oracle; its steps are masked (`spear.sim.record`).

    The same call, or one with more episodes, continues behind the last shard that was written. Raises
    `SpearError` as `spear.sim_data.demonstrations.record_demonstrations`, and where ManiSkill, its assets or
    a renderer are missing.
    """
    check_known("task", TASKS, *tasks)
    check_training_seed(first_seed)
    shown = describe_simulator(check_assets(assets))
    size = round(CAMERA_SIZE[0] * height / CAMERA_SIZE[1]), height
    seeds = range(first_seed, first_seed + episodes)
    written = {}
    for task in dict.fromkeys(tasks or TASKS):

        def make(first: int, task: str = task) -> Iterator[Episode]:
            return record_episodes(task, seeds[first:], size, workers, assets, policy)

        sources = [
            format_episode_source(task, seed, policy is not None, "simpler") for seed in seeds
        ]
        written[task] = record_successes(
            out / task, sources, make, {"external": size}, policy, shown, SHARD_SIZE
        )
    return written


def record_episodes(
    task: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    workers: int,
    assets: Path | None = None,
    policy: InterveningPolicy | None = None,
) -> Iterator[Episode]:
    """An `Episode` for each seed, in that order; also of failures (`success` False). Pictures are JPEG
    (quality 95) of size (width, height)."""
    free: SimpleQueue[SimplerProcess] = SimpleQueue()

    def one(seed: int) -> Episode:
        process = free.get()
        try:
            return record_episode(process, task, seed, size, policy)
        finally:
            free.put(process)

    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        for _ in range(min(workers, len(seeds))):  # they end first, and with them the threads
            free.put(stack.enter_context(contextlib.closing(SimplerProcess(task, assets))))
        yield from map_in_order(threads, one, seeds, num_ahead=2 * workers)


def record_episode(
    process: SimplerProcess,
    task: str,
    seed: int,
    size: tuple[int, int],
    policy: InterveningPolicy | None = None,
) -> Episode:
    """The oracle's demonstration from one start off the grid, disturbed, or by turns with a policy."""
    robot = embodiments.load(ROBOT)
    convert = robot.select_control(None)[1].convert
    push = ArmDisturber(PUSHES, np.random.default_rng([seed, 1]), policy)
    tape = EpisodeRecorder()
    moment, fulfilled = process.reset(seed, True, other=True), 0
    while moment.steps < TASKS[task].steps and fulfilled < AFTER:
        seen = robot.read(moment.observation)
        action, pushed = push(oracle.choose_action(task, moment.truth), moment.steps, seen, seed)
        picture = fit_image(seen["observation/image"], size[1], size[0])
        tape.add({"external": picture}, seen["observation/state"], action, pushed)
        moment = process.run(
            convert(action[None], seen["observation/state"], moment.observation), True
        )
        fulfilled = fulfilled + 1 if moment.success else 0
    source = format_episode_source(task, seed, policy is not None, "simpler")
    success = fulfilled >= AFTER or moment.success
    return tape.episode(str(moment.observation["prompt"]), CONTROL_RATE_HZ, source, success)


def label_tasks(out: Path, seeds: range, size: tuple[int, int], workers: int = 2) -> int:
    """Label the scenes of these seeds, of all four tasks, at (width, height), from the simulator's truth;
    returns the images. The rest is as in `label_scene_jobs`. Raises `SpearError` where ManiSkill, its assets
    or a renderer are missing."""
    assets = check_assets(None)
    jobs = [job for task in TASKS for job in split_into_jobs(task, seeds, SCENES_PER_JOB)]
    source = SceneSource(
        render=partial(_frames, size, assets),
        views=[VIEW],
        settings={
            "scenes": len(seeds),
            "first_seed": seeds[0],
            "size": size,
            "simulator": describe_simulator(assets),
        },
        collect_instructions=lambda: sorted({f"the {name}" for name in OBJECT_NAMES.values()}),
    )
    return label_scene_jobs(out, jobs, source, workers)


def _frames(
    size: tuple[int, int], assets: Path, job: SceneJob
) -> Iterator[tuple[str, list[Frame]]]:
    task, seeds = job
    with contextlib.closing(SimplerProcess(task, assets)) as process:
        yield VIEW, [process.look(seed, size) for seed in seeds]
