"""The plugin for LeRobot: what a dataset's numbers mean. Its check.py runs LeRobot itself."""

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

PLUGIN = Path(__file__).parents[2] / "plugins" / "lerobot_policy_spear"
MODULE = PLUGIN / "src" / "lerobot_policy_spear" / "robots.py"
SPEC = importlib.util.spec_from_file_location("lerobot_policy_spear_robots", MODULE)
assert SPEC is not None
assert SPEC.loader is not None
robots: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(robots)


def quats_to_rotations(quats: Array) -> Rotation:
    return Rotation.from_quat(quats, scalar_first=True)


def max_angle_between(first: Rotation, second: Rotation) -> float:
    return float((first.inv() * second).magnitude().max())


class TestPoseRobot:
    """End-effector poses at 30 Hz: 6 frames per action."""

    stride = 6
    current = np.array([0.3, 0.1, 0.2, 0.1, -0.5, 0.3, 80], np.float32)
    is_past_end = np.array([0, 0, 0, 0, 1, 1], bool)

    @pytest.fixture
    def robot(self) -> Any:
        return robots.choose_robot(robots.POSE_NAMES, robots.POSE_NAMES, self.stride, "", "")

    @pytest.fixture
    def commands(self) -> Array:
        rng = np.random.default_rng(0)
        positions = rng.normal(0.3, 0.05, (6, 3))
        rotation_vectors = rng.normal(0, 1, (6, 3))
        grippers = [100, 100, 40, 0, -2, 50]
        return np.column_stack([positions, rotation_vectors, grippers]).astype(np.float32)

    @pytest.fixture
    def path(self, commands: Array) -> Array:
        """The current pose and the commands to which the five actions lead."""
        return np.vstack([self.current, commands[:5]])

    def test_a_state_has_the_position_and_the_opening(self, robot: Any) -> None:
        state = robot.to_state(self.current)
        np.testing.assert_allclose(state[[0, 1, 2, 7]], [0.3, 0.1, 0.2, 0.8], atol=1e-6)

    def test_actions_lead_from_command_to_command(
        self, robot: Any, commands: Array, path: Array
    ) -> None:
        state = robot.to_state(self.current)
        actions, action_mask = robot.to_actions(state, commands, self.is_past_end)

        assert action_mask.tolist() == [True, True, True, True, False]
        np.testing.assert_allclose(actions[:, 7], [1, 1, 0.4, 0, 0], atol=1e-6)
        np.testing.assert_allclose(actions[:, :3], np.diff(path[:, :3], axis=0), atol=1e-6)
        rotations = Rotation.from_rotvec(path[:, 3:6])
        expected = rotations[:-1].inv() * rotations[1:]
        assert max_angle_between(quats_to_rotations(actions[:, 3:7]), expected) < 1e-5

    def test_actions_lead_back_to_the_commands(
        self, robot: Any, commands: Array, path: Array
    ) -> None:
        state = robot.to_state(self.current)
        actions, _ = robot.to_actions(state, commands, self.is_past_end)

        back = robot.to_commands(actions, self.current)

        assert back.shape == (30, 7)
        ends = back[5 :: self.stride]
        np.testing.assert_allclose(ends[:, :3], commands[:5, :3], atol=1e-5)
        halfway = (self.current[:3] + commands[0, :3]) / 2
        np.testing.assert_allclose(back[2, :3], halfway, atol=1e-5)
        expected = Rotation.from_rotvec(path[1:, 3:6])
        assert max_angle_between(Rotation.from_rotvec(ends[:, 3:6]), expected) < 1e-4

    def test_joint_angles_are_refused(self, robot: Any) -> None:
        joint_angles_deg = np.float32([0, -30, 60, 0, 30, 0, 50])
        refuses(robots.POSE_NAMES[3], robot.to_state, joint_angles_deg)


