"""Robots: examples that are understood, exact conversions, errors that name the key; a file each."""

import dataclasses
import re
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
from spear.embodiments import droid
from spear.errors import suppress_notices
from spear.policy import Spear1Policy
from spear.types import Array
from spear.util.images import encode_jpeg, fit_image

EXAMPLE = Path(__file__).parents[2] / "examples" / "my_robot.py"
REFERENCE = np.array([[0, 0, 1], [0, 1, 0], [-1, 0, 0]])


def turn(quat: Array) -> Rotation:
    return Rotation.from_quat(np.asarray(quat, np.float64), scalar_first=True)


def chunk(size: float = 0.02, angle: float = 0.1) -> Array:
    """Five actions that move and turn in every direction; closes at the third."""
    generator = torch.Generator().manual_seed(3)
    axis = torch.nn.functional.normalize(torch.randn(5, 4, generator=generator), dim=-1).numpy()[
        :, 1:
    ]
    rotation = Rotation.from_rotvec(angle * axis).as_quat(scalar_first=True)
    return np.concatenate([size * axis[::-1], rotation, [[1], [1], [0], [0], [0]]], 1).astype(
        np.float32
    )


def walked(state: Array, actions: Array) -> tuple[Array, list[Rotation]]:
    """Positions and orientations after each action, by the definition in `spear.types.Action`."""
    positions, turns = [], []
    position, orientation = np.float64(state[:3]), turn(state[3:7])
    for action in actions:
        position, orientation = position + action[:3], orientation * turn(action[3:7])
        positions.append(position)
        turns.append(orientation)
    return np.array(positions), turns


@pytest.mark.parametrize("name", embodiments.list_names())
def test_the_example_is_understood_and_commands_have_rows(name: str) -> None:
    robot = embodiments.load(name)
    state = robot.read(robot.example())["observation/state"]
    assert state.shape == (8,) and state.dtype == np.float32
    assert np.linalg.norm(state[3:7]) == pytest.approx(1) and 0 <= state[7] <= 1
    for control in robot.controls.values():
        rows = control.convert(chunk(), state, robot.example())
        assert (
            rows.dtype == np.float32
            and np.isfinite(rows).all()
            and len(rows) == 5 * control.rate_hz / 5
        )


@pytest.mark.parametrize("name", embodiments.list_names())
def test_what_is_wrong_is_named(name: str) -> None:
    robot = embodiments.load(name)
    good = robot.example()
    words = next(key for key in robot.required if key in ("prompt", "task_description"))
    wordless = ["", " ", "\u200b", "\x00", "…", "go\x00", "\ud800 go"]
    wrong: dict[str, list[Any]] = {
        words: [*wordless, 5, "x" * 2000, None],
        "seed": ["1", 0.5, True, None],
    }
    for key, value in good.items():
        if isinstance(value, np.ndarray) and value.ndim == 3:
            wrong[key] = [
                value[0],
                value.astype(np.float32),
                value[:, :0],
                value.transpose(2, 0, 1),
                None,
            ]
        elif isinstance(value, np.ndarray):
            wrong[key] = [
                value[:-1],
                value * np.nan,
                value.astype(str),
                None,
                [[1], [2, 3]],
                value + 1e9,
            ]
            wrong[key].append(
                ["x" * 2**20, *value.astype(str)[1:]]
            )  # texts, of which no array is made
            if key in ("observation/state", "maniskill3/eef_pos", "states"):  # millimetres
                wrong[key].append(value * np.where(np.arange(len(value)) < 3, 1000, 1))
            if key == droid.JOINTS_KEY or (name, key) == ("widowx", "observation/state"):
                wrong[key].append(
                    value * np.where(np.isin(np.arange(len(value)), (3, 4, 5)), 57.3, 1)
                )
    for key, values in wrong.items():
        for value in values:
            refuses(re.escape(key), robot.read, {**good, key: value})
        if key in robot.required:
            refuses(key, robot.read, {k: v for k, v in good.items() if k != key})
    refuses(f"'{words[:-1]}'.*'{words}'", robot.read, {**good, words[:-1]: "x"})
    returned = {
        **robot.observe(good),
        "observation/state": np.ones(7),
    }  # by a robot's file: checked as well
    refuses("observation/state", dataclasses.replace(robot, observe=lambda _: returned).read, good)
    assert "seed" not in robot.read(good)
    assert robot.read({**good, "seed": np.int64(7)})["seed"] == 7 and "seed" in robot.optional
    refuses("a list", robot.read, [good])


