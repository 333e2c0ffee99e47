"""In how many held-out steps a policy notices that a robot sends other observations than its
training data.

    spear train nano-post --init nano --episodes bridge_v2_sample --split "train[:19]" \\
        --out runs/bridge
    python benchmarks/data/unlike.py runs/bridge bridge_v2_sample "train[19:]"
    python benchmarks/data/unlike.py nano

With data, each step is shown alone: unchanged, and changed as mistakes in a robot's program change
it. Without data, the policy acts in the embedded simulator, from 10 starts, with an inverted
gripper or other axes. The table says whether the first observation shows the mistake, and whether
the following 256 do.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch

from spear.data.store.prepare import open_or_prepare_store
from spear.evaluate.agents import PolicyAgent
from spear.evaluate.open_loop import build_observations
from spear.geometry import quat_multiply
from spear.models.processing import Processor
from spear.monitor.distribution import TrainingDistribution
from spear.monitor.drift import NUM_FIRST_OBSERVATIONS
from spear.monitor.motion import MotionChecks
from spear.monitor.observations import examine_first_opening, examine_observations
from spear.policy import Spear1Policy, locate_checkpoint
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.scene import FAMILIES
from spear.types import Array

ROOT_HALF = np.sqrt(0.5)  # cosine and sine of 45°
ONE_M_ALONG_X = np.eye(8)[0]  # a change of the state
EXCHANGE_X_AND_Y = [1, 0, 2, 3, 4, 5, 6, 7]
NUM_STARTS = 10
SEEDS_PER_START = 16
FIRST_SEED = 700  # of held-out scenes
StateChange = Callable[[Array], Array]
ObservationChange = Callable[[Array, Array], tuple[Array, Array]]


def turn_ee_frame(state: Array) -> Array:
    """Turn the end-effector frame by 90° about its z axis."""
    quarter_turn = torch.tensor([ROOT_HALF, 0.0, 0.0, ROOT_HALF], dtype=torch.float64)
    rotation = quat_multiply(torch.tensor(state[3:7]), quarter_turn)
    return np.concatenate([state[:3], rotation.numpy(), state[7:]])


OBSERVATION_CHANGES: dict[str, ObservationChange] = {
    "as it is": lambda state, image: (state, image),
    "BGR": lambda state, image: (state, image[..., ::-1]),
    "black images": lambda state, image: (state, 0 * image),
    "image turned by 180°": lambda state, image: (state, image[::-1, ::-1]),
    "image flipped left to right": lambda state, image: (state, image[:, ::-1]),
    "image flipped upside down": lambda state, image: (state, image[::-1]),
    "quaternion x y z w": lambda state, image: (state[[0, 1, 2, 4, 5, 6, 3, 7]], image),
    "end-effector frame turned by 90° about z": lambda state, image: (turn_ee_frame(state), image),
    "base frame 0.5 m further back": lambda state, image: (state + 0.5 * ONE_M_ALONG_X, image),
    "x and y exchanged": lambda state, image: (state[EXCHANGE_X_AND_Y], image),
    "decimeters": lambda state, image: (state * [10, 10, 10, 1, 1, 1, 1, 1], image),
}
"""Mistake -> what becomes of the state and the image of an observation."""


def invert_gripper(vector: Array) -> Array:
    """A state or an action with its gripper inverted."""
    return np.append(vector[:7], 1 - vector[7])


def change_nothing(vector: Array) -> Array:
    return vector


class ActingMistake(NamedTuple):
    """What becomes of the state that is read, and of the action that is commanded."""

    change_state: StateChange
    change_action: StateChange


ACTING_MISTAKES: dict[str, ActingMistake] = {
    "as it is": ActingMistake(change_nothing, change_nothing),
    "gripper read inverted": ActingMistake(invert_gripper, change_nothing),
    "gripper told inverted": ActingMistake(change_nothing, invert_gripper),
    "gripper read and told inverted": ActingMistake(invert_gripper, invert_gripper),
    "x and y of translations exchanged": ActingMistake(
        change_nothing, lambda action: action[EXCHANGE_X_AND_Y]
    ),
    "x and y of translations inverted": ActingMistake(
        change_nothing, lambda action: action * [-1, -1, 1, 1, 1, 1, 1, 1]
    ),
    "z of translations inverted": ActingMistake(
        change_nothing, lambda action: action * [1, 1, -1, 1, 1, 1, 1, 1]
    ),
}
"""Mistakes that only acting shows."""


def run_with_mistake(
    policy: Spear1Policy, seeds: range, mistake: ActingMistake
) -> tuple[bool, bool]:
    """Act in held-out scenes with a mistake, until it is noticed or for 256 observations.

    Returns whether the first observation shows the mistake, and whether the following ones do.
    """
    distribution = policy.training_distribution
    assert distribution is not None, "the policy has no seen.json"
    agent = PolicyAgent(policy, "policy")
    checks = MotionChecks()
    num_observations = 0
    is_noticed_first = False
    for seed in seeds:
        env = TabletopEnv(FAMILIES[seed % len(FAMILIES)], agent.image_sizes)
        observation, info = env.reset(seed=seed)
        checks.set_chunk(None)
        while not info["success"] and env.steps < MAX_STEPS:
            state = mistake.change_state(observation["observation/state"])
            if num_observations == 0:
                state_notes = examine_first_opening(distribution, float(state[7]))
                is_noticed_first = any(state_notes) or any(
                    examine_observations(distribution, state[None], {})
                )
            if checks.examine_next_state(state):
                return is_noticed_first, True
            num_observations += 1
            if num_observations > 4 * NUM_FIRST_OBSERVATIONS:  # not every chunk shows it
                return is_noticed_first, False
            chunk = agent.choose_action_chunks(
                [env], [{**observation, "observation/state": state}]
            )[0]
            checks.set_chunk(chunk)
            action = mistake.change_action(chunk[0])
            observation, _, _, _, info = env.step(action.astype(np.float32))
    raise AssertionError("more seeds than these are needed")


def measure_acting(policy: Spear1Policy) -> None:
    """Print in how many starts each mistake is noticed."""
    for name, mistake in ACTING_MISTAKES.items():
        num_first = 0
        num_later = 0
        for start in range(NUM_STARTS):
            first_seed = FIRST_SEED + SEEDS_PER_START * start
            seeds = range(first_seed, first_seed + SEEDS_PER_START)
            is_noticed_first, is_noticed_later = run_with_mistake(policy, seeds, mistake)
            num_first += is_noticed_first
            num_later += is_noticed_later
        print(
            f"{name:<42} noted at once in {num_first}, later in {num_later} of {NUM_STARTS} starts",
            flush=True,
        )


def iterate_observations(data: str, split: str) -> Iterator[dict[str, Any]]:
    """The observations of all steps of a dataset, with the external camera."""
    with TemporaryDirectory() as scratch:
        store = open_or_prepare_store(Path(data), Path(scratch), split).store
        for episode in store:
            yield from build_observations(episode, ["external"])


def measure_observations(policy: str, data: str, split: str) -> None:
    """Print in how many steps each change of an observation is noticed."""
    folder = locate_checkpoint(policy)
    distribution = TrainingDistribution.load(folder / "seen.json")
    processor = Processor.load(folder)
    assert distribution is not None, f"{policy}: has no seen.json"

    num_noticed: Counter[str] = Counter()
    num_steps = 0
    for observation in iterate_observations(data, split):
        num_steps += 1
        original_state = observation["observation/state"].astype(np.float64)
        for name, change in OBSERVATION_CHANGES.items():
            state, image = change(original_state, observation["observation/image"])
            pixels = processor.prepare_image(np.ascontiguousarray(image), "external")
            notes = examine_observations(
                distribution, state[None], {"external": pixels[None].numpy()}
            )
            num_noticed[name] += any(notes)
    for name in OBSERVATION_CHANGES:
        print(f"{name:<42} noted in {num_noticed[name]} of {num_steps} steps")


def main(policy: str, data: str | None = None, split: str = "train") -> None:
    """Print the table."""
    if data is None:
        measure_acting(Spear1Policy.load(policy))
    else:
        measure_observations(policy, data, split)


if __name__ == "__main__":
    main(*sys.argv[1:])
