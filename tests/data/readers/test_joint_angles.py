"""A dataset of joint angles is read as the poses to which they lead."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tiny import assert_same, edit_json
from joint_datasets import (
    MOTORS,
    write_joint_and_pose_datasets,
    write_layout,
    write_numbers,
    write_pose_layout,
)
from refusals import refuses
from spear.data.frames import hash_layout_for_preparation
from spear.data.readers.formats import open_dataset, read_episodes


@pytest.mark.parametrize(("unit", "radians_per_unit"), [("deg", math.pi / 180), ("rad", 1.0)])
def test_joint_angles_and_poses_are_the_same_episodes(
    tmp_path: Path, unit: str, radians_per_unit: float
) -> None:
    joints, poses = write_joint_and_pose_datasets(tmp_path, 2, radians_per_unit)
    write_layout(joints, angle_unit=unit)
    write_pose_layout(poses)

    joint_episodes = list(read_episodes(joints))

    for episode, expected in zip(joint_episodes, read_episodes(poses), strict=True):
        # The folders, and therefore the sources, have other names.
        same_source = dataclasses.replace(episode, source=expected.source)
        assert_same(same_source, expected, atol=1e-6)


def test_joints_may_be_named_in_the_layout(tmp_path: Path) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, num_episodes=1)
    write_layout(joints)
    (expected,) = read_episodes(joints)

    def rename(info: dict[str, Any]) -> None:
        info["features"]["observation.state"]["names"] = [f"motor_{n}" for n in range(6)]

    edit_json(joints / "meta/info.json", rename)
    write_layout(joints, joints=[motor.removesuffix(".pos") for motor in MOTORS[:5]])
    (episode,) = read_episodes(joints)

    assert_same(episode, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"urdf": "../arm.urdf"}, "lies outside this folder"),
        ({"urdf": "/etc/passwd"}, "lies outside this folder"),
        ({"urdf": "absent.urdf"}, "there is no URDF"),
        ({"urdf": None}, "but no urdf"),
        ({"tip": None}, "but no tip"),
        ({"tip": "gripper_frame"}, "Did you mean 'gripper_frame_link'"),
        ({"rotation": "observation/state[0:4]"}, "are not the same column"),
        ({"joints": ["a", "b"]}, "the key joints in .* has the joints a, b"),
        (
            {"position": "observation/state", "rotation": "observation/state"},
            "has the joints .* gripper, but",
        ),
        ({"angle_unit": "rad"}, "set angle_unit to deg"),
    ],
)
def test_a_mistake_in_the_layout_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, num_episodes=1)
    write_layout(joints, **changes)

    refuses(message, lambda: list(read_episodes(joints)))


def test_radians_are_not_taken_for_degrees(tmp_path: Path) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, num_episodes=1, radians_per_unit=1.0)
    write_layout(joints)

    refuses("hardly degrees", lambda: list(read_episodes(joints)))


def test_percent_of_a_joints_range_are_refused(tmp_path: Path) -> None:
    """LeRobot cuts these numbers off at -100 and 100, the ends of a joint's range."""
    joints, _ = write_joint_and_pose_datasets(tmp_path, num_episodes=1)
    write_layout(joints)
    numbers = np.tile([12.0, -100.0, 97.0, 40.0, 0.0, 50.0], (24, 1))  # the same at all 24 steps
    write_numbers(joints, numbers, numbers, MOTORS)

    refuses("-100 … 100 of each joint's range", lambda: list(read_episodes(joints)))


def test_prepared_episodes_depend_on_the_content_of_the_urdf(tmp_path: Path) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, num_episodes=1)
    write_layout(joints)
    hash_before = hash_layout_for_preparation(open_dataset(joints).load_layout())  # type: ignore[union-attr]

    urdf = joints / "arm.urdf"
    urdf.write_text(urdf.read_text().replace("-0.135", "-0.136"))

    assert hash_layout_for_preparation(open_dataset(joints).load_layout()) != hash_before  # type: ignore[union-attr]
