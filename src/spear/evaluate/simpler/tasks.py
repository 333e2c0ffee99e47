"""The four tasks, and what is known of a moment in one of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spear.types import Array

RATE_HZ = 5.0
"""Control steps per second."""


@dataclass(frozen=True)
class Task:
    """One task of ManiSkill.

    starts  how many different scenes it knows: a small grid of places and orientations.
    steps   control steps after which an episode ends.
    turns, along, drop  how the scripted reference takes the object: in so many equally good directions of a
            full turn (4 for a cube, 2 for a long object, along its x axis), at a place along its x axis (m
            from its origin); and how high above its place it lets go of it (m).
    """

    starts: int
    steps: int
    turns: int
    along: float = 0.0
    drop: float = 0.004


TASKS: dict[str, Task] = {
    "PutCarrotOnPlateInScene-v1": Task(24, 60, 2),
    "PutEggplantInBasketScene-v1": Task(64, 120, 2, -0.005, 0.03),
    "PutSpoonOnTableClothInScene-v1": Task(24, 60, 2, 0.03),
    "StackGreenCubeOnYellowCubeBakedTexInScene-v1": Task(24, 60, 4, 0.0, 0.002),
}
"""ManiSkill's names, in the order of the paper's table."""


@dataclass(frozen=True)
class Truth:
    """What only the simulator knows. Poses are [7]: position (m) and quaternion (w x y z), in the robot's
    base frame.

    commanded  pose of the end-effector that the controller is told to reach (our end-effector frame).
    measured   pose of the end-effector.
    opening    of the gripper, 0 … 1, as it is; `open` as it was commanded.
    still      whether the arm and the fingers hardly moved in the last step.
    source     pose of the object to move; source_size [3] the sides of its box (m), along its own axes.
    goal       pose of the object, or place, to put it on; goal_size [3].
    """

    commanded: Array
    measured: Array
    opening: float
    open: bool
    still: bool
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
