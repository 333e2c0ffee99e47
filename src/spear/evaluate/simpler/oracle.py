"""The scripted reference for SIMPLER: knows the true state, acts through the policy's own eight numbers.

It takes the same way as a policy (canonical action, adapter, controller), so its success says what that way
lets through. Its action depends on the present moment only, so it tries again when something slips.

The controller moves a commanded pose that the arm follows with a lag, so steps are planned from the commanded
pose, and what has been reached is judged by the measured one.
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

MAX_STEP = 0.03
"""Longest step, m."""
MAX_TURN = 0.3
"""Largest turn of a step, rad."""
HOVER = 0.06
"""Height over the grasp while the gripper is not above it, m."""
CARRY = 0.06
"""Height over its place at which an object is carried, m."""
LOWEST = 0.016
"""Lowest height of the end-effector over the table: at 0.0145 m the finger tips touch it, m."""
HELD = 0.12
"""A closed gripper that is open by more than this has something between its fingers."""


def choose_action(task: str, t: Truth) -> Array:
    """[8] float32: the action at this moment (layout of `spear.types.Action`)."""
    grip = TASKS[task]
    # Where the object's origin is to come: on top of the goal.
    top = t.goal[2] + t.goal_size[2] / 2
    rest = np.array([t.goal[0], t.goal[1], top + t.source_size[2] / 2])
    aside = float(np.linalg.norm(t.source[:2] - rest[:2]))
    if t.open:
        if aside < 0.03 and abs(t.source[2] - rest[2]) < 0.02 + grip.drop:
            away = np.array([t.commanded[0], t.commanded[1], rest[2] + 0.1])
            return _to(t, away, _yaw(t.commanded), True)
        return _approach(t, grip)
    if t.closing and t.opening > HELD:
        return _to(t, t.commanded[:3], _yaw(t.commanded), False)
    if t.opening <= HELD:
        return _to(t, t.commanded[:3], _yaw(t.commanded), True)
    return _carry(t, grip, rest, aside)


def _approach(t: Truth, grip: Task) -> Array:
    """Above the object first, then down to it, then close."""
    axis = quat_to_matrix(torch.from_numpy(t.source[3:])).numpy()[:, 0]
    point = t.source[:3] + grip.along * axis
    period, now = 2 * math.pi / grip.turns, _yaw(t.commanded)  # of the good directions, the nearest
    yaw = now + (math.atan2(axis[1], axis[0]) - now + period / 2) % period - period / 2
    goal = np.array([point[0], point[1], max(point[2], LOWEST)])
    aside = float(np.linalg.norm(t.measured[:2] - goal[:2]))
    turned = abs((yaw - _yaw(t.measured) + math.pi) % (2 * math.pi) - math.pi)
    if aside > 0.012 or turned > 0.1:
        goal[2] += HOVER
    there = np.linalg.norm(t.commanded[:3] - goal) < 1e-3
    near = np.linalg.norm(t.measured[:3] - goal) < 0.006
    closing = aside <= 0.012 and turned <= 0.1 and there and (near or t.still)
    return _to(t, goal, yaw, not closing)


def _carry(t: Truth, grip: Task, rest: Array, aside: float) -> Array:
    """Up, across, down, open. It comes down while it still moves across: a policy that cannot tell 5 mm from
    15 learns to hover from an expert that waits to be exact."""
    height = t.source[2] - rest[2]
    goal = t.commanded[:3].copy()
    above = aside < 0.015
    if above or height > CARRY - 0.02:
        goal[:2] = t.measured[:2] + rest[:2] - t.source[:2]
    goal[2] = t.measured[2] - height + (grip.drop if above else CARRY)
    lag = float(np.linalg.norm(t.commanded[:3] - t.measured[:3]))
    blocked = t.still and lag > 0.006 and height < 0.03
    placed = aside < 0.008 and height < grip.drop + 0.004
    return _to(t, goal, _yaw(t.commanded), placed or (above and blocked))


def _to(t: Truth, goal: Array, yaw: float, opened: bool) -> Array:
    """A step of the commanded pose towards a place [3] and a gripper that points down, turned by `yaw`."""
    facing = quat_exp(torch.tensor([0.0, 0.0, yaw], dtype=torch.float64))
    place, rotation = torch.from_numpy(t.commanded).split([3, 4])
    move, rotation = action_between_poses(place, rotation, torch.from_numpy(goal), facing)
    turn = quat_log(rotation)
    move = move * min(1.0, MAX_STEP / max(float(move.norm()), 1e-9))
    turn = turn * min(1.0, MAX_TURN / max(float(turn.norm()), 1e-9))
    parts = move, quat_canonical(quat_exp(turn)), [float(opened)]
    return np.concatenate(parts).astype(np.float32)


def _yaw(pose: Array) -> float:
    return float(quat_to_euler(torch.from_numpy(pose[3:]), "xyz")[2])
