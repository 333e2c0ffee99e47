"""The plugin for LeRobot converts the numbers of datasets and robots to states and actions, and
back.

These tests need no LeRobot, because they load only the plugin's file robots.py. The plugin's
check.py runs LeRobot itself.

LeRobot calls a step a frame. A robot's class converts one kind of numbers: end-effector poses
(`PoseRobot`), joint angles (`JointRobot`) or our own exports (`ExportedRobot`). An action of ours
takes 0.2 s, which is `stride` frames.
"""

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
from spear.data.actions import with_canonical_actions
from spear.data.store.lerobot_write import ACTION_NAMES, STATE_NAMES, write_lerobot
from spear.types import Array

PLUGIN = Path(__file__).parents[2] / "plugins" / "lerobot_policy_spear"
MODULE = PLUGIN / "src" / "lerobot_policy_spear" / "robots.py"
SPEC = importlib.util.spec_from_file_location("lerobot_policy_spear_robots", MODULE)
assert SPEC is not None
assert SPEC.loader is not None
robots: Any = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(robots)


def choose_robot_without_urdf(state_names: list[str], action_names: list[str], stride: int) -> Any:
    """Choose a robot by its names alone: the user gives neither a URDF nor its tip."""
    return robots.choose_robot(state_names, action_names, stride, urdf="", tip="")


def quats_to_rotations(quats: Array) -> Rotation:
    return Rotation.from_quat(quats, scalar_first=True)


def compute_max_angle(first: Rotation, second: Rotation) -> float:
    """Compute the largest angle (rad) between rotations of the same index."""
    return float((first.inv() * second).magnitude().max())


class TestPoseRobot:
    """A robot at 30 Hz whose numbers are end-effector poses.

    A pose has 7 numbers: x, y, z (m), a rotation vector (rad) and the gripper (100 is open).
    """

    stride = 6  # frames per action
    current = np.array([0.3, 0.1, 0.2, 0.1, -0.5, 0.3, 80], np.float32)  # measured
    is_past_end = np.array([0, 0, 0, 0, 1, 1], bool)  # of the six commands

    @pytest.fixture
    def robot(self) -> Any:
        return choose_robot_without_urdf(robots.POSE_NAMES, robots.POSE_NAMES, self.stride)

    @pytest.fixture
    def commands(self) -> Array:
        """Six commanded poses, 0.2 s apart, [6, 7]."""
        rng = np.random.default_rng(0)
        positions = rng.normal(0.3, 0.05, (6, 3))
        rotation_vectors = rng.normal(0, 1, (6, 3))
        grippers = [100, 100, 40, 0, -2, 50]
        return np.column_stack([positions, rotation_vectors, grippers]).astype(np.float32)

    @pytest.fixture
    def path(self, commands: Array) -> Array:
        """The current pose, and the commands to which the five actions lead, [6, 7]."""
        return np.vstack([self.current, commands[:5]])

    def test_a_state_has_the_position_and_the_opening(self, robot: Any) -> None:
        state = robot.to_state(self.current)
        position_and_opening = state[[0, 1, 2, 7]]
        np.testing.assert_allclose(position_and_opening, [0.3, 0.1, 0.2, 0.8], atol=1e-6)

    def test_actions_lead_from_command_to_command(
        self, robot: Any, commands: Array, path: Array
    ) -> None:
        state = robot.to_state(self.current)
        actions, action_mask = robot.to_actions(state, commands, self.is_past_end)

        assert action_mask.tolist() == [True, True, True, True, False]  # until the episode's end
        openings = actions[:, 7]
        np.testing.assert_allclose(openings, [1, 1, 0.4, 0, 0], atol=1e-6)  # clipped to 0 … 1
        expected_translations = np.diff(path[:, :3], axis=0)
        np.testing.assert_allclose(actions[:, :3], expected_translations, atol=1e-6)
        rotations = Rotation.from_rotvec(path[:, 3:6])
        expected = rotations[:-1].inv() * rotations[1:]
        assert compute_max_angle(quats_to_rotations(actions[:, 3:7]), expected) < 1e-5

    def test_actions_lead_back_to_the_commands(
        self, robot: Any, commands: Array, path: Array
    ) -> None:
        state = robot.to_state(self.current)
        actions, _ = robot.to_actions(state, commands, self.is_past_end)

        frames = robot.to_commands(actions, self.current)

        assert frames.shape == (30, 7)  # 5 actions of 6 frames
        last_frames = frames[5 :: self.stride]  # the last frame of each action
        np.testing.assert_allclose(last_frames[:, :3], commands[:5, :3], atol=1e-5)
        halfway = (self.current[:3] + commands[0, :3]) / 2
        third_frame = frames[2]  # of the six of the first action
        np.testing.assert_allclose(third_frame[:3], halfway, atol=1e-5)
        expected = Rotation.from_rotvec(path[1:, 3:6])
        assert compute_max_angle(Rotation.from_rotvec(last_frames[:, 3:6]), expected) < 1e-4

    def test_joint_angles_are_refused(self, robot: Any) -> None:
        """A rotation vector of 30 rad is more than a turn. The error names its first component."""
        joint_angles_deg = np.float32([0, -30, 60, 0, 30, 0, 50])
        refuses(robots.POSE_NAMES[3], robot.to_state, joint_angles_deg)


