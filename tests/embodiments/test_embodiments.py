"""Every embodiment reads its example, converts actions exactly, and names the key of a wrong value.

An action chunk has five actions at 5 Hz, so it takes one second.
"""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.transform import Rotation

from refusals import no_warning, refuses
from spear import embodiments
from spear.data.readers.build_episode import build_episode
from spear.data.readers.dataset_layout import REGISTRY
from spear.embodiments import Embodiment, droid
from spear.embodiments.observations import crop_openpi_padding
from spear.errors import suppress_notices
from spear.policy import Spear1Policy
from spear.serve.options import EMBODIMENTS
from spear.types import Array
from spear.util.images import encode_jpeg, fit_image

ROOT = Path(__file__).parents[2]
EXAMPLE_FILE = ROOT / "examples" / "my_robot.py"
SERVE_PAGE = ROOT / "docs" / "howto" / "serve.md"
NAMES = embodiments.list_names()
LINK_IN_EE = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])
"""Orientation of the WidowX's gripper link in our end-effector frame."""
EVERY_NAME = pytest.mark.parametrize("name", NAMES)


def to_rotation(quaternion: Array) -> Rotation:
    return Rotation.from_quat(np.asarray(quaternion, np.float64), scalar_first=True)


def compute_angle(first: Rotation, second: Rotation) -> float:
    """Compute the angle (rad) between two orientations."""
    return float((first.inv() * second).magnitude())


def make_chunk(distance_m: float = 0.02, angle_rad: float = 0.1) -> Array:
    """Five actions that move and turn in random directions; the gripper closes at the third.

    Args:
        distance_m: how far an action moves at most.
        angle_rad: how far an action turns at most.
    """
    generator = torch.Generator().manual_seed(3)
    random = torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=-1)
    axes = random.numpy()[:, 1:]  # [5, 3], no longer than 1
    translations = distance_m * axes[::-1]
    rotations = Rotation.from_rotvec(angle_rad * axes).as_quat(scalar_first=True)
    openings = [[1], [1], [0], [0], [0]]
    chunk = np.concatenate([translations, rotations, openings], axis=1)
    return chunk.astype(np.float32)


def make_still_chunk() -> Array:
    """Five actions without motion, with an open gripper."""
    return np.tile(np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32), (5, 1))


def follow_actions(state: Array, actions: Array) -> tuple[Array, list[Rotation]]:
    """Compute position and orientation after each action, as `spear.types.Action` defines it."""
    position = np.float64(state[:3])
    rotation = to_rotation(state[3:7])
    positions = []
    rotations = []
    for action in actions:
        position = position + action[:3]
        rotation = rotation * to_rotation(action[3:7])
        positions.append(position)
        rotations.append(rotation)
    return np.array(positions), rotations


def read_state(robot: Embodiment, observation: dict[str, Any]) -> Array:
    """The state [8] of a robot's observation."""
    return robot.read(observation)["observation/state"]


def convert(robot: Embodiment, actions: Array, control_name: str | None = None) -> Array:
    """Convert actions that begin at the state of the robot's example to rows of a control."""
    observation = robot.example()
    _, control = robot.select_control(control_name)
    return control.convert(actions, read_state(robot, observation), observation)


# Tests of every embodiment.


@EVERY_NAME
def test_the_example_is_understood(name: str) -> None:
    robot = embodiments.load(name)

    state = read_state(robot, robot.example())

    assert state.shape == (8,)
    assert state.dtype == np.float32
    assert np.linalg.norm(state[3:7]) == pytest.approx(1)
    assert 0 <= state[7] <= 1


@EVERY_NAME
def test_every_control_makes_rows_for_one_second(name: str) -> None:
    robot = embodiments.load(name)

    for control_name, control in robot.controls.items():
        rows = convert(robot, make_chunk(), control_name)

        assert rows.dtype == np.float32
        assert np.isfinite(rows).all()
        assert len(rows) == control.rate_hz  # five actions at 5 Hz


def make_wrong_images(image: Array) -> list[Any]:
    """Return values that are no image."""
    return [
        image[0],
        image.astype(np.float32),
        image[:, :0],  # width 0
        image.transpose(2, 0, 1),  # channels first
        None,
    ]


