"""The catalog of everyday objects (objects.toml, objects_wild.toml): MuJoCo primitives, and what
the expert needs to know.

An object's frame stands near its middle: z up when it rests as placed on the table, x along its
long side. Sizes are in meters, masses in kg, angles in rad, colors 0 … 1.
"""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Color = tuple[float, float, float]
Vec3 = tuple[float, float, float]


@dataclass(frozen=True)
class Primitive:
    """One primitive of an object.

    shape    "box", "cylinder", "capsule", "ellipsoid" or "sphere".
    size     as MuJoCo's geom size.
    pos      center in the object frame, m.
    euler    turns about the fixed x, then y, then z axis, rad.
    color    None takes the object's own color.
    visible  whether cameras see it.
    solid    whether it collides.
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

    name          what people call it.
    primitives    the shapes that it consists of.
    height        from its frame's origin down to the surface it rests on, m.
    radius        of the disc on the table that it needs, m.
    colors        it comes in one of these.
    mass          kg.
    grasp         center and half-sizes of the box that the gripper takes hold of, object frame;
                  None when the object is not picked up.
    round         whether the grasp has no preferred yaw.
    inside        of what objects are put on or in: half-sizes (x, y) of the area in which an object
                  counts as placed, and its height above the origin.
    inside_round  whether that area is an ellipse.
    rim           height of the highest point above the object's origin, m.
    fixed         whether it cannot be moved.
    """

    name: str
    primitives: tuple[Primitive, ...]
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


def load_catalog(file_name: str) -> dict[str, ObjectKind]:
    """Read the kinds of objects that a file next to this one describes, by name."""
    text = Path(__file__).with_name(file_name).read_text("utf-8")
    tables = _lists_to_tuples(tomllib.loads(text))
    palette = tables.pop("palette", {})
    kinds = {}
    for name, table in tables.items():
        primitives: list[Primitive] = []
        for row in table.pop("parts"):
            color = row.get("color")
            row["color"] = palette.get(color, color)
            primitives += _expand_part(row)
        kinds[name] = ObjectKind(name, primitives=tuple(primitives), **table)
    return kinds


def _lists_to_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists_to_tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(map(_lists_to_tuples, value))
    return value


def _expand_part(row: dict[str, Any]) -> list[Primitive]:
    """Return the primitives of a part in the catalog. Two shapes are our own:

    rod   a capsule along the object's x axis, turned by `pitch` and `yaw`; it does not collide.
    ring  a wall: `count` boxes of half-sizes (thickness, width, height) on a circle at height `z`,
          leaning out by `lean`.
    """
    if row["shape"] == "rod":
        pitch = row.pop("pitch", 0.0)
        yaw = row.pop("yaw", 0.0)
        fields = {**row, "shape": "capsule"}
        return [Primitive(**fields, euler=(0.0, math.pi / 2 + pitch, yaw), solid=False)]
    if row["shape"] == "ring":
        return _expand_ring(row)
    return [Primitive(**row)]


def _expand_ring(row: dict[str, Any]) -> list[Primitive]:
    count = row.pop("count", 0.0)
    radius = row.pop("radius", 0.0)
    z = row.pop("z", 0.0)
    lean = row.pop("lean", 0.0)
    fields = {**row, "shape": "box"}
    primitives = []
    for i in range(count):
        angle = 2 * math.pi * i / count
        pos = (radius * math.cos(angle), radius * math.sin(angle), z)
        primitives.append(Primitive(**fields, pos=pos, euler=(0.0, lean, angle)))
    return primitives


_TASK_KINDS = load_catalog("objects.toml")
_OTHER_KINDS = load_catalog("objects_wild.toml")
OBJECT_KINDS = _TASK_KINDS | _OTHER_KINDS
"""Every kind of object, by name."""
TASK_FREE_KINDS = tuple(_OTHER_KINDS)
"""Kinds that no task uses: clutter in wild worlds."""
CUBES = tuple(name for name in OBJECT_KINDS if name.endswith("cube"))
GRASPABLE = tuple(name for name, kind in OBJECT_KINDS.items() if kind.grasp is not None)
SUPPORTS = ("plate", "bowl", "basket", "towel")
"""What objects are put on or in."""
