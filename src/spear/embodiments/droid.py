"""The DROID platform (Franka), with the observation keys of openpi's DROID client.

Facts about the platform (droid-dataset/droid, robot_ik_solver.py and franka/robot.py):

- It takes one row of numbers per step, at 15 Hz.
- A joint velocity of 1 asks for 0.2 rad in one step. If a velocity is larger, the platform scales
  all joints' velocities down.
- A gripper position of 1 is closed, and 0 is open.
- Cartesian positions are poses of the flange (the end of the last link), with its orientation as
  roll, pitch, yaw (R = Rz Ry Rx).

Our choices: the end-effector frame is at the point between the closed pads of DROID's Robotiq
2F-85, 0.1548 m from the flange, and its y axis is the one along which the fingers close
(`ROBOTIQ`). Policies that learned the first version of DROID's frames act in this first version:
there the tool is Franka's own hand (`FRANKA_HAND`), turned by 45° and with its finger tips 0.1034 m
from the flange.

The five actions of a chunk at 5 Hz become fifteen rows at 15 Hz, which lie on straight lines
between joint angles, or on straight lines and geodesics between poses. Joint angles come from
`spear.embodiments.inverse_kinematics`, which stays inside the joint limits and gets as near to the
target pose as it can.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spear.embodiments import Control, Embodiment, Observation
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.kinematics import Poses
from spear.embodiments.observations import (
    OPENPI_SIDE_PX,
    REQUIRED_KEYS,
    crop_openpi_padding,
    make_example_image,
    make_state,
    read_image,
    read_numbers,
    read_prompt,
    validate_and_clip_opening,
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
UNIT_VELOCITY_STEP_RAD = 0.2  # how far a joint velocity of 1 turns a joint in one row
JOINT_LIMIT_TOLERANCE_RAD = 0.05  # a joint may be read this far beyond its limit without a notice


@dataclass(frozen=True)
class Tool:
    """A gripper on the flange, described by its end-effector frame.

    Attributes:
        offset_m: position of the gripper's finger tips in the end-effector frame of Franka's own
            hand.
        rotation: quaternion (w, x, y, z) of the rotation from the hand's end-effector frame to the
            tool's, by which orientations are multiplied from the right.
    """

    offset_m: tuple[float, float, float]
    rotation: tuple[float, float, float, float]

    def convert_hand_to_tool_poses(self, position: Array, rotation: Array) -> Poses:
        """Convert poses [..., 3], [..., 4] of the hand's end-effector frame to the tool's."""
        return self._compose(position, rotation, self._get_pose_in_hand())

    def convert_tool_to_hand_poses(self, position: Array, rotation: Array) -> Poses:
        """Convert poses of the tool's end-effector frame to the hand's: the inverse."""
        tool_position, tool_rotation = self._get_pose_in_hand()
        return self._compose(position, rotation, pose_inverse(tool_position, tool_rotation))

    def _get_pose_in_hand(self) -> tuple[Tensor, Tensor]:
        """Return the tool's end-effector frame in the hand's: position [3], quaternion [4]."""
        offset = torch.tensor(self.offset_m, dtype=torch.float64)
        return offset, torch.tensor(self.rotation, dtype=torch.float64)

    def _compose(self, position: Array, rotation: Array, change: tuple[Tensor, Tensor]) -> Poses:
        """Compose poses [..., 3], [..., 4] with a pose in their own frame."""
        change_position, change_rotation = change
        composed_position, composed_rotation = pose_compose(
            torch.from_numpy(np.float64(position)),
            torch.from_numpy(np.float64(rotation)),
            change_position,
            change_rotation,
        )
        return Poses(composed_position.numpy(), composed_rotation.numpy())


FRANKA_HAND = Tool(offset_m=(0.0, 0.0, 0.0), rotation=(1.0, 0.0, 0.0, 0.0))
ROBOTIQ = Tool(
    # 0.1034 - 0.1548: the hand's tips are 0.1034 m from the flange, and z points to the flange.
    offset_m=(0.0, 0.0, -0.0514),
    rotation=(0.9238795325112867, 0.0, 0.0, -0.3826834323650898),  # -45° about z
)
"""DROID's gripper. The numbers are those of the dataset's layout (`tool_rotation` and `tool_offset`
of "droid" in oxe.toml, which names the sources)."""


def convert_to_policy_observation(
    observation: Observation, image_key: str = EXTERIOR_IMAGE_KEY, tool: Tool = ROBOTIQ
) -> dict[str, Any]:
    """Convert an observation of openpi's DROID client to one of `spear.types.Policy`.

    The end-effector pose is computed from the joint angles by forward kinematics.

    Args:
        observation: the client's observation.
        image_key: the key of the exterior camera's image.
        tool: the gripper whose end-effector frame the policy learned.

    Returns:
        An observation with the keys of `spear.types.Policy`.

    Raises:
        SpearError: a value is wrong, or MuJoCo is not installed.
    """
    joints = validate_radians(read_numbers(observation, JOINTS_KEY, 7), JOINTS_KEY)
    gripper_reading = float(read_numbers(observation, GRIPPER_KEY, 1)[0])
    gripper_position = validate_and_clip_opening(gripper_reading, GRIPPER_KEY)  # 0 open … 1 closed

    arm = _import_kinematics()
    # By how much each joint is beyond one of its limits, [7] rad; negative within the limits.
    excess_rad = np.maximum(arm.JOINT_LOWER_RAD - joints, joints - arm.JOINT_UPPER_RAD)
    if excess_rad.max() > JOINT_LIMIT_TOLERANCE_RAD:
        notice(
            f"joint {excess_rad.argmax() + 1} of {JOINTS_KEY} is where a Franka's cannot be. "
            "Check the joints' order, signs and unit before the arm moves."
        )
    hand_position, hand_rotation = arm.compute_ee_pose(joints)
    position, rotation = tool.convert_hand_to_tool_poses(hand_position, hand_rotation)
    return {
        "observation/image": crop_openpi_padding(read_image(observation, image_key)),
        "observation/wrist_image": crop_openpi_padding(read_image(observation, WRIST_IMAGE_KEY)),
        "observation/state": make_state(position, rotation, opening=1 - gripper_position),
        "prompt": read_prompt(observation),
    }


def convert_to_joint_position_rows(
    actions: Array, state: Array, observation: Observation, tool: Tool = ROBOTIQ
) -> Array:
    """Convert actions to joint angles and gripper positions.

    Args:
        actions: [H, 8] the action chunk.
        state: [8] the state from which it begins.
        observation: the client's observation.
        tool: the gripper whose end-effector frame the policy learned.

    Returns:
        [3 H, 8] float32, three rows per action: joint angles (rad), which change no faster than the
        arm can move, and the gripper position (1 closed).
    """
    max_speed_rad_s = _import_kinematics().MAX_JOINT_SPEED_RAD_S  # [7]
    max_step_rad = max_speed_rad_s * ROWS_PER_ACTION / RATE_HZ  # [7] in one action
    steps_rad = _solve_joint_steps(actions, observation, state, max_step_rad, tool)  # [H, 7]
    row_steps_rad = np.repeat(steps_rad / ROWS_PER_ACTION, ROWS_PER_ACTION, axis=0)  # [3 H, 7]
    joints = read_numbers(observation, JOINTS_KEY, 7)
    return _append_gripper_position(joints + row_steps_rad.cumsum(axis=0), actions)


def convert_to_joint_velocity_rows(
    actions: Array, state: Array, observation: Observation, tool: Tool = ROBOTIQ
) -> Array:
    """Convert actions to joint velocities and gripper positions.

    The arguments are those of `convert_to_joint_position_rows`.

    Returns:
        [3 H, 8] float32, three rows per action: joint velocities (-1 … 1, in the platform's unit),
        and the gripper position (1 closed).
    """
    max_step_rad = ROWS_PER_ACTION * UNIT_VELOCITY_STEP_RAD  # in one action, at velocity 1
    steps_rad = _solve_joint_steps(actions, observation, state, max_step_rad, tool)  # [H, 7]
    velocities = np.repeat(steps_rad / max_step_rad, ROWS_PER_ACTION, axis=0)  # [3 H, 7]
    return _append_gripper_position(velocities, actions)


def convert_to_cartesian_position_rows(
    actions: Array, state: Array, observation: Observation, tool: Tool = ROBOTIQ
) -> Array:
    """Convert actions to poses of the flange and gripper positions.

    The arguments are those of `convert_to_joint_position_rows`.

    Returns:
        [3 H, 7] float32, three rows per action: the flange's x, y, z (m, base frame), its roll,
        pitch, yaw (rad), and the gripper position (1 closed).
    """
    # The end-effector's pose at the start, and after each action.
    target_positions, target_rotations = compute_target_poses(state, actions)
    start = torch.from_numpy(np.float64(state))
    positions = torch.cat([start[None, :3], torch.from_numpy(target_positions)])  # [H + 1, 3]
    rotations = torch.cat([start[None, 3:7], torch.from_numpy(target_rotations)])  # [H + 1, 4]

    # Interpolate: the rows of an action lead from one pose to the next.
    row_numbers = torch.arange(1, ROWS_PER_ACTION + 1, dtype=torch.float64)  # 1, 2, 3
    fraction = row_numbers.repeat(len(actions)) / ROWS_PER_ACTION  # [3 H] 1/3, 2/3, 1, 1/3, …
    # [3 H] the pose from which each row's action starts: 0, 0, 0, 1, …
    start_index = torch.arange(len(actions)).repeat_interleave(ROWS_PER_ACTION)
    end_index = start_index + 1
    ee_position = torch.lerp(positions[start_index], positions[end_index], fraction[:, None])
    ee_rotation = quat_slerp(rotations[start_index], rotations[end_index], fraction)  # [3 H, 4]

    # Convert poses of the tool's end-effector frame to poses of the hand's, and of the flange.
    hand_position, hand_rotation = tool.convert_tool_to_hand_poses(
        ee_position.numpy(), ee_rotation.numpy()
    )
    ee_in_flange = torch.from_numpy(_import_kinematics().get_ee_pose_matrix_in_flange())  # [4, 4]
    # The inverse pose: offset [3] and rotation [4] of the flange in the hand's end-effector frame.
    flange_offset_in_ee, flange_rotation_in_ee = pose_inverse(
        ee_in_flange[:3, 3], matrix_to_quat(ee_in_flange[:3, :3])
    )
    position, rotation = pose_compose(
        torch.from_numpy(hand_position),
        torch.from_numpy(hand_rotation),
        flange_offset_in_ee,
        flange_rotation_in_ee,
    )
    rows = torch.cat([position, quat_to_euler(rotation, "xyz")], dim=1)  # [3 H, 6]
    return _append_gripper_position(rows.numpy(), actions)


def _import_kinematics() -> Any:
    """Import the module of inverse kinematics. It is imported late, because it needs MuJoCo."""
    import_optional("mujoco", extra="sim", feature="droid")
    from spear.embodiments import inverse_kinematics

    return inverse_kinematics


def _solve_joint_steps(
    actions: Array, observation: Observation, state: Array, max_step_rad: Any, tool: Tool
) -> Array:
    """Compute by how much the joints turn in each action.

    If a joint would turn by more than it may, the step of all joints is scaled down, so that the
    arm does not reach the action's target. The step of the next action begins where the arm is, and
    makes up for the difference.

    Args:
        actions: [H, 8] the action chunk.
        observation: the client's observation.
        state: [8] the state from which the chunk begins.
        max_step_rad: how far a joint may turn in one action, rad; a number or [7].
        tool: the gripper whose end-effector frame the policy learned.

    Returns:
        [H, 7] rad.
    """
    arm = _import_kinematics()
    joints = read_numbers(observation, JOINTS_KEY, 7)  # where the steps so far lead
    target_joints = joints
    steps = []
    tool_positions, tool_rotations = compute_target_poses(state, actions)
    hand_positions, hand_rotations = tool.convert_tool_to_hand_poses(tool_positions, tool_rotations)
    for position, rotation in zip(hand_positions, hand_rotations, strict=True):
        # The preferred posture is the last solution, so that the elbow does not drift.
        target_joints = arm.solve_joints(target_joints, position, rotation, posture=target_joints)
        wanted_step = target_joints - joints
        excess_factor = (np.abs(wanted_step) / max_step_rad).max()
        step = wanted_step / max(1.0, excess_factor)
        steps.append(step)
        joints = joints + step
    return np.stack(steps)


def _append_gripper_position(rows: Array, actions: Array) -> Array:
    """Append the gripper position (1 closed) that each row's action commands.

    Args:
        rows: [3 H, n] the commands of the arm.
        actions: [H, 8] the action chunk.

    Returns:
        [3 H, n + 1] float32.
    """
    openings = np.repeat(actions[:, 7:], ROWS_PER_ACTION, axis=0)  # [3 H, 1]
    return np.concatenate([rows, 1 - openings], axis=1).astype(np.float32)


def make_controls(tool: Tool) -> dict[str, Control]:
    """Make the controls of a robot whose policy acts in the end-effector frame of a tool."""
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
    """Make the embodiment of one version of DROID's frames.

    Args:
        tool: the gripper whose end-effector frame policies of this version act in.
        frame_version: the number of the version.
        earlier_versions: version → embodiment.
    """
    return Embodiment(
        required={
            EXTERIOR_IMAGE_KEY: "the exterior camera's image, uint8 [height, width, 3]",
            WRIST_IMAGE_KEY: "the wrist camera's image, uint8 [height, width, 3]",
            JOINTS_KEY: "the 7 joint angles in rad",
            GRIPPER_KEY: "the gripper's position: 0 open … 1 closed",
            "prompt": REQUIRED_KEYS["prompt"],
        },
        observe=functools.partial(convert_to_policy_observation, tool=tool),
        controls=make_controls(tool),
        example=make_example,
        frame=FRAME,
        frame_version=frame_version,
        earlier_versions=earlier_versions,
    )


def make_example() -> dict[str, Any]:
    """Make an observation as openpi's client sends it, with images of its size."""
    return {
        EXTERIOR_IMAGE_KEY: make_example_image(OPENPI_SIDE_PX, OPENPI_SIDE_PX),
        WRIST_IMAGE_KEY: make_example_image(OPENPI_SIDE_PX, OPENPI_SIDE_PX),
        # Franka's home posture: multiples of 45°, rad.
        JOINTS_KEY: np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785]),
        GRIPPER_KEY: np.array([0.0]),
        "prompt": "put the carrot on the plate",
    }


EMBODIMENT = make_embodiment(
    ROBOTIQ,
    frame_version=2,
    earlier_versions={1: make_embodiment(FRANKA_HAND, frame_version=1, earlier_versions={})},
)