def make_wrong_numbers(numbers: Array) -> list[Any]:
    """Return values that are not as many finite numbers, or too large."""
    texts = numbers.astype(str)
    return [
        numbers[:-1],
        numbers * np.nan,
        numbers + 1e9,
        texts,
        ["x" * 2**20, *texts[1:]],  # an array of these texts would take megabytes per number
        [[1], [2, 3]],
        None,
    ]


WRONG_PROMPTS = ["", " ", "\u200b", "\x00", "…", "go\x00", "\ud800 go", 5, "x" * 2000, None]
WRONG_SEEDS = ["1", 0.5, True, None]
POSITION_KEYS = ("observation/state", "maniskill3/eef_pos", "states")
"""Keys of embodiments whose first three numbers are a position."""


def get_prompt_key(robot: Embodiment) -> str:
    """The key under which a robot sends its instruction."""
    return "prompt" if "prompt" in robot.required else "task_description"


def iterate_wrong_values(name: str, robot: Embodiment) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for the keys of an embodiment, with values that it must refuse."""
    yield from ((get_prompt_key(robot), prompt) for prompt in WRONG_PROMPTS)
    yield from (("seed", seed) for seed in WRONG_SEEDS)
    for key, value in robot.example().items():
        if not isinstance(value, np.ndarray):
            continue
        if value.ndim == 3:
            yield from ((key, image) for image in make_wrong_images(value))
            continue
        yield from ((key, numbers) for numbers in make_wrong_numbers(value))
        indices = np.arange(len(value))
        if key in POSITION_KEYS:
            in_millimeters = value * np.where(indices < 3, 1000, 1)
            yield key, in_millimeters
        has_angles = key == droid.JOINTS_KEY or (name, key) == ("widowx", "observation/state")
        if has_angles:
            in_degrees = value * np.where(np.isin(indices, (3, 4, 5)), 57.3, 1)
            yield key, in_degrees


@EVERY_NAME
def test_an_error_names_the_key_of_a_wrong_value(name: str) -> None:
    robot = embodiments.load(name)
    for key, value in iterate_wrong_values(name, robot):
        refuses(re.escape(key), robot.read, {**robot.example(), key: value})


@EVERY_NAME
def test_an_error_names_a_missing_key(name: str) -> None:
    robot = embodiments.load(name)
    for key in robot.required:
        observation = robot.example()
        del observation[key]
        refuses(key, robot.read, observation)


@EVERY_NAME
def test_an_error_names_an_unknown_key_and_a_similar_one(name: str) -> None:
    robot = embodiments.load(name)
    key = get_prompt_key(robot)
    misspelled_key = key[:-1]
    observation = {**robot.example(), misspelled_key: "x"}

    refuses(f"'{misspelled_key}'.*'{key}'", robot.read, observation)


@EVERY_NAME
def test_what_a_robots_file_returns_is_checked_as_well(name: str) -> None:
    """An embodiment that makes a state of 7 numbers instead of 8 has a mistake."""
    robot = embodiments.load(name)
    example = robot.example()
    wrong_observation = {**robot.observe(example), "observation/state": np.ones(7)}
    broken_robot = dataclasses.replace(robot, observe=lambda _: wrong_observation)

    refuses("observation/state", broken_robot.read, example)


@EVERY_NAME
def test_the_seed_is_optional(name: str) -> None:
    robot = embodiments.load(name)
    example = robot.example()

    assert "seed" in robot.optional
    assert "seed" not in robot.read(example)
    assert robot.read({**example, "seed": np.int64(7)})["seed"] == 7


@EVERY_NAME
def test_an_observation_must_be_a_map(name: str) -> None:
    robot = embodiments.load(name)

    refuses("type list", robot.read, [robot.example()])


# WidowX


def compute_controller_rotation(name: str) -> Rotation:
    """Compute the orientation of the controller's own end-effector frame in the robot's example."""
    example = embodiments.load(name).example()
    if name == "widowx":
        return Rotation.from_euler("xyz", example["observation/state"][3:6])
    return to_rotation(example["maniskill3/eef_pos"][3:7])


WIDOWX_ROBOTS = pytest.mark.parametrize(
    # The order of Euler angles, the controller's frame in our end-effector frame, and the gripper
    # command for closed.
    ("name", "convention", "controller_frame", "closed_command"),
    [("widowx", "xyz", np.eye(3), 0), ("simpler_widowx", "XYZ", LINK_IN_EE, -1)],
)


@WIDOWX_ROBOTS
def test_a_widowx_controller_ends_where_the_actions_lead(
    name: str, convention: str, controller_frame: Array, closed_command: int
) -> None:
    """The test does what the controller does: it moves and turns a target along base axes."""
    robot = embodiments.load(name)
    state = read_state(robot, robot.example())
    chunk = make_chunk(angle_rad=0.5)
    target_rotation = compute_controller_rotation(name)
    start_matrix = to_rotation(state[3:7]).as_matrix() @ controller_frame
    np.testing.assert_allclose(start_matrix, target_rotation.as_matrix(), atol=1e-6)

    rows = convert(robot, chunk)

    positions, rotations = follow_actions(state, chunk)
    target_positions = state[:3] + np.cumsum(rows[:, :3], axis=0)
    np.testing.assert_allclose(target_positions, positions, atol=1e-6)
    for row, rotation in zip(rows, rotations, strict=True):
        target_rotation = Rotation.from_euler(convention, row[3:6]) * target_rotation
        expected_matrix = rotation.as_matrix() @ controller_frame
        np.testing.assert_allclose(target_rotation.as_matrix(), expected_matrix, atol=1e-5)
    assert rows[:, 6].tolist() == [1, 1, closed_command, closed_command, closed_command]


def test_neither_simpler_robot_takes_the_others_observations() -> None:
    maniskill3 = embodiments.load("simpler_widowx")
    maniskill2 = embodiments.load("maniskill2_widowx")

    refuses("unknown observation key", maniskill3.read, maniskill2.example())
    refuses("unknown observation key", maniskill2.read, maniskill3.example())


def test_the_simpler_controllers_read_the_same_rotation_differently() -> None:
    """ManiSkill 3 and 2 have controllers of the same name, so there are two embodiments."""
    chunk = make_chunk(angle_rad=0.5)

    maniskill3_rows = convert(embodiments.load("simpler_widowx"), chunk)
    maniskill2_rows = convert(embodiments.load("maniskill2_widowx"), chunk)

    np.testing.assert_array_equal(maniskill3_rows[:, :3], maniskill2_rows[:, :3])
    euler_angles = maniskill3_rows[:, 3:6]
    rotation_vectors = maniskill2_rows[:, 3:6]
    for angles, vector in zip(euler_angles, rotation_vectors, strict=True):
        from_euler_angles = Rotation.from_euler("XYZ", angles)
        from_rotation_vector = Rotation.from_rotvec(vector)
        assert compute_angle(from_euler_angles, from_rotation_vector) < 1e-5
    assert np.abs(euler_angles - rotation_vectors).max() > 0.02


def test_the_error_suggests_maniskill_3s_name_of_the_pose() -> None:
    robot = embodiments.load("simpler_widowx")
    observation = robot.example()
    observation["observation/eef_pos"] = observation["maniskill3/eef_pos"]

    refuses("'observation/eef_pos'.*maniskill3/eef_pos", robot.read, observation)


# DROID


@pytest.fixture
def droid_robot() -> Embodiment:
    """The embodiment of DROID. Tests that use it are skipped without MuJoCo."""
    pytest.importorskip("mujoco")
    return embodiments.load("droid")


def compute_robotiq_pose(joints: Array) -> tuple[Array, Array]:
    """Compute the pose of the end-effector frame of DROID's gripper by forward kinematics."""
    from spear.embodiments.inverse_kinematics import compute_ee_pose

    return droid.ROBOTIQ.convert_hand_to_tool_poses(*compute_ee_pose(joints))


