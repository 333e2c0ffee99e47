"""The forward kinematics of a URDF agree with other derivations, and mistakes are named."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from joint_datasets import SMALL_ARM, TIP, JointElement, make_urdf, write_urdf
from refusals import refuses
from spear.embodiments.urdf import check_joint_names, compute_urdf_pose, read_urdf_arm

PLANAR_ARM = [
    JointElement("first", "revolute", "0 0 0.1", "0 0 0"),
    JointElement("second", "revolute", "0.3 0 0", "0 0 0"),
    JointElement("end", "fixed", "0.2 0 0", "0 0 0"),
]
"""Two links of 0.3 m and 0.2 m that turn about vertical axes, 0.1 m above the base."""


def test_a_planar_arm_is_where_trigonometry_puts_it(tmp_path: Path) -> None:
    arm = read_urdf_arm(write_urdf(tmp_path, PLANAR_ARM), TIP)
    angles = np.random.default_rng(0).uniform(-2, 2, (20, 2))

    position, rotation = compute_urdf_pose(arm, angles)

    first = angles[:, 0]
    heading = angles.sum(axis=1)
    x = 0.3 * np.cos(first) + 0.2 * np.cos(heading)
    y = 0.3 * np.sin(first) + 0.2 * np.sin(heading)
    np.testing.assert_allclose(position, np.c_[x, y, np.full(20, 0.1)], atol=1e-12)
    expected = Rotation.from_rotvec(heading[:, None] * np.array([0, 0, 1]))
    actual = Rotation.from_quat(rotation, scalar_first=True)
    assert (actual.inv() * expected).magnitude().max() < 1e-7


@pytest.mark.parametrize(
    "joints",
    [
        SMALL_ARM,
        [
            JointElement("slide", "prismatic", "0.1 0.2 0.3", "0.3 -0.2 1", "0.6 0 0.8"),
            JointElement("plate", "fixed", "0 0.1 0", "1 0.5 -0.4"),
            JointElement("spin", "continuous", "0.05 0 0.2", "-1 0.2 0.3", "1 2 -2"),
            JointElement("bend", "revolute", "0 0 0.3", "0 1 0", "0 1 0"),
        ],
    ],
    ids=["small_arm", "all_types"],
)
def test_poses_are_those_of_mujoco(tmp_path: Path, joints: list[JointElement]) -> None:
    mujoco = pytest.importorskip("mujoco")
    arm = read_urdf_arm(write_urdf(tmp_path, joints), TIP)
    model = mujoco.MjModel.from_xml_string(make_urdf(joints))
    data = mujoco.MjData(model)
    angles = np.random.default_rng(1).uniform(-1.5, 1.5, (10, len(arm.moving_joint_names)))

    position, rotation = compute_urdf_pose(arm, angles)

    for step, step_angles in enumerate(angles):
        for name, angle in zip(arm.moving_joint_names, step_angles, strict=True):
            data.joint(name).qpos[0] = angle
        mujoco.mj_kinematics(model, data)
        tip = data.body(TIP)
        np.testing.assert_allclose(position[step], tip.xpos, atol=1e-9)
        assert abs(rotation[step] @ tip.xquat) == pytest.approx(1, abs=1e-9)


def test_numbers_may_be_in_another_order_than_the_chain(tmp_path: Path) -> None:
    arm = read_urdf_arm(write_urdf(tmp_path), TIP)
    angles = np.random.default_rng(2).uniform(-1, 1, (4, 5))
    order = [3, 0, 4, 1, 2]

    shuffled_names = [arm.moving_joint_names[index] for index in order]
    shuffled = compute_urdf_pose(arm, angles[:, order], shuffled_names)

    for actual, expected in zip(shuffled, compute_urdf_pose(arm, angles), strict=True):
        np.testing.assert_array_equal(actual, expected)


def test_a_link_that_does_not_exist_is_answered_with_near_names(tmp_path: Path) -> None:
    file = write_urdf(tmp_path)

    refuses(f"'gripper_frame'.*Did you mean '{TIP}'", read_urdf_arm, file, "gripper_frame")


def test_all_links_around_the_gripper_are_offered_as_tip(tmp_path: Path) -> None:
    file = write_urdf(tmp_path)
    text = file.read_text("utf-8")
    file.write_text(text.replace("</robot>", '<link name="gripper_link"/></robot>'), "utf-8")

    refuses(f"perhaps {TIP} or gripper_link", read_urdf_arm, file, "gripper_tip")


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    refuses("there is no URDF .*absent.urdf", read_urdf_arm, tmp_path / "absent.urdf", TIP)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<robot", "cannot be read as a URDF"),
        ("<sdf/>", "its first element is 'sdf'"),
        ('<!DOCTYPE robot [<!ENTITY a "b">]><robot name="&a;"/>', "entities"),
        (make_urdf(PLANAR_ARM).replace("0.3 0 0", "${length} 0 0"), "length"),
        (make_urdf(PLANAR_ARM).replace("0.3 0 0", "nan 0 0"), "three numbers"),
        (make_urdf(PLANAR_ARM).replace('"0 0 1"', '"0 0 0"'), "axis of joint 'first' is zero"),
        (make_urdf(PLANAR_ARM).replace("revolute", "floating"), "the type 'floating'"),
        (make_urdf(PLANAR_ARM).replace("revolute", "fixed"), "no joint .* moves the link"),
        (make_urdf(PLANAR_ARM).replace('parent link="link0"', f'parent link="{TIP}"'), "a loop"),
    ],
)
def test_a_file_that_is_no_usable_urdf_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    file = tmp_path / "arm.urdf"
    file.write_text(text)

    refuses(reason, read_urdf_arm, file, TIP)


def test_another_number_of_joints_is_refused(tmp_path: Path) -> None:
    arm = read_urdf_arm(write_urdf(tmp_path), TIP)

    refuses("5 joints lead to the link", compute_urdf_pose, arm, np.zeros((3, 6)))


def test_degrees_are_not_taken_for_radians(tmp_path: Path) -> None:
    arm = read_urdf_arm(write_urdf(tmp_path), TIP)

    refuses("set angle_unit to deg", compute_urdf_pose, arm, np.full((3, 5), 45.0))


def test_names_of_other_joints_are_refused(tmp_path: Path) -> None:
    arm = read_urdf_arm(write_urdf(tmp_path), TIP)
    names = [*arm.moving_joint_names[:-1], "wrist_rol"]

    refuses("has the joints .*wrist_rol", check_joint_names, arm, names, "state[0:5]", "info.json")
