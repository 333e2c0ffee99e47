"""What objects are made of: primitives, and what the expert and the tasks need to know of each kind.

Every object's frame stands near its middle, z up when it rests as placed on the table, x along its long
side. Sizes in metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

Color = tuple[float, float, float]
Vec3 = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """One primitive of an object.

    shape    "box", "cylinder", "capsule", "ellipsoid" or "sphere"; size as MuJoCo's geom size.
    pos      centre in the object frame, m; euler: turns about the fixed x, then y, then z axis, rad.
    color    0 … 1; None takes the object's own colour.
    visible  cameras see it; solid: it collides.
    """

    shape: str
    size: tuple[float, ...]
    pos: Vec3 = (0.0, 0.0, 0.0)
    euler: Vec3 = (0.0, 0.0, 0.0)
    color: Color | None = None
    visible: bool = True
    solid: bool = True


@dataclass(frozen=True)
class Kind:
    """A kind of object.

    name       what people call it.
    parts      its primitives.
    height     from its frame's origin down to the surface it rests on, m.
    radius     of the disc on the table that it needs, m.
    color      base colour.
    mass       kg.
    grasp      centre and half-sizes of the box that the gripper takes hold of, object frame, or None when the
               object is not picked up. `round` grasps have no preferred yaw.
    inside     of what things are put on or in: half-sizes (x, y) of the area in which a thing counts as
               placed, and its height above the object's origin; `inside_round` when the area is an ellipse.
    rim        height of the highest point above the object's origin, m.
    """

    name: str
    parts: tuple[Part, ...]
    height: float
    radius: float
    color: Color
    mass: float = 0.06
    grasp: tuple[Vec3, Vec3] | None = None
    round: bool = False
    inside: tuple[float, float, float] | None = None
    inside_round: bool = True
    rim: float = 0.0
    fixed: bool = False

    @property
    def graspable(self) -> bool:
        """Whether the gripper can pick it up."""
        return self.grasp is not None

    @property
    def elongated(self) -> bool:
        """Longer than the gripper opens: its yaw decides whether a grasp works."""
        return self.grasp is not None and not self.round and self.radius > 0.042


def visual(shape: str, size: tuple[float, ...], **more: object) -> Part:
    """A primitive that is seen and does not collide."""
    return replace(Part(shape, size, solid=False), **more)  # type: ignore[arg-type]


def hidden(size: tuple[float, ...], pos: Vec3 = (0.0, 0.0, 0.0), yaw: float = 0.0) -> Part:
    """A box that collides and is not seen."""
    return Part("box", size, pos, (0.0, 0.0, yaw), visible=False)


def along_x(radius: float, half: float, x: float, color: Color | None = None, shape: str = "capsule") -> Part:
    """A round primitive along the object's x axis, which is seen and does not collide."""
    return Part(shape, (radius, half), (x, 0, 0), (0, math.pi / 2, 0), color, solid=False)


def ring(
    count: int,
    radius: float,
    half: Vec3,
    z: float,
    lean: float = 0.0,
    color: Color | None = None,
    **more: bool,
) -> tuple[Part, ...]:
    """A wall: `count` boxes of half-sizes (thickness, width, height) on a circle, leaning out by `lean`."""
    return tuple(
        Part(
            "box",
            half,
            (radius * math.cos(a), radius * math.sin(a), z),
            (0, lean, a),
            color,
            **more,
        )
        for a in (2 * math.pi * i / count for i in range(count))
    )