def test_possible_joint_angles_bring_no_notice(droid_robot: Embodiment) -> None:
    with no_warning():
        droid_robot.read(droid_robot.example())


def test_droid_joint_positions_lead_where_the_actions_do(droid_robot: Embodiment) -> None:
    """An action becomes three rows, of which the last one reaches the action's target."""
    rows = convert(droid_robot, make_chunk(), "joint_position")

    assert rows.shape == (15, 8)
    state = read_state(droid_robot, droid_robot.example())
    positions, rotations = follow_actions(state, make_chunk())
    last_rows = rows[2::3]
    for row, position, rotation in zip(last_rows, positions, rotations, strict=True):
        reached_position, reached_rotation = compute_robotiq_pose(row[:7])
        assert np.linalg.norm(reached_position - position) < 1e-3
        assert compute_angle(to_rotation(reached_rotation), rotation) < 5e-3


def test_droid_joint_velocities_lead_along_the_joint_positions(droid_robot: Embodiment) -> None:
    positions = convert(droid_robot, make_chunk(), "joint_position")

    velocities = convert(droid_robot, make_chunk(), "joint_velocity")

    start = droid_robot.example()[droid.JOINTS_KEY]
    steps_rad = velocities[:, :7] * 0.2  # a velocity of 1 turns a joint by 0.2 rad per row
    reached_joints = start + np.cumsum(steps_rad, axis=0)
    np.testing.assert_allclose(reached_joints, positions[:, :7], atol=1e-5)
    # Two actions command an open gripper (0), and three a closed one.
    assert velocities[:, 7].tolist() == [0] * 6 + [1] * 9


