"""The scripted expert for LIBERO: knows the true state, acts through the policy's eight numbers.

Its actions pass through the same adapter and controller as a policy's, so its success shows what
adapter and controller allow. An action depends on the present moment only, so the oracle tries
again when an object slips.

The controller moves the arm towards a *commanded pose*, which the arm follows with a lag. So the
oracle plans how the commanded pose moves on, and the measured pose says what has been reached. The
action that it returns leads from the measured pose to the new commanded one, as all actions of this
robot do (`spear.embodiments.libero`). All positions are in the base frame, m. All numbers are our
choice.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from spear.evaluate.libero.process import Box, LiberoMoment, Region
from spear.geometry import (
    action_between_poses,
    quat_canonical,
    quat_distance,
    quat_exp,
    quat_log,
    quat_multiply,
    quat_rotate,
    quat_to_euler,
)
from spear.types import Array

MAX_STEP_M = 0.04  # by how much an action moves the commanded pose at most
MAX_TURN_RAD = 0.3  # by how much an action turns the commanded pose at most
MIN_NORM = 1e-9  # a vector is divided by its norm (m or rad), or by this if the norm is smaller

# Moving across: first straight up, then level, then down.
HOVER_M = 0.07  # height above the grasp at which the gripper moves across
CLEARANCE_M = 0.04  # height of the lowest point that moves above the highest thing below it
MAX_MISSING_HEIGHT_M = 0.02  # the gripper moves across only if it is at most this much too low
PATH_WIDTH_M = 0.09  # a thing must be cleared if its horizontal distance from the path is smaller
NUM_PATH_POINTS = 12  # points of a path whose distances from things are measured
RETREAT_M = 0.1  # an action lifts the gripper by this height when nothing is left to do

# The gripper. The end-effector is the point between the fingertips.
FINGER_LENGTH_M = 0.04  # height of the palm above the end-effector, less a margin
PALM_HEIGHT_M = 0.045  # height of the palm above the end-effector
OUTER_FINGER_OFFSET_M = 0.035  # from the middle between the open fingers to either finger
HAND_REACH_M = 0.105  # from the middle of the hand to either end, along the closing direction
HAND_HALF_WIDTH_M = 0.035  # half of the hand's width, across the closing direction
NUM_HAND_POINTS = 9  # points along the hand whose distances from obstacles are measured

# Grasps and releases
MIN_GRASP_HEIGHT_M = 0.012  # height of the end-effector above the bottom of what it grasps
MAX_LEVEL_SLOPE = 0.5  # an axis is level if the vertical part of its unit vector is at most this
MAX_WIDER_M = 0.005  # a level side wider than the narrowest by less than this is as good to grasp
RELEASE_M = 0.008  # height above its place at which an object is released
RELEASE_MARGIN_M = 0.006  # an object is also released if it is higher than that by less than this

# Grasps of a bowl's wall at its rim. The *room* of such a grasp is the horizontal distance of the
# outer finger and of the hand from the nearest obstacle.
RIM_DEPTH_M = 0.018  # from a bowl's rim down to where the fingers grip its wall
WALL_HALF_THICKNESS_M = 0.004  # half of the thickness of a bowl's wall
NUM_RIM_DIRECTIONS = 16  # directions, as seen from a bowl's middle, of the grasps that are compared
RIM_CLEARANCE_M = 0.012  # an obstacle whose top is farther than this below the grasp is ignored
ENOUGH_ROOM_M = 0.03  # grasps with at least this much room are equally good
MAX_ROOM_M = 1.0  # the room of a grasp without any obstacle near
LEAN_RAD = 0.45  # angle by which the hand leans away from a drawer over a bowl
MAX_UPRIGHT_RAD = 0.2  # a gripper that leans by a larger angle does so on purpose

# The gripper descends only if it is within this horizontal distance and this angle of the grasp.
MAX_GRASP_OFFSET_M = 0.01
MAX_GRASP_TURN_RAD = 0.1
FAR_OFFSET_M = 0.03  # a gripper farther from its grasp has to clear what stands on its way
START_YAW_RAD = 0.0  # of the hand in all official states, about; half a turn is the same
REFERENCE_Y_M = -0.2
"""The side of an object that is nearer to this is grasped, in the base frame, m.

