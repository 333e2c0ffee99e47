"""SIMPLER's four tasks, their starts, and the state of a running scene.

A *start* is how the objects of a scene lie at first. The benchmark has official starts, a small
grid of positions and orientations. A start *off the grid* differs from all of them.
"""

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

CAMERA = "3rd_view_camera"  # ManiSkill's name
CAMERA_SIZE = (640, 480)  # width and height of the camera's images, px
FINGER_CLOSED_M = 0.015  # position of each finger's joint when the gripper is closed
FINGER_OPEN_M = 0.037  # position of each finger's joint when the gripper is open

# A start off the grid differs from every official start: an object lies at least this far from its
# official position, or the object to move is turned by at least this angle.
MIN_START_OFFSET_M = 0.01
MIN_START_TURN_RAD = math.radians(10)
MAX_START_TURN_RAD = math.pi / 4  # largest rotation from an official orientation
START_JOINT_STD_RAD = 0.05  # standard deviation of the arm's joints in a start off the grid
MAX_START_TRIES = 10_000  # random starts that are tried, before there is an error


@dataclass(frozen=True)
class Task:
    """One task of ManiSkill.

    num_starts            number of official starts.
    max_steps             control steps after which an episode ends.
    num_grasp_directions  for the oracle: in how many equally good directions of a full turn the
                          gripper can grasp the object. A cube has 4. A long object has 2, which are
                          along its x axis.
    grasp_offset_m        for the oracle: where along the object's x axis the gripper grasps,
                          measured from the object's origin.
    release_height_m      for the oracle: the height above its place at which the gripper releases
                          the object.
    max_offset_m          for starts off the grid: largest distance along x and along y of an object
                          from the middle of the grid; this reaches beyond the grid's corners (our
                          choice).
    min_distance_m        for starts off the grid: smallest distance between the two objects (our
                          choice).
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
"""ManiSkill's name → task, in the order of the paper's table."""


@dataclass(frozen=True)
class Start:
    """How a scene begins.

    positions     [2, 3] where the object to move and the goal are placed, in the world, m. They
                  then settle under gravity, so the episode begins with slightly different
                  positions.
    orientations  [2, 4] of these two (w x y z).
    joints        [6] angles that are added to the arm's joints, rad.
    """

    positions: Array
    orientations: Array
    joints: Array


def sample_off_grid_start(
    task: Task, seed: int, official_positions: Array, official_orientations: Array
) -> Start:
    """Sample a start off the grid.

    Objects whose position differs between official starts are placed uniformly within
    `task.max_offset_m` of the middle of these positions. The object to move is turned about the
    vertical by up to 45° from one of its official orientations. The angles of the arm's joints get
    Gaussian noise with a standard deviation of `START_JOINT_STD_RAD`.

    Args:
        task: The task.
        seed: The seed of the start.
        official_positions: [n, 2, 3] positions of the object to move and of the goal, m. There is
            an official start for each pair of an entry here and an entry of
            `official_orientations`.
        official_orientations: [m, 2, 4] orientations of the two (w x y z).

    Raises:
        SpearError: No start was found.
    """
    # The number 2 keeps these random numbers apart from others that are drawn with the same seed:
    # 1 is for disturbances of the arm (`record`), 3 for scenes to label (`frames`).
    rng = np.random.default_rng([seed, 2])
    official_xy = official_positions[..., :2]  # [n, 2, 2]
    varies = np.ptp(official_xy, axis=0).any(axis=-1)  # [2], for each object
    middle = (official_xy.min(axis=0) + official_xy.max(axis=0)) / 2  # [2, 2]
    for _ in range(MAX_START_TRIES):
        position = official_positions[0].copy()  # [2, 3]
        orientation_index = rng.integers(len(official_orientations))
        orientation = official_orientations[orientation_index].copy()  # [2, 4]
        offset = rng.uniform(-1, 1, position[:, :2].shape) * task.max_offset_m  # [2, 2]
        position[:, :2] = np.where(varies[:, None], middle + offset, position[:, :2])
        angle = rng.uniform(-MAX_START_TURN_RAD, MAX_START_TURN_RAD)
        about_vertical = torch.tensor(
            [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)], dtype=torch.float64
        )
        orientation[0] = quat_multiply(about_vertical, torch.from_numpy(orientation[0])).numpy()
        start = Start(position, orientation, rng.normal(0, START_JOINT_STD_RAD, 6))
        distance_m = pdist(position[:, :2]).min()  # between the two objects
        has_room = distance_m >= task.min_distance_m
        if has_room and not is_near_official_start(
            start, official_positions, official_orientations
        ):
            return start
    raise SpearError(
        f"SIMPLER finds no start within {task.max_offset_m} m of the middle of its grid and "
        f"{task.min_distance_m} m from others. Give the Task more `max_offset_m`, or less "
        "`min_distance_m`."
    )


def is_near_official_start(
    start: Start, official_positions: Array, official_orientations: Array
) -> bool:
    """Return whether a start is so near to an official one that it counts as official.

    It does if both objects are less than `MIN_START_OFFSET_M` from their positions in an official
    start, and the object to move is turned by less than `MIN_START_TURN_RAD` from an official
    orientation.

    Args:
        start: The start.
        official_positions: [n, 2, 3] official positions, see `sample_off_grid_start`.
        official_orientations: [m, 2, 4] official orientations.
    """
    distances = np.linalg.norm(official_positions - start.positions, axis=-1)  # [n, 2]
    is_near = (distances < MIN_START_OFFSET_M).all(axis=-1)  # [n]
    # Angles between the start's and the official orientations of the object to move, from scalar
    # products of quaternions; the official ones need not have length 1.
    official = official_orientations[:, 0]  # [m, 4]
    cosine = np.abs(official @ start.orientations[0]) / np.linalg.norm(official, axis=-1)  # [m]
    angles = 2 * np.arccos(np.clip(cosine, 0, 1))
    # Every pair of official positions and orientations is an official start, so it does not matter
    # which positions are near and which orientation is.
    return bool(is_near.any() and (angles < MIN_START_TURN_RAD).any())


@dataclass(frozen=True)
class Truth:
    """The true state of a scene, which only the simulator knows.

    Poses are [7]: position (m) and quaternion (w x y z), in the robot's base frame.

    commanded          pose of the end effector that the controller has to reach.
    measured           pose of the end effector.
    opening            measured gripper opening, 0 to 1.
    is_commanded_open  whether the gripper was commanded to be open.
    is_still           whether the arm and the fingers hardly moved in the last step.
    is_closing         whether the fingers closed further in the last step.
    source             pose of the object to move.
    source_size        [3] sides of the source's bounding box along its own axes, m.
    goal               pose of the object, or place, on which the source has to be put.
    goal_size          [3] sides of the goal's bounding box along its own axes, m.
    """

    commanded: Array
    measured: Array
    opening: float
    is_commanded_open: bool
    is_still: bool
    is_closing: bool
    source: Array
    source_size: Array
    goal: Array
    goal_size: Array


@dataclass(frozen=True)
class Moment:
    """The state of a scene between two control steps.

    observation         the observation of `spear.embodiments.simpler_widowx`. It has an image only
                        if one was requested.
    truth               the true state.
    success             whether the task is fulfilled at this moment, as ManiSkill judges it.
    reached             whether the end effector has been within 4 cm of the object to move at some
                        time (our choice).
    grasped             whether both fingers have pressed on this object at some time.
    wrong_object_moved  whether another object has moved by more than 3 cm, and by more than the
                        object to move. (ManiSkill describes this condition for its flag of this
                        name, which is always False in version 3.0.1.)
    unreachable         number of control steps so far for whose target the controller found no
                        joint angles. In such a step the arm stands still, and the next command
                        begins at the last pose that could be reached.
    steps               number of control steps so far.
    pictures            [480, 640, 3] uint8 image after each step since the last moment, if these
                        were requested.
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
