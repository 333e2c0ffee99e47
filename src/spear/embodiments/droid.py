"""The DROID platform (Franka), with the observation keys of openpi's DROID client.

Facts (droid-dataset/droid, robot_ik_solver.py and franka/robot.py): the rate is 15 Hz; a joint
velocity of 1 asks for 0.2 rad in one step, and a vector with a larger entry is shortened as a
whole; gripper positions are 1 closed, 0 open; cartesian positions are those of the flange, with
roll, pitch, yaw (R = Rz Ry Rx). openpi's client sends images scaled into a square of 224 pixels
with black bands. `remove_padding` cuts the bands off, because the model adds its own: with both,
the scene would be smaller than in training.

Departures: the end-effector is the point between the fingers of the Franka hand, 0.1034 m from the
flange. A chunk's five actions at 5 Hz become fifteen rows at 15 Hz on straight lines (joints) or
geodesics (poses). Joints come from `spear.embodiments.inverse_kinematics`, which stays inside the
joint limits and goes as near to the target as it can.
"""

import itertools
from typing import Any

import numpy as np
import torch

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import (
    REQUIRED_KEYS,
    make_example_image,
    make_state,
    read_image,
    read_numbers,
    read_prompt,
    validate_opening,
    validate_radians,
)
from spear.errors import import_optional, notice
from spear.geometry import matrix_to_quat, pose_compose, pose_inverse, quat_slerp, quat_to_euler
from spear.types import Array

EXTERIOR_IMAGE_KEY = "observation/exterior_image_1_left"
WRIST_IMAGE_KEY = "observation/wrist_image_left"
JOINTS_KEY = "observation/joint_position"
GRIPPER_KEY = "observation/gripper_position"

RATE_HZ = 15.0
ROWS_PER_ACTION = 3  # rows at 15 Hz in an action at 5 Hz
UNIT_VELOCITY_STEP_RAD = 0.2  # what a joint velocity of 1 means, per row
JOINT_LIMIT_TOLERANCE_RAD = 0.05  # a joint may be read this far beyond its limit without a notice
PADDED_SIDE_PX = 224  # of the square that openpi's client sends
PADDED_CONTENT_SIDES_PX = (125, 126, 168)
"""What padding leaves of the other side: of the ZED camera's 16:9 (125 for 672 x 376), and of 4:3.
"""


def observe(observation: Observation, image_key: str = EXTERIOR_IMAGE_KEY) -> dict[str, Any]:
    """Convert joint angles to an end-effector pose by forward kinematics.

    Args:
        observation: as openpi's client sends it.
        image_key: the key of the exterior camera.

    Returns:
        An observation with the keys of `spear.types.Policy`.

    Raises:
        SpearError: a value is wrong, or MuJoCo is not installed.
    """
    joints = validate_radians(read_numbers(observation, JOINTS_KEY, 7), JOINTS_KEY)
    gripper_position = float(read_numbers(observation, GRIPPER_KEY, 1)[0])
    closed = validate_opening(gripper_position, GRIPPER_KEY)

    arm = _import_kinematics()
    beyond_limits = np.maximum(arm.JOINT_LOWER_RAD - joints, joints - arm.JOINT_UPPER_RAD)
    if beyond_limits.max() > JOINT_LIMIT_TOLERANCE_RAD:
        notice(
            f"{JOINTS_KEY}: joint {beyond_limits.argmax() + 1} is where a Franka's cannot be. "
            "Check the joints' order, signs and unit before the arm moves."
        )
    position, rotation = arm.compute_ee_pose(joints)
    return {
        "observation/image": remove_padding(read_image(observation, image_key)),
        "observation/wrist_image": remove_padding(read_image(observation, WRIST_IMAGE_KEY)),
        "observation/state": make_state(position, rotation, 1 - closed),
        "prompt": read_prompt(observation),
    }


def remove_padding(image: Array) -> Array:
    """Cut off the bands with which openpi's client padded an image.

    Only bands that are black (0) throughout, and exactly as high or wide as padding makes them, are
    cut off; any other image is returned as it is.
    """
    is_padded_size = image.shape[:2] == (PADDED_SIDE_PX, PADDED_SIDE_PX)
    if not is_padded_size or image[0, 0].any():
        return image
    for axis, content_side in itertools.product((0, 1), PADDED_CONTENT_SIDES_PX):
        first = (PADDED_SIDE_PX - content_side) // 2
        band_before, content, band_after = np.split(image, (first, first + content_side), axis)
        are_bands_black = band_before.max() == 0 and band_after.max() == 0
        reaches_bands = content.take(0, axis).max() > 0 and content.take(-1, axis).max() > 0
        if are_bands_black and reaches_bands:
            return content
    return image


