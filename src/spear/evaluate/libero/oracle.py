"""The scripted expert for LIBERO: knows the true state, acts through the policy's eight numbers.

Its actions pass through the same adapter and controller as a policy's, so its success says what
these let through. An action depends on the present moment only, so the oracle tries again when an
object slips.

All positions are in the base frame, m.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

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

MAX_STEP_M = 0.04
MAX_TURN_RAD = 0.3
HOVER_M = 0.07  # height above the grasp while the gripper is not above it
CLEARANCE_M = 0.04  # between what moves across and what stands below
PATH_WIDTH_M = 0.09  # things nearer to the path than this have to be cleared
FINGER_LENGTH_M = 0.04  # from the end-effector up to the palm, less a margin
RIM_DEPTH_M = 0.018  # how far below a bowl's rim its wall is gripped
RELEASE_M = 0.008  # height above its place at which an object is released
RETREAT_M = 0.1
NUM_RIM_DIRECTIONS = 16
WALL_M = 0.004  # half the thickness of a bowl's wall
OUTER_FINGER_M = 0.035  # from the middle between open fingers to the outer one
RIM_CLEARANCE_M = 0.012  # things whose top is lower than this below the fingers do not matter
PALM_HEIGHT_M = 0.045  # of the hand above the end-effector
HAND_REACH_M = 0.105  # from the middle of the hand to its ends, along which the fingers close
HAND_HALF_WIDTH_M = 0.035
ENOUGH_ROOM_M = 0.03

MAX_GRASP_OFFSET_M = 0.01
MAX_GRASP_TURN_RAD = 0.1
MAX_ARM_OFFSET_M = 0.008
MAX_PLACE_OFFSET_M = 0.012
MAX_PLACED_OFFSET_M = 0.025
MAX_PLACED_HEIGHT_M = 0.03  # an object higher above its place is still held, or lies on another
PUSH_HEIGHT_M = 0.008  # of the end-effector above a pushed plate's origin
INSIDE_PLATE_M = 0.07  # fingers that are farther from a plate's middle are not inside its rim
MAX_PUSH_STEP_M = 0.02  # how far one action pushes an object
KNOB_LEVER_M = 0.034  # from a knob's axis to where it is pushed
KNOB_ROOM_M = 0.04  # beside the knob's handle, before and after a push
KNOB_HEIGHT_M = 0.047  # of the end-effector above the stove's origin
KNOB_TILT_RAD = 0.5  # near the base the arm cannot point straight down
MAX_KNOB_OFFSET_M = 0.02  # the gripper goes down beside the knob from at most this far aside
ON_ANGLE_RAD = 0.55  # a stove is on if its knob is turned farther
OPEN_DRAWER_M = 0.145  # a drawer counts as open if it is pulled out farther
ENOUGH_DRAWER_M = 0.13  # an object goes into a drawer that is open by this much
MAX_SIDEWAYS_RAD = 0.8  # a gripper turned farther from pointing down is at a handle
DRAWER_HALF_HEIGHT_M = 0.035
DRAWER_WALL_M = 0.015  # thickness of a drawer's walls, and room for a finger
HANDLE_DEPTH_M = 0.035  # how far handles stand out of a cabinet
HANDLE_DISTANCE_M = 0.113  # from the middle of a drawer to its handle
HANDLE_HEIGHT_M = -0.004
FRONT_M = 0.09  # in front of a handle, before the gripper goes to it
STILL_SPEED_M_S = 0.01  # a slower gripper has stopped
STILL_FINGER_SPEED_M_S = 0.01  # slower fingers have stopped


SLOPE_COSINES = (0.2, 0.8)
"""Range of the cosine between the vertical and the z axis of a slanted region. Those of other
regions are level or upright, because a region may be turned by quarter turns."""
SLOPE_DISTANCE_M = 0.045  # up the slope of a rack, from its lower end to where a bottle is put

VERTICAL = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)

DOWN = np.array([1.0, 0.0, 0.0, 0.0])
"""Orientation of a gripper that points down, but for its yaw."""


@dataclass(frozen=True)
class Grasp:
    """Where the gripper closes: position [3] of the end-effector, and the yaw of its frame, rad.

    The fingers close along the y axis of that frame."""

    position: Array
    yaw: float


@dataclass(frozen=True)
class Outline:
    """A box seen from above.

    center     [2] its middle.
    axes       [2, 2] the directions of its sides, one a column.
    half_size  [2] half of its size along each axis, m.
    top        height of its highest point, m.
    """

    center: Array
    axes: Array
    half_size: Array
    top: float

    def measure_distance(self, points: Array) -> Array:
        """The horizontal distances [n] of points [n, 2]; 0 above or below the box."""
        outside = np.maximum(self._measure_excess(points), 0)
        return np.linalg.norm(outside, axis=-1)

    def measure_distance_to_sides(self, points: Array) -> Array:
        """The horizontal distances [n] of points [n, 2] inside the box from its nearest side;
        negative outside."""
        return -self._measure_excess(points).max(axis=-1)

    def _measure_excess(self, points: Array) -> Array:
        """How far points lie beyond the sides, along each axis: [n, 2], negative inside."""
        return np.abs((points - self.center) @ self.axes) - self.half_size


def choose_action(goal: Sequence[Sequence[str]], moment: LiberoMoment) -> Array:
    """The action [8] float32 at this moment (layout of `spear.types.Action`).

    goal: the conditions of the task, as LIBERO's files have them: ["on", object, place], …
    """
    for condition in goal:
        if not is_fulfilled(condition, moment):
            return pursue(condition, moment)
    return _retreat(moment)


def is_fulfilled(condition: Sequence[str], moment: LiberoMoment) -> bool:
    """Whether nothing is left to do for a condition, the gripper having let go."""
    if condition[0] == "turnon":
        return moment.joints[f"{condition[1]}_button"] > ON_ANGLE_RAD
    if condition[0] == "open":
        joint, _ = _find_drawer(condition[1])
        return moment.joints[joint] < -OPEN_DRAWER_M
    if condition[0] not in ("on", "in"):
        return False  # the oracle knows no other conditions, and waits
    source = moment.objects[condition[1]]
    target_position = find_rest_position(source, condition[2], moment)
    offset = np.linalg.norm(source.pose[:2] - target_position[:2])
    is_low = source.pose[2] < target_position[2] + MAX_PLACED_HEIGHT_M
    return bool(moment.is_open and is_low and offset < MAX_PLACED_OFFSET_M)


def pursue(condition: Sequence[str], moment: LiberoMoment) -> Array:
    """The next action towards one condition."""
    if condition[0] == "turnon":
        return _turn_on(condition[1], moment)
    if condition[0] == "open":
        return _open_drawer(condition[1], moment)
    if condition[0] not in ("on", "in"):
        return _wait(moment, is_open=True)  # the oracle knows no other conditions
    if condition[1].startswith("plate"):
        return _push(condition[1], moment.regions[condition[2]], moment)
    if _is_drawer(condition[2], moment):
        opening_action = _prepare_drawer(condition[2], moment)
        if opening_action is not None:
            return opening_action
    return _pick_and_place(condition, moment)


def _prepare_drawer(region: str, moment: LiberoMoment) -> Array | None:
    """The next action until a drawer is open and the gripper away from its handle; None then."""
    joint, cabinet = _find_drawer(region)
    if moment.joints[joint] > -ENOUGH_DRAWER_M:
        return _open_drawer(region, moment)
    offset = moment.pose[:3] - _find_handle(region, moment)
    is_sideways = _angle_between(DOWN, moment.pose[3:]) > MAX_SIDEWAYS_RAD
    if is_sideways and np.linalg.norm(offset) < FRONT_M - 0.01:
        goal = moment.commanded[:3] + 0.03 * _find_outward(moment.objects[cabinet])
        return _move_posed(moment, goal, moment.commanded[3:], True)
    return None


def _pick_and_place(condition: Sequence[str], moment: LiberoMoment) -> Array:
    source = moment.objects[condition[1]]
    target_position = find_rest_position(source, condition[2], moment)
    if moment.is_open:
        return _approach(condition[1], moment)
    if condition[1] in moment.gripped_objects and moment.finger_speed < STILL_FINGER_SPEED_M_S:
        return _carry(condition[1], target_position, moment)
    if moment.finger_speed >= STILL_FINGER_SPEED_M_S:
        return _wait(moment, is_open=False)
    return _wait(moment, is_open=True)


def find_rest_position(source: Box, place_name: str, moment: LiberoMoment) -> Array:
    """Where an object's origin should come to rest [3]."""
    below_origin = source.pose[2] - _corners(source)[:, 2].min()
    if place_name in moment.regions:
        region = moment.regions[place_name]
        z_axis = quat_rotate(torch.from_numpy(region.pose[3:]), VERTICAL).numpy()
        if SLOPE_COSINES[0] < z_axis[2] < SLOPE_COSINES[1]:
            # The region is the lower end of a rack's slope, and its z axis points up the slope.
            return region.pose[:3] + SLOPE_DISTANCE_M * z_axis + np.array([0, 0, below_origin])
        return np.array([*region.pose[:2], region.pose[2] + below_origin])
    target = moment.objects[place_name]
    center = _corners(target).mean(axis=0)
    # A plate or a bowl is hollow: what is put there sinks below its rim.
    return np.array([center[0], center[1], target.pose[2] + 0.01 + below_origin])


