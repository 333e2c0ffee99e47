"""What a planted fault is: what goes wrong between a policy and its robot, in one episode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from spear.sim.scene import SceneSpec
from spear.types import CONTROL_RATE_HZ, Array

Observation = dict[str, Any]
ImageSizes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class ClientTiming:
    """When the robot's program observes and moves.

    tick_s               how long an action lasts.
    replan_interval      how many actions the program executes before its next observation.
    delay_ticks          how many actions pass from an observation until its answer is there. The
                         program goes on with the last answer meanwhile. With 0 the arm stands still
                         while the policy computes.
    is_network_slow      whether this delay is in the network; otherwise the policy computes so
                         long.
    pose_age_ticks       None if the program executes displacements. Otherwise it commands absolute
                         poses, which it computes from the pose so many actions before the
                         observation.
    """

    tick_s: float = 1 / CONTROL_RATE_HZ
    replan_interval: int = 1
    delay_ticks: int = 0
    is_network_slow: bool = False
    pose_age_ticks: int | None = None


def return_unchanged(value: Any) -> Any:
    """Return a value unchanged."""
    return value


def return_action(action: Array, state: Array) -> Array:
    """Return an action unchanged."""
    return action


def execute_once(rng: np.random.Generator) -> int:
    """Return that an action is executed once."""
    return 1


@dataclass(frozen=True)
class PlantedFault:
    """A fault in one episode. By default nothing is changed.

    A fault may remember what it saw, so each episode needs a new one.

    change_scene        changes where the episode starts, and its words and objects.
    change_image_sizes  changes the sizes at which the cameras record: view → (width, height).
    change_observation  changes what the robot's program sends.
    change_action       changes what the arm executes: (action [8], measured state [8]) → action.
    count_executions    says how many times the arm executes an action; 0 drops it.
    change_timing       changes when the program observes and moves.
    """

    change_scene: Callable[[SceneSpec], SceneSpec] = return_unchanged
    change_image_sizes: Callable[[ImageSizes], ImageSizes] = return_unchanged
    change_observation: Callable[[Observation], Observation] = return_unchanged
    change_action: Callable[[Array, Array], Array] = return_action
    count_executions: Callable[[np.random.Generator], int] = execute_once
    change_timing: Callable[[ClientTiming], ClientTiming] = return_unchanged


def set_timing(**values: Any) -> PlantedFault:
    """Make a fault that sets fields of the timing."""
    unknown = set(values) - {field.name for field in fields(ClientTiming)}
    if unknown:
        raise ValueError(f"{unknown} are no fields of the timing")
    return PlantedFault(change_timing=lambda timing: replace(timing, **values))
