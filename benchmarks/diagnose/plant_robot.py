"""Faults of the robot's program: what it reads and executes, and when.

Actions and states are arrays [8]: position or translation, quaternion (w, x, y, z), gripper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np
from scipy.spatial.transform import Rotation

from planted import Observation, PlantedFault, set_timing
from spear.embodiments.observations import STATE_KEY
from spear.types import CONTROL_RATE_HZ, Array

VectorChange = Callable[[Array], Array]


def _read_rotation(vector: Array) -> Rotation:
    return Rotation.from_quat(np.float64(vector[3:7]), scalar_first=True)


def _with_rotation(vector: Array, rotation: Rotation) -> Array:
    """Return a copy of an action or a state with another rotation."""
    quaternion = rotation.as_quat(canonical=True, scalar_first=True)
    return np.concatenate([vector[:3], quaternion, vector[7:]]).astype(np.float32)


def _with_translation(vector: Array, translation: Array) -> Array:
    """Return a copy of an action or a state with another translation or position."""
    return np.concatenate([translation, vector[3:]]).astype(np.float32)


def _with_gripper(vector: Array, opening: float) -> Array:
    """Return a copy of an action or a state with another gripper opening."""
    return np.append(vector[:7], opening).astype(np.float32)


def _change_commands(change: VectorChange) -> PlantedFault:
    """Make a fault of the actions that are executed."""
    return PlantedFault(change_action=lambda action, state: change(action))


def _change_states(change: VectorChange) -> PlantedFault:
    """Make a fault of the states that are sent."""

    def change_observation(observation: Observation) -> Observation:
        return {**observation, STATE_KEY: change(observation[STATE_KEY])}

    return PlantedFault(change_observation=change_observation)


def _change_quantity(quantity: str, change: VectorChange) -> PlantedFault:
    """Make a fault of the "command", of the "state", or of "both"."""
    changes_command = quantity in ("command", "both")
    changes_state = quantity in ("state", "both")
    command = _change_commands(change if changes_command else lambda action: action)
    state = _change_states(change if changes_state else lambda state: state)
    return PlantedFault(
        change_action=command.change_action, change_observation=state.change_observation
    )


# --- Frames, signs, units and orders ---


def exchange_frame(frame: str) -> PlantedFault:
    """Execute translations in the end-effector frame ("ee"), or about a turned base.

    "base 90" is a base frame that is turned by 90° about z.
    """
    if frame == "ee":

        def move_in_ee_frame(action: Array, state: Array) -> Array:
            return _with_translation(action, _read_rotation(state).apply(action[:3]))

        return PlantedFault(change_action=move_in_ee_frame)

    turn = Rotation.from_euler("z", float(frame.removeprefix("base ")), degrees=True)
    return _change_commands(lambda action: _with_translation(action, turn.apply(action[:3])))


def invert_sign(axis: str) -> PlantedFault:
    """Invert translations along x, y or z, or rotations ("rotation")."""
    if axis == "rotation":
        return _change_commands(lambda action: _with_rotation(action, _read_rotation(action).inv()))
    signs = np.where(np.array(["x", "y", "z"]) == axis, -1.0, 1.0)
    return _change_commands(lambda action: _with_translation(action, signs * action[:3]))


def scale_translation(factor: float) -> PlantedFault:
    """Execute translations in another unit."""
    return _change_commands(lambda action: _with_translation(action, factor * action[:3]))


def scale_angle(factor: float) -> PlantedFault:
    """Execute rotation angles in another unit."""

    def scale(action: Array) -> Array:
        rotation_vector = factor * _read_rotation(action).as_rotvec()
        return _with_rotation(action, Rotation.from_rotvec(rotation_vector))

    return _change_commands(scale)


def reorder_quaternion(quantity: str) -> PlantedFault:
    """Take the four numbers w, x, y, z for x, y, z, w in commands, or send x, y, z, w as state."""

    def reorder(vector: Array) -> Array:
        order = [4, 5, 6, 3] if quantity == "state" else [6, 3, 4, 5]
        return np.concatenate([vector[:3], vector[order], vector[7:]]).astype(np.float32)

    return _change_quantity(quantity, reorder)


def reorder_euler(quantity: str, order: str) -> PlantedFault:
    """Write rotations as angles about x, y, z, and read them in another order.

    "ZYX" reads the angles as those about the turned axes; "swapped" exchanges roll and yaw.
    """

    def reorder(vector: Array) -> Array:
        roll, pitch, yaw = _read_rotation(vector).as_euler("xyz")
        if order == "swapped":
            return _with_rotation(vector, Rotation.from_euler("xyz", [yaw, pitch, roll]))
        return _with_rotation(vector, Rotation.from_euler("XYZ", [roll, pitch, yaw]))

    return _change_quantity(quantity, reorder)


# --- Gripper ---


def invert_gripper(quantity: str) -> PlantedFault:
    """Exchange open and closed in the command, in the state, or in both."""
    return _change_quantity(quantity, lambda vector: _with_gripper(vector, 1 - vector[7]))


def scale_gripper(quantity: str, factor: float) -> PlantedFault:
    """Read or command the gripper's opening in another unit, for example in meters."""
    return _change_quantity(quantity, lambda vector: _with_gripper(vector, factor * vector[7]))


def delay_gripper(num_actions: int) -> PlantedFault:
    """Execute the gripper's command so many actions later; the arm moves in time."""
    openings: deque[float] = deque(maxlen=num_actions + 1)

    def delay(action: Array) -> Array:
        openings.append(float(action[7]))
        return _with_gripper(action, openings[0])

    return _change_commands(delay)


# --- How much and how often the arm moves ---


def shorten_motion(fraction: float) -> PlantedFault:
    """Execute only a fraction of each translation and rotation."""

    def shorten(action: Array) -> Array:
        rotation = Rotation.from_rotvec(fraction * _read_rotation(action).as_rotvec())
        return _with_rotation(_with_translation(action, fraction * action[:3]), rotation)

    return _change_commands(shorten)


def repeat_actions(probability: float) -> PlantedFault:
    """Execute an action twice, with a probability."""
    return PlantedFault(count_executions=lambda rng: 1 + int(rng.random() < probability))


def drop_actions(probability: float) -> PlantedFault:
    """Leave out an action, with a probability; the arm stands still for as long."""
    return PlantedFault(count_executions=lambda rng: int(rng.random() >= probability))


# --- When the program observes and moves ---


def change_rate(rate_hz: float) -> PlantedFault:
    """Execute actions at another rate than 5 Hz."""
    return set_timing(tick_s=1 / rate_hz)


def delay_answers(delay_ms: float, cause: str) -> PlantedFault:
    """Let answers arrive late while the arm goes on with the last one.

    Either "inference" or the "network" takes so long. The program executes each
    answer from its first action on, as if the arm had not moved since the observation.
    """
    delay_ticks = round(delay_ms / 1000 * CONTROL_RATE_HZ)
    return set_timing(delay_ticks=delay_ticks, is_network_slow=cause == "network")


def join_to_old_pose(age_ticks: int, replan_interval: int) -> PlantedFault:
    """Compute target poses from an old pose, so that the arm jumps back where an answer begins."""
    return set_timing(pose_age_ticks=age_ticks, replan_interval=replan_interval)
