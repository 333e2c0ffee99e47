"""Embodiments: understood examples, exact conversions, errors that name the key; one file each."""

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
from spear.errors import suppress_notices
from spear.policy import Spear1Policy
from spear.serve.options import EMBODIMENTS
from spear.types import Array
from spear.util.images import encode_jpeg, fit_image

EXAMPLE_FILE = Path(__file__).parents[2] / "examples" / "my_robot.py"
NAMES = embodiments.list_names()
LINK_IN_EE = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])  # of the WidowX's gripper link
EVERY_NAME = pytest.mark.parametrize("name", NAMES)


def to_rotation(quaternion: Array) -> Rotation:
    return Rotation.from_quat(np.asarray(quaternion, np.float64), scalar_first=True)


def angle_between(first: Rotation, second: Rotation) -> float:
    return float((first.inv() * second).magnitude())


def make_chunk(distance_m: float = 0.02, angle_rad: float = 0.1) -> Array:
    """Five actions that move and turn in every direction; the gripper closes at the third."""
    generator = torch.Generator().manual_seed(3)
    random = torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=-1)
    axes = random.numpy()[:, 1:]
    rotations = Rotation.from_rotvec(angle_rad * axes).as_quat(scalar_first=True)
    openings = [[1], [1], [0], [0], [0]]
    chunk = np.concatenate([distance_m * axes[::-1], rotations, openings], axis=1)
    return chunk.astype(np.float32)


def make_still_chunk() -> Array:
    return np.tile(np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32), (5, 1))


def follow_actions(state: Array, actions: Array) -> tuple[Array, list[Rotation]]:
    """Positions and orientations after each action, by the definition in `spear.types.Action`."""
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
    return robot.read(observation)["observation/state"]


def convert(robot: Embodiment, actions: Array, control: str | None = None) -> Array:
    """The rows of a control for actions from the state of the robot's example."""
    observation = robot.example()
    _, selected = robot.select_control(control)
    return selected.convert(actions, read_state(robot, observation), observation)


# Every embodiment


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


def wrong_images(image: Array) -> list[Any]:
    return [
        image[0],
        image.astype(np.float32),
        image[:, :0],
        image.transpose(2, 0, 1),
        None,
    ]


def wrong_numbers(numbers: Array) -> list[Any]:
    texts = numbers.astype(str)
    return [
        numbers[:-1],
        numbers * np.nan,
        numbers + 1e9,
        texts,
        ["x" * 2**20, *texts[1:]],  # texts, of which no array may be made
        [[1], [2, 3]],
        None,
    ]


WRONG_PROMPTS = ["", " ", "\u200b", "\x00", "…", "go\x00", "\ud800 go", 5, "x" * 2000, None]
WRONG_SEEDS = ["1", 0.5, True, None]
POSITION_KEYS = ("observation/state", "maniskill3/eef_pos", "states")


def prompt_key_of(robot: Embodiment) -> str:
    return "prompt" if "prompt" in robot.required else "task_description"


def wrong_values(name: str, robot: Embodiment) -> Iterator[tuple[str, Any]]:
    """Keys of an embodiment, with values that it must refuse."""
    yield from ((prompt_key_of(robot), prompt) for prompt in WRONG_PROMPTS)
    yield from (("seed", seed) for seed in WRONG_SEEDS)
    for key, value in robot.example().items():
        if not isinstance(value, np.ndarray):
            continue
        if value.ndim == 3:
            yield from ((key, image) for image in wrong_images(value))
            continue
        yield from ((key, numbers) for numbers in wrong_numbers(value))
        indices = np.arange(len(value))
        if key in POSITION_KEYS:
            yield key, value * np.where(indices < 3, 1000, 1)  # millimeters
        has_angles = key == droid.JOINTS_KEY or (name, key) == ("widowx", "observation/state")
        if has_angles:
            yield key, value * np.where(np.isin(indices, (3, 4, 5)), 57.3, 1)  # degrees


@EVERY_NAME
def test_an_error_names_the_key_of_a_wrong_value(name: str) -> None:
    robot = embodiments.load(name)
    for key, value in wrong_values(name, robot):
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
    key = prompt_key_of(robot)
    misspelled = key[:-1]

    refuses(f"'{misspelled}'.*'{key}'", robot.read, {**robot.example(), misspelled: "x"})