class TestLaggingArm:
    """An arm at 30 Hz that follows its commands with a time constant of `lag_s`."""

    distance_per_frame_m = 0.002
    num_chunks = 60

    def demonstrated_actions(self, follow_fraction: float) -> Array:
        """As in a dataset of this arm, the first action leads from where the arm is."""
        step_m = self.distance_per_frame_m
        actions = np.tile(np.float32([6 * step_m, 0, 0, 1, 0, 0, 0, 1]), (5, 1))
        actions[0, 0] = 5 * step_m + step_m / follow_fraction
        return actions

    @pytest.mark.parametrize("lag_s", [0.05, 0.1, 0.4])
    def test_moves_as_fast_as_demonstrated(self, lag_s: float) -> None:
        robot = robots.PoseRobot(6)
        follow_fraction = 1 - np.exp(-1 / 30 / lag_s)  # of the remaining distance, per frame
        actions = self.demonstrated_actions(follow_fraction)
        measured = np.float32([0, 0, 0, 0, 0, 0, 100])
        commands: list[Array] = []
        positions = []

        for _ in range(self.num_chunks):
            positions.append(measured[0])
            last = commands[-1] if commands else None
            for command in robot.to_commands(actions, measured, last)[:6]:
                commands.append(command)
                measured[0] += (command[0] - measured[0]) * follow_fraction

        demonstrated_m = 30 * 6 * self.distance_per_frame_m
        assert (positions[-1] - positions[-31]) / demonstrated_m == pytest.approx(1, abs=0.02)
        never_goes_back = np.diff(commands, axis=0)[:, 0].min() > 0
        assert never_goes_back

    def test_that_is_pushed_away_moves_no_further_than_its_action(self) -> None:
        robot = robots.PoseRobot(6)
        actions = self.demonstrated_actions(0.3)
        measured = np.float32([0.5, 0, 0, 0, 0, 0, 100])
        last_command = measured + 1

        moved = robot.to_commands(actions, measured, last_command)[0] - measured

        assert np.linalg.norm(moved[:3]) < actions[0, 0] + 1e-6
        assert np.abs(moved[3:6]).max() < 1e-6


class GantryKinematics:
    """Joints 0 to 2 slide along x, y, z (1 m per degree) as far as 1 m; joint 3 turns about z."""

    def forward_kinematics(self, angles_deg: Array) -> Array:
        pose = np.eye(4)
        pose[:3, 3] = np.clip(angles_deg[:3], -1, 1)
        pose[:3, :3] = Rotation.from_euler("z", angles_deg[3], degrees=True).as_matrix()
        return pose

    def inverse_kinematics(self, angles_deg: Array, pose: Array) -> Array:
        z_angle_deg = Rotation.from_matrix(pose[:3, :3]).as_euler("zyx", degrees=True)[0]
        return np.array([*pose[:3, 3], z_angle_deg])


class TestJointRobot:
    current = np.array([0.1, 0.2, 0.3, 30, 100], np.float32)

    @pytest.fixture
    def robot(self) -> Any:
        return robots.JointRobot(2, GantryKinematics(), 4)

    @pytest.fixture
    def commands(self) -> Array:
        steps = np.arange(1, 7)[:, None]
        return self.current + steps * np.float32([0.01, 0, 0, 5, -20])

    @pytest.fixture
    def actions(self, robot: Any, commands: Array) -> Array:
        state = robot.to_state(self.current)
        actions, action_mask = robot.to_actions(state, commands, np.zeros(6, bool))
        assert action_mask.all()
        return actions

    def test_a_state_is_the_arms_pose(self, robot: Any) -> None:
        rotation = Rotation.from_euler("z", 30, degrees=True).as_quat(scalar_first=True)
        expected = [0.1, 0.2, 0.3, *rotation, 1]
        np.testing.assert_allclose(robot.to_state(self.current), expected, atol=1e-6)

    def test_actions_lead_back_to_the_joint_angles(
        self, robot: Any, commands: Array, actions: Array
    ) -> None:
        back = robot.to_commands(actions, self.current)
        np.testing.assert_allclose(back[1::2, :4], commands[:5, :4], atol=1e-4)

    def test_stays_where_no_joint_angles_lead_and_says_so_once(
        self, robot: Any, actions: Array
    ) -> None:
        too_far = actions.copy()
        too_far[2:, 0] = 0.6  # from the third action on beyond the reach of 1 m

        with pytest.warns(UserWarning, match="no joint angles") as notices:
            commands = robot.to_commands(too_far, self.current)
            next_commands = robot.to_commands(too_far[2:] * 3, self.current, commands[5])

        assert len(notices) == 1
        assert (commands[:4, 0] < 0.13).all()
        assert commands[-1, 0] <= 1
        stays = np.vstack([commands[6:], next_commands]) == commands[5]
        assert stays.all()


@pytest.mark.parametrize(
    ("kind", "scale", "num_notices"),
    [("joints", 1, 0), ("exported", 1 / 99, 0), ("joints", 1 / 99, 2), ("joints", 10 / 9, 1)],
)
def test_unlikely_units_are_noticed(
    recwarn: pytest.WarningsRecorder, kind: str, scale: float, num_notices: int
) -> None:
    """Radians, an opening from 0 to 1, and joints from -100 to 100."""
    robot = robots.ExportedRobot()
    if kind == "joints":
        robot = robots.JointRobot(2, GantryKinematics(), 4)
    frames = np.linspace(0, 1, 5)[:, None] * [[30, -60, 90, 5, 100]]

    robots.notice_unlikely_units(robot, frames * scale)

    assert len(recwarn) == num_notices


