"""Demonstrations: the scripted expert at work, with disturbances that it recovers from, as
`Episode`s.

At random moments the arm is pushed and twisted off course for a step or two, drops what it holds,
or closes its gripper on nothing and lifts it as if it held something. Those steps are part of the
episode, but masked: they are never a training target. What follows them shows how to recover. Where
a policy is given, the pushes are its own steps, so that recoveries begin where it goes wrong (as
DAgger, arXiv 1011.0686, but by turns).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spear.embodiments.inverse_kinematics import euclidean_norm
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, camera_key
from spear.sim import expert
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.sim.render import CAMERAS, ImageSize
from spear.types import CONTROL_RATE_HZ, Array, Episode
from spear.util import processes
from spear.util.images import encode_jpeg

MIN_MISSED_GRASP_STEPS = 2
MAX_MISSED_GRASP_STEPS = 5  # the longest time that a missed grasp goes unnoticed
MAX_PUSH_STEPS = 2
MISSED_GRASP_LIFT_M = 0.03  # how far a missed grasp is lifted per step
NUM_EXTRA_STEPS = 20  # disturbed episodes may take this much longer than an evaluation
POLICY_TURN_PROBABILITY = 0.25  # per step of the expert's, that a turn of the policy begins
MAX_POLICY_TURN_STEPS = 8


@dataclass(frozen=True)
class InterveningPolicy:
    """A policy that takes turns with the expert, as it is sent to processes.

    folder  its weights.
    act     (folder, observation, seed of the scene, step) -> its action, [8]. Seed and step fix its
            noise.
    """

    folder: Path
    act: Callable[[Path, Mapping[str, Any], int, int], Array]


@dataclass(frozen=True)
class Disturbance:
    """How the arm is pushed off course (our choice).

    start        probability per step that a push begins; it lasts one or two steps.
    translation  standard deviation of a pushed step, m.
    rotation     the same, rad.
    twist        standard deviation of an additional turn about the gripper's own axis, rad. Thus
                 the demonstrations show at all heights, not only where the approach begins, a
                 gripper that is turned from the object under it.
    drop         probability that a push while holding the object opens the gripper instead.
    miss         probability that a push while holding nothing closes the gripper and lifts it, for
                 up to `MAX_MISSED_GRASP_STEPS`: what a policy does that has missed its grasp and
                 has not noticed.
    """

    start: float = 0.10
    translation: float = 0.03
    rotation: float = math.radians(12)
    twist: float = math.radians(30)
    drop: float = 0.15
    miss: float = 0.3


def record_episodes(
    tasks: Iterable[tuple[str, int]],
    image_sizes: Mapping[str, ImageSize] = DEFAULT_IMAGE_SIZES,
    workers: int = 2,
    policy: InterveningPolicy | None = None,
    world: str = "default",
) -> Iterator[Episode]:
    """Record an `Episode` for each task, in their order; also of failures (`success` False).

    Args:
        tasks: (family, seed) of each scene.
        image_sizes: Camera → (width, height) of its JPEG images (quality 95), in pixels.
        workers: With more than one, so many processes share the work. The episodes are the same
            whatever their number.
        policy: Takes turns with the expert; it is sent to the processes.
        world: The surroundings of the scenes, see `spear.sim.worlds`.
    """
    job = functools.partial(_record_task, image_sizes, policy, world)
    num_processes = workers if workers > 1 else 0
    with processes.open_worker_pool(num_processes, __name__, "give fewer --workers") as executor:
        yield from processes.map_in_order(executor, job, tasks, num_ahead=2 * workers)


def _record_task(
    image_sizes: Mapping[str, ImageSize],
    policy: InterveningPolicy | None,
    world: str,
    task: tuple[str, int],
) -> Episode:
    family, seed = task
    return record_episode(family, seed, image_sizes, policy=policy, world=world)


def record_episode(
    family: str,
    seed: int,
    image_sizes: Mapping[str, ImageSize] = DEFAULT_IMAGE_SIZES,
    disturbance: Disturbance = Disturbance(),
    policy: InterveningPolicy | None = None,
    world: str = "default",
) -> Episode:
    """Record the expert's demonstration of one scene, disturbed, or by turns with a policy."""
    env = TabletopEnv(family, image_sizes, world=world)
    observation, info = env.reset(seed=seed)
    disturber = ArmDisturber(disturbance, np.random.default_rng([seed, 1]), policy)
    recorder = EpisodeRecorder()
    while env.steps < MAX_STEPS + NUM_EXTRA_STEPS and not info["success"]:
        expert_action = expert.act(env.world)
        action, is_pushed = disturber(expert_action, env.steps, observation, seed)
        images = {camera: observation[camera_key(camera)] for camera in CAMERAS}
        recorder.add(images, observation["observation/state"], action, is_pushed)
        info = env.physics_step(action)
        observation = env.observe()
    source = format_episode_source(family, seed, policy is not None)
    instruction = env.world.spec.instruction
    return recorder.episode(instruction, CONTROL_RATE_HZ, source, bool(info["success"]))


