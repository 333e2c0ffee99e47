"""SIMPLER's WidowX in ManiSkill 3: its gripper link's pose, and
`arm_pd_ee_target_delta_pose_align2` commands.

Facts, read in mani_skill 3.0.1 and checked in it (docs/howto/simpler.md): the controller keeps a
commanded pose of link `ee_gripper_link` in the robot's base frame, whose x axis points out of the
gripper (BridgeData's frame after its reference rotation). A command moves that pose, not the
measured one, by x, y, z along base axes and turns it about base axes by the angles (a, b, c) with R
= Rx(a) Ry(b) Rz(c); nothing is scaled or clipped. The gripper takes 1 (open) to -1 (closed). The
rate is 5 Hz. ManiSkill 3's observations have joint angles only: `spear.evaluate.simpler.world`
computes the pose.

ManiSkill 2 has a controller of the same name that reads (a, b, c) as a rotation vector: that robot
is `maniskill2_widowx`. The key of the pose names the simulator, so that neither takes the other's
observations.

Departures: an action's rotation is taken about the axes of the measured pose, as it is when
demonstrations are converted; the gripper is commanded open from 0.5 on.
"""

from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_base_rotations
from spear.embodiments.observations import make_example_image, read_arm, read_numbers
from spear.geometry import matrix_to_quat, quat_conjugate, quat_multiply, quat_to_euler
from spear.types import Array

POSE_KEY = "maniskill3/eef_pos"
POSE_DESCRIPTION = (
    "position (m), quaternion (w x y z) of ee_gripper_link in the base frame, opening: 8 numbers"
)
LINK_ROTATION = matrix_to_quat(
    torch.tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64)
)
"""Orientation of the gripper link when our end-effector frame is parallel to the base frame."""


def ee_from_link_rotation(link_rotation: Array) -> Array:
    """Return the orientation of our end-effector frame, [4], from that of the gripper link, [4]."""
    return quat_multiply(torch.from_numpy(link_rotation), quat_conjugate(LINK_ROTATION)).numpy()


def make_commands(actions: Array, rotations: torch.Tensor, closed_command: float) -> Array:
    """Make the controller's commands.

    Args:
        actions: [H, 8], of which translations and gripper openings are taken.
        rotations: [H, 3] the actions' rotations as the controller reads them.
        closed_command: its command for a closed gripper; that for an open one is 1.

    Returns:
        [H, 7] float32.
    """
    gripper = np.where(actions[:, 7:] >= 0.5, 1.0, closed_command)
    return np.concatenate([actions[:, :3], rotations.numpy(), gripper], axis=1).astype(np.float32)


def observe(observation: Observation) -> dict[str, Any]:
    """Convert the gripper link's orientation to that of our end-effector frame."""
    values = read_numbers(observation, POSE_KEY, 8)
    return read_arm(observation, POSE_KEY, values, ee_from_link_rotation(values[3:7]))


def convert_to_commands(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to rows [H, 7] float32 for the controller."""
    base_rotations = torch.from_numpy(compute_base_rotations(state, actions))
    return make_commands(actions, quat_to_euler(base_rotations, "XYZ"), closed_command=-1.0)


EMBODIMENT = Embodiment(
    required={
        "observation/image": "the third-view camera's image, uint8 [height, width, 3]",
        POSE_KEY: POSE_DESCRIPTION,
        "prompt": "the instruction in words",
    },
    observe=observe,
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
        # points down, turned
        POSE_KEY: np.array([0.3, 0.0, 0.15, 0.7, -0.1, 0.7, 0.1, 1.0], np.float32),
        "prompt": "put carrot on plate",
    },
)
