"""The scripted expert: looks at the true state, acts through the policy's own eight numbers.

Its action depends on the present state only, so it recovers from whatever happens. Heights form a funnel: the
gripper hovers while it is off to the side or turned wrongly and comes down as it aligns.

Sums are written out: NumPy's matrix products differ in the last bit between kinds of processors.
"""

import math

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.inverse_kinematics import Floats, euclidean_norm
from spear.sim.control import FINGER_TRAVEL
from spear.sim.scene import SOURCE_INDEX, TARGET_INDEX
from spear.sim.world import World, is_source_on_target

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

Aim = tuple[Floats, float, float]
"""Where the gripper is to go (m, base frame), its yaw there (rad), and its opening."""


def act(world: World) -> NDArray[np.float32]:
    """[8] the expert's action in this state (layout of `spear.types.Action`)."""
    position, rotation = world.servo.pose()
    yaw, tilt = _yaw_tilt(rotation)
    touching = world.fingers_touching(SOURCE_INDEX)
    # a held object may only brush the target: it is not yet down on it
    hanging = touching == 2 and _underside(world) > _release_height(world) + 0.012
    if is_source_on_target(world) and not hanging:
        aim = _leave(world, position, yaw, touching)
    elif touching == 2:
        aim = _carry(world, position, yaw, tilt)
    else:
        aim = _approach(world, position, yaw, tilt)
    return _action(position, rotation, *aim)


def _approach(world: World, position: Floats, yaw: float, tilt: float) -> Aim:
    """Hover, align, come down, close."""
    point, directions, width = _grasp(world)
    goal_yaw = _nearest_yaw(yaw, directions)
    turn = abs(_wrap(goal_yaw - yaw))
    side = euclidean_norm(point[:2] - position[:2])
    error = side + _TURN_WEIGHT * (turn + tilt)
    goal = point + np.array([0, 0, np.clip(1.6 * (error - 0.012), 0, HOVER)])
    aligned = side < 0.008 and abs(point[2] - position[2]) < 0.008 and turn < 0.09 and tilt < 0.09
    # closed with nothing between the fingers: open and try again
    missed = world.servo.opening() * 2 * FINGER_TRAVEL < 0.7 * width
    return goal, goal_yaw, 0.0 if aligned and not missed else 1.0


def _carry(world: World, position: Floats, yaw: float, tilt: float) -> Aim:
    """Lift, move over the target, come down, open."""
    goal_yaw = _placing_yaw(world, yaw)
    turn = abs(_wrap(goal_yaw - yaw))
    offset = world.position(TARGET_INDEX)[:2] - world.position(SOURCE_INDEX)[:2]
    side = euclidean_norm(offset)
    error = side + _TURN_WEIGHT * (turn + tilt)
    underside, release = _underside(world), _release_height(world)
    height = min(max(CARRY, release), release + float(np.clip(2.0 * (error - 0.010), 0, 1)))
    goal = position + np.array([offset[0], offset[1], height - underside])
    ready = side < 0.008 and turn < 0.12 and abs(underside - release) < 0.010
    return goal, goal_yaw, 1.0 if ready else 0.0


def _leave(world: World, position: Floats, yaw: float, touching: int) -> Aim:
    """Let go, then go up."""
    goal = position.copy()
    if touching < 2 and world.servo.opening() > 0.6:
        goal[2] = max(position[2], world.position(TARGET_INDEX)[2] + RETREAT)
    return goal, yaw, 1.0


def _release_height(world: World) -> float:
    """Height at which the carried object's underside should be when the gripper opens, m."""
    kind = world.bodies[TARGET_INDEX].kind
    top = float(world.position(TARGET_INDEX)[2]) + kind.rim
    return top + {"basket": -0.025, "bowl": -0.015}.get(kind.name, 0.004)


def _underside(world: World) -> float:
    """Height of the lowest point of the object to be moved, m."""
    body, down = world.bodies[SOURCE_INDEX], world.matrix(SOURCE_INDEX)[2]
    center, half = (body.low + body.high) / 2, (body.high - body.low) / 2
    return float(
        world.position(SOURCE_INDEX)[2] + (down * center).sum() - (np.abs(down) * half).sum()
    )


def _placing_yaw(world: World, yaw: float) -> float:
    """Cubes go square on cubes, long things along the basket; else the yaw does not matter."""
    kind, onto = world.bodies[SOURCE_INDEX].kind, world.bodies[TARGET_INDEX].kind
    if kind.name.endswith("cube") and onto.name.endswith("cube"):
        period = math.pi / 2
    elif (
        not kind.round and kind.radius > 0.042 and onto.name == "basket"
    ):  # longer than the gripper opens
        period = math.pi
    else:
        return yaw
    wanted, has = (
        math.atan2(m[1, 0], m[0, 0]) for m in map(world.matrix, (TARGET_INDEX, SOURCE_INDEX))
    )
    off = _wrap(wanted - has, period)
    return yaw + off if abs(yaw + off) <= MAX_YAW else yaw + off - math.copysign(period, off)


def _grasp(world: World) -> tuple[Floats, list[float] | None, float]:
    """Where to take the object: point [3], gripper yaws that fit (None: any), and its width, m."""
    kind, frame = world.bodies[SOURCE_INDEX].kind, world.matrix(SOURCE_INDEX)
    assert kind.grasp is not None
    center, half = map(np.array, kind.grasp)
    point = world.position(SOURCE_INDEX) + (frame * center).sum(1)
    top = point[2] + float((np.abs(frame[2]) * half).sum())
    point[2] = max(point[2], top - REACH_DOWN, LOWEST)
    if kind.round:
        axis = frame[:, 2]
        yaws = None if abs(axis[2]) > 0.8 else [math.atan2(axis[1], axis[0])]
        return point, yaws, 2 * float(half[0])
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
    step *= min(1.0, MAX_TRANSLATION / max(euclidean_norm(step), 1e-9))
    upright = np.array([math.cos(goal_yaw / 2), 0, 0, math.sin(goal_yaw / 2)])
    vector, delta = np.empty(3), np.empty(4)
    mujoco.mju_subQuat(vector, upright, rotation)
    angle = euclidean_norm(vector)
    mujoco.mju_axisAngle2Quat(delta, vector / max(angle, 1e-9), min(angle, MAX_ROTATION))
    return np.concatenate([step, delta, [opening]]).astype(np.float32)


def _yaw_tilt(rotation: Floats) -> tuple[float, float]:
    """Yaw of the gripper and its lean from straight down, rad."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, rotation)
    frame = matrix.reshape(3, 3)
    return math.atan2(frame[1, 0], frame[0, 0]), math.acos(float(np.clip(frame[2, 2], -1, 1)))


def _wrap(angle: float, period: float = 2 * math.pi) -> float:
    return (angle + period / 2) % period - period / 2
