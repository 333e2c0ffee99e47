"""The embedded simulator as a benchmark of the vla-eval harness, and the embodiment for it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from vla_eval.benchmarks.base import StepBenchmark, StepResult

from spear.embodiments import generic
from spear.embodiments.observations import validate_observation
from spear.sim.env import TabletopEnv

IMAGE = np.full((32, 48, 3), 90, np.uint8)
SENT: list[str] = []
"""The position of the gripper after each step of all episodes, as texts."""


class Tabletop(StepBenchmark):
    """The scenes 0, 1, … of a task family, without rendering.

    Args:
        family: the task family.
        send_state: whether observations contain the robot's state.
        broken: whether the states are NaN from the second step on.
    """

    def __init__(
        self, family: str = "put_on", send_state: bool = False, broken: bool = False
    ) -> None:
        super().__init__()
        self._env = TabletopEnv(family, images=False)
        self._send_state = send_state
        self._broken = broken

    # The methods that the harness calls.

    def get_tasks(self) -> list[dict[str, Any]]:
        return [{"name": self._env.family}]

    def reset(self, task: Mapping[str, Any]) -> Any:
        observation, _ = self._env.reset(seed=task["episode_idx"])
        return observation

    def step(self, action: Mapping[str, Any]) -> StepResult:
        observation, reward, is_done, _, info = self._env.step(action["actions"])
        SENT.append(np.array2string(observation["observation/state"][:3], precision=5))
        return StepResult(observation, reward, is_done, info)

    def make_obs(self, raw_obs: Any, task: Mapping[str, Any]) -> dict[str, Any]:
        message: dict[str, Any] = {
            "images": {"primary": IMAGE},
            "task_description": raw_obs["prompt"],
        }
        if self._send_state:
            state = raw_obs["observation/state"]
            is_broken = self._broken and self._env.steps > 1
            message["states"] = state * np.nan if is_broken else state
        return message

    def get_step_result(self, step_result: StepResult) -> dict[str, Any]:
        return {"success": bool(step_result.info.get("success"))}

    def get_metadata(self) -> dict[str, Any]:
        return {"max_steps": 5}


def observe(observation: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an observation of the harness to one of ours."""
    return validate_observation(
        {
            "observation/image": observation["images"]["primary"],
            "observation/state": observation["states"],
            "prompt": observation["task_description"],
        }
    )


def example() -> dict[str, Any]:
    """Return an example of the harness's observations."""
    observation = generic.EMBODIMENT.example()
    return {
        "images": {"primary": observation["observation/image"]},
        "states": observation["observation/state"],
        "task_description": observation["prompt"],
    }


EMBODIMENT = dataclasses.replace(
    generic.EMBODIMENT,
    required={"images": "images", "states": "the state", "task_description": "the instruction"},
    observe=observe,
    example=example,
)
