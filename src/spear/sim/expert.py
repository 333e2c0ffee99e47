"""The scripted expert: it sees the true state of the scene, and acts through the policy's own eight
numbers.

Its action depends on the present state only, so it recovers from whatever happens. Heights form a
funnel: the gripper hovers while it is off to the side or turned wrongly, and comes down as it
aligns.

Sums are written out: NumPy's matrix products differ in the last bit between kinds of processors.
"""

import math
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.inverse_kinematics import Floats, euclidean_norm
from spear.sim.control import FINGER_TRAVEL_M
from spear.sim.objects import ObjectKind
from spear.sim.scene import SOURCE_INDEX, TARGET_INDEX
from spear.sim.world import World, is_source_on_target

# Steps and turns.
MAX_TRANSLATION_M = 0.06  # of a step
MAX_ROTATION_RAD = math.radians(8)  # of a step; small, so that the turn goes on within view
MAX_YAW_RAD = math.radians(110)  # how far the gripper turns from straight ahead

# Heights.
HOVER_HEIGHT_M = 0.09  # over the grasp while the gripper is not aligned
CARRY_HEIGHT_M = 0.115  # of a carried object's underside over the table
RETREAT_HEIGHT_M = 0.12  # of the gripper over the target in the end
MAX_GRASP_DEPTH_M = 0.033  # how deep the fingers take a tall object, from its top
MIN_EE_HEIGHT_M = 0.012  # of the middle of the finger tips
RELEASE_HEIGHTS_M = {"basket": -0.025, "bowl": -0.015}  # over the target's rim
DEFAULT_RELEASE_HEIGHT_M = 0.004
HANGING_HEIGHT_M = 0.012  # so far over its release height a held object is not yet down

# When the gripper counts as aligned.
FUNNEL_M_PER_RAD = 0.10  # meters of funnel per radian of misalignment
ALIGNED_M = 0.008
ALIGNED_RAD = 0.09
PLACED_YAW_RAD = 0.12
PLACED_HEIGHT_M = 0.010

# Objects.
MAX_GRASP_HALF_WIDTH_M = 0.037  # wider things do not fit between the fingers
LONG_RADIUS_M = 0.042  # longer things than the gripper opens lie along the basket


@dataclass(frozen=True)
class _Gripper:
    """Where the gripper is: position [3] m, quaternion [4], base frame; yaw and tilt, rad."""

    position: Floats
    rotation: Floats
    yaw: float
    tilt: float


@dataclass(frozen=True)
class _Goal:
    """Where the gripper is to go: position [3] m, base frame; yaw, rad; and its opening."""

    position: Floats
    yaw: float
    opening: float


@dataclass(frozen=True)
class _Grasp:
    """Where to take an object: point [3] m; gripper yaws that fit, rad (None: any); its width,
    m."""

    point: Floats
    yaws: list[float] | None
    width: float


def act(world: World) -> NDArray[np.float32]:
    """Return the expert's action [8] in this state (the layout of `spear.types.Action`)."""
    position, rotation = world.servo.measure_pose()
    yaw, tilt = _measure_yaw_and_tilt(rotation)
    gripper = _Gripper(position, rotation, yaw, tilt)

    num_touching = world.count_touching_fingers(SOURCE_INDEX)
    is_held = num_touching == 2
    # A held object may only brush the target: then it is not yet down on it.
    is_hanging = is_held and _underside(world) > _release_height(world) + HANGING_HEIGHT_M
    if is_source_on_target(world) and not is_hanging:
        goal = _leave(world, gripper, is_held)
    elif is_held:
        goal = _carry(world, gripper)
    else:
        goal = _approach(world, gripper)
    return _step_towards(goal, gripper)


# --- What to do ---


