"""Demonstrations: the expert at work, with disturbances that it recovers from, as `Episode`s.

At random moments the arm is pushed and twisted off course for a step or two, drops what it holds, or closes
its gripper on nothing and lifts it as if it held something. Those steps are part of the episode, but masked:
they are never a training target. What follows them shows how to recover. Where a policy is given, the pushes
are its own steps, so that recoveries begin where it goes wrong (as DAgger, arXiv 1011.0686, but by turns).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spear.embodiments.inverse_kinematics import euclidean_norm
from spear.sim import expert
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import ImageSize
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util import processes
from spear.util.images import encode_jpeg

MISSED = 5
"""Longest time that a missed grasp goes unnoticed, steps."""
_LIFT = 0.03
"""How far a missed grasp is lifted per step, m."""
_EXTRA_STEPS = 20
"""Disturbed episodes may take this much longer than an evaluation."""


@dataclass(frozen=True)
class InterveningPolicy:
    """A policy that takes turns with the expert, as it is sent to processes.

    folder  its weights. act: (folder, observation, seed of the scene, step) → what it does, [8]; seed and
            step fix its noise.
    """

    folder: Path
    act: Callable[[Path, Mapping[str, Any], int, int], Array]


@dataclass(frozen=True)
class Disturbance:
    """How the arm is pushed off course (our choice).

    start        chance per step that a push begins; it lasts one or two steps.
    translation  standard deviation of a pushed step, m; rotation the same, rad.
    twist        standard deviation of the turn about the gripper's own axis that comes on top, rad: how far
                 the gripper is turned from the object under it is seen at all heights, not only where the
                 approach begins.
    drop         chance that a push while holding the object opens the gripper instead.
    miss         chance that a push while holding nothing closes the gripper and lifts it, for up to `MISSED`
                 steps: what a policy does that has missed its grasp and has not noticed.
    """

    start: float = 0.10
    translation: float = 0.03
    rotation: float = math.radians(12)
    twist: float = math.radians(30)
    drop: float = 0.15
    miss: float = 0.3


POLICY_STARTS, POLICY_STEPS = 0.25, 8
"""Of a policy's turns: the chance per step of the expert's that one begins, and its longest, steps."""


def record_episodes(
    tasks: Iterable[tuple[str, int]],
    image_size: ImageSize = (280, 210),
    wrist_size: ImageSize = (112, 112),
    workers: int = 2,
    policy: InterveningPolicy | None = None,
) -> Iterator[Episode]:
    """An `Episode` for each (family, seed) of `tasks`, in that order; also of failures (`success` False).

    Images are JPEG (quality 95) at the given (width, height). With `workers` > 1, that many processes share
    the work, to whom `policy` is sent; the episodes are the same whatever their number.
    """
    job = functools.partial(_job, image_size, wrist_size, policy)
    with processes.open_worker_pool(
        workers if workers > 1 else 0, __name__, "give fewer --workers"
    ) as executor:
        yield from processes.map_in_order(executor, job, tasks, num_ahead=2 * workers)


def record_episode(
    family: str,
    seed: int,
    image_size: ImageSize = (280, 210),
    wrist_size: ImageSize = (112, 112),
    disturbance: Disturbance = Disturbance(),
    policy: InterveningPolicy | None = None,
) -> Episode:
    """The expert's demonstration of one scene, disturbed, or by turns with a policy."""
    env = TabletopEnv(family, image_size, wrist_size)
    observation, info = env.reset(seed=seed)
    push = ArmDisturber(disturbance, np.random.default_rng([seed, 1]), policy)
    tape = EpisodeRecorder()
    while env.steps < MAX_STEPS + _EXTRA_STEPS and not info["success"]:
        action, pushed = push(expert.act(env.world), env.steps, observation, seed)
        seen = {
            "external": observation["observation/image"],
            "wrist": observation["observation/wrist_image"],
        }
        tape.add(seen, observation["observation/state"], action, pushed)
        info = env.physics_step(action)
        observation = env.observe()
    source = format_episode_source(family, seed, policy is not None)
    return tape.episode(env.world.spec.instruction, CONTROL_RATE_HZ, source, bool(info["success"]))


@dataclass
class EpisodeRecorder:
    """The steps of an episode as they come; pushed steps are masked."""

    steps: list[tuple[dict[str, bytes], Array, Array, bool]] = field(default_factory=list)

    def add(self, images: Mapping[str, Array], state: Array, action: Array, pushed: bool) -> None:
        """A step: what the cameras ([h, w, 3] uint8) and the robot say [8], and what is done [8]."""
        encoded = {camera: encode_jpeg(image) for camera, image in images.items()}
        self.steps.append((encoded, state, action, not pushed))

    def episode(self, instruction: str, rate_hz: float, source: str, success: bool) -> Episode:
        """All of them."""
        images, states, actions, mask = zip(*self.steps, strict=True)
        state = np.array(states)
        return Episode(
            images={camera: [seen[camera] for seen in images] for camera in images[0]},
            position=state[:, :3],
            rotation=state[:, 3:7],
            gripper=state[:, 7],
            instruction=instruction,
            rate_hz=rate_hz,
            source=source,
            action=np.array(actions, np.float32),
            action_mask=np.array(mask),
            success=success,
        )


def format_episode_source(family: str, seed: int, turns: bool, simulator: str = "sim") -> str:
    """What an episode is called; turns: a policy took turns with the expert."""
    return f"{simulator}/{family}/{seed}" + "/turns" * turns


def _job(
    external: ImageSize, wrist: ImageSize, policy: InterveningPolicy | None, task: tuple[str, int]
) -> Episode:
    return record_episode(*task, external, wrist, policy=policy)


@dataclass
class ArmDisturber:
    """When the arm is pushed in an episode, and how: by chance, or by the policy's turns if there is one.
    left: steps that the push still lasts; missed: it is a missed grasp."""

    how: Disturbance
    rng: np.random.Generator
    policy: InterveningPolicy | None = None
    left: int = 0
    missed: bool = False

    def __call__(
        self, action: Array, step: int, observation: Mapping[str, Any], seed: int
    ) -> tuple[Array, bool]:
        """What is done instead of the expert's `action`, and whether it is a push: none in the first step."""
        rng, how, holding = self.rng, self.how, bool(action[7] < 0.5)
        if self.policy is not None:
            if self.left == 0 and step > 0 and rng.random() < POLICY_STARTS:
                self.left = int(rng.integers(1, POLICY_STEPS + 1))
        elif self.left == 0 and step > 0 and rng.random() < how.start:
            self.missed = not holding and rng.random() < how.miss
            self.left = int(rng.integers(2, MISSED + 1) if self.missed else rng.integers(1, 3))
        if self.left == 0:
            return action, False
        self.left -= 1
        if self.policy is not None:
            return self.policy.act(self.policy.folder, observation, seed, step), True
        move, vector = rng.normal(0, how.translation, 3), rng.normal(0, how.rotation, 3)
        vector[2] += rng.normal(0, how.twist)
        angle = euclidean_norm(vector)
        quat = np.array([math.cos(angle / 2), *(math.sin(angle / 2) * vector / max(angle, 1e-9))])
        opening = 1.0 if holding and rng.random() < how.drop else action[7]
        if self.missed:
            move[2] += _LIFT
            opening = 0.0
        return np.array([*move, *quat, opening], np.float32), True
