"""Forward kinematics of any arm that a URDF describes: converts joint angles to poses of a link.

Readers of datasets use this module for recordings that contain joint angles only. Of the URDF, only
links and joints are read, so it needs no meshes. `spear.embodiments.kinematics` has the Franka's
arm without a file.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import numpy as np
import torch

from spear.embodiments.kinematics import Poses
from spear.errors import (
    MAX_LISTED_NAMES,
    SpearError,
    format_alternatives,
    format_count,
    make_unknown_name_error,
    summarize_error,
)
from spear.geometry import euler_to_quat, quat_canonical, quat_exp, quat_multiply, quat_rotate
from spear.types import Array
from spear.util.json_text import read_utf8_bytes

COMMON_LINK_WORDS = {"link"}  # nearly every link has this word in its name
MAX_URDF_BYTES = 16 * 2**20  # a URDF without meshes has some 20 kB
MAX_CONTINUOUS_TURNS = 4  # a joint without limits may have turned a few times
TURN_RAD = 2 * math.pi
DEFAULT_AXIS = (1.0, 0.0, 0.0)  # of a joint whose URDF names none

JointType = Literal["fixed", "revolute", "continuous", "prismatic"]
KNOWN_JOINT_TYPES: tuple[JointType, ...] = ("fixed", "revolute", "continuous", "prismatic")
Vector = tuple[float, float, float]


@dataclass(frozen=True)
class UrdfJoint:
    """A joint of a URDF: it connects a link to the link before it.

    Attributes:
        name: Its name.
        joint_type: How it moves. A revolute joint turns between limits, a continuous one without
            limits, and a prismatic one slides.
        parent: The link nearer to the base.
        child: The link nearer to the tip.
        origin_m: Where the joint is, in the frame of the parent, m.
        origin_rpy_rad: Roll, pitch and yaw of the joint's frame about the parent's fixed axes.
        axis: The unit vector about which it turns, or along which it slides, in its own frame.
        limits: Its smallest and largest value, rad or m; None without limits.
    """

    name: str
    joint_type: JointType
    parent: str
    child: str
    origin_m: Vector
    origin_rpy_rad: Vector
    axis: Vector
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class UrdfArm:
    """The chain of joints from the base of a URDF to one of its links.

    Attributes:
        tip: The name of this link.
        chain: The joints in their order from the base to the tip, with the fixed ones.
    """

    tip: str
    chain: tuple[UrdfJoint, ...]

    @property
    def moving_joints(self) -> list[UrdfJoint]:
        """The joints that are not fixed, from the base to the tip."""
        return [joint for joint in self.chain if joint.joint_type != "fixed"]

    @property
    def moving_joint_names(self) -> list[str]:
        """The names of the joints that are not fixed, from the base to the tip."""
        return [joint.name for joint in self.moving_joints]


def read_urdf_arm(file: Path, tip: str) -> UrdfArm:
    """Read the chain of joints from the base to a link.

    Args:
        file: The URDF.
        tip: The name of the link.

    Raises:
        SpearError: If the file cannot be read, is no URDF, declares entities (which could read
            other files), has no such link, or has a joint on the way whose kind is not known.
    """
    joints, link_names = _read_joints_and_links(file)
    if tip not in link_names:
        raise _make_unknown_link_error(tip, link_names, file)

    joint_of_child = {joint.child: joint for joint in joints}
    chain: list[UrdfJoint] = []
    link = tip
    while link in joint_of_child:
        if len(chain) == len(joints):
            raise SpearError(f"the joints of {file} form a loop at {link!r}. Correct the file.")
        joint = joint_of_child[link]
        chain.insert(0, joint)
        link = joint.parent

    for joint in chain:
        if joint.joint_type not in KNOWN_JOINT_TYPES:
            raise SpearError(
                f"the joint {joint.name!r} of {file} has the type {joint.joint_type!r}, which is "
                f"not among {', '.join(KNOWN_JOINT_TYPES)}. Choose another tip."
            )
    arm = UrdfArm(tip, tuple(chain))
    if not arm.moving_joints:
        raise SpearError(
            f"no joint of {file} moves the link {tip!r}. Give the link between the finger tips."
        )
    return arm


def _make_unknown_link_error(tip: str, link_names: set[str], file: Path) -> SpearError:
    """Make the error for a tip that is no link, with all links that share a word with it.

    An arm has several links around its gripper, and the most similar name need not be the link
    between the finger tips.
    """
    words = set(tip.lower().split("_")) - COMMON_LINK_WORDS
    candidates = [name for name in link_names if words & set(name.lower().split("_"))]
    if 1 < len(candidates) <= MAX_LISTED_NAMES:
        return SpearError(
            f"unknown link {tip!r} in {file}. Give the link between the finger tips, perhaps "
            f"{format_alternatives(sorted(candidates))}."
        )
    return make_unknown_name_error("link", tip, link_names, str(file), "Give one as tip.")


def _read_joints_and_links(file: Path) -> tuple[list[UrdfJoint], set[str]]:
    """Read the joints of a URDF and the names of its links; see `read_urdf_arm`."""
    if not file.is_file():
        raise SpearError(f"there is no URDF {file}. Copy the URDF of the arm there.")
    try:
        text = read_utf8_bytes(file, MAX_URDF_BYTES).decode("utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise ValueError("it declares a document type or entities, which no URDF needs")
        robot = ElementTree.fromstring(text)
        if robot.tag != "robot":
            raise ValueError(f"its first element is {robot.tag!r} instead of 'robot'")
        joints = [_parse_joint(element) for element in robot.findall("joint")]
        link_names = {element.get("name", "") for element in robot.findall("link")}
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise SpearError(
            f"{file} cannot be read as a URDF ({summarize_error(error)}). Give the URDF of the "
            "arm; make one of an xacro file with ROS's xacro."
        ) from error
    return joints, link_names


def _parse_joint(element: ElementTree.Element) -> UrdfJoint:
    """Parse the element of one joint. Raises ValueError for a bad value."""
    name = element.get("name", "")
    joint_type = element.get("type", "")
    if element.find("mimic") is not None:
        joint_type = "mimic"  # follows another joint, so that it has no number of its own
    axis = _parse_vector(element, "axis", "xyz", DEFAULT_AXIS)
    length = math.hypot(*axis)
    if joint_type != "fixed" and not length:
        raise ValueError(f"the axis of joint {name!r} is zero")

    x, y, z = axis
    return UrdfJoint(
        name=name,
        joint_type=joint_type,  # type: ignore[arg-type] # checked where the chain has it
        parent=_get_link(element, "parent"),
        child=_get_link(element, "child"),
        origin_m=_parse_vector(element, "origin", "xyz", (0.0, 0.0, 0.0)),
        origin_rpy_rad=_parse_vector(element, "origin", "rpy", (0.0, 0.0, 0.0)),
        axis=(x / length, y / length, z / length) if length else DEFAULT_AXIS,
        limits=_parse_limits(element) if joint_type != "continuous" else None,
    )


def _get_link(joint: ElementTree.Element, tag: str) -> str:
    """Get the name of the link that a joint's element "parent" or "child" names."""
    element = joint.find(tag)
    return "" if element is None else element.get("link", "")


