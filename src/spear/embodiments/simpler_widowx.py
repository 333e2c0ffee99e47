"""SIMPLER's WidowX in ManiSkill 3, whose observations have the pose of the gripper link, and whose
controller is `arm_pd_ee_target_delta_pose_align2`.

Facts, read in mani_skill 3.0.1 and checked in it (docs/howto/simpler.md):

- The controller has a target pose of link `ee_gripper_link` in the robot's base frame. The link's x
  axis points out of the gripper (BridgeData's frame after its reference rotation).
- A command moves this target, not the measured pose, by x, y, z along base axes, and rotates it
  about base axes by the angles (a, b, c) with R = Rx(a) Ry(b) Rz(c). Nothing is scaled or clipped.
- The gripper command runs from 1 (open) to -1 (closed).
- The rate is 5 Hz.
- ManiSkill 3's own observations have joint angles only. `spear.evaluate.simpler.world` computes the
  pose from them.

ManiSkill 2 has a controller of the same name that reads (a, b, c) as a rotation vector. Its
embodiment is `maniskill2_widowx`. The key of the pose names the simulator, so that neither
embodiment accepts observations of the other.

Our choices: an action's rotation is about the axes of the measured end-effector frame, as in
demonstrations, and is converted to base axes. The gripper is commanded open from an opening of 0.5
on.
"""

from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_step_quats_about_base_axes
from spear.embodiments.observations import make_example_image, make_policy_observation, read_numbers
from spear.geometry import matrix_to_quat, quat_conjugate, quat_multiply, quat_to_euler
from spear.types import Array

POSE_KEY = "maniskill3/eef_pos"
POSE_DESCRIPTION = (
    "position (m), quaternion (w x y z) of ee_gripper_link in the base frame, opening, 8 numbers"
)
LINK_ROTATION = matrix_to_quat(
    torch.tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64)
)
"""Orientation of the gripper link when our end-effector frame is parallel to the base frame."""


def convert_link_to_ee_rotation(link_rotation: Array) -> Array:
    """Convert the orientation of the gripper link, [4], to that of our end-effector frame, [4]."""
    ee_rotation = quat_multiply(torch.from_numpy(link_rotation), quat_conjugate(LINK_ROTATION))
    return ee_rotation.numpy()


def make_commands(actions: Array, rotations: torch.Tensor, closed_command: float) -> Array:
    """Make the controller's commands.

    Args:
        actions: [H, 8] the action chunk, whose translations and gripper openings are used.
        rotations: [H, 3] the actions' rotations in the controller's format.
        closed_command: the gripper command for closed. The gripper command for open is 1.

    Returns:
        [H, 7] float32.
    """
    is_open = actions[:, 7:] >= 0.5  # [H, 1]
    gripper = np.where(is_open, 1.0, closed_command)
    return np.concatenate([actions[:, :3], rotations.numpy(), gripper], axis=1).astype(np.float32)


def convert_to_policy_observation(observation: Observation) -> dict[str, Any]:
    """Convert the simulator's observation to one of `spear.types.Policy`.

    The orientation of the gripper link becomes that of our end-effector frame.
    """
    values = read_numbers(observation, POSE_KEY, 8)
    link_rotation = values[3:7]
    rotation = convert_link_to_ee_rotation(link_rotation)
    return make_policy_observation(observation, POSE_KEY, values, rotation)


def convert_to_commands(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] that begin at `state` to rows [H, 7] float32 for the controller."""
    quaternions = torch.from_numpy(compute_step_quats_about_base_axes(state, actions))  # [H, 4]
    angles = quat_to_euler(quaternions, "XYZ")  # [H, 3]
    return make_commands(actions, angles, closed_command=-1.0)


EMBODIMENT = Embodiment(
    required={
        "observation/image": "the third-view camera's image, uint8 [height, width, 3]",
        POSE_KEY: POSE_DESCRIPTION,
        "prompt": "the instruction in words",
    },
    observe=convert_to_policy_observation,
    controls={
        "maniskill3_euler_angles": Control(
            "x y z (m), angles a b c (rad, R = Rx Ry Rz, base axes), gripper (1 open, -1 closed), "
            "for ManiSkill 3's arm_pd_ee_target_delta_pose_align2",
            rate_hz=5.0,
            convert=convert_to_commands,
        )
    },
    example=lambda: {
        "observation/image": make_example_image(640, 480),
        # The gripper points down and is turned a little.
        POSE_KEY: np.array([0.3, 0.0, 0.15, 0.7, -0.1, 0.7, 0.1, 1.0], np.float32),
        "prompt": "put carrot on plate",
    },
)
