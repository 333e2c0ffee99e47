"""Record training data in SIMPLER's tasks: demonstrations, and labeled images.

The oracle (`oracle.py`) demonstrates the tasks. Episodes begin at starts *off the grid*, which
means that they differ from the official starts of the benchmark. The arm is disturbed from time to
time, so that demonstrations show how to recover (`spear.sim.record`).
"""

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
from spear.evaluate.simpler.world import SimplerProcess, describe_simulator, resolve_assets_folder
from spear.sim.record import (
    ArmDisturber,
    Disturbance,
    EpisodeRecorder,
    InterveningPolicy,
    format_episode_source,
)
from spear.sim_data.demonstrations import RecordingProgress, check_training_seed, record_successes
from spear.sim_data.label_scenes import (
    SceneJob,
    label_benchmark_tasks,
    make_task_settings,
    split_into_jobs,
)
from spear.types import CONTROL_RATE_HZ, Episode, Frame, WidthAndHeight
from spear.util.images import fit_image
from spear.util.processes import map_in_order

SHARD_SIZE = 16  # number of demonstrations in a file: a minute or two of recording
# After success, a demonstration goes on for this many steps, because a policy has to learn to leave
# the task fulfilled.
NUM_STEPS_AFTER_SUCCESS = 5
DISTURBANCE = Disturbance(translation=0.02, rotation=math.radians(6), twist=math.radians(20))
"""Disturbances of the arm (m, rad). They are smaller than in the embedded simulator, because this
arm reaches less far."""
VIEW = "external"  # the only camera
SCENES_PER_JOB = 64  # scenes that one process renders for labeling


def record_demonstrations(
    out: Path,
    tasks: Sequence[str],
    seeds: range,
    height: int,
    workers: int = 2,
    assets: Path | None = None,
    policy: InterveningPolicy | None = None,
) -> dict[str, RecordingProgress]:
    """Record demonstrations of tasks, one per seed.

    A second call, with the same or with more seeds, continues after the last file that was written.

    Args:
        out: Output folder. Each task has a sub-folder of its name.
        tasks: Names of the tasks; an empty sequence for all tasks.
        seeds: Seeds of the starts.
        height: Height of the images in pixels. The whole camera image is scaled to it.
        workers: Number of processes that run at once.
        assets: ManiSkill's asset folder, see `resolve_assets_folder`.
        policy: A policy that takes turns with the oracle. The steps that it takes are masked, so
            that they are no training targets (`spear.sim.record`).

    Returns:
        Task → its progress.

    Raises:
        SpearError: A reason that `spear.sim_data.demonstrations.record_demonstrations` has, too; or
            ManiSkill, its assets or a renderer are missing.
    """
    check_known("task", TASKS, *tasks)
    check_training_seed(seeds.start)
    simulator = describe_simulator(resolve_assets_folder(assets))
    camera_width, camera_height = CAMERA_SIZE
    size = (round(camera_width * height / camera_height), height)
    counts = {}
    for task in dict.fromkeys(tasks or TASKS):
        # The default value binds the task of this iteration.
        def record_from(first_index: int, task: str = task) -> Iterator[Episode]:
            return record_episodes(task, seeds[first_index:], size, workers, assets, policy)

        sources = [_format_source(task, seed, policy) for seed in seeds]
        counts[task] = record_successes(
            out / task, sources, record_from, {VIEW: size}, policy, simulator, SHARD_SIZE
        )
    return counts


