"""The scripted expert: it knows the true state of the scene, and returns actions as a policy does.

The expert moves an object, the *source*, on or into another one, the *target*. Its action depends
only on the present state, so the expert recovers from disturbances. The heights at which the
gripper moves form a *funnel*: the larger the *misalignment* (a distance to the side, or a wrong
turn), the higher the gripper stays above the place where it is to grasp or to release. As the
gripper aligns, it comes down. *Yaw* is the angle about the vertical axis, *tilt* the angle between
the gripper and straight down.

Products of matrices and vectors are written as sums of elements, because the results of NumPy's
matrix products differ in the last bit between kinds of processors.
"""

import math
from dataclasses import dataclass

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.inverse_kinematics import Floats, compute_euclidean_norm
from spear.sim.control import FINGER_TRAVEL_M
from spear.sim.objects import ObjectKind
from spear.sim.scene import SOURCE_INDEX, TARGET_INDEX
from spear.sim.world import World, is_source_on_target

# The largest motions.
MAX_TRANSLATION_M = 0.06  # the largest translation of an action
MAX_ROTATION_RAD = math.radians(8)  # the largest rotation; small, so that turns last many images
MAX_YAW_RAD = math.radians(110)  # how far the gripper turns from straight ahead

# Heights.
HOVER_HEIGHT_M = 0.09  # the gripper's largest height over the grasp, if it is not aligned
CARRY_HEIGHT_M = 0.115  # height of a carried object's underside over the table
RETREAT_HEIGHT_M = 0.12  # the gripper's height over the target at the end
MAX_GRASP_DEPTH_M = 0.033  # how far below the top of a tall object the fingers grasp
MIN_EE_HEIGHT_M = 0.012  # the lowest height of the point between the finger tips
# Height of the source's underside over the target's rim when the gripper opens.
RELEASE_HEIGHTS_M = {"basket": -0.025, "bowl": -0.015}
DEFAULT_RELEASE_HEIGHT_M = 0.004  # for all other targets
# A held source that is more than this above its release height does not lie on the target yet.
HANGING_HEIGHT_M = 0.012

# When the gripper counts as aligned.
FUNNEL_M_PER_RAD = 0.10  # an angle of 1 rad counts as much as this distance to the side
ALIGNED_M = 0.008  # to grasp and to release: largest distance to the side
ALIGNED_RAD = 0.09  # to grasp: largest error of yaw and of tilt
PLACED_YAW_RAD = 0.12  # to release: largest error of yaw
PLACED_HEIGHT_M = 0.010  # to release: largest error of height
MIN_LEAVING_OPENING = 0.6  # after the release: the gripper goes up when it is open this far, 0 to 1

# Objects.
MAX_GRASP_HALF_WIDTH_M = 0.037  # half the width of the widest thing that fits between the fingers
LONG_RADIUS_M = 0.042  # an object with a larger radius has to lie along the basket


@dataclass(frozen=True)
class _Gripper:
    """The gripper's present pose, base frame."""

    position: Floats  # [3] m
    rotation: Floats  # [4] quaternion
    yaw: float  # rad
    tilt: float  # rad


@dataclass(frozen=True)
class _Goal:
    """The pose and the opening that the gripper should get to, base frame."""

    position: Floats  # [3] m
    yaw: float  # rad; the gripper points straight down
    opening: float  # 0 or 1


@dataclass(frozen=True)
class _Grasp:
    """How to grasp an object, base frame."""

    point: Floats  # [3] m, where the point between the finger tips should be
    yaws: list[float] | None  # yaws of the gripper that fit, rad; None if all do
    width: float  # width of the object between the fingers, m


def act(world: World) -> NDArray[np.float32]:
    """Return the expert's action [8] in this state (the layout of `spear.types.Action`)."""
    position, rotation = world.servo.measure_pose()
    yaw, tilt = _measure_yaw_and_tilt_rad(rotation)
    gripper = _Gripper(position, rotation, yaw, tilt)

    num_touching = world.count_touching_fingers(SOURCE_INDEX)
    is_held = num_touching == 2
    # A held source that touches the target may still hang above the place where it should rest.
    is_hanging = (
        is_held
        and _measure_underside_height_m(world) > _compute_release_height_m(world) + HANGING_HEIGHT_M
    )
    if is_source_on_target(world) and not is_hanging:
        goal = _leave(world, gripper, is_held)
    elif is_held:
        goal = _carry(world, gripper)
    else:
        goal = _approach(world, gripper)
    return _step_towards(goal, gripper)


# --- What to do ---