@dataclass(frozen=True)
class _RecordedStep:
    images: Mapping[str, bytes]
    state: Array
    action: Array
    is_pushed: bool


@dataclass
class EpisodeRecorder:
    """Collects the steps of an episode. Pushed steps are masked."""

    steps: list[_RecordedStep] = field(default_factory=list)

    def add(
        self, images: Mapping[str, Array], state: Array, action: Array, is_pushed: bool
    ) -> None:
        """Add a step: images [h, w, 3] uint8 by camera, state [8] and action [8]."""
        encoded = {camera: encode_jpeg(image) for camera, image in images.items()}
        self.steps.append(_RecordedStep(encoded, state, action, is_pushed))

    def episode(self, instruction: str, rate_hz: float, source: str, success: bool) -> Episode:
        """Return all steps as an episode."""
        states = np.array([step.state for step in self.steps])
        images = {}
        for camera in self.steps[0].images:
            images[camera] = [step.images[camera] for step in self.steps]
        return Episode(
            images=images,
            position=states[:, :3],
            rotation=states[:, 3:7],
            gripper=states[:, 7],
            instruction=instruction,
            rate_hz=rate_hz,
            source=source,
            action=np.array([step.action for step in self.steps], np.float32),
            action_mask=np.array([not step.is_pushed for step in self.steps]),
            success=success,
        )


def format_episode_source(
    family: str, seed: int, has_policy_turns: bool, simulator: str = "sim"
) -> str:
    """Return the name of a recorded episode.

    >>> format_episode_source("put_on", 10000, has_policy_turns=True)
    'sim/put_on/10000/turns'
    """
    source = f"{simulator}/{family}/{seed}"
    return f"{source}/turns" if has_policy_turns else source


@dataclass
class ArmDisturber:
    """Decides when the arm is pushed in an episode, and how: at random, or by a policy's turns.

    disturbance        how it is pushed at random.
    rng                the random numbers.
    policy             takes turns, if there is one.
    num_steps_left     steps that the present push still lasts.
    is_missed_grasp    whether the present push is a missed grasp.
    """

    disturbance: Disturbance
    rng: np.random.Generator
    policy: InterveningPolicy | None = None
    num_steps_left: int = 0
    is_missed_grasp: bool = False

    def __call__(
        self, action: Array, step: int, observation: Mapping[str, Any], seed: int
    ) -> tuple[Array, bool]:
        """Return the action instead of the expert's, and whether it is a push. The first is never
        one."""
        is_holding = bool(action[7] < 0.5)
        if self.num_steps_left == 0 and step > 0:
            self._maybe_begin(is_holding)
        if self.num_steps_left == 0:
            return action, False

        self.num_steps_left -= 1
        if self.policy is not None:
            return self.policy.act(self.policy.folder, observation, seed, step), True
        return self._push(action, is_holding), True

    def _maybe_begin(self, is_holding: bool) -> None:
        rng = self.rng
        if self.policy is not None:
            if rng.random() < POLICY_TURN_PROBABILITY:
                self.num_steps_left = int(rng.integers(1, MAX_POLICY_TURN_STEPS + 1))
            return
        if rng.random() < self.disturbance.start:
            self.is_missed_grasp = not is_holding and rng.random() < self.disturbance.miss
            if self.is_missed_grasp:
                num_steps = rng.integers(MIN_MISSED_GRASP_STEPS, MAX_MISSED_GRASP_STEPS + 1)
            else:
                num_steps = rng.integers(1, MAX_PUSH_STEPS + 1)
            self.num_steps_left = int(num_steps)

    def _push(self, action: Array, is_holding: bool) -> Array:
        """Return a random action [8]."""
        rng = self.rng
        translation = rng.normal(0, self.disturbance.translation, 3)
        rotation_vector = rng.normal(0, self.disturbance.rotation, 3)
        rotation_vector[2] += rng.normal(0, self.disturbance.twist)
        angle_rad = euclidean_norm(rotation_vector)
        axis_part = math.sin(angle_rad / 2) * rotation_vector / max(angle_rad, 1e-9)
        quaternion = np.array([math.cos(angle_rad / 2), *axis_part])

        is_dropped = is_holding and rng.random() < self.disturbance.drop
        opening = 1.0 if is_dropped else action[7]
        if self.is_missed_grasp:
            translation[2] += MISSED_GRASP_LIFT_M
            opening = 0.0
        return np.array([*translation, *quaternion, opening], np.float32)
