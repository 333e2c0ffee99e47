"""A proposed spear.json says what the columns tell, and names what they leave open.

The tests use two copies of the same real sample of BridgeData V2, in the formats RLDS and LeRobot,
and variants of the LeRobot copy whose numbers are rewritten. Its states and actions have seven
numbers: position or translation, roll pitch yaw, gripper.
"""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import copy_dataset, edit_json
from joint_datasets import TIP, write_joint_and_pose_datasets, write_pose_layout
from joint_datasets import write_layout as write_joint_layout
from refusals import Command, refuses
from spear.audit.dataset_audit import audit_dataset
from spear.audit.describe import propose_layout
from spear.audit.inspect import describe_dataset
from spear.cli import main
from spear.data.readers.dataset_layout import REGISTRY
from spear.data.readers.formats import read_episodes
from spear.report.audit import format_conclusion

STATE = "observation.state"
Change = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""A function from states [T, 7] and actions [T, 7] to changed states and actions."""

propose_layout_cached = cache(propose_layout)
"""`propose_layout` for folders that no test changes. It reads each folder once for all tests."""


def rewrite_sample(shared: Path, folder: Path, change: Change) -> Path:
    """Copy the real sample, and change its states and actions. Return the copy's folder."""
    copy = copy_dataset(shared / "data" / "lerobot" / "v3.0_image", folder / "copy", layout=None)
    (file,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(file)
    states = np.array(table[STATE].to_pylist())
    actions = np.array(table["action"].to_pylist())
    new_states, new_actions = change(states, actions)
    table = replace_column(table, STATE, new_states)
    table = replace_column(table, "action", new_actions)
    pq.write_table(table, file)
    return copy


def replace_column(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    """Replace a column of a table by rows of integers, or of float32."""
    rows = values if values.dtype.kind == "i" else values.astype(np.float32)
    return table.set_column(table.column_names.index(name), name, pa.array(list(rows)))


def change_nothing(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return states, actions


@pytest.fixture(scope="module")
def rewritten(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Change], Path]:
    """A function that returns the real sample with changed numbers, made once for each change.

    Tests must not change the folder, because others use it too.
    """

    @cache
    def rewrite_once(change: Change) -> Path:
        return rewrite_sample(shared, tmp_path_factory.mktemp("rewritten"), change)

    return rewrite_once


def write_layout(file: Path, layout: dict[str, Any]) -> Path:
    file.write_text(json.dumps(layout))
    return file


@pytest.mark.parametrize("name", ["bridge_v2_sample", "lerobot/v3.0_image"])
@pytest.mark.parametrize(
    "key",
    [
        "position",
        "rotation",
        "rotation_format",
        "gripper",
        "command",
        "logged_translation",
        "logged_rotation",
        "logged_kind",
        "logged_frame",
    ],
)
def test_a_proposal_for_the_real_sample_is_right(shared: Path, name: str, key: str) -> None:
    proposal = propose_layout_cached(shared / "data" / name)

    assert proposal[key] == getattr(REGISTRY["bridge_dataset"], key)


@pytest.mark.parametrize("name", ["bridge_v2_sample", "lerobot/v3.0_image"])
def test_the_single_camera_of_the_real_sample_is_external(shared: Path, name: str) -> None:
    images = propose_layout_cached(shared / "data" / name)["images"]

    assert images["external"].startswith("observation/image")
    assert "wrist" not in images


@pytest.mark.parametrize("name", ["bridge_v2_sample", "lerobot/v3.0_image"])
def test_the_larger_reading_of_the_gripper_is_proposed_as_open(shared: Path, name: str) -> None:
    closed, opened = propose_layout_cached(shared / "data" / name)["gripper_range"]

    assert closed < opened


@pytest.mark.parametrize("name", ["bridge_v2_sample", "lerobot/v3.0_image"])
def test_a_proposal_can_be_read_with(shared: Path, tmp_path: Path, name: str) -> None:
    folder = shared / "data" / name
    layout = tmp_path / "layout.json"
    layout.write_text(json.dumps({**propose_layout_cached(folder), "rate_hz": 5.0}))

    assert next(read_episodes(folder, layout_file=layout)).rate_hz == 5


def test_the_rate_of_rlds_is_left_open(shared: Path) -> None:
    proposal = propose_layout_cached(shared / "data" / "bridge_v2_sample")

    assert proposal["rate_hz"] is None
    assert "rate_hz" in proposal["facts"]


def test_a_single_nan_decides_nothing(shared: Path, tmp_path: Path) -> None:
    def insert_nan(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        is_chosen = states == states.flat[93]  # true for one number, which one does not matter
        return np.where(is_chosen, np.nan, states), actions

    copy = rewrite_sample(shared, tmp_path, insert_nan)

    proposal = propose_layout(copy)
    expected = propose_layout_cached(shared / "data" / "lerobot" / "v3.0_image")
    assert {**proposal, "facts": None} == {**expected, "facts": None}
    assert "NaN in 1 of" in describe_dataset(copy)
    assert " nan " not in describe_dataset(copy)


def round_units(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write states as whole numbers: millimeters, degrees, and the gripper opening in percent."""
    factors = [1000] * 3 + [180 / np.pi] * 3 + [100]
    return np.rint(states * factors).astype(int), actions


def test_columns_of_whole_numbers_are_proposed_as_measurements(
    rewritten: Callable[[Change], Path],
) -> None:
    proposal = propose_layout_cached(rewritten(round_units))

    assert proposal["position"] == "observation/state[0:3]"
    assert proposal["length_unit"] == "mm"


def divide_actions(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write actions for a controller for which 1 means 0.05 m and 0.5 rad."""
    return states, actions / [0.05, 0.05, 0.05, 0.5, 0.5, 0.5, 1]


def test_the_units_of_a_controller_are_proposed(shared: Path, tmp_path: Path) -> None:
    """The units are measured, and a little smaller than the true ones, because the arm does not
    reach all of its targets.
    """
    proposal = propose_layout(rewrite_sample(shared, tmp_path, divide_actions))

    assert proposal["length_unit"] == "m"
    assert proposal["logged_translation_unit"] == pytest.approx(0.05, rel=0.4)
    assert proposal["logged_rotation_unit"] == pytest.approx(0.5, rel=0.4)


def test_states_in_millimeters_do_not_change_the_unit_of_actions(
    rewritten: Callable[[Change], Path],
) -> None:
    proposal = propose_layout_cached(rewritten(round_units))

    assert proposal["length_unit"] == "mm"
    assert proposal["logged_translation_unit"] == 1  # m


def test_degrees_are_read_only_as_degrees(
    rewritten: Callable[[Change], Path], tmp_path: Path
) -> None:
    folder = rewritten(round_units)
    layout = {**propose_layout_cached(folder), "rotation_format": "euler_xyz"}
    layout_file = tmp_path / "layout.json"

    layout_file.write_text(json.dumps({**layout, "angle_unit": "deg"}))
    assert len(list(read_episodes(folder, layout_file=layout_file))) == 8  # all of the sample

    layout_file.write_text(json.dumps({**layout, "angle_unit": "rad"}))
    refuses("set angle_unit to deg", next, read_episodes(folder, layout_file=layout_file))


def test_a_binary_gripper_is_no_part_of_a_quaternion(shared: Path, tmp_path: Path) -> None:
    """Three small angles and a gripper of -1 or 1 have nearly length 1, like a quaternion."""

    def shrink_rotations(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factors = np.array([1, 1, 1, 0.3, 0.3, 0.3, 1])
        is_gripper = np.arange(7) == 6
        binary_actions = 2 * actions.round() - 1  # 0 and 1 become -1 and 1
        return states * factors, np.where(is_gripper, binary_actions, actions * factors)

    proposal = propose_layout(rewrite_sample(shared, tmp_path, shrink_rotations))

    assert proposal["position"] == "observation/state[0:3]"
    assert proposal["logged_translation"] == "action[0:3]"


def to_six_numbers(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Write gripper, the first two rows of the rotation matrix, and position: ten numbers."""

    def rewrite(values: np.ndarray) -> np.ndarray:
        matrices = Rotation.from_euler("xyz", values[:, 3:6]).as_matrix()
        six_numbers = matrices[:, :2].reshape(-1, 6)  # [T, 2 rows, 3] to [T, 6]
        return np.concatenate([values[:, 6:], six_numbers, values[:, :3]], axis=1)

    return rewrite(states), rewrite(actions)


def test_six_numbers_are_an_orientation(rewritten: Callable[[Change], Path]) -> None:
    proposal = propose_layout_cached(rewritten(to_six_numbers))

    assert proposal["position"] == "observation/state[7:10]"
    assert proposal["rotation"] == "observation/state[1:7]"
    assert proposal["rotation_format"] is None
    assert "6d_rows or 6d_columns" in proposal["facts"]["rotation_format"]


@pytest.mark.parametrize(
    ("rotation_format", "outcome"), [("6d_rows", "undecided"), ("6d_columns", "contradiction")]
)
def test_the_audit_tells_rows_from_columns(
    rewritten: Callable[[Change], Path], tmp_path: Path, rotation_format: str, outcome: str
) -> None:
    # `to_six_numbers` writes rows. The sample is too small to confirm them: the gripper moves in 2
    # of 8 episodes, and the actions fit columns as well. It is enough to contradict columns.
    folder = rewritten(to_six_numbers)
    formats = {"rotation_format": rotation_format, "logged_rotation_format": rotation_format}
    layout = {**propose_layout_cached(folder), **formats, "logged_frame": "base"}
    layout_file = write_layout(tmp_path / "layout.json", layout)

    assert audit_dataset(folder, layout_file=layout_file).outcome == outcome


def test_a_whole_pose_is_an_orientation(shared: Path, tmp_path: Path) -> None:
    def to_poses(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write each state as a pose [4, 4], column after column, and the gripper: 17 numbers."""
        poses = np.tile(np.eye(4), (len(states), 1, 1))
        rotations = Rotation.from_euler("xyz", states[:, 3:6])
        poses[:, :3, :3] = rotations.inv().as_matrix()  # the inverse is the transposed matrix
        poses[:, 3, :3] = states[:, :3]
        return np.concatenate([poses.reshape(-1, 16), states[:, 6:]], axis=1), actions

    proposal = propose_layout(rewrite_sample(shared, tmp_path, to_poses))

    assert proposal["position"] == "observation/state[12:15]"
    assert proposal["rotation"] == "observation/state[0:16]"
    assert proposal["rotation_format"] in (None, "matrix4_columns")


def put_gripper_and_yaw_first(
    states: np.ndarray, actions: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Write gripper, position (or translation), yaw, pitch, roll.

    The logged rotations become those that lead exactly to the next state.
    """
    rotations = Rotation.from_euler("xyz", states[:, 3:6])
    next_steps = [*range(1, len(states)), 0]
    turns = (rotations[next_steps] * rotations.inv()).as_euler("xyz")
    yaw_pitch_roll = states[:, 5:2:-1]
    new_states = np.concatenate([states[:, 6:], states[:, :3], yaw_pitch_roll], axis=1)
    new_actions = np.concatenate([actions[:, 6:], actions[:, :3], turns[:, ::-1]], axis=1)
    return new_states, new_actions


def test_columns_are_found_in_any_order(rewritten: Callable[[Change], Path]) -> None:
    proposal = propose_layout_cached(rewritten(put_gripper_and_yaw_first))

    assert proposal["position"] == "observation/state[1:4]"
    assert proposal["logged_translation"] == "action[1:4]"
    assert proposal["rotation"] == "observation/state[4:7]"
    assert proposal["logged_rotation"] == "action[4:7]"


def test_yaw_first_is_thought_of(rewritten: Callable[[Change], Path]) -> None:
    proposal = propose_layout_cached(rewritten(put_gripper_and_yaw_first))

    assert proposal["rotation_format"] is None
    assert "euler_ZYX" in proposal["facts"]["rotation_format"]


def use_targets(states: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace each action by the next state."""
    return states, np.roll(states, -1, 0)


def test_targets_leave_the_rotation_format_open(rewritten: Callable[[Change], Path]) -> None:
    proposal = propose_layout_cached(rewritten(use_targets))

    assert proposal["rotation_format"] is None
    assert "euler_xyz or" in proposal["facts"]["rotation_format"]


# A layout's rotation format, and another format that the audit should name as equally possible.
@pytest.mark.parametrize(
    ("rotation_format", "rival"),
    [
        ("euler_xyz", "euler_ZYX"),
        ("rotation_vector", "euler_ZYX"),
        ("euler_ZYX", "euler_xyz"),
    ],
)
def test_targets_leave_the_audit_undecided(
    rewritten: Callable[[Change], Path], tmp_path: Path, rotation_format: str, rival: str
) -> None:
    folder = rewritten(use_targets)
    formats = {"rotation_format": rotation_format, "logged_rotation_format": rotation_format}
    layout = {**propose_layout_cached(folder), **formats, "facts": {}}
    layout_file = write_layout(tmp_path / "layout.json", layout)

    report = audit_dataset(folder, layout_file=layout_file)

    (check,) = [check for check in report.checks if check.name == "rotation_format"]
    assert report.outcome == "undecided"
    assert rival in check.words


def copy_with_joint_columns(shared: Path, folder: Path) -> Path:
    """Copy the sample, and add two columns of joints with the same numbers as the state."""
    copy = rewrite_sample(shared, folder, change_nothing)
    (file,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(file)
    for name in ("observation.joint_position", "action.joint_position"):
        table = table.append_column(name, table[STATE])
    pq.write_table(table, file)
    return copy


def name_state_as_joints(copy: Path) -> None:
    """Let a dataset's metadata name joints for the state; only index 5 is a gripper."""
    names = [
        "shoulder_pan",
        "shoulder_lift",
        "elbow_flex",
        "wrist_flex",
        "wrist_roll",
        "gripper",
        "joint_6",
    ]

    def change(info: dict[str, Any]) -> None:
        info["features"][STATE]["names"] = {"motors": names}

    edit_json(copy / "meta/info.json", change)


def test_columns_of_joints_are_no_pose(shared: Path, tmp_path: Path) -> None:
    proposal = propose_layout(copy_with_joint_columns(shared, tmp_path))

    assert proposal["position"] == "observation/state[0:3]"
    assert proposal["gripper"] == "observation/state[6]"


def test_numbers_that_the_metadata_call_joints_are_no_pose(shared: Path, tmp_path: Path) -> None:
    copy = copy_with_joint_columns(shared, tmp_path)
    name_state_as_joints(copy)

    proposal = propose_layout(copy)

    assert proposal["position"] is None
    assert "--urdf FILE --tip LINK" in proposal["facts"]["position"]
    assert proposal["gripper"] == "observation/state[5]"  # which the metadata call "gripper"


def test_a_layout_that_takes_joints_for_a_pose_is_refused(shared: Path, tmp_path: Path) -> None:
    copy = copy_with_joint_columns(shared, tmp_path)
    write_layout(
        copy / "spear.json", propose_layout_cached(shared / "data" / "lerobot" / "v3.0_image")
    )
    name_state_as_joints(copy)

    refuses("shoulder_pan", lambda: next(read_episodes(copy)))


def test_a_column_of_success_is_proposed(shared: Path, tmp_path: Path) -> None:
    without_success = propose_layout_cached(shared / "data" / "lerobot" / "v3.0_image")
    copy = rewrite_sample(shared, tmp_path, change_nothing)
    (file,) = copy.glob("data/*/*.parquet")
    table = pq.read_table(file)
    successes = pa.array([True] * len(table))
    pq.write_table(table.append_column("next.success", successes), file)

    assert propose_layout(copy)["success"] == "next/success"
    assert "success" not in without_success


def test_the_command_prints_a_proposal_and_where_it_belongs(
    shared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exit_code = main(["data", "describe", str(shared / "data" / "bridge_v2_sample")])

    output = capsys.readouterr()
    assert exit_code == 0
    assert json.loads(output.out)["facts"]
    assert "1.0.0/spear.json should contain this" in output.err


def test_the_command_overwrites_nothing(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_dataset(shared / "data" / "lerobot" / "v3.0_image", tmp_path / "copy", None)
    layout = copy / "spear.json"
    command = ["data", "describe", str(copy), "--out", str(layout)]

    first_exit_code = main(command)
    second_exit_code = main(command)

    assert first_exit_code == 0
    assert json.loads(layout.read_text())["facts"]
    assert f"wrote {layout}: read and correct it" in capsys.readouterr().err
    assert second_exit_code == 2


def test_a_proposal_beside_the_folder_of_the_version_is_to_be_moved(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands look for the file beside features.json."""
    copy = copy_dataset(shared / "data" / "bridge_v2_sample", tmp_path / "copy", None)

    exit_code = main(["data", "describe", str(copy), "--out", str(copy / "spear.json")])

    assert exit_code == 0
    message = capsys.readouterr().err
    assert f"move it to {copy / '1.0.0' / 'spear.json'}; then run" in message
    assert "--layout" not in message


def test_joints_without_a_urdf_are_answered_with_the_command_that_takes_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, 2)

    exit_code = main(["data", "describe", str(joints)])

    output = capsys.readouterr()
    assert exit_code == 2
    assert "shoulder_pan.pos" in output.err
    assert "--urdf FILE --tip LINK" in output.err
    assert "spear data audit" not in output.err


def test_the_advised_audit_finds_a_layout_that_is_stored_elsewhere(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_dataset(shared / "data" / "lerobot" / "v3.0_image", tmp_path / "copy", None)
    own_layout = copy / "spear.json"
    other_layout = tmp_path / "other.json"

    main(["data", "describe", str(copy), "--out", str(other_layout)])
    advice_for_other_layout = capsys.readouterr().err
    main(["data", "describe", str(copy), "--out", str(own_layout)])
    advice_for_own_layout = capsys.readouterr().err

    assert f"`spear data audit {copy} --layout {other_layout}`" in advice_for_other_layout
    assert f"`spear data audit {copy}`" in advice_for_own_layout


def test_joints_without_a_urdf_leave_no_file_that_stops_the_next_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, 2)
    urdf = (joints / "arm.urdf").rename(tmp_path / "arm.urdf")
    layout_file = joints / "spear.json"
    command = ["data", "describe", str(joints), "--out", str(layout_file)]

    first_exit_code = main(command)
    first_error = capsys.readouterr().err
    was_written = layout_file.exists()
    second_exit_code = main([*command, "--urdf", str(urdf), "--tip", TIP])

    assert first_exit_code == 2
    assert f"--urdf FILE --tip LINK --out {layout_file}" in first_error
    assert not was_written
    assert second_exit_code == 0


def test_joints_are_described_with_a_urdf_and_audited(tmp_path: Path) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, 3)
    urdf = (joints / "arm.urdf").rename(tmp_path / "arm.urdf")
    layout_file = joints / "spear.json"
    command = ["data", "describe", str(joints), "--out", str(layout_file)]

    exit_code = main([*command, "--urdf", str(urdf), "--tip", TIP])

    layout = json.loads(layout_file.read_text())
    report = audit_dataset(joints)
    assert exit_code == 0
    assert (joints / "arm.urdf").read_bytes() == urdf.read_bytes()
    assert layout["position"] == "observation/state[0:5]"
    assert layout["angle_unit"] == "deg"
    assert layout["gripper_range"] == [0.0, 100.0]
    questions = set()
    for action_part in report.action_parts:
        assert action_part.verdict == "agrees"
        questions |= {finding.question for finding in action_part.findings}
    assert len(report.action_parts) == 2  # translations and rotations
    assert not questions & {"state_format", "action_format"}  # nobody wrote quaternions
    assert [check.verdict for check in report.checks if check.name == "joints"] == ["agrees"]
    assert "only the heights in the row joints show" in format_conclusion(report)


def test_joints_outside_their_limits_leave_the_audit_undecided(tmp_path: Path) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, 2)
    write_joint_layout(joints)
    urdf = joints / "arm.urdf"
    urdf.write_text(urdf.read_text().replace('lower="-2" upper="2"', 'lower="-2" upper="0"'))

    report = audit_dataset(joints)

    (check,) = [check for check in report.checks if check.name == "joints"]
    assert check.verdict == "cannot tell"
    assert "elbow_flex goes from" in check.words


def test_a_urdf_without_its_tip_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, 1)

    exit_code = main(["data", "describe", str(joints), "--urdf", str(joints / "arm.urdf")])

    assert exit_code == 2
    assert "both --urdf and --tip" in capsys.readouterr().err


def test_a_urdf_of_other_joints_is_refused(tmp_path: Path) -> None:
    joints, _ = write_joint_and_pose_datasets(tmp_path, 1)
    urdf = joints / "arm.urdf"
    urdf.write_text(urdf.read_text().replace("elbow_flex", "elbow"))

    refuses("no column .* has the joints .*elbow", propose_layout, joints, urdf, TIP)


@pytest.mark.slow
def test_a_policy_trained_on_joints_has_the_same_errors_on_their_poses(
    tmp_path: Path, run_command: Command
) -> None:
    joints, poses = write_joint_and_pose_datasets(tmp_path, 3)
    write_joint_layout(joints)
    write_pose_layout(poses)
    policy = str(tmp_path / "policy")
    training = ["train", "nano-post", "--init", "nano", "--steps", "2", "--out", policy]
    run_command(*training, "--episodes", str(joints), "--split", "train[:2]")

    def evaluate(folder: Path) -> list[float]:
        """Return the numbers of the table of errors."""
        splits = ["--split", "train[2:]", "--train-split", "train[:2]"]
        arguments = ["--policy", policy, "--episodes", str(folder), *splits]
        table = run_command("evaluate", "data", *arguments)
        return [float(number) for number in re.findall(r"\d+\.\d+", table)]

    joint_errors = evaluate(joints)
    pose_errors = evaluate(poses)

    assert len(joint_errors) >= 12  # four rows of three columns
    np.testing.assert_allclose(joint_errors, pose_errors, atol=2e-3)  # mm, printed to 0.001
