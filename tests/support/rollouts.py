"""Rollouts in the simulator as `spear serve --record` writes them, with a simulated clock."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spear.embodiments.observations import validate_observation
from spear.serve.exchange import Exchange
from spear.serve.recorder import RecordingWriter, write_or_check_marker
from spear.sim.env import TabletopEnv
from spear.types import CONTROL_RATE_HZ, Array, Policy

FIRST_ARRIVAL_S = 1_780_000_000.0  # since 1970: a time in 2026
PAUSE_BETWEEN_EPISODES_S = 60.0
SESSION = {"policy": "nano", "embodiment": "generic", "control": "actions", "rate_hz": 5.0}


def keep(value: Any) -> Any:
    """Return a value unchanged."""
    return value


@dataclass(frozen=True)
class RobotFaults:
    """What is wrong with a robot: how it changes observations, and the actions that it executes.

    observe    (observation) -> the observation that it sends.
    execute    (action [8], state [8]) -> the actions [8] that it really executes.
    rate_hz    actions per second.
    answer_s   seconds from an observation to its answer.
    """

    observe: Callable[[dict[str, Any]], dict[str, Any]] = keep
    execute: Callable[[Array, Array], Sequence[Array]] = lambda action, state: [action]
    rate_hz: float = CONTROL_RATE_HZ
    answer_s: float = 0.03


def record_rollout(
    policy: Policy,
    folder: Path,
    scenes: Sequence[tuple[str, int]],
    faults: RobotFaults = RobotFaults(),
    replan_interval: int = 1,
    max_steps: int = 40,
    image_sizes: Mapping[str, tuple[int, int]] | None = None,
) -> None:
    """Let a policy act in scenes of the simulator, and record what it observes and answers.

    Args:
        policy: the policy.
        folder: where the recordings are written.
        scenes: (task family, seed) of each episode.
        faults: what is wrong with the robot.
        replan_interval: number of actions of a chunk that are executed before the next one.
        max_steps: control steps of an episode.
        image_sizes: camera -> (width, height).
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_or_check_marker(folder, {})
    writer = RecordingWriter(folder, SESSION, max_bytes=2**30)
    time_s = FIRST_ARRIVAL_S
    for client, (family, seed) in enumerate(scenes):
        env = TabletopEnv(family, image_sizes or policy.image_sizes)
        observation, _ = env.reset(seed=seed)
        while env.steps < max_steps:
            sent = faults.observe(dict(observation))
            checked = validate_observation(sent)
            chunk = policy.infer({**sent, "seed": env.steps})["actions"]
            answer_s = time_s + faults.answer_s
            writer.add(
                Exchange(
                    client=client,
                    address="robot",
                    arrival_s=time_s,
                    answer_s=answer_s,
                    inference_s=faults.answer_s,
                    observation=checked,
                    actions=chunk,
                    rows=chunk,
                    num_bytes=0,
                )
            )
            is_achieved = False
            for action in chunk[:replan_interval]:
                state = env.observe()["observation/state"]
                for executed in faults.execute(action, state):
                    is_achieved = env.step_without_observing(executed)["success"]
            time_s = answer_s + replan_interval / faults.rate_hz
            if is_achieved:
                break
            observation = env.observe()
        writer.end_episode(client)
        time_s += PAUSE_BETWEEN_EPISODES_S
