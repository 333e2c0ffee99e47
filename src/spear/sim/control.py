"""From end-effector actions to joint motion: the servo that follows the inverse kinematics.

`embodiments/franka.xml` describes the arm, and world.xml puts it at a table. The base stands at the origin of
the base frame, on the table surface (z = 0). The axes of the end-effector frame are our choice, and
BridgeData's: the orientation of a gripper pointing down is near the identity.

A damped-least-squares solver turns end-effector targets into joint angles, which stiff position servos follow
during the 0.2 s of a control step. Each target adds to the one before, which is kept close to where the arm
really is, so that a blocked arm does not wind up.
"""

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.inverse_kinematics import (
    ARM,
    HOME_JOINTS_RAD,
    MAX_JOINT_SPEED_RAD_S,
    Floats,
    compute_ee_pose,
    euclidean_norm,
    rotation_vector_between,
    solve_joints,
)
from spear.errors import SpearError
from spear.geometry import UNIT_NORM_TOLERANCE

HIDDEN_GROUP = 3
"""Geom group of collision shapes that no camera sees; 1 is the robot's."""

FINGER_TRAVEL = float(ARM.joint("finger1").range[1])
"""Each finger's travel, m: the gripper opens 8 cm."""
_stiffness, _held_back = -ARM.actuator_biasprm[:7, 1:3].T
LAG = _held_back / _stiffness
"""Of the joints' servos: the joint angle (rad) by which one stays behind its command, per rad/s."""
LEASH = (0.03, np.deg2rad(15.0))
"""How far the target may be from the measured pose before an action is added to it: m, rad."""
MAX_STEP = (0.12, np.deg2rad(45.0))
"""The largest displacement that one action asks for, m and rad; larger ones are shortened."""
SUBSTEPS = 50
"""Physics steps (of 4 ms) per control step: 5 Hz."""
FLOOR = 0.004
"""The finger tips' middle is never sent below this height over the table, m."""
TOLERANCE = (0.004, np.deg2rad(2.0))
"""A target counts as unreachable when the solver ends farther from it than this, m and rad."""


class Servo:
    """Moves the arm of one world. Poses: metres, quaternions (w, x, y, z), base frame."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model, self._data = model, data
        self._site = model.site("ee").id
        start = int(model.joint("joint1").qposadr[0])
        self._joints = slice(start, start + 7)
        self._fingers = slice(start + 7, start + 9)
        self._command = np.array(HOME_JOINTS_RAD)
        self._position, self._rotation = np.zeros(3), np.array([1.0, 0, 0, 0])

    def pose(self) -> tuple[Floats, Floats]:
        """Measured ([3], [4]) end-effector pose, quaternion with w >= 0."""
        quat = np.zeros(4)
        mujoco.mju_mat2Quat(quat, self._data.site_xmat[self._site])
        return self._data.site_xpos[self._site].copy(), quat if quat[0] >= 0 else -quat

    def opening(self) -> float:
        """Measured gripper opening, 0 closed … 1 open."""
        return float(np.clip(self._data.qpos[self._fingers].sum() / (2 * FINGER_TRAVEL), 0.0, 1.0))

    def place(self, position: Floats, rotation: Floats, opening: float) -> None:
        """Put the arm at a pose at once, at rest (as near as it can reach)."""
        self._command = solve_joints(HOME_JOINTS_RAD, position, rotation, iterations=60)
        self._data.qpos[self._joints] = self._data.ctrl[:7] = self._command
        self._data.qpos[self._fingers] = self._data.ctrl[7:9] = opening * FINGER_TRAVEL
        mujoco.mj_kinematics(self._model, self._data)
        self._position, self._rotation = compute_ee_pose(self._command)

    def move(self, translation: Floats, rotation: Floats, opening: float) -> bool:
        """One control step: move the target by `translation` (m, base frame) and the quaternion `rotation`
        (end-effector frame), open (>= 0.5) or close the gripper, and run the physics. Returns whether the
        target was out of reach."""
        measured, turn = self.pose()
        position, quat = _leash(self._position, self._rotation, measured, turn)
        translation = _shorten(translation, MAX_STEP[0])
        delta = np.zeros(3)
        mujoco.mju_quat2Vel(delta, rotation, 1.0)
        delta = _shorten(delta, MAX_STEP[1])
        position = position + translation
        low = position[2] < FLOOR
        position[2] = max(position[2], FLOOR)
        mujoco.mju_quatIntegrate(quat, delta, 1.0)
        goal = solve_joints(self._command, position, quat)
        reached, reached_turn = compute_ee_pose(goal)
        off, turned = (
            euclidean_norm(reached - position),
            euclidean_norm(rotation_vector_between(reached_turn, quat)),
        )
        missed = off > TOLERANCE[0] or turned > TOLERANCE[1]
        step = goal - self._command
        excess = float(
            (np.abs(step) / (MAX_JOINT_SPEED_RAD_S * SUBSTEPS * self._model.opt.timestep)).max()
        )
        if excess > 1:
            goal = self._command + step / excess
            reached, reached_turn = compute_ee_pose(goal)
        # a target that is not reached does not run ahead of the arm
        out = missed or excess > 1
        self._position, self._rotation = (reached, reached_turn) if out else (position, quat)
        path = np.linspace(self._command, goal, SUBSTEPS + 1)[1:]
        # lead the servo by what its damping holds back; the last steps let it settle
        path[:-1] += LAG * ((goal - self._command) / (SUBSTEPS * self._model.opt.timestep))
        self._data.ctrl[7:9] = FINGER_TRAVEL if opening >= 0.5 else 0.0
        for row in path:
            self._data.ctrl[:7] = row
            mujoco.mj_step(self._model, self._data)
        # positions that belong to the new joint angles, for whoever looks next
        mujoco.mj_kinematics(self._model, self._data)
        self._command = goal
        return bool(missed or low)


def check_action(action: NDArray[np.floating]) -> tuple[Floats, Floats, float]:
    """Translation [3], unit quaternion [4] and opening of an action [8]. Raises `SpearError`."""
    values = np.asarray(action, np.float64)
    if values.shape != (8,):
        raise SpearError(
            f"action: shape {values.shape}: give 8 numbers: translation, quaternion, gripper"
        )
    if not np.isfinite(values).all():
        raise SpearError(f"action: {values.tolist()}: every number must be finite")
    norm = euclidean_norm(values[3:7])
    if abs(norm - 1.0) > UNIT_NORM_TOLERANCE:
        raise SpearError(
            f"action: quaternion of norm {norm:.4f}: give a unit quaternion (w, x, y, z)"
        )
    return values[:3], values[3:7] / norm, float(values[7])


def _leash(
    position: Floats, rotation: Floats, measured: Floats, turn: Floats
) -> tuple[Floats, Floats]:
    """The target (position, rotation) drawn within `LEASH` of the measured pose."""
    offset, apart = _shorten(position - measured, LEASH[0]), rotation_vector_between(turn, rotation)
    if euclidean_norm(apart) <= LEASH[1]:
        return measured + offset, rotation.copy()
    step, quat, difference = np.empty(4), np.empty(4), _shorten(apart, LEASH[1])
    angle = euclidean_norm(difference)
    mujoco.mju_axisAngle2Quat(step, difference / angle, angle)
    mujoco.mju_mulQuat(quat, step, turn)
    return measured + offset, quat


def _shorten(vector: Floats, longest: float) -> Floats:
    norm = euclidean_norm(vector)
    return vector if norm <= longest else vector * (longest / norm)
