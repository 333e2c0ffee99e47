"""Record demonstrations of LIBERO's tasks.

The oracle (`oracle.py`) demonstrates them, from starts that differ from all official states
(`starts.py`). The arm is disturbed from time to time, so that demonstrations show how to recover
(`spear.sim.record`).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from spear import embodiments
from spear.evaluate.libero import oracle
from spear.evaluate.libero.environment import REQUIREMENTS
from spear.evaluate.libero.process import ACTIONS, FAST_RENDERING, LiberoMoment, LiberoProcess
from spear.evaluate.libero.run import CONTROL, ROBOT
from spear.evaluate.libero.starts import sample_start
from spear.evaluate.libero.suites import (
    NUM_TASKS,
    PROTOCOLS,
    format_task_family,
    get_max_steps,
    resolve_original_suite,
)
from spear.sim.record import (
    ArmDisturber,
    Disturbance,
    EpisodeRecorder,
    InterveningPolicy,
    format_episode_source,
)
from spear.sim_data.demonstrations import RecordingProgress, check_training_seed, record_successes
from spear.types import CONTROL_RATE_HZ, Array, Episode, WidthAndHeight
from spear.util.images import fit_image
from spear.util.processes import map_in_order

PROTOCOL = PROTOCOLS["openpi"]
"""Demonstrations have this protocol's seed of the environment and limits of steps."""
SHARD_SIZE = 16  # number of demonstrations in a file: a few minutes of recording
DISTURBANCE = Disturbance(
    start=0.08, translation=0.02, rotation=math.radians(3), twist=math.radians(8)
)
"""Disturbances of the arm (m, rad). Larger turns take the arm to the limits of its joints, from
where it does not come back in time."""
MAX_STARTS = 10  # starts that are tried for a seed, before the last one is used anyway
MAX_SETTLED_OFFSET_M = 0.02
"""An object that comes to rest farther from where it was put has fallen, or was pushed away."""
MAX_SETTLED_HEIGHT_M = 0.01  # the same for its height


@dataclass(frozen=True)
class RecordingSettings:
    """How demonstrations are recorded.

    sizes           view → (width, height) of the model's images, px. Whole pictures are scaled to
                    fit. They stay square: the black bars that a wider image needs are added in
                    training, as they are when the policy acts.
    workers         number of processes that run at once.
    fast_rendering  whether pictures have no multisampling, no reflections and fewer triangles.
    policy          a policy that takes turns with the oracle. The steps that it takes are masked,
                    so that they are no training targets (`spear.sim.record`).
    """

    sizes: Mapping[str, WidthAndHeight]
    workers: int = 2
    fast_rendering: bool = False
    policy: InterveningPolicy | None = None


def record_demonstrations(
    out: Path,
    suites: Sequence[str],
    task_indices: Sequence[int],
    seeds: range,
    settings: RecordingSettings,
) -> dict[str, RecordingProgress]:
    """Record demonstrations of tasks, one per seed.

    A second call, with the same or with more seeds, continues after the last file that was written.

    Args:
        out: Output folder. Each task has a sub-folder of its name.
        suites: Names of the suites.
        task_indices: Numbers of the tasks of each suite; an empty sequence for all ten.
        seeds: Seeds of the starts.
        settings: How they are recorded.

    Returns:
        Task → its progress.

    Raises:
        SpearError: A reason that `spear.sim_data.demonstrations.record_demonstrations` has, too; or
            a suite is unknown, or LIBERO's environment is missing.
    """
    for suite in suites:
        resolve_original_suite(suite)
    check_training_seed(seeds.start)
    simulator = f"{' '.join(REQUIREMENTS)}, actions {ACTIONS}"
    if settings.fast_rendering:
        simulator += f", {FAST_RENDERING}"
    counts = {}
    for suite in suites:
        for index in task_indices or range(NUM_TASKS):
            task = format_task_family(suite, index)

            # The default values bind the task of this iteration.
            def record_from(
                first_index: int, suite: str = suite, index: int = index
            ) -> Iterator[Episode]:
                return record_episodes(suite, index, seeds[first_index:], settings)

            sources = [_format_source(task, seed, settings) for seed in seeds]
            counts[task] = record_successes(
                out / task,
                sources,
                record_from,
                settings.sizes,
                settings.policy,
                simulator,
                SHARD_SIZE,
            )
    return counts


