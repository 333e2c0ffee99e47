"""The catalogue of everyday objects: MuJoCo primitives, and what the expert and the tasks need to know.

An object's frame stands near its middle: z up when it rests as placed on the table, x along its long side.
Sizes in metres, masses in kg, colours 0 … 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

Color = tuple[float, float, float]
Vec3 = tuple[float, float, float]

GREEN: Color = (0.22, 0.52, 0.18)
LEAF: Color = (0.30, 0.62, 0.22)
RED: Color = (0.80, 0.13, 0.12)
BLUE: Color = (0.13, 0.30, 0.78)
YELLOW: Color = (0.93, 0.77, 0.12)
STEEL: Color = (0.70, 0.72, 0.75)
PALE: Color = (0.93, 0.92, 0.88)


@dataclass(frozen=True)
class Part:
    """One primitive of an object.

    shape    "box", "cylinder", "capsule", "ellipsoid" or "sphere"; size as MuJoCo's geom size.
    pos      centre in the object frame, m; euler: turns about the fixed x, then y, then z axis, rad.
    color    None takes the object's own colour.
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

    name    what people call it.
    height  from its frame's origin down to the surface it rests on, m.
    radius  of the disc on the table that it needs, m.
    grasp   centre and half-sizes of the box that the gripper takes hold of, object frame; None when the
            object is not picked up. `round` grasps have no preferred yaw.
    inside  of what things are put on or in: half-sizes (x, y) of the area in which a thing counts as placed,
            and its height above the object's origin; `inside_round` when the area is an ellipse.
    rim     height of the highest point above the object's origin, m.
    fixed   it cannot be moved.
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
    def elongated(self) -> bool:
        """Longer than the gripper opens: its yaw decides whether a grasp works."""
        return self.grasp is not None and not self.round and self.radius > 0.042


def _visual(shape: str, size: tuple[float, ...], **more: object) -> Part:
    """A primitive that is seen and does not collide."""
    return replace(Part(shape, size, solid=False), **more)  # type: ignore[arg-type]


def _hidden(size: tuple[float, ...], pos: Vec3 = (0.0, 0.0, 0.0), yaw: float = 0.0) -> Part:
    """A box that collides and is not seen."""
    return Part("box", size, pos, (0.0, 0.0, yaw), visible=False)


def _rod(
    radius: float,
    half: float,
    pos: Vec3,
    color: Color | None = None,
    yaw: float = 0.0,
    pitch: float = 0.0,
) -> Part:
    """A visual capsule along the object's x axis, turned by `pitch` and `yaw`."""
    return Part("capsule", (radius, half), pos, (0.0, math.pi / 2 + pitch, yaw), color, solid=False)


def _ring(
    count: int, radius: float, half: Vec3, z: float, lean: float = 0.0, solid: bool = True
) -> tuple[Part, ...]:
    """A wall: `count` boxes of half-sizes (thickness, width, height) on a circle, leaning out by `lean`."""
    angles = [2 * math.pi * i / count for i in range(count)]
    return tuple(
        Part("box", half, (radius * math.cos(a), radius * math.sin(a), z), (0, lean, a), solid=solid)
        for a in angles
    )


def _cube(name: str, color: Color) -> Kind:
    half = (0.02, 0.02, 0.02)
    return Kind(
        f"{name} cube",
        (Part("box", half),),
        height=0.02,
        radius=0.029,
        color=color,
        grasp=((0, 0, 0), half),
        inside=half,
        rim=0.02,
    )


