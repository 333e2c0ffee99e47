"""A robot as one file: `spear serve --policy POLICY --embodiment examples/my_robot.py`.

This robot reports its pose in millimeters and as a rotation vector, and takes absolute poses as
commands.
"""

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
    validate_meters,
    validate_radians,
)
from spear.geometry import quat_exp, quat_log

MM_PER_M = 1000


def observe(observation):
    """Convert the robot's observation to SPEAR-1's (`spear.types.Policy`): meters, quaternions,
    base frame.
    """
    tcp = read_numbers(observation, "tcp", 6)
    position = validate_meters(tcp[:3] / MM_PER_M, "tcp")
    rotation_vector = torch.from_numpy(validate_radians(tcp[3:], "tcp"))
    rotation = quat_exp(rotation_vector).numpy()
    opening = validate_and_clip_opening(read_numbers(observation, "gripper", 1)[0], "gripper")
    return {
        "observation/image": read_image(observation, "camera"),
        "observation/state": make_state(position, rotation, opening),
        "prompt": read_prompt(observation),
    }


def convert_to_poses(actions, state, observation):
    """Convert SPEAR-1's actions [5, 8] to the poses to which they lead, one row [7] each."""
    positions, rotations = compute_target_poses(state, actions)
    rotation_vectors = quat_log(torch.from_numpy(rotations)).numpy()
    openings = actions[:, 7:]
    rows = np.concatenate([MM_PER_M * positions, rotation_vectors, openings], axis=1)
    return rows.astype(np.float32)


def make_example():
    """Make an observation as the robot sends it."""
    return {
        "camera": make_example_image(640, 480),
        "tcp": np.array([450.0, 0.0, 200.0, 0.0, 0.1, 0.2]),
        "gripper": np.array([1.0]),
        "prompt": "put the carrot on the plate",
    }


EMBODIMENT = Embodiment(
    required={
        "camera": "the camera's image, uint8 [height, width, 3]",
        "tcp": "x y z (mm), rotation vector (rad), base frame: 6 numbers",
        "gripper": "opening, 0 … 1",
        "prompt": "the instruction in words",
    },
    observe=observe,
    controls={
        "pose": Control(
            "x y z (mm), rotation vector (rad), opening", rate_hz=5.0, convert=convert_to_poses
        )
    },
    example=make_example,
)
