"""SIMPLER's WidowX in ManiSkill 2 (SimplerEnv), as AllenAI's vla-eval harness runs it: the harness's
observations.

Facts (vla-eval 0.8, `benchmarks/simpler`; ManiSkill2_real2sim, `pd_ee_pose.py`, frame "ee_align2"): "states"
is the pose of link `ee_gripper_link` in the robot's base frame (x y z, quaternion w x y z) and the gripper's
opening; the controller moves its previous target along base axes and turns it about base axes by a rotation
vector; a gripper value above 0.5 opens. 5 Hz. ManiSkill 3's controller of the same name reads the three
numbers as Euler angles: that robot is `simpler_widowx`, which this one shares all else with.
"""

from collections.abc import Mapping
from typing import Any

import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments import simpler_widowx as maniskill3
from spear.embodiments import tools as read
from spear.errors import SpearError
from spear.geometry import quat_log
from spear.types import Array


def observe(observation: Observation) -> dict[str, Any]:
    """The harness's observation, the link's orientation as that of our end-effector frame."""
    images = observation["images"]
    if not isinstance(images, Mapping) or "primary" not in images:
        raise SpearError("images: no 'primary' in it: send a map of camera names to images")
    values = read.numbers(observation, "states", 8)
    seen = {**observation, "images/primary": images["primary"]}
    rotation = maniskill3.orientation(values[3:7])
    return read.arm(seen, "states", values, rotation, "images/primary", "task_description")


def controller_actions(actions: Array, state: Array, observation: Observation) -> Array:
    """[H, 7] float32 for the controller."""
    return maniskill3.command(
        actions, quat_log(torch.from_numpy(read.base_rotations(state, actions))), 0.0
    )


EMBODIMENT = Embodiment(
    required={
        "images": "a map whose 'primary' is the third-view camera's image, uint8 [height, width, 3]",
        "states": maniskill3.LINK_POSE + " (the benchmark's send_state: true)",
        "task_description": "the instruction in words",
    },
    optional=dict.fromkeys(("task_name", "base_pose", "tcp_pose"), "not looked at"),
    observe=observe,
    controls={
        "maniskill2_rotation_vector": Control(
            "x y z (m), rotation vector (rad), both along base axes, gripper (1 open, 0 closed), for the "
            "harness, which hands them to ManiSkill 2's arm_pd_ee_target_delta_pose_align2",
            5.0,
            controller_actions,
        )
    },
    example=lambda: {
        "images": {"primary": read.example_image(640, 480)},
        "states": maniskill3.EMBODIMENT.example()[maniskill3.POSE],
        "task_description": "put carrot on plate",
        "task_name": "widowx_carrot_on_plate",
    },
)