def _basket() -> Kind:
    x, y, h, t = 0.105, 0.075, 0.030, 0.004
    dark: Color = (0.42, 0.27, 0.13)
    # four thin strips make a band around the walls
    bands = (
        _visual("box", half, pos=(px, py, z), color=dark)
        for z in (-0.022, -0.006, 0.010)
        for half, px, py in (
            ((0.0015, y + 0.0015, 0.0035), x, 0.0),
            ((0.0015, y + 0.0015, 0.0035), -x, 0.0),
            ((x, 0.0015, 0.0035), 0.0, y),
            ((x, 0.0015, 0.0035), 0.0, -y),
        )
    )
    rim = (
        Part("capsule", (0.0055, half), (px, py, h), euler, dark, solid=False)
        for half, px, py, euler in (
            (y - 0.004, x - t, 0.0, (math.pi / 2, 0.0, 0.0)),
            (y - 0.004, -x + t, 0.0, (math.pi / 2, 0.0, 0.0)),
            (x - 0.004, 0.0, y - t, (0.0, math.pi / 2, 0.0)),
            (x - 0.004, 0.0, -y + t, (0.0, math.pi / 2, 0.0)),
        )
    )
    return Kind(
        "basket",
        (
            Part("box", (t, y, h), (x - t, 0, 0)),
            Part("box", (t, y, h), (-x + t, 0, 0)),
            Part("box", (x - 2 * t, t, h), (0, y - t, 0)),
            Part("box", (x - 2 * t, t, h), (0, -y + t, 0)),
            Part("box", (x, y, 0.003), (0, 0, -h + 0.003), color=dark),
            *bands,
            *rim,
        ),
        height=h,
        radius=0.125,
        color=(0.72, 0.52, 0.28),
        mass=0.6,
        inside=(x - 0.010, y - 0.010, -h + 0.006),
        inside_round=False,
        rim=h + 0.005,
    )


