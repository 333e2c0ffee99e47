"""An SO-101 as one file: `spear serve --policy POLICY --embodiment examples/so101.py`.

This robot reports joint angles and takes joint angles as commands, both as LeRobot has them: five
joints in degrees, and the gripper from 0 (closed) to 100 (open). The arm's URDF, which its makers
publish, turns angles into poses of the gripper and back. Copy `so101_new_calib.urdf` into the
folder of this file. For another arm, change the URDF, the tip, and the number of joints.
"""

from pathlib import Path

import numpy as np
import torch

from spear.embodiments import Control, Embodiment
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import (  # each of them names the key in its errors
    make_example_image,
    make_state,
    read_image,
    read_numbers,
    read_prompt,
    validate_and_clip_opening,
)
from spear.embodiments.urdf import compute_urdf_pose, read_urdf_arm
from spear.embodiments.urdf_inverse_kinematics import solve_urdf_joints
from spear.errors import SpearError
from spear.geometry import quat_conjugate, quat_multiply

ARM = read_urdf_arm(Path(__file__).with_name("so101_new_calib.urdf"), tip="gripper_frame_link")
NUM_JOINTS = 5
# LeRobot's readings of the closed and of the open gripper, as in gripper_range of spear.json.
CLOSED_GRIPPER = 0
OPEN_GRIPPER = 100
TOOL_ROTATION = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)  # as in the dataset's spear.json

RATE_HZ = 30.0
ROWS_PER_ACTION = 6  # rows at 30 Hz in an action at 5 Hz
MAX_TURN_RAD = np.radians(30)  # in one action; a solution further away is another posture
MAX_MISS_M = 0.01  # a command that misses its target by more than this is withheld
MAX_LAG_M = 0.03  # an arm further away from its last command was blocked or moved by hand


def read_state(observation, key):
    """Compute SPEAR-1's state [8] from joint angles: the pose of the tip, and the opening."""
    numbers = read_numbers(observation, key, NUM_JOINTS + 1)
    positions, rotations = compute_urdf_pose(
        ARM, np.radians(numbers[None, :NUM_JOINTS]), source=key
    )
    rotation = quat_multiply(torch.from_numpy(rotations[0]), TOOL_ROTATION).numpy()
    gripper_range = OPEN_GRIPPER - CLOSED_GRIPPER
    reading = numbers[NUM_JOINTS]
    try:
        opening = validate_and_clip_opening((reading - CLOSED_GRIPPER) / gripper_range, key)
    except SpearError as error:  # its text asks for 0 to 1, which are not this robot's numbers
        raise SpearError(
            f"{key}[{NUM_JOINTS}] is a gripper reading of {reading:g}. Send a number from "
            f"{CLOSED_GRIPPER} (closed) to {OPEN_GRIPPER} (open)."
        ) from error
    return make_state(positions[0], rotation, opening)


def observe(observation):
    """Convert the robot's observation to SPEAR-1's (`spear.types.Policy`)."""
    if "last_command" in observation:
        read_state(observation, "last_command")  # refuses a wrong one before the policy computes
    return {
        "observation/image": read_image(observation, "front"),
        "observation/wrist_image": read_image(observation, "wrist"),
        "observation/state": read_state(observation, "joints"),
        "prompt": read_prompt(observation),
    }


def choose_start(state, observation):
    """Choose where the chunk begins: the state [8], and the robot's numbers [6] there.

    It is the last command, if the robot sends it and the arm is near it. An arm sags below its
    commands; beginning where it is would let it sink with each chunk.
    """
    if "last_command" in observation:
        last_state = read_state(observation, "last_command")
        if np.linalg.norm(last_state[:3] - state[:3]) < MAX_LAG_M:
            return last_state, read_numbers(observation, "last_command", NUM_JOINTS + 1)
    return state, read_numbers(observation, "joints", NUM_JOINTS + 1)


def convert_to_joints(actions, state, observation):
    """Convert SPEAR-1's actions [5, 8] to joint angles and gripper positions, [30, 6].

    Six rows lead from each command to the next, on a straight line between joint angles. If no
    angles lead to a target, the command before is repeated, gripper included.
    """
    start_state, command = choose_start(state, observation)
    positions, rotations = compute_target_poses(start_state, actions)
    tip_rotations = quat_multiply(
        torch.from_numpy(rotations), quat_conjugate(TOOL_ROTATION)
    ).numpy()

    rows = []
    for action, position, rotation in zip(actions, positions, tip_rotations, strict=True):
        joints = np.radians(command[:NUM_JOINTS])
        solution = solve_urdf_joints(ARM, joints, position, rotation, MAX_TURN_RAD)
        last_command = command
        if solution.position_error_m < MAX_MISS_M:
            gripper = CLOSED_GRIPPER + (OPEN_GRIPPER - CLOSED_GRIPPER) * action[7]
            command = np.append(np.degrees(solution.joints), gripper)
        for fraction in np.arange(1, ROWS_PER_ACTION + 1) / ROWS_PER_ACTION:
            row = last_command + fraction * (command - last_command)
            row[NUM_JOINTS] = command[NUM_JOINTS]  # the gripper does not wait
            rows.append(row)
    return np.array(rows, np.float32)


def make_example():
    """Make an observation as the robot sends it."""
    return {
        "front": make_example_image(640, 480),
        "wrist": make_example_image(640, 480),
        "joints": np.array([0.0, -20.0, 30.0, 60.0, 0.0, 90.0]),
        "prompt": "put the cube into the bowl",
    }


EMBODIMENT = Embodiment(
    required={
        "front": "the camera that sees the table, uint8 [height, width, 3]",
        "wrist": "the camera on the gripper, uint8 [height, width, 3]",
        "joints": "5 joint angles (deg), gripper (0 closed, 100 open): 6 numbers",
        "prompt": "the instruction in words",
    },
    optional={"last_command": "the row that the robot executed last: 6 numbers"},
    observe=observe,
    controls={
        "joints": Control(
            "5 joint angles (deg), gripper (0 closed, 100 open)", RATE_HZ, convert_to_joints
        )
    },
    example=make_example,
)
