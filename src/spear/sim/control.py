"""The arm, and from end-effector actions to joint motion: inverse kinematics and the servo that follows it.

The arm has seven joints with the published Franka kinematics, a parallel gripper and a wrist camera; arm.xml
describes it, which world.xml has at a table. The base stands at the origin of the base frame, on the table
surface (z = 0). The end-effector frame (site "ee") lies between the finger tips and is parallel to the base
frame when the gripper points straight down: x forward, y along the closing direction, z up, away from the
finger tips (our choice, and BridgeData's: the orientation of a gripper pointing down is near the identity).

A damped-least-squares solver turns end-effector targets into joint angles, which stiff position servos follow
during the 0.2 s of a control step. Each target adds to the one before, which is kept close to where the arm
really is, so that a blocked arm does not wind up.
"""

import math
import threading
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.errors import SpearError
from spear.geometry import UNIT_TOLERANCE

Floats = NDArray[np.float64]

SPEED_LIMIT = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
"""Joint speed limits, rad/s."""
HOME = np.array([0.0, -math.pi / 4, 0.0, -3 * math.pi / 4, 0.0, math.pi / 2, math.pi / 4])
"""A comfortable posture with the gripper pointing down, rad."""
HIDDEN_GROUP = 3
"""Geom group of collision shapes that no camera sees; 1 is the robot's."""

_ARM = mujoco.MjModel.from_xml_path(str(Path(__file__).with_name("arm.xml")))
_STATE, _SITE, _ALONE = mujoco.MjData(_ARM), _ARM.site("ee").id, threading.RLock()
"""The arm alone, for kinematics of one thread at a time: a server's robots and its page move at once."""
JOINT_LOWER, JOINT_UPPER = _ARM.jnt_range[:7].T
"""Joint limits, rad."""
FINGER_TRAVEL = float(_ARM.joint("finger1").range[1])
"""Each finger's travel, m: the gripper opens 8 cm."""
_stiffness, _held_back = -_ARM.actuator_biasprm[:7, 1:3].T
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
_DAMPING = 0.02
_POSTURE_GAIN = 0.05
_MARGIN = 0.01


def ee_from_flange() -> Floats:
    """[4, 4] pose of the EE frame in the flange frame."""
    c, s = math.cos(-math.pi / 4), math.sin(-math.pi / 4)
    return np.array([[c, s, 0, 0], [s, -c, 0, 0], [0, 0, -1, _ARM.site("ee").pos[2]], [0, 0, 0, 1]])


def pose(joints: Floats) -> tuple[Floats, Floats]:
    """([3] position m, [4] quaternion) of the end-effector in the base frame; `joints` [7] rad."""
    quat = np.zeros(4)
    with _ALONE:
        _STATE.qpos[:7] = joints
        mujoco.mj_kinematics(_ARM, _STATE)
        mujoco.mju_mat2Quat(quat, _STATE.site_xmat[_SITE])
        return _STATE.site_xpos[_SITE].copy(), quat


def solve(
    joints: Floats, position: Floats, rotation: Floats, iterations: int = 20, posture: Floats = HOME
) -> Floats:
    """[7] joint angles, inside the limits, that bring the end-effector as near to the target as found.

    Damped least squares from `joints`; the arm's spare freedom pulls towards `posture`.
    """
    q = np.array(joints)
    lower, upper = JOINT_LOWER + _MARGIN, JOINT_UPPER - _MARGIN
    for _ in range(iterations):
        home = _POSTURE_GAIN * (posture - q)
        with _ALONE:
            at, turn = pose(q)
            error = np.concatenate([position - at, rotation_vector(turn, rotation)])
            if length(error[:3]) < 1e-5 and length(error[3:]) < 1e-4:
                break
            step = home + _least_squares(error, home)
        step *= min(1.0, 0.4 / float(np.abs(step).max()))
        q = np.clip(q + step, lower, upper)
    return q


