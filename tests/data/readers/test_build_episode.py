"""`build_episode` checks every column, and reads it as the layout says."""

import dataclasses
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import refuses
from spear.data.actions import resample_episode, with_canonical_actions
from spear.data.readers.bad_rows import Repairs, collect_repairs
from spear.data.readers.build_episode import build_episode, read_measured_and_commanded_openings
from spear.data.readers.columns import read_column
from spear.data.readers.dataset_layout import REGISTRY, DatasetLayout
from spear.data.readers.rlds import open_rlds
from spear.util.images import encode_jpeg

SOURCE = "bridge_dataset/train#0"
LAYOUT = REGISTRY["bridge_dataset"]
HOME_JOINTS = np.array([0, -0.785, 0, -2.356, 0, 1.571, 0.785])  # rad
JOINT_LAYOUT = DatasetLayout(
    "mine",
    images={"external": "image"},
    position="joints",
    rotation="joints",
    rotation_format="franka_joints",
    gripper="gripper",
    gripper_range=(0.0, 1.0),
    rate_hz=10.0,
)
"""The layout of a dataset that records a Franka's joint angles."""
STAY = [0, 0, 0, 1.0, 0, 0, 0, 1]  # a canonical action: no translation or rotation, open


@pytest.fixture(scope="module")
def original_steps(shared: Path) -> dict[str, Any]:
    """The columns of the first episode of the sample of BridgeData, which has ten steps."""
    folder = open_rlds(shared / "data" / "bridge_v2_sample")
    ((_, steps),) = folder.read_steps("train[:1]")
    return steps


@pytest.fixture
def steps(original_steps: dict[str, Any]) -> dict[str, Any]:
    """A copy of the columns that a test may change."""
    return deepcopy(original_steps)


@pytest.mark.parametrize(
    ("column", "component"),
    [
        ("action", 6),  # gripper command
        ("observation/state", 6),  # opening
        ("observation/state", 4),  # orientation
        ("observation/state", 1),  # position
    ],
)
def test_a_number_that_is_nan_costs_its_row(
    steps: dict[str, Any], column: str, component: int
) -> None:
    """Row 3 is dropped, and the action before it is masked.

    Commands are checked as well, because a NaN would become the command to close.
    """
    complete = build_episode(deepcopy(steps), LAYOUT, SOURCE)
    read_column(steps, column, SOURCE)[3, component] = np.nan

    episode = build_episode(steps, LAYOUT, SOURCE)

    np.testing.assert_array_equal(episode.position, np.delete(complete.position, 3, axis=0))
    np.testing.assert_array_equal(episode.action_mask, [1, 1, 0, 1, 1, 1, 1, 1, 0])


def test_numbers_that_are_mostly_nan_are_named(steps: dict[str, Any]) -> None:
    read_column(steps, "observation/state", SOURCE)[3:9, 4] = np.nan

    message = rf"observation/state.* of {SOURCE} is NaN or infinite at step 3"
    refuses(message, build_episode, steps, LAYOUT, SOURCE)


def test_a_row_of_zeros_costs_itself_where_any_angles_are_a_rotation(
    steps: dict[str, Any],
) -> None:
    """BridgeData's orientations are Euler angles, of which zeros are a rotation as well."""
    complete = build_episode(deepcopy(steps), LAYOUT, SOURCE)
    read_column(steps, "observation/state", SOURCE)[5] = 0

    episode = build_episode(steps, LAYOUT, SOURCE)

    np.testing.assert_array_equal(episode.position, np.delete(complete.position, 5, axis=0))