@EVERY_NAME
def test_what_a_robots_file_returns_is_checked_as_well(name: str) -> None:
    robot = embodiments.load(name)
    example = robot.example()
    wrong = {**robot.observe(example), "observation/state": np.ones(7)}
    broken_robot = dataclasses.replace(robot, observe=lambda _: wrong)

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

    refuses("a list", robot.read, [robot.example()])


# WidowX


def widowx_rotation(name: str) -> Rotation:
    """The orientation of the controller's end-effector frame in the example."""
    example = embodiments.load(name).example()
    if name == "widowx":
        return Rotation.from_euler("xyz", example["observation/state"][3:6])
    return to_rotation(example["maniskill3/eef_pos"][3:7])


WIDOWX_ROBOTS = pytest.mark.parametrize(
    ("name", "convention", "controller_frame", "closed_command"),
    [("widowx", "xyz", np.eye(3), 0), ("simpler_widowx", "XYZ", LINK_IN_EE, -1)],
)


@WIDOWX_ROBOTS
def test_a_widowx_controller_ends_where_the_actions_lead(
    name: str, convention: str, controller_frame: Array, closed_command: int
) -> None:
    """The controller moves and turns its target along base axes."""
    robot = embodiments.load(name)
    state = read_state(robot, robot.example())
    chunk = make_chunk(angle_rad=0.5)
    rotation = widowx_rotation(name)
    start_in_controller_frame = to_rotation(state[3:7]).as_matrix() @ controller_frame
    np.testing.assert_allclose(start_in_controller_frame, rotation.as_matrix(), atol=1e-6)

    rows = convert(robot, chunk)

    positions, rotations = follow_actions(state, chunk)
    np.testing.assert_allclose(state[:3] + np.cumsum(rows[:, :3], axis=0), positions, atol=1e-6)
    for row, expected in zip(rows, rotations, strict=True):
        rotation = Rotation.from_euler(convention, row[3:6]) * rotation
        expected_matrix = expected.as_matrix() @ controller_frame
        np.testing.assert_allclose(expected_matrix, rotation.as_matrix(), atol=1e-5)
    assert rows[:, 6].tolist() == [1, 1, closed_command, closed_command, closed_command]


def test_neither_simpler_robot_takes_the_others_observations() -> None:
    maniskill3 = embodiments.load("simpler_widowx")
    maniskill2 = embodiments.load("maniskill2_widowx")

    refuses("unknown observation key", maniskill3.read, maniskill2.example())
    refuses("unknown observation key", maniskill2.read, maniskill3.example())


def test_the_simpler_controllers_read_the_same_rotation_differently() -> None:
    """Their controllers have the same name, so the robot must say which one is meant."""
    chunk = make_chunk(angle_rad=0.5)

    rows3 = convert(embodiments.load("simpler_widowx"), chunk)
    rows2 = convert(embodiments.load("maniskill2_widowx"), chunk)

    np.testing.assert_array_equal(rows3[:, :3], rows2[:, :3])
    for row3, row2 in zip(rows3, rows2, strict=True):
        from_euler_angles = Rotation.from_euler("XYZ", row3[3:6])
        from_rotation_vector = Rotation.from_rotvec(row2[3:6])
        assert angle_between(from_euler_angles, from_rotation_vector) < 1e-5
    assert np.abs(rows3[:, 3:6] - rows2[:, 3:6]).max() > 0.02


def test_the_error_suggests_maniskill_3s_name_of_the_pose() -> None:
    robot = embodiments.load("simpler_widowx")
    observation = robot.example()
    observation["observation/eef_pos"] = observation["maniskill3/eef_pos"]

    refuses("'observation/eef_pos'.*maniskill3/eef_pos", robot.read, observation)


# DROID


@pytest.fixture
def droid_robot() -> Embodiment:
    pytest.importorskip("mujoco")
    return embodiments.load("droid")


def compute_robotiq_pose(joints: Array) -> tuple[Array, Array]:
    """The pose of DROID's gripper by forward kinematics."""
    from spear.embodiments.inverse_kinematics import compute_ee_pose

    return droid.ROBOTIQ.from_hand(*compute_ee_pose(joints))


def test_possible_joint_angles_bring_no_notice(droid_robot: Embodiment) -> None:
    with no_warning():
        droid_robot.read(droid_robot.example())


