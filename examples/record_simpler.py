"""Demonstrations of SIMPLER's four WidowX tasks, to train a policy on: the oracle at work from starts off the
official grid, with disturbances that it recovers from. Needs what `spear evaluate simpler` needs.

    python examples/record_simpler.py --episodes 80 --out runs/simpler-episodes

Each task has a folder in --out, of the third-view camera's pictures. Stopped, the same command continues.
docs/simpler.md says how to train on them, and what came of it.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import tyro

from spear import embodiments
from spear.data.demonstrations import collect
from spear.errors import SpearError, check_known
from spear.evaluate.agents import next_action
from spear.evaluate.simpler import oracle
from spear.evaluate.simpler.run import ROBOT
from spear.evaluate.simpler.tasks import RATE_HZ, TASKS
from spear.evaluate.simpler.world import SimplerProcess, check_assets, check_installed
from spear.policy import locate
from spear.sim.record import Acts, Disturbance, Pushes, source_of
from spear.sim.scene import TRAIN_SEED
from spear.types import Episode
from spear.util.images import encode_jpeg, fit_image
from spear.util.processes import in_order

AFTER = 5
"""Steps that a demonstration goes on after the task was fulfilled: the policy has to leave it so."""
PUSHES = Disturbance(translation=0.02, rotation=math.radians(6), twist=math.radians(20))
"""Smaller than in the embedded simulator: the arm reaches less far."""
CAMERA = (640, 480)


def main(
    out: Path = Path("runs/simpler-episodes"),
    episodes: int = 200,
    tasks: tuple[str, ...] = tuple(TASKS),
    first_seed: int = TRAIN_SEED,
    height: int = 128,
    workers: int = 2,
    policy: str | None = None,
    assets: Path | None = None,
) -> None:
    """Record demonstrations.

    Args:
        out: folder to write to. episodes: of each task.
        first_seed: starts first-seed, first-seed + 1, …; those below 10000 are kept for `--off-grid`.
        height: of the pictures, in pixels; the whole camera image is scaled to it.
        policy: a trained folder that takes turns with the oracle, which puts right what it does wrong.
        assets: ManiSkill's asset folder, where it is neither ~/.maniskill nor named by MS_ASSET_DIR.
    """
    check_known("task", TASKS, *tasks)
    if first_seed < TRAIN_SEED:
        raise SpearError(f"--first-seed {first_seed}: below {TRAIN_SEED} are starts kept for testing")
    check_installed()
    check_assets(assets)
    acts = None if policy is None else partial(next_action, locate(policy))
    size = round(CAMERA[0] * height / CAMERA[1]), height
    seeds = range(first_seed, first_seed + episodes)
    for task in tasks:

        def make(first: int, task: str = task) -> Iterator[Episode]:
            return record(task, seeds[first:], size, workers, assets, acts)

        sources = [source_of(task, seed, acts is not None, "simpler") for seed in seeds]
        written, tried = collect(out / task, sources, make, {"external": size})
        print(f"{written} of {tried} demonstrations succeeded and are in {out / task}")


def record(
    task: str,
    seeds: Sequence[int],
    size: tuple[int, int],
    workers: int,
    assets: Path | None = None,
    policy: Acts | None = None,
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
            return record_episode(process, task, seed, size, policy)
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
    policy: Acts | None = None,
) -> Episode:
    """The oracle's demonstration from one start off the grid, disturbed, or by turns with a policy."""
    robot = embodiments.load(ROBOT)
    convert = robot.control(None)[1].convert
    push = Pushes(PUSHES, np.random.default_rng([seed, 1]), policy)
    images, states, actions, mask = [], [], [], []
    moment, fulfilled = process.reset(seed, True, other=True), 0
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
        source=source_of(task, seed, policy is not None, "simpler"),
        action=np.array(actions, np.float32),
        action_mask=np.array(mask),
        success=fulfilled >= AFTER or moment.success,
    )


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except SpearError as error:
        sys.exit(f"error: {error}")
