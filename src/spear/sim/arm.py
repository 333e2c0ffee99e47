"""The arm: seven joints with the published Franka kinematics, a parallel gripper and a wrist camera.

It is made of primitives (arm.toml). Joint origins and limits are the manufacturer's; the rest is our choice.
The base stands at the origin of the base frame, on the table surface (z = 0).

The end-effector frame (site "ee") lies between the finger tips and is parallel to the base frame when the
gripper points straight down: x forward, y along the closing direction, z up, away from the finger tips (our
choice; BridgeData's convention too: the orientation of a gripper pointing down is near the identity).
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path

import mujoco
import numpy as np
from numpy.typing import NDArray

JOINT_ORIGINS = (
    ((0.0, 0.0, 0.333), 0.0),
    ((0.0, 0.0, 0.0), -math.pi / 2),
    ((0.0, -0.316, 0.0), math.pi / 2),
    ((0.0825, 0.0, 0.0), math.pi / 2),
    ((-0.0825, 0.384, 0.0), -math.pi / 2),
    ((0.0, 0.0, 0.0), math.pi / 2),
    ((0.088, 0.0, 0.0), math.pi / 2),
)
"""Each joint frame in the one before it: translation (m), turn about x (rad). Joints turn about z."""
JOINT_LOWER = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_UPPER = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
"""Joint limits, rad."""
SPEED_LIMIT = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
"""Joint speed limits, rad/s."""
TORQUE_LIMIT = np.array([87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0])
"""Joint torque limits, N·m."""
HOME = np.array([0.0, -math.pi / 4, 0.0, -3 * math.pi / 4, 0.0, math.pi / 2, math.pi / 4])
"""A comfortable posture with the gripper pointing down, rad."""
FLANGE = 0.107
"""From joint 7 to the flange, along z, m."""
EE_OFFSET = 0.1034
"""From the flange to the point between the finger tips, along z, m."""
FINGER_TRAVEL = 0.04
"""Each finger's travel, m: the gripper opens 8 cm."""
STIFFNESS = np.array([9000.0, 9000.0, 7000.0, 7000.0, 2500.0, 2500.0, 1500.0])
DAMPING = np.array([140.0, 140.0, 100.0, 100.0, 30.0, 30.0, 20.0])
"""Position-servo gains, N·m/rad and N·m·s/rad (our choice: stiff, near critical damping)."""
ROBOT_GROUP = 1
HIDDEN_GROUP = 3
"""Geom groups: what belongs to the robot; collision shapes that no camera sees."""

_Vec3 = tuple[float, float, float]
_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
WHITE, GREY, DARK, PAD = (_DATA["palette"][name] for name in ("white", "grey", "dark", "pad"))


def quat_about(axis: str, angle: float) -> list[float]:
    """Quaternion (w, x, y, z) of a turn by `angle` rad about a coordinate axis."""
    quat = [math.cos(angle / 2), 0.0, 0.0, 0.0]
    quat["xyz".index(axis) + 1] = math.sin(angle / 2)
    return quat


def add_arm(spec: mujoco.MjSpec) -> None:
    """Add the arm to `spec`: bodies, joints joint1 … joint7 and finger1, finger2, actuators, camera, EE site.

    Actuators come in joint order: seven position servos (rad), then one per finger (m, 0 closed).
    """
    body = spec.worldbody.add_body(name="link0")
    _shape(body, "cylinder", (0.085,), (0, 0, 0), (0, 0, 0.03), DARK)
    _shape(body, "cylinder", (0.072,), (0, 0, 0.03), (0, 0, 0.14), WHITE)
    _shape(body, "box", (0.055, 0.05, 0.03), (-0.08, 0, 0.03), None, WHITE)
    _shape(body, "cylinder", (0.064,), (0, 0, 0.14), (0, 0, 0.16), GREY)
    for i, ((pos, turn), link) in enumerate(zip(JOINT_ORIGINS, _DATA["links"], strict=True)):
        body = body.add_body(name=f"link{i + 1}", pos=pos, quat=quat_about("x", turn), gravcomp=1.0)
        body.add_joint(
            name=f"joint{i + 1}",
            axis=[0, 0, 1],
            range=[JOINT_LOWER[i], JOINT_UPPER[i]],
            limited=mujoco.mjtLimited.mjLIMITED_TRUE,
            armature=0.1,
        )
        for j, shape in enumerate(link["shapes"]):
            color = _DATA["palette"][shape["color"]]
            mass = link["mass"] if j == 0 else 0.0
            _shape(body, shape["kind"], shape["size"], shape["start"], shape["end"], color, mass)
        _servo(spec, f"joint{i + 1}", STIFFNESS[i], DAMPING[i], TORQUE_LIMIT[i])
    _add_gripper(spec, body)


