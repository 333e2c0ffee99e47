"""The DROID platform (Franka), with the observation keys of openpi's DROID client.

Facts (droid-dataset/droid, robot_ik_solver.py and franka/robot.py): the rate is 15 Hz; a joint
velocity of 1 asks for 0.2 rad in one step, and a vector with a larger entry is shortened as a
whole; gripper positions are 1 closed, 0 open; cartesian positions are those of the flange, with
roll, pitch, yaw (R = Rz Ry Rx). openpi's client sends images scaled into a square of 224 pixels
with black bands. `remove_padding` cuts the bands off, because the model adds its own: with both,
the scene would be smaller than in training.

Departures: the end-effector is the point between the closed pads of DROID's Robotiq 2F-85, 0.1548 m
from the flange, whose y axis the fingers close along (`ROBOTIQ`). Policies that learned the first
version of DROID's frames act in it: there the tool is Franka's own hand (`FRANKA_HAND`), turned by
45° and with its tips 0.1034 m from the flange. A chunk's five actions at 5 Hz become fifteen rows
at 15 Hz on straight lines (joints) or geodesics (poses). Joints come from
`spear.embodiments.inverse_kinematics`, which stays inside the joint limits and goes as near to the
target as it can.
"""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

FRAME = "droid"
RATE_HZ = 15.0
ROWS_PER_ACTION = 3  # rows at 15 Hz in an action at 5 Hz
UNIT_VELOCITY_STEP_RAD = 0.2  # what a joint velocity of 1 means, per row
JOINT_LIMIT_TOLERANCE_RAD = 0.05  # a joint may be read this far beyond its limit without a notice
PADDED_SIDE_PX = 224  # of the square that openpi's client sends
PADDED_CONTENT_SIDES_PX = (125, 126, 168)
"""What padding leaves of the other side: of the ZED camera's 16:9 (125 for 672 x 376), and of 4:3.
"""


@dataclass(frozen=True)
class Tool:
    """A gripper on the flange: its end-effector frame, seen from that of Franka's own hand.

    Attributes:
        offset_m: position of its finger tips in the hand's end-effector frame.
        rotation: quaternion (w, x, y, z) from the right, from the hand's frame to the tool's.
    """

    offset_m: tuple[float, float, float]
    rotation: tuple[float, float, float, float]

    def from_hand(self, position: Array, rotation: Array) -> tuple[Array, Array]:
        """Convert poses [..., 3], [..., 4] of the hand's end-effector frame to the tool's."""
        return self._compose(position, rotation, self._pose())

    def to_hand(self, position: Array, rotation: Array) -> tuple[Array, Array]:
        """Invert `from_hand`."""
        return self._compose(position, rotation, pose_inverse(*self._pose()))

    def _pose(self) -> tuple[Tensor, Tensor]:
        offset = torch.tensor(self.offset_m, dtype=torch.float64)
        return offset, torch.tensor(self.rotation, dtype=torch.float64)

    def _compose(
        self, position: Array, rotation: Array, change: tuple[Tensor, Tensor]
    ) -> tuple[Array, Array]:
        start = (torch.from_numpy(np.float64(position)), torch.from_numpy(np.float64(rotation)))
        composed_position, composed_rotation = pose_compose(*start, *change)
        return composed_position.numpy(), composed_rotation.numpy()


FRANKA_HAND = Tool(offset_m=(0.0, 0.0, 0.0), rotation=(1.0, 0.0, 0.0, 0.0))
ROBOTIQ = Tool(
    offset_m=(0.0, 0.0, -0.0514),  # 0.1548 m from the flange, the hand's tips 0.1034 m
    rotation=(0.9238795325112867, 0.0, 0.0, -0.3826834323650898),  # -45° about z
)
"""DROID's gripper, as the dataset's layout has it (`tool_rotation` and `tool_offset` of "droid" in
oxe.toml, with the sources)."""


