"""The registry of datasets and the files `spear.json` describe datasets completely or are refused.

An episode of made columns, exactly where a layout says, must be read as the poses, openings and
commands that the columns were made from.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from refusals import no_warning, refuses
from rotation_writers import ROTATION_WRITERS
from spear.data.actions import with_canonical_actions
from spear.data.readers.build_episode import build_episode, read_poses_in_recorded_frames
from spear.data.readers.columns import parse_column, read_column
from spear.data.readers.dataset_layout import (
    ANGLE_FORMATS,
    REGISTRY,
    DatasetLayout,
    RotationFormat,
    find_missing_fields,
    read_layout_file,
    resolve_layout,
)
from spear.embodiments.kinematics import compute_franka_ee_poses
from spear.errors import Notice
from spear.util.images import encode_jpeg

MIXTURE = {name: layout for name, layout in REGISTRY.items() if layout.weight is not None}
"""The layouts of the paper's training mixture."""
READABLE = sorted(name for name, layout in REGISTRY.items() if not find_missing_fields(layout))
"""The names of the datasets whose layouts are complete."""
KNOWN_WEIGHTS = {"droid": 35.0, "bridge_dataset": 18.0, "fractal20220817_data": 12.0, "kuka": 4.0}
"""The weights, %, that the paper states."""

QUARTER_TURN_ABOUT_Z = (math.sqrt(0.5), 0.0, 0.0, math.sqrt(0.5))  # quaternion w, x, y, z
# The motion of the made episodes: four positions (m, base frame) and orientations, and another
# motion as the joint angles of a Franka (rad).
NUM_STEPS = 4
POSITIONS = np.array([[0.3 + 0.001 * step, 0.1, 0.2] for step in range(NUM_STEPS)])
ROTATIONS = Rotation.from_euler(
    "xyz", [[0.1 * step, 0.2, -0.1 * step] for step in range(NUM_STEPS)]
)
JOINTS = np.array([[0.1 * step, -0.5, 0.2, -2.2, 0.1, 1.8, 0.7] for step in range(NUM_STEPS)])


def test_the_mixture_has_the_papers_weights_where_they_are_known() -> None:
    assert len(MIXTURE) == 24
    assert {name: REGISTRY[name].weight for name in KNOWN_WEIGHTS} == KNOWN_WEIGHTS
    total = sum(layout.weight or 0 for layout in MIXTURE.values())
    assert total == pytest.approx(100, abs=0.05)


@pytest.mark.parametrize("name", MIXTURE)
def test_each_weight_has_a_source(name: str) -> None:
    source = "the paper: " if name in KNOWN_WEIGHTS else "ours: "

    assert MIXTURE[name].facts["weight"].startswith(source)