def test_droid_joint_velocities_stay_within_their_unit(droid_robot: Embodiment) -> None:
    velocities = convert(droid_robot, make_chunk(distance_m=0.3), "joint_velocity")

    assert np.abs(velocities[:, :7]).max() <= 1


def test_droid_makes_up_for_an_action_that_was_too_fast(droid_robot: Embodiment) -> None:
    """The first action turns by 2 rad, which takes the arm more than the three rows of an action.

    The arm is still moving in the rows of the second action, and reaches the target in the end.
    """
    chunk = make_still_chunk()
    rotation_vector = np.array([2**0.5, 2**0.5, 0])  # rad; its length is 2
    chunk[0, 3:7] = Rotation.from_rotvec(rotation_vector).as_quat(scalar_first=True)

    velocities = convert(droid_robot, chunk, "joint_velocity")[:, :7]

    rows_of_second_action = velocities[3:6]
    assert np.abs(rows_of_second_action).max() > 0.1
    start = droid_robot.example()[droid.JOINTS_KEY]
    position, rotation = compute_robotiq_pose(start + 0.2 * velocities.sum(axis=0))
    state = read_state(droid_robot, droid_robot.example())
    positions, rotations = follow_actions(state, chunk)
    assert np.linalg.norm(position - positions[-1]) < 1e-3
    assert compute_angle(to_rotation(rotation), rotations[-1]) < 5e-3


def test_droid_joint_positions_stay_within_the_arms_speed_and_limits(
    droid_robot: Embodiment,
) -> None:
    from spear.embodiments.inverse_kinematics import (
        JOINT_LOWER_RAD,
        JOINT_UPPER_RAD,
        MAX_JOINT_SPEED_RAD_S,
    )

    fast_chunk = make_chunk(distance_m=0.3)  # so fast that the arm reaches its speed limit
    joints = convert(droid_robot, fast_chunk, "joint_position")[:, :7]

    start = droid_robot.example()[droid.JOINTS_KEY]
    speeds_rad_s = 15 * np.abs(np.diff(joints, axis=0, prepend=start[None]))  # 15 rows per second
    largest_speed = (speeds_rad_s / MAX_JOINT_SPEED_RAD_S).max()
    assert largest_speed == pytest.approx(1, abs=1e-4)
    assert (joints > JOINT_LOWER_RAD).all()
    assert (joints < JOINT_UPPER_RAD).all()


@pytest.mark.parametrize(
    ("version", "turn_deg", "tip_offset_m"), [(1, -45, 0.1034), (2, 0, 0.1548)]
)
def test_droid_cartesian_positions_are_those_of_the_flange(
    droid_robot: Embodiment, version: int, turn_deg: float, tip_offset_m: float
) -> None:
    """The finger tips are `tip_offset_m` beyond the flange, and the tool is turned by `turn_deg`.

    Version 1 of the frames is of Franka's own hand, version 2 of the Robotiq gripper.
    """
    robot = droid_robot.with_frames({"droid": version})

    rows = convert(robot, make_chunk(), "cartesian_position")

    ee_in_flange = Rotation.from_euler("ZX", [turn_deg, 180], degrees=True)
    state = read_state(robot, robot.example())
    positions, rotations = follow_actions(state, make_chunk())
    last_rows = rows[2::3]  # of the three rows of each action
    for row, position, rotation in zip(last_rows, positions, rotations, strict=True):
        flange_rotation = Rotation.from_euler("xyz", row[3:6])
        finger_tips = row[:3] + flange_rotation.apply([0, 0, tip_offset_m])
        np.testing.assert_allclose(finger_tips, position, atol=1e-5)
        assert compute_angle(flange_rotation * ee_in_flange, rotation) < 1e-5


