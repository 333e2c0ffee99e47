"""SIMPLER's WidowX in ManiSkill 2 (SimplerEnv), with the observations of AllenAI's vla-eval
harness.

Facts (vla-eval 0.8, `benchmarks/simpler`; ManiSkill2_real2sim, `pd_ee_pose.py`, frame "ee_align2"):

- "states" consists of the pose of link `ee_gripper_link` in the robot's base frame (x y z,
  quaternion w x y z) and the gripper opening.
- The controller has a target pose. A command moves this target along base axes, and rotates it
  about base axes by a rotation vector.
- A gripper command above 0.5 opens the gripper.
- The rate is 5 Hz.

ManiSkill 3 has a controller of the same name that reads the three numbers of a rotation as Euler
angles. Its embodiment is `simpler_widowx`, with which this one shares everything else.
"""

from typing import Any

import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments import simpler_widowx as maniskill3
from spear.embodiments.actions import compute_step_quats_about_base_axes
from spear.embodiments.observations import (
    extract_images_from_map,
    make_example_image,
    make_policy_observation,
    read_numbers,
)
from spear.geometry import quat_log
from spear.types import Array


def convert_to_policy_observation(observation: Observation) -> dict[str, Any]:
    """Convert the harness's observation to one of `spear.types.Policy`.

    The orientation of the gripper link becomes that of our end-effector frame.
    """
    with_image = extract_images_from_map(
        observation, "images", ["primary"], advice="Send a map of camera names to images."
    )
    values = read_numbers(observation, "states", 8)
    link_rotation = values[3:7]
    return make_policy_observation(
        with_image,
        "states",
        values,
        rotation=maniskill3.convert_link_to_ee_rotation(link_rotation),
        image_key="images/primary",
        prompt_key="task_description",
    )


def convert_to_commands(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] that begin at `state` to rows [H, 7] float32 for the controller."""
    quaternions = torch.from_numpy(compute_step_quats_about_base_axes(state, actions))  # [H, 4]
    rotation_vectors = quat_log(quaternions)  # [H, 3]
    return maniskill3.make_commands(actions, rotation_vectors, closed_command=0.0)


EMBODIMENT = Embodiment(
    required={
        "images": "a map whose 'primary' is the third-view camera's image, uint8 [height, width, "
        "3]",
        "states": maniskill3.POSE_DESCRIPTION + " (the benchmark's send_state: true)",
        "task_description": "the instruction in words",
    },
    optional={
        "task_name": "not looked at",
        "base_pose": "not looked at",
        "tcp_pose": "not looked at",
    },
    observe=convert_to_policy_observation,
    controls={
        "maniskill2_rotation_vector": Control(
            "x y z (m), rotation vector (rad), both along base axes, gripper (1 open, 0 closed), "
            "for the harness, which hands them to ManiSkill 2's arm_pd_ee_target_delta_pose_align2",
            rate_hz=5.0,
            convert=convert_to_commands,
        )
    },
    example=lambda: {
        "images": {"primary": make_example_image(640, 480)},
        "states": maniskill3.EMBODIMENT.example()[maniskill3.POSE_KEY],
        "task_description": "put carrot on plate",
        "task_name": "widowx_carrot_on_plate",
    },
)