def _approach(world: World, gripper: _Gripper) -> _Goal:
    """Hover, align, come down, close."""
    grasp = _find_grasp(world)
    yaw = _nearest_yaw(gripper.yaw, grasp.yaws)
    turn_rad = abs(_wrap(yaw - gripper.yaw))
    side_m = euclidean_norm(grasp.point[:2] - gripper.position[:2])
    error_m = side_m + FUNNEL_M_PER_RAD * (turn_rad + gripper.tilt)
    hover_m = np.clip(1.6 * (error_m - 0.012), 0, HOVER_HEIGHT_M)
    position = grasp.point + np.array([0, 0, hover_m])

    is_over_grasp = side_m < ALIGNED_M and abs(grasp.point[2] - gripper.position[2]) < ALIGNED_M
    is_aligned = is_over_grasp and turn_rad < ALIGNED_RAD and gripper.tilt < ALIGNED_RAD
    # Closed with nothing between the fingers: open and try again.
    is_missed = world.servo.measure_opening() * 2 * FINGER_TRAVEL_M < 0.7 * grasp.width
    opening = 0.0 if is_aligned and not is_missed else 1.0
    return _Goal(position, yaw, opening)


def _carry(world: World, gripper: _Gripper) -> _Goal:
    """Lift, move over the target, come down, open."""
    yaw = _placing_yaw(world, gripper.yaw)
    turn_rad = abs(_wrap(yaw - gripper.yaw))
    offset = world.object_position(TARGET_INDEX)[:2] - world.object_position(SOURCE_INDEX)[:2]
    side_m = euclidean_norm(offset)
    error_m = side_m + FUNNEL_M_PER_RAD * (turn_rad + gripper.tilt)

    underside = _underside(world)
    release_height = _release_height(world)
    funnel_m = float(np.clip(2.0 * (error_m - 0.010), 0, 1))
    height = min(max(CARRY_HEIGHT_M, release_height), release_height + funnel_m)
    position = gripper.position + np.array([offset[0], offset[1], height - underside])

    is_aligned = side_m < ALIGNED_M and turn_rad < PLACED_YAW_RAD
    is_ready = is_aligned and abs(underside - release_height) < PLACED_HEIGHT_M
    return _Goal(position, yaw, 1.0 if is_ready else 0.0)


def _leave(world: World, gripper: _Gripper, is_held: bool) -> _Goal:
    """Let go, then go up."""
    position = gripper.position.copy()
    if not is_held and world.servo.measure_opening() > 0.6:
        target_height = world.object_position(TARGET_INDEX)[2]
        position[2] = max(gripper.position[2], target_height + RETREAT_HEIGHT_M)
    return _Goal(position, gripper.yaw, 1.0)


def _step_towards(goal: _Goal, gripper: _Gripper) -> NDArray[np.float32]:
    """Return the action towards a goal with the gripper straight down; first up, then sideways."""
    step = goal.position - gripper.position
    rise_m = max(0.0, step[2] - 0.015)
    step[:2] *= max(0.0, 1.0 - rise_m / 0.04)
    step *= min(1.0, MAX_TRANSLATION_M / max(euclidean_norm(step), 1e-9))

    upright = np.array([math.cos(goal.yaw / 2), 0, 0, math.sin(goal.yaw / 2)])
    rotation_vector = np.empty(3)
    rotation_step = np.empty(4)
    mujoco.mju_subQuat(rotation_vector, upright, gripper.rotation)
    angle_rad = euclidean_norm(rotation_vector)
    axis = rotation_vector / max(angle_rad, 1e-9)
    mujoco.mju_axisAngle2Quat(rotation_step, axis, min(angle_rad, MAX_ROTATION_RAD))
    return np.concatenate([step, rotation_step, [goal.opening]]).astype(np.float32)


# --- What the scene looks like ---


def _release_height(world: World) -> float:
    """Height at which the carried object's underside should be when the gripper opens, m."""
    kind = world.bodies[TARGET_INDEX].kind
    rim_height = float(world.object_position(TARGET_INDEX)[2]) + kind.rim
    return rim_height + RELEASE_HEIGHTS_M.get(kind.name, DEFAULT_RELEASE_HEIGHT_M)