def record_episodes(
    task: str,
    seeds: Sequence[int],
    size: WidthAndHeight,
    workers: int,
    assets: Path | None = None,
    policy: InterveningPolicy | None = None,
) -> Iterator[Episode]:
    """Record an episode for each seed, in the order of the seeds.

    Episodes in which the oracle fails are yielded, too.

    Args:
        task: The task.
        seeds: Seeds of the starts.
        size: (width, height) of the images, px. They are JPEG of quality 95.
        workers: Number of processes that run at once.
        assets: ManiSkill's asset folder, see `resolve_assets_folder`.
        policy: A policy that takes turns with the oracle.
    """
    free_processes: SimpleQueue[SimplerProcess] = SimpleQueue()

    def record_in_free_process(seed: int) -> Episode:
        process = free_processes.get()
        try:
            return record_episode(process, task, seed, size, policy)
        finally:
            free_processes.put(process)

    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(workers))
        # The stack closes the processes before the threads, so that no thread waits for a process.
        for _ in range(min(workers, len(seeds))):
            process = SimplerProcess(task, assets)
            free_processes.put(stack.enter_context(contextlib.closing(process)))
        yield from map_in_order(threads, record_in_free_process, seeds, num_ahead=2 * workers)


def record_episode(
    process: SimplerProcess,
    task: str,
    seed: int,
    size: WidthAndHeight,
    policy: InterveningPolicy | None = None,
) -> Episode:
    """Record the oracle's demonstration from one start off the grid.

    Args:
        process: The simulator.
        task: The task.
        seed: Seed of the start and of the disturbances.
        size: (width, height) of the images, px.
        policy: A policy that takes turns with the oracle; None for disturbances of the arm.
    """
    robot = embodiments.load(ROBOT)
    _, control = robot.select_control(None)  # None selects the robot's default control
    rng = np.random.default_rng([seed, 1])  # 1: see `sample_off_grid_start`
    disturb = ArmDisturber(DISTURBANCE, rng, policy)
    recorder = EpisodeRecorder()
    width, height = size

    moment = process.reset(seed, image=True, is_off_grid=True)
    num_fulfilled_steps = 0
    while moment.steps < TASKS[task].max_steps and num_fulfilled_steps < NUM_STEPS_AFTER_SUCCESS:
        observation = robot.read(moment.observation)
        state = observation["observation/state"]
        oracle_action = oracle.choose_action(task, moment.truth)
        action, is_disturbed = disturb(oracle_action, moment.steps, observation, seed)
        picture = fit_image(observation["observation/image"], height, width)
        recorder.add({VIEW: picture}, state, action, is_disturbed)
        rows = control.convert(action[None], state, moment.observation)
        moment = process.run(rows, image=True)
        if moment.success:
            num_fulfilled_steps += 1
        else:
            num_fulfilled_steps = 0

    # At the time limit it is enough that the task is fulfilled in the last step.
    success = num_fulfilled_steps >= NUM_STEPS_AFTER_SUCCESS or moment.success
    instruction = str(moment.observation["prompt"])
    source = _format_source(task, seed, policy)
    return recorder.make_episode(instruction, CONTROL_RATE_HZ, source, success)


def _format_source(task: str, seed: int, policy: InterveningPolicy | None) -> str:
    """Return the source of an episode, which says whether a policy took part."""
    return format_episode_source(task, seed, policy is not None, "simpler")


def label_tasks(out: Path, seeds: range, size: WidthAndHeight, workers: int = 2) -> int:
    """Label scenes of all four tasks from the simulator's ground truth (see `label_scene_jobs`).

    Args:
        out: Output folder.
        seeds: Seeds of the scenes of each task.
        size: (width, height) of the images, px.
        workers: Number of processes that run at once.

    Returns:
        The number of images.

    Raises:
        SpearError: ManiSkill, its assets or a renderer are missing.
    """
    assets = resolve_assets_folder(None)
    jobs: list[SceneJob] = []
    for task in TASKS:
        jobs += split_into_jobs(task, seeds, SCENES_PER_JOB)
    settings = make_task_settings(seeds, size, describe_simulator(assets))
    render = partial(_render_frames, size, assets)
    return label_benchmark_tasks(out, jobs, render, settings, OBJECT_NAMES.values(), workers)


def _render_frames(
    size: WidthAndHeight, assets: Path, job: SceneJob
) -> Iterator[tuple[str, list[Frame]]]:
    """Render the frames of one job in a process of its own."""
    task, seeds = job
    with contextlib.closing(SimplerProcess(task, assets)) as process:
        yield VIEW, [process.build_and_render_scene(seed, size) for seed in seeds]