@pytest.mark.parametrize("name", ["droid", "roboarena"])
def test_a_policy_of_the_first_frames_acts_with_frankas_own_hand(name: str) -> None:
    from spear.embodiments.inverse_kinematics import compute_ee_pose

    robot = embodiments.load(name).with_frames({"droid": 1})

    state = read_state(robot, robot.example())
    position, rotation = compute_ee_pose(robot.example()[droid.JOINTS_KEY])
    np.testing.assert_allclose(state[:3], position, atol=1e-6)
    assert compute_angle(to_rotation(state[3:7]), to_rotation(rotation)) < 1e-5


def test_a_policy_without_recorded_frames_acts_in_the_first_ones(droid_robot: Embodiment) -> None:
    assert droid_robot.with_frames(None).frame_version == 1


@pytest.mark.parametrize("frames", [{}, {"droid": 2}, {"bridge_dataset": 1}])
def test_other_policies_act_in_the_newest_frames(
    droid_robot: Embodiment, frames: dict[str, int]
) -> None:
    assert droid_robot.with_frames(frames) is droid_robot


def test_frames_that_are_not_known_are_refused(droid_robot: Embodiment) -> None:
    refuses("version 3 of the frames of droid", droid_robot.with_frames, {"droid": 3})


def test_a_robot_whose_frames_never_changed_serves_every_policy() -> None:
    robot = embodiments.load("widowx")

    assert robot.with_frames({"droid": 1}) is robot


def test_droid_and_its_dataset_have_the_same_tool() -> None:
    layout = REGISTRY["droid"]

    assert droid.Tool(layout.tool_offset, layout.tool_rotation) == droid.ROBOTIQ
    assert layout.frames == {droid.EMBODIMENT.frame: droid.EMBODIMENT.frame_version}


def test_the_elbow_stays_where_it_is_while_the_hand_hardly_moves(
    droid_robot: Embodiment,
) -> None:
    """The arm begins away from its comfortable posture, by 0.5 rad of the third joint."""
    observation = droid_robot.example()
    start = observation[droid.JOINTS_KEY] + np.array([0, 0, 0.5, 0, 0, 0, 0])
    observation[droid.JOINTS_KEY] = start
    chunk = make_still_chunk()
    chunk[:, 0] = 1e-4  # 0.1 mm per action

    control = droid_robot.controls["joint_position"]
    joints = control.convert(chunk, read_state(droid_robot, observation), observation)[:, :7]

    assert np.abs(joints - start).max() < 5e-3


CAMERA_SIZES = pytest.mark.parametrize(
    ("height", "width"), [(720, 1280), (376, 672), (480, 640), (1280, 720)]
)


def make_photo(height: int, width: int) -> Array:
    """An image [height, width, 3] of smooth random colors."""
    colors = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@CAMERA_SIZES
def test_the_model_sees_what_openpi_pads_as_the_camera_saw_it(
    nano: Spear1Policy, droid_robot: Embodiment, height: int, width: int
) -> None:
    """The model's input is the same for an image and for the image that openpi's client pads."""

    def prepare_pixels(image: Array) -> torch.Tensor:
        images = {droid.EXTERIOR_IMAGE_KEY: image, droid.WRIST_IMAGE_KEY: image}
        checked = droid_robot.read({**droid_robot.example(), **images})
        with suppress_notices():
            pixels = nano.prepare_inputs([checked])["pixel_values"]
        return torch.cat([pixels[view].flatten().float() for view in ("external", "wrist")])

    photo = make_photo(height, width)
    padded = fit_image(photo, 224, 224)

    difference = prepare_pixels(padded) - prepare_pixels(photo)
    assert difference.abs().mean() < 1.5  # levels; the padded image was resized twice


