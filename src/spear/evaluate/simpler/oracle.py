"""The oracle: a scripted expert for SIMPLER, which knows the true state.

Its actions have the same eight numbers as a policy's, and pass through the same adapter and
controller. So its success shows what adapter and controller allow. An action depends only on the
present state, so the oracle tries again when an object slips.

The controller moves a *commanded pose*, which the arm follows with a lag. Therefore a step is
planned from the commanded pose, and the *measured pose* says what has been reached.

The *source* is the object to move, and the *goal* is the object or place to put it on.
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

ActionArray = Array
"""One action [8] float32, laid out as `spear.types.Action`."""

MAX_STEP_M = 0.03  # longest translation of an action
MAX_TURN_RAD = 0.3  # largest rotation of an action
HOVER_M = 0.06  # height above the grasp at which the gripper moves until it is above the object
CARRY_M = 0.06  # height above its place at which the object is carried
RETREAT_M = 0.1  # height above the placed object to which the gripper retreats
MIN_HEIGHT_M = 0.016  # lowest end-effector height: at 0.0145 m the finger tips touch the table
# A closed gripper with a larger opening (1 is open) has something between its fingers.
MIN_HELD_OPENING = 0.12

# The gripper descends and closes only if it is within this horizontal distance and this angle of
# the grasp.
MAX_GRASP_OFFSET_M = 0.012
MAX_GRASP_TURN_RAD = 0.1
MAX_COMMAND_OFFSET_M = 1e-3  # from commanded pose to target, if the command has reached the target
MAX_TARGET_OFFSET_M = 0.006  # from measured pose to target, if the arm has reached the target
MAX_LAG_M = 0.006  # from measured to commanded pose, if nothing blocks an arm that stands still
MAX_ABOVE_OFFSET_M = 0.015  # horizontal distance within which a carried object is above its place
MAX_PLACE_OFFSET_M = 0.008  # horizontal distance within which a carried object may be released
# Horizontal and vertical distance within which a released object lies in its place.
MAX_PLACED_OFFSET_M = 0.03
MAX_PLACED_HEIGHT_M = 0.02
MAX_BLOCKED_HEIGHT_M = 0.03  # an object that is stopped below this height rests on something
ACROSS_MARGIN_M = 0.02  # an object moves across once it is higher than CARRY_M minus this margin
RELEASE_MARGIN_M = 0.004  # an object is released up to so far above the task's release height


def choose_action(task_name: str, truth: Truth) -> ActionArray:
    """Choose the next action.

    Args:
        task_name: One of `TASKS`.
        truth: The true state.

    Returns:
        [8] float32 (layout of `spear.types.Action`).
    """
    task = TASKS[task_name]
    # Where the origin of the source is when the source rests on top of the goal.
    goal_top = truth.goal[2] + truth.goal_size[2] / 2
    rest_position = np.array([truth.goal[0], truth.goal[1], goal_top + truth.source_size[2] / 2])
    offset = float(np.linalg.norm(truth.source[:2] - rest_position[:2]))  # horizontal
    if truth.is_commanded_open:
        height = abs(truth.source[2] - rest_position[2])
        max_height = MAX_PLACED_HEIGHT_M + task.release_height_m
        is_placed = offset < MAX_PLACED_OFFSET_M and height < max_height
        if is_placed:
            return _retreat(truth, rest_position)
        return _approach_and_grasp(truth, task)

    has_object = truth.opening > MIN_HELD_OPENING
    if truth.is_closing and has_object:
        return _move_fingers_only(truth, should_open=False)
    if not has_object:
        return _move_fingers_only(truth, should_open=True)
    return _carry_and_release(truth, task, rest_position, offset)


def _retreat(truth: Truth, rest_position: Array) -> ActionArray:
    """Move straight up, away from the placed object."""
    position = np.array([truth.commanded[0], truth.commanded[1], rest_position[2] + RETREAT_M])
    return _move_towards(truth, position, _measure_yaw_rad(truth.commanded), should_open=True)


def _move_fingers_only(truth: Truth, should_open: bool) -> ActionArray:
    """Move only the fingers."""
    return _move_towards(
        truth, truth.commanded[:3], _measure_yaw_rad(truth.commanded), should_open=should_open
    )


def _approach_and_grasp(truth: Truth, task: Task) -> ActionArray:
    """Move above the object, then down to it, then close the gripper."""
    # The grasp is at a point on the object's x axis, at some distance from the object's origin.
    axis = quat_to_matrix(torch.from_numpy(truth.source[3:])).numpy()[:, 0]
    point = truth.source[:3] + task.grasp_offset_m * axis
    target = np.array([point[0], point[1], max(point[2], MIN_HEIGHT_M)])

    # Choose the equally good direction that is nearest to the commanded one: the difference is
    # wrapped to -period/2 … period/2.
    period = 2 * math.pi / task.num_grasp_directions
    current_yaw = _measure_yaw_rad(truth.commanded)
    object_yaw = math.atan2(axis[1], axis[0])
    yaw = current_yaw + (object_yaw - current_yaw + period / 2) % period - period / 2

    offset = float(np.linalg.norm(truth.measured[:2] - target[:2]))
    # The angle that is left to turn, wrapped to 0 … π.
    turn = abs((yaw - _measure_yaw_rad(truth.measured) + math.pi) % (2 * math.pi) - math.pi)
    is_aligned = offset <= MAX_GRASP_OFFSET_M and turn <= MAX_GRASP_TURN_RAD
    if not is_aligned:
        target[2] += HOVER_M
    is_commanded = np.linalg.norm(truth.commanded[:3] - target) < MAX_COMMAND_OFFSET_M
    is_near = np.linalg.norm(truth.measured[:3] - target) < MAX_TARGET_OFFSET_M
    should_close = is_aligned and is_commanded and (is_near or truth.is_still)
    return _move_towards(truth, target, yaw, should_open=not should_close)


def _carry_and_release(
    truth: Truth, task: Task, rest_position: Array, horizontal_offset_m: float
) -> ActionArray:
    """Carry the object up, across and down, then open the gripper.

    The object comes down while it still moves across. If the oracle waited until the object is
    exactly above its place, a policy, which cannot tell 5 mm from 15 mm, would learn to hover.

    Args:
        truth: The true state.
        task: The task.
        rest_position: [3] where the origin of the object should be at the end.
        horizontal_offset_m: Distance of the object from this position.
    """
    height = truth.source[2] - rest_position[2]
    # The object moves straight up until it is high enough. Then the end effector has to move across
    # as far as the object does.
    target = truth.commanded[:3].copy()
    is_above = horizontal_offset_m < MAX_ABOVE_OFFSET_M
    if is_above or height > CARRY_M - ACROSS_MARGIN_M:
        target[:2] = truth.measured[:2] + rest_position[:2] - truth.source[:2]
    target_height = task.release_height_m if is_above else CARRY_M
    target[2] = truth.measured[2] - height + target_height

    # Something blocks the object if the arm stands still far from its command.
    lag_m = float(np.linalg.norm(truth.commanded[:3] - truth.measured[:3]))
    is_blocked = truth.is_still and lag_m > MAX_LAG_M and height < MAX_BLOCKED_HEIGHT_M
    is_placed = (
        horizontal_offset_m < MAX_PLACE_OFFSET_M
        and height < task.release_height_m + RELEASE_MARGIN_M
    )
    should_open = is_placed or (is_above and is_blocked)
    return _move_towards(truth, target, _measure_yaw_rad(truth.commanded), should_open=should_open)


def _move_towards(truth: Truth, target: Array, yaw: float, should_open: bool) -> ActionArray:
    """Compute an action that moves the commanded pose towards a target, by at most one step.

    Args:
        truth: The true state.
        target: [3] the target's position, m.
        yaw: The target's rotation about the vertical, rad. The gripper points down.
        should_open: Whether the gripper should be open.

    Returns:
        [8] float32.
    """
    target_orientation = quat_exp(torch.tensor([0.0, 0.0, yaw], dtype=torch.float64))
    position, orientation = torch.from_numpy(truth.commanded).split([3, 4])
    translation, rotation = action_between_poses(
        position, orientation, torch.from_numpy(target), target_orientation
    )
    turn = quat_log(rotation)  # rotation vector [3]
    translation = translation * min(1.0, MAX_STEP_M / max(float(translation.norm()), 1e-9))
    turn = turn * min(1.0, MAX_TURN_RAD / max(float(turn.norm()), 1e-9))
    action = np.concatenate([translation, quat_canonical(quat_exp(turn)), [float(should_open)]])
    return action.astype(np.float32)


def _measure_yaw_rad(pose: Array) -> float:
    """Return the rotation of a pose [7] about the vertical, rad."""
    return float(quat_to_euler(torch.from_numpy(pose[3:]), "xyz")[2])
