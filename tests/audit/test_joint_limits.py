"""Tests what the audit says about joint angles: their limits, and the heights of the tip."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from joint_datasets import (
    MOTORS,
    NUM_STEPS,
    make_joint_angles,
    write_joint_and_pose_datasets,
    write_numbers,
)
from joint_datasets import write_layout as write_joint_layout
from spear.audit.dataset_audit import load_layout_with_logged_actions
from spear.audit.joint_limits import judge_joint_limits
from spear.checks.result import Check
from spear.data.readers.formats import open_dataset
from spear.data.store.episode_store import EpisodeStore

SHOULDER_LIFT = 1


def examine(folder: Path, change: Callable[[np.ndarray], None]) -> Check:
    """Examine three episodes whose joint angles [T, 5] in rad were changed in place."""
    dataset, _ = write_joint_and_pose_datasets(folder)
    states = []
    for index in range(3):
        joints = make_joint_angles(index)
        change(joints)
        states.append(np.c_[np.degrees(joints), np.full(NUM_STEPS, 50.0)])
    write_numbers(dataset, np.concatenate(states), np.concatenate(states), MOTORS)
    write_joint_layout(dataset)

    opened = open_dataset(dataset)
    assert not isinstance(opened, EpisodeStore)
    (check,) = judge_joint_limits(opened, "train", load_layout_with_logged_actions(dataset, None))
    return check


def test_possible_heights_are_for_the_user_to_compare(tmp_path: Path) -> None:
    def keep(joints: np.ndarray) -> None:
        pass

    check = examine(tmp_path, keep)
    assert check.verdict == "agrees"
    assert "m above the base: compare these heights with your recordings" in check.words


def test_a_tip_far_below_the_base_leaves_the_audit_undecided(tmp_path: Path) -> None:
    """A shoulder whose zero is 50° off lets the gripper of this arm dive into the table."""

    def move_zero(joints: np.ndarray) -> None:
        joints[:, SHOULDER_LIFT] += np.radians(50)

    check = examine(tmp_path, move_zero)
    assert check.verdict == "cannot tell"
    assert "the zero or the sign of a joint is wrong" in check.words


def test_a_joint_beyond_its_limits_is_named(tmp_path: Path) -> None:
    """The joints of this arm turn by at most 2 rad."""

    def move_zero(joints: np.ndarray) -> None:
        joints[:, SHOULDER_LIFT] += 3

    check = examine(tmp_path, move_zero)
    assert check.verdict == "cannot tell"
    assert "shoulder_lift goes from" in check.words
