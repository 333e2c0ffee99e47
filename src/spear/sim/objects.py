"""The catalogue of everyday objects (objects.toml): MuJoCo primitives, and what the expert needs to know.

An object's frame stands near its middle: z up when it rests as placed on the table, x along its long side.
Sizes in metres, masses in kg, angles in rad, colours 0 … 1.
"""

import math
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Color = tuple[float, float, float]
Vec3 = tuple[float, float, float]


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
class ObjectKind:
    """A kind of object.

    name    what people call it.
    height  from its frame's origin down to the surface it rests on, m.
    radius  of the disc on the table that it needs, m.
    colors  it comes in one of these.
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
    colors: tuple[Color, ...]
    mass: float = 0.06
    grasp: tuple[Vec3, Vec3] | None = None
    round: bool = False
    inside: tuple[float, float, float] | None = None
    inside_round: bool = True
    rim: float = 0.0
    fixed: bool = False


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _parts(row: dict[str, Any]) -> Iterator[Part]:
    """The primitives of a part of the catalogue. Two shapes are our own:

    rod   a capsule along the object's x axis, turned by `pitch` and `yaw`; it does not collide.
    ring  a wall: `count` boxes of half-sizes (thickness, width, height) on a circle at height `z`, leaning
          out by `lean`.
    """
    if row["shape"] == "rod":
        euler = (0.0, math.pi / 2 + row.pop("pitch", 0.0), row.pop("yaw", 0.0))
        yield Part(**{**row, "shape": "capsule"}, euler=euler, solid=False)
    elif row["shape"] == "ring":
        count, radius, z, lean = (row.pop(key, 0.0) for key in ("count", "radius", "z", "lean"))
        for angle in (2 * math.pi * i / count for i in range(count)):
            pos = (radius * math.cos(angle), radius * math.sin(angle), z)
            yield Part(**{**row, "shape": "box"}, pos=pos, euler=(0.0, lean, angle))
    else:
        yield Part(**row)


def _catalogue(file_name: str) -> dict[str, ObjectKind]:
    """The kinds of objects that a file beside this one describes, by name."""
    tables = _tuples(tomllib.loads(Path(__file__).with_name(file_name).read_text("utf-8")))
    palette = tables.pop("palette", {})
    for table in tables.values():
        rows = [
            {**row, "color": palette.get(row.get("color"), row.get("color"))}
            for row in table["parts"]
        ]
        table["parts"] = tuple(part for row in rows for part in _parts(row))
    return {name: ObjectKind(name, **table) for name, table in tables.items()}


_TASK_KINDS = _catalogue("objects.toml")
_OTHER_KINDS = _catalogue("objects_wild.toml")
OBJECT_KINDS = _TASK_KINDS | _OTHER_KINDS
"""Every kind of object, by name."""
TASK_FREE_KINDS = tuple(_OTHER_KINDS)
"""Kinds that no task uses: clutter in wild worlds."""
CUBES = tuple(name for name in OBJECT_KINDS if name.endswith("cube"))
GRASPABLE = tuple(name for name, kind in OBJECT_KINDS.items() if kind.grasp is not None)
SUPPORTS = ("plate", "bowl", "basket", "towel")
"""What things are put on or in."""
