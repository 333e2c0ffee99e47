"""Agents: who acts in an evaluation. A policy, or a baseline with which its result is compared.

The scripted expert (in SIMPLER called the oracle) is an upper baseline, an arm that does nothing a
lower one.
"""

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
from spear.types import Array, Policy, WidthAndHeight
from spear.util.options import to_option_name

# Names that stand for no policy. The commands of SIMPLER and LIBERO make their own "oracle", so
# `load_agent` makes only the other two.
BASELINES = ("expert", "oracle", "nothing")
IDLE_ACTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)
"""The action that leaves the arm where it is, with the gripper open: no translation, no rotation
(quaternion 1, 0, 0, 0), opening 1."""


class Agent(Protocol):
    """Chooses actions for several running scenes at once.

    name           the name under which its results are saved and shown.
    weights        identity of the trained weights (`Spear1Policy.identity`); None for a baseline,
                   or if a server does not send the identity.
    needs_images   whether it sees the cameras; if not, no images are rendered for it.
    image_sizes    camera → (width, height) of its images in the embedded simulator, px.
    max_committed  longest committed prefix, the actions of the running chunk with which the agent's
                   next chunk can begin.
    """

    name: str
    weights: str | None = None
    needs_images: bool = False
    image_sizes: Mapping[str, WidthAndHeight] = DEFAULT_IMAGE_SIZES
    max_committed: int = 0

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        """Choose one chunk of actions for each of the running scenes.

        Args:
            envs: The scenes. Each has its `seed`, the number of `steps` so far, and the ground
                truth of its simulator.
            observations: One observation per scene (`spear.types.Policy`).

        Returns:
            One action chunk [H, 8] per scene (`spear.types.Action`, meters).
        """


class PolicyAgent(Agent):
    """A policy, which sees only the observations of the cameras that it was trained with.

    The noise from which the policy computes actions is fixed by the scene's seed and the step.
    Therefore an outcome depends only by rounding on which other scenes run at the same time.
    """

    needs_images = True

    def __init__(self, policy: Policy, name: str, weights: str | None = None) -> None:
        self.policy = policy
        self.name = name
        self.weights = weights
        self.image_sizes = get_rendered_sizes(policy)
        self.max_committed = getattr(policy, "committed", 0)

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        policy_observations = []
        for env, observation in zip(envs, observations, strict=True):
            # An episode has fewer than 1000 steps, so every scene and step has its own seed.
            seeded = {**observation, "seed": 1000 * env.seed + env.steps}
            policy_observations.append(select_cameras(self.policy, seeded))
        results = self.policy.infer_batch(policy_observations)
        return [np.asarray(result["actions"], np.float32) for result in results]


@functools.cache
def _load_agent_and_use_one_thread(folder: Path) -> PolicyAgent:
    """Load a policy, once per process, and restrict PyTorch in this process to one thread."""
    from spear.policy import Spear1Policy

    # Several of these processes run at once, and the number of threads changes the last bits of the
    # result.
    torch.set_num_threads(1)
    return PolicyAgent(Spear1Policy.load(folder), folder.name)


def predict_first_action(
    folder: Path, observation: Mapping[str, Any], seed: int, step: int
) -> Array:
    """Predict the first action [8] of a policy's chunk, for the recording of corrections.

    Args:
        folder: The trained policy.
        observation: The observation (`spear.types.Policy`).
        seed: The scene's seed, which with `step` fixes the policy's noise.
        step: The number of steps so far.
    """
    agent = _load_agent_and_use_one_thread(folder)
    env = SimpleNamespace(seed=seed, steps=step)
    (chunk,) = agent.choose_action_chunks([env], [observation])
    return chunk[0]


class ExpertAgent(Agent):
    """The scripted expert, which sees the true state.

    Its success shows what the arm and the time limit allow.
    """

    name = "expert"

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        from spear.sim import expert

        return [expert.act(env.world)[None] for env in envs]


class IdleAgent(Agent):
    """The baseline that never moves the arm."""

    name = "nothing"

    def choose_action_chunks(
        self, envs: Sequence[Any], observations: Sequence[Mapping[str, Any]]
    ) -> Sequence[Array]:
        return [IDLE_ACTION[None]] * len(envs)


def load_agent(policy: str, **loading: Any) -> Agent:
    """Load an agent.

    Args:
        policy: "expert", "nothing", a trained folder, a shipped name, or a server's ws:// address.
        loading: device, dtype, quantize, norm_stats and flow_steps (see `AgentOptions`), only for
            a policy that this process loads.

    Raises:
        SpearError: `loading` was given for a baseline or a server; the policy or the server does
            not exist; or the server's embodiment is not "generic".
    """
    is_remote = policy.startswith(("ws://", "wss://"))
    if is_remote or policy in BASELINES:
        _check_loading_options_are_default(policy, loading)
    if policy == "expert":
        return ExpertAgent()
    if policy == "nothing":
        return IdleAgent()
    if is_remote:
        return _connect_agent(policy)
    return _load_policy_agent(AgentOptions(policy, **loading))


def _check_loading_options_are_default(policy: str, loading: Mapping[str, Any]) -> None:
    """Raise `SpearError` if an option of loading has another value than its default."""
    for field, value in loading.items():
        if value != getattr(AgentOptions, field):
            option = to_option_name(field)
            raise SpearError(
                f"{option} {value} has no effect on {policy}, because it concerns policies that "
                "are loaded here. Leave it out."
            )


def _connect_agent(address: str) -> PolicyAgent:
    """Connect to the policy of a server. The environment variable SPEAR_TOKEN is sent along."""
    from spear.serve.client import RemotePolicy

    server = RemotePolicy(address, os.environ.get("SPEAR_TOKEN"))
    robot = server.metadata.get("embodiment", "generic")
    if robot != "generic":
        server.close()
        raise SpearError(
            f"{address} serves the robot {robot!r}. Start it with `--embodiment generic`."
        )
    weights = server.metadata.get("weights")
    if weights is None:
        notice(
            f"{address} does not say which weights it has. Use another --out for each set of "
            "weights."
        )
    return PolicyAgent(server, address, weights)


def _load_policy_agent(options: AgentOptions) -> PolicyAgent:
    from spear.policy import Spear1Policy

    policy = Spear1Policy.load(
        options.policy,
        options.device,
        options.flow_steps,
        dataset=options.norm_stats,
        dtype=options.dtype,
        quantize=options.quantize,
    )
    return PolicyAgent(policy, options.policy, policy.identity)
