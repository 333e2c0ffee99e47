"""Compares the worker's step with LIBERO's own, in LIBERO's Python.

    python compare_steps.py WORKER

Prints by how much two episodes with the same commands differ: the largest difference between any
two numbers of the simulator's states.
"""

import contextlib
import importlib.util
import io
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

NUM_COMMANDS = 30
DOWN_AND_FORWARD = np.array([0.2, 0, -0.6, 0, 0, 0])  # into the objects, where the hand closes


def load_worker(path: str) -> Any:
    """Import the worker's file, without the package that it belongs to."""
    specification = importlib.util.spec_from_file_location("worker", path)
    assert specification is not None
    assert specification.loader is not None
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    return worker


def run_episode(task: Any, step: Callable[[np.ndarray], Any]) -> np.ndarray:
    """Execute the commands with a step function. Returns the states [commands, values]."""
    task.reset(0, num_resets_since_seeding=1)
    rng = np.random.default_rng(0)
    states = []
    for index in range(NUM_COMMANDS):
        arm = rng.uniform(-0.3, 0.3, 6) + DOWN_AND_FORWARD
        gripper = -1.0 if index < NUM_COMMANDS / 2 else 1.0
        step(np.append(arm, gripper))
        states.append(task._env.sim.get_state().flatten().copy())
    return np.array(states)


def main(worker_file: str) -> None:
    worker = load_worker(worker_file)
    with contextlib.redirect_stdout(io.StringIO()):  # LIBERO prints notices
        task = worker.LiberoTask("libero_object", 0, seed=7, fast_rendering=True)
        worker_states = run_episode(task, task._step)
        libero_states = run_episode(task, task._env.step)
    print(float(np.abs(worker_states - libero_states).max()))


if __name__ == "__main__":
    main(sys.argv[1])