def _approach(world: World, gripper: _Gripper) -> _Goal:
    """Approach the source: hover, align, come down, close the gripper."""
    grasp = _compute_grasp(world)
    yaw = _choose_nearest_yaw_rad(gripper.yaw, grasp.yaws)
    turn_rad = abs(_wrap_angle_rad(yaw - gripper.yaw))
    side_m = compute_euclidean_norm(grasp.point[:2] - gripper.position[:2])
    # The funnel: up to a misalignment of 12 mm the gripper goes to the grasp itself, and beyond
    # that 1.6 mm higher per millimeter.
    misalignment_m = side_m + FUNNEL_M_PER_RAD * (turn_rad + gripper.tilt)
    hover_m = np.clip(1.6 * (misalignment_m - 0.012), 0, HOVER_HEIGHT_M)
    position = grasp.point + np.array([0, 0, hover_m])

    is_over_grasp = side_m < ALIGNED_M and abs(grasp.point[2] - gripper.position[2]) < ALIGNED_M
    is_aligned = is_over_grasp and turn_rad < ALIGNED_RAD and gripper.tilt < ALIGNED_RAD
    # If the fingers are much closer than the object is wide, they have closed on nothing. The
    # gripper opens then, and tries again.
    is_missed = world.servo.measure_opening() * 2 * FINGER_TRAVEL_M < 0.7 * grasp.width
    opening = 0.0 if is_aligned and not is_missed else 1.0
    return _Goal(position, yaw, opening)


def _carry(world: World, gripper: _Gripper) -> _Goal:
    """Carry the held source: lift, move over the target, come down, open the gripper."""
    yaw = _choose_placing_yaw_rad(world, gripper.yaw)
    turn_rad = abs(_wrap_angle_rad(yaw - gripper.yaw))
    offset = (
        world.get_object_position(TARGET_INDEX)[:2] - world.get_object_position(SOURCE_INDEX)[:2]
    )
    side_m = compute_euclidean_norm(offset)
    misalignment_m = side_m + FUNNEL_M_PER_RAD * (turn_rad + gripper.tilt)

    # The funnel: 2 mm above the release height per millimeter of misalignment beyond 10 mm, but at
    # most the height for carrying.
    underside = _measure_underside_height_m(world)
    release_height = _compute_release_height_m(world)
    funnel_m = float(np.clip(2.0 * (misalignment_m - 0.010), 0, 1))
    height = min(max(CARRY_HEIGHT_M, release_height), release_height + funnel_m)
    position = gripper.position + np.array([offset[0], offset[1], height - underside])

    is_aligned = side_m < ALIGNED_M and turn_rad < PLACED_YAW_RAD
    is_ready = is_aligned and abs(underside - release_height) < PLACED_HEIGHT_M
    return _Goal(position, yaw, 1.0 if is_ready else 0.0)


def _leave(world: World, gripper: _Gripper, is_held: bool) -> _Goal:
    """Leave the source that lies on the target: let go, then go up."""
    position = gripper.position.copy()
    # The gripper stays in place until its fingers have opened.
    if not is_held and world.servo.measure_opening() > MIN_LEAVING_OPENING:
        target_height = world.get_object_position(TARGET_INDEX)[2]
        position[2] = max(gripper.position[2], target_height + RETREAT_HEIGHT_M)
    return _Goal(position, gripper.yaw, 1.0)


def _step_towards(goal: _Goal, gripper: _Gripper) -> NDArray[np.float32]:
    """Return the action [8] towards a goal, at which the gripper points straight down."""
    # First up, then sideways: the more the gripper has to rise beyond 15 mm, the less it moves to
    # the side, and from 55 mm on not at all.
    step = goal.position - gripper.position
    rise_m = max(0.0, step[2] - 0.015)
    step[:2] *= max(0.0, 1.0 - rise_m / 0.04)
    step *= min(1.0, MAX_TRANSLATION_M / max(compute_euclidean_norm(step), 1e-9))

    # The rotation from the present orientation to the goal's, shortened to the largest step.
    goal_rotation = np.array([math.cos(goal.yaw / 2), 0, 0, math.sin(goal.yaw / 2)])
    rotation_vector = np.empty(3)
    rotation_step = np.empty(4)
    mujoco.mju_subQuat(rotation_vector, goal_rotation, gripper.rotation)
    angle_rad = compute_euclidean_norm(rotation_vector)
    axis = rotation_vector / max(angle_rad, 1e-9)
    mujoco.mju_axisAngle2Quat(rotation_step, axis, min(angle_rad, MAX_ROTATION_RAD))
    return np.concatenate([step, rotation_step, [goal.opening]]).astype(np.float32)


# --- What the scene looks like ---


def _compute_release_height_m(world: World) -> float:
    """The height at which the source's underside should be when the gripper opens, m."""
    kind = world.bodies[TARGET_INDEX].kind
    rim_height = float(world.get_object_position(TARGET_INDEX)[2]) + kind.rim
    return rim_height + RELEASE_HEIGHTS_M.get(kind.name, DEFAULT_RELEASE_HEIGHT_M)


def _measure_underside_height_m(world: World) -> float:
    """The height of the lowest point of the source's bounding box, m."""
    body = world.bodies[SOURCE_INDEX]
    # The z components of the object's three axes: how much each axis contributes to height, [3].
    vertical = world.get_object_rotation_matrix(SOURCE_INDEX)[2]
    center = (body.low + body.high) / 2
    half = (body.high - body.low) / 2
    height = world.get_object_position(SOURCE_INDEX)[2]
    return float(height + (vertical * center).sum() - (np.abs(vertical) * half).sum())


