"""A simulated robot whose program asks a server's policy, and the recording of what it does.

The robot runs on a clock of its own. So a recording takes as long as rendering and inference take,
and its times are those of a robot that waits 0.2 s for each action. Observations, answers and files
go through the classes that `spear serve --record` uses; only the socket is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from planted import ClientTiming, Observation, PlantedFault
from spear import embodiments
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import DEFAULT_IMAGE_SIZES, is_camera_key
from spear.errors import SpearError, suppress_notices
from spear.geometry import action_between_poses
from spear.policy import Spear1Policy
from spear.serve.exchange import Exchange
from spear.serve.recorder import RecordingWriter, write_or_check_marker
from spear.serve.service import Answer, Service
from spear.sim import control
from spear.sim.env import TabletopEnv
from spear.sim.scene import SceneSpec
from spear.sim.world import World
from spear.types import Array
from spear.util.images import decode_image, encode_jpeg

IMAGE_SIZES = {"external": (192, 128), "wrist": (96, 96)}
"""View → (width, height) of the images for which nano was trained, px."""
BATCH_SIZE = 16  # observations that are answered together
MAX_ACTIONS = 40
"""An episode ends after so many actions, 8 s, because nano needs some 20 for a task."""
PHYSICS_STEP_S = 0.004
MAX_RECORDING_BYTES = 2**30
FIRST_START_S = 1_790_000_000.0  # Unix time of the first episode of a recording
EPISODE_DISTANCE_S = 60.0  # from the start of an episode to the start of the next one
RENDERING_S = 0.005  # from the capture of the images until the observation is sent
MIN_NETWORK_S = 0.001  # one way
MAX_NETWORK_S = 0.004
TICK_JITTER_S = 0.002  # standard deviation


@dataclass(frozen=True)
class ClientHabits:
    """How a correct robot's program may differ from another one.

    replan_interval  how many actions it executes before it observes again.
    image_scale      how much larger its images are than the policy's.
    jpeg_quality     the quality to which it compresses images; None for no compression.
    inference_s      how long the policy computes, in the median.
    """

    replan_interval: int = 1
    image_scale: int = 1
    jpeg_quality: int | None = None
    inference_s: float = 0.03


class Robot:
    """One episode: a robot that acts in a scene until it succeeds or its time is over.

    Args:
        scene: the scene, without the faults.
        faults: the faults, which are planted in this order.
        habits: how the robot's program works apart from its faults.
        client: identifies the robot for the recording.
        start_s: Unix time of the start.
        seed: of the noise, and of what is random in the robot.
    """

    def __init__(
        self,
        scene: SceneSpec,
        faults: Sequence[PlantedFault],
        habits: ClientHabits,
        client: int,
        start_s: float,
        seed: int,
    ) -> None:
        timing = ClientTiming(replan_interval=habits.replan_interval)
        image_sizes = dict(DEFAULT_IMAGE_SIZES)
        for view, (width, height) in IMAGE_SIZES.items():
            image_sizes[view] = (habits.image_scale * width, habits.image_scale * height)
        for fault in faults:
            scene = fault.change_scene(scene)
            timing = fault.change_timing(timing)
            image_sizes = dict(fault.change_image_sizes(image_sizes))
        self.client = client
        self.is_successful = False
        self._faults = faults
        self._habits = habits
        self._timing = timing
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._env = TabletopEnv(scene.family, image_sizes)
        self._env.start_episode_in(World(scene))
        self._now_s = start_s
        self._num_actions = 0
        self._num_observations = 0
        self._gripper = 1.0
        self._plan: list[Array] = []  # actions, or poses if the program commands absolute poses
        self._poses = [self._measure()]  # the state [8] before each action

    @property
    def has_ended(self) -> bool:
        return self.is_successful or self._num_actions >= MAX_ACTIONS

    def observe(self) -> Observation:
        """Return what the robot's program sends now."""
        observation = self._env.observe()
        for fault in self._faults:
            observation = fault.change_observation(observation)
        if self._habits.jpeg_quality is not None:
            for key in filter(is_camera_key, observation):
                encoded = encode_jpeg(observation[key], quality=self._habits.jpeg_quality)
                observation[key] = decode_image(encoded)
        observation["seed"] = 1000 * self._seed + self._num_observations
        self._num_observations += 1
        return observation

    def receive(self, answer: Answer) -> Exchange:
        """Execute an answer until the next observation is due.

        Returns:
            What the server records of the answer.
        """
        exchange = self._make_exchange(answer)
        timing = self._timing
        tick_of_observation = len(self._poses) - 1
        num_late = timing.delay_ticks
        if num_late == 0:
            self._now_s = exchange.answer_s + self._draw_network_s()
        for _ in range(num_late):
            self._execute_next()
        self._plan = self._make_plan(answer.chunk, tick_of_observation)
        for _ in range(timing.replan_interval - num_late):
            self._execute_next()
        return exchange

    def _make_exchange(self, answer: Answer) -> Exchange:
        timing = self._timing
        delay_s = timing.delay_ticks * timing.tick_s
        arrival_s = self._now_s + RENDERING_S + self._draw_network_s()
        inference_s = self._habits.inference_s * float(np.exp(self._rng.normal(0, 0.1)))
        if timing.is_network_slow:
            arrival_s += delay_s / 2
        elif delay_s:
            inference_s = delay_s - 0.02
        rows = answer["actions"]
        return Exchange(
            client=self.client,
            address=f"127.0.0.1:{40000 + self.client}",
            arrival_s=arrival_s,
            answer_s=arrival_s + inference_s + 0.001,
            inference_s=inference_s,
            observation=answer.observation,
            actions=answer.chunk,
            rows=rows,
            num_bytes=0,
        )

    def _make_plan(self, chunk: Array, tick_of_observation: int) -> list[Array]:
        """Return the actions of a chunk, or the poses [8] to which the program goes."""
        if self._timing.pose_age_ticks is None:
            return list(chunk)
        tick = max(0, tick_of_observation - self._timing.pose_age_ticks)
        positions, rotations = compute_target_poses(self._poses[tick], chunk)
        return list(np.concatenate([positions, rotations, chunk[:, 7:]], axis=1))

    def _execute_next(self) -> None:
        """Execute the next action of the plan; without one, hold still."""
        action = np.array([0, 0, 0, 1, 0, 0, 0, self._gripper], np.float32)
        if self._plan and self._timing.pose_age_ticks is None:
            action = self._plan.pop(0)
        elif self._plan:
            action = _move_to(self._poses[-1], self._plan.pop(0))
        num_executions = 1
        for fault in self._faults:
            action = fault.change_action(action, self._poses[-1])
            num_executions *= fault.count_executions(self._rng)
        if num_executions == 0:
            action = np.array([0, 0, 0, 1, 0, 0, 0, self._gripper], np.float32)
        for _ in range(max(1, num_executions)):
            self._step(action)

    def _step(self, action: Array) -> None:
        if self.has_ended:
            return
        with _physics_steps(round(self._timing.tick_s / PHYSICS_STEP_S)):
            info = self._env.step_without_observing(action)
        self._gripper = float(action[7])
        self._num_actions += 1
        self._now_s += self._timing.tick_s + self._rng.normal(0, TICK_JITTER_S)
        self._poses.append(self._measure())
        self.is_successful = bool(info["success"])

    def _measure(self) -> Array:
        """Return the true state [8]."""
        servo = self._env.world.servo
        position, rotation = servo.measure_pose()
        return np.concatenate([position, rotation, [servo.measure_opening()]])

    def _draw_network_s(self) -> float:
        return float(self._rng.uniform(MIN_NETWORK_S, MAX_NETWORK_S))