class FakeClock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


class TestCommandPacer:
    fps = 5

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        clock = FakeClock()
        monkeypatch.setattr(robots, "time", clock)
        return clock

    @pytest.mark.parametrize(
        ("asked_per_s", "given_per_s", "is_noticed"), [(30, 5, True), (5, 5, False), (3, 3, False)]
    )
    def test_hands_out_commands_no_faster_than_they_are_to_be_executed(
        self,
        clock: FakeClock,
        recwarn: pytest.WarningsRecorder,
        asked_per_s: float,
        given_per_s: float,
        is_noticed: bool,
    ) -> None:
        pacer = robots.CommandPacer(self.fps)
        num_commands = 100
        delays_s = np.random.default_rng(0).uniform(0, 0.08, num_commands + 1)  # an uneven loop
        start_s = clock.now_s

        for previous_delay_s, delay_s in itertools.pairwise(delays_s):
            asked_s = clock.now_s
            pacer.wait_until_due()
            next_s = asked_s + 1 / asked_per_s + delay_s - previous_delay_s
            clock.now_s = max(clock.now_s, next_s)

        duration_s = clock.now_s - start_s
        assert num_commands / duration_s == pytest.approx(given_per_s, rel=0.02)
        assert (len(recwarn) > 0) is is_noticed

    def test_forgets_commands_that_waited_through_a_pause(self, clock: FakeClock) -> None:
        pacer = robots.CommandPacer(self.fps)
        last_commands = []

        def predict(last: int | None) -> list[int]:
            last_commands.append(last)
            chunk_number = len(last_commands)
            return [chunk_number * 10, chunk_number * 10 + 1]

        for pause_s in (0, 0.2, 0.9, 1.1, 0.2):
            clock.now_s += pause_s
            pacer.next_command(predict)

        # Two chunks run out one after the other. The third one follows the pause of 1.1 s.
        assert last_commands == [None, 11, None]


class TestExportedRobot:
    def test_actions_stay_as_they_are(self) -> None:
        robot = robots.choose_robot(STATE_NAMES, ACTION_NAMES, 1, "", "")
        commands = np.arange(48, dtype=np.float32).reshape(6, 8)
        is_past_end = np.arange(6) == 5

        actions, action_mask = robot.to_actions(commands[0], commands, is_past_end)

        np.testing.assert_array_equal(robot.to_commands(actions, commands[0]), commands[:5])
        assert action_mask.tolist() == [True, True, True, True, False]

    def test_of_another_rate_is_refused(self) -> None:
        refuses("fps", robots.choose_robot, STATE_NAMES, ACTION_NAMES, 6, "", "")


def test_no_action_after_a_disturbance_is_a_demonstration() -> None:
    is_demonstrated = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1], bool)
    index = np.array([0, 3, 4, 8])

    mask = robots.find_demonstrated_actions(is_demonstrated, index)

    num_actions = np.array([3, 0, 5, 5])
    np.testing.assert_array_equal(mask, np.arange(5) < num_actions[:, None])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["shoulder.pos", "gripper.pos"], "urdf"),
        (["left_gripper.pos", "right_gripper.pos"], "action"),
        ([], "action"),
        (["x", "y"], "action"),
    ],
)
def test_numbers_that_are_no_pose_are_refused(names: list[str], message: str) -> None:
    refuses(message, robots.choose_robot, names, names, 1, "", "")


class TestDemonstratedFrames:
    """Of three episodes, the second one failed."""

    @pytest.fixture
    def episodes(self) -> list[Any]:
        return [add_actions(make_episode(i, success=s)) for i, s in enumerate((True, False, None))]

    @pytest.fixture
    def dataset_meta(self, episodes: list[Any], tmp_path: Path) -> SimpleNamespace:
        root = tmp_path / "exported"
        write_lerobot(iter(episodes), root, "image")
        info = json.loads((root / "meta" / "info.json").read_text())
        return SimpleNamespace(root=root, total_frames=18, features=info["features"])

    def test_leave_out_failed_episodes_and_masked_frames(
        self, episodes: list[Any], dataset_meta: SimpleNamespace
    ) -> None:
        expected = np.concatenate([np.asarray(episode.action_mask) for episode in episodes])
        expected[6:12] = False

        frames = robots.find_demonstrated_frames(dataset_meta, robots.ExportedRobot())

        np.testing.assert_array_equal(frames, expected)

    def test_are_all_frames_of_a_foreign_dataset(self, dataset_meta: SimpleNamespace) -> None:
        """There, columns of these names may mean something else."""
        assert robots.find_demonstrated_frames(dataset_meta, robots.PoseRobot(1)).all()