That is the right side, as seen from the robot; of what stands on the cabinet the left side, because
the arm does not reach beyond it."""
SIDE_WEIGHT_RAD_PER_M = 3  # a grasp 1 m farther from `REFERENCE_Y_M` is as bad as a turn by 3 rad
MAX_ARM_OFFSET_M = 0.008  # distance within which the arm has reached its target
MAX_BLOCKED_HEIGHT_M = 0.02  # a gripper that stops below this height over its grasp is blocked
BLOCKED_LAG_M = 0.02  # an arm that has stopped so far above its command stands on something
MAX_PLACE_OFFSET_M = 0.018
"""Horizontal distance within which a carried object is lowered. At the limit of a joint the arm
stops 15 mm beside the place."""
MAX_PLACED_OFFSET_M = 0.025  # horizontal distance within which a released object is in its place
MAX_BLOCKED_PLACE_HEIGHT_M = 0.05  # an object that stops below this height rests on something
CARRY_MARGIN_M = 0.05  # least height of a carried object above its place
HOLLOW_DEPTH_M = 0.01  # height above a plate's origin at which an object lies in the plate
MAX_PLACED_HEIGHT_M = 0.03  # an object higher above its place is still held, or lies on another
PUSH_HEIGHT_M = 0.008  # height of the end-effector above the origin of a plate that it pushes
PUSH_HEIGHT_MARGIN_M = 0.012  # a gripper higher than that by more than this is not in the plate
MAX_PUSH_START_OFFSET_M = 0.015  # the gripper goes down to push within this offset from the middle
INSIDE_PLATE_M = 0.07  # fingers that are farther from a plate's middle are not inside its rim
MAX_PUSH_STEP_M = 0.02  # how far one action pushes an object
KNOB_LEVER_M = 0.034  # from a knob's axis to where the handle is pushed
KNOB_PUSH_OFFSET_M = 0.04  # from the handle, sideways, to where a push begins and to where it ends
KNOB_HEIGHT_M = 0.047  # height of the end-effector above the stove's origin
KNOB_HEIGHT_MARGIN_M = 0.015  # a gripper higher than that by more than this is not at the knob
KNOB_TILT_RAD = 0.5  # tilt of the gripper: near the base the arm cannot point straight down
MAX_KNOB_OFFSET_M = 0.02  # the gripper goes down beside the knob from at most this far aside
ON_ANGLE_RAD = 0.55  # a stove is on if its knob is turned farther
OPEN_DRAWER_M = 0.145  # a drawer counts as open if it is pulled out farther
ENOUGH_DRAWER_M = 0.125  # an object goes into a drawer that is open by this much
FILLED_DRAWER_M = 0.14
"""By how much a drawer is opened to put something in. A drawer that is open farther hides more of
what stands on the table."""
MIN_COVER_M = 0.05  # a drawer that is open by less hides nothing
COVER_MARGIN_M = 0.01  # distance between a lifted object and the drawer above it
OPEN_GRIPPER = 0.5  # a gripper that is open farther has let go of a handle
MAX_SIDEWAYS_RAD = 0.8  # a gripper turned farther from pointing down is at a handle
DRAWER_HALF_HEIGHT_M = 0.035  # half of the height of a drawer
DRAWER_WALL_M = 0.015  # thickness of a drawer's walls, and room for a finger
HANDLE_DEPTH_M = 0.035  # how far handles stand out of a cabinet
HANDLE_DISTANCE_M = 0.113  # from the middle of a drawer to its handle
HANDLE_HEIGHT_M = -0.004  # from the middle of a drawer up to that of its handle
MAX_HANDLE_OFFSET_M = 0.012  # a gripper is at a handle within this offset along and across
MAX_HANDLE_TURN_RAD = 0.12  # a gripper faces a handle within this angle
MAX_PULL_OFFSET_M = 0.03  # a closed gripper farther from the handle than this has lost it
NEAR_HANDLE_M = 0.1  # a gripper that is less far aside of a handle could meet the handle
DRAWER_STEP_M = 0.03  # an action moves the commanded pose away from the cabinet by this much
FRONT_M = 0.09  # distance in front of a handle from which the gripper goes to it
MIN_FRONT_M = FRONT_M - 0.02  # a gripper this far in front of a handle may move aside
MIN_LEFT_FRONT_M = FRONT_M - 0.01  # a gripper this far from a handle has left it
STILL_SPEED_M_S = 0.01  # a slower gripper has stopped
STILL_FINGER_SPEED_M_S = 0.01  # slower fingers have stopped

SLOPE_COSINES = (0.2, 0.8)
"""Range of the cosine between the vertical and the z axis of a slanted region. Those of other
regions are level or upright, because a region may be turned by quarter turns."""
SLOPE_DISTANCE_M = 0.045  # from the lower end of a rack up its slope to where a bottle is put

ActionArray = Array
"""One action [8] float32, laid out as `spear.types.Action`."""

VERTICAL = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

DOWN = np.array([1.0, 0.0, 0.0, 0.0])
"""Orientation of a gripper that points down, with yaw 0."""


@dataclass(frozen=True)
class Grasp:
    """Where the gripper closes.

    position  [3] of the end-effector, m.
    yaw       of the end-effector frame, along whose y axis the fingers close, rad.
    lean      [3] rotation vector in the base frame, by which the gripper is turned afterwards, rad.
    """

    position: Array
    yaw: float
    lean: Array = field(default_factory=lambda: np.zeros(3))


@dataclass(frozen=True)
class Outline:
    """A box seen from above.

    center     [2] its middle.
    axes       [2, 2] the directions of its sides, one a column.
    half_size  [2] half of its size along each axis, m.
    bottom     height of its lowest point, m.
    top        height of its highest point, m.
    """

    center: Array
    axes: Array
    half_size: Array
    bottom: float
    top: float

    def measure_distances_m(self, points: Array) -> Array:
        """The horizontal distances [n] of points [n, 2]; 0 above or below the box."""
        outside = np.maximum(self._measure_beyond_sides_m(points), 0)
        return np.linalg.norm(outside, axis=-1)

    def measure_inward_distances_m(self, points: Array) -> Array:
        """The horizontal distances [n] of points [n, 2] inside the box from its nearest side;
        negative outside."""
        return -self._measure_beyond_sides_m(points).max(axis=-1)

    def measure_signed_distances_m(self, points: Array) -> Array:
        """The horizontal distances [n] of points [n, 2]; inside negative, to the nearest side."""
        inside = np.minimum(-self.measure_inward_distances_m(points), 0)
        return self.measure_distances_m(points) + inside

    def compute_exit_direction(self, point: Array) -> Array:
        """The direction [2] in which a point leaves the box soonest."""
        side = int(np.argmax(self._measure_beyond_sides_m(point)))
        axis = self.axes[:, side]
        return axis * np.sign((point - self.center) @ axis)

    def _measure_beyond_sides_m(self, points: Array) -> Array:
        """How far points lie beyond the sides, along each axis: [n, 2], negative inside."""
        return np.abs((points - self.center) @ self.axes) - self.half_size


def choose_action(goal: Sequence[Sequence[str]], moment: LiberoMoment) -> ActionArray:
    """Choose the action [8] float32 of this moment (layout of `spear.types.Action`).

    Args:
        goal: The conditions of the task, as in LIBERO's files: ["on", object, place],
            ["in", object, place], ["open", drawer] or ["turnon", stove].
        moment: The true state.
    """
    for condition in goal:
        if not is_fulfilled(condition, moment):
            return pursue(condition, moment)
    return _retreat(moment)


def is_fulfilled(condition: Sequence[str], moment: LiberoMoment) -> bool:
    """Whether nothing is left to do for a condition.

    An object that has to be put at a place must be at this place, and the gripper must have let go
    of the object.
    """
    predicate, name, *place_names = condition
    if predicate == "turnon":
        return moment.joints[f"{name}_button"] > ON_ANGLE_RAD
    if predicate == "open":
        joint, _ = _get_joint_and_cabinet_names(name)
        return moment.joints[joint] < -OPEN_DRAWER_M
    if predicate not in ("on", "in"):
        return False  # the oracle knows no other conditions, and waits
    source = moment.objects[name]
    target_position = compute_rest_position(source, place_names[0], moment)
    offset = np.linalg.norm(source.pose[:2] - target_position[:2])
    is_low = source.pose[2] < target_position[2] + MAX_PLACED_HEIGHT_M
    return bool(moment.is_commanded_open and is_low and offset < MAX_PLACED_OFFSET_M)


def pursue(condition: Sequence[str], moment: LiberoMoment) -> ActionArray:
    """Choose the next action towards a condition that is not fulfilled."""
    predicate, name, *place_names = condition
    if predicate == "turnon":
        return _turn_on_stove(name, moment)
    if predicate == "open":
        return _open_drawer(name, moment)
    if predicate not in ("on", "in"):
        return _move_only_fingers(moment, should_open=True)  # the oracle knows no other conditions
    place_name = place_names[0]
    if name.startswith("plate"):
        return _push_plate(name, moment.regions[place_name], moment)
    if _is_drawer(place_name, moment):
        opening_action = _open_drawer_and_leave_handle(place_name, moment)
        if opening_action is not None:
            return opening_action
    return _pick_and_place(name, place_name, moment)


def _open_drawer_and_leave_handle(region: str, moment: LiberoMoment) -> ActionArray | None:
    """Open a drawer and move the gripper away from its handle.

    Returns:
        The next action; None when both is done.
    """
    joint, cabinet = _get_joint_and_cabinet_names(region)
    if moment.joints[joint] > -ENOUGH_DRAWER_M:
        return _open_drawer(region, moment, FILLED_DRAWER_M)
    offset = moment.pose[:3] - _compute_handle_position(region, moment)
    is_sideways = _measure_angle_between_rad(DOWN, moment.pose[3:]) > MAX_SIDEWAYS_RAD
    if is_sideways and moment.opening < OPEN_GRIPPER:  # let go first, so that the drawer stays
        return _move_towards(moment, moment.commanded[:3], moment.commanded[3:], should_open=True)
    if is_sideways and np.linalg.norm(offset) < MIN_LEFT_FRONT_M:
        goal = moment.commanded[:3] + DRAWER_STEP_M * _compute_outward_direction(
            moment.objects[cabinet]
        )
        return _move_towards(moment, goal, moment.commanded[3:], should_open=True)
    return None


def _pick_and_place(name: str, place_name: str, moment: LiberoMoment) -> ActionArray:
    """Approach an object with open fingers, wait until they hold it, and carry it to its place.

    Fingers that have closed without holding the object open again.
    """
    if moment.is_commanded_open:
        return _approach_and_grasp(name, moment)
    are_fingers_moving = moment.finger_speed >= STILL_FINGER_SPEED_M_S
    if are_fingers_moving:
        return _move_only_fingers(moment, should_open=False)
    if name not in moment.gripped_objects:
        return _move_only_fingers(moment, should_open=True)
    target_position = compute_rest_position(moment.objects[name], place_name, moment)
    return _carry_and_release(name, target_position, moment)


def compute_rest_position(source: Box, place_name: str, moment: LiberoMoment) -> Array:
    """Compute where an object's origin should come to rest: [3] in the base frame, m."""
    origin_height = source.pose[2] - _compute_corners(source)[:, 2].min()  # above its lowest point
    if place_name in moment.regions:
        region = moment.regions[place_name]
        z_axis = quat_rotate(torch.from_numpy(region.pose[3:]), VERTICAL).numpy()
        if SLOPE_COSINES[0] < z_axis[2] < SLOPE_COSINES[1]:
            # The region is the lower end of a rack's slope, and its z axis points up the slope.
            return region.pose[:3] + SLOPE_DISTANCE_M * z_axis + np.array([0, 0, origin_height])
        return np.array([*region.pose[:2], region.pose[2] + origin_height])
    target = moment.objects[place_name]
    center = _compute_corners(target).mean(axis=0)
    # A plate or a bowl is hollow: what is put there sinks below its rim.
    return np.array([center[0], center[1], target.pose[2] + HOLLOW_DEPTH_M + origin_height])


