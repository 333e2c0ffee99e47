"""SIMPLER's WidowX in ManiSkill 3: the pose of its gripper link, commands for
`arm_pd_ee_target_delta_pose_align2`.

Facts, read in mani_skill 3.0.1 and checked in it (docs/simpler.md): the controller keeps a commanded pose of
link `ee_gripper_link` in the robot's base frame, whose x axis points out of the gripper (BridgeData's frame
after its reference rotation). A command moves that pose, not the measured one, by x, y, z along base axes and
turns it about base axes by the angles (a, b, c) with R = Rx(a) Ry(b) Rz(c); nothing is scaled or clipped. The
gripper takes 1 (open) to -1 (closed). 5 Hz. ManiSkill 3's observations have joint angles only: the pose comes
from `spear.evaluate.simpler.world`.

ManiSkill 2 has a controller of the same name that reads (a, b, c) as a rotation vector: that robot is
`maniskill2_widowx`. The key of the pose names the simulator, so that neither takes the other's observations.

Ours: an action's rotation is taken about the axes of the measured pose, as it is when demonstrations are
converted; the gripper is commanded open from 0.5 on.
"""

from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments import tools as read
from spear.geometry import matrix_to_quat, quat_conjugate, quat_multiply, quat_to_euler
from spear.types import Array

POSE = "maniskill3/eef_pos"
LINK_POSE = (
    "position (m), quaternion (w x y z) of ee_gripper_link in the base frame, opening: 8 numbers"
)
LINK = matrix_to_quat(torch.tensor([[0, 0, 1], [0, 1, 0], [-1, 0, 0]], dtype=torch.float64))
"""Orientation of the link where our end-effector frame is parallel to the base frame."""


def orientation(link: Array) -> Array:
    """[4]: the link's orientation [4] as that of our end-effector frame."""
    return quat_multiply(torch.from_numpy(link), quat_conjugate(LINK)).numpy()


def command(actions: Array, turns: torch.Tensor, closed: float) -> Array:
    """[H, 7] float32 from actions [H, 8] whose rotations the controller is told as `turns` [H, 3]; gripper 1
    or `closed`."""
    gripper = np.where(actions[:, 7:] >= 0.5, 1.0, closed)
    return np.concatenate([actions[:, :3], turns.numpy(), gripper], axis=1).astype(np.float32)


def observe(observation: Observation) -> dict[str, Any]:
    """The link's orientation as that of our end-effector frame."""
    values = read.numbers(observation, POSE, 8)
    return read.arm(observation, POSE, values, orientation(values[3:7]))


def controller_actions(actions: Array, state: Array, observation: Observation) -> Array:
    """[H, 7] float32 for the controller."""
    return command(
        actions, quat_to_euler(torch.from_numpy(read.base_rotations(state, actions)), "XYZ"), -1.0
    )


EMBODIMENT = Embodiment(
    required={
        "observation/image": "the third-view camera's image, uint8 [height, width, 3]",
        POSE: LINK_POSE,
        "prompt": "the instruction in words",
    },
    observe=observe,
    controls={
        "maniskill3_euler_angles": Control(
            "x y z (m), angles a b c (rad, R = Rx Ry Rz, base axes), gripper (1 open, -1 closed), for "
            "ManiSkill 3's arm_pd_ee_target_delta_pose_align2",
            5.0,
            controller_actions,
        )
    },
    example=lambda: {
        "observation/image": read.example_image(640, 480),
        POSE: np.array(
            [0.3, 0.0, 0.15, 0.7, -0.1, 0.7, 0.1, 1.0], np.float32
        ),  # points down, turned
        "prompt": "put carrot on plate",
    },
)
