"""The DROID platform (Franka), with the observation keys of openpi's DROID client.

Facts (droid-dataset/droid, robot_ik_solver.py and franka/robot.py): 15 Hz; a joint velocity of 1 asks for 0.2
rad in one step, and a vector with a larger entry is shortened as a whole; gripper positions are 1 closed, 0
open; cartesian positions are those of the flange, with roll, pitch, yaw (R = Rz Ry Rx). openpi's client sends
images scaled into a square of 224 pixels, black around them: those bands are cut off again, since the scene
would be smaller than in training if the model's own were added to them.

Ours: the end-effector is the point between the fingers of the Franka hand, 0.1034 m from the flange; a
chunk's five actions at 5 Hz become fifteen rows at 15 Hz on straight lines (joints) or geodesics (poses);
joints come from `spear.embodiments.inverse_kinematics`, which stays inside the joint limits and goes as near
as it can.
"""

import itertools
from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments import tools as read
from spear.errors import import_optional, notice
from spear.geometry import matrix_to_quat, pose_compose, pose_inverse, quat_slerp, quat_to_euler
from spear.types import Array

IMAGE = "observation/exterior_image_1_left"
WRIST = "observation/wrist_image_left"
JOINTS = "observation/joint_position"
GRIPPER = "observation/gripper_position"
RATE_HZ = 15.0
ROWS = 3
"""Rows of 15 Hz in an action of 5 Hz."""
JOINT_STEP = 0.2
"""What a joint velocity of 1 means, rad per row."""
BEYOND = 0.05
"""How far beyond its limit a joint may be read, rad, without a notice."""
SQUARE, KEPT = 224, (125, 126, 168)
"""Side of the square that openpi's client sends, and pixels that it leaves of its other side: of the ZED
camera's 16:9 (125: at 672 x 376) and of 4:3."""


def observe(observation: Observation, camera: str = IMAGE) -> dict[str, Any]:
    """Joint angles as an end-effector pose, by forward kinematics; `camera`: the exterior one's key."""
    joints = read.radians(read.numbers(observation, JOINTS, 7), JOINTS)
    closed = read.opening(observation, GRIPPER, float(read.numbers(observation, GRIPPER, 1)[0]))
    arm = _kinematics()
    beyond = np.maximum(arm.JOINT_LOWER_RAD - joints, joints - arm.JOINT_UPPER_RAD)
    if beyond.max() > BEYOND:
        which = f"{JOINTS}: joint {beyond.argmax() + 1} is where a Franka's cannot be"
        notice(f"{which}: check their order, signs and unit before the arm moves")
    position, rotation = arm.compute_ee_pose(joints)
    return {
        "observation/image": unpadded(read.image(observation, camera)),
        "observation/wrist_image": unpadded(read.image(observation, WRIST)),
        "observation/state": read.state(position, rotation, 1 - closed),
        "prompt": read.prompt(observation),
    }


def unpadded(image: Array) -> Array:
    """An image as it was before openpi's client padded it. Only bands that are black (0) throughout, and as
    high or wide as padding makes them, are cut off."""
    if image.shape[:2] == (SQUARE, SQUARE) and not image[0, 0].any():
        for axis, kept in itertools.product((0, 1), KEPT):
            first = (SQUARE - kept) // 2
            before, inside, after = np.split(image, (first, first + kept), axis)
            edges = [inside.take(end, axis).max() for end in (0, -1)]
            if all(edges) and before.max() == after.max() == 0:
                return inside
    return image


def joint_positions(actions: Array, state: Array, observation: Observation) -> Array:
    """[3 H, 8] float32: joint angles (rad) and gripper, within the arm's speed."""
    steps = _steps(
        actions, state, observation, _kinematics().MAX_JOINT_SPEED_RAD_S * ROWS / RATE_HZ
    )
    rows = read.numbers(observation, JOINTS, 7) + np.repeat(steps / ROWS, ROWS, axis=0).cumsum(
        axis=0
    )
    return _with_gripper(rows, actions)


