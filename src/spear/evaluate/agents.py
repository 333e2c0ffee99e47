"""Who acts in an evaluation: a policy, or one of the baselines that its number lies between."""

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

BASELINES = ("expert", "oracle", "nothing")
IDLE_ACTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)
"""The action that leaves the arm where it is, with the gripper open."""


class Agent(Protocol):
    """Chooses actions for several running scenes at once.

    name           as results name it.
    weights        identity of the trained weights (`Spear1Policy.identity`); None without weights,
                   or if another's server does not say.
    needs_images   whether `act` uses the cameras; if not, nothing is rendered for it.
    image_sizes    camera → (width, height) of its images in the embedded simulator, px.
    max_committed  longest committed prefix that the agent can continue.
    """

    name: str
    weights: str | None = None
    needs_images: bool = False
    image_sizes: Mapping[str, tuple[int, int]] = DEFAULT_IMAGE_SIZES
    max_committed: int = 0

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        """Choose one chunk of actions for each of the running scenes.

        Args:
            envs: The scenes, with their `seed`, their `steps` so far, and their simulator's ground
                truth.
            observations: What each scene's cameras and sensors show.

        Returns:
            Per scene an action chunk [H, 8] (`spear.types.Action`, meters).
        """


class PolicyAgent(Agent):
    """A policy, which sees only observations, of its own cameras.

    Its noise is fixed by the scene's seed and the step, so that an outcome does not depend on which
    scenes run alongside.
    """

    needs_images = True

    def __init__(self, policy: Policy, name: str, weights: str | None = None) -> None:
        self.policy = policy
        self.name = name
        self.weights = weights
        self.image_sizes = get_rendered_sizes(policy)
        self.max_committed = getattr(policy, "committed", 0)

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        policy_observations = []
        for env, observation in zip(envs, observations, strict=True):
            seeded = {**observation, "seed": 1000 * env.seed + env.steps}
            policy_observations.append(select_cameras(self.policy, seeded))
        results = self.policy.infer_batch(policy_observations)
        return [np.asarray(result["actions"], np.float32) for result in results]


@functools.cache
def _load_agent_of_this_process(folder: Path) -> PolicyAgent:
    from spear.policy import Spear1Policy

    torch.set_num_threads(1)  # one of several processes; and with others the last bits would differ
    return PolicyAgent(Spear1Policy.load(folder), folder.name)


def predict_next_action(
    folder: Path, observation: Mapping[str, Any], seed: int, step: int
) -> Array:
    """Predict the first action of a policy's chunk [8], for the recording of corrections."""
    env = SimpleNamespace(seed=seed, steps=step)
    return _load_agent_of_this_process(folder).act([env], [observation])[0][0]


class ExpertAgent(Agent):
    """The scripted expert, which sees the true state: what the arm and the time limit allow."""

    name = "expert"

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        from spear.sim import expert

        return [expert.act(env.world)[None] for env in envs]


class IdleAgent(Agent):
    """Leaves the arm where it is, whatever it sees."""

    name = "nothing"

    def act(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [IDLE_ACTION[None]] * len(envs)


def load_agent(policy: str, **loading: Any) -> Agent:
    """Load who acts.

    Args:
        policy: "expert", "nothing", a trained folder, a shipped name, or a server's ws:// address.
        loading: device, dtype, norm_stats and flow_steps (`AgentOptions`) of a policy that is
            loaded here.

    Raises:
        SpearError: `loading` was given for another agent; the policy or the server is not there; or
            the server serves a robot.
    """
    is_remote = policy.startswith(("ws://", "wss://"))
    if is_remote or policy in BASELINES:
        _check_not_given(policy, loading)
    if policy == "expert":
        return ExpertAgent()
    if policy == "nothing":
        return IdleAgent()
    if is_remote:
        return _connect_agent(policy)
    return _load_policy_agent(AgentOptions(policy, **loading))


def _check_not_given(policy: str, loading: Mapping[str, Any]) -> None:
    for field, value in loading.items():
        if value != getattr(AgentOptions, field):
            option = to_option_name(field)
            raise SpearError(
                f"{option} {value}: is for policies loaded here: leave it out for {policy}"
            )


def _connect_agent(address: str) -> PolicyAgent:
    from spear.serve.client import RemotePolicy

    server = RemotePolicy(address, os.environ.get("SPEAR_TOKEN"))
    robot = server.metadata.get("embodiment", "generic")
    if robot != "generic":
        server.close()
        raise SpearError(f"{address}: serves robot {robot!r}: start it with `--embodiment generic`")
    weights = server.metadata.get("weights")
    if weights is None:
        notice(f"{address}: does not say which weights it has: give those of each their own --out")
    return PolicyAgent(server, address, weights)


def _load_policy_agent(options: AgentOptions) -> PolicyAgent:
    from spear.policy import Spear1Policy

    policy = Spear1Policy.load(
        options.policy,
        options.device,
        options.flow_steps,
        dataset=options.norm_stats,
        dtype=options.dtype,
    )
    return PolicyAgent(policy, options.policy, policy.identity)