def test_the_datasets_that_say_how_episodes_ended_are_known() -> None:
    names_with_success = {name for name, layout in MIXTURE.items() if layout.success}

    assert names_with_success == {"bc_z", "droid", "kuka"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_each_layout_has_a_robot_a_rate_an_instruction_and_an_external_camera(name: str) -> None:
    layout = REGISTRY[name]

    assert layout.robot
    assert layout.rate_hz
    assert layout.instruction
    assert "external" in layout.images
    assert all(len(fact) > 5 for fact in layout.facts.values())  # words, no empty texts


@pytest.mark.parametrize("name", sorted(set(REGISTRY) - set(READABLE)))
def test_a_layout_that_is_not_complete_says_why_and_is_refused(name: str) -> None:
    """The facts of the layout say why at least one of the missing fields is missing."""
    missing_fields = find_missing_fields(REGISTRY[name])

    refuses(f"'{name}' lacks {missing_fields[0]}", resolve_layout, name, Path("nowhere"))
    assert set(missing_fields) & set(REGISTRY[name].facts)


def put_column(steps: dict[str, Any], column: str, values: np.ndarray) -> None:
    """Write values into the columns of an episode.

    Args:
        steps: The columns, which are changed.
        column: Where to write, for example "state[0:3]".
        values: [T, d] numbers.
    """
    path, components = parse_column(column)
    if components is None:
        steps[path] = values
        return
    rows = steps.setdefault(path, np.zeros((NUM_STEPS, 40)))  # wide enough for every layout
    rows[:, components] = values


def compute_layout_pose(layout: DatasetLayout) -> tuple[np.ndarray, Rotation]:
    """The positions and orientations in our frames of an episode that `make_steps` makes."""
    positions = POSITIONS
    rotations = ROTATIONS
    if layout.rotation_format == "franka_joints":
        positions, quaternions = compute_franka_ee_poses(JOINTS)
        rotations = Rotation.from_quat(quaternions, scalar_first=True)

    base_rotation = Rotation.from_quat(layout.base_rotation, scalar_first=True)
    tool_rotation = Rotation.from_quat(layout.tool_rotation, scalar_first=True)
    tool_positions = positions + rotations.apply(layout.tool_offset)  # in the dataset's base frame
    return base_rotation.apply(tool_positions), base_rotation * rotations * tool_rotation


def make_steps(layout: DatasetLayout) -> dict[str, Any]:
    """Make the columns of an episode with the known motion, exactly where the layout says.

    The gripper is measured 75 % open, and commanded to be open at steps 0 and 2 and closed at steps
    1 and 3. If one column is both the measurement and the command, it has the commands.
    """
    steps: dict[str, Any] = {}
    if layout.rotation_format == "franka_joints":
        put_column(steps, layout.rotation, JOINTS)
    else:
        put_column(steps, layout.rotation, ROTATION_WRITERS[layout.rotation_format](ROTATIONS))
        put_column(steps, layout.position, POSITIONS)

    if layout.gripper_opening is None:
        closed_reading, open_reading = layout.gripper_range
        opening = np.full((NUM_STEPS, 1), 0.75)
        if layout.command == layout.gripper:
            opening = np.array([[1.0], [0.0], [1.0], [0.0]])
        readings = closed_reading + opening * (open_reading - closed_reading)
        put_column(steps, layout.gripper, readings)
    if layout.command is not None:
        close_command, open_command = layout.command_range
        commands = np.array([[open_command], [close_command], [open_command], [close_command]])
        put_column(steps, layout.command, commands)

    for column in layout.images.values():
        steps[column] = [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * NUM_STEPS
    steps[layout.instruction] = [b"do it"] * NUM_STEPS
    if layout.success is not None:
        steps[layout.success] = np.zeros(NUM_STEPS, bool)
    if layout.autonomous is not None:
        steps[layout.autonomous] = np.full(NUM_STEPS, layout.autonomous_value - 1)
    return steps


@pytest.mark.parametrize("name", READABLE)
def test_each_readable_layout_gives_the_recorded_poses(name: str) -> None:
    layout = REGISTRY[name]
    positions, rotations = compute_layout_pose(layout)

    episode = build_episode(make_steps(layout), layout, name)

    rotation = Rotation.from_quat(episode.rotation, scalar_first=True)
    difference = rotations.inv() * rotation
    np.testing.assert_allclose(episode.position, positions, atol=1e-6)
    assert difference.magnitude().max() < 1e-5


@pytest.mark.parametrize("name", READABLE)
def test_each_readable_layout_gives_the_recorded_openings(name: str) -> None:
    """Where one column is both the opening and the command, openings follow one step later."""
    layout = REGISTRY[name]

    episode = build_episode(make_steps(layout), layout, name)

    expected = [0.75] * NUM_STEPS
    if layout.gripper_opening is not None:
        expected = [layout.gripper_opening] * NUM_STEPS
    elif layout.command == layout.gripper:
        expected = [1, 1, 0, 1]  # the commands 1, 0, 1, 0, one step later
    np.testing.assert_allclose(episode.gripper, expected, atol=1e-6)


@pytest.mark.parametrize("name", READABLE)
def test_each_readable_layout_gives_the_recorded_outcome(name: str) -> None:
    """`make_steps` records that the episode failed, if the layout has a column for it."""
    layout = REGISTRY[name]

    episode = build_episode(make_steps(layout), layout, name)

    expected = None if layout.success is None else False
    assert episode.success is expected


@pytest.mark.parametrize("name", [name for name in READABLE if REGISTRY[name].command])
def test_each_readable_layout_with_commands_gives_them(name: str) -> None:
    layout = REGISTRY[name]

    episode = build_episode(make_steps(layout), layout, name)

    np.testing.assert_array_equal(episode.action[:, 7], [1, 0, 1, 0])


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in READABLE
        if REGISTRY[name].command and REGISTRY[name].command == REGISTRY[name].gripper
    ],
)
def test_a_gripper_column_of_an_action_is_a_command_without_saying_so(name: str) -> None:
    """Without the field `command`, a gripper column that is part of an action gives commands."""
    layout = dataclasses.replace(REGISTRY[name], command=None)

    episode = build_episode(make_steps(REGISTRY[name]), layout, name)

    np.testing.assert_array_equal(episode.action[:, 7], [1, 0, 1, 0])


