"""Converts recorded joint angles of an arm to end-effector poses, as a layout's URDF says."""

from collections.abc import Sequence

import numpy as np

from spear.data.readers.dataset_layout import DatasetLayout
from spear.embodiments.kinematics import Poses
from spear.embodiments.urdf import TURN_RAD, UrdfArm, compute_urdf_pose
from spear.errors import SpearError
from spear.types import Array
from spear.util.units import ANGLE_UNITS, LENGTH_UNITS

NORMALIZED_LIMIT = 100.0
"""LeRobot's value of a joint at the end of its range, if the robot does not give degrees."""


def compute_tip_poses(joints: Array, layout: DatasetLayout, source: str) -> Poses:
    """Compute the poses of the tip of a layout's arm from joint angles, in the frame of its base.

    Args:
        joints: [T, d] joint angles, in the units of the layout.
        layout: The layout, with an `arm`.
        source: The name of the episode, for error messages.

    Returns:
        Positions [T, 3] (m) and canonical unit quaternions [T, 4] (w, x, y, z), float64.

    Raises:
        SpearError: If the number of joints is not the arm's, or the angles have another unit.
    """
    assert layout.arm is not None
    return compute_urdf_pose(
        layout.arm, convert_joint_units(joints, layout, source), layout.joints, source
    )


def convert_joint_units(joints: Array, layout: DatasetLayout, source: str) -> Array:
    """Convert joint angles [T, d] from the units of a layout to rad (m for a prismatic joint).

    Numbers of another width than the arm's stay unchanged, and `compute_urdf_pose` refuses them.
    """
    assert layout.arm is not None
    joints = joints.reshape(len(joints), -1)
    names = layout.joints or layout.arm.moving_joint_names
    if joints.shape[1] != len(names):
        return joints
    is_angle = _mark_angles(layout.arm, names)
    if layout.angle_unit == "deg":
        check_is_in_degrees(joints[:, is_angle], source)
    factors = np.where(is_angle, ANGLE_UNITS[layout.angle_unit], LENGTH_UNITS[layout.length_unit])
    return np.asarray(joints * factors)


def _mark_angles(arm: UrdfArm, names: Sequence[str]) -> Array:
    """Mark the numbers [d] that are angles; the others are distances of prismatic joints."""
    joint_type = {joint.name: joint.joint_type for joint in arm.moving_joints}
    return np.array([joint_type[name] != "prismatic" for name in names])


def check_is_in_degrees(angles: Array, source: str) -> None:
    """Raise SpearError for numbers [T, d] that are hardly degrees.

    LeRobot's numbers of a joint's range end at 100, and a folded arm reaches an end of its range.
    Degrees that end at exactly 100 are improbable, and so is an arm of which no joint turns by more
    than the radians of a whole turn.
    """
    largest = np.abs(angles).max(initial=0)
    if largest == NORMALIZED_LIMIT:
        raise SpearError(
            f"the joints of {source} end at exactly 100, so their numbers are -100 … 100 of each "
            "joint's range instead of degrees. Record with use_degrees=true, or convert them "
            "(docs/howto/lerobot.md)."
        )
    if 0 < largest < TURN_RAD:
        raise SpearError(
            f"the joints of {source} turn by {largest:.3g} at most, which are hardly degrees. If "
            "they are radians, set angle_unit to rad in spear.json."
        )