def find_grasps(name: str, moment: LiberoMoment) -> list[Grasp]:
    """All good grasps of an object."""
    box = moment.objects[name]
    if "bowl" in name:
        return _find_rim_grasps(name, moment)

    corners = _corners(box)
    center = corners.mean(axis=0)
    top = corners[:, 2].max()
    bottom = corners[:, 2].min()
    height = max((top + bottom) / 2, top - FINGER_LENGTH_M, bottom + 0.012)
    axes = quat_rotate(torch.from_numpy(box.pose[3:]), torch.eye(3, dtype=torch.float64)).numpy()
    size = box.high - box.low
    # Of the object's own axes, those that lie level; the fingers close along the shortest.
    level_axes = [k for k in range(3) if abs(axes[k][2]) < 0.5]
    grasps = []
    shortest = min(level_axes, key=lambda k: size[k])
    for axis in level_axes:
        if size[axis] < size[shortest] + 0.005:
            closing = axes[axis]
            yaw = math.atan2(closing[1], closing[0]) - math.pi / 2
            grasps.append(Grasp(np.array([center[0], center[1], height]), yaw))
    return grasps


def _find_rim_grasps(name: str, moment: LiberoMoment) -> list[Grasp]:
    """Grasps of a bowl's wall, from all sides where fingers and hand have room."""
    box = moment.objects[name]
    corners = _corners(box)
    center = corners.mean(axis=0)
    rim_height = corners[:, 2].max()
    bottom = corners[:, 2].min()
    radius = float(np.min(box.high[:2] - box.low[:2])) / 2 - WALL_M
    depth = min(RIM_DEPTH_M, rim_height - bottom - 0.012)
    obstacles = _list_obstacles(moment, [name])

    grasps = []
    rooms = []
    for index in range(NUM_RIM_DIRECTIONS):
        angle = 2 * math.pi * index / NUM_RIM_DIRECTIONS
        outward = np.array([math.cos(angle), math.sin(angle)])
        point = center[:2] + radius * outward
        grasp = Grasp(np.array([*point, rim_height - depth]), angle - math.pi / 2)
        grasps.append(grasp)
        rooms.append(_measure_room(grasp, center[:2], obstacles))
    enough = min(ENOUGH_ROOM_M, max(rooms))
    return [grasp for grasp, room in zip(grasps, rooms, strict=True) if room >= enough - 1e-9]