def list_equally_good_grasps(name: str, moment: LiberoMoment) -> list[Grasp]:
    """Find all good grasps of an object: a bowl's at its rim, others' around the middle."""
    box = moment.objects[name]
    if "bowl" in name:
        return _list_rim_grasps(name, moment)

    corners = _compute_corners(box)
    center = corners.mean(axis=0)
    top = corners[:, 2].max()
    bottom = corners[:, 2].min()
    # In the middle, but not so low that the palm or the fingertips would meet something.
    height = max((top + bottom) / 2, top - FINGER_LENGTH_M, bottom + MIN_GRASP_HEIGHT_M)
    # [3, 3], one of the object's own axes per row
    axes = quat_rotate(torch.from_numpy(box.pose[3:]), torch.eye(3, dtype=torch.float64)).numpy()
    size = box.high - box.low
    # The fingers close along the level axis in whose direction the object is narrowest. While an
    # object tips over, it may have no level axis; then the most level one is taken.
    slopes = np.abs(axes[:, 2])
    level_axes = [k for k in range(3) if slopes[k] <= max(MAX_LEVEL_SLOPE, slopes.min())]
    min_width = min(size[k] for k in level_axes)
    grasps = []
    for axis in level_axes:
        if size[axis] < min_width + MAX_WIDER_M:
            closing = axes[axis]
            yaw = math.atan2(closing[1], closing[0]) - math.pi / 2
            grasps.append(Grasp(np.array([center[0], center[1], height]), yaw))
    return grasps