def convert_to_joint_position_rows(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to joint angles (rad, within the arm's speed) and gripper.

    There are 3 rows per action: [3 H, 8] float32.
    """
    max_speed = _import_kinematics().MAX_JOINT_SPEED_RAD_S
    steps = _solve_joint_steps(actions, observation, state, max_speed * ROWS_PER_ACTION / RATE_HZ)
    row_steps = np.repeat(steps / ROWS_PER_ACTION, ROWS_PER_ACTION, axis=0)
    joints = read_numbers(observation, JOINTS_KEY, 7)
    return _append_gripper(joints + row_steps.cumsum(axis=0), actions)


def convert_to_joint_velocity_rows(actions: Array, state: Array, observation: Observation) -> Array:
    """Convert actions [H, 8] to joint velocities (-1 … 1, in the platform's unit) and gripper.

    There are 3 rows per action: [3 H, 8] float32.
    """
    max_step = ROWS_PER_ACTION * UNIT_VELOCITY_STEP_RAD
    steps = _solve_joint_steps(actions, observation, state, max_step)
    return _append_gripper(np.repeat(steps / max_step, ROWS_PER_ACTION, axis=0), actions)


def convert_to_cartesian_position_rows(
    actions: Array, state: Array, observation: Observation
) -> Array:
    """Convert actions [H, 8] to the flange's x, y, z (m), roll, pitch, yaw (rad) and gripper.

    There are 3 rows per action: [3 H, 7] float32.
    """
    target_positions, target_rotations = compute_target_poses(state, actions)
    start = torch.from_numpy(np.float64(state))
    positions = torch.cat([start[None, :3], torch.from_numpy(target_positions)])
    rotations = torch.cat([start[None, 3:7], torch.from_numpy(target_rotations)])

    # Interpolate: the rows of an action lead from one pose to the next.
    row_numbers = torch.arange(1, ROWS_PER_ACTION + 1, dtype=torch.float64)
    fraction = row_numbers.repeat(len(actions)) / ROWS_PER_ACTION
    step = torch.arange(len(actions)).repeat_interleave(ROWS_PER_ACTION)
    ee_position = torch.lerp(positions[step], positions[step + 1], fraction[:, None])
    ee_rotation = quat_slerp(rotations[step], rotations[step + 1], fraction)

    # From the end-effector frame to the flange.
    ee_from_flange = torch.from_numpy(_import_kinematics().ee_from_flange())
    flange_offset, flange_rotation = pose_inverse(
        ee_from_flange[:3, 3], matrix_to_quat(ee_from_flange[:3, :3])
    )
    position, rotation = pose_compose(ee_position, ee_rotation, flange_offset, flange_rotation)
    rows = torch.cat([position, quat_to_euler(rotation, "xyz")], dim=1)
    return _append_gripper(rows.numpy(), actions)


def _import_kinematics() -> Any:
    """Import the inverse kinematics late, because they need MuJoCo."""
    import_optional("mujoco", "sim", "droid")
    from spear.embodiments import inverse_kinematics

    return inverse_kinematics


def _solve_joint_steps(
    actions: Array, observation: Observation, state: Array, max_step: Any
) -> Array:
    """Return how far the joints turn in each action, [H, 7] rad.

    A step with a joint beyond `max_step` (rad) is shortened as a whole; the next step makes up for
    it.
    """
    arm = _import_kinematics()
    joints = read_numbers(observation, JOINTS_KEY, 7)
    target = joints
    steps = []
    for position, rotation in zip(*compute_target_poses(state, actions), strict=True):
        # The posture is the last solution, so that the elbow stays where it is.
        target = arm.solve_joints(target, position, rotation, posture=target)
        excess = (np.abs(target - joints) / max_step).max()
        step = (target - joints) / max(1.0, excess)
        steps.append(step)
        joints = joints + step
    return np.stack(steps)


def _append_gripper(rows: Array, actions: Array) -> Array:
    """Append the gripper command (1 closed) of each row's action."""
    closed = 1 - np.repeat(actions[:, 7:], ROWS_PER_ACTION, axis=0)
    return np.concatenate([rows, closed], axis=1).astype(np.float32)


EMBODIMENT = Embodiment(
    required={
        EXTERIOR_IMAGE_KEY: "the exterior camera's image, uint8 [height, width, 3]",
        WRIST_IMAGE_KEY: "the wrist camera's image, uint8 [height, width, 3]",
        JOINTS_KEY: "the joint angles: 7 numbers, rad",
        GRIPPER_KEY: "the gripper's position: 0 open … 1 closed",
        "prompt": REQUIRED_KEYS["prompt"],
    },
    observe=observe,
    controls={
        "joint_velocity": Control(
            "7 joint velocities (1 is 0.2 rad per row), gripper (1 closed)",
            RATE_HZ,
            convert_to_joint_velocity_rows,
        ),
        "joint_position": Control(
            "7 joint angles (rad, within the arm's speed), gripper (1 closed)",
            RATE_HZ,
            convert_to_joint_position_rows,
        ),
        "cartesian_position": Control(
            "flange's x y z (m, base), roll pitch yaw (rad), gripper (1 closed)",
            RATE_HZ,
            convert_to_cartesian_position_rows,
        ),
    },
    example=lambda: {
        EXTERIOR_IMAGE_KEY: make_example_image(224, 224),  # as openpi's client sends them
        WRIST_IMAGE_KEY: make_example_image(224, 224),
        JOINTS_KEY: np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785]),
        GRIPPER_KEY: np.array([0.0]),
        "prompt": "put the carrot on the plate",
    },
)
