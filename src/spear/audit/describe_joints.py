"""Propose the layout of a dataset of joint angles, for an arm whose URDF a person gives."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from spear.data.readers.dataset_layout import URDF_JOINTS
from spear.data.readers.formats import Dataset
from spear.data.readers.joint_angles import check_is_in_degrees
from spear.data.readers.lerobot import MOTOR_SUFFIX, LeRobotFolder
from spear.embodiments.urdf import TURN_RAD, UrdfArm, read_urdf_arm
from spear.errors import SpearError
from spear.types import Array

GRIPPER_NAME = "gripper"  # LeRobot's name of the motor of a gripper
LEROBOT_GRIPPER_RANGE = [0.0, 100.0]  # LeRobot's readings of a closed and of an open gripper
MIN_LEROBOT_OPENING = 2.0  # a gripper that never reads more is not in percent

Columns = Mapping[str, Sequence[Array]]
"""Column → its values [T, d] in each episode."""


class JointStart(NamedTuple):
    """A column, and the index of the first of its numbers that is a joint."""

    column: str
    first: int


class JointColumns(NamedTuple):
    """Where a dataset has the joint angles of an arm.

    Attributes:
        state: Where the measured angles begin.
        action: Likewise of the commanded angles; None if there are none.
        num_joints: How many numbers the joints have.
    """

    state: JointStart
    action: JointStart | None
    num_joints: int

    def list_starts(self) -> list[JointStart]:
        """List where the measured angles begin, and the commanded ones, if there are any."""
        return [self.state] if self.action is None else [self.state, self.action]


def resolve_joint_columns(columns: Columns, folder: Dataset, urdf: Path, tip: str) -> JointColumns:
    """Find the joint angles of an arm.

    Args:
        columns: The columns that may be measurements or commands.
        folder: The dataset.
        urdf: The URDF of the arm.
        tip: Its link between the finger tips.

    Raises:
        SpearError: If the URDF cannot be used, or no column has the arm's joints.
    """
    arm = read_urdf_arm(urdf, tip)
    states = [name for name in columns if "action" not in name]
    actions = [name for name in columns if "action" in name]
    state = _find_joints(columns, states, folder, arm)
    if state is None:
        raise SpearError(
            f"no column of {folder.path} has the joints between the base and the link {tip!r} of "
            f"{urdf} ({', '.join(arm.moving_joint_names)}). Give another --tip, or write "
            "spear.json yourself (docs/reference/spear-json.md)."
        )
    action = _find_joints(columns, actions, folder, arm)
    return JointColumns(state, action, len(arm.moving_joint_names))


def _find_joints(
    columns: Columns, column_names: Sequence[str], folder: Dataset, arm: UrdfArm
) -> JointStart | None:
    """Find the first of some columns that has the joints of an arm, and where they begin in it."""
    num_joints = len(arm.moving_joint_names)
    for name in column_names:
        components = _list_motors(folder, name)
        for first in range(len(components) - num_joints + 1):
            if sorted(components[first : first + num_joints]) == sorted(arm.moving_joint_names):
                return JointStart(name, first)

    # Numbers without names: the joints, perhaps with the gripper behind them.
    for name in column_names:
        width = columns[name][0].shape[1]
        if not _list_motors(folder, name) and width in (num_joints, num_joints + 1):
            return JointStart(name, 0)
    return None


def _list_motors(folder: Dataset, column: str) -> list[str]:
    """List the names of a column's numbers, without the suffix of LeRobot's motors."""
    if not isinstance(folder, LeRobotFolder):
        return []
    return [name.removesuffix(MOTOR_SUFFIX) for name in folder.component_names(column)]


def make_joint_fields_and_facts(
    columns: Columns, joint_columns: JointColumns, urdf: Path, tip: str
) -> tuple[dict[str, Any], dict[str, str]]:
    """Describe joint angles, and commanded joint angles, by the keys of spear.json.

    Returns:
        Key → value, and key → why (`facts`).

    Raises:
        SpearError: If the angles are in LeRobot's −100 … 100 of the range of each joint.
    """
    num_joints = joint_columns.num_joints
    column, first = joint_columns.state
    angles = np.concatenate(columns[column])[:, first : first + num_joints]
    largest = float(np.abs(angles).max(initial=0))
    is_in_degrees = largest > TURN_RAD
    if is_in_degrees:
        check_is_in_degrees(angles, column)

    state_range = f"{column}[{first}:{first + num_joints}]"
    fields: dict[str, Any] = {
        "position": state_range,
        "rotation": state_range,
        "rotation_format": URDF_JOINTS,
        "urdf": urdf.name,
        "tip": tip,
        "angle_unit": "deg" if is_in_degrees else "rad",
    }
    facts = {
        "position": "joint angles, from which the URDF computes the poses of the tip",
        "angle_unit": f"the largest angle is {largest:.3g}",
    }
    if joint_columns.action is not None:
        column, first = joint_columns.action
        action_range = f"{column}[{first}:{first + num_joints}]"
        fields |= {
            "logged_translation": action_range,
            "logged_rotation": action_range,
            "logged_rotation_format": URDF_JOINTS,
            "logged_kind": "absolute",
            "logged_frame": "base",
        }
        facts["logged_kind"] = "commands of joints are targets"
    return fields, facts


def make_lerobot_gripper_fields(
    columns: Columns, folder: Dataset, joint_columns: JointColumns
) -> dict[str, Any]:
    """Describe a gripper that LeRobot's names show: 0 is closed, and 100 open.

    Returns:
        Key → value; empty if there is no such name, or the readings do not look like percent.
    """
    # Of the state, and of the action if there is one.
    keys = (("gripper", "gripper_range"), ("command", "command_range"))
    fields: dict[str, Any] = {}
    for (key, range_key), (column, _) in zip(keys, joint_columns.list_starts(), strict=False):
        motors = _list_motors(folder, column)
        if GRIPPER_NAME not in motors:
            continue
        index = motors.index(GRIPPER_NAME)
        largest = max(float(values[:, index].max()) for values in columns[column])
        if largest > MIN_LEROBOT_OPENING:
            fields[key] = f"{column}[{index}]"
            fields[range_key] = LEROBOT_GRIPPER_RANGE
    return fields


def list_state_joint_names(columns: Sequence[str], folder: Dataset) -> list[str]:
    """List the names of joints that a dataset's metadata give to the numbers of its states."""
    joints: list[str] = []
    if isinstance(folder, LeRobotFolder):
        for column in columns:
            if "action" not in column:
                joints += folder.find_joint_names(column)
    return joints
