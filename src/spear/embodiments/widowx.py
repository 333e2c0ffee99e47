"""WidowX 250 as in BridgeData V2, whose function `step_action` takes 7 numbers.

Facts (rail-berkeley/bridge_data_robot, widowx_envs/utils and widowx_controller):

- The state consists of x, y, z (m), roll, pitch, yaw (R = Rz Ry Rx) and the opening (1 open). The
  angles are relative to a gripper that points down, so they describe our end-effector frame.
- The robot has a target pose. The 7 numbers move this target by x, y, z along base axes, rotate it
  by roll, pitch, yaw about base axes (R_next = R(roll, pitch, yaw) R_now), and give the absolute
  gripper command.
- The rate is 5 Hz.
"""

from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_step_quats_about_base_axes
from spear.embodiments.observations import (
    make_example_image,
    make_policy_observation,
    read_numbers,
    validate_radians,
)
from spear.geometry import euler_to_quat, quat_to_euler
from spear.types import Array

STATE_KEY = "observation/state"


def convert_to_policy_observation(observation: Observation) -> dict[str, Any]:
    """Convert the robot's observation to one of `spear.types.Policy`.

    Only roll, pitch and yaw are converted, to a quaternion.
    """
    values = read_numbers(observation, STATE_KEY, 7)
    angles = validate_radians(values[3:6], f"{STATE_KEY}[3:6]")
    rotation = euler_to_quat(torch.from_numpy(angles), "xyz").numpy()
    return make_policy_observation(observation, STATE_KEY, values, rotation)


def convert_to_step_actions(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] that begin at `state` to rows [H, 7] float32 for `step_action`."""
    quaternions = torch.from_numpy(compute_step_quats_about_base_axes(state, actions))  # [H, 4]
    angles = quat_to_euler(quaternions, "xyz").numpy()  # [H, 3] roll, pitch, yaw
    return np.concatenate([actions[:, :3], angles, actions[:, 7:]], axis=1).astype(np.float32)


EMBODIMENT = Embodiment(
    required={
        "observation/image": "the over-the-shoulder camera's image, uint8 [height, width, 3], not "
        "squeezed",
        STATE_KEY: "x y z (m), roll pitch yaw (rad), gripper opening 0 … 1, as the controller's "
        "state, 7 numbers",
        "prompt": "the instruction in words",
    },
    observe=convert_to_policy_observation,
    controls={
        "step_action": Control(
            "x y z (m), roll pitch yaw (rad) about base axes, gripper (1 open, 0 closed), for "
            "step_action",
            rate_hz=5.0,
            convert=convert_to_step_actions,
        )
    },
    example=lambda: {
        "observation/image": make_example_image(640, 480),
        STATE_KEY: np.array([0.3, 0.05, 0.15, 0.02, -0.1, 0.4, 1.0], np.float32),
        "prompt": "put the carrot on the plate",
    },
)
