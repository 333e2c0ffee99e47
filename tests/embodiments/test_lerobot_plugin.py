"""The plugin for LeRobot: what a dataset's numbers mean, against scipy. Its check.py runs LeRobot itself."""

import importlib.util
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import make_episode
from refusals import refuses
from spear.data.actions import add_actions
from spear.data.store.lerobot_write import ACTION_NAMES, STATE_NAMES, write_lerobot
from spear.types import Array

FOLDER = (
    Path(__file__).parents[2] / "plugins" / "lerobot_policy_spear" / "src" / "lerobot_policy_spear"
)
SPEC = importlib.util.spec_from_file_location("lerobot_policy_spear_robots", FOLDER / "robots.py")
assert SPEC is not None and SPEC.loader is not None
robots: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(robots)


class Gantry:
    """Joints 0 … 2 slide along x, y, z (m per degree), 3 turns about z; reaches 1 m. One step solves it."""

    def forward_kinematics(self, angles: Array) -> Array:
        at = np.eye(4)
        at[:3, 3] = np.clip(angles[:3], -1, 1)
        at[:3, :3] = Rotation.from_euler("z", angles[3], degrees=True).as_matrix()
        return at

    def inverse_kinematics(self, angles: Array, at: Array) -> Array:
        return np.array(
            [*at[:3, 3], Rotation.from_matrix(at[:3, :3]).as_euler("zyx", degrees=True)[0]]
        )


def test_poses_become_actions_and_lead_back() -> None:
    rng = np.random.default_rng(0)
    robot = robots.choose(robots.POSE_NAMES, robots.POSE_NAMES, 6, "", "")
    commands = np.concatenate([rng.normal(0.3, 0.05, (6, 3)), rng.normal(0, 1, (6, 3))], axis=1)
    commands = np.column_stack([commands, [100, 100, 40, 0, -2, 50]]).astype(np.float32)
    here = np.array([0.3, 0.1, 0.2, 0.1, -0.5, 0.3, 80], np.float32)
    state = robot.state(here)
    np.testing.assert_allclose(state[[0, 1, 2, 7]], [0.3, 0.1, 0.2, 0.8], atol=1e-6)
    actions, known = robot.chunk(state, commands, np.array([0, 0, 0, 0, 1, 1], bool))
    assert known.tolist() == [True] * 4 + [False]
    np.testing.assert_allclose(actions[:, 7], [1, 1, 0.4, 0, 0], atol=1e-6)
    path = np.vstack([here, commands[:5]])
    facing = Rotation.from_rotvec(path[:, 3:6])
    turns = facing[:-1].inv() * facing[1:]
    np.testing.assert_allclose(actions[:, :3], np.diff(path[:, :3], axis=0), atol=1e-6)
    assert (
        Rotation.from_quat(actions[:, 3:7], scalar_first=True).inv() * turns
    ).magnitude().max() < 1e-5
    rows = robot.rows(actions, here)
    assert rows.shape == (30, 7)
    np.testing.assert_allclose(rows[5::6, :3], commands[:5, :3], atol=1e-5)
    np.testing.assert_allclose(rows[2, :3], (here[:3] + commands[0, :3]) / 2, atol=1e-5)
    assert (Rotation.from_rotvec(rows[5::6, 3:6]).inv() * facing[1:]).magnitude().max() < 1e-4
    refuses(
        robots.POSE_NAMES[3], robot.state, np.float32([0, -30, 60, 0, 30, 0, 50])
    )  # degrees of joints


@pytest.mark.parametrize("lag", [0.05, 0.1, 0.4])
def test_an_arm_that_lags_behind_goes_as_fast_as_it_was_shown(lag: float) -> None:
    robot, here, sent, went = robots.Poses(6), np.float32([0, 0, 0, 0, 0, 0, 100]), [None], []
    follows, step = 1 - np.exp(-1 / 30 / lag), 0.002  # of the way, in a frame; m
    actions = np.tile(np.float32([6 * step, 0, 0, 1, 0, 0, 0, 1]), (5, 1))
    actions[0, 0] = 5 * step + step / follows  # from where the arm is, as in `chunk`
    for _ in range(60):
        went.append(here[0])
        for row in robot.rows(actions, here, sent[-1])[:6]:
            sent.append(row)
            here[0] += (row[0] - here[0]) * follows
    assert (went[-1] - went[-31]) / (180 * step) == pytest.approx(1, abs=0.02)
    assert np.diff(sent[1:], axis=0)[:, 0].min() > 0
    pushed = robot.rows(actions, here, sent[-1] + 1)[0] - here
    assert np.linalg.norm(pushed[:3]) < actions[0, 0] + 1e-6 and np.abs(pushed[3:6]).max() < 1e-6