def _measure_room(grasp: Grasp, center: Array, obstacles: Sequence[Outline]) -> float:
    """How far fingers and hand stay away from obstacles when they are at a grasp of a rim, m.

    center: [2] the bowl's middle. A drawer around it is an obstacle by its walls only.
    """
    point = grasp.position[:2]
    outward = (point - center) / np.linalg.norm(point - center)
    outer_finger = point + OUTER_FINGER_M * outward
    reaches = np.linspace(-HAND_REACH_M, HAND_REACH_M, 9)
    hand_points = point + reaches[:, None] * outward
    room = 1.0
    for obstacle in obstacles:
        if obstacle.top > grasp.position[2] - RIM_CLEARANCE_M:
            if obstacle.measure_distance(center) == 0:
                distance = obstacle.measure_distance_to_sides(outer_finger) - DRAWER_WALL_M
            else:
                distance = obstacle.measure_distance(outer_finger)
            room = min(room, float(distance))
        if obstacle.top > grasp.position[2] + PALM_HEIGHT_M:
            distances = obstacle.measure_distance(hand_points)
            room = min(room, float(distances.min()) - HAND_HALF_WIDTH_M)
    return room


def _approach(name: str, moment: LiberoMoment) -> Array:
    """Above the object first, then down to it, then close."""
    current_yaw = _yaw(moment.commanded)
    best = min(
        find_grasps(name, moment),
        key=lambda grasp: (
            abs(_nearest_yaw(grasp.yaw, current_yaw) - current_yaw)
            + 3 * float(np.linalg.norm(grasp.position[:2] - moment.pose[:2]))
        ),
    )
    yaw = _nearest_yaw(best.yaw, current_yaw)
    goal = best.position.copy()
    offset = float(np.linalg.norm(moment.pose[:2] - goal[:2]))
    turn = abs(_wrap(yaw - _yaw(moment.pose)))
    is_aligned = offset < MAX_GRASP_OFFSET_M and turn < MAX_GRASP_TURN_RAD
    if not is_aligned:
        hover = goal[2] + HOVER_M
        if offset > 0.03:
            hover = max(hover, _height_to_clear(moment, goal, [name]) + CLEARANCE_M)
        return _move_over(moment, goal, hover, yaw, True)
    is_there = np.linalg.norm(moment.pose[:3] - goal) < MAX_ARM_OFFSET_M
    is_blocked = moment.speed < STILL_SPEED_M_S and moment.pose[2] < goal[2] + 0.02
    return _move_towards(moment, goal, yaw, not (is_there or is_blocked))


