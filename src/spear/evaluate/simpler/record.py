"""Demonstrations of SIMPLER's tasks: the oracle at work from starts off the official grid, with disturbances
that it recovers from, as `Episode`s of the third-view camera."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from spear import embodiments
from spear.data.demonstrations import collect
from spear.errors import SpearError, check_known
from spear.evaluate.simpler import oracle
from spear.evaluate.simpler.run import ROBOT
from spear.evaluate.simpler.tasks import RATE_HZ, TASKS
from spear.evaluate.simpler.world import SimplerProcess, check_assets, check_installed
from spear.sim.record import Disturbance, Pushes
from spear.types import Episode
from spear.util.images import encode_jpeg, fit_image
from spear.util.processes import in_order

HELD_OUT = 10_000
"""Seeds below this are kept for evaluation off the grid; demonstrations have those from it on."""
AFTER = 5
"""Steps that a demonstration goes on after the task was fulfilled: the policy has to leave it so."""
PUSHES = Disturbance(translation=0.02, rotation=math.radians(6), twist=math.radians(20))
"""Smaller than in the embedded simulator: the arm reaches less far."""
CAMERA = (640, 480)


def demonstrate(
    out: Path,
    tasks: Sequence[str],
    episodes: int,
    first_seed: int,
    height: int,
    workers: int,
    assets: Path | None = None,
    quiet: bool = False,
) -> dict[str, tuple[int, int]]:
    """Record `episodes` demonstrations of each task into `out`/TASK; task → how many succeeded, of how many.

    height  of the pictures, in pixels; the whole camera image is scaled to it.

    The same call, or one with more episodes, continues behind the last shard that was written. Raises
    `SpearError` for an unknown task, for seeds that are kept for testing, and where ManiSkill, its assets or
    a renderer are missing.
    """
    check_known("task", TASKS, *tasks)
    if first_seed < HELD_OUT:
        raise SpearError(f"--first-seed {first_seed}: below {HELD_OUT} are starts kept for testing")
    check_installed()
    check_assets(assets)
    size = round(CAMERA[0] * height / CAMERA[1]), height
    seeds = range(first_seed, first_seed + episodes)
    written = {}
    for task in tasks:
        sources = [f"simpler/{task}/{seed}" for seed in seeds]

        def make(first: int, task: str = task) -> Iterator[Episode]:
            return record(task, seeds[first:], size, workers, assets)

        written[task] = collect(out / task, sources, make, {"external": size}, quiet)
    return written


def record(
    task: str, seeds: Sequence[int], size: tuple[int, int], workers: int, assets: Path | None = None
) -> Iterator[Episode]:
    """An `Episode` for each seed, in that order; also of failures (`success` False). Pictures are JPEG
    (quality 95) of size (width, height)."""
    processes = [SimplerProcess(task, assets) for _ in range(min(workers, len(seeds)))]
    free: SimpleQueue[SimplerProcess] = SimpleQueue()
    for process in processes:
        free.put(process)

    def one(seed: int) -> Episode:
        process = free.get()
        try:
            return record_episode(process, task, seed, size)
        finally:
            free.put(process)

    try:
        with ThreadPoolExecutor(max(1, len(processes))) as threads:
            yield from in_order(threads, one, seeds, ahead=2 * workers)
    finally:
        for process in processes:
            process.close()


def record_episode(
    process: SimplerProcess,
    task: str,
    seed: int,
    size: tuple[int, int],
    disturbance: Disturbance | None = PUSHES,
) -> Episode:
    """The oracle's demonstration from one start off the grid."""
    robot = embodiments.load(ROBOT)
    convert = robot.control(None)[1].convert
    push = Pushes(disturbance, np.random.default_rng([seed, 1]))
    images, states, actions, mask = [], [], [], []
    moment, fulfilled = process.reset_off_grid(seed, True), 0
    while moment.steps < TASKS[task].steps and fulfilled < AFTER:
        seen = robot.read(moment.observation)
        action, pushed = push(oracle.act(task, moment.truth), moment.steps, seen, seed)
        images.append(encode_jpeg(fit_image(seen["observation/image"], size[1], size[0])))
        states.append(seen["observation/state"])
        actions.append(action)
        mask.append(not pushed)
        rows = convert(action[None], seen["observation/state"], moment.observation)
        moment = process.run(rows, True)
        fulfilled = fulfilled + 1 if moment.success else 0
    state = np.array(states)
    return Episode(
        images={"external": images},
        position=state[:, :3],
        rotation=state[:, 3:7],
        gripper=state[:, 7],
        instruction=str(moment.observation["prompt"]),
        rate_hz=RATE_HZ,
        source=f"simpler/{task}/{seed}",
        action=np.array(actions, np.float32),
        action_mask=np.array(mask),
        success=fulfilled >= AFTER or moment.success,
    )