def test_joints_go_through_the_arms_kinematics_and_stay_where_none_leads() -> None:
    robot = robots.Joints(2, Gantry(), 4)
    here = np.array([0.1, 0.2, 0.3, 30, 100], np.float32)
    facing = Rotation.from_euler("z", 30, degrees=True).as_quat(scalar_first=True)
    np.testing.assert_allclose(robot.state(here), [0.1, 0.2, 0.3, *facing, 1], atol=1e-6)
    commands = here + np.arange(1, 7)[:, None] * np.float32([0.01, 0, 0, 5, -20])
    actions, known = robot.chunk(robot.state(here), commands, np.zeros(6, bool))
    assert known.all()
    rows = robot.rows(actions, here)
    np.testing.assert_allclose(rows[1::2, :4], commands[:5, :4], atol=1e-4)
    far = actions.copy()
    far[2:, 0] = 0.6  # beyond a metre from the third on
    with pytest.warns(UserWarning, match="no joint angles") as said:
        rows = robot.rows(far, here)
        held = robot.rows(far[2:] * 3, here, rows[5])
    assert (rows[:4, 0] < 0.13).all() and rows[-1, 0] <= 1 and len(said) == 1
    assert (np.vstack([rows[6:], held]) == rows[5]).all()


def test_units_that_are_hardly_right_are_said(recwarn: pytest.WarningsRecorder) -> None:
    arm, frames = (
        robots.Joints(2, Gantry(), 4),
        np.linspace(0, 1, 5)[:, None] * [[30, -60, 90, 5, 100]],
    )
    others = (robots.Exported(), frames / 99, 0), (arm, frames / 99, 2), (arm, frames * 10 / 9, 3)
    for robot, values, said in ((arm, frames, 0), *others):
        robots.doubt_units(robot, values)
        assert len(recwarn) == said


@pytest.mark.parametrize(("asks", "takes"), [(30, 5), (5, 5), (3, 3)])
def test_rows_for_a_robot_come_no_faster_than_they_are_made_for(
    asks: float, takes: float, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    pace, now, rng = robots.Pace(5), [100.0], np.random.default_rng(0)
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: now.append(now.pop() + s))
    monkeypatch.setattr(robots, "time", clock)
    for before, late in itertools.pairwise(
        rng.uniform(0, 0.08, 101)
    ):  # s: a loop is not quite even
        begun = now[0]
        pace.wait()
        now[0] = max(now[0], begun + 1 / asks + late - before)
    assert 100 / (now[0] - 100) == pytest.approx(takes, rel=0.02) and bool(len(recwarn)) is (
        asks == 30
    )


def test_rows_that_waited_through_a_pause_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    pace, now, lasts = robots.Pace(5), [100.0], []
    monkeypatch.setattr(
        robots, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda s: None)
    )
    for after in (0, 0.2, 0.9, 1.1, 0.2):  # s
        now[0] += after
        pace.row(lambda last: lasts.append(last) or [len(lasts) * 10, len(lasts) * 10 + 1])
    assert lasts == [None, 11, None]


def test_exported_data_stay_and_what_is_no_pose_is_refused() -> None:
    robot = robots.choose(STATE_NAMES, ACTION_NAMES, 1, "", "")
    actions = np.arange(48, dtype=np.float32).reshape(6, 8)
    found, known = robot.chunk(actions[0], actions, np.arange(6) == 5)
    np.testing.assert_array_equal(robot.rows(found, actions[0]), actions[:5])
    assert known.tolist() == [True] * 4 + [False]
    mask = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1], bool)  # a push is no demonstration
    counted = robots.demonstrated(mask, np.array([0, 3, 4, 8]))
    np.testing.assert_array_equal(counted, np.arange(5) < np.array([3, 0, 5, 5])[:, None])
    two, one = ["left_gripper.pos", "right_gripper.pos"], ["shoulder.pos", "gripper.pos"]
    for names, said in ((one, "urdf"), (two, "action"), ([], "action"), (["x", "y"], "action")):
        refuses(said, robots.choose, names, names, 1, "", "")
    refuses("fps", robots.choose, STATE_NAMES, ACTION_NAMES, 6, "", "")


def test_frames_of_episodes_that_failed_do_not_count(tmp_path: Path) -> None:
    """As in `spear train`; but columns of these names in others' datasets mean what they mean there."""
    episodes = [
        add_actions(make_episode(i, success=success))
        for i, success in enumerate((True, False, None))
    ]
    write_lerobot(iter(episodes), tmp_path / "exported", "image")
    info = json.loads((tmp_path / "exported" / "meta" / "info.json").read_text())
    meta = SimpleNamespace(root=tmp_path / "exported", total_frames=18, features=info["features"])
    known = np.concatenate([np.asarray(episode.action_mask) for episode in episodes])
    known[6:12] = False
    np.testing.assert_array_equal(robots.counting(meta, robots.Exported()), known)
    assert robots.counting(meta, robots.Poses(1)).all()
