"""SIMPLER's four tasks, and what is known of a moment in one of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import pdist

from spear.errors import SpearError
from spear.geometry import quat_multiply
from spear.types import Array

CAMERA = "3rd_view_camera"
CAMERA_SIZE = (640, 480)  # width and height of its images, px
FINGER_CLOSED_M = 0.015  # position of the fingers' joints
FINGER_OPEN_M = 0.037

MIN_START_OFFSET_M = 0.01  # a start off the grid differs from the official ones by this much …
MIN_START_TURN_RAD = math.radians(10)  # … or the object to move is turned by this much
MAX_START_TURN_RAD = math.pi / 4
START_JOINT_STD_RAD = 0.05  # standard deviation of the arm's posture in a start off the grid
MAX_START_TRIES = 10_000


@dataclass(frozen=True)
class Task:
    """One task of ManiSkill.

    num_starts            how many different scenes it has: a small grid of positions and
                          orientations.
    max_steps             control steps after which an episode ends.
    num_grasp_directions  the scripted expert takes the object in any of so many equally good
                          directions of a full turn: 4 for a cube, 2 for a long object, along its x
                          axis.
    grasp_offset_m        where along the object's x axis it takes it, from the object's origin.
    release_height_m      how high above its place it lets go of the object.
    max_offset_m          starts off the grid: objects lie up to so far, along x and y, from the
                          middle of the grid, beyond its corners (our choice).
    min_distance_m        and so far from each other (our choice).
    """

    num_starts: int
    max_steps: int
    num_grasp_directions: int
    grasp_offset_m: float = 0.0
    release_height_m: float = 0.004
    max_offset_m: tuple[float, float] = (0.1, 0.1)
    min_distance_m: float = 0.12


TASKS: dict[str, Task] = {
    "PutCarrotOnPlateInScene-v1": Task(num_starts=24, max_steps=60, num_grasp_directions=2),
    "PutEggplantInBasketScene-v1": Task(
        num_starts=64,
        max_steps=120,
        num_grasp_directions=2,
        grasp_offset_m=-0.005,
        release_height_m=0.03,
        max_offset_m=(0.02, 0.03),
        min_distance_m=0.0,
    ),
    "PutSpoonOnTableClothInScene-v1": Task(
        num_starts=24, max_steps=60, num_grasp_directions=2, grasp_offset_m=0.03
    ),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": Task(
        num_starts=24,
        max_steps=60,
        num_grasp_directions=4,
        release_height_m=0.002,
        max_offset_m=(0.12, 0.12),
        min_distance_m=0.065,
    ),
}
"""ManiSkill's names, in the order of the paper's table."""


@dataclass(frozen=True)
class Start:
    """How a scene begins.

    positions  [2, 3] (m): where the object to move and the goal are placed, in the world. They
               then settle under gravity, so the episode begins with slightly different positions.
    turns   [2, 4] (w x y z): their orientations.
    joints  [6] (rad), added to the arm's posture.
    """

    positions: Array
    turns: Array
    joints: Array


def sample_off_grid_start(task: Task, seed: int, positions: Array, turns: Array) -> Start:
    """Sample a start that is none of the official ones.

    Objects that the official starts move are placed uniformly within `task.max_offset_m` of their
    middle. The object to move is turned from one of its official orientations by up to 45° about
    the vertical. The angles of the arm's joints get Gaussian noise of `START_JOINT_STD_RAD`.

    Args:
        task: The task.
        seed: The seed of the start.
        positions: [n, 2, 3] (m); the official starts combine them with all `turns`.
        turns: [m, 2, 4] (w x y z).

    Raises:
        SpearError: No start was found.
    """
    # The number 2 keeps these random numbers apart from others that are drawn with the same seed:
    # 1 is for disturbances of the arm (`record`), 3 for scenes to label (`frames`).
    rng = np.random.default_rng([seed, 2])
    is_moved = np.ptp(positions[..., :2], axis=0).any(axis=-1)  # [2]
    middle = (positions[..., :2].min(axis=0) + positions[..., :2].max(axis=0)) / 2
    for _ in range(MAX_START_TRIES):
        position = positions[0].copy()
        turn = turns[rng.integers(len(turns))].copy()
        offset = rng.uniform(-1, 1, position[:, :2].shape) * task.max_offset_m
        position[:, :2] = np.where(is_moved[:, None], middle + offset, position[:, :2])
        angle = rng.uniform(-MAX_START_TURN_RAD, MAX_START_TURN_RAD)
        about_vertical = torch.tensor(
            [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)], dtype=torch.float64
        )
        turn[0] = quat_multiply(about_vertical, torch.from_numpy(turn[0])).numpy()
        start = Start(position, turn, rng.normal(0, START_JOINT_STD_RAD, 6))
        has_room = pdist(position[:, :2]).min() >= task.min_distance_m
        if has_room and not is_official(start, positions, turns):
            return start
    raise SpearError(
        f"SIMPLER: no start off the grid {task.max_offset_m} m around its middle, "
        f"{task.min_distance_m} m apart: "
        "give its Task more `max_offset_m`, or less `min_distance_m`"
    )


def is_official(start: Start, positions: Array, turns: Array) -> bool:
    """Whether a start counts as one of the official ones.

    Both objects are less than `MIN_START_OFFSET_M` off one of them, and the object to move is
    turned by less than `MIN_START_TURN_RAD`. Arguments as in `sample_off_grid_start`.
    """
    distances = np.linalg.norm(positions - start.positions, axis=-1)  # [n, 2]
    is_near = (distances < MIN_START_OFFSET_M).all(axis=-1)  # [n]
    cosine = np.abs(turns[:, 0] @ start.turns[0]) / np.linalg.norm(turns[:, 0], axis=-1)
    angles = 2 * np.arccos(np.clip(cosine, 0, 1))
    return bool(is_near.any() and (angles < MIN_START_TURN_RAD).any())


@dataclass(frozen=True)
class Truth:
    """What only the simulator knows.

    Poses are [7]: position (m) and quaternion (w x y z), in the robot's base frame.

    commanded    pose of the end-effector that the controller is told to reach.
    measured     pose of the end-effector.
    opening      of the gripper, 0 to 1, as measured.
    open         whether the gripper was commanded to be open.
    still        whether the arm and the fingers hardly moved in the last step.
    closing      whether the fingers closed further in the last step.
    source       pose of the object to move.
    source_size  [3] the sides of its box (m), along its own axes.
    goal         pose of the object, or place, to put it on.
    goal_size    [3] as source_size.
    """

    commanded: Array
    measured: Array
    opening: float
    open: bool
    still: bool
    closing: bool
    source: Array
    source_size: Array
    goal: Array
    goal_size: Array


@dataclass(frozen=True)
class Moment:
    """A scene between two control steps.

    observation         that of `spear.embodiments.simpler_widowx`; without its image unless one was
                        asked for.
    success             ManiSkill's own verdict on this moment.
    reached             the end-effector has been within 4 cm of the object to move (our choice).
    grasped             both fingers have pressed on it.
    wrong_object_moved  another object has moved by more than 3 cm, and by more than the one to
                        move. (ManiSkill describes this condition for its flag of this name, which
                        is always False in 3.0.1.)
    unreachable         control steps so far for whose target the controller found no joint angles;
                        the arm then stands still, and the next command begins at the last pose that
                        could be reached.
    steps               control steps so far.
    pictures            of each step since the last moment, if they were asked for: [480, 640, 3]
                        uint8.
    """

    observation: Mapping[str, Any]
    truth: Truth
    success: bool
    reached: bool
    grasped: bool
    wrong_object_moved: bool
    unreachable: int
    steps: int
    pictures: list[Array] = field(default_factory=list)
