"""Checks recorded joint angles against the limits that the arm's URDF states."""

import itertools

import numpy as np

from spear.checks.result import Check
from spear.data.readers.build_episode import drop_bad_rows_unless_most_are_bad
from spear.data.readers.columns import read_numbers
from spear.data.readers.dataset_layout import DatasetLayout
from spear.data.readers.formats import Dataset
from spear.data.readers.joint_angles import convert_joint_units
from spear.embodiments.urdf import UrdfJoint, compute_urdf_pose
from spear.errors import SpearError
from spear.types import Array

MAX_EPISODES = 12  # the joints of this many episodes are read, the first ones
MAX_EXCESS_RAD = 0.26  # 15°: a calibration puts the zero of a joint a few degrees off
MIN_HEIGHT_M = -0.03
"""A tip that goes lower than this below the base would be inside the table, unless the base stands
higher than the table. A shoulder that is 2° off moves a tip that is 0.3 m away by 0.01 m."""


def judge_joint_limits(folder: Dataset, split: str, layout: DatasetLayout) -> list[Check]:
    """Judge whether joints stay within their limits, and say where the tip goes.

    The layout must have an arm. Targets of joints say nothing about zeros, signs and the tip,
    because states and targets share them. Limits do: with a wrong zero or sign, some joint usually
    leaves its own, or the tip is at impossible heights.
    """
    assert layout.arm is not None
    # One entry per episode: the joints [T, d] and the tip's positions [T, 3]
    all_joints: list[Array] = []
    all_positions: list[Array] = []
    for source, recorded_steps in itertools.islice(folder.read_steps(split, ()), MAX_EPISODES):
        if isinstance(recorded_steps, SpearError):
            continue
        steps, _ = drop_bad_rows_unless_most_are_bad(recorded_steps, layout, source)
        numbers = read_numbers(steps, str(layout.position), source)
        converted = convert_joint_units(numbers, layout, source)
        positions, _ = compute_urdf_pose(layout.arm, converted, layout.joints, source)
        all_joints.append(converted)
        all_positions.append(positions)
    if not all_joints:
        return []

    joints = np.concatenate(all_joints)  # [T, d]
    heights_m = np.concatenate(all_positions)[:, 2]
    tip = f"{layout.tip} is {heights_m.min():.2f} to {heights_m.max():.2f} m above the base"
    joint_by_name = {joint.name: joint for joint in layout.arm.moving_joints}
    names = layout.joints or layout.arm.moving_joint_names
    violations = []
    for name, values in zip(names, joints.T, strict=True):
        words = _describe_violation(joint_by_name[name], values)
        if words:
            violations.append(words)
    if violations:
        words = (
            f"{'; '.join(violations)}; check the zeros, the unit, and that the URDF is that of the "
            f"arm's calibration ({tip})"
        )
        return [Check("joints", "cannot tell", words)]
    if heights_m.min() < MIN_HEIGHT_M:
        words = (
            f"{tip}; unless the base stands higher than the table, the zero or the sign of a joint "
            f"is wrong, or the link"
        )
        return [Check("joints", "cannot tell", words)]
    words = (
        f"all stay within the limits of the URDF; {tip}: compare these heights with your "
        f"recordings, since nothing else shows a wrong zero or sign"
    )
    return [Check("joints", "agrees", words)]


def _describe_violation(joint: UrdfJoint, values: Array) -> str:
    """Say how far the values [T] of a joint are outside its limits; "" if not far."""
    is_angle = joint.joint_type == "revolute"
    if joint.limits is None or not is_angle:
        return ""
    lower, upper = joint.limits
    lowest = float(values.min())
    highest = float(values.max())
    if max(lower - lowest, highest - upper) <= MAX_EXCESS_RAD:
        return ""
    lowest_deg, highest_deg, lower_deg, upper_deg = np.degrees([lowest, highest, lower, upper])
    return (
        f"{joint.name} goes from {lowest_deg:.0f}° to {highest_deg:.0f}°, but by the URDF from "
        f"{lower_deg:.0f}° to {upper_deg:.0f}°"
    )
