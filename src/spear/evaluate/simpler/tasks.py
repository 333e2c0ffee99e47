"""The four tasks, and what is known of a moment in one of them."""

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
CAMERA_SIZE = 640, 480
"""Width and height of its pictures."""
FINGER_CLOSED_M, FINGER_OPEN_M = 0.015, 0.037
"""The fingers' joints, m."""


@dataclass(frozen=True)
class Task:
    """One task of ManiSkill.

    starts  how many different scenes it knows: a small grid of places and orientations.
    steps   control steps after which an episode ends.
    turns, along, drop  how the scripted reference takes the object: in so many equally good directions of a
            full turn (4 for a cube, 2 for a long object, along its x axis), at a place along its x axis (m
            from its origin); and how high above its place it lets go of it (m).
    around, apart  starts off the grid: objects lie up to so far, along x and y, from the middle of the grid,
            beyond its corners, and so far from each other (m; our choice).
    """

    starts: int
    steps: int
    turns: int
    along: float = 0.0
    drop: float = 0.004
    around: tuple[float, float] = (0.1, 0.1)
    apart: float = 0.12


TASKS: dict[str, Task] = {
    "PutCarrotOnPlateInScene-v1": Task(24, 60, 2),
    "PutEggplantInBasketScene-v1": Task(64, 120, 2, -0.005, 0.03, (0.02, 0.03), 0.0),
    "PutSpoonOnTableClothInScene-v1": Task(24, 60, 2, 0.03),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": Task(
        24, 60, 4, 0.0, 0.002, (0.12, 0.12), 0.065
    ),
}
"""ManiSkill's names, in the order of the paper's table."""

MARGIN = 0.01, math.radians(10)
"""A start of which both objects are less than this (m), and the object to move less than this (rad), off one
of the official starts is taken for it."""


@dataclass(frozen=True)
class Start:
    """How a scene begins: places [2, 3] (m) and quaternions [2, 4] (w x y z) of the object to move and of the
    goal, in the world, before they settle; joints [6] (rad), added to the arm's posture."""

    places: Array
    turns: Array
    joints: Array


def sample_off_grid_start(task: Task, seed: int, places: Array, turns: Array) -> Start:
    """A start that is none of the official ones, which combine `places` [n, 2, 3] with `turns` [m, 2, 4].

    Objects that the official starts move are placed anew, uniformly within `task.around` of their middle; the
    object to move is turned from one of its official orientations by up to 45° about the vertical.
    """
    rng = np.random.default_rng([seed, 2])
    moves = np.ptp(places[..., :2], axis=0).any(axis=-1)  # [2]
    middle = (places[..., :2].min(axis=0) + places[..., :2].max(axis=0)) / 2
    for _ in range(10_000):
        place, turn = places[0].copy(), turns[rng.integers(len(turns))].copy()
        spread = rng.uniform(-1, 1, place[:, :2].shape) * task.around
        place[:, :2] = np.where(moves[:, None], middle + spread, place[:, :2])
        angle = rng.uniform(-math.pi / 4, math.pi / 4)
        about = torch.tensor(
            [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)], dtype=torch.float64
        )
        turn[0] = quat_multiply(about, torch.from_numpy(turn[0])).numpy()
        start = Start(place, turn, rng.normal(0, 0.05, 6))
        if pdist(place[:, :2]).min() >= task.apart and not is_official(start, places, turns):
            return start
    where = (
        f"SIMPLER: no start off the grid {task.around} m around its middle, {task.apart} m apart"
    )
    raise SpearError(f"{where}: give its Task more `around`, or less `apart`")


def is_official(start: Start, places: Array, turns: Array) -> bool:
    """Whether a start is within `MARGIN` of one of the official ones (see `off_grid`)."""
    near = (np.linalg.norm(places - start.places, axis=-1) < MARGIN[0]).all(axis=-1)  # [n]
    cosine = np.abs(turns[:, 0] @ start.turns[0]) / np.linalg.norm(turns[:, 0], axis=-1)
    return bool(near.any() and (2 * np.arccos(np.clip(cosine, 0, 1)) < MARGIN[1]).any())


@dataclass(frozen=True)
class Truth:
    """What only the simulator knows. Poses are [7]: position (m) and quaternion (w x y z), in the robot's
    base frame.

    commanded  pose of the end-effector that the controller is told to reach (our end-effector frame).
    measured   pose of the end-effector.
    opening    of the gripper, 0 … 1, as it is; `open` as it was commanded.
    still      whether the arm and the fingers hardly moved in the last step.
    closing    whether the fingers closed further in the last step.
    source     pose of the object to move; source_size [3] the sides of its box (m), along its own axes.
    goal       pose of the object, or place, to put it on; goal_size [3].
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

    observation  that of `spear.embodiments.simpler_widowx`, without its image where none was asked for.
    success      ManiSkill's own verdict on this moment.
    reached      the end-effector has been within 4 cm of the object to move (our choice).
    grasped      both fingers have pressed on it.
    wrong_object_moved  another object has moved by more than 3 cm, and by more than the one to move (the
                        condition that ManiSkill describes for its flag of this name, which is always False in
                        3.0.1).
    unreachable  control steps so far for whose target the controller found no joint angles; the arm then
                 stands still, and the next command begins at the last pose that could be reached.
    steps        control steps so far.
    pictures     of each step since the last moment, where they were asked for: [480, 640, 3] uint8.
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
