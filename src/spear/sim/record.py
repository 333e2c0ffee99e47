"""Records demonstrations: episodes of the scripted expert, with disturbances.

The disturbances (*pushes*) show how the expert recovers. At random moments the arm is moved off
course for a step or two, drops what it holds, or makes a *missed grasp*: it closes the gripper on
nothing and lifts the gripper as if it held something. Pushed steps are part of the episode, but
masked: they are never a training target. The expert's steps after them are targets. If a policy is
given, the policy's own actions take the place of random pushes for a few steps, its *turns*, so
that recoveries begin where the policy goes wrong (similar to DAgger, arXiv 1011.0686).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spear.embodiments.inverse_kinematics import compute_euclidean_norm
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, get_camera_key
from spear.sim import expert
from spear.sim.env import MAX_STEPS, TabletopEnv
from spear.types import CONTROL_RATE_HZ, Array, Episode, WidthAndHeight
from spear.util import processes
from spear.util.images import encode_jpeg

# Numbers of steps that a push lasts: a missed grasp, another push, and a turn of the policy.
MIN_MISSED_GRASP_STEPS = 2
MAX_MISSED_GRASP_STEPS = 5
MAX_PUSH_STEPS = 2
MAX_POLICY_TURN_STEPS = 8

MISSED_GRASP_LIFT_M = 0.03  # how far the gripper rises per step of a missed grasp
NUM_EXTRA_STEPS = 20  # an episode with disturbances may take this many steps more than others
POLICY_TURN_PROBABILITY = 0.25  # that a turn of the policy begins, per step of the expert


@dataclass(frozen=True)
class InterveningPolicy:
    """A policy that takes turns with the expert, in a form that can be sent to processes.

    folder  the folder with the policy's weights.
    act     a function that loads the policy and computes its action: (folder, observation, seed of
            the scene, step) -> action [8]. The seed and the step determine the policy's noise.
    """

    folder: Path
    act: Callable[[Path, Mapping[str, Any], int, int], Array]


@dataclass(frozen=True)
class Disturbance:
    """How the arm is pushed off course (our choice).

    start        probability per step that a push begins.
    translation  standard deviation of the translation of a pushed step, per axis, m.
    rotation     standard deviation of the rotation of a pushed step, per axis, rad.
    twist        standard deviation of an additional rotation about the gripper's own axis, rad. So
                 demonstrations show at all heights, and not only at the beginning of the approach,
                 how the gripper turns until it is aligned with the object.
    drop         probability, if the gripper holds the object, that a pushed step opens the gripper.
    miss         probability, if the gripper holds nothing, that a push is a missed grasp. A policy
                 acts like this if it has missed its grasp and has not noticed it.
    """

    start: float = 0.10
    translation: float = 0.03
    rotation: float = math.radians(12)
    twist: float = math.radians(30)
    drop: float = 0.15
    miss: float = 0.3


def record_episodes(
    tasks: Iterable[tuple[str, int]],
    image_sizes: Mapping[str, WidthAndHeight] = DEFAULT_IMAGE_SIZES,
    workers: int = 2,
    policy: InterveningPolicy | None = None,
    world: str = "default",
) -> Iterator[Episode]:
    """Record an `Episode` for each task, in the order of the tasks.

    Failed episodes are yielded, too, with `success` False.

    Args:
        tasks: (task family, seed) of each scene.
        image_sizes: camera → (width, height) of its JPEG images (quality 95), in pixels.
        workers: number of processes that share the work; with 1 this process records. The episodes
            do not depend on this number.
        policy: a policy that takes turns with the expert.
        world: the surroundings of the scenes, see `spear.sim.worlds`.
    """
    job = functools.partial(_record_task, image_sizes, policy, world)
    num_processes = workers if workers > 1 else 0
    with processes.open_worker_pool(
        num_processes, preload=__name__, advice="give fewer --workers"
    ) as executor:
        yield from processes.map_in_order(executor, job, tasks, num_ahead=2 * workers)


def _record_task(
    image_sizes: Mapping[str, WidthAndHeight],
    intervening_policy: InterveningPolicy | None,
    world: str,
    family_and_seed: tuple[str, int],
) -> Episode:
    """Record the episode of a task (family, seed). This runs in worker processes."""
    family, seed = family_and_seed
    return record_episode(family, seed, image_sizes, policy=intervening_policy, world=world)


def record_episode(
    family: str,
    seed: int,
    image_sizes: Mapping[str, WidthAndHeight] = DEFAULT_IMAGE_SIZES,
    disturbance: Disturbance = Disturbance(),
    policy: InterveningPolicy | None = None,
    world: str = "default",
) -> Episode:
    """Record the expert's demonstration of one scene, with pushes or with turns of a policy.

    The arguments are those of `record_episodes`; `disturbance` says how the arm is pushed.
    """
    env = TabletopEnv(family, image_sizes, world=world)
    observation, info = env.reset(seed=seed)
    disturber = ArmDisturber(disturbance, np.random.default_rng([seed, 1]), policy)
    recorder = EpisodeRecorder()
    while env.steps < MAX_STEPS + NUM_EXTRA_STEPS and not info["success"]:
        expert_action = expert.act(env.world)
        action, is_pushed = disturber(expert_action, env.steps, observation, seed)
        images = {camera: observation[get_camera_key(camera)] for camera in env.image_sizes}
        recorder.add(images, observation["observation/state"], action, is_pushed)
        info = env.step_without_observing(action)
        observation = env.observe()
    source = format_episode_source(family, seed, policy is not None)
    instruction = env.world.spec.instruction
    return recorder.make_episode(instruction, CONTROL_RATE_HZ, source, bool(info["success"]))


@dataclass(frozen=True)
class _RecordedStep:
    """One step of an episode: what was observed, and the action that followed."""

    images: Mapping[str, bytes]  # camera -> JPEG
    state: Array  # [8]
    action: Array  # [8]
    is_pushed: bool


@dataclass
class EpisodeRecorder:
    """Collects the steps of an episode. Pushed steps are masked in the result."""

    steps: list[_RecordedStep] = field(default_factory=list)

    def add(
        self, images: Mapping[str, Array], state: Array, action: Array, is_pushed: bool
    ) -> None:
        """Add a step: images [h, w, 3] uint8 by camera, state [8] and action [8]."""
        encoded = {camera: encode_jpeg(image) for camera, image in images.items()}
        self.steps.append(_RecordedStep(encoded, state, action, is_pushed))

    def make_episode(self, instruction: str, rate_hz: float, source: str, success: bool) -> Episode:
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
    """Return the text that `Episode.source` has for an episode recorded in a simulator.

    >>> format_episode_source("put_on", 10000, has_policy_turns=True)
    'sim/put_on/10000/turns'
    """
    source = f"{simulator}/{family}/{seed}"
    return f"{source}/turns" if has_policy_turns else source


@dataclass
class ArmDisturber:
    """Decides when the arm is pushed in an episode, and how: at random, or by a policy's turns.

    disturbance      how the arm is pushed at random.
    rng              draws the random numbers.
    policy           the policy that takes turns with the expert; None for random pushes.
    num_steps_left   number of steps that the present push still lasts; 0 without a push.
    is_missed_grasp  whether the present push is a missed grasp.
    """

    disturbance: Disturbance
    rng: np.random.Generator
    policy: InterveningPolicy | None = None
    num_steps_left: int = 0
    is_missed_grasp: bool = False

    def __call__(
        self, action: Array, step: int, observation: Mapping[str, Any], seed: int
    ) -> tuple[Array, bool]:
        """Return the action to execute, and whether it is a push. The first step is never pushed.

        Args:
            action: the expert's action [8], which is returned if there is no push.
            step: the step's number in the episode, from 0.
            observation: the present observation, for the policy.
            seed: the seed of the scene.
        """
        # The expert closes the gripper in order to grasp, and keeps it closed while it holds.
        is_holding = bool(action[7] < 0.5)
        if self.num_steps_left == 0 and step > 0:
            self._maybe_begin_disturbance(is_holding)
        if self.num_steps_left == 0:
            return action, False

        self.num_steps_left -= 1
        if self.policy is not None:
            return self.policy.act(self.policy.folder, observation, seed, step), True
        return self._sample_pushed_action(action, is_holding), True

    def _maybe_begin_disturbance(self, is_holding: bool) -> None:
        """Begin a push, or a turn of the policy, with its probability."""
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

    def _sample_pushed_action(self, action: Array, is_holding: bool) -> Array:
        """Return the action [8] of a random push, given the expert's `action`."""
        rng = self.rng
        translation = rng.normal(0, self.disturbance.translation, 3)
        rotation_vector = rng.normal(0, self.disturbance.rotation, 3)
        rotation_vector[2] += rng.normal(0, self.disturbance.twist)
        angle_rad = compute_euclidean_norm(rotation_vector)
        imaginary = math.sin(angle_rad / 2) * rotation_vector / max(angle_rad, 1e-9)
        quaternion = np.array([math.cos(angle_rad / 2), *imaginary])

        is_dropped = is_holding and rng.random() < self.disturbance.drop
        opening = 1.0 if is_dropped else action[7]
        if self.is_missed_grasp:
            translation[2] += MISSED_GRASP_LIFT_M
            opening = 0.0
        return np.array([*translation, *quaternion, opening], np.float32)