class TestLaggingArm:
    """An arm at 30 Hz that follows its commands with a time constant of `lag_s`.

    In the demonstrations it moved along x at a constant speed, with its commands ahead of it.
    """

    distance_per_frame_m = 0.002
    num_chunks = 60

    def make_demonstrated_actions(self, follow_fraction: float) -> Array:
        """Make the five actions [5, 8] that a policy learns from these demonstrations.

        The first action leads from where the arm is to a command, so it also covers the distance by
        which commands were ahead. The other actions lead from command to command.

        Args:
            follow_fraction: the fraction of the distance to its command that the arm moves in one
                frame.
        """
        step_m = self.distance_per_frame_m
        actions = np.tile(np.float32([6 * step_m, 0, 0, 1, 0, 0, 0, 1]), (5, 1))
        actions[0, 0] = 5 * step_m + step_m / follow_fraction
        return actions

    @pytest.mark.parametrize("lag_s", [0.05, 0.1, 0.4])
    def test_moves_as_fast_as_demonstrated(self, lag_s: float) -> None:
        """The arm executes the first action (6 frames) of each of 60 chunks."""
        robot = robots.PoseRobot(stride=6)
        follow_fraction = 1 - np.exp(-1 / 30 / lag_s)
        actions = self.make_demonstrated_actions(follow_fraction)
        measured = np.float32([0, 0, 0, 0, 0, 0, 100])
        commands: list[Array] = []
        x_before_chunks = []  # m, where the arm is when it gets each chunk

        for _ in range(self.num_chunks):
            x_before_chunks.append(measured[0])
            last_command = commands[-1] if commands else None
            for command in robot.to_commands(actions, measured, last_command)[:6]:
                commands.append(command)
                distance_m = command[0] - measured[0]
                measured[0] += distance_m * follow_fraction

        distance_of_last_30_chunks_m = x_before_chunks[-1] - x_before_chunks[-31]
        demonstrated_m = 30 * 6 * self.distance_per_frame_m
        assert distance_of_last_30_chunks_m / demonstrated_m == pytest.approx(1, abs=0.02)
        smallest_command_step_m = np.diff(commands, axis=0)[:, 0].min()
        assert smallest_command_step_m > 0  # no command goes back

    def test_that_is_pushed_away_moves_no_further_than_its_action(self) -> None:
        """The last command is 1 m and 1 rad away from where the arm was pushed to."""
        robot = robots.PoseRobot(stride=6)
        actions = self.make_demonstrated_actions(follow_fraction=0.3)
        # x, y, z (m), rotation vector (rad) and gripper (100 is open)
        measured = np.float32([0.5, 0, 0, 0, 0, 0, 100])
        last_command = measured + 1

        first_frame = robot.to_commands(actions, measured, last_command)[0]

        change = first_frame - measured
        assert np.linalg.norm(change[:3]) < actions[0, 0] + 1e-6
        assert np.abs(change[3:6]).max() < 1e-6


class GantryKinematics:
    """A stand-in for LeRobot's kinematics, of an arm with four joints.

    Joints 0 to 2 slide along x, y and z, by 1 m per degree and as far as 1 m. Joint 3 turns about
    z.
    """

    def forward_kinematics(self, angles_deg: Array) -> Array:
        pose = np.eye(4)
        pose[:3, 3] = np.clip(angles_deg[:3], -1, 1)
        pose[:3, :3] = Rotation.from_euler("z", angles_deg[3], degrees=True).as_matrix()
        return pose

    def inverse_kinematics(self, angles_deg: Array, pose: Array) -> Array:
        z_angle_deg = Rotation.from_matrix(pose[:3, :3]).as_euler("zyx", degrees=True)[0]
        return np.array([*pose[:3, 3], z_angle_deg])


