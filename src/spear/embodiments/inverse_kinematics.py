"""Inverse kinematics of the Franka arm: converts end-effector poses to joint angles with MuJoCo.

The simulator and the embodiments that send joint commands use this module. It needs MuJoCo, which
is optional, so import it only where it is needed. `franka.xml` describes the arm: seven joints with
the published kinematics, a parallel gripper and a wrist camera. The base stands at the origin of
the base frame. The end-effector frame (site "ee") lies between the finger tips and is parallel to
the base frame when the gripper points straight down: x forward, y along the closing direction, z
up, away from the finger tips.
"""

import math
import threading
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

from spear.embodiments.kinematics import Poses

Floats = NDArray[np.float64]

# Franka's published limits of the joint velocities.
MAX_JOINT_SPEED_RAD_S = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
HOME_JOINTS_RAD = np.array(
    [0.0, -math.pi / 4, 0.0, -3 * math.pi / 4, 0.0, math.pi / 2, math.pi / 4]
)
"""A comfortable posture with the gripper pointing down."""

ARM = mujoco.MjModel.from_xml_path(str(Path(__file__).with_name("franka.xml")))
"""The arm alone, without a scene."""
JOINT_LOWER_RAD = ARM.jnt_range[:7, 0]
JOINT_UPPER_RAD = ARM.jnt_range[:7, 1]

_EE_SITE = ARM.site("ee").id
_ARM_DATA = mujoco.MjData(ARM)
_ARM_DATA_LOCK = threading.RLock()  # a server solves for several robots in different threads

_DAMPING = 0.02  # λ of the damped least squares, which keeps steps small near singular poses
_DAMPING_PER_SQUARED_ERROR = 1e3
"""The damping of an iteration is λ² · min(1, 1e3 · error²). So it becomes smaller once the error
(the norm of six numbers in m and rad) is below 1000^-½ = 0.03."""
_MIN_PIVOT = 1e-12  # the least diagonal entry with which MuJoCo factorizes a matrix
_POSTURE_GAIN = 0.05  # the fraction of the way to the preferred posture that one iteration goes
_JOINT_LIMIT_MARGIN_RAD = 0.01  # solutions stay so far inside the joint limits
_MAX_ITERATION_STEP_RAD = 0.4  # no joint turns further in one iteration
_POSITION_CONVERGED_M = 1e-5  # iteration ends when both errors are smaller than these
_ROTATION_CONVERGED_RAD = 1e-4


def get_ee_pose_matrix_in_flange() -> Floats:
    """Return the [4, 4] pose of the end-effector frame in the flange frame."""
    hand_angle_rad = -math.pi / 4  # the hand is mounted on the flange at this angle
    cos = math.cos(hand_angle_rad)
    sin = math.sin(hand_angle_rad)
    finger_tip_offset_m = ARM.site("ee").pos[2]
    # A rotation about z by this angle, then half a turn about x: our z points back to the flange.
    return np.array(
        [[cos, sin, 0, 0], [sin, -cos, 0, 0], [0, 0, -1, finger_tip_offset_m], [0, 0, 0, 1]]
    )


def compute_ee_pose(joints: Floats) -> Poses:
    """Compute the end-effector's pose from joint angles.

    Args:
        joints: [7] joint angles, rad.

    Returns:
        Position [3] (m) and quaternion [4] (w, x, y, z) in the base frame. The real part of the
        quaternion may be negative.
    """
    rotation = np.zeros(4)
    with _ARM_DATA_LOCK:
        _ARM_DATA.qpos[:7] = joints
        mujoco.mj_kinematics(ARM, _ARM_DATA)
        mujoco.mju_mat2Quat(rotation, _ARM_DATA.site_xmat[_EE_SITE])
        position = _ARM_DATA.site_xpos[_EE_SITE].copy()
    return Poses(position, rotation)