@CAMERA_SIZES
def test_only_bands_of_padding_are_cut_off(height: int, width: int) -> None:
    photo = make_photo(height, width)
    padded = fit_image(photo, 224, 224)
    not_quite_black = padded.copy()
    not_quite_black[5, 5] = 1
    not_quite_black[-6, -6] = 1
    other_images = [
        not_quite_black,
        np.zeros_like(padded),
        padded[:200],  # not square
        fit_image(photo, 256, 256),  # another size than openpi's
        np.roll(padded, 2, (0, 1)),  # bands of unequal sizes
    ]
    for image in other_images:
        assert crop_openpi_padding(image) is image


def test_what_openpi_pads_is_cut_off_for_robots_with_one_camera() -> None:
    robot = embodiments.load("widowx")
    padded = fit_image(make_photo(480, 640), 224, 224)

    checked = robot.read({**robot.example(), "observation/image": padded})

    assert checked["observation/image"].shape == (168, 224, 3)  # 4:3, as the camera's image


# Tests of datasets and of files.


@pytest.mark.parametrize(("name", "dataset"), [("droid", "droid"), ("widowx", "bridge_dataset")])
def test_a_robot_and_its_dataset_mean_the_same_pose(name: str, dataset: str) -> None:
    """The robot and the dataset use the same names, so the example is a step of an episode.

    A policy must get the robot's state in the frames in which it learned the dataset's states.
    """
    num_steps = 3
    robot = embodiments.load(name)
    layout = REGISTRY[dataset]
    example = robot.example()
    steps: dict[str, Any] = {}
    for key, value in example.items():
        if key != "prompt":
            steps[key] = np.stack([value] * num_steps)
    # Columns that only the dataset has.
    for column in layout.images.values():
        steps[column] = [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * num_steps
    steps["action"] = np.eye(num_steps, 7)
    steps["action_dict/gripper_position"] = np.eye(num_steps, 1)
    steps[layout.instruction] = [b"go"] * num_steps
    if layout.success:
        steps[layout.success] = [b"a/success/b.h5"] * num_steps

    episode = build_episode(steps, layout, dataset)

    state = read_state(robot, example)
    np.testing.assert_allclose(episode.position[0], state[:3], atol=1e-6)
    assert compute_angle(to_rotation(episode.rotation[0]), to_rotation(state[3:7])) < 1e-5
    assert episode.gripper[0] == state[7]


def test_a_robot_in_a_file_of_yours_is_loaded_and_checks_its_units() -> None:
    robot = embodiments.load(str(EXAMPLE_FILE))
    pose_in_degrees = np.array([450, 0, 200, 0, 180, 0.0])

    refuses("tcp", robot.read, {**robot.example(), "tcp": pose_in_degrees})


def test_the_commands_of_the_example_file_are_the_target_poses() -> None:
    """The example's robot takes positions in mm and rotation vectors in rad."""
    robot = embodiments.load(str(EXAMPLE_FILE))

    rows = convert(robot, make_chunk())

    positions, rotations = follow_actions(read_state(robot, robot.example()), make_chunk())
    np.testing.assert_allclose(rows[:, :3], 1000 * positions, atol=1e-2)
    for row, rotation in zip(rows, rotations, strict=True):
        assert compute_angle(Rotation.from_rotvec(row[3:6]), rotation) < 1e-5


def test_an_unknown_name_brings_a_suggestion() -> None:
    refuses("droid", embodiments.load, "droit")


@pytest.mark.parametrize(
    ("content", "words"),  # words of the message
    [(None, "mine.py"), ("", "EMBODIMENT"), ("1 / 0", "ZeroDivisionError")],
    ids=["missing", "empty", "broken"],
)
def test_a_file_without_a_robot_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)

    refuses(words, embodiments.load, str(path))


def test_the_command_line_knows_every_robot() -> None:
    """The command line has its own list, so that `--help` need not import the embodiments."""
    assert set(EMBODIMENTS) == set(NAMES)


@EVERY_NAME
def test_the_page_on_serving_lists_the_robot_with_its_controls(name: str) -> None:
    robot = embodiments.load(name)
    default_control = next(iter(robot.controls.values()))

    (row,) = re.findall(rf"^\| `{name}` .*", SERVE_PAGE.read_text("utf-8"), re.MULTILINE)

    _, _, _, controls, actions, _ = row.split("|")
    assert re.findall(r"`(\w+)`", controls) == list(robot.controls)
    assert actions.strip().endswith(f" at {default_control.rate_hz:g} Hz")
