"""Who acts in an evaluation: a policy, or one of the references that frame its number from both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from spear.types import Array, Policy

NOTHING = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)
"""The action that leaves the arm where it is, with the gripper open."""


class Scene(Protocol):
    """A running scene: the seed that fixes it, and the control steps made in it. Actors that look at the true
    state know the simulator, and so more of it."""

    @property
    def seed(self) -> int: ...

    @property
    def steps(self) -> int: ...


class Agent(Protocol):
    """Chooses actions for several running scenes at once.

    name         for reports.
    weights      tells trained weights apart (a hash of them); None where there are none, or out of sight.
    needs_images whether `act` looks at the cameras; if not, nothing is rendered for it.
    """

    name: str
    weights: str | None
    needs_images: bool

    def act(self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
        """One chunk [H, 8] of actions (`spear.types.Action`, metres) per scene."""
        ...


class PolicyActor:
    """A policy, which sees only observations. Its noise is fixed by the scene's seed and the step, so that an
    outcome does not depend on which scenes run beside it."""

    needs_images = True

    def __init__(self, policy: Policy, name: str, weights: str | None = None) -> None:
        self.policy = policy
        self.name = name
        self.weights = weights

    def act(self, envs: Sequence[Scene], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
        seeded = [
            {**o, "seed": 1000 * env.seed + env.steps} for env, o in zip(envs, observations, strict=True)
        ]
        return [np.asarray(r["actions"], np.float32) for r in self.policy.infer_batch(seeded)]


class ExpertActor:
    """The scripted expert, which sees the simulator's true state: what the arm and the time limit allow."""

    name = "expert"
    weights: str | None = None
    needs_images = False

    def act(self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
        from spear.sim import expert

        return [expert.act(env.world)[None] for env in envs]


class ConstantActor:
    """The same action whatever is seen: doing nothing, or the demonstrations' mean action."""

    weights: str | None = None
    needs_images = False

    def __init__(self, name: str, action: Array) -> None:
        self.name = name
        self.action = np.asarray(action, np.float32).reshape(8)

    def act(self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]) -> Sequence[Array]:
        return [self.action[None]] * len(envs)