def _least_squares(error: Floats, home: Floats) -> Floats:
    """[7] Jᵀ (J Jᵀ + λ² I)⁻¹ (error - J home), at the pose last asked for.

    MuJoCo's own routines compute it: NumPy's differ in the last bit between kinds of processors, and contacts
    make a different episode of a last bit.
    """
    jacobian = np.zeros((6, _ARM.nv))
    mujoco.mj_comPos(_ARM, _STATE)
    mujoco.mj_jacSite(_ARM, _STATE, jacobian[:3], jacobian[3:], _SITE)
    j = np.ascontiguousarray(jacobian[:, :7])
    gram, left, solved, step = np.empty((6, 6)), np.empty(6), np.empty(6), np.empty(7)
    mujoco.mju_mulMatMatT(gram, j, j)
    gram[np.diag_indices(6)] += _DAMPING**2 * min(1.0, 1e3 * length(error) ** 2)
    mujoco.mju_cholFactor(gram, 1e-12)
    mujoco.mju_mulMatVec(left, j, home)
    mujoco.mju_cholSolve(solved, gram, error - left)
    mujoco.mju_mulMatTVec(step, j, solved)
    return step


class Servo:
    """Moves the arm of one world. Poses: metres, quaternions (w, x, y, z), base frame."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model, self._data = model, data
        self._site = model.site("ee").id
        start = int(model.joint("joint1").qposadr[0])
        self._joints = slice(start, start + 7)
        self._fingers = slice(start + 7, start + 9)
        self._command = np.array(HOME)
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
        self._command = solve(HOME, position, rotation, iterations=60)
        self._data.qpos[self._joints] = self._data.ctrl[:7] = self._command
        self._data.qpos[self._fingers] = self._data.ctrl[7:9] = opening * FINGER_TRAVEL
        mujoco.mj_kinematics(self._model, self._data)
        self._position, self._rotation = pose(self._command)

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
        goal = solve(self._command, position, quat)
        reached, reached_turn = pose(goal)
        off, turned = length(reached - position), length(rotation_vector(reached_turn, quat))
        missed = off > TOLERANCE[0] or turned > TOLERANCE[1]
        step = goal - self._command
        excess = float((np.abs(step) / (SPEED_LIMIT * SUBSTEPS * self._model.opt.timestep)).max())
        if excess > 1:
            goal = self._command + step / excess
            reached, reached_turn = pose(goal)
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


def length(vector: Floats) -> float:
    """The Euclidean norm, the same on every processor, which NumPy's is not."""
    return math.hypot(*vector)


def rotation_vector(start: Floats, end: Floats) -> Floats:
    """[3] rotation vector (rad, base frame) that turns orientation `start` into `end` (quaternions)."""
    conjugate, relative, vector = np.empty(4), np.empty(4), np.empty(3)
    mujoco.mju_negQuat(conjugate, start)
    mujoco.mju_mulQuat(relative, end, conjugate)
    mujoco.mju_quat2Vel(vector, relative, 1.0)
    return vector


def check_action(action: NDArray[np.floating]) -> tuple[Floats, Floats, float]:
    """Translation [3], unit quaternion [4] and opening of an action [8]. Raises `SpearError`."""
    values = np.asarray(action, np.float64)
    if values.shape != (8,):
        raise SpearError(
            f"action: shape {values.shape}: give 8 numbers: translation, quaternion, gripper"
        )
    if not np.isfinite(values).all():
        raise SpearError(f"action: {values.tolist()}: every number must be finite")
    norm = length(values[3:7])
    if abs(norm - 1.0) > UNIT_TOLERANCE:
        raise SpearError(
            f"action: quaternion of norm {norm:.4f}: give a unit quaternion (w, x, y, z)"
        )
    return values[:3], values[3:7] / norm, float(values[7])


def _leash(
    position: Floats, rotation: Floats, measured: Floats, turn: Floats
) -> tuple[Floats, Floats]:
    """The target (position, rotation) drawn within `LEASH` of the measured pose."""
    offset, apart = _shorten(position - measured, LEASH[0]), rotation_vector(turn, rotation)
    if length(apart) <= LEASH[1]:
        return measured + offset, rotation.copy()
    step, quat, difference = np.empty(4), np.empty(4), _shorten(apart, LEASH[1])
    angle = length(difference)
    mujoco.mju_axisAngle2Quat(step, difference / angle, angle)
    mujoco.mju_mulQuat(quat, step, turn)
    return measured + offset, quat


def _shorten(vector: Floats, longest: float) -> Floats:
    norm = length(vector)
    return vector if norm <= longest else vector * (longest / norm)
