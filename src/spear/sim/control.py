"""From end-effector actions to joint motion: the servo that follows the inverse kinematics.

`embodiments/franka.xml` describes the arm, and world.xml puts it at a table. The base stands at the
origin of the base frame, on the table surface (z = 0). The end-effector frame has the axes that
BridgeData uses, too (our choice): the orientation of a gripper pointing down is near the identity.

The *target* is the end-effector pose that the arm should reach by the end of a control step (0.2
s). An action moves the target. A damped-least-squares solver turns the target into joint angles,
which stiff position servos follow. The target never runs far ahead of the measured pose. Otherwise
the actions of a blocked arm would add up, and the arm would jump when it comes free.
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
    compute_euclidean_norm,
    compute_rotation_vector,
    solve_joints,
)
from spear.embodiments.kinematics import Poses
from spear.errors import SpearError
from spear.geometry import UNIT_NORM_TOLERANCE

NUM_JOINTS = 7  # of the arm, without the fingers
HIDDEN_GROUP = 3
"""MuJoCo's geom group of collision shapes that no camera sees. The robot has group 1."""

# How far each finger moves. The gripper opens by twice as much, 8 cm.
FINGER_TRAVEL_M = float(ARM.joint("finger1").range[1])
PHYSICS_STEPS_PER_CONTROL_STEP = 50  # physics steps take 4 ms, so the control rate is 5 Hz

_SERVO_STIFFNESS = -ARM.actuator_biasprm[:NUM_JOINTS, 1]
_SERVO_DAMPING = -ARM.actuator_biasprm[:NUM_JOINTS, 2]
SERVO_LAG_S = _SERVO_DAMPING / _SERVO_STIFFNESS
"""By how much a moving joint stays behind its command, [7] rad per rad/s."""

# How far the target may be from the measured pose before an action moves the target on.
MAX_LEAD_M = 0.03
MAX_LEAD_RAD = np.deg2rad(15.0)
MAX_STEP_M = 0.12  # the largest displacement of one action; larger ones are shortened
MAX_STEP_RAD = np.deg2rad(45.0)  # the same for rotations
MIN_EE_HEIGHT_M = 0.004  # the target is never lower above the table than this
# A target counts as out of reach if the solver's pose misses the target by more than this.
REACHED_TOLERANCE_M = 0.004
REACHED_TOLERANCE_RAD = np.deg2rad(2.0)

IsOutOfReach = bool  # whether an action asks for a pose that the arm cannot reach


class Servo:
    """Moves the arm of one world. Poses are in meters, quaternions (w, x, y, z), base frame."""

    def __init__(self, model: mujoco.MjModel, data: mujoco.MjData) -> None:
        self._model = model
        self._data = data
        self._ee_site = model.site("ee").id
        first_joint = int(model.joint("joint1").qposadr[0])
        self._joints = slice(first_joint, first_joint + NUM_JOINTS)
        self._fingers = slice(first_joint + NUM_JOINTS, first_joint + NUM_JOINTS + 2)
        # The joint angles at the end of the last action, and the target that they belong to.
        self._joint_command = np.array(HOME_JOINTS_RAD)
        self._target_position = np.zeros(3)
        self._target_rotation = np.array([1.0, 0, 0, 0])

    def measure_pose(self) -> Poses:
        """Return the end-effector's position [3] and quaternion [4], with w >= 0."""
        rotation = np.zeros(4)
        mujoco.mju_mat2Quat(rotation, self._data.site_xmat[self._ee_site])
        position = self._data.site_xpos[self._ee_site].copy()
        if rotation[0] < 0:  # q and -q are the same rotation
            rotation = -rotation
        return Poses(position, rotation)

    def measure_opening(self) -> float:
        """Return the gripper opening, 0 closed … 1 open."""
        travel = self._data.qpos[self._fingers].sum()
        return float(np.clip(travel / (2 * FINGER_TRAVEL_M), 0.0, 1.0))

    def set_pose(self, position: Floats, rotation: Floats, opening: float) -> None:
        """Put the resting arm at a pose at once, or as near to the pose as the arm can reach."""
        # More iterations than for a step of motion, because the home pose may be far away.
        self._joint_command = solve_joints(HOME_JOINTS_RAD, position, rotation, iterations=60)
        self._data.qpos[self._joints] = self._joint_command
        self._data.ctrl[:NUM_JOINTS] = self._joint_command
        finger_position = opening * FINGER_TRAVEL_M
        self._data.qpos[self._fingers] = finger_position
        self._data.ctrl[NUM_JOINTS : NUM_JOINTS + 2] = finger_position
        mujoco.mj_kinematics(self._model, self._data)
        self._target_position, self._target_rotation = compute_ee_pose(self._joint_command)

    def move_for_one_control_step(
        self, translation: Floats, rotation: Floats, opening: float
    ) -> IsOutOfReach:
        """Move the target, and run the physics for one control step.

        Args:
            translation: [3], displacement of the target, m, base frame.
            rotation: [4], quaternion by which the target turns, end-effector frame.
            opening: the gripper opens for 0.5 and above, and closes below 0.5.

        Returns:
            Whether the target was out of reach.
        """
        # The new target, and joint angles with which the arm reaches the target.
        target_position, target_rotation, is_too_low = self._compute_next_target_above_table(
            translation, rotation
        )
        joints = solve_joints(self._joint_command, target_position, target_rotation)
        reached_position, reached_rotation = compute_ee_pose(joints)
        is_missed = _is_target_missed(
            reached_position, reached_rotation, target_position, target_rotation
        )

        # If a joint would be too fast, all joints make a shorter step in the same direction.
        control_step_s = PHYSICS_STEPS_PER_CONTROL_STEP * self._model.opt.timestep
        step = joints - self._joint_command  # [7] rad
        speed_ratio = float((np.abs(step) / self._compute_max_joint_step()).max())
        if speed_ratio > 1:
            joints = self._joint_command + step / speed_ratio
            reached_position, reached_rotation = compute_ee_pose(joints)

        # If the arm does not reach the target, the target becomes the pose that the arm reaches.
        if is_missed or speed_ratio > 1:
            target_position = reached_position
            target_rotation = reached_rotation
        self._target_position = target_position
        self._target_rotation = target_rotation

        # One joint command per physics step, [num_steps, 7], on a straight path. The commands lead
        # the path by the lag of the servos. Only the last one does not, so that the arm settles.
        num_steps = PHYSICS_STEPS_PER_CONTROL_STEP
        path = np.linspace(self._joint_command, joints, num_steps + 1)[1:]
        path[:-1] += SERVO_LAG_S * ((joints - self._joint_command) / control_step_s)
        should_open = opening >= 0.5
        self._data.ctrl[NUM_JOINTS : NUM_JOINTS + 2] = FINGER_TRAVEL_M if should_open else 0.0
        for joint_command in path:
            self._data.ctrl[:NUM_JOINTS] = joint_command
            mujoco.mj_step(self._model, self._data)

        # Compute the positions that belong to the new joint angles, for later measurements.
        mujoco.mj_kinematics(self._model, self._data)
        self._joint_command = joints
        return bool(is_missed or is_too_low)

    def _compute_next_target_above_table(
        self, translation: Floats, rotation: Floats
    ) -> tuple[Floats, Floats, bool]:
        """Return the target after an action, without changing the stored target.

        Returns:
            The new position, the new rotation, and whether the action asks for a position in the
            table. The new position is then above the table nevertheless.
        """
        measured_position, measured_rotation = self.measure_pose()
        target_position = _limit_position_lead(self._target_position, measured_position)
        target_rotation = _limit_rotation_lead(self._target_rotation, measured_rotation)

        translation = _shorten(translation, MAX_STEP_M)
        rotation_vector = np.zeros(3)
        mujoco.mju_quat2Vel(rotation_vector, rotation, 1.0)
        rotation_vector = _shorten(rotation_vector, MAX_STEP_RAD)

        target_position = target_position + translation
        is_too_low = target_position[2] < MIN_EE_HEIGHT_M
        target_position[2] = max(target_position[2], MIN_EE_HEIGHT_M)
        mujoco.mju_quatIntegrate(target_rotation, rotation_vector, 1.0)  # changes target_rotation
        return target_position, target_rotation, is_too_low

    def _compute_max_joint_step(self) -> Floats:
        """How far each joint can move in a control step, [7] rad."""
        num_steps = PHYSICS_STEPS_PER_CONTROL_STEP
        return MAX_JOINT_SPEED_RAD_S * num_steps * self._model.opt.timestep


