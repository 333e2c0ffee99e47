"""The catalog of everyday objects, read from objects.toml and objects_wild.toml.

An object consists of MuJoCo primitives. The catalog also has what the scripted expert needs to know
to grasp an object, or to put something on it. The origin of an object's frame is near its middle.
When the object rests on the table as it was placed, its z axis points up, and x is along its long
side. Sizes are in meters, masses in kg, angles in rad, colors are red, green, blue in 0 … 1.
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
    size     MuJoCo's geom size for this shape, m.
    pos      center in the object frame, m.
    euler    turns about the object frame's x axis, then its y axis, then its z axis, rad.
    color    the primitive's color; with None it has the object's color.
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

    name          the kind's name in plain English.
    primitives    the shapes that the object consists of.
    height        height of the frame's origin above the surface that the object rests on, m.
    radius        radius of the disc on the table that the object needs, m.
    colors        an object of this kind has one of these colors.
    mass          the object's mass, kg.
    grasp         center and half-sizes of the box that the gripper grasps, object frame, m; None
                  for an object that is not picked up.
    round         whether the part of the object in the box `grasp` has a round cross-section, so
                  that the gripper may have any yaw.
    inside        only for kinds on or in which objects are put: the half-sizes along x and y of the
                  area in which an object counts as placed, and the area's height above the
                  origin, m.
    inside_round  whether this area is an ellipse; otherwise it is a rectangle.
    rim           height of the object's highest point above its origin, m.
    fixed         whether the object cannot be moved.
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
    """Read the kinds of objects from a TOML file in the folder of this one.

    The file has a table per kind, with its `parts`. A table `palette` names colors for the parts.
    """
    text = Path(__file__).with_name(file_name).read_text("utf-8")
    tables = _convert_lists_to_tuples(tomllib.loads(text))
    palette = tables.pop("palette", {})
    kinds = {}
    for name, table in tables.items():
        primitives: list[Primitive] = []
        for row in table.pop("parts"):
            color = row.get("color")  # a name in the palette, a color, or None
            row["color"] = palette.get(color, color)
            primitives += _expand_part(row)
        kinds[name] = ObjectKind(name, primitives=tuple(primitives), **table)
    return kinds


def _convert_lists_to_tuples(value: Any) -> Any:
    """Return a copy of nested dicts and lists, with tuples instead of the lists."""
    if isinstance(value, dict):
        return {key: _convert_lists_to_tuples(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return tuple(map(_convert_lists_to_tuples, value))
    return value


def _expand_part(row: dict[str, Any]) -> list[Primitive]:
    """Return the primitives of a part in the catalog.

    Most parts are one primitive. Two shapes exist only in the catalog:

    rod   a capsule along the object's x axis, turned by `pitch` and `yaw`; it does not collide.
    ring  a round wall of `count` boxes, which stand on a circle of `radius` at height `z` and lean
          outwards by `lean`. `size` has a box's half thickness, half width and half height.
    """
    if row["shape"] == "rod":
        pitch = row.pop("pitch", 0.0)
        yaw = row.pop("yaw", 0.0)
        fields = {**row, "shape": "capsule"}
        # MuJoCo's capsules lie along z. A quarter turn about y (rad) brings z to the x axis.
        return [Primitive(**fields, euler=(0.0, math.pi / 2 + pitch, yaw), solid=False)]
    if row["shape"] == "ring":
        return _expand_ring(row)
    return [Primitive(**row)]


def _expand_ring(row: dict[str, Any]) -> list[Primitive]:
    """Return the boxes of a part of shape "ring"."""
    count = row.pop("count")
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
"""Names of the kinds that no task uses. They appear as clutter in wild worlds."""
CUBES = tuple(name for name in OBJECT_KINDS if name.endswith("cube"))
"""Names of the kinds that can be stacked."""
GRASPABLE = tuple(name for name, kind in OBJECT_KINDS.items() if kind.grasp is not None)
"""Names of the kinds that the gripper can pick up."""
SUPPORTS = ("plate", "bowl", "basket", "towel")
"""Names of the kinds on or in which objects are put."""
