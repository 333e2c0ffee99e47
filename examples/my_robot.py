"""A robot as one file: `spear serve POLICY --embodiment examples/my_robot.py`."""

import numpy as np
import torch

from spear.embodiments import Control, Embodiment
from spear.embodiments import tools as read  # checks that name the key
from spear.geometry import quat_exp, quat_log

POSE = "tcp"


def observe(observation):
    """The robot's observation as SPEAR-1's (`spear.types.Policy`): metres, quaternions, base frame."""
    tcp = read.numbers(observation, POSE, 6)
    rotation = quat_exp(torch.from_numpy(read.radians(tcp[3:], POSE))).numpy()
    gripper = read.numbers(observation, "gripper", 1)[0]
    return {
        "observation/image": read.image(observation, "camera"),
        "observation/state": read.state(
            read.position(tcp[:3] / 1000, POSE),
            rotation,
            read.opening(observation, "gripper", gripper),
        ),
        "prompt": read.prompt(observation),
    }


def poses(actions, state, observation):
    """SPEAR-1's actions [5, 8], as this robot takes them: the poses that they lead to, one per row."""
    positions, rotations = read.targets(state, actions)
    turns = quat_log(torch.from_numpy(rotations)).numpy()
    return np.concatenate([1000 * positions, turns, actions[:, 7:]], axis=1).astype(np.float32)


def example():
    return {
        "camera": read.example_image(640, 480),
        POSE: np.array([450.0, 0.0, 200.0, 0.0, 0.1, 0.2]),
        "gripper": np.array([1.0]),
        "prompt": "put the carrot on the plate",
    }


EMBODIMENT = Embodiment(
    required={
        "camera": "the camera's image, uint8 [height, width, 3]",
        POSE: "x y z (mm), rotation vector (rad), base frame: 6 numbers",
        "gripper": "opening, 0 … 1",
        "prompt": "the instruction in words",
    },
    observe=observe,
    controls={"pose": Control("x y z (mm), rotation vector (rad), opening", 5.0, poses)},
    example=example,
)