def validate_and_split_action(action: NDArray[np.floating]) -> tuple[Floats, Floats, float]:
    """Return translation [3], unit quaternion [4] and opening of an action [8].

    Raises `SpearError` if `action` is not 8 finite numbers with a unit quaternion.
    """
    values = np.asarray(action, np.float64)
    if values.shape != (8,):
        raise SpearError(
            f"the action has the shape {values.shape}. Give 8 numbers (translation, quaternion, "
            "gripper)."
        )
    if not np.isfinite(values).all():
        raise SpearError(f"the action is {values.tolist()}. Every number must be finite.")
    norm = compute_euclidean_norm(values[3:7])
    if abs(norm - 1.0) > UNIT_NORM_TOLERANCE:
        raise SpearError(
            f"the quaternion of the action has norm {norm:.4f}. Give a unit quaternion (w, x, "
            "y, z)."
        )
    return values[:3], values[3:7] / norm, float(values[7])


def _is_target_missed(
    position: Floats, rotation: Floats, target_position: Floats, target_rotation: Floats
) -> bool:
    """Return whether a pose is farther from a target than the tolerance."""
    distance_m = compute_euclidean_norm(position - target_position)
    angle_rad = compute_euclidean_norm(compute_rotation_vector(rotation, target_rotation))
    return distance_m > REACHED_TOLERANCE_M or angle_rad > REACHED_TOLERANCE_RAD


def _limit_position_lead(target: Floats, measured: Floats) -> Floats:
    """Return the target position, moved to at most `MAX_LEAD_M` from the measured position."""
    return measured + _shorten(target - measured, MAX_LEAD_M)


def _limit_rotation_lead(target: Floats, measured: Floats) -> Floats:
    """Return a copy of the target rotation, turned to at most `MAX_LEAD_RAD` from `measured`."""
    difference = compute_rotation_vector(measured, target)
    if compute_euclidean_norm(difference) <= MAX_LEAD_RAD:
        return target.copy()
    difference = _shorten(difference, MAX_LEAD_RAD)
    angle_rad = compute_euclidean_norm(difference)
    step = np.empty(4)
    rotation = np.empty(4)
    mujoco.mju_axisAngle2Quat(step, difference / angle_rad, angle_rad)
    mujoco.mju_mulQuat(rotation, step, measured)
    return rotation


def _shorten(vector: Floats, max_length: float) -> Floats:
    """Return the vector, or a vector of `max_length` in its direction if it is longer."""
    norm = compute_euclidean_norm(vector)
    return vector if norm <= max_length else vector * (max_length / norm)