def _carry(name: str, target_position: Array, moment: LiberoMoment) -> Array:
    """Up, across, down, open."""
    box = moment.objects[name]
    offset = target_position[:2] - box.pose[:2]
    distance = float(np.linalg.norm(offset))
    goal = moment.pose[:3].copy()
    goal[:2] += offset
    hanging = moment.pose[2] - _corners(box)[:, 2].min()
    if distance > MAX_PLACE_OFFSET_M:
        height = _height_to_clear(moment, goal, [name]) + CLEARANCE_M + hanging
        height = max(height, moment.pose[2] + target_position[2] - box.pose[2] + 0.05)
        return _move_over(moment, goal, height, _yaw(moment.commanded), False)
    goal[2] = moment.pose[2] + target_position[2] + RELEASE_M - box.pose[2]
    is_low = box.pose[2] < target_position[2] + RELEASE_M + 0.006
    is_blocked = moment.speed < STILL_SPEED_M_S and box.pose[2] < target_position[2] + 0.05
    return _move_towards(moment, goal, _yaw(moment.commanded), is_low or is_blocked)


def _push(name: str, region: Region, moment: LiberoMoment) -> Array:
    """Push a plate along the table to a region, with closed fingers inside its rim."""
    center = _corners(moment.objects[name]).mean(axis=0)
    displacement = region.pose[:2] - center[:2]
    distance = float(np.linalg.norm(displacement))
    direction_2d = displacement / max(distance, 1e-6)
    yaw = _nearest_yaw(math.atan2(direction_2d[1], direction_2d[0]), _yaw(moment.commanded))
    low = moment.objects[name].pose[2] + PUSH_HEIGHT_M

    is_inside = np.linalg.norm(moment.pose[:2] - center[:2]) < INSIDE_PLATE_M
    if moment.pose[2] > low + 0.012 or not is_inside:
        if np.linalg.norm(moment.pose[:2] - center[:2]) > 0.015:
            height = max(low + HOVER_M, _height_to_clear(moment, center, [name]) + CLEARANCE_M)
            return _move_over(moment, center, height, yaw, False)
        return _move_towards(moment, np.array([*center[:2], low]), yaw, False)
    # The fingers meet the rim ahead, and take the plate as far as it has to go.
    goal = moment.pose[:2] + min(distance, MAX_PUSH_STEP_M) * direction_2d
    return _move_towards(moment, np.array([*goal, low]), yaw, False)


def _turn_on(name: str, moment: LiberoMoment) -> Array:
    """Turn a stove's knob: beside the end of its handle, down, and push it round."""
    box = moment.objects[name]
    knob = box.pose[:2]
    angle = moment.joints[f"{name}_button"]
    along = np.array([math.cos(angle), math.sin(angle)])
    round_ = np.array([-along[1], along[0]])
    start = knob + KNOB_LEVER_M * along - KNOB_ROOM_M * round_
    low = box.pose[2] + KNOB_HEIGHT_M
    facing = quat_exp(torch.tensor([0.0, KNOB_TILT_RAD, 0.0], dtype=torch.float64)).numpy()
    if moment.pose[2] > low + 0.015:
        offset = float(np.linalg.norm(moment.pose[:2] - start))
        height = low if offset < MAX_KNOB_OFFSET_M else low + HOVER_M
        return _move_posed(moment, np.array([*start, height]), facing, False)
    goal = knob + KNOB_LEVER_M * along + KNOB_ROOM_M * round_
    return _move_posed(moment, np.array([*goal, low]), facing, False)


