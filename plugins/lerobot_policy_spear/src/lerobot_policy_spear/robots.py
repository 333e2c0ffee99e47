"""What a LeRobot dataset's numbers mean to SPEAR-1, and SPEAR-1's actions as commands of the robot.

Three kinds of numbers are known; others are refused:

- What `spear data export` writes (`ExportedRobot`).
- End-effector poses as LeRobot's processors name them (`PoseRobot`): position in m, rotation
  vector, gripper from 0 (closed) to 100 (open), commanded as absolute poses.
- Joint angles in degrees (`JointRobot`), through LeRobot's kinematics of the arm.

Only joint angles need LeRobot itself.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow.dataset
import torch
from torch import Tensor

from spear.chunks import MAX_PAUSE_S
from spear.data.actions import HORIZON, derive_actions
from spear.data.store.lerobot_write import ACTION_NAMES, STATE_NAMES
from spear.embodiments.actions import compute_target_poses
from spear.embodiments.observations import make_state
from spear.errors import SpearError, notice
from spear.geometry import (
    matrix_to_quat,
    quat_canonical,
    quat_distance,
    quat_exp,
    quat_log,
    quat_slerp,
    quat_to_matrix,
)
from spear.types import Array

POSE_NAMES = [f"ee.{name}" for name in ("x", "y", "z", "wx", "wy", "wz", "gripper_pos")]

OPEN_GRIPPER = 100.0  # LeRobot's value of an open gripper
NORMALIZED_JOINT_LIMIT = 100.0  # LeRobot's value of a joint at its end, if it gives no degrees

IK_STEPS = 5  # solver steps per command; a call of LeRobot's inverse kinematics makes one step
MAX_IK_ERROR_M = 0.01  # if the solution is further from the target, the arm stands still

# A robot that asks for a command by more than this fraction of the period too early gets a notice.
EARLY_FRACTION_OF_NOTICE = 0.2
# A gripper that never reads more than this is taken to be recorded from 0 to 1 instead of percent.
MAX_UNLIKELY_OPENING = OPEN_GRIPPER / 50


class Pose(NamedTuple):
    """An end-effector's pose.

    position  [3] m, base frame.
    rotation  [4] unit quaternion (w, x, y, z), base frame.
    opening   gripper opening, 0 closed … 1 open.
    """

    position: Array
    rotation: Array
    opening: float


class CommandPacer:
    """Hands out commands no faster than a robot is to execute them: `fps` per second.

    LeRobot's loop has a rate of its own, `--fps`, which is 30 by default. A command may come half
    of its period early.
    """

    def __init__(self, fps: int) -> None:
        self.period_s = 1 / fps
        self._due_s = -math.inf
        self._last_handed_out_s = math.inf
        self._commands: deque[Tensor] = deque()
        self._last_command: Tensor | None = None

    def next_command(
        self,
        predict: Callable[[Tensor | None], Iterable[Tensor]],
        is_single_robot: bool = True,
    ) -> Tensor:
        """Return the next command [B, d], when it is due.

        Args:
            predict: a function from the last command (None if it is not known) to new commands. It
                is called when no command is left.
            is_single_robot: whether to wait. Several robots are a simulator's, which does not wait.
        """
        if is_single_robot:
            self.wait_until_due()
        if not self._commands:
            self._commands.extend(predict(self._last_command))
        command = self._commands.popleft()
        self._last_command = command
        self._last_handed_out_s = time.monotonic()
        return command

    def __len__(self) -> int:
        """How many commands are predicted and not yet handed out."""
        return len(self._commands)

    def clear(self) -> None:
        """Forget the commands that are not yet handed out.

        The next prediction continues from the last command that was handed out.
        """
        self._commands.clear()

    def wait_until_due(self) -> None:
        """Wait until the next command is due; a notice says so if the robot asks much too fast.

        After a pause, the remaining commands and the one before are forgotten.
        """
        if time.monotonic() - self._last_handed_out_s > MAX_PAUSE_S:
            self.clear()
            self._last_command = None
        early_s = self._due_s - time.monotonic()
        if early_s > 0:
            if early_s > EARLY_FRACTION_OF_NOTICE * self.period_s:
                fps = f"{1 / self.period_s:g}"
                notice(
                    f"the robot asks for more commands than --policy.fps={fps}, so each of them "
                    f"waits. Add --fps={fps}."
                )
            time.sleep(early_s)
        # After a late command the next one may come half a period early.
        self._due_s = max(self._due_s + self.period_s, time.monotonic() + self.period_s / 2)


class Robot(Protocol):
    """What the numbers of a robot mean. d is how many there are."""

    def to_state(self, values: Array) -> Array:
        """The robot's numbers [d] → SPEAR-1's state [8]."""
        ...

    def to_actions(self, state: Array, commands: Array, is_past_end: Array) -> tuple[Array, Array]:
        """Commands of a dataset → actions [5, 8], and [5] bool, which of them count.

        Args:
            state: [8] at the first frame.
            commands: [6, d] of the frames of `Spear1Config.action_delta_indices`.
            is_past_end: [6] bool, which of these frames are after the end of the episode.
        """
        ...

    def to_commands(self, actions: Array, values: Array, last: Array | None = None) -> Array:
        """Actions [H, 8] → commands [N, d], for a robot whose numbers are `values` [d].

        last: [d] the command before.
        """
        ...


class ExportedRobot:
    """A dataset that spear exported, at 5 Hz. Nobody knows where an episode's last action leads."""

    def to_state(self, values: Array) -> Array:
        return values

    def to_actions(self, state: Array, commands: Array, is_past_end: Array) -> tuple[Array, Array]:
        return commands[:HORIZON], ~is_past_end[1:]

    def to_commands(self, actions: Array, values: Array, last: Array | None = None) -> Array:
        return actions