def _parse_vector(joint: ElementTree.Element, tag: str, attribute: str, default: Vector) -> Vector:
    """Parse three numbers of a joint. Raises ValueError if they are not three finite numbers."""
    element = joint.find(tag)
    text = None if element is None else element.get(attribute)
    if text is None:
        return default
    numbers = [float(word) for word in text.split()]
    if len(numbers) != 3 or not np.isfinite(numbers).all():
        raise ValueError(f"{tag} of joint {joint.get('name')!r} has not three numbers: {text!r}")
    x, y, z = numbers
    return x, y, z


def _parse_limits(joint: ElementTree.Element) -> tuple[float, float] | None:
    """Parse the limits of a joint; None if it has none, or the same twice."""
    element = joint.find("limit")
    if element is None:
        return None
    lower = float(element.get("lower", "0"))
    upper = float(element.get("upper", "0"))
    return (lower, upper) if lower < upper else None


def check_joint_names(arm: UrdfArm, names: Sequence[str], column: str, source: str) -> None:
    """Check that the numbers of a column are those of the joints of an arm, in any order.

    Args:
        arm: The arm.
        names: The names of the numbers.
        column: The column, for the message.
        source: What names the column, for the message.

    Raises:
        SpearError: If a joint of the arm is missing, or is there twice, or a name is no joint.
    """
    if sorted(names) == sorted(arm.moving_joint_names):
        return
    raise SpearError(
        f"{column} in {source} has the joints {', '.join(names)}, but those between the base and "
        f"the link {arm.tip!r} are {', '.join(arm.moving_joint_names)}. Select their numbers, as "
        'in state[0:5], or list their names in the URDF as "joints" in the order of the numbers.'
    )


