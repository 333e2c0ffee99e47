"""What policies learn from SIMPLER's tasks: demonstrations as `Episode`s, and labeled images.

The oracle demonstrates the tasks from starts off the official grid, and recovers from disturbances
(`spear.sim.record`).
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
from spear.evaluate.simpler.world import SimplerProcess, describe_simulator, find_assets
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

SHARD_SIZE = 16  # demonstrations that are written at once: a minute or two of recording
NUM_STEPS_AFTER_SUCCESS = 5  # a demonstration goes on: the policy has to leave the task fulfilled
DISTURBANCE = Disturbance(translation=0.02, rotation=math.radians(6), twist=math.radians(20))
"""Smaller than in the embedded simulator, because the arm reaches less far."""
VIEW = "external"
SCENES_PER_JOB = 64


def record_demonstrations(
    out: Path,
    tasks: Sequence[str],
    seeds: range,
    height: int,
    workers: int = 2,
    assets: Path | None = None,
    policy: InterveningPolicy | None = None,
) -> dict[str, tuple[int, int]]:
    """Record demonstrations of tasks, one per seed, each task in a folder of its name in `out`.

    Called again, or with more seeds, it continues behind the last shard that was written.

    Args:
        out: Folder.
        tasks: Names of the tasks; all tasks if there are none.
        seeds: Seeds of the starts.
        height: Height of the images in pixels; the whole camera image is scaled to it.
        workers: Processes that run at once.
        assets: ManiSkill's asset folder, see `find_assets`.
        policy: Acts in turns with the oracle; steps it took are masked (`spear.sim.record`).

    Returns:
        Task → how many demonstrations succeeded, and of how many.

    Raises:
        SpearError: As `spear.sim_data.demonstrations.record_demonstrations`; or ManiSkill, its
            assets or a renderer are missing.
    """
    check_known("task", TASKS, *tasks)
    check_training_seed(seeds.start)
    simulator = describe_simulator(find_assets(assets))
    camera_width, camera_height = CAMERA_SIZE
    size = (round(camera_width * height / camera_height), height)
    counts = {}
    for task in dict.fromkeys(tasks or TASKS):

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
    size: tuple[int, int],
    workers: int,
    assets: Path | None = None,
    policy: InterveningPolicy | None = None,
) -> Iterator[Episode]:
    """Record an `Episode` for each seed, in that order, also of failures (`success` False).

    Images are JPEG (quality 95) of size (width, height).
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
        # The processes are closed before the threads, which then end.
        for _ in range(min(workers, len(seeds))):
            process = SimplerProcess(task, assets)
            free_processes.put(stack.enter_context(contextlib.closing(process)))
        yield from map_in_order(threads, record_in_free_process, seeds, num_ahead=2 * workers)


def record_episode(
    process: SimplerProcess,
    task: str,
    seed: int,
    size: tuple[int, int],
    policy: InterveningPolicy | None = None,
) -> Episode:
    """Record the oracle's demonstration from one start off the grid.

    It is disturbed, or takes turns with a policy.
    """
    robot = embodiments.load(ROBOT)
    _, control = robot.select_control(None)
    disturb = ArmDisturber(DISTURBANCE, np.random.default_rng([seed, 1]), policy)
    recorder = EpisodeRecorder()
    width, height = size

    moment = process.reset(seed, True, is_off_grid=True)
    num_fulfilled_steps = 0
    while moment.steps < TASKS[task].max_steps and num_fulfilled_steps < NUM_STEPS_AFTER_SUCCESS:
        observation = robot.read(moment.observation)
        state = observation["observation/state"]
        oracle_action = oracle.choose_action(task, moment.truth)
        action, is_disturbed = disturb(oracle_action, moment.steps, observation, seed)
        picture = fit_image(observation["observation/image"], height, width)
        recorder.add({VIEW: picture}, state, action, is_disturbed)
        rows = control.convert(action[None], state, moment.observation)
        moment = process.run(rows, True)
        num_fulfilled_steps = num_fulfilled_steps + 1 if moment.success else 0

    success = num_fulfilled_steps >= NUM_STEPS_AFTER_SUCCESS or moment.success
    instruction = str(moment.observation["prompt"])
    source = _format_source(task, seed, policy)
    return recorder.episode(instruction, CONTROL_RATE_HZ, source, success)


def _format_source(task: str, seed: int, policy: InterveningPolicy | None) -> str:
    return format_episode_source(task, seed, policy is not None, "simpler")


def label_tasks(out: Path, seeds: range, size: tuple[int, int], workers: int = 2) -> int:
    """Label the scenes of these seeds, of all four tasks, from the simulator's ground truth.

    The rest is as in `label_scene_jobs`.

    Args:
        out: Folder.
        seeds: Seeds of the scenes.
        size: (width, height) of the images, px.
        workers: Processes that run at once.

    Returns:
        The number of images.

    Raises:
        SpearError: ManiSkill, its assets or a renderer are missing.
    """
    assets = find_assets(None)
    jobs: list[SceneJob] = []
    for task in TASKS:
        jobs += split_into_jobs(task, seeds, SCENES_PER_JOB)
    source = SceneSource(
        render=partial(_render_frames, size, assets),
        views=[VIEW],
        settings={
            "scenes": len(seeds),
            "first_seed": seeds[0],
            "size": size,
            "simulator": describe_simulator(assets),
        },
        collect_instructions=_collect_instructions,
    )
    return label_scene_jobs(out, jobs, source, workers)


def _collect_instructions() -> list[str]:
    return sorted({f"the {name}" for name in OBJECT_NAMES.values()})


def _render_frames(
    size: tuple[int, int], assets: Path, job: SceneJob
) -> Iterator[tuple[str, list[Frame]]]:
    task, seeds = job
    with contextlib.closing(SimplerProcess(task, assets)) as process:
        yield VIEW, [process.look(seed, size) for seed in seeds]
