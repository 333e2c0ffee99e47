"""Starts of demonstrations in LIBERO, which differ from all official states of their task.

Policies are evaluated in the official states, so demonstrations must not begin in them. A start is
made from an official state: loose objects are moved on the table, and the arm's joints are turned a
little. Things that stand on each other or in each other move together. What stands on furniture,
such as a cabinet or a stove, hardly moves, because it would fall.

All numbers are our choice.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from spear.errors import SpearError
from spear.types import Array

MAX_SHIFT_M = 0.05
"""Largest motion of an object on the table, m. Objects are 5 to 20 cm large."""
MAX_RAISED_SHIFT_M = 0.008
"""Largest motion of what stands on furniture, m."""
MAX_JOINT_TURN_RAD = 0.05
"""Largest turn of each joint of the arm, rad; the gripper then moves by some 3 cm."""
MARGIN_M = 0.015
"""In a start, at least one object is farther than this from where it is in any official state."""
STACKED_DISTANCE_M = 0.06
"""Objects whose middles are horizontally closer than this stand on or in each other."""
RAISED_M = 0.05
"""An object whose origin is this much higher than the lowest one's does not stand on the table."""
MIN_GAP_M = 0.11
"""Objects are not moved closer to each other than this, from middle to middle, m."""
MAX_TRIES = 200  # draws of all motions, before there is an error


@dataclass(frozen=True)
class Start:
    """A start: the official state that it is made from, and how that is changed.

    changes  as `LiberoTask.reset` in worker.py takes them.
    """

    state_index: int
    changes: Mapping[str, Any]


def sample_start(official_positions: Mapping[str, Array], seed: int, attempt: int = 0) -> Start:
    """Draw a start.

    Args:
        official_positions: loose object → [S, 3], its position in each official state, m.
        seed: of the start. It also chooses the official state.
        attempt: number of the draw; each number gives another start of the same official state.

    Raises:
        SpearError: no start was found that keeps the margin and the gaps.
    """
    names = sorted(official_positions)
    positions = np.stack([official_positions[name] for name in names], axis=1)  # [S, objects, 3]
    state_index = seed % len(positions)
    old_positions = positions[state_index]
    group_of_object = _assign_group_numbers(old_positions)
    heights = old_positions[:, 2] - old_positions[:, 2].min()

    rng = np.random.default_rng([seed, attempt])
    for _ in range(MAX_TRIES):
        shift_of_group = {group: _sample_shift_m(rng) for group in sorted(set(group_of_object))}
        shifts = np.stack([shift_of_group[group] for group in group_of_object])  # [objects, 2]
        for group in set(group_of_object):
            is_member = np.equal(group_of_object, group)  # [objects] bool
            if heights[is_member].min() > RAISED_M:
                shifts[is_member] *= MAX_RAISED_SHIFT_M / MAX_SHIFT_M
        new_positions = old_positions[:, :2] + shifts
        is_new = (
            measure_distance_from_nearest_official_state_m(positions[:, :, :2], new_positions)
            > MARGIN_M
        )
        if is_new and _has_clear_gaps_between_groups(
            old_positions[:, :2], new_positions, group_of_object
        ):
            joints = rng.uniform(-MAX_JOINT_TURN_RAD, MAX_JOINT_TURN_RAD, 7)
            objects = {}
            for name, (x, y) in zip(names, shifts, strict=True):
                objects[name] = (float(x), float(y), 0.0)  # no turn about the vertical
            return Start(state_index, {"objects": objects, "joints": joints})
    raise SpearError(
        f"no start of seed {seed} was found that differs by {MARGIN_M * 1000:.0f} mm from all "
        "official states and in which no objects touch. Record the other tasks (--tasks)."
    )


def measure_distance_from_nearest_official_state_m(
    official_positions: Array, start_positions: Array
) -> float:
    """Measure how much a start differs from the most similar official state, m.

    The difference of two states is the distance between the two positions of the object that is
    moved most.

    Args:
        official_positions: [S, objects, 2] positions in all official states, m.
        start_positions: [objects, 2] positions in the start, m.
    """
    distances = np.linalg.norm(official_positions - start_positions, axis=-1)  # [S, objects]
    return float(distances.max(axis=1).min())


def _sample_shift_m(rng: np.random.Generator) -> Array:
    """Draw a motion [2] on the table, uniform in a disk, m."""
    radius = MAX_SHIFT_M * math.sqrt(rng.uniform())
    angle = rng.uniform(-math.pi, math.pi)
    return np.array([radius * math.cos(angle), radius * math.sin(angle)])


def _assign_group_numbers(positions: Array) -> list[int]:
    """Group objects that stand on or in each other.

    Args:
        positions: [objects, 3], m.

    Returns:
        The number of each object's group.
    """
    group_of_object = list(range(len(positions)))
    for first, second in itertools.combinations(range(len(positions)), 2):
        distance = np.linalg.norm(positions[first, :2] - positions[second, :2])
        if distance < STACKED_DISTANCE_M:
            # Merge the two groups: the members of the second object's group join the first one's.
            first_group = group_of_object[first]
            second_group = group_of_object[second]
            group_of_object = [
                first_group if group == second_group else group for group in group_of_object
            ]
    return group_of_object


def _has_clear_gaps_between_groups(
    old_positions: Array, new_positions: Array, group_of_object: list[int]
) -> bool:
    """Whether objects of different groups have not come too close to each other."""
    for first, second in itertools.combinations(range(len(new_positions)), 2):
        if group_of_object[first] == group_of_object[second]:
            continue
        old_distance = float(np.linalg.norm(old_positions[first] - old_positions[second]))
        new_distance = float(np.linalg.norm(new_positions[first] - new_positions[second]))
        if new_distance < min(old_distance, MIN_GAP_M):
            return False
    return True
