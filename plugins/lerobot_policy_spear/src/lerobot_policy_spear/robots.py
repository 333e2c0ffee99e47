"""What a LeRobot dataset's numbers mean to SPEAR-1, and SPEAR-1's actions as the robot takes them.

Known are what `spear data export` writes; end-effector poses as LeRobot's processors name them (position in
m, rotation vector, gripper 0 closed … 100 open), commanded as absolute poses; and joint angles in degrees,
through LeRobot's kinematics of the arm. Anything else is refused. Needs no LeRobot, but for joint angles.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

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

POSE_NAMES = [f"ee.{part}" for part in ("x", "y", "z", "wx", "wy", "wz", "gripper_pos")]
OPEN = FULL = 100.0
"""LeRobot's value of an open gripper, and of a joint at its end where it gives no degrees (-100 … 100)."""
ROUNDS = 5
"""LeRobot's inverse kinematics makes one step of its solver: so many for each row."""
MISS = 0.01
"""Metres from where a row should lead: beyond, the arm stands still (these two are our choice)."""
Row = tuple[Array, Array, float]
"""Position [3] (m, base frame), quaternion [4], opening 0 … 1."""


class Pace:
    """Lets rows come no faster than a robot is to execute them, `fps` in a second: LeRobot's loop has a rate
    of its own, `--fps`, 30 without it. A row may come half of its time early (our choice)."""

    def __init__(self, fps: int) -> None:
        self.period, self._due, self._handed = 1 / fps, -math.inf, math.inf
        self._rows: deque[Tensor] = deque()
        self._last: Tensor | None = None

    def row(self, look: Callable[[Tensor | None], Iterable[Tensor]], one: bool = True) -> Tensor:
        """The next row [B, d], when it is due for one robot; several are a simulator's, which do not wait.
        look: the row before, None where nothing is known of it → new rows, asked for when none is left."""
        if one:
            self.wait()
        if not self._rows:
            self._rows.extend(look(self._last))
        self._last, self._handed = self._rows.popleft(), time.monotonic()
        return self._last

    def wait(self) -> None:
        """Until the next row is due. Says so where they are asked for a quarter too fast. After a pause the
        rows that are left, and the one before, are forgotten."""
        if time.monotonic() - self._handed > MAX_PAUSE_S:
            self._rows.clear()
            self._last = None
        if (early := self._due - time.monotonic()) > 0:
            if early > 0.2 * self.period:
                told = f"--policy.fps={1 / self.period:g}"
                notice(
                    f"more rows are asked for than {told}: each is made to wait: give it as --fps, too"
                )
            time.sleep(early)
        self._due = max(self._due + self.period, time.monotonic() + self.period / 2)


class Robot(Protocol):
    """state: the robot's numbers [d] as SPEAR-1's state [8]. chunk: (state, commands [6, d] of the frames of
    `action_delta_indices`, which of them are beyond the episode [6]) as actions [5, 8] and which count [5].
    rows: actions for a robot that is at `values` [d], as commands [N, d]; last: the command [d] before."""

    def state(self, values: Array) -> Array: ...
    def chunk(self, state: Array, commands: Array, beyond: Array) -> tuple[Array, Array]: ...
    def rows(self, actions: Array, values: Array, last: Array | None = None) -> Array: ...


class Exported:
    """A dataset of spear's own, at 5 Hz. The last action of an episode leads nowhere known."""

    def state(self, values: Array) -> Array:
        return values

    def chunk(self, state: Array, commands: Array, beyond: Array) -> tuple[Array, Array]:
        return commands[:HORIZON], ~beyond[1:]

    def rows(self, actions: Array, values: Array, last: Array | None = None) -> Array:
        return actions