class PoseRobot:
    """End-effector poses, with `stride` frames per action."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def to_state(self, values: Array) -> Array:
        pose = self.to_pose(values)
        return make_state(pose.position, pose.rotation, pose.opening)

    def to_actions(self, state: Array, commands: Array, is_past_end: Array) -> tuple[Array, Array]:
        """Each action leads from one command to the next, the first one from where the robot is."""
        poses = [self.to_pose(command) for command in commands[:HORIZON]]
        positions = np.stack([state[:3], *(pose.position for pose in poses)])
        rotations = np.stack([state[3:7], *(pose.rotation for pose in poses)])
        openings = [pose.opening for pose in poses]
        openings.append(openings[-1])
        actions = derive_actions(positions, rotations, np.array(openings, np.float32))
        return actions[:-1], ~is_past_end[:HORIZON]

    def to_commands(self, actions: Array, values: Array, last: Array | None = None) -> Array:
        """Interpolate between the poses to which the actions lead, by lines and geodesics.

        The path begins at the last command, because an arm lags behind its command. A path that
        began where the arm is would draw the arm back at every chunk.
        """
        state = self.to_state(values)
        target_positions, target_rotations = compute_target_poses(state, actions)
        position, rotation = self._find_start(state, actions[0], last)
        poses = []
        for target_position, target_rotation, action in zip(
            target_positions, target_rotations, actions, strict=True
        ):
            start_quat = torch.from_numpy(np.array(rotation, np.float64))
            end_quat = torch.from_numpy(np.array(target_rotation, np.float64))
            for fraction in np.arange(1, self.stride + 1) / self.stride:
                pose = Pose(
                    position + (target_position - position) * fraction,
                    quat_slerp(start_quat, end_quat, float(fraction)).numpy(),
                    action[7],
                )
                poses.append(pose)
            position = target_position
            rotation = target_rotation
        return self._poses_to_commands(poses, values, last)

    def _find_start(self, state: Array, action: Array, last: Array | None) -> tuple[Array, Array]:
        """Find the position [3] and quaternion [4] from which the first action leads.

        This is the pose of the last command, if there is one. But it is no further from the state
        than the action moves and turns, because the arm may be blocked or pushed. A demonstrated
        action is never shorter than the arm's lag, unless its command goes back.
        """
        if last is None:
            return state[:3], state[3:7]
        commanded = self.to_pose(last)

        offset = np.float64(commanded.position) - state[:3]
        distance_m = float(np.linalg.norm(offset))
        action_distance_m = float(np.linalg.norm(action[:3]))
        position_fraction = min(1.0, action_distance_m / max(distance_m, 1e-9))

        state_quat = torch.from_numpy(np.array(state[3:7], np.float64))
        commanded_quat = torch.from_numpy(np.array(commanded.rotation, np.float64))
        action_quat = torch.from_numpy(np.array(action[3:7], np.float64))
        angle_rad = float(quat_distance(state_quat, commanded_quat))
        action_angle_rad = float(quat_log(action_quat).norm())
        rotation_fraction = min(1.0, action_angle_rad / max(angle_rad, 1e-9))

        position = state[:3] + position_fraction * offset
        return position, quat_slerp(state_quat, commanded_quat, rotation_fraction).numpy()

    def to_pose(self, values: Array) -> Pose:
        """The pose that the robot's numbers [d] mean.

        Raises SpearError if they are joint angles; their names are not known here, since a robot
        sends none.
        """
        angle_rad = float(np.linalg.norm(values[3:6]))
        if angle_rad > 2 * math.pi:
            raise SpearError(
                f"{POSE_NAMES[3]} … is {angle_rad:.3g} rad, which is no rotation of an "
                "end-effector. If these are joint angles, send the end-effector's pose "
                "(LeRobot's end-effector processors)."
            )
        rotation_vector = torch.from_numpy(np.float64(values[3:6]))
        rotation = quat_canonical(quat_exp(rotation_vector)).numpy()
        return Pose(values[:3], rotation, _to_opening(values[6]))

    def _poses_to_commands(self, poses: Sequence[Pose], values: Array, last: Array | None) -> Array:
        """Poses as commands [N, d]."""
        commands = []
        for pose in poses:
            rotation_vector = quat_log(torch.from_numpy(pose.rotation)).numpy()
            commands.append([*pose.position, *rotation_vector, OPEN_GRIPPER * pose.opening])
        return np.array(commands, np.float32)


class JointRobot(PoseRobot):
    """Joint angles in degrees, the gripper last."""

    def __init__(self, stride: int, kinematics: Any, num_joints: int) -> None:
        """kinematics: LeRobot's `RobotKinematics`, or an object with the same methods."""
        super().__init__(stride)
        self.kinematics = kinematics
        self.num_joints = num_joints
        self._has_noticed = False

    def to_pose(self, values: Array) -> Pose:
        angles_deg = np.float64(values[: self.num_joints])
        matrix = self.kinematics.forward_kinematics(angles_deg)
        rotation = matrix_to_quat(torch.from_numpy(matrix[:3, :3].copy())).numpy()
        return Pose(matrix[:3, 3], rotation, _to_opening(values[-1]))

    def _poses_to_commands(self, poses: Sequence[Pose], values: Array, last: Array | None) -> Array:
        """Each pose's angles by inverse kinematics, beginning with the angles of the pose before.

        If no angles lead to a pose, the command before is repeated, gripper included; a notice says
        so once.
        """
        angles_deg = np.asarray(values[: self.num_joints], np.float64)
        if last is None:
            command = [*angles_deg, OPEN_GRIPPER * _to_opening(values[-1])]
        else:
            command = [*last]
        commands = []
        for pose in poses:
            solution_deg = self._solve_joint_angles(pose, angles_deg)
            if solution_deg is not None:
                angles_deg = solution_deg
                command = [*angles_deg, OPEN_GRIPPER * pose.opening]
            elif not self._has_noticed:
                self._has_noticed = notice(
                    "no joint angles lead where the policy goes, so the arm and its gripper stand "
                    "still. Check that the target is in reach, and that --policy.urdf and "
                    "--policy.tip are right."
                )
            commands.append(command)
        return np.array(commands, np.float32)

    def _solve_joint_angles(self, pose: Pose, angles_deg: Array) -> Array | None:
        """Return joint angles [d] (deg) that lead to a pose; None if none are found.

        The solver begins at `angles_deg`.
        """
        target = np.eye(4)
        target[:3, :3] = quat_to_matrix(torch.from_numpy(pose.rotation)).numpy()
        target[:3, 3] = pose.position
        for _ in range(IK_STEPS):
            angles_deg = self.kinematics.inverse_kinematics(angles_deg, target)
        position = self.kinematics.forward_kinematics(angles_deg)[:3, 3]
        error_m = np.linalg.norm(position - pose.position)
        return angles_deg if error_m < MAX_IK_ERROR_M else None