def observe(
    observation: Observation, image_key: str = EXTERIOR_IMAGE_KEY, tool: Tool = ROBOTIQ
) -> dict[str, Any]:
    """Convert joint angles to an end-effector pose by forward kinematics.

    Args:
        observation: as openpi's client sends it.
        image_key: the key of the exterior camera.
        tool: the gripper whose end-effector frame the policy knows.

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
    position, rotation = tool.from_hand(*arm.compute_ee_pose(joints))
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


def convert_to_joint_position_rows(
    actions: Array, state: Array, observation: Observation, tool: Tool = ROBOTIQ
) -> Array:
    """Convert actions [H, 8] to joint angles (rad, within the arm's speed) and gripper.

    There are 3 rows per action: [3 H, 8] float32.
    """
    max_speed = _import_kinematics().MAX_JOINT_SPEED_RAD_S
    max_step = max_speed * ROWS_PER_ACTION / RATE_HZ
    steps = _solve_joint_steps(actions, observation, state, max_step, tool)
    row_steps = np.repeat(steps / ROWS_PER_ACTION, ROWS_PER_ACTION, axis=0)
    joints = read_numbers(observation, JOINTS_KEY, 7)
    return _append_gripper(joints + row_steps.cumsum(axis=0), actions)


def convert_to_joint_velocity_rows(
    actions: Array, state: Array, observation: Observation, tool: Tool = ROBOTIQ
) -> Array:
    """Convert actions [H, 8] to joint velocities (-1 … 1, in the platform's unit) and gripper.

    There are 3 rows per action: [3 H, 8] float32.
    """
    max_step = ROWS_PER_ACTION * UNIT_VELOCITY_STEP_RAD
    steps = _solve_joint_steps(actions, observation, state, max_step, tool)
    return _append_gripper(np.repeat(steps / max_step, ROWS_PER_ACTION, axis=0), actions)


def convert_to_cartesian_position_rows(
    actions: Array, state: Array, observation: Observation, tool: Tool = ROBOTIQ
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

    # From the end-effector frame to the hand's, and to the flange.
    hand_position, hand_rotation = tool.to_hand(ee_position.numpy(), ee_rotation.numpy())
    ee_from_flange = torch.from_numpy(_import_kinematics().ee_from_flange())
    flange_offset, flange_rotation = pose_inverse(
        ee_from_flange[:3, 3], matrix_to_quat(ee_from_flange[:3, :3])
    )
    position, rotation = pose_compose(
        torch.from_numpy(hand_position),
        torch.from_numpy(hand_rotation),
        flange_offset,
        flange_rotation,
    )
    rows = torch.cat([position, quat_to_euler(rotation, "xyz")], dim=1)
    return _append_gripper(rows.numpy(), actions)


def _import_kinematics() -> Any:
    """Import the inverse kinematics late, because they need MuJoCo."""
    import_optional("mujoco", "sim", "droid")
    from spear.embodiments import inverse_kinematics

    return inverse_kinematics


def _solve_joint_steps(
    actions: Array, observation: Observation, state: Array, max_step: Any, tool: Tool
) -> Array:
    """Return how far the joints turn in each action, [H, 7] rad.

    A step with a joint beyond `max_step` (rad) is shortened as a whole; the next step makes up for
    it.
    """
    arm = _import_kinematics()
    joints = read_numbers(observation, JOINTS_KEY, 7)
    target = joints
    steps = []
    hand_poses = tool.to_hand(*compute_target_poses(state, actions))
    for position, rotation in zip(*hand_poses, strict=True):
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


def make_controls(tool: Tool) -> dict[str, Control]:
    """Make the controls of a robot with this gripper."""
    return {
        "joint_velocity": Control(
            "7 joint velocities (1 is 0.2 rad per row), gripper (1 closed)",
            RATE_HZ,
            functools.partial(convert_to_joint_velocity_rows, tool=tool),
        ),
        "joint_position": Control(
            "7 joint angles (rad, within the arm's speed), gripper (1 closed)",
            RATE_HZ,
            functools.partial(convert_to_joint_position_rows, tool=tool),
        ),
        "cartesian_position": Control(
            "flange's x y z (m, base), roll pitch yaw (rad), gripper (1 closed)",
            RATE_HZ,
            functools.partial(convert_to_cartesian_position_rows, tool=tool),
        ),
    }


def make_embodiment(
    tool: Tool, frame_version: int, earlier_versions: Mapping[int, Embodiment]
) -> Embodiment:
    """Make the embodiment with a version of DROID's frames."""
    return Embodiment(
        required={
            EXTERIOR_IMAGE_KEY: "the exterior camera's image, uint8 [height, width, 3]",
            WRIST_IMAGE_KEY: "the wrist camera's image, uint8 [height, width, 3]",
            JOINTS_KEY: "the joint angles: 7 numbers, rad",
            GRIPPER_KEY: "the gripper's position: 0 open … 1 closed",
            "prompt": REQUIRED_KEYS["prompt"],
        },
        observe=functools.partial(observe, tool=tool),
        controls=make_controls(tool),
        example=make_example,
        frame=FRAME,
        frame_version=frame_version,
        earlier_versions=earlier_versions,
    )


def make_example() -> dict[str, Any]:
    """Make an observation as openpi's client sends it."""
    return {
        EXTERIOR_IMAGE_KEY: make_example_image(224, 224),
        WRIST_IMAGE_KEY: make_example_image(224, 224),
        JOINTS_KEY: np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785]),
        GRIPPER_KEY: np.array([0.0]),
        "prompt": "put the carrot on the plate",
    }


EMBODIMENT = make_embodiment(
    ROBOTIQ, frame_version=2, earlier_versions={1: make_embodiment(FRANKA_HAND, 1, {})}
)