def joint_velocities(actions: Array, state: Array, observation: Observation) -> Array:
    """[3 H, 8] float32: joint velocities in the platform's unit, within -1 … 1, and gripper."""
    steps = _steps(actions, state, observation, ROWS * JOINT_STEP)
    return _with_gripper(np.repeat(steps / (ROWS * JOINT_STEP), ROWS, axis=0), actions)


def cartesian_positions(actions: Array, state: Array, observation: Observation) -> Array:
    """[3 H, 7] float32: the flange's x, y, z (m), roll, pitch, yaw (rad), and gripper."""
    tool = torch.from_numpy(_kinematics().ee_from_flange())
    tool_position, tool_rotation = pose_inverse(tool[:3, 3], matrix_to_quat(tool[:3, :3]))
    where, turned = (torch.from_numpy(x) for x in read.targets(state, actions))
    where = torch.cat([torch.from_numpy(np.float64(state[:3]))[None], where])
    turned = torch.cat([torch.from_numpy(np.float64(state[3:7]))[None], turned])
    part = torch.arange(1, ROWS + 1, dtype=torch.float64).repeat(len(actions)) / ROWS
    step = torch.arange(len(actions)).repeat_interleave(ROWS)
    position = torch.lerp(where[step], where[step + 1], part[:, None])
    rotation = quat_slerp(turned[step], turned[step + 1], part)
    position, rotation = pose_compose(position, rotation, tool_position, tool_rotation)
    return _with_gripper(
        torch.cat([position, quat_to_euler(rotation, "xyz")], dim=1).numpy(), actions
    )


def _kinematics() -> Any:
    import_optional("mujoco", "sim", "droid")
    from spear.embodiments import inverse_kinematics

    return inverse_kinematics


def _steps(actions: Array, state: Array, observation: Observation, fastest: Any) -> Array:
    """[H, 7] rad: how far the joints turn in each action. A step with a joint beyond `fastest` is shortened
    as a whole; the next one goes on from there."""
    arm, steps = _kinematics(), []
    at = wanted = read.numbers(observation, JOINTS, 7)
    for position, rotation in zip(*read.targets(state, actions), strict=True):
        wanted = arm.solve_joints(
            wanted, position, rotation, posture=wanted
        )  # the elbow stays where it is
        steps.append((wanted - at) / max(1.0, (np.abs(wanted - at) / fastest).max()))
        at = at + steps[-1]
    return np.stack(steps)


def _with_gripper(rows: Array, actions: Array) -> Array:
    return np.concatenate([rows, 1 - np.repeat(actions[:, 7:], ROWS, axis=0)], axis=1).astype(
        np.float32
    )


EMBODIMENT = Embodiment(
    required={
        IMAGE: "the exterior camera's image, uint8 [height, width, 3]",
        WRIST: "the wrist camera's image, uint8 [height, width, 3]",
        JOINTS: "the joint angles: 7 numbers, rad",
        GRIPPER: "the gripper's position: 0 open … 1 closed",
        "prompt": read.REQUIRED["prompt"],
    },
    observe=observe,
    controls={
        "joint_velocity": Control(
            "7 joint velocities (1 is 0.2 rad per row), gripper (1 closed)",
            RATE_HZ,
            joint_velocities,
        ),
        "joint_position": Control(
            "7 joint angles (rad, within the arm's speed), gripper (1 closed)",
            RATE_HZ,
            joint_positions,
        ),
        "cartesian_position": Control(
            "flange's x y z (m, base), roll pitch yaw (rad), gripper (1 closed)",
            RATE_HZ,
            cartesian_positions,
        ),
    },
    example=lambda: {
        IMAGE: read.example_image(224, 224),  # as openpi's client sends them
        WRIST: read.example_image(224, 224),
        JOINTS: np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785]),
        GRIPPER: np.array([0.0]),
        "prompt": "put the carrot on the plate",
    },
)
