"""Who acts in an evaluation: a policy, or one of the references that frame its number from both sides."""

import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import numpy as np
import torch

from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, get_rendered_sizes, select_cameras
from spear.errors import SpearError, notice
from spear.evaluate.options import AgentOptions
from spear.types import Array, Policy
from spear.util.options import to_option_name

IDLE_ACTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)
"""The action that leaves the arm where it is, with the gripper open."""


class Agent(Protocol):
    """Chooses actions for several running scenes at once.

    weights      which trained ones act (`Spear1Policy.identity`); None for none, or of another's server.
    needs_images whether `act` looks at the cameras; if not, nothing is rendered for it.
    image_sizes  camera -> (width, height) of its pictures in the embedded simulator.
    committed    the most actions of a chunk that may be decided before it is asked for.
    """

    name: str
    weights: str | None = None
    needs_images: bool = False
    image_sizes: Mapping[str, tuple[int, int]] = DEFAULT_IMAGE_SIZES
    committed: int = 0

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        """One chunk [H, 8] of actions (`spear.types.Action`, metres) for each of the running scenes, which
        have their `seed`, their `steps` so far and their simulator's truth."""


class PolicyAgent(Agent):
    """A policy, which sees only observations, of its own cameras. Its noise is fixed by the scene's seed and
    the step, so that an outcome does not depend on which scenes run beside it."""

    needs_images = True

    def __init__(self, policy: Policy, name: str, weights: str | None = None) -> None:
        self.policy, self.name, self.weights = policy, name, weights
        self.image_sizes = get_rendered_sizes(policy)
        self.committed = getattr(policy, "committed", 0)

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        seeded = [
            {**o, "seed": 1000 * e.seed + e.steps} for e, o in zip(envs, observations, strict=True)
        ]
        shown = [select_cameras(self.policy, observation) for observation in seeded]
        return [np.asarray(r["actions"], np.float32) for r in self.policy.infer_batch(shown)]


@functools.cache
def _loaded(folder: Path) -> PolicyAgent:
    from spear.policy import Spear1Policy

    torch.set_num_threads(1)  # one of several processes; and with others the last bits would differ
    return PolicyAgent(Spear1Policy.load(folder), folder.name)


def predict_next_action(
    folder: Path, observation: Mapping[str, Any], seed: int, step: int
) -> Array:
    """The first action of a policy's chunk, for `spear.sim.record.InterveningPolicy`."""
    return _loaded(folder).act([SimpleNamespace(seed=seed, steps=step)], [observation])[0][0]


class ExpertAgent(Agent):
    """The scripted expert, which sees the true state: what the arm and the time limit allow."""

    name = "expert"

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        from spear.sim import expert

        return [expert.act(env.world)[None] for env in envs]


class IdleAgent(Agent):
    """Leaves the arm where it is, whatever is seen."""

    name = "nothing"

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [IDLE_ACTION[None]] * len(envs)


def load_agent(policy: str, **loading: Any) -> Agent:
    """Who acts: "expert", "nothing", a trained folder, a shipped name or a server's ws:// address. loading:
    device, dtype, dataset, flow_steps (`AgentOptions`) of a policy that is loaded here, and of no other."""
    from spear.policy import Spear1Policy

    remote, who = policy.startswith(("ws://", "wss://")), AgentOptions(policy, **loading)
    for field, value in (
        loading.items() if remote or policy in ("expert", "oracle", "nothing") else ()
    ):
        if value != getattr(AgentOptions, field):
            what = f"{to_option_name(field)} {value}: is for policies loaded here"
            raise SpearError(f"{what}: leave it out for {policy}")
    if policy in ("expert", "nothing"):
        return ExpertAgent() if policy == "expert" else IdleAgent()
    if remote:
        from spear.serve.client import RemotePolicy

        server = RemotePolicy(policy, os.environ.get("SPEAR_TOKEN"))
        robot = server.metadata.get("embodiment", "generic")
        if robot != "generic":
            server.close()
            raise SpearError(
                f"{policy}: serves robot {robot!r}: start it with `--embodiment generic`"
            )
        if (weights := server.metadata.get("weights")) is None:
            notice(
                f"{policy}: does not say which weights it has: give those of each their own --out"
            )
        return PolicyAgent(server, policy, weights)
    local = Spear1Policy.load(
        policy, who.device, who.flow_steps, dataset=who.dataset, dtype=who.dtype
    )
    return PolicyAgent(local, policy, local.identity)