@pytest.mark.parametrize(
    ("name", "convention", "frame", "closed"),
    [("widowx", "xyz", np.eye(3), 0), ("simpler_widowx", "XYZ", REFERENCE, -1)],
)
def test_widowx_controllers_turn_as_we_do(
    name: str, convention: str, frame: Array, closed: int
) -> None:
    """The target moves and turns along base axes; `frame`: the controller's end-effector frame in ours."""
    robot = embodiments.load(name)
    seen = robot.example()
    state = robot.read(seen)["observation/state"]
    if name == "widowx":
        orientation = Rotation.from_euler("xyz", seen["observation/state"][3:6])
    else:
        orientation = turn(seen["maniskill3/eef_pos"][3:7])
    np.testing.assert_allclose(
        turn(state[3:7]).as_matrix() @ frame, orientation.as_matrix(), atol=1e-6
    )
    rows = robot.select_control(None)[1].convert(chunk(angle=0.5), state, seen)
    positions, turns = walked(state, chunk(angle=0.5))
    np.testing.assert_allclose(state[:3] + np.cumsum(rows[:, :3], axis=0), positions, atol=1e-6)
    for row, facing in zip(rows, turns, strict=True):
        orientation = Rotation.from_euler(convention, row[3:6]) * orientation
        np.testing.assert_allclose(facing.as_matrix() @ frame, orientation.as_matrix(), atol=1e-5)
    assert rows[:, 6].tolist() == [1, 1, closed, closed, closed]


def test_neither_simpler_takes_the_others_observations() -> None:
    """Their controllers have one name and read the rotation differently: which is meant must be said."""
    three, two = embodiments.load("simpler_widowx"), embodiments.load("maniskill2_widowx")
    turned, rows = chunk(angle=0.5), []
    for robot, other in ((three, two), (two, three)):
        refuses("unknown observation key", robot.read, other.example())
        state = robot.read(robot.example())["observation/state"]
        rows.append(robot.select_control(None)[1].convert(turned, state, {}))
    np.testing.assert_array_equal(rows[0][:, :3], rows[1][:, :3])
    for a, b in zip(*rows, strict=True):
        assert (
            Rotation.from_euler("XYZ", a[3:6]).inv() * Rotation.from_rotvec(b[3:6])
        ).magnitude() < 1e-5
    assert np.abs(rows[0][:, 3:6] - rows[1][:, 3:6]).max() > 0.02
    pose = three.example().pop("maniskill3/eef_pos")  # under ManiSkill 2's name for it
    said = "'observation/eef_pos'.*maniskill3/eef_pos"
    refuses(said, three.read, {**three.example(), "observation/eef_pos": pose})


def test_droid_joints_and_the_flange_lead_where_the_actions_do() -> None:
    from spear.embodiments.inverse_kinematics import (
        JOINT_LOWER_RAD,
        JOINT_UPPER_RAD,
        MAX_JOINT_SPEED_RAD_S,
        compute_ee_pose,
    )

    robot = embodiments.load("droid")
    seen = robot.example()
    with no_warning():  # of joints where no Franka can have them
        state = robot.read(seen)["observation/state"]
    positions, turns = walked(state, chunk())
    joints = robot.controls["joint_position"].convert(chunk(), state, seen)
    assert joints.shape == (15, 8)
    for row, position, facing in zip(joints[2::3], positions, turns, strict=True):
        at, orientation = compute_ee_pose(row[:7])
        assert (
            np.linalg.norm(at - position) < 1e-3
            and (turn(orientation).inv() * facing).magnitude() < 5e-3
        )
    velocity = robot.controls["joint_velocity"].convert(chunk(), state, seen)
    followed = seen[droid.JOINTS_KEY] + np.cumsum(velocity[:, :7] * 0.2, axis=0)
    np.testing.assert_allclose(followed, joints[:, :7], atol=1e-5)
    assert velocity[:, 7].tolist() == [0] * 6 + [1] * 9
    assert (
        np.abs(robot.controls["joint_velocity"].convert(chunk(size=0.3), state, seen)[:, :7]).max()
        <= 1
    )
    turned = np.tile(np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32), (5, 1))
    turned[0, 3:7] = Rotation.from_euler("x", 2.0).as_quat(
        scalar_first=True
    )  # too fast for one action
    velocity = robot.controls["joint_velocity"].convert(turned, state, seen)[:, :7]
    assert np.abs(velocity[3:6]).max() > 0.1  # what is lost is made up for
    at, orientation = compute_ee_pose(seen[droid.JOINTS_KEY] + 0.2 * velocity.sum(axis=0))
    ends, facing = walked(state, turned)
    assert (
        np.linalg.norm(at - ends[-1]) < 1e-3
        and (turn(orientation).inv() * facing[-1]).magnitude() < 5e-3
    )
    hurried = robot.controls["joint_position"].convert(chunk(size=0.3), state, seen)[:, :7]
    speed = (
        np.abs(np.diff(hurried, axis=0, prepend=seen[droid.JOINTS_KEY][None]))
        * 15
        / MAX_JOINT_SPEED_RAD_S
    )
    assert speed.max() == pytest.approx(1, abs=1e-4)
    assert (hurried > JOINT_LOWER_RAD).all() and (hurried < JOINT_UPPER_RAD).all()
    rows = robot.controls["cartesian_position"].convert(chunk(), state, seen)
    hand_in_flange = Rotation.from_euler("ZX", [-45, 180], degrees=True)
    for row, position, facing in zip(rows[2::3], positions, turns, strict=True):
        flange = Rotation.from_euler("xyz", row[3:6])
        np.testing.assert_allclose(row[:3] + flange.apply([0, 0, 0.1034]), position, atol=1e-5)
        assert ((flange * hand_in_flange).inv() * facing).magnitude() < 1e-5