class Poses:
    """End-effector poses, `stride` frames to an action."""

    def __init__(self, stride: int) -> None:
        self.stride = stride

    def state(self, values: Array) -> Array:
        position, rotation, gripper = self.pose(values)
        return make_state(position, rotation, gripper)

    def chunk(self, state: Array, commands: Array, beyond: Array) -> tuple[Array, Array]:
        """Each action leads from one command to the next, the first one from where the robot is."""
        poses = [self.pose(c) for c in commands[:HORIZON]]
        position = np.stack([state[:3], *(p for p, _, _ in poses)])
        rotation = np.stack([state[3:7], *(r for _, r, _ in poses)])
        command = np.array([g for _, _, g in poses] + [poses[-1][2]], np.float32)
        return derive_actions(position, rotation, command)[:-1], ~beyond[:HORIZON]

    def rows(self, actions: Array, values: Array, last: Array | None = None) -> Array:
        """Straight lines and geodesics between where the actions lead. They begin at the last command, which
        an arm lags behind: from where it is, each look would draw it back."""
        state = self.state(values)
        where, turned = compute_target_poses(state, actions)
        path = [self._begin(state, actions[0], last), *zip(where, turned, strict=True)]
        rows = []
        for ((p, q), (to, facing)), action in zip(itertools.pairwise(path), actions, strict=True):
            for part in np.arange(1, self.stride + 1) / self.stride:
                begin, end = torch.from_numpy(np.array([q, facing], np.float64))
                rows.append(
                    (p + (to - p) * part, quat_slerp(begin, end, float(part)).numpy(), action[7])
                )
        return self.commands(rows, values, last)

    def _begin(self, state: Array, action: Array, last: Array | None) -> tuple[Array, Array]:
        """Position [3] and quaternion [4] of the last command, if any, but no further from the state than the
        action goes and turns (our choice): the arm may be blocked, or pushed. A demonstrated action is never
        shorter than the lag, unless its command goes back."""
        if last is None:
            return state[:3], state[3:7]
        position, rotation, _ = self.pose(last)
        ahead = np.float64(position) - state[:3]
        begin, end, turn = torch.from_numpy(
            np.array([state[3:7], rotation, action[3:7]], np.float64)
        )
        far, angle = float(np.linalg.norm(ahead)), float(quat_distance(begin, end))
        goes = min(1.0, float(np.linalg.norm(action[:3])) / max(far, 1e-9))
        turns = min(1.0, float(quat_log(turn).norm()) / max(angle, 1e-9))
        return state[:3] + goes * ahead, quat_slerp(begin, end, turns).numpy()

    def pose(self, values: Array) -> Row:
        """Of the robot's numbers [d]. Raises `SpearError` for joint angles: a robot sends no names."""
        if (turn := float(np.linalg.norm(values[3:6]))) > 2 * math.pi:
            how = "are these joint angles? send the end-effector's pose (LeRobot's end-effector processors)"
            raise SpearError(
                f"{POSE_NAMES[3]} …: {turn:.3g} rad is no turn of an end-effector: {how}"
            )
        return (
            values[:3],
            _quat(quat_exp(torch.from_numpy(np.float64(values[3:6])))),
            _opening(values[6]),
        )

    def commands(self, rows: Sequence[Row], values: Array, last: Array | None) -> Array:
        """Poses as commands [N, d]."""
        turns = [quat_log(torch.from_numpy(q)).numpy() for _, q, _ in rows]
        made = [[*p, *w, OPEN * g] for (p, _, g), w in zip(rows, turns, strict=True)]
        return np.array(made, np.float32)


class Joints(Poses):
    """Joint angles in degrees, the gripper last. kinematics: LeRobot's `RobotKinematics`, or its like."""

    def __init__(self, stride: int, kinematics: Any, count: int) -> None:
        super().__init__(stride)
        self.kinematics, self.count, self._noted = kinematics, count, False

    def pose(self, values: Array) -> Row:
        at = self.kinematics.forward_kinematics(np.float64(values[: self.count]))
        return (
            at[:3, 3],
            matrix_to_quat(torch.from_numpy(at[:3, :3].copy())).numpy(),
            _opening(values[-1]),
        )

    def commands(self, rows: Sequence[Row], values: Array, last: Array | None) -> Array:
        """Each row's angles by the inverse kinematics, from those of the row before; where no angles lead
        there, the row before again, gripper included: says so once."""
        angles, made = np.asarray(values[: self.count], np.float64), []
        held = [*angles, OPEN * _opening(values[-1])] if last is None else [*last]
        for position, rotation, gripper in rows:
            at = np.eye(4)
            at[:3, :3], at[:3, 3] = quat_to_matrix(torch.from_numpy(rotation)).numpy(), position
            found = angles
            for _ in range(ROUNDS):
                found = self.kinematics.inverse_kinematics(found, at)
            if np.linalg.norm(self.kinematics.forward_kinematics(found)[:3, 3] - position) < MISS:
                angles, held = found, [*found, OPEN * gripper]
            elif not self._noted:
                told = "no joint angles lead where the policy goes: the arm and its gripper stand still"
                self._noted = notice(
                    f"{told}: is it in reach, are --policy.urdf and --policy.tip right?"
                )
            made.append(held)
        return np.array(made, np.float32)