def solve_joints(
    joints: Floats,
    position: Floats,
    rotation: Floats,
    iterations: int = 20,
    posture: Floats = HOME_JOINTS_RAD,
) -> Floats:
    """Find joint angles at which the end-effector is as near to a target pose as possible.

    The solver takes damped least-squares steps and stays inside the joint limits.

    Args:
        joints: [7] angles to begin from, rad.
        position: [3] target, m, base frame.
        rotation: [4] target, unit quaternion (w, x, y, z), base frame.
        iterations: the largest number of steps.
        posture: [7] angles, rad, to which the arm's redundant degree of freedom is drawn.

    Returns:
        [7] joint angles, rad.
    """
    angles = np.array(joints)
    lower = JOINT_LOWER_RAD + _JOINT_LIMIT_MARGIN_RAD
    upper = JOINT_UPPER_RAD - _JOINT_LIMIT_MARGIN_RAD
    for _ in range(iterations):
        posture_step = _POSTURE_GAIN * (posture - angles)
        # `compute_ee_pose` leaves the arm at `angles`, where `_compute_damped_joint_step` needs it.
        with _ARM_DATA_LOCK:
            ee_position, ee_rotation = compute_ee_pose(angles)
            position_error = position - ee_position  # [3] m
            rotation_error = compute_rotation_vector(ee_rotation, rotation)  # [3] rad
            is_position_reached = compute_euclidean_norm(position_error) < _POSITION_CONVERGED_M
            is_rotation_reached = compute_euclidean_norm(rotation_error) < _ROTATION_CONVERGED_RAD
            if is_position_reached and is_rotation_reached:
                break
            error = np.concatenate([position_error, rotation_error])  # [6]
            # The step to the posture, and the step that corrects the error which then remains.
            step = posture_step + _compute_damped_joint_step(error, posture_step)
        largest_turn_rad = float(np.abs(step).max())
        step *= min(1.0, _MAX_ITERATION_STEP_RAD / largest_turn_rad)
        angles = np.clip(angles + step, lower, upper)
    return angles


def compute_euclidean_norm(vector: Floats) -> float:
    """Return the Euclidean norm of a vector. Unlike NumPy's, it is the same on every processor."""
    return math.hypot(*vector)


def compute_rotation_vector(start_quat: Floats, end_quat: Floats) -> Floats:
    """Return the rotation vector [3] (rad, base frame) that turns one quaternion into another."""
    # The functions of MuJoCo write their result into their first argument.
    conjugate = np.empty(4)
    relative = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_negQuat(conjugate, start_quat)
    mujoco.mju_mulQuat(relative, end_quat, conjugate)
    mujoco.mju_quat2Vel(vector, relative, 1.0)  # the angular velocity of this rotation in 1 s
    return vector


def _compute_damped_joint_step(error: Floats, posture_step: Floats) -> Floats:
    """Compute the step of the joints by which the end-effector's error shrinks most.

    With the arm's Jacobian J [6, 7], the step is Jᵀ (J Jᵀ + λ² I)⁻¹ (error - J posture_step). It
    corrects the error that remains after the step towards the posture. The damping λ shrinks with
    the error, so that the iteration converges.

    MuJoCo's routines compute it, because results of NumPy's matrix products differ in the last bit
    between processors, and in the simulator contacts turn one such bit into another episode.

    Args:
        error: [6] difference from the target pose: position (m) and rotation vector (rad).
        posture_step: [7] step towards the preferred posture, rad.

    Returns:
        [7] step, rad, at the pose that `compute_ee_pose` computed last.
    """
    full_jacobian = np.zeros((6, ARM.nv))
    mujoco.mj_comPos(ARM, _ARM_DATA)
    mujoco.mj_jacSite(ARM, _ARM_DATA, full_jacobian[:3], full_jacobian[3:], _EE_SITE)
    jacobian = np.ascontiguousarray(full_jacobian[:, :7])

    # The functions of MuJoCo write their result into their first argument.
    gram = np.empty((6, 6))  # J Jᵀ + λ² I, then its Cholesky factor
    mujoco.mju_mulMatMatT(gram, jacobian, jacobian)
    damping_factor = min(1.0, _DAMPING_PER_SQUARED_ERROR * compute_euclidean_norm(error) ** 2)
    gram[np.diag_indices(6)] += _DAMPING**2 * damping_factor
    mujoco.mju_cholFactor(gram, _MIN_PIVOT)

    posture_motion = np.empty(6)  # J posture_step
    weights = np.empty(6)
    step = np.empty(7)
    mujoco.mju_mulMatVec(posture_motion, jacobian, posture_step)
    mujoco.mju_cholSolve(weights, gram, error - posture_motion)
    mujoco.mju_mulMatTVec(step, jacobian, weights)
    return step