def _move_to(state: Array, target: Array) -> Array:
    """Return the action [8] from a state [8] to a target pose with its gripper command [8]."""
    translation, rotation = action_between_poses(
        torch.from_numpy(np.float64(state[:3])),
        torch.from_numpy(np.float64(state[3:7])),
        torch.from_numpy(np.float64(target[:3])),
        torch.from_numpy(np.float64(target[3:7])),
    )
    action = np.concatenate([translation.numpy(), rotation.numpy(), target[7:]])
    return action.astype(np.float32)


@contextmanager
def _physics_steps(count: int) -> Iterator[None]:
    """Let an action last so many physics steps."""
    usual_count = control.PHYSICS_STEPS_PER_CONTROL_STEP
    control.PHYSICS_STEPS_PER_CONTROL_STEP = count
    try:
        yield
    finally:
        control.PHYSICS_STEPS_PER_CONTROL_STEP = usual_count


@dataclass(frozen=True)
class Recording:
    """A folder to be recorded, and the robots whose episodes it gets, one after the other."""

    folder: Path
    robots: Sequence[Robot]


def record(policy: Spear1Policy, recordings: Sequence[Recording], name: str) -> None:
    """Let all robots act at once, and record each in its folder.

    Args:
        policy: the policy.
        recordings: what to record. The folders must not exist.
        name: the policy's name in the recordings.

    Raises:
        SpearError: the policy refuses an observation.
    """
    service = Service(policy, embodiments.load("generic"), name=name)
    writers: dict[int, RecordingWriter] = {}  # robot → the writer of its folder
    for recording in recordings:
        recording.folder.mkdir(parents=True)
        write_or_check_marker(recording.folder, {})
        writer = RecordingWriter(recording.folder, service.metadata, MAX_RECORDING_BYTES)
        writers.update({robot.client: writer for robot in recording.robots})

    running = [robot for recording in recordings for robot in recording.robots]
    while running:
        for first in range(0, len(running), BATCH_SIZE):
            batch = running[first : first + BATCH_SIZE]
            for robot, answer in zip(batch, _ask(service, batch), strict=True):
                writers[robot.client].add(robot.receive(answer))
        running = [robot for robot in running if not robot.has_ended]
    for writer in writers.values():
        writer.end_all()


def _ask(service: Service, robots: Sequence[Robot]) -> list[Answer]:
    """Answer the present observations of robots together."""
    observations = [robot.observe() for robot in robots]
    answers = []
    with suppress_notices():  # the faults cause many
        results = service.answer(observations, [robot.client for robot in robots])
    for result in results:
        if isinstance(result, SpearError):
            raise result
        assert isinstance(result, Answer)
        answers.append(result)
    return answers