def doubt_units(robot: Robot, state: Array) -> None:
    """Says so where a dataset's numbers [frames, d] are hardly degrees, or percent of an open gripper."""
    widest = np.abs(state).max(axis=0)
    if isinstance(robot, Joints) and (0 < (top := widest[:-1].max()) < 2 * np.pi or top == FULL):
        notice(
            f"joint angles are at most {top:.3g}: are they degrees, recorded with use_degrees=true?"
        )
    if isinstance(robot, Poses) and 0 < widest[-1] <= OPEN / 50:
        notice(f"the gripper reads at most {widest[-1]:.3g}: is it 0 (closed) … {OPEN:g} (open)?")


def columns(root: Path, *keys: str) -> list[Array]:
    """Columns of a LeRobot dataset, by the frames' "index". Raises `SpearError` where it is not on disk."""
    if not (root / "data").is_dir():
        raise SpearError(
            f"{root}: no data there, whose statistics are needed: leave out --dataset.streaming"
        )
    table = pyarrow.dataset.dataset(root / "data", format="parquet").to_table(
        list({*keys, "index"})
    )
    rows = table.sort_by("index")
    return [np.array(rows[key].to_pylist()) for key in keys]


def counting(dataset_meta: Any, robot: Robot) -> Array:
    """Which frames of a dataset are demonstrations [frames]. One of spear's own says it: those that its
    `action_mask` leaves out are none, nor are those of episodes whose `success` is 0."""
    mask = np.ones(dataset_meta.total_frames, bool)
    own = ("action_mask", "success") if isinstance(robot, Exported) else ()
    if keys := [key for key in own if key in dataset_meta.features]:
        *said, index = columns(Path(dataset_meta.root), *keys, "index")
        mask[index] = np.logical_and.reduce(said)
    return mask


def demonstrated(mask: Array, index: Array) -> Array:
    """Which actions of the chunks that begin at the frames `index` [B] are demonstrations [B, 5]: none from
    the first on that mask [frames] leaves out."""
    frames = np.minimum(index[:, None] + np.arange(HORIZON), len(mask) - 1)
    return np.logical_and.accumulate(mask[frames], axis=1)


def choose(state: Sequence[str], action: Sequence[str], stride: int, urdf: str, tip: str) -> Robot:
    """By the names of the numbers. Raises `SpearError` for others than those known."""
    state, action = list(state), list(action)
    if (state, action) == (STATE_NAMES, ACTION_NAMES):
        if stride != 1:
            raise SpearError(
                "a dataset of spear's actions is at 5 Hz: export it so, and give --policy.fps=5"
            )
        return Exported()
    if state == action == POSE_NAMES:
        return Poses(stride)
    motors = [name.removesuffix(".pos") for name in action]
    joints = (
        state == action and all(n.endswith(".pos") for n in action) and motors[-1:] == ["gripper"]
    )
    if joints and sum("gripper" in m for m in motors) == 1 and urdf:
        return Joints(stride, _kinematics(urdf, tip, motors[:-1]), len(motors) - 1)
    how = (
        "one arm's joints need its --policy.urdf"
        if joints
        else f"record {' '.join(POSE_NAMES)} (LeRobot's end-effector processors), or use `spear train`"
    )
    shown = ", ".join(action[:4]) or "no names"
    raise SpearError(
        f"action ({shown}, …): SPEAR-1 moves an end-effector, these are not its pose: {how}"
    )


def _kinematics(urdf: str, tip: str, joints: list[str]) -> Any:
    """LeRobot's, of a URDF's joints. Raises `SpearError` for a URDF that cannot be read or lacks some."""
    from lerobot.model.kinematics import RobotKinematics

    try:
        kinematics = RobotKinematics(urdf, tip, joints)
        kinematics.forward_kinematics(np.zeros(len(joints)))
    except (ValueError, RuntimeError) as error:
        told = f"{error} The dataset's joints: {' '.join(joints)}"
        raise SpearError(f"--policy.urdf={urdf} --policy.tip={tip}: {told}") from error
    return kinematics


def _quat(quaternion: Tensor) -> Array:
    return quat_canonical(quaternion).numpy()


def _opening(value: float) -> float:
    return float(min(max(value / OPEN, 0.0), 1.0))
