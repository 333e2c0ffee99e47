"""The arm: seven joints with the published Franka kinematics, a parallel gripper and a wrist camera.

It is described in arm.xml, which world.xml has at a table. The base stands at the origin of the base frame,
on the table surface (z = 0).

The end-effector frame (site "ee") lies between the finger tips and is parallel to the base frame when the
gripper points straight down: x forward, y along the closing direction, z up, away from the finger tips (our
choice; BridgeData's convention too: the orientation of a gripper pointing down is near the identity).
"""

import functools
import math
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

SPEED_LIMIT = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
"""Joint speed limits, rad/s."""
HOME = np.array([0.0, -math.pi / 4, 0.0, -3 * math.pi / 4, 0.0, math.pi / 2, math.pi / 4])
"""A comfortable posture with the gripper pointing down, rad."""
HIDDEN_GROUP = 3
"""Geom group of collision shapes that no camera sees; 1 is the robot's."""


@functools.cache
def bare_model() -> mujoco.MjModel:
    """The arm alone, for kinematics."""
    return mujoco.MjModel.from_xml_path(str(Path(__file__).with_name("arm.xml")))


JOINT_LOWER, JOINT_UPPER = bare_model().jnt_range[:7].T
"""Joint limits, rad."""
FINGER_TRAVEL = float(bare_model().joint("finger1").range[1])
"""Each finger's travel, m: the gripper opens 8 cm."""
_STIFFNESS, _DAMPING = -bare_model().actuator_biasprm[:7, 1:3].T
LAG = _DAMPING / _STIFFNESS
"""Of the joints' servos: the joint angle (rad) by which one stays behind its command, per rad/s."""


def ee_from_flange() -> NDArray[np.float64]:
    """[4, 4] pose of the EE frame in the flange frame."""
    c, s = math.cos(-math.pi / 4), math.sin(-math.pi / 4)
    offset = bare_model().site("ee").pos[2]
    return np.array([[c, s, 0, 0], [s, -c, 0, 0], [0, 0, -1, offset], [0, 0, 0, 1]])