@pytest.mark.parametrize("rotation_format", [*ROTATION_WRITERS, "franka_joints"])
def test_millimeters_and_degrees_are_converted(rotation_format: RotationFormat) -> None:
    """Poses in millimeters and degrees are read as the same poses in meters and radians.

    Quaternions and matrices have no unit. Joint angles are in both columns, and have no length.
    """
    has_joints = rotation_format == "franka_joints"
    rotations = JOINTS if has_joints else ROTATION_WRITERS[rotation_format](ROTATIONS)
    rotations_deg = np.degrees(rotations) if rotation_format in ANGLE_FORMATS else rotations
    steps = {"at": JOINTS if has_joints else POSITIONS, "turn": rotations}
    steps_mm_deg = {
        "at": rotations_deg if has_joints else 1000 * POSITIONS,
        "turn": rotations_deg,
    }
    layout = DatasetLayout("mine", position="at", rotation="turn", rotation_format=rotation_format)
    layout_mm_deg = dataclasses.replace(layout, length_unit="mm", angle_unit="deg")

    expected_position, expected_rotation, _ = read_poses_in_recorded_frames(steps, layout, "mine")
    position, rotation, _ = read_poses_in_recorded_frames(steps_mm_deg, layout_mm_deg, "mine")

    np.testing.assert_allclose(position, expected_position, atol=1e-12)
    np.testing.assert_allclose(rotation, expected_rotation, atol=1e-12)


@pytest.fixture
def layout_file(tmp_path: Path) -> Path:
    """The path of a layout file that the tests write."""
    return tmp_path / "layout.json"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        # The key is unknown in a file: `--sampling-weights` sets weights.
        ({"weight": 9.0}, r"weight'.*spear-json\.md"),
        # The camera is misspelled.
        ({"image_aspect": {"externl": 1.5}}, r"image_aspect.*external"),
    ],
)
def test_keys_that_would_change_nothing_are_refused(
    tmp_path: Path, layout_file: Path, fields: dict[str, Any], message: str
) -> None:
    layout_file.write_text(json.dumps({"like": "bridge_dataset", **fields}))

    refuses(message, resolve_layout, "mine", tmp_path, layout_file)


def test_the_range_of_a_command_without_a_column_is_refused(layout_file: Path) -> None:
    """The file's own `gripper` replaces that of BridgeData, and with it BridgeData's command."""
    fields = {"like": "bridge_dataset", "gripper": "mine[6]", "command_range": [1, 0]}
    layout_file.write_text(json.dumps(fields))

    refuses("command_range", read_layout_file, layout_file, "mine")


def test_a_notice_says_that_own_images_do_not_inherit_their_aspect(layout_file: Path) -> None:
    fields = {"like": "bridge_dataset", "images": {"external": "observation/images/image_0"}}
    layout_file.write_text(json.dumps(fields))

    with pytest.warns(Notice, match=r'"external": 1\.33'):
        layout = read_layout_file(layout_file, "mine")

    assert layout.image_aspect == {}


@pytest.mark.parametrize("aspect", [{}, {"external": 1.5}], ids=["not squeezed", "squeezed"])
def test_own_images_with_their_aspect_give_no_notice(
    layout_file: Path, aspect: dict[str, float]
) -> None:
    fields = {"like": "bridge_dataset", "images": {"external": "mine"}, "image_aspect": aspect}
    layout_file.write_text(json.dumps(fields))

    with no_warning():
        layout = read_layout_file(layout_file, "mine")

    assert layout.image_aspect == aspect


def test_a_layout_beside_the_folder_of_a_version_is_named(tmp_path: Path) -> None:
    version = tmp_path / "1.0.0"
    version.mkdir()
    (version / "features.json").write_text("{}")
    (tmp_path / "spear.json").write_text('{"like": "bridge_dataset"}')

    refuses("move it to .*1\\.0\\.0.spear\\.json", resolve_layout, "mine", version)


def test_canonical_actions_do_not_inherit_a_tool_rotation(layout_file: Path) -> None:
    """Canonical actions are in our end-effector frame already."""
    layout_file.write_text(json.dumps({"like": "taco_play", "action": "act"}))

    layout = read_layout_file(layout_file, "mine")

    assert REGISTRY["taco_play"].tool_rotation != (1, 0, 0, 0)
    assert layout.tool_rotation == (1, 0, 0, 0)


