"""Inverse kinematics of the Franka arm: end-effector poses to joint angles, on MuJoCo's model of
the arm.

The simulator and the embodiments that send joint commands use this module; it needs MuJoCo, so
import it late. `franka.xml` describes the arm: seven joints with the published kinematics, a
parallel gripper and a wrist camera. The base stands at the origin of the base frame. The
end-effector frame (site "ee") lies between the finger tips and is parallel to the base frame when
the gripper points straight down: x forward, y along the closing direction, z up, away from the
finger tips.
"""

import math
import threading
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

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
_ARM_DATA_LOCK = threading.RLock()  # a server's robots and its page solve from different threads

_DAMPING = 0.02
_POSTURE_GAIN = 0.05
_JOINT_LIMIT_MARGIN_RAD = 0.01
_MAX_ITERATION_STEP_RAD = 0.4
_POSITION_CONVERGED_M = 1e-5
_ROTATION_CONVERGED_RAD = 1e-4


def ee_from_flange() -> Floats:
    """Return the [4, 4] pose of the end-effector frame in the flange frame."""
    cos, sin = math.cos(-math.pi / 4), math.sin(-math.pi / 4)
    finger_tip_offset_m = ARM.site("ee").pos[2]
    return np.array(
        [[cos, sin, 0, 0], [sin, -cos, 0, 0], [0, 0, -1, finger_tip_offset_m], [0, 0, 0, 1]]
    )


def compute_ee_pose(joints: Floats) -> tuple[Floats, Floats]:
    """Compute the end-effector's position [3] (m) and quaternion [4] in the base frame from joints
    [7] (rad).

    The quaternion is not made canonical.
    """
    rotation = np.zeros(4)
    with _ARM_DATA_LOCK:
        _ARM_DATA.qpos[:7] = joints
        mujoco.mj_kinematics(ARM, _ARM_DATA)
        mujoco.mju_mat2Quat(rotation, _ARM_DATA.site_xmat[_EE_SITE])
        position = _ARM_DATA.site_xpos[_EE_SITE].copy()
    return position, rotation


def solve_joints(
    joints: Floats,
    position: Floats,
    rotation: Floats,
    iterations: int = 20,
    posture: Floats = HOME_JOINTS_RAD,
) -> Floats:
    """Find the joint angles that bring the end-effector as near to a target pose as possible.

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
        with _ARM_DATA_LOCK:  # `_solve_least_squares` needs the pose that `compute_ee_pose` sets
            ee_position, ee_rotation = compute_ee_pose(angles)
            error = np.concatenate(
                [position - ee_position, rotation_vector_between(ee_rotation, rotation)]
            )
            is_position_reached = euclidean_norm(error[:3]) < _POSITION_CONVERGED_M
            if is_position_reached and euclidean_norm(error[3:]) < _ROTATION_CONVERGED_RAD:
                break
            step = posture_step + _solve_least_squares(error, posture_step)
        step *= min(1.0, _MAX_ITERATION_STEP_RAD / float(np.abs(step).max()))
        angles = np.clip(angles + step, lower, upper)
    return angles


def euclidean_norm(vector: Floats) -> float:
    """Return the Euclidean norm, which is the same on every processor, unlike NumPy's."""
    return math.hypot(*vector)


def rotation_vector_between(start: Floats, end: Floats) -> Floats:
    """Return the rotation vector [3] (rad, base frame) that turns quaternion `start` into `end`."""
    conjugate = np.empty(4)
    relative = np.empty(4)
    vector = np.empty(3)
    mujoco.mju_negQuat(conjugate, start)
    mujoco.mju_mulQuat(relative, end, conjugate)
    mujoco.mju_quat2Vel(vector, relative, 1.0)
    return vector


def _solve_least_squares(error: Floats, posture_step: Floats) -> Floats:
    """Return Jᵀ (J Jᵀ + λ² I)⁻¹ (error - J posture_step), [7], at the pose last computed.

    MuJoCo's own routines compute it because NumPy's differ in the last bit between kinds of
    processors, and contacts turn one different bit into a different episode.
    """
    full_jacobian = np.zeros((6, ARM.nv))
    mujoco.mj_comPos(ARM, _ARM_DATA)
    mujoco.mj_jacSite(ARM, _ARM_DATA, full_jacobian[:3], full_jacobian[3:], _EE_SITE)
    jacobian = np.ascontiguousarray(full_jacobian[:, :7])

    gram = np.empty((6, 6))
    mujoco.mju_mulMatMatT(gram, jacobian, jacobian)
    gram[np.diag_indices(6)] += _DAMPING**2 * min(1.0, 1e3 * euclidean_norm(error) ** 2)
    mujoco.mju_cholFactor(gram, 1e-12)

    posture_error = np.empty(6)
    weights = np.empty(6)
    step = np.empty(7)
    mujoco.mju_mulMatVec(posture_error, jacobian, posture_step)
    mujoco.mju_cholSolve(weights, gram, error - posture_error)
    mujoco.mju_mulMatTVec(step, jacobian, weights)
    return step
