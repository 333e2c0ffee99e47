"""The example of an SO-101 reads joint angles, and commands those that lead where a policy goes."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from joint_datasets import (
    TIP,
    make_joint_angles,
    write_joint_and_pose_datasets,
    write_layout,
    write_urdf,
)
from refusals import refuses
from spear import embodiments
from spear.data.readers.formats import read_episodes
from spear.embodiments import Embodiment
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.urdf import UrdfArm, compute_urdf_pose, read_urdf_arm
from spear.types import Array

EXAMPLE_FILE = Path(__file__).parents[2] / "examples" / "so101.py"
ROWS_PER_ACTION = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The example's folder with a URDF beside it, of an arm like an SO-101."""
    write_urdf(tmp_path).rename(tmp_path / "so101_new_calib.urdf")
    shutil.copy(EXAMPLE_FILE, tmp_path)
    return tmp_path


@pytest.fixture
def robot(folder: Path) -> Embodiment:
    return embodiments.load(str(folder / "so101.py"))


@pytest.fixture
def arm(folder: Path) -> UrdfArm:
    return read_urdf_arm(folder / "so101_new_calib.urdf", TIP)


def compute_tips(arm: UrdfArm, rows: Array) -> Array:
    """Positions [n, 3] of the tip at rows of joint angles (deg)."""
    return compute_urdf_pose(arm, np.radians(np.float64(rows[:, :5])))[0]


def make_chunk(translation: list[float], opening: float = 1.0) -> Array:
    """Five actions without a turn."""
    return np.tile(np.array([*translation, 1, 0, 0, 0, opening], np.float32), (5, 1))


def convert(robot: Embodiment, actions: Array, observation: dict[str, Any]) -> Array:
    state = robot.read(observation)["observation/state"]
    return robot.controls["joints"].convert(actions, state, observation)


def test_the_state_is_the_pose_of_the_tip(robot: Embodiment, arm: UrdfArm) -> None:
    example = robot.example()

    state = robot.read(example)["observation/state"]

    positions, rotations = compute_urdf_pose(arm, np.radians(example["joints"][None, :5]))
    np.testing.assert_allclose(state[:3], positions[0], atol=1e-6)
    np.testing.assert_allclose(state[3:7], rotations[0], atol=1e-6)
    assert state[7] == pytest.approx(example["joints"][5] / 100)


def test_a_gripper_that_opens_in_part_has_its_range_in_the_file(folder: Path) -> None:
    file = folder / "so101.py"
    code = file.read_text("utf-8")
    code = code.replace("CLOSED_GRIPPER = 0", "CLOSED_GRIPPER = 2")
    code = code.replace("OPEN_GRIPPER = 100", "OPEN_GRIPPER = 39")
    file.write_text(code, "utf-8")
    robot = embodiments.load(str(file))
    example = robot.example()
    example["joints"][5] = 39

    state = robot.read(example)["observation/state"]
    open_rows = convert(robot, make_chunk([0.0, 0.0, 0.0], opening=1.0), example)
    closed_rows = convert(robot, make_chunk([0.0, 0.0, 0.0], opening=0.0), example)

    assert state[7] == pytest.approx(1.0)
    assert open_rows[-1, 5] == pytest.approx(39)
    assert closed_rows[-1, 5] == pytest.approx(2)


def test_the_robot_and_a_dataset_of_its_joints_mean_the_same_pose(
    robot: Embodiment, tmp_path: Path
) -> None:
    dataset, _ = write_joint_and_pose_datasets(tmp_path / "datasets", num_episodes=1)
    write_layout(dataset)
    (episode,) = read_episodes(dataset, "train")
    first_joints = np.append(np.degrees(make_joint_angles(0)[0]), 50.0)

    state = robot.read({**robot.example(), "joints": first_joints})["observation/state"]

    np.testing.assert_allclose(state[:3], episode.position[0], atol=1e-5)
    np.testing.assert_allclose(state[3:7], episode.rotation[0], atol=1e-5)
    assert state[7] == pytest.approx(episode.gripper[0])


def test_a_wrong_gripper_reading_is_answered_with_the_range_of_this_robot(
    robot: Embodiment,
) -> None:
    observation = {**robot.example(), "joints": np.array([0, 0, 0, 0, 0, 150.0])}

    refuses(r"joints\[5\] .* 150\. .* 0 \(closed\) to 100 \(open\)", robot.read, observation)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("front", np.zeros((3, 48, 64), np.uint8)),
        ("wrist", None),
        ("joints", np.zeros(5)),
        ("joints", np.full(6, np.nan)),
        ("joints", np.array([0, 0, 0, 0, 0, 200.0])),
        ("last_command", np.zeros(5)),
        ("prompt", ""),
    ],
)
def test_an_error_names_the_key_of_a_wrong_value(robot: Embodiment, key: str, value: Any) -> None:
    refuses(re.escape(key), robot.read, {**robot.example(), key: value})