class TestJointRobot:
    """A robot at 10 Hz whose numbers are four joint angles and the gripper (100 is open)."""

    current = np.array([0.1, 0.2, 0.3, 30, 100], np.float32)  # measured

    @pytest.fixture
    def robot(self) -> Any:
        """The gantry, with 2 frames per action."""
        return robots.JointRobot(stride=2, kinematics=GantryKinematics(), num_joints=4)

    @pytest.fixture
    def commands(self) -> Array:
        """Six commands, 0.2 s apart, [6, 5]."""
        steps = np.arange(1, 7)[:, None]
        return self.current + steps * np.float32([0.01, 0, 0, 5, -20])

    @pytest.fixture
    def actions(self, robot: Any, commands: Array) -> Array:
        """The actions [5, 8] that lead from the current pose from command to command."""
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
        frames = robot.to_commands(actions, self.current)

        last_frames = frames[1::2]  # the second frame of each action
        np.testing.assert_allclose(last_frames[:, :4], commands[:5, :4], atol=1e-4)

    def test_stays_where_no_joint_angles_lead_and_says_so_once(
        self, robot: Any, actions: Array
    ) -> None:
        """The third and later actions are 0.6 m along x each, with a reach of 1 m.

        The third action (frames 4 and 5) leads to 0.72 m. The fourth would lead beyond the reach,
        so the arm stays, also in the next chunk.
        """
        too_far_actions = actions.copy()
        too_far_actions[2:, 0] = 0.6

        with pytest.warns(UserWarning, match="no joint angles") as notices:
            frames = robot.to_commands(too_far_actions, self.current)
            last_reached_frame = frames[5]
            next_frames = robot.to_commands(
                too_far_actions[2:] * 3, self.current, last_reached_frame
            )

        assert len(notices) == 1
        assert (frames[:4, 0] < 0.13).all()  # of the first two actions
        assert frames[-1, 0] <= 1
        later_frames = np.vstack([frames[6:], next_frames])
        assert (later_frames == last_reached_frame).all()


@pytest.mark.parametrize(
    ("kind", "scale", "num_notices"),
    [
        ("joints", 1, 0),  # up to 90° and an opening up to 100
        ("exported", 1 / 99, 0),  # our own exports have m, rad and openings up to 1
        ("joints", 1 / 99, 2),  # angles like radians, and an opening up to 1
        ("joints", 10 / 9, 1),  # joints from -100 to 100, which is LeRobot's normalized range
    ],
)
def test_unlikely_units_are_noticed(
    recwarn: pytest.WarningsRecorder, kind: str, scale: float, num_notices: int
) -> None:
    """The numbers of five frames are multiplied by `scale`."""
    robot = robots.ExportedRobot()
    if kind == "joints":
        robot = robots.JointRobot(stride=2, kinematics=GantryKinematics(), num_joints=4)
    frames = np.linspace(0, 1, 5)[:, None] * [[30, -60, 90, 5, 100]]

    robots.notice_unlikely_units(robot, frames * scale)

    assert len(recwarn) == num_notices