def record_episodes(
    suite: str, index: int, seeds: Sequence[int], settings: RecordingSettings
) -> Iterator[Episode]:
    """Record an episode of a task for each seed, in the order of the seeds.

    Episodes in which the oracle fails are yielded, too.
    """
    free_processes: SimpleQueue[LiberoProcess] = SimpleQueue()

    def record_in_free_process(seed: int) -> Episode:
        process = free_processes.get()
        try:
            return record_episode(process, suite, index, seed, settings)
        finally:
            free_processes.put(process)

    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(settings.workers))
        # The stack closes the processes before the threads, so that no thread waits for a process.
        for _ in range(min(settings.workers, len(seeds))):
            process = LiberoProcess(suite, index, PROTOCOL.seed, settings.fast_rendering)
            free_processes.put(stack.enter_context(contextlib.closing(process)))
        yield from map_in_order(
            threads, record_in_free_process, seeds, num_ahead=2 * settings.workers
        )


def record_episode(
    process: LiberoProcess, suite: str, index: int, seed: int, settings: RecordingSettings
) -> Episode:
    """Record the oracle's demonstration from the start of a seed. It ends when it succeeds."""
    robot = embodiments.load(ROBOT)
    _, control = robot.select_control(CONTROL)
    disturb = ArmDisturber(DISTURBANCE, np.random.default_rng([seed, 1]), settings.policy)
    recorder = EpisodeRecorder()
    max_steps = get_max_steps(suite, PROTOCOL)

    moment = begin_at_resting_start(process, seed)
    step = 0
    while not moment.success and moment.steps < max_steps:
        observation = robot.read(moment.make_observation(process.instruction, process.render()))
        state = observation["observation/state"]
        oracle_action = oracle.choose_action(process.goal, moment)
        action, is_disturbed = disturb(oracle_action, step, observation, seed)
        recorder.add(
            scale_pictures_to_fit_views(observation, settings), state, action, is_disturbed
        )
        rows = control.convert(action[None], state, {})
        moment = process.run(rows, max_steps)
        step += 1

    source = _format_source(format_task_family(suite, index), seed, settings)
    return recorder.make_episode(process.instruction, CONTROL_RATE_HZ, source, moment.success)


def begin_at_resting_start(process: LiberoProcess, seed: int) -> LiberoMoment:
    """Draw starts of a seed until one rests, and put the scene into it.

    In a start that rests, no object falls or is pushed away from where it was put. If none of
    `MAX_STARTS` starts rests, the last one is used. Whether it can be solved then shows when the
    oracle tries.
    """
    official = process.list_official_object_positions()
    for attempt in range(MAX_STARTS):
        start = sample_start(official, seed, attempt)
        unchanged = process.reset(start.state_index)
        moment = process.reset(start.state_index, start.changes)
        if _is_at_rest_where_put(unchanged, moment, start.changes["objects"]):
            break
    return moment


def _is_at_rest_where_put(
    unchanged: LiberoMoment, moment: LiberoMoment, shifts: Mapping[str, Sequence[float]]
) -> bool:
    """Whether objects have come to rest where they were put.

    Args:
        unchanged: the official state, after things have come to rest.
        moment: the same with the objects moved.
        shifts: object → by how much it was moved: x (m), y (m) and yaw (rad).
    """
    for name, (x, y, _) in shifts.items():
        if name not in moment.objects:
            continue
        shift = np.array([x, y, 0.0])
        moved_by = moment.objects[name].pose[:3] - unchanged.objects[name].pose[:3]
        offset = moved_by - shift
        has_slid = np.linalg.norm(offset[:2]) > MAX_SETTLED_OFFSET_M
        has_changed_height = abs(offset[2]) > MAX_SETTLED_HEIGHT_M
        if has_slid or has_changed_height:
            return False
    return True


def scale_pictures_to_fit_views(
    observation: Mapping[str, Any], settings: RecordingSettings
) -> dict[str, Array]:
    """Scale the pictures of an observation so that they fit into the views' sizes."""
    key_of_view = {"external": "observation/image", "wrist": "observation/wrist_image"}
    pictures = {}
    for view, (width, height) in settings.sizes.items():
        picture = observation[key_of_view[view]]
        pictures[view] = fit_image(picture, height, width, has_bars=False)
    return pictures


def _format_source(task: str, seed: int, settings: RecordingSettings) -> str:
    """Return the source of an episode, which says whether a policy took part."""
    return format_episode_source(task, seed, settings.policy is not None, "libero")
