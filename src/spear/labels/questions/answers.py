"""The answers to the six families of 3D questions, worked out from a label."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import TypeVar

import numpy as np

from spear.labels.questions.templates import POINTS, with_article
from spear.types import Array, LabeledImage, LabeledObject, Pixel

NEAR_TIE = 0.05
"""Distances that differ by less than this fraction of the larger are not compared, nor places nearer to each
other than this fraction of the image's width (our choice)."""


_NUMBER = re.compile(r"[\s_#-]*\d+$")


@dataclass(frozen=True)
class Scene:
    """A label, its objects fit for 3D questions (`solid`) and for 2D ones (`flat`), and names it may lack.

    depth  of the image's pixels, where it is known, as `store.write_depth` keeps it: of the middle one of
           each square of pixels, [h / s, w / s], in the label's unit, 0 or not finite where unknown.
    """

    label: LabeledImage
    solid: Sequence[LabeledObject]
    flat: Sequence[LabeledObject]
    absent: Sequence[str]
    depth: Array | None = None


T = TypeVar("T")
Segments = list[str | float | Pixel]
Answer = tuple[dict[str, str], Segments, tuple[str, ...]]
"""What fills a template ({"x": name, …}), the answer, and the names asked about."""
Maker = Callable[[Scene, np.random.Generator], Answer | None]
"""Asks about a scene at random; None when it does not allow the question drawn."""


def is_a(name: str, kind: str) -> bool:
    """Whether an object of that name is also meant by `kind`: "red cube 2" by "cube", "Cube" and "red cube".

    Case does not count, nor do numbers at the end, which detectors add; the noun is taken to come last.
    """
    name, kind = _plain(name), _plain(kind)
    return name == kind or name.endswith(f" {kind}")


def _plain(name: str) -> str:
    name = name.casefold().strip()
    return _NUMBER.sub("", name) or name


def pick(items: Sequence[T], rng: np.random.Generator) -> T:
    """One of `items`, all alike likely."""
    return items[int(rng.random() * len(items))]


def noun(name: str, rng: np.random.Generator) -> str:
    """The name with an article, mostly the definite one."""
    return with_article(name, rng.random() < 0.8)


def nouns(a: LabeledObject, b: LabeledObject, rng: np.random.Generator) -> dict[str, str]:
    """What stands for two objects in a template."""
    return {"x": noun(a.name, rng), "y": noun(b.name, rng)}


def two(objects: Sequence[LabeledObject], rng: np.random.Generator) -> tuple[LabeledObject, LabeledObject]:
    """Two different ones of `objects`."""
    first = int(rng.random() * len(objects))
    second = (first + 1 + int(rng.random() * (len(objects) - 1))) % len(objects)
    return objects[first], objects[second]


def distance(o: LabeledObject) -> float:
    """From the camera to the middle of the object's box, in the label's unit."""
    assert o.box3d is not None
    x, y, z = o.box3d.center.tolist()
    return sqrt(x * x + y * y + z * z)


def pixels(points: Array, label: LabeledImage) -> list[Pixel | None]:
    """Where points [n, 3] appear; None outside the image or behind the camera."""
    (fx, skew, cx), (_, fy, cy), _ = label.intrinsics.tolist()
    found: list[Pixel | None] = []
    for x, y, z in points.tolist():
        u = (fx * x + skew * y + cx * z) / (z * label.width) if z > 0 else -1.0
        v = (fy * y + cy * z) / (z * label.height) if z > 0 else -1.0
        found.append(Pixel(u, v) if 0 <= u < 1 and 0 <= v < 1 else None)
    return found


def _box_vertices(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = pick(scene.solid, rng)
    assert o.box3d is not None
    return {"x": noun(o.name, rng)}, o.box3d.vertices.ravel().tolist(), (o.name,)


def _keypoint(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = pick(scene.solid, rng)
    point = pick(tuple(POINTS), rng)
    return {"x": noun(o.name, rng), "p": pick(POINTS[point], rng)}, o.keypoints[point].tolist(), (o.name,)


def _offset(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if len(scene.solid) < 2:
        return None
    a, b = two(scene.solid, rng)
    assert a.box3d is not None and b.box3d is not None
    return nouns(a, b, rng), (b.box3d.center - a.box3d.center).tolist(), (a.name, b.name)


def _camera_distance(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = pick(scene.solid, rng)
    return {"x": noun(o.name, rng)}, [distance(o)], (o.name,)


def _back_projection(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = pick(scene.solid, rng)
    assert o.box3d is not None
    corners = [pixel for pixel in pixels(o.box3d.vertices, scene.label) if pixel is not None]
    return ({"x": noun(o.name, rng)}, [*corners], (o.name,)) if len(corners) == 8 else None


def _chain_of_thought(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if len(scene.solid) < 2:
        return None
    for _ in range(4):  # a near-tie is no reason to ask about something else
        a, b = two(scene.solid, rng)
        first, second = distance(a), distance(b)
        if abs(first - second) >= NEAR_TIE * max(first, second):
            closer = a.name if first < second else b.name
            segments: Segments = [
                f"the {a.name} is ", first, f" and the {b.name} is ", second, f" so the {closer} is closer"
            ]  # fmt: skip
            return nouns(a, b, rng), segments, (a.name, b.name)
    return None


def _pixel_point(scene: Scene, rng: np.random.Generator) -> Answer | None:
    """Where a pixel drawn at random is in 3D, whatever it shows."""
    if scene.depth is None:
        return None
    row, column = (int(rng.random() * size) for size in scene.depth.shape)
    z = float(scene.depth[row, column])
    if not (np.isfinite(z) and z > 0):
        return None
    label = scene.label
    stride = label.height // scene.depth.shape[0]
    x, y = column * stride + stride // 2 + 0.5, row * stride + stride // 2 + 0.5
    point = z * np.linalg.solve(label.intrinsics, [x, y, 1.0])
    return {"p": str(Pixel(x / label.width, y / label.height))}, point.tolist(), ()


MAKERS: Mapping[str, Maker] = {
    "box_vertices": _box_vertices,
    "keypoint": _keypoint,
    "offset": _offset,
    "distance": _camera_distance,
    "back_projection": _back_projection,
    "chain_of_thought": _chain_of_thought,
}
MAKERS_PIXEL: Mapping[str, Maker] = {"pixel_point": _pixel_point}
"""3D questions that know of no object: the paper's ablation."""