def test_a_row_of_joint_angles_that_are_all_zero_is_left_out() -> None:
    joints = HOME_JOINTS + np.linspace(0, 0.1, 6)[:, None]  # [6, 7], a slow motion
    joints[2] = 0
    steps = {
        "joints": joints,
        "gripper": np.linspace(0, 1, 6),
        "image": [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * 6,
        "language_instruction": [b"do it"] * 6,
    }

    episode = build_episode(steps, JOINT_LAYOUT, SOURCE)

    assert len(episode) == 5


def test_zeros_are_a_pose_where_the_arm_comes_near_them(steps: dict[str, Any]) -> None:
    """In some recordings, poses are relative to the first one, which is zero."""
    state = read_column(steps, "observation/state", SOURCE)  # a view of the array in `steps`
    state[:, :6] = 0.05 * np.linspace(0, 1, 10)[:, None] ** 2  # grows from 0

    assert len(build_episode(steps, LAYOUT, SOURCE)) == 10


@pytest.mark.parametrize(
    ("autonomous_value", "expected"), [(1, [1, 1, 1, 0, 0, 1, 1, 1, 1, 0]), (0, [0] * 10)]
)
def test_nothing_is_learned_from_what_a_policy_did(
    steps: dict[str, Any], autonomous_value: float, expected: list[int]
) -> None:
    """`expected` is the action mask. The last action is never known, as no state follows it."""
    steps["mode"] = np.array([2, 2, 2, 1, 1, 2, 2, 2, 2, 2])
    if autonomous_value == 0:
        steps["mode"] = np.zeros(10)
    layout = dataclasses.replace(LAYOUT, autonomous="mode", autonomous_value=autonomous_value)

    episode = build_episode(steps, layout, SOURCE)

    np.testing.assert_array_equal(episode.action_mask, expected)


@pytest.mark.parametrize(
    ("dataset", "column", "value"),
    [
        ("bc_z", "observation/present/autonomous", 1),
        ("austin_sirius_dataset_converted_externally_to_rlds", "action_mode", 0),
    ],
)
def test_the_layouts_of_recorded_policies_say_which_steps_these_did(
    dataset: str, column: str, value: float
) -> None:
    layout = REGISTRY[dataset]

    assert (layout.autonomous, layout.autonomous_value) == (column, value)


@pytest.mark.parametrize("offset_m", [(0.0, 0.0, 0.1), (0.02, -0.05, 0.0)])
def test_a_tool_offset_moves_the_pose_along_the_recorded_axes(
    steps: dict[str, Any], offset_m: tuple[float, float, float]
) -> None:
    recorded = build_episode(deepcopy(steps), LAYOUT, SOURCE)
    layout = dataclasses.replace(LAYOUT, tool_offset=offset_m)

    episode = build_episode(steps, layout, SOURCE)

    turns = Rotation.from_quat(recorded.rotation, scalar_first=True)
    expected = recorded.position + turns.apply(offset_m)
    np.testing.assert_allclose(episode.position, expected, atol=1e-6)


def test_the_outcome_of_a_dataset_without_one_is_not_known(steps: dict[str, Any]) -> None:
    assert build_episode(steps, LAYOUT, SOURCE).success is None


@pytest.mark.parametrize(("reward", "expected"), [(0, False), (1, True), (-1, None)])
def test_the_last_number_of_a_column_tells_the_outcome(
    steps: dict[str, Any], reward: float, expected: bool | None
) -> None:
    """0 is a failure and 1 a success. A negative number says nothing."""
    steps["reward"] = np.append(np.zeros(9), reward)
    layout = dataclasses.replace(LAYOUT, success="reward")

    assert build_episode(steps, layout, SOURCE).success is expected


@pytest.mark.parametrize(
    ("folder", "expected"), [("failure", False), ("success", True), ("unsuccessful", None)]
)
def test_the_folder_of_a_path_tells_the_outcome(
    steps: dict[str, Any], folder: str, expected: bool | None
) -> None:
    """DROID has such a column. Only a whole folder name counts, not a part of one."""
    column = "episode_metadata/file_path"
    assert REGISTRY["droid"].success == column
    path = f"gs://a/success-rates/{folder}/2023-04-21/trajectory.h5"
    steps[column] = [path.encode()] * 10
    layout = dataclasses.replace(LAYOUT, success=column)

    assert build_episode(steps, layout, SOURCE).success is expected


@pytest.mark.parametrize(
    "fields", [{"success": "reward"}, {"action": "own_action", "action_mask": "reward"}]
)
def test_an_outcome_or_a_mask_that_is_nan_is_named(
    steps: dict[str, Any], fields: dict[str, str]
) -> None:
    steps["reward"] = np.append(np.zeros(9), np.nan)
    steps["own_action"] = np.tile(STAY, (10, 1))
    layout = dataclasses.replace(LAYOUT, **fields)

    refuses(
        rf"reward of {SOURCE} is NaN or infinite at step 9", build_episode, steps, layout, SOURCE
    )


def test_actions_that_are_texts_are_refused(steps: dict[str, Any]) -> None:
    layout = dataclasses.replace(LAYOUT, action="language_instruction")

    message = "column 'language_instruction' of .* contains no numbers"
    refuses(message, build_episode, steps, layout, SOURCE)


def test_a_gripper_outside_of_its_range_is_named_with_its_readings(steps: dict[str, Any]) -> None:
    """The readings of BridgeData run to 1, so they are not the finger distances in meters."""
    layout = dataclasses.replace(LAYOUT, gripper_range=(0.0, 0.08))

    message = r"at step 0, but gripper_range is \[0, 0\.08\].* to 1"
    refuses(message, build_episode, steps, layout, SOURCE)


@pytest.mark.parametrize("reading", [1.115, 1.29])  # the largest of BridgeData; nearly 1.3
def test_a_reading_a_little_outside_of_its_range_is_clipped(
    steps: dict[str, Any], reading: float
) -> None:
    """A reading may lie outside the range 0 … 1 by up to 0.3."""
    steps["observation"]["state"][0, 6] = reading

    assert build_episode(steps, LAYOUT, SOURCE).gripper[0] == 1


def test_the_open_grippers_of_bc_z_read_from_0_to_a_fifth() -> None:
    """Readings of 0 and of 0.2 are open, and a reading of 1 is closed."""
    layout = dataclasses.replace(REGISTRY["bc_z"], gripper="state", command=None)

    opening, _ = read_measured_and_commanded_openings(
        {"state": np.array([0, 0.2, 1])}, layout, "bc_z"
    )

    np.testing.assert_allclose(opening, [1, 1, 0])


def test_the_grippers_of_nyu_franka_play_are_closed_at_minus_one() -> None:
    layout = dataclasses.replace(
        REGISTRY["nyu_franka_play_dataset_converted_externally_to_rlds"],
        gripper="command",
        command="command",
    )

    _, command = read_measured_and_commanded_openings(
        {"command": np.array([-1.0, 1.0])}, layout, "nyu"
    )

    np.testing.assert_allclose(command, [0, 1])


def test_a_broken_image_is_named_without_an_address_in_memory(steps: dict[str, Any]) -> None:
    steps["observation"]["image_0"][4] = b"\xff\xd8no image"

    # Pillow's message has the text "<_io.BytesIO object at 0x…>", which must not be shown.
    message = r"train#0 step 4 camera 'external' is not a readable image [^<]*$"
    refuses(message, build_episode, steps, LAYOUT, SOURCE)


@pytest.fixture
def steps_with_pause(shared: Path) -> dict[str, Any]:
    """The columns of an episode of ten steps, whose arm does not move from step 2 to step 4."""
    folder = open_rlds(shared / "data" / "bridge_v2_sample")
    ((_, steps),) = folder.read_steps("train[5:6]")
    states = steps["observation"]["state"].copy()
    states[2:5] = states[2]
    steps["observation"]["state"] = states
    return steps


DROP_IDLE = dataclasses.replace(LAYOUT, drop_idle=True)


def test_idle_steps_are_removed_if_the_layout_says_so(steps_with_pause: dict[str, Any]) -> None:
    with_pause = build_episode(steps_with_pause, LAYOUT, SOURCE)
    without_pause = build_episode(steps_with_pause, DROP_IDLE, SOURCE)

    moving_steps = [0, 1, 4, 5, 6, 7, 8, 9]  # at steps 2 and 3, the next state is the same
    assert len(with_pause) == 10
    assert len(without_pause) == 8
    assert len(without_pause.images["external"]) == 8
    np.testing.assert_array_equal(without_pause.position, with_pause.position[moving_steps])


def test_the_actions_without_idle_steps_lead_to_the_same_end(
    steps_with_pause: dict[str, Any],
) -> None:
    episode = build_episode(steps_with_pause, DROP_IDLE, SOURCE)

    assert episode.action is not None
    known_translations = episode.action[:-1, :3]
    total_translation = known_translations.sum(axis=0)
    expected = episode.position[-1] - episode.position[0]
    np.testing.assert_allclose(total_translation, expected, atol=1e-6)


def test_idle_steps_of_droid_are_removed() -> None:
    assert REGISTRY["droid"].drop_idle


def make_still(steps: dict[str, Any], roll: float) -> None:
    """Let the arm rest in one pose with this roll (rad), with an open gripper."""
    steps["action"][:, 6] = 1
    position = [0.3, 0, 0.2]
    roll_pitch_yaw = [roll, 0.4, -0.7]
    steps["observation"]["state"][:] = [*position, *roll_pitch_yaw, 1]


@pytest.mark.parametrize("roll", np.linspace(-1, 1, 20))
def test_an_arm_that_rests_is_idle_whatever_its_orientation(
    steps: dict[str, Any], roll: float
) -> None:
    """The angle between equal quaternions must be 0.

    An arc cosine would give another angle, because the scalar product of a float32 quaternion with
    itself may be less than 1.
    """
    make_still(steps, roll)
    # At a higher rate, smaller motions per step count as motions.
    layout = dataclasses.replace(DROP_IDLE, rate_hz=15)

    assert len(build_episode(steps, layout, SOURCE)) == 1


def test_a_slow_drift_becomes_steps_of_the_smallest_motion(steps: dict[str, Any]) -> None:
    """The arm moves 10 mm in the first step, and then 1.9 mm in each step.

    At 1 Hz, less than 2 mm per step is idle. Two steps of the drift together are not, so the drift
    becomes actions of 3.8 mm. If all its steps were dropped, one action would span 15 mm more.
    """
    make_still(steps, roll=1)
    steps["observation"]["state"][1:, 0] += 0.01 + 0.0019 * np.arange(9)
    layout = dataclasses.replace(DROP_IDLE, rate_hz=1)

    episode = build_episode(steps, layout, SOURCE)

    assert episode.action is not None
    largest_step_m = episode.action[:, 0].max()
    assert largest_step_m >= 0.01  # the first step
    assert largest_step_m < 0.013  # at most one step of the drift is added to it


def test_an_opening_that_is_its_command_but_for_rounding_was_not_measured() -> None:
    """The observed opening of a step is then the command of the step before."""
    layout = DatasetLayout(
        "mine",
        gripper="state",
        gripper_range=(0.0, 0.08),
        command="action",
        command_range=(0.0, 1.0),
    )
    steps = {"state": np.array([0.08, 0, 0.04]), "action": np.array([1, 0.0003, 0.5])}

    opening, command = read_measured_and_commanded_openings(steps, layout, "mine")

    np.testing.assert_allclose(command, [1, 0, 0.5], atol=1e-3)
    np.testing.assert_allclose(opening, [1, 1, 0], atol=1e-3)  # the first has no step before


SIRIUS = REGISTRY["austin_sirius_dataset_converted_externally_to_rlds"]
NUM_ROWS = 9


def make_sirius_steps() -> dict[str, Any]:
    """The columns of a Franka at 20 Hz that moves 1 mm per step along x, with its gripper open.

    The dataset writes poses as matrices, column by column.
    """
    points_down = np.diag([1.0, -1, -1, 1])
    poses = np.tile(points_down, (NUM_ROWS, 1, 1))  # [9, 4, 4]
    poses[:, 0, 3] = 0.4 + 0.001 * np.arange(NUM_ROWS)
    image = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    open_command = [-1]
    return {
        "observation": {
            "state_ee": poses.swapaxes(1, 2).reshape(NUM_ROWS, 16),
            "state_gripper": np.full((NUM_ROWS, 1), 0.077),
            "image": [image] * NUM_ROWS,
            "wrist_image": [image] * NUM_ROWS,
        },
        "action": np.tile([0.0] * 6 + open_command, (NUM_ROWS, 1)),
        "action_mode": np.full((NUM_ROWS, 1), -1.0),
        "language_instruction": [b"do it"] * NUM_ROWS,
    }


X_COLUMN = 12  # of "state_ee": the x of the position


def clear_rows(steps: dict[str, Any], rows: list[int]) -> None:
    """Set the states of some rows to zero. Three datasets of UT Austin have such rows."""
    steps["observation"]["state_ee"][rows] = 0
    steps["observation"]["state_gripper"][rows] = 0


def test_a_row_of_zeros_is_dropped() -> None:
    steps = make_sirius_steps()
    clear_rows(steps, [4])

    episode = build_episode(steps, SIRIUS, SOURCE)

    remaining_rows = np.array([0, 1, 2, 3, 5, 6, 7, 8])
    expected = 0.4 + 0.001 * remaining_rows
    np.testing.assert_allclose(episode.position[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(episode.gripper, 1)
    assert len(episode.images["external"]) == NUM_ROWS - 1


def test_the_step_before_a_dropped_row_is_no_target() -> None:
    """The motion of row 3 would span two rows. The last action is never known."""
    steps = make_sirius_steps()
    clear_rows(steps, [4])

    episode = build_episode(steps, SIRIUS, SOURCE)

    np.testing.assert_array_equal(episode.action_mask, [1, 1, 1, 0, 1, 1, 1, 0])


def test_no_resampled_target_spans_a_dropped_row() -> None:
    """At half the rate, every second of the 8 remaining rows is left, and moves 2 mm.

    The second action covers rows 2 and 3, behind which row 4 was dropped.
    """
    steps = make_sirius_steps()
    clear_rows(steps, [4])

    episode = resample_episode(build_episode(steps, SIRIUS, SOURCE), rate_hz=10.0)

    assert episode.action is not None
    assert episode.action_mask is not None
    target_translations_m = episode.action[episode.action_mask, 0]
    np.testing.assert_allclose(target_translations_m, 0.002, atol=1e-6)
    np.testing.assert_array_equal(episode.action_mask, [1, 0, 1, 0])


def test_without_commands_the_step_before_a_dropped_row_is_no_target() -> None:
    steps = make_sirius_steps()
    clear_rows(steps, [4])
    layout = dataclasses.replace(SIRIUS, command=None)

    episode = with_canonical_actions(build_episode(steps, layout, SOURCE))

    np.testing.assert_array_equal(episode.action_mask, [1, 1, 1, 0, 1, 1, 1, 0])


def test_canonical_actions_before_a_dropped_row_are_no_targets(steps: dict[str, Any]) -> None:
    """The quaternion of row 6 is zero. The last of the logged actions is known."""
    steps["own_action"] = np.tile(STAY, (10, 1))
    steps["rotation"] = np.tile([1.0, 0, 0, 0], (10, 1))
    steps["rotation"][6] = 0
    layout = dataclasses.replace(
        LAYOUT, action="own_action", rotation="rotation", rotation_format="quat_wxyz"
    )

    episode = build_episode(steps, layout, SOURCE)

    np.testing.assert_array_equal(episode.action_mask, [1, 1, 1, 1, 1, 0, 1, 1, 1])


def test_idle_steps_before_a_dropped_row_mask_the_step_that_leads_across_it() -> None:
    """The arm rests from row 3 to row 5, and row 4 is dropped.

    Row 3 is idle, because row 5 has the same pose. Rows 0, 1, 2, 5, 6, 7 and 8 remain, and the
    action of row 2 leads across the dropped row.
    """
    steps = make_sirius_steps()
    poses = steps["observation"]["state_ee"]
    poses[3:6, X_COLUMN] = poses[3, X_COLUMN]
    clear_rows(steps, [4])
    layout = dataclasses.replace(SIRIUS, drop_idle=True)

    episode = build_episode(steps, layout, SOURCE)

    assert len(episode) == 7
    np.testing.assert_array_equal(episode.action_mask, [1, 1, 0, 1, 1, 1, 0])


def test_an_episode_of_which_less_than_half_is_left_is_refused() -> None:
    """Five of nine rows are bad, so none is dropped, and the first bad one is named."""
    steps = make_sirius_steps()
    clear_rows(steps, [1, 3, 5, 6, 7])

    refuses(
        rf"rotation of {SOURCE} at step 1 is not written as", build_episode, steps, SIRIUS, SOURCE
    )


def test_an_episode_without_bad_rows_has_no_mask_before_its_last_step() -> None:
    episode = build_episode(make_sirius_steps(), SIRIUS, SOURCE)

    np.testing.assert_array_equal(episode.action_mask, [1] * (NUM_ROWS - 1) + [0])


def test_the_outcome_in_a_dropped_row_is_read() -> None:
    steps = make_sirius_steps()
    clear_rows(steps, [NUM_ROWS - 1])
    steps["reward"] = np.append(np.zeros(NUM_ROWS - 1), 1)
    layout = dataclasses.replace(SIRIUS, success="reward")

    assert build_episode(steps, layout, SOURCE).success is True


def test_a_jump_across_a_dropped_row_is_measured_over_its_time() -> None:
    steps = make_sirius_steps()
    clear_rows(steps, [4])
    # 0.2 m in one step at 20 Hz would be 4 m/s, faster than any arm. In two steps it is 2 m/s.
    steps["observation"]["state_ee"][5:, X_COLUMN] += 0.2

    assert len(build_episode(steps, SIRIUS, SOURCE)) == NUM_ROWS - 1


def test_repairs_are_counted() -> None:
    steps = make_sirius_steps()
    clear_rows(steps, [4, 5])
    steps["observation"]["state_gripper"][0] = 0.09  # more than a tenth beyond the open reading

    with collect_repairs() as repairs:
        build_episode(steps, SIRIUS, SOURCE)

    assert repairs == Repairs(num_dropped_rows=2, num_clipped_readings=1)