def _add_gripper(spec: mujoco.MjSpec, flange: mujoco.MjsBody) -> None:
    hand = flange.add_body(name="hand", pos=[0, 0, FLANGE], quat=quat_about("z", -math.pi / 4), gravcomp=1.0)
    _shape(hand, "box", (0.026, 0.088, 0.022), (0, 0, 0.036), None, WHITE, mass=0.4, collide=True)
    _shape(hand, "capsule", (0.026,), (0, -0.076, 0.026), (0, 0.076, 0.026), WHITE)
    _shape(hand, "box", (0.020, 0.092, 0.004), (0, 0, 0.060), None, DARK)
    _shape(hand, "box", (0.012, 0.012, 0.006), (0.036, 0, 0.016), None, GREY)
    _shape(hand, "box", (0.013, 0.038, 0.009), (0.060, 0, 0.006), None, DARK)
    tilt = math.radians(17)
    hand.add_camera(
        name="wrist",
        pos=[0.068, 0, 0.016],
        # looks along the fingers, leaning towards them; the top of the image points away from the base
        xyaxes=[0, 1, 0, math.cos(tilt), 0, math.sin(tilt)],
        fovy=76,
    )
    hand.add_site(name="ee", pos=[0, 0, EE_OFFSET], quat=quat_about("x", math.pi), group=5)
    for k, side in ((1, 1.0), (2, -1.0)):
        finger = hand.add_body(name=f"finger{k}", pos=[0, 0, 0.0584], gravcomp=1.0)
        finger.add_joint(
            name=f"finger{k}",
            type=mujoco.mjtJoint.mjJNT_SLIDE,
            axis=[0, side, 0],
            range=[0, FINGER_TRAVEL],
            limited=mujoco.mjtLimited.mjLIMITED_TRUE,
            armature=0.2,
        )
        _shape(finger, "box", (0.0105, 0.0075, 0.012), (0, side * 0.0115, 0.010), None, GREY, mass=0.05)
        _shape(finger, "box", (0.0105, 0.0050, 0.020), (0, side * 0.0090, 0.034), None, GREY, mass=0.05)
        pad = _shape(
            finger, "box", (0.0095, 0.0040, 0.014), (0, side * 0.0040, 0.041), None, PAD, collide=True
        )
        pad.name = f"pad{k}"
        pad.friction = [1.6, 0.03, 0.002]
        pad.condim = 4
        pad.priority = 1
        _servo(spec, f"finger{k}", 900.0, 45.0, 22.0)


def _servo(spec: mujoco.MjSpec, joint: str, stiffness: float, damping: float, limit: float) -> None:
    actuator = spec.add_actuator(name=joint, target=joint, trntype=mujoco.mjtTrn.mjTRN_JOINT)
    actuator.gainprm[0] = stiffness
    actuator.biastype = mujoco.mjtBias.mjBIAS_AFFINE
    actuator.biasprm[:3] = [0, -stiffness, -damping]
    actuator.forcelimited = mujoco.mjtLimited.mjLIMITED_TRUE
    actuator.forcerange = [-limit, limit]


def _shape(
    body: mujoco.MjsBody,
    kind: str,
    size: tuple[float, ...],
    start: _Vec3,
    end: _Vec3 | None,
    rgba: tuple[float, ...],
    mass: float = 0.0,
    collide: bool = False,
) -> mujoco.MjsGeom:
    geom = body.add_geom(rgba=rgba, mass=mass, group=ROBOT_GROUP)
    if kind == "box":
        geom.type = mujoco.mjtGeom.mjGEOM_BOX
        geom.size = size
        geom.pos = start
    else:
        geom.type = mujoco.mjtGeom.mjGEOM_CAPSULE if kind == "capsule" else mujoco.mjtGeom.mjGEOM_CYLINDER
        geom.size[0] = size[0]
        geom.fromto = [*start, *(end or start)]
    # robot parts touch objects and the table, never each other
    geom.contype, geom.conaffinity = (2, 0) if collide else (0, 0)
    return geom


def bare_model() -> mujoco.MjModel:
    """The arm alone, for kinematics."""
    spec = mujoco.MjSpec()
    spec.compiler.degree = False
    add_arm(spec)
    return spec.compile()


def ee_from_flange() -> NDArray[np.float64]:
    """[4, 4] pose of the EE frame in the flange frame."""
    c, s = math.cos(-math.pi / 4), math.sin(-math.pi / 4)
    return np.array([[c, s, 0, 0], [s, -c, 0, 0], [0, 0, -1, EE_OFFSET], [0, 0, 0, 1]])
