"""Rollouts and demonstrations that are made of random numbers, with faults at will."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from spear.checks.rollout.case import Case
from spear.checks.rollout.episode import CameraPictures, RecordedEpisode, ServedTimes
from spear.checks.rollout.picture_versions import COLOR_VERSIONS, SHAPE_VERSIONS
from spear.checks.rollout.pictures import PictureReferences
from spear.geometry import quat_exp, quat_multiply, quat_normalize
from spear.types import Array

HORIZON = 5
NUM_STEPS = 30
NOISE_M = 0.0005  # with which the arm follows
INSTRUCTIONS = ("put the red mug on the plate", "put the spoon on the towel")
PICTURE_SHAPE = (24, 32, 3)
PIXELS_PER_METER = 60.0


def follow(action: Array, rotation: Array) -> Array:
    """Execute an action as it is meant."""
    return action


@dataclass(frozen=True)
class MadeRobot:
    """How a made robot acts.

    execute          (action [8], orientation [4]) -> the action that it really executes. Both
                     actions translate along the base's axes and turn about the tool's. The
                     orientation is that of the tool before the action, in the base frame.
    num_executed     how many actions of a chunk it executes.
    answer_s         seconds from each observation to its answer.
    action_s         seconds that an action lasts.
    gripper_delay    steps by which the gripper is later than the step after its command.
    """

    execute: Callable[[Array, Array], Array] = follow
    num_executed: int = 1
    answer_s: Callable[[int], float] = lambda step: 0.03
    action_s: float = 0.2
    gripper_delay: int = 0


@cache
def make_episode(
    seed: int, robot: MadeRobot = MadeRobot(), instruction: str | None = None
) -> RecordedEpisode:
    """Make an episode of an arm that wanders about a table, gripper down, and opens and closes.

    Tests share the episode, so they must not change its arrays.
    """
    rng = np.random.default_rng(seed)
    chunks = _make_chunks(rng)
    position = np.array([0.4, 0.0, 0.2]) + rng.normal(0, 0.03, 3)
    rotation = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    rotation = quat_multiply(_make_turn([0, 0, rng.normal(0, 0.4)]), rotation)
    time_s = 1_780_000_000.0 + 100 * seed  # Unix time
    states = []
    times = []
    commands = [1.0] * (robot.gripper_delay + 1)
    for step in range(NUM_STEPS):
        opening = commands[-1 - robot.gripper_delay]
        states.append(np.concatenate([position, rotation.numpy(), [opening]]))
        answer_s = time_s + robot.answer_s(step)
        times.append((time_s, answer_s))
        for action in chunks[step, : robot.num_executed]:
            executed = robot.execute(np.asarray(action, np.float64), rotation.numpy())
            position = position + executed[:3] + rng.normal(0, NOISE_M, 3)
            turn = quat_normalize(torch.as_tensor(executed[3:7]))
            rotation = quat_multiply(rotation, turn)
            commands.append(executed[7])
        time_s = answer_s + robot.num_executed * robot.action_s
    rows = np.array(states)
    arrivals, answers = np.array(times).T
    return RecordedEpisode(
        source=f"made/{seed}",
        instruction=instruction or INSTRUCTIONS[seed % 2],
        rate_hz=1 / (robot.action_s * robot.num_executed),
        position=rows[:, :3],
        rotation=rows[:, 3:7],
        opening=rows[:, 7],
        # The last executed action of each answer. Checks read the gripper command of these, but
        # motions from the whole answers (`served`).
        action=chunks[:, robot.num_executed - 1],
        is_known=np.ones(NUM_STEPS, bool),
        pictures=_make_pictures(rng, rows[:, :3]),
        served=ServedTimes(arrivals, answers, chunks),
    )


def make_case(
    robot: MadeRobot = MadeRobot(),
    change: Callable[[RecordedEpisode], RecordedEpisode] | None = None,
    num_episodes: int = 6,
    num_demonstrations: int = 12,
) -> Case:
    """Make a case: a rollout with a fault, and demonstrations without one.

    Args:
        robot: the robot of the rollout.
        change: changes each episode of the rollout afterwards.
        num_episodes: episodes of the rollout.
        num_demonstrations: training episodes.
    """
    rollout = [make_episode(1000 + seed, robot) for seed in range(num_episodes)]
    if change is not None:
        rollout = [change(episode) for episode in rollout]
    demonstrations = [
        replace(make_episode(seed), served=None) for seed in range(num_demonstrations)
    ]
    return Case(rollout, demonstrations)


def change_pictures(
    episode: RecordedEpisode, camera: str, transform: Callable[[Array], Array]
) -> RecordedEpisode:
    """Change the pictures [T, h, w, 3] uint8 of one camera by a function."""
    before = episode.pictures[camera]
    small = np.asarray(transform(before.small), np.uint8)
    fingerprint = np.arange(len(small))  # no two pictures are the very same
    changed = CameraPictures(small, fingerprint, before.size)
    return replace(episode, pictures={**episode.pictures, camera: changed})


def change_external(version: str) -> Callable[[RecordedEpisode], RecordedEpisode]:
    """Make a function that changes an episode's external pictures to a version."""
    transform = (SHAPE_VERSIONS | COLOR_VERSIONS)[version]
    return lambda episode: change_pictures(
        episode, "external", lambda small: transform(small.astype(np.float32))
    )