def choose_grasp(name: str, moment: LiberoMoment) -> Grasp:
    """Choose one of the good grasps of an object, whatever the hand does at this moment.

    The best grasp has the hand turned as at the start of an episode, and is on the side of the
    object that is nearer to a fixed plane. If the choice depended on where the hand is, one of two
    equally good sides would be taken from here and the other from there. A policy that learned from
    such demonstrations would hover between both sides.
    """

    def measure_disadvantage(grasp: Grasp) -> float:
        turn = abs(_choose_nearest_yaw_rad(grasp.yaw, START_YAW_RAD) - START_YAW_RAD)
        return turn + SIDE_WEIGHT_RAD_PER_M * abs(float(grasp.position[1]) - REFERENCE_Y_M)

    return min(list_equally_good_grasps(name, moment), key=measure_disadvantage)


def _list_rim_grasps(name: str, moment: LiberoMoment) -> list[Grasp]:
    """Find the grasps of a bowl's wall at which fingers and hand have room.

    If no grasp has `ENOUGH_ROOM_M`, those with the most room are returned.
    """
    box = moment.objects[name]
    corners = _compute_corners(box)
    center = corners.mean(axis=0)
    rim_height = corners[:, 2].max()
    bottom = corners[:, 2].min()
    radius = float(np.min(box.high[:2] - box.low[:2])) / 2 - WALL_HALF_THICKNESS_M
    depth = min(RIM_DEPTH_M, rim_height - bottom - MIN_GRASP_HEIGHT_M)
    obstacles = _list_obstacles(moment, [name])

    grasps = []
    rooms = []
    for index in range(NUM_RIM_DIRECTIONS):
        angle = 2 * math.pi * index / NUM_RIM_DIRECTIONS
        outward = np.array([math.cos(angle), math.sin(angle)])
        point = center[:2] + radius * outward
        grasp = Grasp(np.array([*point, rim_height - depth]), angle - math.pi / 2)
        grasps.append(grasp)
        rooms.append(_measure_room_m(grasp, center[:2], obstacles))
    if max(rooms) < 0 and _list_open_drawers(moment):
        return [_make_leaning_grasp(grasps, center[:2], moment)]
    enough = min(ENOUGH_ROOM_M, max(rooms))  # compared with a margin for rounding errors
    return [grasp for grasp, room in zip(grasps, rooms, strict=True) if room >= enough - 1e-9]


def _make_leaning_grasp(
    upright_grasps: Sequence[Grasp], center: Array, moment: LiberoMoment
) -> Grasp:
    """Lean the grasp of a bowl's rim at which the hand is then farthest from any open drawer.

    The bowl stands partly under a drawer, so the hand leans outward, away from the bowl's middle.

    Args:
        upright_grasps: Grasps around the rim.
        center: [2] the bowl's middle.
        moment: The true state, with at least one open drawer.
    """
    covers = _list_open_drawers(moment)
    best_grasp = upright_grasps[0]
    best_room = -math.inf
    for grasp in upright_grasps:
        point = grasp.position[:2]
        outward = (point - center) / np.linalg.norm(point - center)
        across = np.array([-outward[1], outward[0]])
        middle = point + PALM_HEIGHT_M * math.sin(LEAN_RAD) * outward
        reaches = HAND_REACH_M * math.cos(LEAN_RAD) * np.linspace(-1, 1, NUM_HAND_POINTS)
        hand_line = middle + reaches[:, None] * outward
        edge = HAND_HALF_WIDTH_M * across
        hand_points = np.concatenate([hand_line - edge, hand_line + edge])
        room = min(float(cover.measure_signed_distances_m(hand_points).min()) for cover in covers)
        if room > best_room:
            best_room = room
            lean = LEAN_RAD * np.array([-outward[1], outward[0], 0])
            best_grasp = Grasp(grasp.position, grasp.yaw, lean)
    return best_grasp