@pytest.mark.parametrize(
    ("fields", "key"),  # key: the one that the message names
    [
        # A mask without actions.
        ({"action_mask": "valid"}, "action_mask"),
        # These would change the states but not the actions.
        ({"action": "act", "tool_rotation": [0.0, 1.0, 0.0, 0.0]}, "tool_rotation"),
        ({"action": "act", "base_rotation": [0.0, 0.0, 0.0, 1.0]}, "base_rotation"),
        ({"action": "act", "drop_idle": True}, "drop_idle"),
    ],
)
def test_keys_that_contradict_the_actions_are_refused(
    layout_file: Path, fields: dict[str, Any], key: str
) -> None:
    layout_file.write_text(json.dumps({"like": "fractal20220817_data", **fields}))

    refuses(f"{key}.*action", read_layout_file, layout_file, "mine")


def convert_pose(name: str, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, Rotation]:
    """Read an episode of a known dataset that rests in one pose, in our frames.

    Args:
        name: The dataset.
        columns: Column -> its value at every step. Other columns are those of `make_steps`.

    Returns:
        Position [3] (m) and orientation.
    """
    layout = REGISTRY[name]
    steps = make_steps(layout)
    for column, value in columns.items():
        put_column(steps, column, np.tile(value, (NUM_STEPS, 1)))
    episode = build_episode(steps, layout, name)
    return episode.position[0], Rotation.from_quat(episode.rotation[0], scalar_first=True)


DROID_RESET_JOINTS = np.pi * np.array([0, -1 / 5, 0, -4 / 5, 0, 3 / 5, 0])
"""Joint angles (rad) at which DROID's robots begin; the gripper points straight down."""


def test_a_droid_gripper_at_its_reset_pose_is_parallel_to_the_base() -> None:
    """Its Robotiq gripper closes along the y axis of the flange, whose joint is at 0."""
    _, rotation = convert_pose("droid", {"observation/joint_position": DROID_RESET_JOINTS})

    assert rotation.magnitude() < 1e-6


def test_the_tips_of_a_droid_gripper_are_those_of_a_robotiq() -> None:
    """They are 0.1548 m below the flange, and those of Franka's own hand would be 0.1034 m."""
    position, _ = convert_pose("droid", {"observation/joint_position": DROID_RESET_JOINTS})

    hand_position, _ = compute_franka_ee_poses(DROID_RESET_JOINTS[None])
    np.testing.assert_allclose(hand_position[0] - position, [0, 0, 0.1548 - 0.1034], atol=1e-6)


def test_a_turn_of_droids_last_joint_turns_the_gripper_about_its_z_axis() -> None:
    """The axis of the last joint points down, so its turn is a negative one about our z axis."""
    joints = DROID_RESET_JOINTS + np.array([0, 0, 0, 0, 0, 0, 0.3])

    _, rotation = convert_pose("droid", {"observation/joint_position": joints})

    np.testing.assert_allclose(rotation.as_rotvec(), [0, 0, -0.3], atol=1e-6)


def test_a_tool_of_fractal_that_points_down_has_our_z_up() -> None:
    """The tool's frame has z out of the gripper and y along the fingers' motion."""
    tool_down = Rotation.from_euler("x", np.pi).as_quat()

    _, rotation = convert_pose(
        "fractal20220817_data", {"observation/base_pose_tool_reached[3:7]": tool_down}
    )

    np.testing.assert_allclose(rotation.as_matrix(), np.eye(3), atol=1e-6)


def test_the_mean_pose_of_jaco_play_reaches_forward_and_points_down() -> None:
    """Means of the recorded states, which agree with forward kinematics of the mean joints."""
    x_axis = np.array([-0.967, 0.25, 0.014])
    y_axis = np.array([-0.251, -0.966, -0.032])
    matrix = np.column_stack([x_axis, y_axis, np.cross(x_axis, y_axis)])
    pose = np.concatenate([[-0.076, -0.431, 0.275], Rotation.from_matrix(matrix).as_quat()])

    position, rotation = convert_pose(
        "jaco_play", {"observation/end_effector_cartesian_pos[0:7]": pose}
    )

    # The base is turned by 90° about z, and the finger tips are 0.16 m below the recorded position.
    np.testing.assert_allclose(position, [0.43, -0.08, 0.115], atol=0.01)
    assert np.degrees(rotation.magnitude()) < 16


