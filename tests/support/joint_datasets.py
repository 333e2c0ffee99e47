"""Makes URDFs of small arms, and LeRobot datasets of their joint angles."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_tiny import edit_json, make_episode
from spear.data.store.lerobot_write import write_lerobot
from spear.embodiments.urdf import compute_urdf_pose, read_urdf_arm

RATE_HZ = 10.0
NUM_STEPS = 24
TIP = "gripper_frame_link"
GRIPPER_RANGE = [0.0, 100.0]


class JointElement(NamedTuple):
    """A joint of a URDF, which leads to the next link of a chain."""

    name: str
    joint_type: str
    xyz: str
    rpy: str
    axis: str = "0 0 1"


SMALL_ARM = [
    JointElement("shoulder_pan", "revolute", "0.02 -0.02 0.09", "3.14159 0 1.5708"),
    JointElement("shoulder_lift", "revolute", "-0.03 -0.018 -0.054", "-1.5708 -1.5708 0"),
    JointElement("elbow_flex", "revolute", "-0.113 -0.028 0", "0 0 1.5708"),
    JointElement("wrist_flex", "revolute", "-0.135 0.005 0", "0 0 -1.5708"),
    JointElement("wrist_roll", "revolute", "0 -0.061 0.018", "1.5708 0 3.14159"),
    JointElement("tip_joint", "fixed", "-0.008 0 -0.098", "0 3.14159 0"),
]
"""An arm with the five joints, and about the size, of an SO-101."""
MOTORS = [f"{joint.name}.pos" for joint in SMALL_ARM[:-1]] + ["gripper.pos"]


def make_urdf(joints: Sequence[JointElement]) -> str:
    """Make the URDF of a chain of links link0, link1, …, whose last one is called `TIP`.

    All links have a mass, so that MuJoCo can simulate them.
    """
    links = [*(f"link{number}" for number in range(len(joints))), TIP]
    # MuJoCo would otherwise unite links that no moving joint separates.
    elements = ['<mujoco><compiler fusestatic="false"/></mujoco>']
    for link in links:
        elements.append(
            f'<link name="{link}"><inertial><mass value="1"/><inertia ixx="1" ixy="0" ixz="0" '
            'iyy="1" iyz="0" izz="1"/></inertial></link>'
        )
    for joint, parent, child in zip(joints, links[:-1], links[1:], strict=True):
        elements.append(
            f'<joint name="{joint.name}" type="{joint.joint_type}">'
            f'<origin xyz="{joint.xyz}" rpy="{joint.rpy}"/><axis xyz="{joint.axis}"/>'
            f'<parent link="{parent}"/><child link="{child}"/>'
            '<limit lower="-2" upper="2" effort="1" velocity="1"/></joint>'
        )
    return f'<robot name="arm">{"".join(elements)}</robot>'


def write_urdf(folder: Path, joints: Sequence[JointElement] = SMALL_ARM) -> Path:
    """Write the URDF of an arm as `arm.urdf`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "arm.urdf"
    file.write_text(make_urdf(joints))
    return file


def make_joint_angles(index: int) -> np.ndarray:
    """Make angles [NUM_STEPS, 5] in rad that swing about a posture with a bent elbow."""
    rng = np.random.default_rng(index)
    time_s = np.arange(NUM_STEPS)[:, None] / RATE_HZ
    center = np.array([0.1, -0.4, 0.6, 0.7, 0.2]) + rng.uniform(-0.2, 0.2, 5)
    swing = 0.3 * np.sin(rng.uniform(1, 3, 5) * time_s + rng.uniform(0, 6, 5))
    return np.asarray(center + swing)