def _open_drawer(region: str, moment: LiberoMoment) -> Array:
    """Take a drawer by its handle, from in front, and pull."""
    _, cabinet = _find_drawer(region)
    out = _find_outward(moment.objects[cabinet])
    handle = _find_handle(region, moment)
    yaw = math.atan2(out[1], out[0])
    facing = _face_sideways(yaw, moment)
    in_front = handle + FRONT_M * out
    offset = moment.pose[:3] - handle
    aside = float(np.linalg.norm(offset - (offset @ out) * out))
    turn = _angle_between(facing, moment.pose[3:])
    is_at_handle = aside < 0.012 and offset @ out < 0.012
    if moment.is_open and not is_at_handle:
        if aside > 0.012 or turn > 0.12:
            if offset @ out < FRONT_M - 0.02 and aside < 0.1:
                return _move_posed(moment, moment.commanded[:3] + 0.03 * out, facing, True)
            return _move_posed(moment, in_front, facing, True)
        return _move_posed(moment, handle, facing, True)
    if moment.is_open:
        return _move_posed(moment, moment.commanded[:3], facing, False)
    if moment.finger_speed >= STILL_FINGER_SPEED_M_S:
        return _move_posed(moment, moment.commanded[:3], facing, False)
    if aside > 0.03 or offset @ out > 0.03:
        return _move_posed(moment, moment.commanded[:3], facing, True)
    return _move_posed(moment, moment.commanded[:3] + 0.03 * out, facing, False)


def _is_drawer(place_name: str, moment: LiberoMoment) -> bool:
    return place_name in moment.regions and _find_drawer(place_name)[0] in moment.joints


def _find_outward(cabinet: Box) -> Array:
    """The direction [3] in which a cabinet's drawers open."""
    outward = torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)
    return quat_rotate(torch.from_numpy(cabinet.pose[3:]), outward).numpy()


def _find_handle(region: str, moment: LiberoMoment) -> Array:
    """The middle of a drawer's handle [3]."""
    _, cabinet = _find_drawer(region)
    middle = moment.regions[region].pose[:3]
    handle = middle + HANDLE_DISTANCE_M * _find_outward(moment.objects[cabinet])
    return handle + np.array([0, 0, HANDLE_HEIGHT_M])


def _find_drawer(region: str) -> tuple[str, str]:
    """The joint and the cabinet of a drawer's region, for example
    "wooden_cabinet_1_middle_region"."""
    drawer = region.removesuffix("_region")
    cabinet = drawer.rsplit("_", 1)[0]
    return f"{drawer}_level", cabinet


def _face_sideways(yaw: float, moment: LiberoMoment) -> Array:
    """The orientation [4] of a gripper that points against the direction `yaw`, level, with its
    fingers one above the other. Of the two such orientations, the one nearer to the present."""
    turned = quat_exp(torch.tensor([0.0, 0.0, yaw], dtype=torch.float64))
    # A quarter turn about y tips a gripper that points down so that it points along -x. Before it,
    # a quarter turn about the vertical, either way, brings the axis of the fingers upright.
    tipped = quat_exp(torch.tensor([0.0, math.pi / 2, 0.0], dtype=torch.float64))
    candidates = []
    for roll in (math.pi / 2, -math.pi / 2):
        rolled = quat_exp(torch.tensor([0.0, 0.0, roll], dtype=torch.float64))
        candidates.append(quat_multiply(turned, quat_multiply(tipped, rolled)).numpy())
    return min(candidates, key=lambda facing: _angle_between(facing, moment.commanded[3:]))


def _angle_between(first: Array, second: Array) -> float:
    return float(quat_distance(torch.from_numpy(first), torch.from_numpy(second)))


def _retreat(moment: LiberoMoment) -> Array:
    goal = moment.commanded[:3] + np.array([0, 0, RETREAT_M])
    return _move_towards(moment, goal, _yaw(moment.commanded), True)


def _wait(moment: LiberoMoment, is_open: bool) -> Array:
    """Move the fingers only."""
    return _move_towards(moment, moment.commanded[:3], _yaw(moment.commanded), is_open)


