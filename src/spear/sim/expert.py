"""The scripted expert: looks at the true state, acts through the policy's own eight numbers.

Its action depends on the present state only, so it recovers from whatever happens. Heights form a funnel: the
gripper hovers while it is off to the side or turned wrongly and comes down as it aligns.

Sums are written out: NumPy's matrix products differ in the last bit between kinds of processors.
"""

import math

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.sim.control import FINGER_TRAVEL, length
from spear.sim.world import World, placed, roles

Floats = NDArray[np.float64]

MAX_TRANSLATION = 0.06
"""Longest step, m."""
MAX_ROTATION = math.radians(8)
"""Largest turn of a step, rad: small, so that the turn goes on while the wrist camera sees the object."""
HOVER = 0.09
"""Height over the grasp while the gripper is not aligned, m."""
CARRY = 0.115
"""Height of a carried object's underside over the table, m."""
RETREAT = 0.12
"""How far above the target the gripper goes in the end, m."""
MAX_YAW = math.radians(110)
"""How far the gripper turns from straight ahead, rad."""
REACH_DOWN = 0.033
"""How deep the fingers take a tall object, from its top, m."""
LOWEST = 0.012
"""Lowest height of the middle of the finger tips, m."""
_TURN_WEIGHT = 0.10
"""Metres of funnel per radian of misalignment."""


def act(world: World) -> NDArray[np.float32]:
    """[8] the expert's action in this state (layout of `spear.types.Action`)."""
    source, _ = roles(world)
    touching = world.fingers_touching(source)
    # a held object may only brush the target: it is not yet down on it
    hanging = touching == 2 and _underside(world, source) > _release_height(world) + 0.012
    if placed(world) and not hanging:
        return _leave(world, touching)
    if touching == 2:
        return _carry(world)
    return _approach(world)


def _approach(world: World) -> NDArray[np.float32]:
    """Hover, align, come down, close."""
    source, _ = roles(world)
    position, rotation = world.servo.pose()
    point, directions, width = _grasp(world, source)
    yaw, tilt = _yaw_tilt(rotation)
    goal_yaw = _nearest_yaw(yaw, directions)
    turn = abs(_wrap(goal_yaw - yaw))
    side = length(point[:2] - position[:2])
    error = side + _TURN_WEIGHT * (turn + tilt)
    goal = point + np.array([0, 0, np.clip(1.6 * (error - 0.012), 0, HOVER)])
    aligned = side < 0.008 and abs(point[2] - position[2]) < 0.008 and turn < 0.09 and tilt < 0.09
    opening = world.servo.opening()
    # closed with nothing between the fingers: open and try again
    missed = opening * 2 * FINGER_TRAVEL < 0.7 * width
    close = aligned and not missed
    return _action(position, rotation, goal, goal_yaw, 0.0 if close else 1.0)


def _carry(world: World) -> NDArray[np.float32]:
    """Lift, move over the target, come down, open."""
    source, target = roles(world)
    position, rotation = world.servo.pose()
    yaw, tilt = _yaw_tilt(rotation)
    goal_yaw = _placing_yaw(world, yaw)
    turn = abs(_wrap(goal_yaw - yaw))
    offset = world.position(target)[:2] - world.position(source)[:2]
    side = length(offset)
    error = side + _TURN_WEIGHT * (turn + tilt)
    underside = _underside(world, source)
    release = _release_height(world)
    height = min(max(CARRY, release), release + float(np.clip(2.0 * (error - 0.010), 0, 1)))
    goal = position + np.array([offset[0], offset[1], height - underside])
    ready = side < 0.008 and turn < 0.12 and abs(underside - release) < 0.010
    return _action(position, rotation, goal, goal_yaw, 1.0 if ready else 0.0)


def _leave(world: World, touching: int) -> NDArray[np.float32]:
    """Let go, then go up."""
    _, target = roles(world)
    position, rotation = world.servo.pose()
    yaw, _ = _yaw_tilt(rotation)
    goal = position.copy()
    if touching < 2 and world.servo.opening() > 0.6:
        goal[2] = max(position[2], world.position(target)[2] + RETREAT)
    return _action(position, rotation, goal, yaw, 1.0)


def _release_height(world: World) -> float:
    """Height at which the carried object's underside should be when the gripper opens, m."""
    _, target = roles(world)
    kind = world.bodies[target].kind
    top = float(world.position(target)[2]) + kind.rim
    return top + {"basket": -0.025, "bowl": -0.015}.get(kind.name, 0.004)