def _measure_room_m(grasp: Grasp, center: Array, obstacles: Sequence[Outline]) -> float:
    """Measure how far fingers and hand stay away from obstacles at a grasp of a rim, m.

    Args:
        grasp: The grasp.
        center: [2] the bowl's middle. If an obstacle's box contains this point, the obstacle is a
            drawer around the bowl, of which only the walls are in the way.
        obstacles: What is in the way, seen from above.
    """
    point = grasp.position[:2]
    outward = (point - center) / np.linalg.norm(point - center)
    outer_finger = point + OUTER_FINGER_OFFSET_M * outward
    reaches = np.linspace(-HAND_REACH_M, HAND_REACH_M, NUM_HAND_POINTS)
    hand_points = point + reaches[:, None] * outward
    room = MAX_ROOM_M
    for obstacle in obstacles:
        if obstacle.top > grasp.position[2] - RIM_CLEARANCE_M:
            is_around = (
                obstacle.bottom < grasp.position[2] and obstacle.measure_distances_m(center) == 0
            )
            if is_around:
                distance = obstacle.measure_inward_distances_m(outer_finger) - DRAWER_WALL_M
            else:
                distance = obstacle.measure_distances_m(outer_finger)
            room = min(room, float(distance))
        if obstacle.top > grasp.position[2] + PALM_HEIGHT_M:
            distances = obstacle.measure_distances_m(hand_points)
            room = min(room, float(distances.min()) - HAND_HALF_WIDTH_M)
    return room


def _approach_and_grasp(name: str, moment: LiberoMoment) -> ActionArray:
    """Move above the object first, then down to it, then close the gripper."""
    best = choose_grasp(name, moment)
    facing_quat = _compute_rotation_facing_grasp(best, moment)
    goal = best.position.copy()
    offset = float(np.linalg.norm(moment.pose[:2] - goal[:2]))
    is_leaning = bool(np.any(best.lean))
    if is_leaning:
        turn = _measure_angle_between_rad(facing_quat, moment.pose[3:])
    else:
        turn = abs(
            _wrap_angle_rad(
                _choose_nearest_yaw_rad(best.yaw, _measure_yaw_rad(moment.commanded))
                - _measure_yaw_rad(moment.pose)
            )
        )
    is_aligned = offset < MAX_GRASP_OFFSET_M and turn < MAX_GRASP_TURN_RAD
    if not is_aligned:
        hover = goal[2] + HOVER_M
        if offset > FAR_OFFSET_M or is_leaning:
            hover = max(hover, _compute_height_to_clear_m(moment, goal, [name]) + CLEARANCE_M)
        return _rise_and_move_over(moment, goal, hover, facing_quat, is_open=True)
    is_at_grasp = np.linalg.norm(moment.pose[:3] - goal) < MAX_ARM_OFFSET_M
    is_low = moment.pose[2] < goal[2] + MAX_BLOCKED_HEIGHT_M
    has_stopped = moment.speed < STILL_SPEED_M_S
    if has_stopped and not is_low and moment.pose[2] > moment.commanded[2] + BLOCKED_LAG_M:
        # A finger stands on something. Rise from where the arm is, and try again from above.
        above = np.array([*goal[:2], moment.pose[2] + HOVER_M])
        from_here = replace(moment, commanded=moment.pose)
        return _move_towards(from_here, above, facing_quat, should_open=True)
    should_close = is_at_grasp or (has_stopped and is_low)
    return _move_towards(moment, goal, facing_quat, should_open=not should_close)


def _compute_rotation_facing_grasp(grasp: Grasp, moment: LiberoMoment) -> Array:
    """Return the orientation [4] of the gripper at a grasp.

    The gripper grasps in the same way after half a turn. Of these two orientations, the one nearer
    to the commanded orientation is returned.
    """
    if not np.any(grasp.lean):
        return _compute_rotation_facing_down(
            _choose_nearest_yaw_rad(grasp.yaw, _measure_yaw_rad(moment.commanded))
        )
    lean = quat_exp(torch.from_numpy(grasp.lean))
    candidates = []
    for yaw in (grasp.yaw, grasp.yaw + math.pi):
        upright = torch.from_numpy(_compute_rotation_facing_down(yaw))
        candidates.append(quat_multiply(lean, upright).numpy())
    return min(
        candidates,
        key=lambda facing_quat: _measure_angle_between_rad(facing_quat, moment.commanded[3:]),
    )


def _carry_and_release(name: str, target_position: Array, moment: LiberoMoment) -> ActionArray:
    """Carry the object up, across and down, then open the gripper."""
    box = moment.objects[name]
    facing_quat = _compute_rotation_facing_down(_measure_yaw_rad(moment.commanded))
    if _measure_angle_between_rad(facing_quat, moment.commanded[3:]) > MAX_UPRIGHT_RAD:
        facing_quat = moment.commanded[3:]  # the object would be turned, too
    move_out = _compute_move_from_under_drawer(box, moment)
    if move_out is not None:
        return _move_towards(moment, moment.pose[:3] + move_out, facing_quat, should_open=False)
    offset = target_position[:2] - box.pose[:2]
    distance = float(np.linalg.norm(offset))
    goal = moment.pose[:3].copy()
    goal[:2] += offset
    # How far the object hangs below the end-effector
    hanging = moment.pose[2] - _compute_corners(box)[:, 2].min()
    if distance > MAX_PLACE_OFFSET_M:
        height = _compute_height_to_clear_m(moment, goal, [name]) + CLEARANCE_M + hanging
        height = max(height, moment.pose[2] + target_position[2] - box.pose[2] + CARRY_MARGIN_M)
        return _rise_and_move_over(moment, goal, height, facing_quat, is_open=False)
    goal[2] = moment.pose[2] + target_position[2] + RELEASE_M - box.pose[2]
    is_placed = box.pose[2] < target_position[2] + RELEASE_M + RELEASE_MARGIN_M
    is_low = box.pose[2] < target_position[2] + MAX_BLOCKED_PLACE_HEIGHT_M
    is_blocked = moment.speed < STILL_SPEED_M_S and is_low
    should_open = is_placed or is_blocked
    return _move_towards(moment, goal, facing_quat, should_open=should_open)