def _move_over(
    moment: LiberoMoment, goal: Array, height: float, yaw: float, is_open: bool
) -> Array:
    """Rise to a height, then move across at it."""
    lacking = height - moment.pose[2]
    if lacking > 0.02:
        # Across only as fast as the arm rises, so that it clears what stands near.
        target = np.array([*moment.commanded[:2], height])
    else:
        target = np.array([goal[0], goal[1], height])
    return _move_towards(moment, target, yaw, is_open)


def _height_to_clear(moment: LiberoMoment, goal: Array, ignored: Sequence[str]) -> float:
    """The top of the highest thing near the straight way from the end-effector to a position."""
    fractions = np.linspace(0, 1, 12)
    path = moment.pose[:2] + fractions[:, None] * (goal[:2] - moment.pose[:2])
    highest = -1.0
    for obstacle in _list_obstacles(moment, ignored):
        if obstacle.measure_distance(path).min() < PATH_WIDTH_M:
            highest = max(highest, obstacle.top)
    return highest


def _list_obstacles(moment: LiberoMoment, ignored: Sequence[str]) -> list[Outline]:
    """Everything that stands in the way: objects, fixtures and drawers.

    The box of a drawer reaches from its front, wherever that is, to the back of its cabinet.
    """
    boxes = {name: box for name, box in moment.objects.items() if name not in ignored}
    drawers = []
    for region in moment.regions:
        if not _is_drawer(region, moment):
            continue
        joint, cabinet = _find_drawer(region)
        box = moment.objects[cabinet]
        height = moment.regions[region].pose[2] - box.pose[2]
        # A drawer slides along the cabinet's -y axis, and its joint is negative when it is open.
        front = box.low[1] + moment.joints[joint]
        low = np.array([box.low[0], front, height - DRAWER_HALF_HEIGHT_M])
        high = np.array([box.high[0], box.high[1], height + DRAWER_HALF_HEIGHT_M])
        drawers.append(Box(box.pose, low, high))
        # The cabinet's box includes the handles of closed drawers. They move with the drawers.
        without_handles = box.low + np.array([0, HANDLE_DEPTH_M, 0])
        boxes[cabinet] = Box(box.pose, without_handles, box.high)
    return [_outline(box) for box in [*boxes.values(), *drawers]]


def _move_towards(moment: LiberoMoment, goal: Array, yaw: float, is_open: bool) -> Array:
    """A step of the commanded pose towards a position [3] and a gripper that points down."""
    facing = quat_exp(torch.tensor([0.0, 0.0, yaw], dtype=torch.float64)).numpy()
    return _move_posed(moment, goal, facing, is_open)


def _move_posed(moment: LiberoMoment, goal: Array, facing: Array, is_open: bool) -> Array:
    """A step of the commanded pose towards a position [3] and an orientation [4]."""
    position, orientation = torch.from_numpy(moment.commanded).split([3, 4])
    move, rotation = action_between_poses(
        position, orientation, torch.from_numpy(goal), torch.from_numpy(facing)
    )
    turn = quat_log(rotation)
    move = move * min(1.0, MAX_STEP_M / max(float(move.norm()), 1e-9))
    turn = turn * min(1.0, MAX_TURN_RAD / max(float(turn.norm()), 1e-9))
    action = np.concatenate([move, quat_canonical(quat_exp(turn)), [float(is_open)]])
    return action.astype(np.float32)


def _corners(box: Box) -> Array:
    """The corners [8, 3] of a box, base frame."""
    corners = np.array(list(itertools.product(*zip(box.low, box.high, strict=True))))
    rotated = quat_rotate(torch.from_numpy(box.pose[3:]), torch.from_numpy(corners))
    return rotated.numpy() + box.pose[:3]


def _outline(box: Box) -> Outline:
    corners = _corners(box)
    center = corners[:, :2].mean(axis=0)
    yaw = _yaw(box.pose)
    along = np.array([math.cos(yaw), math.sin(yaw)])
    across = np.array([-along[1], along[0]])
    axes = np.stack([along, across], axis=1)
    half_size = np.abs((corners[:, :2] - center) @ axes).max(axis=0)
    return Outline(center, axes, half_size, top=float(corners[:, 2].max()))


def _nearest_yaw(yaw: float, current: float) -> float:
    """Of a gripper's two equal yaws, half a turn apart, the one nearer to the current."""
    return current + (yaw - current + math.pi / 2) % math.pi - math.pi / 2


def _wrap(angle: float) -> float:
    return (angle + math.pi) % (2 * math.pi) - math.pi


def _yaw(pose: Array) -> float:
    return float(quat_to_euler(torch.from_numpy(pose[3:]), "xyz")[2])