def test_an_error_names_a_missing_key(robot: Embodiment) -> None:
    for key in robot.required:
        observation = robot.example()
        del observation[key]
        refuses(key, robot.read, observation)


def test_commands_lead_the_tip_where_the_actions_go(robot: Embodiment, arm: UrdfArm) -> None:
    example = robot.example()
    chunk = make_chunk([0.01, 0.0, -0.01])

    rows = convert(robot, chunk, example)

    assert rows.shape == (30, 6)
    assert rows.dtype == np.float32
    state = robot.read(example)["observation/state"]
    targets, _ = compute_target_poses(state, chunk)
    tips = compute_tips(arm, rows[ROWS_PER_ACTION - 1 :: ROWS_PER_ACTION])
    np.testing.assert_allclose(tips, targets, atol=1e-3)


def test_six_equal_steps_lead_from_each_command_to_the_next(robot: Embodiment) -> None:
    example = robot.example()

    rows = convert(robot, make_chunk([0.01, 0.0, 0.0]), example)

    path = np.concatenate([example["joints"][None, :5], rows[:, :5]])
    steps = np.diff(path, axis=0).reshape(5, ROWS_PER_ACTION, 5)
    np.testing.assert_allclose(steps, np.repeat(steps[:, :1], ROWS_PER_ACTION, axis=1), atol=1e-4)
    assert np.abs(steps).max() > 0.1


def test_the_gripper_goes_from_0_to_100(robot: Embodiment) -> None:
    chunk = make_chunk([0.0, 0.0, 0.0])
    chunk[2:, 7] = 0

    rows = convert(robot, chunk, robot.example())

    assert rows[:, 5].tolist() == [100] * 12 + [0] * 18


def test_a_target_out_of_reach_repeats_the_last_command(robot: Embodiment) -> None:
    example = robot.example()

    rows = convert(robot, make_chunk([0.5, 0.0, 0.0], opening=0.0), example)

    np.testing.assert_allclose(rows, np.tile(example["joints"], (30, 1)), atol=1e-4)


def sag(command: Array) -> Array:
    """Where an arm that gives way at the shoulder and the elbow stands, deg."""
    return command + np.array([0, 2.0, 1.0, 0, 0, 0])


@pytest.mark.parametrize("sends_last_command", [True, False])
def test_an_arm_that_sends_its_last_command_does_not_sink(
    robot: Embodiment, arm: UrdfArm, sends_last_command: bool
) -> None:
    """Ten chunks without motion; only an arm without its last command goes on sagging."""
    command = robot.example()["joints"]
    first_tip = compute_tips(arm, sag(command)[None])[0]
    for _ in range(10):
        observation = {**robot.example(), "joints": sag(command)}
        if sends_last_command:
            observation["last_command"] = command
        command = np.float64(convert(robot, make_chunk([0.0, 0.0, 0.0]), observation)[-1])

    distance_m = np.linalg.norm(compute_tips(arm, sag(command)[None])[0] - first_tip)

    if sends_last_command:
        assert distance_m < 1e-3
    else:
        assert distance_m > 0.02


def test_an_arm_far_from_its_last_command_continues_where_it_is(robot: Embodiment) -> None:
    example = robot.example()
    last_command = example["joints"] + np.array([30.0, 0, 0, 0, 0, 0])
    observation = {**example, "last_command": last_command}

    rows = convert(robot, make_chunk([0.0, 0.0, 0.0]), observation)

    np.testing.assert_allclose(rows[:, :5], np.tile(example["joints"][:5], (30, 1)), atol=0.01)


def test_a_tool_rotation_turns_the_state_and_is_undone_in_commands(
    robot: Embodiment, folder: Path
) -> None:
    file = folder / "so101.py"
    half_turn = "[0.0, 0.7071, 0.7071, 0]"
    file.write_text(file.read_text().replace("[1.0, 0, 0, 0]", half_turn))
    turned_robot = embodiments.load(str(file))
    example = robot.example()

    rows = convert(turned_robot, make_chunk([0.0, 0.0, 0.0]), example)

    state = robot.read(example)["observation/state"]
    turned_state = turned_robot.read(example)["observation/state"]
    assert abs(state[3:7] @ turned_state[3:7]) < 0.01  # half a turn apart
    np.testing.assert_allclose(rows[:, :5], np.tile(example["joints"][:5], (30, 1)), atol=0.05)


def test_without_the_urdf_the_message_names_the_file(folder: Path) -> None:
    (folder / "so101_new_calib.urdf").unlink()

    refuses("there is no URDF .*so101_new_calib.urdf", embodiments.load, str(folder / "so101.py"))