def _underside(world: World) -> float:
    """Height of the lowest point of the object to be moved, m."""
    body = world.bodies[SOURCE_INDEX]
    down = world.object_rotation(SOURCE_INDEX)[2]
    center = (body.low + body.high) / 2
    half = (body.high - body.low) / 2
    height = world.object_position(SOURCE_INDEX)[2]
    return float(height + (down * center).sum() - (np.abs(down) * half).sum())


def _placing_yaw(world: World, yaw: float) -> float:
    """Return the gripper's yaw for placing the object.

    Cubes go square on cubes, long things along the basket; otherwise the yaw does not matter.
    """
    period = _placing_period(world.bodies[SOURCE_INDEX].kind, world.bodies[TARGET_INDEX].kind)
    if period is None:
        return yaw
    target_yaw = _object_yaw(world, TARGET_INDEX)
    difference = _wrap(target_yaw - _object_yaw(world, SOURCE_INDEX), period)
    if abs(yaw + difference) <= MAX_YAW_RAD:
        return yaw + difference
    return yaw + difference - math.copysign(period, difference)


def _placing_period(source: ObjectKind, target: ObjectKind) -> float | None:
    """Return the turn after which the object fits on the target again, rad; None if any turn
    fits."""
    if source.name.endswith("cube") and target.name.endswith("cube"):
        return math.pi / 2
    is_long = not source.round and source.radius > LONG_RADIUS_M
    if is_long and target.name == "basket":
        return math.pi
    return None


def _object_yaw(world: World, index: int) -> float:
    matrix = world.object_rotation(index)
    return math.atan2(matrix[1, 0], matrix[0, 0])


def _find_grasp(world: World) -> _Grasp:
    """Return where to take the object to be moved."""
    kind = world.bodies[SOURCE_INDEX].kind
    axes = world.object_rotation(SOURCE_INDEX)
    assert kind.grasp is not None
    center = np.array(kind.grasp[0])
    half = np.array(kind.grasp[1])
    point = world.object_position(SOURCE_INDEX) + (axes * center).sum(1)
    top = point[2] + float((np.abs(axes[2]) * half).sum())
    point[2] = max(point[2], top - MAX_GRASP_DEPTH_M, MIN_EE_HEIGHT_M)
    if kind.round:
        axis = axes[:, 2]
        is_standing = abs(axis[2]) > 0.8
        yaws = None if is_standing else [math.atan2(axis[1], axis[0])]
        return _Grasp(point, yaws, 2 * float(half[0]))

    # Sides that are about vertical and fit between the fingers.
    sides = []
    for i in range(3):
        if abs(axes[2, i]) < 0.4 and half[i] < MAX_GRASP_HALF_WIDTH_M:
            sides.append(i)
    if not sides:
        return _Grasp(point, None, 2 * float(half.min()))
    # The closing direction is the gripper's y axis.
    yaws = [math.atan2(axes[1, i], axes[0, i]) - math.pi / 2 for i in sides]
    return _Grasp(point, yaws, 2 * float(half[sides].min()))


def _nearest_yaw(yaw: float, fitting_yaws: list[float] | None) -> float:
    """Return the fitting yaw nearest to the present one. The gripper is the same after half a
    turn."""
    if fitting_yaws is None:
        return float(np.clip(yaw, -MAX_YAW_RAD, MAX_YAW_RAD))
    choices = [yaw + _wrap(fitting_yaw - yaw, math.pi) for fitting_yaw in fitting_yaws]
    choices += [choice - math.copysign(math.pi, choice) for choice in choices]
    return min(choices, key=lambda choice: (abs(choice) > MAX_YAW_RAD, abs(choice - yaw)))


def _measure_yaw_and_tilt(rotation: Floats) -> tuple[float, float]:
    """Return the gripper's yaw, and its lean from straight down, rad."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, rotation)
    axes = matrix.reshape(3, 3)
    tilt = math.acos(float(np.clip(axes[2, 2], -1, 1)))
    return math.atan2(axes[1, 0], axes[0, 0]), tilt


def _wrap(angle: float, period: float = 2 * math.pi) -> float:
    return (angle + period / 2) % period - period / 2