class FakeClock:
    """A stand-in for the module `time`, whose time passes only if a test or `sleep` says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s


class TestCommandPacer:
    """The pacer hands out one command after the other, `fps` of them per second at most."""

    fps = 5

    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
        """The clock that the plugin uses in these tests."""
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
        """A control loop asks for commands `asked_per_s` times per second, a bit unevenly.

        It is noticed if the loop asks faster than commands may be executed.
        """
        pacer = robots.CommandPacer(self.fps)
        num_commands = 100
        # By how much each request is later than in an even loop.
        delays_s = np.random.default_rng(0).uniform(0, 0.08, num_commands + 1)
        start_s = clock.now_s

        for previous_delay_s, delay_s in itertools.pairwise(delays_s):
            request_time_s = clock.now_s
            pacer.wait_until_due()  # advances the clock if the request came too early
            # The next request is due after the loop's period, plus the change of the delay. If the
            # pacer made the loop wait for longer, the loop asks at once.
            next_request_s = request_time_s + 1 / asked_per_s + delay_s - previous_delay_s
            clock.now_s = max(clock.now_s, next_request_s)

        duration_s = clock.now_s - start_s
        assert num_commands / duration_s == pytest.approx(given_per_s, rel=0.02)
        assert (len(recwarn) > 0) is is_noticed

    def test_forgets_commands_that_waited_through_a_pause(self, clock: FakeClock) -> None:
        """Each prediction is a chunk of two commands, numbered 10 and 11, 20 and 21, and so on.

        The robot asks for five commands, each after a pause. After the pause of 1.1 s, the second
        command of the second chunk is outdated, so a new chunk is predicted, without a last command
        that it should continue.
        """
        pacer = robots.CommandPacer(self.fps)
        last_commands = []

        def predict(last_command: int | None) -> list[int]:
            last_commands.append(last_command)
            chunk_number = len(last_commands)
            return [chunk_number * 10, chunk_number * 10 + 1]

        for pause_s in (0, 0.2, 0.9, 1.1, 0.2):
            clock.now_s += pause_s
            pacer.next_command(predict)

        assert last_commands == [None, 11, None]

    def test_drops_commands_that_are_not_yet_handed_out(self, clock: FakeClock) -> None:
        """LeRobot 0.7 clears the queue when the task changes, and keeps the rest of the episode.

        The new prediction continues from the last command that was handed out.
        """
        pacer = robots.CommandPacer(self.fps)
        last_commands = []

        def predict(last_command: int | None) -> list[int]:
            last_commands.append(last_command)
            return [10, 11, 12]

        pacer.next_command(predict)
        num_commands = len(pacer)
        pacer.clear()
        num_commands_after_clear = len(pacer)
        pacer.next_command(predict)

        assert num_commands == 2
        assert num_commands_after_clear == 0
        assert last_commands == [None, 10]


class TestExportedRobot:
    """The numbers of our own exports are states and canonical actions already, at 5 Hz."""

    def test_actions_stay_as_they_are(self) -> None:
        robot = choose_robot_without_urdf(STATE_NAMES, ACTION_NAMES, stride=1)
        frames = np.arange(48, dtype=np.float32).reshape(6, 8)
        is_past_end = np.arange(6) == 5

        actions, action_mask = robot.to_actions(frames[0], frames, is_past_end)
        commands = robot.to_commands(actions, frames[0])

        np.testing.assert_array_equal(commands, frames[:5])
        assert action_mask.tolist() == [True, True, True, True, False]

    def test_of_another_rate_is_refused(self) -> None:
        """Six frames per action would be 30 Hz."""
        refuses("fps", choose_robot_without_urdf, STATE_NAMES, ACTION_NAMES, stride=6)


def test_no_action_after_a_disturbance_is_a_demonstration() -> None:
    """Frame 3 is a disturbance, so the chunks from frames 0, 3, 4 and 8 have 3, 0, 5 and 5 actions.

    Behind the last frame, other masks apply.
    """
    is_demonstrated = np.array([1, 1, 1, 0, 1, 1, 1, 1, 1, 1], bool)
    first_frames = np.array([0, 3, 4, 8])

    mask = robots.find_demonstrated_actions(is_demonstrated, first_frames)

    num_actions = np.array([3, 0, 5, 5])
    expected = np.arange(5) < num_actions[:, None]  # [4, 5]
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("names", "message"),  # names of the components of the state and of the action
    [
        (["shoulder.pos", "gripper.pos"], "urdf"),
        (["left_gripper.pos", "right_gripper.pos"], "action"),
        ([], "action"),
        (["x", "y"], "action"),
    ],
)
def test_numbers_that_are_no_pose_are_refused(names: list[str], message: str) -> None:
    refuses(message, choose_robot_without_urdf, names, names, stride=1)


class TestDemonstratedFrames:
    """A dataset of three episodes of 6 frames, of which the second one failed."""

    @pytest.fixture
    def episodes(self) -> list[Any]:
        outcomes = (True, False, None)
        return [
            with_canonical_actions(make_episode(index, success=outcome))
            for index, outcome in enumerate(outcomes)
        ]

    @pytest.fixture
    def dataset_meta(self, episodes: list[Any], tmp_path: Path) -> SimpleNamespace:
        """A stand-in for LeRobot's metadata of the exported dataset."""
        root = tmp_path / "exported"
        write_lerobot(iter(episodes), root, "image")
        info = json.loads((root / "meta" / "info.json").read_text())
        return SimpleNamespace(root=root, total_frames=18, features=info["features"])

    def test_leave_out_failed_episodes_and_masked_frames(
        self, episodes: list[Any], dataset_meta: SimpleNamespace
    ) -> None:
        expected = np.concatenate([np.asarray(episode.action_mask) for episode in episodes])
        expected[6:12] = False  # the episode that failed

        frames = robots.find_demonstrated_frames(dataset_meta, robots.ExportedRobot())

        np.testing.assert_array_equal(frames, expected)

    def test_are_all_frames_of_a_foreign_dataset(self, dataset_meta: SimpleNamespace) -> None:
        """In a foreign dataset, columns of these names may mean something else."""
        frames = robots.find_demonstrated_frames(dataset_meta, robots.PoseRobot(1))

        assert frames.all()