def test_droid_joint_positions_lead_where_the_actions_do(droid_robot: Embodiment) -> None:
    rows = convert(droid_robot, make_chunk(), "joint_position")

    assert rows.shape == (15, 8)
    state = read_state(droid_robot, droid_robot.example())
    positions, rotations = follow_actions(state, make_chunk())
    for row, position, rotation in zip(rows[2::3], positions, rotations, strict=True):
        reached_position, reached_rotation = compute_robotiq_pose(row[:7])
        assert np.linalg.norm(reached_position - position) < 1e-3
        assert angle_between(to_rotation(reached_rotation), rotation) < 5e-3


def test_droid_joint_velocities_lead_along_the_joint_positions(droid_robot: Embodiment) -> None:
    positions = convert(droid_robot, make_chunk(), "joint_position")

    velocities = convert(droid_robot, make_chunk(), "joint_velocity")

    start = droid_robot.example()[droid.JOINTS_KEY]
    followed = start + np.cumsum(velocities[:, :7] * 0.2, axis=0)
    np.testing.assert_allclose(followed, positions[:, :7], atol=1e-5)
    assert velocities[:, 7].tolist() == [0] * 6 + [1] * 9


def test_droid_joint_velocities_stay_within_their_unit(droid_robot: Embodiment) -> None:
    velocities = convert(droid_robot, make_chunk(distance_m=0.3), "joint_velocity")

    assert np.abs(velocities[:, :7]).max() <= 1


def test_droid_makes_up_for_an_action_that_was_too_fast(droid_robot: Embodiment) -> None:
    chunk = make_still_chunk()
    turn_rad = np.array([2**0.5, 2**0.5, 0])  # 2 rad that the arm can turn
    chunk[0, 3:7] = Rotation.from_rotvec(turn_rad).as_quat(scalar_first=True)

    velocities = convert(droid_robot, chunk, "joint_velocity")[:, :7]

    assert np.abs(velocities[3:6]).max() > 0.1
    start = droid_robot.example()[droid.JOINTS_KEY]
    position, rotation = compute_robotiq_pose(start + 0.2 * velocities.sum(axis=0))
    state = read_state(droid_robot, droid_robot.example())
    positions, rotations = follow_actions(state, chunk)
    assert np.linalg.norm(position - positions[-1]) < 1e-3
    assert angle_between(to_rotation(rotation), rotations[-1]) < 5e-3


def test_droid_joint_positions_stay_within_the_arms_speed_and_limits(
    droid_robot: Embodiment,
) -> None:
    from spear.embodiments.inverse_kinematics import (
        JOINT_LOWER_RAD,
        JOINT_UPPER_RAD,
        MAX_JOINT_SPEED_RAD_S,
    )

    joints = convert(droid_robot, make_chunk(distance_m=0.3), "joint_position")[:, :7]

    start = droid_robot.example()[droid.JOINTS_KEY]
    speeds = 15 * np.abs(np.diff(joints, axis=0, prepend=start[None]))
    assert (speeds / MAX_JOINT_SPEED_RAD_S).max() == pytest.approx(1, abs=1e-4)
    assert (joints > JOINT_LOWER_RAD).all()
    assert (joints < JOINT_UPPER_RAD).all()


@pytest.mark.parametrize(
    ("version", "turn_deg", "tip_offset_m"), [(1, -45, 0.1034), (2, 0, 0.1548)]
)
def test_droid_cartesian_positions_are_those_of_the_flange(
    droid_robot: Embodiment, version: int, turn_deg: float, tip_offset_m: float
) -> None:
    robot = droid_robot.with_frames({"droid": version})

    rows = convert(robot, make_chunk(), "cartesian_position")

    ee_in_flange = Rotation.from_euler("ZX", [turn_deg, 180], degrees=True)
    state = read_state(robot, robot.example())
    positions, rotations = follow_actions(state, make_chunk())
    for row, position, rotation in zip(rows[2::3], positions, rotations, strict=True):
        flange = Rotation.from_euler("xyz", row[3:6])
        finger_tips = row[:3] + flange.apply([0, 0, tip_offset_m])
        np.testing.assert_allclose(finger_tips, position, atol=1e-5)
        assert angle_between(flange * ee_in_flange, rotation) < 1e-5