def _compute_move_from_under_drawer(held_object: Box, moment: LiberoMoment) -> Array | None:
    """The next move [3] of a held object out from under a drawer, m; None if none is above."""
    outline = _make_outline(held_object)
    radius = float(outline.half_size.max())
    for cover in _list_open_drawers(moment):
        room_above = cover.bottom - outline.top
        is_beside = cover.measure_distances_m(outline.center) > radius + COVER_MARGIN_M
        if room_above < 0 or is_beside:
            continue
        lift = float(np.clip(room_above - COVER_MARGIN_M, 0, MAX_STEP_M / 2))
        return np.append(MAX_STEP_M * cover.compute_exit_direction(outline.center), lift)
    return None


def _push_plate(name: str, region: Region, moment: LiberoMoment) -> ActionArray:
    """Push a plate along the table to a region, with closed fingers inside its rim."""
    center = _compute_corners(moment.objects[name]).mean(axis=0)
    displacement = region.pose[:2] - center[:2]
    distance = float(np.linalg.norm(displacement))
    direction_2d = displacement / max(distance, 1e-6)
    yaw = _choose_nearest_yaw_rad(
        math.atan2(direction_2d[1], direction_2d[0]), _measure_yaw_rad(moment.commanded)
    )
    facing_quat = _compute_rotation_facing_down(yaw)
    push_height = moment.objects[name].pose[2] + PUSH_HEIGHT_M

    is_inside = np.linalg.norm(moment.pose[:2] - center[:2]) < INSIDE_PLATE_M
    if moment.pose[2] > push_height + PUSH_HEIGHT_MARGIN_M or not is_inside:
        if np.linalg.norm(moment.pose[:2] - center[:2]) > MAX_PUSH_START_OFFSET_M:
            clear_height = _compute_height_to_clear_m(moment, center, [name]) + CLEARANCE_M
            height = max(push_height + HOVER_M, clear_height)
            return _rise_and_move_over(moment, center, height, facing_quat, is_open=False)
        return _move_towards(
            moment, np.array([*center[:2], push_height]), facing_quat, should_open=False
        )
    # The fingers meet the rim ahead, and take the plate as far as it has to go.
    goal = moment.pose[:2] + min(distance, MAX_PUSH_STEP_M) * direction_2d
    return _move_towards(moment, np.array([*goal, push_height]), facing_quat, should_open=False)


def _turn_on_stove(name: str, moment: LiberoMoment) -> ActionArray:
    """Turn a stove's knob: move beside the end of the knob's handle, then down, then push it round.

    The position of the knob's joint is the angle of its handle.
    """
    box = moment.objects[name]
    knob = box.pose[:2]
    angle = moment.joints[f"{name}_button"]
    along_handle = np.array([math.cos(angle), math.sin(angle)])
    # A push in this direction turns the knob to a larger angle.
    push_direction = np.array([-along_handle[1], along_handle[0]])
    start = knob + KNOB_LEVER_M * along_handle - KNOB_PUSH_OFFSET_M * push_direction
    low = box.pose[2] + KNOB_HEIGHT_M
    facing_quat = quat_exp(torch.tensor([0.0, KNOB_TILT_RAD, 0.0], dtype=torch.float64)).numpy()
    if moment.pose[2] > low + KNOB_HEIGHT_MARGIN_M:
        offset = float(np.linalg.norm(moment.pose[:2] - start))
        height = low if offset < MAX_KNOB_OFFSET_M else low + HOVER_M
        return _move_towards(moment, np.array([*start, height]), facing_quat, should_open=False)
    goal = knob + KNOB_LEVER_M * along_handle + KNOB_PUSH_OFFSET_M * push_direction
    return _move_towards(moment, np.array([*goal, low]), facing_quat, should_open=False)


def _open_drawer(region: str, moment: LiberoMoment, target_m: float = math.inf) -> ActionArray:
    """Take a drawer by its handle, from in front, and pull until it is open by `target_m`."""
    joint, cabinet = _get_joint_and_cabinet_names(region)
    outward = _compute_outward_direction(moment.objects[cabinet])
    handle = _compute_handle_position(region, moment)
    facing_quat = _compute_rotation_facing_cabinet(math.atan2(outward[1], outward[0]), moment)
    present_goal = moment.commanded[:3]
    outward_goal = present_goal + DRAWER_STEP_M * outward  # away from the cabinet

    # Where the gripper is, seen from the handle
    offset = moment.pose[:3] - handle
    front = float(offset @ outward)  # how far in front of the handle, m
    aside = float(np.linalg.norm(offset - front * outward))  # how far above, below or beside it, m
    turn = _measure_angle_between_rad(facing_quat, moment.pose[3:])
    is_at_handle = aside < MAX_HANDLE_OFFSET_M and front < MAX_HANDLE_OFFSET_M
    is_facing_handle = aside <= MAX_HANDLE_OFFSET_M and turn <= MAX_HANDLE_TURN_RAD
    could_meet_handle = front < MIN_FRONT_M and aside < NEAR_HANDLE_M
    has_lost_handle = aside > MAX_PULL_OFFSET_M or front > MAX_PULL_OFFSET_M

    # With open fingers: away from the cabinet, then in front of the handle, to the handle, close.
    if moment.is_commanded_open:
        if is_at_handle:
            return _move_towards(moment, present_goal, facing_quat, should_open=False)
        if is_facing_handle:
            return _move_towards(moment, handle, facing_quat, should_open=True)
        if could_meet_handle:
            return _move_towards(moment, outward_goal, facing_quat, should_open=True)
        return _move_towards(moment, handle + FRONT_M * outward, facing_quat, should_open=True)

    # With closed fingers: wait until they have stopped. Then pull, or open if they lost the handle.
    if moment.finger_speed >= STILL_FINGER_SPEED_M_S:
        return _move_towards(moment, present_goal, facing_quat, should_open=False)
    if has_lost_handle:
        return _move_towards(moment, present_goal, facing_quat, should_open=True)
    opening_m = -moment.joints[joint]  # the joint is negative when the drawer is open
    lag_m = float((moment.commanded[:3] - moment.pose[:3]) @ outward)
    # The arm will catch up with its command and open the drawer farther, but friction may hold it
    # back. If we subtracted the whole lag, a drawer with friction would stop before the target; if
    # we subtracted nothing, a drawer without friction would go beyond it. So we subtract half.
    missing_m = target_m - opening_m - lag_m / 2
    step = float(np.clip(missing_m, 0, DRAWER_STEP_M))
    return _move_towards(moment, present_goal + step * outward, facing_quat, should_open=False)