def _to_opening(value: float) -> float:
    """Convert LeRobot's value of a gripper (100 is open) to an opening, 0 closed … 1 open."""
    return float(min(max(value / OPEN_GRIPPER, 0.0), 1.0))


def choose_robot(
    state_names: Sequence[str], action_names: Sequence[str], stride: int, urdf: str, tip: str
) -> Robot:
    """Choose what a dataset's numbers mean by their names.

    Raises SpearError for names that are not known.
    """
    state_names = list(state_names)
    action_names = list(action_names)
    if state_names == STATE_NAMES and action_names == ACTION_NAMES:
        if stride != 1:
            raise SpearError(
                "a dataset that spear exported has 5 Hz. Export it with that rate, and set "
                "--policy.fps=5."
            )
        return ExportedRobot()
    if state_names == POSE_NAMES and action_names == POSE_NAMES:
        return PoseRobot(stride)

    motors = [name.removesuffix(".pos") for name in action_names]
    are_joints = (
        state_names == action_names
        and all(name.endswith(".pos") for name in action_names)
        and motors[-1:] == ["gripper"]
    )
    num_grippers = sum("gripper" in motor for motor in motors)
    if are_joints and num_grippers == 1 and urdf:
        joints = motors[:-1]
        return JointRobot(stride, _load_kinematics(urdf, tip, joints), len(joints))

    names = ", ".join(action_names[:4]) or "no names"
    if are_joints:
        advice = (
            "Add --policy.urdf=FILE, the URDF of the one arm that they move, and --policy.tip=LINK "
            "(docs/howto/lerobot.md)."
        )
    else:
        pose_names = " ".join(POSE_NAMES)
        advice = (
            f"Record {pose_names} (LeRobot's end-effector processors), or use `spear train`; for "
            "joint angles name them MOTOR.pos and add --policy.urdf=FILE (docs/howto/lerobot.md)."
        )
    raise SpearError(
        f"action ({names}, …) is no pose of an end-effector, which SPEAR-1 moves. {advice}"
    )