def test_the_elbow_stays_where_it_is_while_the_hand_hardly_moves() -> None:
    robot = embodiments.load("droid")
    seen = robot.example()
    seen[droid.JOINTS_KEY] = seen[droid.JOINTS_KEY] + np.eye(7)[2] / 2
    rows = np.tile(np.array([1e-4, 0, 0, 1, 0, 0, 0, 1], np.float32), (5, 1))
    joints = robot.controls["joint_position"].convert(
        rows, robot.read(seen)["observation/state"], seen
    )
    assert np.abs(joints[:, :7] - seen[droid.JOINTS_KEY]).max() < 5e-3


@pytest.mark.parametrize(("name", "dataset"), [("droid", "droid"), ("widowx", "bridge_dataset")])
def test_a_robot_and_its_dataset_mean_the_same_pose(name: str, dataset: str) -> None:
    """What a policy learned of a robot's state is what it is told of it, in the same frame."""
    robot, spec, rows = embodiments.load(name), REGISTRY[dataset], 3
    seen = robot.example()
    steps: dict[str, Any] = {
        key: np.stack([v] * rows) for key, v in seen.items() if key != "prompt"
    }
    steps |= {
        column: [encode_jpeg(np.zeros((8, 8, 3), np.uint8))] * rows
        for column in spec.images.values()
    }
    steps |= {"action": np.eye(rows, 7), "action_dict/gripper_position": np.eye(rows, 1)}
    steps[spec.instruction] = [b"go"] * rows
    steps |= {spec.success: [b"a/success/b.h5"] * rows} if spec.success else {}
    episode = build_episode(steps, spec, dataset)
    state = robot.read(seen)["observation/state"]
    np.testing.assert_allclose(episode.position[0], state[:3], atol=1e-6)
    assert (turn(episode.rotation[0]).inv() * turn(state[3:7])).magnitude() < 1e-5
    assert episode.gripper[0] == state[7]


@pytest.mark.parametrize("size", [(720, 1280), (376, 672), (480, 640), (1280, 720)])
def test_what_openpi_pads_is_seen_as_the_camera_saw_it(
    nano: Spear1Policy, size: tuple[int, int]
) -> None:
    colours = np.random.default_rng(0).integers(0, 256, (5, 8, 3), dtype=np.uint8)
    camera = np.asarray(Image.fromarray(colours).resize(size[::-1], Image.Resampling.BICUBIC))
    robot = embodiments.load("droid")

    def given(image: Array) -> torch.Tensor:
        seen = {**robot.example(), droid.EXTERIOR_IMAGE_KEY: image, droid.WRIST_IMAGE_KEY: image}
        with suppress_notices():
            pixels = nano.prepare_inputs([robot.read(seen)])["pixel_values"]
        return torch.cat([pixels[view].flatten().float() for view in ("external", "wrist")])

    padded = fit_image(camera, 224, 224)
    assert (given(padded) - given(camera)).abs().mean() < 1.5
    barely = padded.copy()
    barely[5, 5] = barely[-6, -6] = 1  # not what padding makes
    assert droid.remove_padding(barely) is barely
    moved = np.roll(padded, 2, (0, 1))
    for other in (np.zeros_like(padded), padded[:200], fit_image(camera, 256, 256), moved):
        assert droid.remove_padding(other) is other


def test_a_robot_is_one_file() -> None:
    robot = embodiments.load(str(EXAMPLE))
    refuses("tcp", robot.read, {**robot.example(), "tcp": np.array([450, 0, 200, 0, 180, 0.0])})
    state = robot.read(robot.example())["observation/state"]
    rows = robot.select_control(None)[1].convert(chunk(), state, robot.example())
    positions, turns = walked(state, chunk())
    np.testing.assert_allclose(rows[:, :3], 1000 * positions, atol=1e-2)
    for row, facing in zip(rows, turns, strict=True):
        assert (Rotation.from_rotvec(row[3:6]).inv() * facing).magnitude() < 1e-5


def test_an_unknown_robot_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "broken.py").write_text("1 / 0")
    for name, said in (
        ("droit", "droid"),
        (str(tmp_path / "none.py"), "none.py"),
        (str(tmp_path / "empty.py"), "EMBODIMENT"),
        (str(tmp_path / "broken.py"), "ZeroDivisionError"),
    ):
        refuses(said, embodiments.load, name)
