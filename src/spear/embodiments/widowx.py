"""WidowX 250 as in BridgeData V2: the state and the 7 numbers that its `step_action` takes.

Facts (rail-berkeley/bridge_data_robot, widowx_envs/utils and widowx_controller): the state is x, y, z (m),
roll, pitch, yaw (R = Rz Ry Rx, relative to a gripper that points down, which is our end-effector frame) and
the opening (1 open); an action moves the previous target by x, y, z along base axes and turns it by roll,
pitch, yaw about base axes, R_next = R(action) R_now; its seventh number is the absolute gripper command. 5
Hz.
"""

from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments import tools as read
from spear.geometry import euler_to_quat, quat_to_euler
from spear.types import Array

STATE = "observation/state"


def observe(observation: Observation) -> dict[str, Any]:
    """Roll, pitch and yaw as a quaternion; the rest is the same."""
    values = read.numbers(observation, STATE, 7)
    angles = torch.from_numpy(read.radians(values[3:6], f"{STATE}[3:6]"))
    return read.arm(observation, STATE, values, euler_to_quat(angles, "xyz").numpy())


def step_actions(actions: Array, state: Array, observation: Observation) -> Array:
    """[H, 7] float32 for `step_action`."""
    turns = quat_to_euler(torch.from_numpy(read.base_rotations(state, actions)), "xyz").numpy()
    return np.concatenate([actions[:, :3], turns, actions[:, 7:]], axis=1).astype(np.float32)


EMBODIMENT = Embodiment(
    required={
        "observation/image": "the over-the-shoulder camera's image, uint8 [height, width, 3], not squeezed",
        STATE: "x y z (m), roll pitch yaw (rad), gripper opening 0 … 1, as the controller's state: 7 numbers",
        "prompt": "the instruction in words",
    },
    observe=observe,
    controls={
        "step_action": Control(
            "x y z (m), roll pitch yaw (rad) about base axes, gripper (1 open, 0 closed), for step_action",
            5.0,
            step_actions,
        )
    },
    example=lambda: {
        "observation/image": read.example_image(640, 480),
        STATE: np.array([0.3, 0.05, 0.15, 0.02, -0.1, 0.4, 1.0], np.float32),
        "prompt": "put the carrot on the plate",
    },
)
