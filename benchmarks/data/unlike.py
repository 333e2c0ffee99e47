"""In how many held-out steps a policy notes that a robot sends otherwise than its training data had it.

    spear train nano-post --init nano --episodes bridge_v2_sample --split "train[:19]" --out runs/bridge
    python benchmarks/data/unlike.py runs/bridge bridge_v2_sample "train[19:]"
    python benchmarks/data/unlike.py nano

Each step is shown alone: as it is, and changed as mistakes in a robot's program change it. Without data, the
policy acts in the embedded simulator, from 10 starts, with an inverted gripper or other axes: is that noted
at the first observation, and is it by what follows, within 256?
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from spear.data.store.prepare import open_store
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.open_loop import build_observations
from spear.geometry import quat_multiply
from spear.models.processing import Processor
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.drift import NUM_FIRST_OBSERVATIONS
from spear.monitor.motion import MotionChecks
from spear.monitor.observations import check_first_state, check_observations
from spear.policy import Spear1Policy, locate
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.scene import FAMILIES
from spear.types import Array

HALF = np.sqrt(0.5)
Change = Callable[[Array, Array], tuple[Array, Array]]


def turned(state: Array) -> Array:
    """The end-effector frame turned by 90° about its z axis."""
    turn = quat_multiply(
        torch.tensor(state[3:7]), torch.tensor([HALF, 0.0, 0.0, HALF], dtype=torch.float64)
    )
    return np.concatenate([state[:3], turn.numpy(), state[7:]])


CHANGES: dict[str, Change] = {
    "as it is": lambda state, image: (state, image),
    "BGR": lambda state, image: (state, image[..., ::-1]),
    "black images": lambda state, image: (state, 0 * image),
    "image turned by 180°": lambda state, image: (state, image[::-1, ::-1]),
    "image flipped left to right": lambda state, image: (state, image[:, ::-1]),
    "image flipped upside down": lambda state, image: (state, image[::-1]),
    "quaternion x y z w": lambda state, image: (state[[0, 1, 2, 4, 5, 6, 3, 7]], image),
    "end-effector frame turned by 90° about z": lambda state, image: (turned(state), image),
    "base frame 0.5 m further back": lambda state, image: (state + 0.5 * np.eye(8)[0], image),
    "x and y exchanged": lambda state, image: (state[[1, 0, 2, 3, 4, 5, 6, 7]], image),
    "decimetres": lambda state, image: (state * [10, 10, 10, 1, 1, 1, 1, 1], image),
}


def opposite(vector: Array) -> Array:
    """A state or an action with its gripper inverted."""
    return np.append(vector[:7], 1 - vector[7])


def same(vector: Array) -> Array:
    """As it is."""
    return vector


ACTING: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "as it is": (same, same),
    "gripper read inverted": (opposite, same),
    "gripper told inverted": (same, opposite),
    "gripper read and told inverted": (opposite, opposite),
    "x and y of translations exchanged": (same, lambda action: action[[1, 0, 2, 3, 4, 5, 6, 7]]),
    "x and y of translations inverted": (same, lambda action: action * [-1, -1, 1, 1, 1, 1, 1, 1]),
    "z of translations inverted": (same, lambda action: action * [1, 1, -1, 1, 1, 1, 1, 1]),
}
"""Mistakes that only acting shows: what becomes of the state that is read, and of the action that is told."""


def noted_by_acting(policy: Spear1Policy, seeds: range, mistake: str) -> tuple[bool, bool]:
    """Whether a mistake is noted at the first observation in held-out scenes, and whether it is by what
    follows, within 256."""
    agent, check, seen, known = (
        PolicyAgent(policy, "policy"),
        MotionChecks(),
        0,
        policy.training_distribution,
    )
    assert known is not None, "the policy has no seen.json"
    read, told = ACTING[mistake]
    sizes = agent.image_sizes["external"], agent.image_sizes["wrist"]
    for seed in seeds:
        env = TabletopEnv(FAMILIES[seed % len(FAMILIES)], *sizes)
        observation, info = env.reset(seed=seed)
        check.set_chunk(None)
        while not info["success"] and env.steps < MAX_STEPS:
            state = read(observation["observation/state"])
            if not seen:
                at_once = any(check_first_state(known, state)) or any(
                    check_observations(known, state[None], {})
                )
            if check.check(state):
                return at_once, True
            if (seen := seen + 1) > 4 * NUM_FIRST_OBSERVATIONS:  # not every chunk tells
                return at_once, False
            chunk = agent.act([env], [{**observation, "observation/state": state}])[0]
            check.set_chunk(chunk)
            observation, _, _, _, info = env.step(told(chunk[0]).astype(np.float32))
    raise AssertionError("more seeds than these are needed")


def main(policy: str, data: str | None = None, split: str = "train") -> None:
    """Print the table."""
    if data is None:
        acting = Spear1Policy.load(policy)
        for mistake in ACTING:
            starts = (range(first, first + 16) for first in range(700, 860, 16))
            first, later = np.sum(
                [noted_by_acting(acting, seeds, mistake) for seeds in starts], axis=0
            )
            print(
                f"{mistake:<42} noted at once in {first}, later in {later} of 10 starts", flush=True
            )
        return
    folder = locate(policy)
    known, processor = TrainingDistribution.load(folder / "seen.json"), Processor.load(folder)
    assert known is not None, f"{policy}: has no seen.json"
    noted: Counter[str] = Counter()
    count = 0
    with TemporaryDirectory() as scratch:
        store, _ = open_store(Path(data), Path(scratch), split)
        for step in (
            step for episode in store for step in build_observations(episode, ["external"])
        ):
            count += 1
            for name, change in CHANGES.items():
                state, image = change(
                    step["observation/state"].astype(np.float64), step["observation/image"]
                )
                pixels = processor.prepare_image(np.ascontiguousarray(image), "external")[
                    None
                ].numpy()
                noted[name] += any(check_observations(known, state[None], {"external": pixels}))
    for name in CHANGES:
        print(f"{name:<42} noted in {noted[name]} of {count} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