_TIP: Color = (0.35, 0.26, 0.10)
_CATALOGUE = (
    Kind(
        "carrot",
        (
            _rod(0.0165, 0.020, (-0.030, 0, 0)),
            _rod(0.0145, 0.022, (0.005, 0, 0)),
            _rod(0.0115, 0.020, (0.032, 0, 0)),
            _rod(0.0075, 0.014, (0.052, 0, 0)),
            _rod(0.0035, 0.014, (-0.062, 0.0, 0.004), LEAF, pitch=0.1),
            _rod(0.0035, 0.014, (-0.062, 0.007, 0.0), LEAF, yaw=-0.5),
            _rod(0.0035, 0.014, (-0.062, -0.007, 0.0), LEAF, yaw=0.5),
            _hidden((0.060, 0.0135, 0.0165), (0.002, 0, 0)),
        ),
        height=0.0165,
        radius=0.075,
        color=(0.95, 0.45, 0.08),
        grasp=((-0.005, 0, 0), (0.060, 0.0135, 0.0165)),
    ),
    Kind(
        "eggplant",
        (
            _visual("ellipsoid", (0.042, 0.0245, 0.0235), pos=(-0.022, 0, 0)),
            _visual("ellipsoid", (0.046, 0.0185, 0.0180), pos=(0.016, 0, -0.002)),
            _visual("ellipsoid", (0.012, 0.0140, 0.0140), pos=(0.054, 0, -0.002), color=LEAF),
            _rod(0.0042, 0.009, (0.070, 0, 0), GREEN),
            _hidden((0.056, 0.0185, 0.0225), (-0.002, 0, -0.001)),
        ),
        height=0.0235,
        radius=0.078,
        color=(0.33, 0.10, 0.38),
        grasp=((0.0, 0, -0.001), (0.056, 0.0185, 0.0225)),
    ),
    Kind(
        "banana",
        (
            _rod(0.0160, 0.030, (0, 0, 0)),
            _rod(0.0145, 0.022, (0.052, 0.010, 0), yaw=0.42),
            _rod(0.0145, 0.022, (-0.052, 0.010, 0), yaw=-0.42),
            _rod(0.0060, 0.006, (0.052 + 0.031, 0.010 + 0.014, 0), _TIP, yaw=0.42),
            _rod(0.0060, 0.006, (-0.052 - 0.031, 0.010 + 0.014, 0), _TIP, yaw=-0.42),
            _hidden((0.034, 0.0145, 0.0155)),
            _hidden((0.026, 0.0125, 0.0155), (0.052, 0.010, 0), 0.42),
            _hidden((0.026, 0.0125, 0.0155), (-0.052, 0.010, 0), -0.42),
        ),
        height=0.0160,
        radius=0.088,
        color=(0.95, 0.82, 0.18),
        grasp=((0, 0, 0), (0.075, 0.0145, 0.0155)),
    ),
    Kind(
        "spoon",
        (
            _rod(0.0072, 0.048, (-0.022, 0, 0)),
            _visual("ellipsoid", (0.028, 0.0190, 0.0085), pos=(0.050, 0, 0)),
            _visual("ellipsoid", (0.020, 0.0130, 0.0040), pos=(0.051, 0, 0.0060), color=(0.42, 0.43, 0.46)),
            _hidden((0.056, 0.0070, 0.0085), (-0.022, 0, 0)),
            _hidden((0.022, 0.0150, 0.0085), (0.050, 0, 0)),
        ),
        height=0.0085,
        radius=0.080,
        color=STEEL,
        mass=0.05,
        grasp=((-0.012, 0, 0), (0.050, 0.0070, 0.0085)),
    ),
    Kind(
        "cucumber",
        (_rod(0.0155, 0.046, (0, 0, 0)), _hidden((0.055, 0.0145, 0.0155))),
        height=0.0155,
        radius=0.064,
        color=(0.16, 0.42, 0.14),
        grasp=((0, 0, 0), (0.055, 0.0145, 0.0155)),
    ),
    _cube("red", RED),
    _cube("green", (0.10, 0.60, 0.20)),
    _cube("blue", BLUE),
    _cube("yellow", YELLOW),
    Kind(
        "can",
        (
            Part("cylinder", (0.0260, 0.0400)),
            _visual("cylinder", (0.0264, 0.0160), color=PALE),
            _visual("cylinder", (0.0235, 0.0010), pos=(0, 0, 0.0400), color=STEEL),
        ),
        height=0.040,
        radius=0.027,
        color=RED,
        mass=0.10,
        grasp=((0, 0, 0.005), (0.026, 0.026, 0.040)),
        round=True,
    ),
    Kind(
        "bottle",
        (
            Part("cylinder", (0.0240, 0.0340)),
            _visual("ellipsoid", (0.0240, 0.0240, 0.020), pos=(0, 0, 0.034)),
            _visual("cylinder", (0.0100, 0.0120), pos=(0, 0, 0.058)),
            _visual("cylinder", (0.0115, 0.0060), pos=(0, 0, 0.072), color=PALE),
            _visual("cylinder", (0.0244, 0.0140), pos=(0, 0, -0.004), color=YELLOW),
            _hidden((0.009, 0.009, 0.022), (0, 0, 0.056)),
        ),
        height=0.034,
        radius=0.025,
        color=(0.10, 0.42, 0.30),
        mass=0.12,
    ),
    Kind(
        "cup",
        (
            *_ring(10, 0.0250, (0.0022, 0.0086, 0.030), 0.0, solid=False),
            # a solid cylinder, so that a finger does not slip inside
            Part("cylinder", (0.0270, 0.0300), visible=False),
            _visual("cylinder", (0.0235, 0.0008), pos=(0, 0, -0.0232), color=(0.25, 0.22, 0.20)),
        ),
        height=0.030,
        radius=0.030,
        color=BLUE,
        mass=0.08,
        grasp=((0, 0, 0.0), (0.0275, 0.0275, 0.030)),
        round=True,
    ),
    Kind(
        "tomato",
        (
            _visual("ellipsoid", (0.0265, 0.0265, 0.0225)),
            _visual("cylinder", (0.0100, 0.0015), pos=(0, 0, 0.0220), color=LEAF),
            _hidden((0.0225, 0.0225, 0.0225)),
            _hidden((0.0225, 0.0225, 0.0225), yaw=math.pi / 4),
        ),
        height=0.0225,
        radius=0.030,
        color=(0.85, 0.16, 0.10),
        grasp=((0, 0, 0), (0.0265, 0.0265, 0.0225)),
        round=True,
    ),
    Kind(
        "lemon",
        (
            _visual("ellipsoid", (0.0310, 0.0235, 0.0225)),
            _visual("ellipsoid", (0.0080, 0.0080, 0.0080), pos=(0.028, 0, 0)),
            _hidden((0.0240, 0.0200, 0.0225)),
        ),
        height=0.0225,
        radius=0.036,
        color=(0.96, 0.87, 0.20),
        grasp=((0, 0, 0), (0.024, 0.0200, 0.0225)),
    ),
    Kind(
        "sponge",
        (
            Part("box", (0.043, 0.027, 0.0150)),
            _visual("box", (0.0433, 0.0273, 0.0045), pos=(0, 0, 0.0115), color=(0.20, 0.55, 0.35)),
        ),
        height=0.015,
        radius=0.052,
        color=(0.96, 0.80, 0.30),
        mass=0.03,
        grasp=((0, 0, 0), (0.043, 0.027, 0.015)),
    ),
    Kind(
        "plate",
        (
            Part("cylinder", (0.085, 0.0050)),
            _visual("cylinder", (0.062, 0.0054), color=(0.98, 0.98, 0.97)),
            *_ring(14, 0.0800, (0.0130, 0.0195, 0.0018), 0.0062, -0.25, solid=False),
        ),
        height=0.005,
        radius=0.094,
        color=(0.80, 0.86, 0.93),
        mass=0.5,
        inside=(0.075, 0.075, 0.005),
        rim=0.010,
    ),
    Kind(
        "bowl",
        (
            Part("cylinder", (0.052, 0.0040), (0, 0, -0.018)),
            *_ring(12, 0.0630, (0.0030, 0.0200, 0.0250), 0.002, 0.45),
        ),
        height=0.022,
        radius=0.080,
        color=(0.86, 0.55, 0.20),
        mass=0.4,
        inside=(0.060, 0.060, -0.014),
        rim=0.026,
    ),
    _basket(),
    Kind(
        "towel",
        (
            Part("box", (0.080, 0.100, 0.0030)),
            *(
                _visual("box", (0.080, 0.006, 0.0031), pos=(0, y, 0), color=PALE)
                for y in (-0.070, -0.088, 0.070, 0.088)
            ),
        ),
        height=0.003,
        radius=0.122,
        color=(0.25, 0.50, 0.68),
        inside=(0.080, 0.100, 0.003),
        inside_round=False,
        rim=0.003,
        fixed=True,
    ),
)
KINDS = {kind.name: kind for kind in _CATALOGUE}
"""Every kind of object, by name."""
CUBES = tuple(name for name in KINDS if name.endswith("cube"))
GRASPABLE = tuple(name for name, kind in KINDS.items() if kind.grasp is not None)
SUPPORTS = ("plate", "bowl", "basket", "towel")
"""What things are put on or in."""
RECOLORED: dict[str, Sequence[Color]] = {
    "towel": (
        (0.25, 0.50, 0.68),
        (0.72, 0.25, 0.30),
        (0.45, 0.60, 0.45),
        (0.85, 0.70, 0.45),
        (0.45, 0.40, 0.60),
    ),
    "plate": ((0.80, 0.86, 0.93), (0.93, 0.85, 0.80), (0.85, 0.93, 0.85), (0.55, 0.65, 0.78)),
    "bowl": ((0.86, 0.55, 0.20), (0.30, 0.62, 0.66), (0.75, 0.30, 0.35), (0.85, 0.85, 0.82)),
    "cup": (BLUE, (0.85, 0.40, 0.45), (0.90, 0.88, 0.82), (0.25, 0.60, 0.55)),
    "can": (RED, (0.15, 0.35, 0.70), (0.20, 0.55, 0.30)),
    "bottle": ((0.10, 0.42, 0.30), (0.45, 0.22, 0.12), (0.20, 0.35, 0.60)),
    "spoon": (STEEL, (0.62, 0.44, 0.26), (0.80, 0.80, 0.82)),
}
"""Kinds that come in several colours."""