@pytest.mark.parametrize("name", ["droid", "roboarena"])
def test_a_policy_of_the_first_frames_acts_with_frankas_own_hand(name: str) -> None:
    from spear.embodiments.inverse_kinematics import compute_ee_pose

    robot = embodiments.load(name).with_frames({"droid": 1})

    state = read_state(robot, robot.example())
    position, rotation = compute_ee_pose(robot.example()[droid.JOINTS_KEY])
    np.testing.assert_allclose(state[:3], position, atol=1e-6)
    assert angle_between(to_rotation(state[3:7]), to_rotation(rotation)) < 1e-5


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
    observation = droid_robot.example()
    observation[droid.JOINTS_KEY] = observation[droid.JOINTS_KEY] + np.eye(7)[2] / 2
    chunk = make_still_chunk()
    chunk[:, 0] = 1e-4

    control = droid_robot.controls["joint_position"]
    joints = control.convert(chunk, read_state(droid_robot, observation), observation)[:, :7]

    assert np.abs(joints - observation[droid.JOINTS_KEY]).max() < 5e-3


CAMERA_SIZES = pytest.mark.parametrize(
    ("height", "width"), [(720, 1280), (376, 672), (480, 640), (1280, 720)]
)


def make_photo(height: int, width: int) -> Array:
    colors = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    image = Image.fromarray(colors).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image)


@CAMERA_SIZES
def test_the_model_sees_what_openpi_pads_as_the_camera_saw_it(
    nano: Spear1Policy, droid_robot: Embodiment, height: int, width: int
) -> None:
    def prepare_pixels(image: Array) -> torch.Tensor:
        images = {droid.EXTERIOR_IMAGE_KEY: image, droid.WRIST_IMAGE_KEY: image}
        checked = droid_robot.read({**droid_robot.example(), **images})
        with suppress_notices():
            pixels = nano.prepare_inputs([checked])["pixel_values"]
        return torch.cat([pixels[view].flatten().float() for view in ("external", "wrist")])

    photo = make_photo(height, width)
    padded = fit_image(photo, 224, 224)

    assert (prepare_pixels(padded) - prepare_pixels(photo)).abs().mean() < 1.5


@CAMERA_SIZES
def test_bands_that_padding_does_not_make_are_left(height: int, width: int) -> None:
    photo = make_photo(height, width)
    padded = fit_image(photo, 224, 224)
    not_quite_black = padded.copy()
    not_quite_black[5, 5] = 1
    not_quite_black[-6, -6] = 1
    other_robots = [
        not_quite_black,
        np.zeros_like(padded),
        padded[:200],
        fit_image(photo, 256, 256),
        np.roll(padded, 2, (0, 1)),
    ]
    for image in other_robots:
        assert droid.remove_padding(image) is image


# Datasets and files


@pytest.mark.parametrize(("name", "dataset"), [("droid", "droid"), ("widowx", "bridge_dataset")])
def test_a_robot_and_its_dataset_mean_the_same_pose(name: str, dataset: str) -> None:
    """A policy gets a robot's state in the frame in which it learned the dataset's states."""
    num_steps = 3
    robot = embodiments.load(name)
    layout = REGISTRY[dataset]
    example = robot.example()
    steps: dict[str, Any] = {}
    for key, value in example.items():
        if key != "prompt":
            steps[key] = np.stack([value] * num_steps)
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
    assert angle_between(to_rotation(episode.rotation[0]), to_rotation(state[3:7])) < 1e-5
    assert episode.gripper[0] == state[7]


def test_a_robot_in_a_file_of_yours_is_loaded_and_checks_its_units() -> None:
    robot = embodiments.load(str(EXAMPLE_FILE))
    pose_in_degrees = np.array([450, 0, 200, 0, 180, 0.0])

    refuses("tcp", robot.read, {**robot.example(), "tcp": pose_in_degrees})


def test_the_commands_of_the_example_file_are_the_target_poses() -> None:
    robot = embodiments.load(str(EXAMPLE_FILE))

    rows = convert(robot, make_chunk())

    positions, rotations = follow_actions(read_state(robot, robot.example()), make_chunk())
    np.testing.assert_allclose(rows[:, :3], 1000 * positions, atol=1e-2)
    for row, rotation in zip(rows, rotations, strict=True):
        assert angle_between(Rotation.from_rotvec(row[3:6]), rotation) < 1e-5


def test_an_unknown_name_brings_a_suggestion() -> None:
    refuses("droid", embodiments.load, "droit")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "mine.py"), ("", "EMBODIMENT"), ("1 / 0", "ZeroDivisionError")],
    ids=["missing", "empty", "broken"],
)
def test_a_file_without_a_robot_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    if content is not None:
        path.write_text(content)

    refuses(words, embodiments.load, str(path))


def test_the_command_line_knows_every_robot() -> None:
    assert set(EMBODIMENTS) == set(NAMES)