def _is_drawer(place_name: str, moment: LiberoMoment) -> bool:
    return (
        place_name in moment.regions
        and _get_joint_and_cabinet_names(place_name)[0] in moment.joints
    )


def _compute_outward_direction(cabinet: Box) -> Array:
    """Return the direction [3] in which a cabinet's drawers open: the cabinet's own -y axis."""
    outward = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    return quat_rotate(torch.from_numpy(cabinet.pose[3:]), outward).numpy()


def _compute_handle_position(region: str, moment: LiberoMoment) -> Array:
    """Compute the middle of a drawer's handle [3]."""
    _, cabinet = _get_joint_and_cabinet_names(region)
    middle = moment.regions[region].pose[:3]
    handle = middle + HANDLE_DISTANCE_M * _compute_outward_direction(moment.objects[cabinet])
    return handle + np.array([0, 0, HANDLE_HEIGHT_M])


def _get_joint_and_cabinet_names(drawer_region: str) -> tuple[str, str]:
    """Return the names of the joint and of the cabinet of a drawer's region.

    Example:
        >>> _get_joint_and_cabinet_names("wooden_cabinet_1_middle_region")
        ('wooden_cabinet_1_middle_level', 'wooden_cabinet_1')
    """
    drawer = drawer_region.removesuffix("_region")
    cabinet = drawer.rsplit("_", 1)[0]
    return f"{drawer}_level", cabinet


def _compute_rotation_facing_cabinet(outward_yaw: float, moment: LiberoMoment) -> Array:
    """Return the orientation [4] of a gripper that points level, at a cabinet's front.

    `outward_yaw` is the direction in which the cabinet's drawers open, rad.

    Its fingers are one above the other. There are two such orientations, of which the one nearer to
    the commanded one is returned.
    """
    turned = quat_exp(torch.tensor([0.0, 0.0, outward_yaw], dtype=torch.float64))
    # A quarter turn about y tips a gripper that points down so that it points along -x. Before it,
    # a quarter turn about the vertical, either way, brings the axis of the fingers upright.
    tipped = quat_exp(torch.tensor([0.0, math.pi / 2, 0.0], dtype=torch.float64))
    candidates = []
    for roll in (math.pi / 2, -math.pi / 2):
        rolled = quat_exp(torch.tensor([0.0, 0.0, roll], dtype=torch.float64))
        candidates.append(quat_multiply(turned, quat_multiply(tipped, rolled)).numpy())
    return min(
        candidates,
        key=lambda facing_quat: _measure_angle_between_rad(facing_quat, moment.commanded[3:]),
    )


def _measure_angle_between_rad(first_quat: Array, second_quat: Array) -> float:
    """Measure the angle of the rotation between two orientations [4], rad."""
    return float(quat_distance(torch.from_numpy(first_quat), torch.from_numpy(second_quat)))


def _retreat(moment: LiberoMoment) -> ActionArray:
    """Rise with open fingers."""
    goal = moment.commanded[:3] + np.array([0, 0, RETREAT_M])
    return _move_towards(
        moment,
        goal,
        _compute_rotation_facing_down(_measure_yaw_rad(moment.commanded)),
        should_open=True,
    )


def _move_only_fingers(moment: LiberoMoment, should_open: bool) -> ActionArray:
    """Move the fingers only."""
    facing_quat = _compute_rotation_facing_down(_measure_yaw_rad(moment.commanded))
    if _measure_angle_between_rad(facing_quat, moment.commanded[3:]) > MAX_UPRIGHT_RAD:
        facing_quat = moment.commanded[3:]
    return _move_towards(moment, moment.commanded[:3], facing_quat, should_open)


def _rise_and_move_over(
    moment: LiberoMoment, goal: Array, height: float, facing_quat: Array, is_open: bool
) -> Array:
    """Rise straight up to a height, then move across at this height to above `goal`."""
    missing_height = height - moment.pose[2]
    if missing_height > MAX_MISSING_HEIGHT_M:
        target = np.array([*moment.commanded[:2], height])
    else:
        target = np.array([goal[0], goal[1], height])
    return _move_towards(moment, target, facing_quat, is_open)


def _compute_height_to_clear_m(moment: LiberoMoment, goal: Array, ignored: Sequence[str]) -> float:
    """Return the height of the highest thing near the straight way from the gripper to `goal`.

    Without such a thing, it is a height below everything (-1 m).
    """
    fractions = np.linspace(0, 1, NUM_PATH_POINTS)
    path = moment.pose[:2] + fractions[:, None] * (goal[:2] - moment.pose[:2])
    highest = -1.0
    for obstacle in _list_obstacles(moment, ignored):
        if obstacle.measure_distances_m(path).min() < PATH_WIDTH_M:
            highest = max(highest, obstacle.top)
    return highest