def _choose_placing_yaw_rad(world: World, yaw: float) -> float:
    """Return the gripper's yaw for placing the source, given the gripper's present yaw.

    A cube is placed square on a cube, and a long object along the basket. For other pairs any yaw
    will do, so the present one is returned.
    """
    period = _find_placing_period_rad(
        world.bodies[SOURCE_INDEX].kind, world.bodies[TARGET_INDEX].kind
    )
    if period is None:
        return yaw
    # The smallest turn after which the source fits. If the gripper cannot turn so far, it turns in
    # the other direction.
    target_yaw = _measure_object_yaw_rad(world, TARGET_INDEX)
    turn = _wrap_angle_rad(target_yaw - _measure_object_yaw_rad(world, SOURCE_INDEX), period)
    if abs(yaw + turn) <= MAX_YAW_RAD:
        return yaw + turn
    return yaw + turn - math.copysign(period, turn)


def _find_placing_period_rad(source: ObjectKind, target: ObjectKind) -> float | None:
    """Return the smallest turn after which the source fits on the target again, rad.

    It is None if the source fits after any turn.
    """
    if source.name.endswith("cube") and target.name.endswith("cube"):
        return math.pi / 2
    is_long = not source.round and source.radius > LONG_RADIUS_M
    if is_long and target.name == "basket":
        return math.pi
    return None


def _measure_object_yaw_rad(world: World, index: int) -> float:
    """Return the yaw of an object's x axis, rad."""
    matrix = world.get_object_rotation_matrix(index)
    return math.atan2(matrix[1, 0], matrix[0, 0])


def _compute_grasp(world: World) -> _Grasp:
    """Return how to grasp the source."""
    kind = world.bodies[SOURCE_INDEX].kind
    axes = world.get_object_rotation_matrix(
        SOURCE_INDEX
    )  # [3, 3], the object's axes are the columns
    assert kind.grasp is not None
    # Center and half-sizes of the box to grasp, in the object's frame.
    center = np.array(kind.grasp[0])
    half = np.array(kind.grasp[1])
    # Grasp in the middle of the box, but not too deep below its top.
    point = world.get_object_position(SOURCE_INDEX) + (axes * center).sum(1)
    top = point[2] + float((np.abs(axes[2]) * half).sum())
    point[2] = max(point[2], top - MAX_GRASP_DEPTH_M, MIN_EE_HEIGHT_M)
    if kind.round:
        # If the object stands, any yaw fits. If it lies, the fingers close across its axis.
        axis = axes[:, 2]
        is_standing = abs(axis[2]) > 0.8  # at most 37° from the vertical
        yaws = None if is_standing else [math.atan2(axis[1], axis[0])]
        return _Grasp(point, yaws, 2 * float(half[0]))

    # The axes of the box along which the fingers can close: about horizontal, and short enough.
    closing_axes = []
    for i in range(3):
        # A vertical component of 0.4 is 24° from the horizontal.
        if abs(axes[2, i]) < 0.4 and half[i] < MAX_GRASP_HALF_WIDTH_M:
            closing_axes.append(i)
    if not closing_axes:
        return _Grasp(point, None, 2 * float(half.min()))
    # The fingers close along the gripper's y axis, which is a quarter turn from its x axis.
    yaws = [math.atan2(axes[1, i], axes[0, i]) - math.pi / 2 for i in closing_axes]
    return _Grasp(point, yaws, 2 * float(half[closing_axes].min()))


def _choose_nearest_yaw_rad(yaw: float, fitting_yaws: list[float] | None) -> float:
    """Return the fitting yaw that is nearest to the present yaw and within `MAX_YAW_RAD`.

    `fitting_yaws` None means that all yaws fit.
    """
    if fitting_yaws is None:
        return float(np.clip(yaw, -MAX_YAW_RAD, MAX_YAW_RAD))
    # After half a turn the gripper grasps in the same way, so each yaw fits in two directions.
    choices = [yaw + _wrap_angle_rad(fitting_yaw - yaw, math.pi) for fitting_yaw in fitting_yaws]
    choices += [choice - math.copysign(math.pi, choice) for choice in choices]

    def measure_effort(choice: float) -> tuple[bool, float]:
        """A yaw beyond the limit loses against any within it; otherwise the nearer yaw wins."""
        return abs(choice) > MAX_YAW_RAD, abs(choice - yaw)

    return min(choices, key=measure_effort)


def _measure_yaw_and_tilt_rad(rotation: Floats) -> tuple[float, float]:
    """Return the gripper's yaw and tilt (rad) from its quaternion [4]."""
    matrix = np.empty(9)
    mujoco.mju_quat2Mat(matrix, rotation)
    axes = matrix.reshape(3, 3)
    tilt = math.acos(float(np.clip(axes[2, 2], -1, 1)))
    return math.atan2(axes[1, 0], axes[0, 0]), tilt


def _wrap_angle_rad(angle: float, period: float = 2 * math.pi) -> float:
    """Return the angle plus a multiple of `period` that is nearest to 0, rad."""
    return (angle + period / 2) % period - period / 2