def _underside(world: World, index: int) -> float:
    body = world.bodies[index]
    down = world.matrix(index)[2]
    center, half = (body.low + body.high) / 2, (body.high - body.low) / 2
    return float(world.position(index)[2] + (down * center).sum() - (np.abs(down) * half).sum())


def _placing_yaw(world: World, yaw: float) -> float:
    """Cubes go square on cubes, long things along the basket; else the yaw does not matter."""
    source, target = roles(world)
    kind, onto = world.bodies[source].kind, world.bodies[target].kind
    if kind.name.endswith("cube") and onto.name.endswith("cube"):
        period = math.pi / 2
    elif kind.elongated and onto.name == "basket":
        period = math.pi
    else:
        return yaw
    off = _wrap(_heading(world, target) - _heading(world, source), period)
    return yaw + off if abs(yaw + off) <= MAX_YAW else yaw + off - math.copysign(period, off)


def _heading(world: World, index: int) -> float:
    x = world.matrix(index)[:, 0]
    return math.atan2(x[1], x[0])


def _grasp(world: World, index: int) -> tuple[Floats, list[float] | None, float]:
    """Where to take an object: point [3], gripper yaws that fit (None: any), and its width, m."""
    grasp = world.bodies[index].kind.grasp
    assert grasp is not None
    center, half = np.array(grasp[0]), np.array(grasp[1])
    frame = world.matrix(index)
    point = world.position(index) + (frame * center).sum(1)
    top = point[2] + float((np.abs(frame[2]) * half).sum())
    point[2] = max(point[2], top - REACH_DOWN, LOWEST)
    if world.bodies[index].kind.round:
        axis = frame[:, 2]
        if abs(axis[2]) > 0.8:
            return point, None, 2 * float(half[0])
        return point, [math.atan2(axis[1], axis[0])], 2 * float(half[0])
    fits = [i for i in range(3) if abs(frame[2, i]) < 0.4 and half[i] < 0.037]
    if not fits:
        return point, None, 2 * float(half.min())
    # the closing direction is the gripper's y axis
    yaws = [math.atan2(frame[1, i], frame[0, i]) - math.pi / 2 for i in fits]
    return point, yaws, 2 * float(half[fits].min())


def _nearest_yaw(yaw: float, directions: list[float] | None) -> float:
    """The fitting yaw nearest to the present one; the gripper is the same turned by half a turn."""
    if directions is None:
        return float(np.clip(yaw, -MAX_YAW, MAX_YAW))
    choices = [yaw + _wrap(direction - yaw, math.pi) for direction in directions]
    choices += [choice - math.copysign(math.pi, choice) for choice in choices]
    return min(choices, key=lambda choice: (abs(choice) > MAX_YAW, abs(choice - yaw)))


def _action(
    position: Floats, rotation: Floats, goal: Floats, goal_yaw: float, opening: float
) -> NDArray[np.float32]:
    """The step towards `goal` [3] with the gripper straight down at `goal_yaw`; first up, then sideways."""
    step = goal - position
    low = max(0.0, step[2] - 0.015)
    step[:2] *= max(0.0, 1.0 - low / 0.04)
    step *= min(1.0, MAX_TRANSLATION / max(length(step), 1e-9))
    upright = np.array([math.cos(goal_yaw / 2), 0, 0, math.sin(goal_yaw / 2)])
    back, relative, vector, delta = np.empty(4), np.empty(4), np.empty(3), np.empty(4)
    mujoco.mju_negQuat(back, rotation)
    mujoco.mju_mulQuat(relative, back, upright)
    mujoco.mju_quat2Vel(vector, relative, 1.0)
    angle = length(vector)
    mujoco.mju_axisAngle2Quat(delta, vector / max(angle, 1e-9), min(angle, MAX_ROTATION))
    if delta[0] < 0:
        delta = -delta
    return np.concatenate([step, delta, [opening]]).astype(np.float32)


def _yaw_tilt(rotation: Floats) -> tuple[float, float]:
    """Yaw of the gripper and its lean from straight down, rad."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, rotation)
    frame = matrix.reshape(3, 3)
    return math.atan2(frame[1, 0], frame[0, 0]), math.acos(float(np.clip(frame[2, 2], -1, 1)))


def _wrap(angle: float, period: float = 2 * math.pi) -> float:
    return (angle + period / 2) % period - period / 2