def compute_urdf_pose(
    arm: UrdfArm, joints: Array, names: Sequence[str] | None = None, source: str = ""
) -> Poses:
    """Compute the poses of the tip of an arm from its joint angles.

    Args:
        arm: The arm.
        joints: [T, d] joint angles, rad (m for a prismatic joint).
        names: [d] the joint of each number; None if they are in the order from the base to the tip.
        source: Where the angles come from, for error messages.

    Returns:
        Positions [T, 3] (m) and canonical unit quaternions [T, 4] (w, x, y, z) in the frame of the
        base, float64.

    Raises:
        SpearError: If there is not one number for each joint, or an angle is too large for radians.
    """
    joint_names = arm.moving_joint_names
    if joints.ndim != 2 or joints.shape[1] != len(joint_names):
        raise SpearError(
            f"joint angles of {source} have the shape {joints.shape}, but "
            f"{format_count(len(joint_names), 'joints')} lead to the link {arm.tip!r} "
            f"({', '.join(joint_names)}). Select one number for each of them, as in state[0:5]."
        )
    column_of_joint = {name: column for column, name in enumerate(names or joint_names)}

    values = torch.from_numpy(joints.astype(np.float64))
    position = values.new_zeros(len(values), 3)
    rotation = values.new_tensor([1, 0, 0, 0]).expand(len(values), 4)
    for joint in arm.chain:
        # From the frame of the parent to the joint's own frame.
        position = position + quat_rotate(rotation, values.new_tensor(joint.origin_m))
        origin_rotation = euler_to_quat(values.new_tensor(joint.origin_rpy_rad), "xyz")
        rotation = quat_multiply(rotation, origin_rotation)
        if joint.joint_type == "fixed":
            continue

        # Along the joint's axis, or about it, by its value.
        value = values[:, column_of_joint[joint.name]]  # [T]
        motion = value[:, None] * values.new_tensor(joint.axis)  # [T, 3]
        if joint.joint_type == "prismatic":
            position = position + quat_rotate(rotation, motion)
        else:
            _check_is_in_radians(joint, float(value.abs().max()) if len(value) else 0.0, source)
            rotation = quat_multiply(rotation, quat_exp(motion))
    return Poses(position.numpy(), quat_canonical(rotation).numpy())


def _check_is_in_radians(joint: UrdfJoint, largest_angle_rad: float, source: str) -> None:
    """Raise SpearError for an angle that no joint reaches."""
    max_turns = MAX_CONTINUOUS_TURNS if joint.joint_type == "continuous" else 1
    if largest_angle_rad > max_turns * TURN_RAD:
        raise SpearError(
            f"the joint {joint.name!r} of {source} is at {largest_angle_rad:.3g} rad, more than a "
            "turn. If the angles are degrees, set angle_unit to deg in spear.json."
        )
