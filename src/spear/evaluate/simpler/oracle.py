"""The scripted expert for SIMPLER: knows the true state, acts through the policy's eight numbers.

Its actions pass through the same adapter and controller as a policy's, so its success says what
these let through. An action depends on the present moment only, so the oracle tries again when an
object slips.

The controller moves a commanded pose that the arm follows with a lag. Steps are therefore planned
from the commanded pose, and what has been reached is judged by the measured one.
"""

import math

import numpy as np
import torch

from spear.evaluate.simpler.tasks import TASKS, Task, Truth
from spear.geometry import (
    action_between_poses,
    quat_canonical,
    quat_exp,
    quat_log,
    quat_to_euler,
    quat_to_matrix,
)
from spear.types import Array

MAX_STEP = 0.03  # longest step, m
MAX_TURN = 0.3  # largest rotation of a step, rad
HOVER_M = 0.06  # height above the grasp while the gripper is not above it
CARRY_M = 0.06  # height above its place at which an object is carried
RETREAT_M = 0.1  # height above the placed object to which the gripper retreats
MIN_HEIGHT_M = 0.016  # of the end-effector above the table: at 0.0145 m the finger tips touch it
MIN_HELD_OPENING = 0.12  # a closed gripper that is open by more has something between its fingers

MAX_GRASP_OFFSET_M = 0.012  # horizontally; with more, the gripper does not descend or close
MAX_GRASP_TURN_RAD = 0.1
MAX_COMMAND_OFFSET_M = 1e-3  # the commanded pose has arrived
MAX_ARM_OFFSET_M = 0.006  # the arm has arrived, or lags behind by no more
MAX_ABOVE_OFFSET_M = 0.015  # a carried object is above its place
MAX_PLACE_OFFSET_M = 0.008  # a carried object may be released
MAX_PLACED_OFFSET_M = 0.03  # a released object lies in its place
MAX_PLACED_HEIGHT_M = 0.02
MAX_BLOCKED_HEIGHT_M = 0.03  # an object that rests on something lower than this is not lowered
ACROSS_MARGIN_M = 0.02  # how far below `CARRY_M` an object may already move across
RELEASE_MARGIN_M = 0.004  # above the task's release height


def choose_action(task: str, truth: Truth) -> Array:
    """The action [8] float32 at this moment (layout of `spear.types.Action`)."""
    grasp = TASKS[task]
    # The object's origin should come to rest on top of the goal.
    goal_top = truth.goal[2] + truth.goal_size[2] / 2
    rest_position = np.array([truth.goal[0], truth.goal[1], goal_top + truth.source_size[2] / 2])
    offset = float(np.linalg.norm(truth.source[:2] - rest_position[:2]))
    if truth.open:
        height = abs(truth.source[2] - rest_position[2])
        is_placed = (
            offset < MAX_PLACED_OFFSET_M and height < MAX_PLACED_HEIGHT_M + grasp.release_height_m
        )
        return _retreat(truth, rest_position) if is_placed else _approach(truth, grasp)
    has_object = truth.opening > MIN_HELD_OPENING
    if truth.closing and has_object:
        return _wait(truth, opened=False)
    if not has_object:
        return _wait(truth, opened=True)
    return _carry(truth, grasp, rest_position, offset)


def _retreat(truth: Truth, rest_position: Array) -> Array:
    """Straight up, away from the placed object."""
    position = np.array([truth.commanded[0], truth.commanded[1], rest_position[2] + RETREAT_M])
    return _move_towards(truth, position, _yaw(truth.commanded), True)


def _wait(truth: Truth, opened: bool) -> Array:
    """Move the fingers only."""
    return _move_towards(truth, truth.commanded[:3], _yaw(truth.commanded), opened)


def _approach(truth: Truth, grasp: Task) -> Array:
    """Above the object first, then down to it, then close."""
    axis = quat_to_matrix(torch.from_numpy(truth.source[3:])).numpy()[:, 0]
    point = truth.source[:3] + grasp.grasp_offset_m * axis
    goal = np.array([point[0], point[1], max(point[2], MIN_HEIGHT_M)])

    # Of the equally good directions take the nearest.
    period = 2 * math.pi / grasp.num_grasp_directions
    current_yaw = _yaw(truth.commanded)
    object_yaw = math.atan2(axis[1], axis[0])
    yaw = current_yaw + (object_yaw - current_yaw + period / 2) % period - period / 2

    offset = float(np.linalg.norm(truth.measured[:2] - goal[:2]))
    turn = abs((yaw - _yaw(truth.measured) + math.pi) % (2 * math.pi) - math.pi)
    if offset > MAX_GRASP_OFFSET_M or turn > MAX_GRASP_TURN_RAD:
        goal[2] += HOVER_M
    is_aligned = offset <= MAX_GRASP_OFFSET_M and turn <= MAX_GRASP_TURN_RAD
    is_commanded = np.linalg.norm(truth.commanded[:3] - goal) < MAX_COMMAND_OFFSET_M
    is_near = np.linalg.norm(truth.measured[:3] - goal) < MAX_ARM_OFFSET_M
    should_close = is_aligned and is_commanded and (is_near or truth.still)
    return _move_towards(truth, goal, yaw, not should_close)


def _carry(truth: Truth, grasp: Task, rest_position: Array, offset: float) -> Array:
    """Up, across, down, open.

    The object comes down while it still moves across: a policy that cannot tell 5 mm from 15 mm
    learns to hover from an expert that waits to be exact.
    """
    height = truth.source[2] - rest_position[2]
    goal = truth.commanded[:3].copy()
    is_above = offset < MAX_ABOVE_OFFSET_M
    if is_above or height > CARRY_M - ACROSS_MARGIN_M:
        goal[:2] = truth.measured[:2] + rest_position[:2] - truth.source[:2]
    goal[2] = truth.measured[2] - height + (grasp.release_height_m if is_above else CARRY_M)

    lag = float(np.linalg.norm(truth.commanded[:3] - truth.measured[:3]))
    is_blocked = truth.still and lag > MAX_ARM_OFFSET_M and height < MAX_BLOCKED_HEIGHT_M
    is_placed = offset < MAX_PLACE_OFFSET_M and height < grasp.release_height_m + RELEASE_MARGIN_M
    should_open = is_placed or (is_above and is_blocked)
    return _move_towards(truth, goal, _yaw(truth.commanded), should_open)


def _move_towards(truth: Truth, goal: Array, yaw: float, opened: bool) -> Array:
    """A step of the commanded pose towards a position [3] and a gripper that points down.

    yaw     how the gripper is turned about the vertical, rad.
    opened  whether the gripper should be open.
    """
    facing = quat_exp(torch.tensor([0.0, 0.0, yaw], dtype=torch.float64))
    position, orientation = torch.from_numpy(truth.commanded).split([3, 4])
    move, rotation = action_between_poses(position, orientation, torch.from_numpy(goal), facing)
    turn = quat_log(rotation)
    move = move * min(1.0, MAX_STEP / max(float(move.norm()), 1e-9))
    turn = turn * min(1.0, MAX_TURN / max(float(turn.norm()), 1e-9))
    action = np.concatenate([move, quat_canonical(quat_exp(turn)), [float(opened)]])
    return action.astype(np.float32)


def _yaw(pose: Array) -> float:
    return float(quat_to_euler(torch.from_numpy(pose[3:]), "xyz")[2])
