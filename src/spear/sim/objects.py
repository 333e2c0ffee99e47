"""The catalogue: everyday objects, made of primitives. Sizes in metres; frames as in `spear.sim.parts`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from spear.sim.parts import Color, Kind, Part, along_x, hidden, ring, visual

GREEN: Color = (0.22, 0.52, 0.18)
LEAF: Color = (0.30, 0.62, 0.22)
RED: Color = (0.80, 0.13, 0.12)
BLUE: Color = (0.13, 0.30, 0.78)
YELLOW: Color = (0.93, 0.77, 0.12)
STEEL: Color = (0.70, 0.72, 0.75)
PALE: Color = (0.93, 0.92, 0.88)


def _cube(name: str, color: Color) -> Kind:
    h = 0.02
    return Kind(
        f"{name} cube",
        (Part("box", (h, h, h)),),
        height=h,
        radius=0.029,
        color=color,
        grasp=((0, 0, 0), (h, h, h)),
        inside=(0.02, 0.02, h),
        rim=h,
    )


def _carrot() -> Kind:
    parts = (
        along_x(0.0165, 0.020, -0.030),
        along_x(0.0145, 0.022, 0.005),
        along_x(0.0115, 0.020, 0.032),
        along_x(0.0075, 0.014, 0.052),
        *(
            Part(
                "capsule", (0.0035, 0.014), (-0.062, y, z), (0.0, math.pi / 2 + pitch, yaw), LEAF, solid=False
            )
            for y, z, pitch, yaw in ((0.0, 0.004, 0.1, 0.0), (0.007, 0.0, 0, -0.5), (-0.007, 0.0, 0, 0.5))
        ),
        hidden((0.060, 0.0135, 0.0165), (0.002, 0, 0)),
    )
    return Kind(
        "carrot", parts, 0.0165, 0.075, (0.95, 0.45, 0.08), grasp=((-0.005, 0, 0), (0.060, 0.0135, 0.0165))
    )


def _eggplant() -> Kind:
    parts = (
        visual("ellipsoid", (0.042, 0.0245, 0.0235), pos=(-0.022, 0, 0)),
        visual("ellipsoid", (0.046, 0.0185, 0.0180), pos=(0.016, 0, -0.002)),
        visual("ellipsoid", (0.012, 0.0140, 0.0140), pos=(0.054, 0, -0.002), color=LEAF),
        along_x(0.0042, 0.009, 0.070, GREEN),
        hidden((0.056, 0.0185, 0.0225), (-0.002, 0, -0.001)),
    )
    return Kind(
        "eggplant",
        parts,
        0.0235,
        0.078,
        (0.33, 0.10, 0.38),
        grasp=((0.0, 0, -0.001), (0.056, 0.0185, 0.0225)),
    )


def _banana() -> Kind:
    bend = 0.42
    x, y = 0.052, 0.010
    tip: Color = (0.35, 0.26, 0.10)
    parts = (
        along_x(0.0160, 0.030, 0.0),
        Part("capsule", (0.0145, 0.022), (x, y, 0), (0, math.pi / 2, bend), solid=False),
        Part("capsule", (0.0145, 0.022), (-x, y, 0), (0, math.pi / 2, -bend), solid=False),
        Part("capsule", (0.0060, 0.006), (x + 0.031, y + 0.014, 0), (0, math.pi / 2, bend), tip, solid=False),
        Part(
            "capsule", (0.0060, 0.006), (-x - 0.031, y + 0.014, 0), (0, math.pi / 2, -bend), tip, solid=False
        ),
        hidden((0.034, 0.0145, 0.0155)),
        hidden((0.026, 0.0125, 0.0155), (x, y, 0), bend),
        hidden((0.026, 0.0125, 0.0155), (-x, y, 0), -bend),
    )
    return Kind(
        "banana", parts, 0.0160, 0.088, (0.95, 0.82, 0.18), grasp=((0, 0, 0), (0.075, 0.0145, 0.0155))
    )


def _spoon() -> Kind:
    parts = (
        along_x(0.0072, 0.048, -0.022),
        visual("ellipsoid", (0.028, 0.0190, 0.0085), pos=(0.050, 0, 0)),
        visual("ellipsoid", (0.020, 0.0130, 0.0040), pos=(0.051, 0, 0.0060), color=(0.42, 0.43, 0.46)),
        hidden((0.056, 0.0070, 0.0085), (-0.022, 0, 0)),
        hidden((0.022, 0.0150, 0.0085), (0.050, 0, 0)),
    )
    return Kind(
        "spoon", parts, 0.0085, 0.080, STEEL, mass=0.05, grasp=((-0.012, 0, 0), (0.050, 0.0070, 0.0085))
    )


def _cucumber() -> Kind:
    parts = (along_x(0.0155, 0.046, 0.0), hidden((0.055, 0.0145, 0.0155)))
    return Kind(
        "cucumber", parts, 0.0155, 0.064, (0.16, 0.42, 0.14), grasp=((0, 0, 0), (0.055, 0.0145, 0.0155))
    )


def _can() -> Kind:
    parts = (
        Part("cylinder", (0.0260, 0.0400)),
        visual("cylinder", (0.0264, 0.0160), color=PALE),
        visual("cylinder", (0.0235, 0.0010), pos=(0, 0, 0.0400), color=STEEL),
    )
    return Kind(
        "can", parts, 0.040, 0.027, RED, mass=0.10, grasp=((0, 0, 0.005), (0.026, 0.026, 0.040)), round=True
    )


def _bottle() -> Kind:
    parts = (
        Part("cylinder", (0.0240, 0.0340)),
        visual("ellipsoid", (0.0240, 0.0240, 0.020), pos=(0, 0, 0.034)),
        visual("cylinder", (0.0100, 0.0120), pos=(0, 0, 0.058)),
        visual("cylinder", (0.0115, 0.0060), pos=(0, 0, 0.072), color=PALE),
        visual("cylinder", (0.0244, 0.0140), pos=(0, 0, -0.004), color=YELLOW),
        hidden((0.009, 0.009, 0.022), (0, 0, 0.056)),
    )
    return Kind("bottle", parts, 0.034, 0.025, (0.10, 0.42, 0.30), mass=0.12)


def _cup() -> Kind:
    parts = (
        *ring(10, 0.0250, (0.0022, 0.0086, 0.030), 0.0, solid=False),
        # solid to the touch: a finger does not slip inside
        Part("cylinder", (0.0270, 0.0300), visible=False),
        visual("cylinder", (0.0235, 0.0008), pos=(0, 0, -0.0232), color=(0.25, 0.22, 0.20)),
    )
    return Kind(
        "cup", parts, 0.030, 0.030, BLUE, mass=0.08, grasp=((0, 0, 0.0), (0.0275, 0.0275, 0.030)), round=True
    )


def _tomato() -> Kind:
    parts = (
        visual("ellipsoid", (0.0265, 0.0265, 0.0225)),
        visual("cylinder", (0.0100, 0.0015), pos=(0, 0, 0.0220), color=LEAF),
        hidden((0.0225, 0.0225, 0.0225)),
        hidden((0.0225, 0.0225, 0.0225), yaw=math.pi / 4),
    )
    return Kind(
        "tomato",
        parts,
        0.0225,
        0.030,
        (0.85, 0.16, 0.10),
        grasp=((0, 0, 0), (0.0265, 0.0265, 0.0225)),
        round=True,
    )


def _lemon() -> Kind:
    parts = (
        visual("ellipsoid", (0.0310, 0.0235, 0.0225)),
        visual("ellipsoid", (0.0080, 0.0080, 0.0080), pos=(0.028, 0, 0)),
        hidden((0.0240, 0.0200, 0.0225)),
    )
    return Kind("lemon", parts, 0.0225, 0.036, (0.96, 0.87, 0.20), grasp=((0, 0, 0), (0.024, 0.0200, 0.0225)))


def _sponge() -> Kind:
    parts = (
        Part("box", (0.043, 0.027, 0.0150)),
        visual("box", (0.0433, 0.0273, 0.0045), pos=(0, 0, 0.0115), color=(0.20, 0.55, 0.35)),
    )
    return Kind(
        "sponge", parts, 0.015, 0.052, (0.96, 0.80, 0.30), mass=0.03, grasp=((0, 0, 0), (0.043, 0.027, 0.015))
    )


def _plate() -> Kind:
    parts = (
        Part("cylinder", (0.085, 0.0050)),
        visual("cylinder", (0.062, 0.0054), color=(0.98, 0.98, 0.97)),
        *ring(14, 0.0800, (0.0130, 0.0195, 0.0018), 0.0062, -0.25, visible=True, solid=False),
    )
    return Kind(
        "plate", parts, 0.005, 0.094, (0.80, 0.86, 0.93), mass=0.5, inside=(0.075, 0.075, 0.005), rim=0.010
    )


def _bowl() -> Kind:
    parts = (
        Part("cylinder", (0.052, 0.0040), (0, 0, -0.018)),
        *ring(12, 0.0630, (0.0030, 0.0200, 0.0250), 0.002, 0.45),
    )
    return Kind(
        "bowl", parts, 0.022, 0.080, (0.86, 0.55, 0.20), mass=0.4, inside=(0.060, 0.060, -0.014), rim=0.026
    )


def _basket() -> Kind:
    x, y, h, t = 0.105, 0.075, 0.030, 0.004
    dark: Color = (0.42, 0.27, 0.13)
    walls = (
        Part("box", (t, y, h), (x - t, 0, 0)),
        Part("box", (t, y, h), (-x + t, 0, 0)),
        Part("box", (x - 2 * t, t, h), (0, y - t, 0)),
        Part("box", (x - 2 * t, t, h), (0, -y + t, 0)),
        Part("box", (x, y, 0.003), (0, 0, -h + 0.003), color=dark),
    )
    bands = tuple(
        visual("box", (x + 0.0015, y + 0.0015, 0.0035), pos=(0, 0, z), color=dark)
        for z in (-0.022, -0.006, 0.010)
    )
    # bands are frames: four thin strips each, so that the inside stays free
    strips = tuple(
        visual("box", half, pos=pos, color=dark)
        for band in bands
        for half, pos in (
            ((0.0015, y + 0.0015, 0.0035), (x, 0.0, band.pos[2])),
            ((0.0015, y + 0.0015, 0.0035), (-x, 0.0, band.pos[2])),
            ((x, 0.0015, 0.0035), (0.0, y, band.pos[2])),
            ((x, 0.0015, 0.0035), (0.0, -y, band.pos[2])),
        )
    )
    rim = tuple(
        Part("capsule", (0.0055, half), pos, euler, dark, solid=False)
        for half, pos, euler in (
            (y - 0.004, (x - t, 0.0, h), (math.pi / 2, 0.0, 0.0)),
            (y - 0.004, (-x + t, 0.0, h), (math.pi / 2, 0.0, 0.0)),
            (x - 0.004, (0.0, y - t, h), (0.0, math.pi / 2, 0.0)),
            (x - 0.004, (0.0, -y + t, h), (0.0, math.pi / 2, 0.0)),
        )
    )
    return Kind(
        "basket",
        (*walls, *strips, *rim),
        height=h,
        radius=0.125,
        color=(0.72, 0.52, 0.28),
        mass=0.6,
        inside=(x - 0.010, y - 0.010, -h + 0.006),
        inside_round=False,
        rim=h + 0.005,
    )


def _towel() -> Kind:
    x, y = 0.080, 0.100
    parts = (
        Part("box", (x, y, 0.0030)),
        *(
            visual("box", (x, 0.006, 0.0031), pos=(0, s * d, 0), color=PALE)
            for s in (-1, 1)
            for d in (0.070, 0.088)
        ),
    )
    return Kind(
        "towel",
        parts,
        height=0.003,
        radius=0.122,
        color=(0.25, 0.50, 0.68),
        inside=(x, y, 0.003),
        inside_round=False,
        rim=0.003,
        fixed=True,
    )


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        _carrot(),
        _eggplant(),
        _banana(),
        _spoon(),
        _cucumber(),
        _cube("red", RED),
        _cube("green", (0.10, 0.60, 0.20)),
        _cube("blue", BLUE),
        _cube("yellow", YELLOW),
        _can(),
        _bottle(),
        _cup(),
        _tomato(),
        _lemon(),
        _sponge(),
        _plate(),
        _bowl(),
        _basket(),
        _towel(),
    )
}
"""Every kind of object, by name."""
CUBES: Sequence[str] = tuple(name for name in KINDS if name.endswith("cube"))
GRASPABLE: Sequence[str] = tuple(name for name, kind in KINDS.items() if kind.graspable)
SUPPORTS: Sequence[str] = ("plate", "bowl", "basket", "towel")
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