def _list_obstacles(moment: LiberoMoment, ignored: Sequence[str]) -> list[Outline]:
    """List the outlines of everything that stands in the way: objects, fixtures and drawers."""
    boxes = {name: box for name, box in moment.objects.items() if name not in ignored}
    drawers = []
    for region in moment.regions:
        if not _is_drawer(region, moment):
            continue
        _, cabinet = _get_joint_and_cabinet_names(region)
        box = moment.objects[cabinet]
        drawers.append(_make_box_from_handle_to_cabinet_back(region, moment))
        # The cabinet's box includes the handles of closed drawers. They move with the drawers.
        without_handles = box.low + np.array([0, HANDLE_DEPTH_M, 0])
        boxes[cabinet] = Box(box.pose, without_handles, box.high)
    return [_make_outline(box) for box in [*boxes.values(), *drawers]]


def _list_open_drawers(moment: LiberoMoment) -> list[Outline]:
    """The drawers that stand out of their cabinets, without handles."""
    outlines = []
    for region in moment.regions:
        if not _is_drawer(region, moment):
            continue
        joint, _ = _get_joint_and_cabinet_names(region)
        if moment.joints[joint] < -MIN_COVER_M:
            box = _make_box_from_handle_to_cabinet_back(region, moment)
            without_handle = box.low + np.array([0, HANDLE_DEPTH_M, 0])
            outlines.append(_make_outline(Box(box.pose, without_handle, box.high)))
    return outlines


def _make_box_from_handle_to_cabinet_back(region: str, moment: LiberoMoment) -> Box:
    """The box from a drawer's handle, wherever that is, to the back of its cabinet."""
    joint, cabinet = _get_joint_and_cabinet_names(region)
    box = moment.objects[cabinet]
    height = moment.regions[region].pose[2] - box.pose[2]
    # A drawer slides along the cabinet's -y axis, and its joint is negative when it is open.
    front = box.low[1] + moment.joints[joint]
    low = np.array([box.low[0], front, height - DRAWER_HALF_HEIGHT_M])
    high = np.array([box.high[0], box.high[1], height + DRAWER_HALF_HEIGHT_M])
    return Box(box.pose, low, high)


def _compute_rotation_facing_down(yaw: float) -> Array:
    """The orientation [4] of a gripper that points down."""
    return quat_exp(torch.tensor([0.0, 0.0, yaw], dtype=torch.float64)).numpy()


def _move_towards(
    moment: LiberoMoment, goal: Array, facing_quat: Array, should_open: bool
) -> ActionArray:
    """Make the action that moves the commanded pose towards a position [3] and an orientation [4].

    The commanded pose goes at most `MAX_STEP_M` and `MAX_TURN_RAD` of the way. The action leads to
    it from the measured pose, so it is longer by the lag of the arm.
    """
    commanded_position, commanded_quat = torch.from_numpy(moment.commanded).split([3, 4])
    step, rotation = action_between_poses(
        commanded_position, commanded_quat, torch.from_numpy(goal), torch.from_numpy(facing_quat)
    )
    turn = quat_log(rotation)
    step = step * min(1.0, MAX_STEP_M / max(float(step.norm()), MIN_NORM))
    turn = turn * min(1.0, MAX_TURN_RAD / max(float(turn.norm()), MIN_NORM))

    measured_position, measured_quat = torch.from_numpy(moment.pose).split([3, 4])
    translation, action_quat = action_between_poses(
        measured_position,
        measured_quat,
        commanded_position + step,
        quat_multiply(commanded_quat, quat_exp(turn)),
    )
    action = np.concatenate([translation, quat_canonical(action_quat), [float(should_open)]])
    return action.astype(np.float32)


def _compute_corners(box: Box) -> Array:
    """Compute the corners [8, 3] of a box, base frame."""
    corners = np.array(list(itertools.product(*zip(box.low, box.high, strict=True))))
    rotated = quat_rotate(torch.from_numpy(box.pose[3:]), torch.from_numpy(corners))
    return rotated.numpy() + box.pose[:3]


def _make_outline(box: Box) -> Outline:
    """Return a box as it is seen from above."""
    corners = _compute_corners(box)
    center = corners[:, :2].mean(axis=0)
    yaw = _measure_yaw_rad(box.pose)
    along = np.array([math.cos(yaw), math.sin(yaw)])
    across = np.array([-along[1], along[0]])
    axes = np.stack([along, across], axis=1)
    half_size = np.abs((corners[:, :2] - center) @ axes).max(axis=0)
    heights = corners[:, 2]
    return Outline(center, axes, half_size, bottom=float(heights.min()), top=float(heights.max()))


def _choose_nearest_yaw_rad(yaw: float, current: float) -> float:
    """Return `yaw`, or `yaw` and half a turn, whichever is nearer to `current`, rad.

    The gripper has two fingers, so it grasps in the same way after half a turn.
    """
    return current + (yaw - current + math.pi / 2) % math.pi - math.pi / 2


def _wrap_angle_rad(angle: float) -> float:
    """Add full turns to an angle until it is in -π … π."""
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _measure_yaw_rad(pose: Array) -> float:
    """Return the rotation of a pose [7] about the vertical, rad."""
    return float(quat_to_euler(torch.from_numpy(pose[3:]), "xyz")[2])