def exchange_cameras(episode: RecordedEpisode) -> RecordedEpisode:
    """Exchange the pictures of the two cameras."""
    external = episode.pictures["external"]
    wrist = episode.pictures["wrist"]
    return replace(episode, pictures={"external": wrist, "wrist": external})


@cache
def learn_pictures() -> PictureReferences:
    """What the pictures of 16 demonstrations say. It is computed once for all tests."""
    return PictureReferences(make_case(num_demonstrations=16).demonstrations)


def make_picture_case(change: Callable[[RecordedEpisode], RecordedEpisode] | None = None) -> Case:
    """Make a case: a rollout whose pictures have a fault, and demonstrations without one."""
    references = learn_pictures()
    rollout = make_case(change=change).rollout
    return Case(rollout, references.demonstrations, references=references)


def _make_chunks(rng: np.random.Generator) -> Array:
    """Make the answers [T, H, 8]: a smooth random walk of actions, and two grasps."""
    num_actions = NUM_STEPS + HORIZON
    white = rng.normal(0, 1, (num_actions + 4, 6))
    # The mean of four neighbors.
    smooth = np.stack([white[i : i + num_actions] for i in range(4)]).mean(0)
    translation = 0.03 * smooth[:, :3]  # m
    turns = torch.as_tensor(0.05 * smooth[:, 3:])  # rad
    rotation = quat_exp(turns).numpy()
    # The gripper is open and closed for ten steps each.
    phase = int(rng.integers(0, 10))
    gripper = ((np.arange(num_actions) + phase) // 10 % 2 == 0).astype(float)
    actions = np.concatenate([translation, rotation, gripper[:, None]], 1)
    return np.stack([actions[step : step + HORIZON] for step in range(NUM_STEPS)])


def _make_turn(vector: Sequence[float]) -> torch.Tensor:
    return quat_exp(torch.tensor(vector, dtype=torch.float64))


def _make_pictures(rng: np.random.Generator, position: Array) -> dict[str, CameraPictures]:
    """Make pictures of two cameras: a colored scene, objects, and noise.

    A camera sees the same scene in all episodes, and other objects in each. The external camera
    sees the arm as a bright spot.

    Args:
        rng: draws the objects and the noise.
        position: [T, 3] of the arm, base frame, m.
    """
    block = np.ones((4, 4, 1))  # px; scene and objects are patterns of 6 × 8 blocks of one color
    seed_of_scene = {"external": 7, "wrist": 8}
    pictures = {}
    for camera, seed in seed_of_scene.items():
        scene = np.kron(np.random.default_rng(seed).uniform(40, 200, (6, 8, 3)), block)
        objects = np.kron(rng.uniform(-30, 30, (6, 8, 3)), block)  # changes of the scene's colors
        frames = scene + objects + rng.normal(0, 5, (len(position), *PICTURE_SHAPE))
        if camera == "external":
            frames += _draw_arm(position)
        pictures[camera] = CameraPictures(
            np.clip(frames, 0, 255).astype(np.uint8), np.arange(len(position)), (320, 240)
        )
    return pictures


def _draw_arm(position: Array) -> Array:
    """Draw bright spots [T, h, w, 1] where the arm is."""
    height, width, _ = PICTURE_SHAPE
    rows, columns = np.mgrid[:height, :width]
    center_x = width / 2 + PIXELS_PER_METER * position[:, 1, None, None]
    center_y = height / 2 + PIXELS_PER_METER * (position[:, 0, None, None] - 0.4)
    squares = (columns - center_x) ** 2 + (rows - center_y) ** 2
    return 100 * np.exp(-squares / 8)[..., None]