def write_numbers(
    folder: Path, states: np.ndarray, actions: np.ndarray, names: Sequence[str]
) -> None:
    """Replace the states and actions of a dataset, and the names of their numbers."""
    (file,) = folder.glob("data/*/*.parquet")
    table = pq.read_table(file)
    for column, values in (("observation.state", states), ("action", actions)):
        rows = pa.array(list(values.astype(np.float32)))
        table = table.set_column(table.column_names.index(column), column, rows)
    pq.write_table(table, file)

    def change(info: dict[str, Any]) -> None:
        for column in ("observation.state", "action"):
            info["features"][column] |= {"names": list(names), "shape": [len(names)]}

    edit_json(folder / "meta/info.json", change)


def write_joint_and_pose_datasets(
    folder: Path, num_episodes: int = 3, radians_per_unit: float = np.pi / 180
) -> tuple[Path, Path]:
    """Write a dataset of joint angles, and one of the poses to which these angles lead.

    The action is the next step's state. Neither dataset has a `spear.json`, but the URDF stands in
    the folder of the first one.

    Args:
        folder: Where to make both folders.
        num_episodes: The number of episodes of each dataset.
        radians_per_unit: The unit of the joint angles; by default they are in degrees.

    Returns:
        The folders of both.
    """
    episodes = []
    all_states = []
    all_actions = []
    for index in range(num_episodes):
        opening = 0.5 + 0.5 * np.sin(np.arange(NUM_STEPS) / 3 + index)  # 0 closed, 1 open
        # The angles of the five joints, and the opening of the gripper in percent
        states = np.c_[make_joint_angles(index) / radians_per_unit, 100 * opening]
        all_states.append(states)
        all_actions.append(np.concatenate([states[1:], states[-1:]]))
        source = f"made#{index}"
        episodes.append(make_episode(index, NUM_STEPS, rate_hz=RATE_HZ, source=source))

    joint_folder = folder / "joints"
    pose_folder = folder / "poses"
    for target in (joint_folder, pose_folder):
        write_lerobot(episodes, target)
        (target / "spear.json").unlink()
    urdf = write_urdf(joint_folder)

    states = np.concatenate(all_states)
    actions = np.concatenate(all_actions)
    write_numbers(joint_folder, states, actions, MOTORS)

    def to_poses(numbers: np.ndarray) -> np.ndarray:
        """Replace the joint angles in states or actions [T, 6] by poses: [T, 8]."""
        angles_rad = numbers[:, :-1] * radians_per_unit
        position, rotation = compute_urdf_pose(read_urdf_arm(urdf, TIP), angles_rad)
        return np.c_[position, rotation, numbers[:, -1]]

    pose_names = ["x", "y", "z", "qw", "qx", "qy", "qz", "opening"]
    write_numbers(pose_folder, to_poses(states), to_poses(actions), pose_names)
    return joint_folder, pose_folder


def write_layout(folder: Path, **changes: Any) -> None:
    """Write the layout of the dataset of joint angles as its spear.json; None leaves a key out."""
    layout = {
        "images": {"external": "observation/images/external"},
        "position": "observation/state[0:5]",
        "rotation": "observation/state[0:5]",
        "rotation_format": "urdf_joints",
        "urdf": "arm.urdf",
        "tip": TIP,
        "angle_unit": "deg",
        "gripper": "observation/state[5]",
        "gripper_range": GRIPPER_RANGE,
        "command": "action[5]",
        "command_range": GRIPPER_RANGE,
        "logged_translation": "action[0:5]",
        "logged_rotation": "action[0:5]",
        "logged_rotation_format": "urdf_joints",
        "logged_kind": "absolute",
        "logged_frame": "base",
        **changes,
    }
    given = {key: value for key, value in layout.items() if value is not None}
    (folder / "spear.json").write_text(json.dumps(given))


def write_pose_layout(folder: Path) -> None:
    """Write the layout of the dataset of poses as its spear.json."""
    write_layout(
        folder,
        position="observation/state[0:3]",
        rotation="observation/state[3:7]",
        rotation_format="quat_wxyz",
        urdf=None,
        tip=None,
        angle_unit=None,
        gripper="observation/state[7]",
        command="action[7]",
        logged_translation="action[0:3]",
        logged_rotation="action[3:7]",
        logged_rotation_format="quat_wxyz",
    )
