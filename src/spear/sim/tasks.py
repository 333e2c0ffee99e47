"""When a task is done, and how far it got: judged from the state of the world alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spear.sim.control import length
from spear.sim.world import World

SLOW = 0.02
"""An object rests when it is slower than this, m/s."""
NEAR = 0.045
"""The gripper has reached an object when the middle of its finger tips is this close to it, m."""
LIFTED = 0.02
"""An object held by both fingers is grasped when it is this much higher than at the start, m."""
MOVED = 0.02
"""A bystander counts as moved from this displacement on, m."""


@dataclass(frozen=True)
class Status:
    """The milestones of a task in one state of the world.

    reached             the gripper is at the object to be moved.
    grasped             it is between both fingers and lifted.
    success             it rests, released, on (in) the target.
    wrong_object_moved  an object that is neither source nor target has been displaced.
    """

    reached: bool
    grasped: bool
    success: bool
    wrong_object_moved: bool


def status(world: World) -> Status:
    """The milestones now; the scene must have a task."""
    source, target = roles(world)
    touching = world.fingers_touching(source)
    position = world.position(source)
    ee, _ = world.servo.pose()
    displaced = np.array([world.position(i) for i in range(len(world.bodies))]) - world.start
    bystander = [i for i in range(len(world.bodies)) if i not in (source, target)]
    return Status(
        reached=length(ee - position) < NEAR,
        grasped=bool(touching == 2 and displaced[source, 2] > LIFTED),
        success=touching == 0 and world.speed(source) < SLOW and placed(world),
        wrong_object_moved=bool((np.linalg.norm(displaced[bystander], axis=1) > MOVED).any()),
    )


def placed(world: World) -> bool:
    """Whether the object to be moved lies on or in the target, held or not."""
    source, target = roles(world)
    kind = world.bodies[target].kind
    assert kind.inside is not None
    frame = world.matrix(target)
    if frame[2, 2] < 0.95 or not world.touching(source, target):
        return False
    local = (frame.T * (world.position(source) - world.position(target))).sum(1)
    half_x, half_y, floor = kind.inside
    x, y = local[0] / half_x, local[1] / half_y
    within = x * x + y * y < 1 if kind.inside_round else max(abs(x), abs(y)) < 1
    return bool(within and local[2] > floor)


def roles(world: World) -> tuple[int, int]:
    """Indices of the object to be moved and of where it goes."""
    source, target = world.spec.source, world.spec.target
    assert source is not None and target is not None, "a scene without a task"
    return source, target