def _load_kinematics(urdf: str, tip: str, joints: list[str]) -> Any:
    """LeRobot's kinematics of a URDF.

    Raises SpearError for a URDF that cannot be read or lacks some of the joints.
    """
    from lerobot.model.kinematics import RobotKinematics

    try:
        kinematics = RobotKinematics(urdf, tip, joints)
        kinematics.forward_kinematics(np.zeros(len(joints)))
    except (ValueError, RuntimeError) as error:
        raise SpearError(
            f"--policy.urdf={urdf} with --policy.tip={tip} cannot be used ({error}). It needs the "
            f"joints of the dataset, {' '.join(joints)}."
        ) from error
    return kinematics


# Datasets


def notice_unlikely_units(robot: Robot, state: Array) -> None:
    """Give a notice if numbers [frames, d] are hardly degrees, or percent of an open gripper."""
    max_values = np.abs(state).max(axis=0)
    if isinstance(robot, JointRobot):
        max_angle = max_values[:-1].max()
        may_be_radians = 0 < max_angle < 2 * np.pi
        if may_be_radians or max_angle == NORMALIZED_JOINT_LIMIT:
            notice(
                f"joint angles are at most {max_angle:.3g}, which are hardly degrees. Record with"
                " use_degrees=true."
            )
    if isinstance(robot, PoseRobot) and 0 < max_values[-1] <= MAX_UNLIKELY_OPENING:
        notice(
            f"the gripper reads at most {max_values[-1]:.3g}. It must go from 0 (closed) to"
            f" {OPEN_GRIPPER:g} (open)."
        )


def read_columns(root: Path, *keys: str) -> list[Array]:
    """Read columns of a LeRobot dataset, sorted by the frames' "index".

    Raises SpearError if the dataset is not on disk.
    """
    if not (root / "data").is_dir():
        raise SpearError(
            f"{root} has no data, whose statistics are needed. Leave out --dataset.streaming."
        )
    dataset = pyarrow.dataset.dataset(root / "data", format="parquet")
    table = dataset.to_table(list({*keys, "index"})).sort_by("index")
    return [np.array(table[key].to_pylist()) for key in keys]


def find_demonstrated_frames(dataset_meta: Any, robot: Robot) -> Array:
    """Find out which frames of a dataset are demonstrations: [frames] bool.

    In a dataset that spear exported, a frame is a demonstration if its `action_mask` is true and
    the `success` of its episode is not 0. In other datasets columns of these names may mean
    something else, so all frames count as demonstrations.
    """
    is_demonstrated = np.ones(dataset_meta.total_frames, bool)
    if not isinstance(robot, ExportedRobot):
        return is_demonstrated
    keys = [key for key in ("action_mask", "success") if key in dataset_meta.features]
    if keys:
        *columns, index = read_columns(Path(dataset_meta.root), *keys, "index")
        is_demonstrated[index] = np.logical_and.reduce(columns)
    return is_demonstrated


def find_demonstrated_actions(is_demonstrated: Array, index: Array) -> Array:
    """Find out which actions of B chunks are demonstrations: [B, 5] bool.

    An action is one if its own frame and all frames before it in the chunk are demonstrations.

    Args:
        is_demonstrated: [frames] bool.
        index: [B] the frames at which the chunks begin.
    """
    frames = index[:, None] + np.arange(HORIZON)
    frames = np.minimum(frames, len(is_demonstrated) - 1)
    return np.logical_and.accumulate(is_demonstrated[frames], axis=1)