@pytest.mark.parametrize(("name", "version"), [("droid", 2), ("bridge_dataset", 1)])
def test_known_layouts_say_which_version_their_frames_have(name: str, version: int) -> None:
    assert REGISTRY[name].frames == {name: version}


def test_a_layout_like_a_known_one_has_its_frames(layout_file: Path) -> None:
    layout_file.write_text(json.dumps({"like": "droid"}))

    assert read_layout_file(layout_file, "mine").frames == {"droid": 2}


def test_a_layout_with_frames_of_its_own_has_no_version_of_others(layout_file: Path) -> None:
    layout_file.write_text(json.dumps({"like": "droid", "tool_rotation": [1, 0, 0, 0]}))

    assert read_layout_file(layout_file, "mine").frames == {}


def test_a_base_rotation_turns_poses_and_motions() -> None:
    """Poses and translations turn with the base frame.

    Rotations of actions are in the end-effector frame, so they stay the same.
    """
    layout = REGISTRY["taco_play"]
    turned_layout = dataclasses.replace(layout, base_rotation=QUARTER_TURN_ABOUT_Z)
    steps = make_steps(layout)

    episode = with_canonical_actions(build_episode(steps, layout, "mine"))
    turned_episode = with_canonical_actions(build_episode(steps, turned_layout, "mine"))

    quarter_turn = Rotation.from_quat(QUARTER_TURN_ABOUT_Z, scalar_first=True)
    expected_position = quarter_turn.apply(episode.position)
    np.testing.assert_allclose(turned_episode.position, expected_position, atol=1e-6)

    rotation = Rotation.from_quat(turned_episode.rotation, scalar_first=True)
    expected_rotation = quarter_turn * Rotation.from_quat(episode.rotation, scalar_first=True)
    difference = expected_rotation.inv() * rotation
    assert difference.magnitude().max() < 1e-5

    translation = turned_episode.action[:, :3]
    expected_translation = quarter_turn.apply(episode.action[:, :3])
    np.testing.assert_allclose(translation, expected_translation, atol=1e-6)

    action_rotation = turned_episode.action[:, 3:7]
    np.testing.assert_allclose(action_rotation, episode.action[:, 3:7], atol=1e-6)


def test_a_gripper_that_never_moves_keeps_its_command() -> None:
    """The gripper of this dataset is always closed (its `gripper_opening` is 0)."""
    layout = REGISTRY["berkeley_cable_routing"]

    episode = with_canonical_actions(build_episode(make_steps(layout), layout, "mine"))

    np.testing.assert_array_equal(episode.action[:, 7], 0)


def test_a_constant_opening_replaces_the_gripper_of_a_known_dataset(layout_file: Path) -> None:
    layout_file.write_text(json.dumps({"like": "bridge_dataset", "gripper_opening": 0}))

    layout = read_layout_file(layout_file, "mine")

    assert layout.gripper_opening == 0
    assert layout.gripper is None
    assert layout.command is None


def test_a_gripper_column_replaces_a_constant_opening(layout_file: Path) -> None:
    fields = {"like": "berkeley_cable_routing", "gripper": "state", "gripper_range": [0, 1]}
    layout_file.write_text(json.dumps(fields))

    layout = read_layout_file(layout_file, "mine")

    assert layout.gripper_opening is None


def test_a_gripper_with_a_column_and_a_constant_opening_is_refused(layout_file: Path) -> None:
    layout_file.write_text(json.dumps({"gripper": "state", "gripper_opening": 0}))

    refuses("gripper_opening.*column", read_layout_file, layout_file, "mine")


STEPS_WITH_SLASHES = {
    "observation": {"present/xyz": np.arange(6.0).reshape(2, 3)},
    "observation/state": np.ones((2, 4)),
}
"""Columns of two steps, in which names of columns contain slashes themselves."""


def test_names_that_contain_slashes_are_found() -> None:
    positions = read_column(STEPS_WITH_SLASHES, "observation/present/xyz[0:2]", "mine")
    numbers = read_column(STEPS_WITH_SLASHES, "observation/state[3]", "mine")

    np.testing.assert_array_equal(positions, [[0, 1], [3, 4]])
    np.testing.assert_array_equal(numbers, [1, 1])


def test_an_unknown_column_is_refused_with_the_known_ones() -> None:
    message = r"there is no 'present'.*\(present/xyz\)"

    refuses(message, read_column, STEPS_WITH_SLASHES, "observation/present/abc", "mine")
