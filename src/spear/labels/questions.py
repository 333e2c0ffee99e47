"""Questions and answers about a labelled image: six 3D families, and 2D ones to pretrain a small VLM on.

3D answers (numbers in the label's unit, camera frame: x right, y down, z forward):
    box_vertices      24 numbers: the eight vertices in `box3d.order_vertices` order, x y z each.
    keypoint          3: the closest, the furthest or the centre point of X.
    offset            3: centre of Y minus centre of X, signed.
    distance          1: from the camera to the centre of X, Euclidean.
    back_projection   8 pixels: where the vertices appear in the image.
    chain_of_thought  "the X is d and the Y is e so the X is closer".

The objects asked about are those that a reader can tell apart and see: the only one of their name in the
image, with a box, their centre inside the image and enough of their outline visible. Which of two is closer
is not asked when their distances differ by less than 5 % (our choice).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import TypeVar

import numpy as np

from spear.errors import SpearError, unknown_name
from spear.labels.templates import EVERYDAY, POINTS, PROMPTS, with_article
from spear.types import Array, LabeledImage, LabeledObject, Pixel, Question

FAMILIES = ("box_vertices", "keypoint", "offset", "distance", "back_projection", "chain_of_thought")
FAMILIES_2D = ("what_at", "where_2d", "centre_2d", "exists", "count", "which_side", "left_or_right", "list")

NEAR_TIE = 0.05
"""Distances, or places as fractions of the image's width, closer than this are not compared."""

MIN_VISIBLE = 0.6
"""Objects less of whose outline is seen are not asked about (the "visible" score; our choice)."""


@dataclass(frozen=True)
class _Scene:
    """A label, its objects fit for 3D questions (`solid`) and for 2D ones (`flat`), and names it may lack."""

    label: LabeledImage
    solid: list[LabeledObject]
    flat: list[LabeledObject]
    absent: Sequence[str]


T = TypeVar("T")
Segments = list[str | float | Pixel]
Answer = tuple[dict[str, str], Segments, tuple[str, ...]]
"""What fills a template ({"x": name, …}), the answer, and the names asked about."""


def askable(label: LabeledImage, min_visible: float = MIN_VISIBLE) -> list[LabeledObject]:
    """The objects that 3D questions are asked about."""
    return [o for o in _distinct(label, min_visible) if o.box3d is not None and _centred(o, label)]


def _distinct(label: LabeledImage, min_visible: float) -> list[LabeledObject]:
    counts = Counter(o.name for o in label.objects)
    return [o for o in label.objects if counts[o.name] == 1 and o.scores.get("visible", 1.0) >= min_visible]


def _centred(o: LabeledObject, label: LabeledImage) -> bool:
    assert o.box3d is not None
    (x,) = _pixels(o.box3d.center[None], label)
    return x is not None


def generate(
    label: LabeledImage,
    rng: np.random.Generator,
    pairs: tuple[int, int] = (1, 4),
    families: Sequence[str] = FAMILIES,
    min_visible: float = MIN_VISIBLE,
    absent: Sequence[str] = EVERYDAY,
) -> list[Question]:
    """Ask about an image.

    Args:
        label: the image and its objects.
        rng: decides everything random here; the same state gives the same questions.
        pairs: fewest and most questions.
        families: of `FAMILIES` and `FAMILIES_2D`, drawn with equal chance.
        min_visible: objects with a lower "visible" score are not asked about.
        absent: names that "exists" may ask about when the image does not show them.

    Returns:
        Up to `pairs[1]` different questions; fewer than `pairs[0]`, or none, when the image does not allow
        more.

    Raises:
        SpearError: an unknown family, or pairs that are not 1 <= fewest <= most.
    """
    fewest, most = pairs
    if not 1 <= fewest <= most:
        raise SpearError(f"pairs {pairs}: questions per image: give 1 <= fewest <= most")
    for family in families:
        if family not in _MAKERS:
            raise unknown_name("question family", family, _MAKERS)
    flat = _distinct(label, min_visible)
    solid = [o for o in flat if o.box3d is not None and _centred(o, label)]
    scene = _Scene(label, solid, flat, absent)
    wanted = fewest + int(rng.random() * (most - fewest + 1))
    questions: list[Question] = []
    seen = set()
    for _ in range(4 * wanted):
        family = _pick(families, rng)
        answer = _MAKERS[family](scene, rng)
        if answer is None:
            continue
        words, segments, objects = answer
        key = (family, objects, tuple(segments))
        if key in seen:
            continue
        seen.add(key)
        prompt = _pick(PROMPTS[family], rng).format_map(words)
        questions.append(Question(family, prompt, segments, objects, label.unit))
        if len(questions) == wanted:
            break
    return questions


def all_texts(names: Sequence[str] = EVERYDAY) -> Iterator[str]:
    """Every template with every name, and every worded answer: the text that a small tokenizer is trained
    on."""
    for x, y in zip(names, [*names[1:], *names[:1]], strict=True):
        for definite in (True, False):
            words = {"x": with_article(x, definite), "y": with_article(y, definite)}
            for family, templates in PROMPTS.items():
                points = [word for synonyms in POINTS.values() for word in synonyms]
                fillings = points if family == "keypoint" else [""]
                for template in templates:
                    for p in fillings:
                        yield template.format_map({**words, "p": p})
        yield f"the {x} is  and the {y} is  so the {x} is closer"
        yield f"{x}, {y}"
    yield from ("yes", "no", "left", "right", *map(str, range(10)))


def _pick(items: Sequence[T], rng: np.random.Generator) -> T:
    return items[int(rng.random() * len(items))]


def _noun(name: str, rng: np.random.Generator) -> str:
    return with_article(name, rng.random() < 0.8)


def _distance(o: LabeledObject) -> float:
    assert o.box3d is not None
    x, y, z = o.box3d.center.tolist()
    return sqrt(x * x + y * y + z * z)


def _two(objects: Sequence[LabeledObject], rng: np.random.Generator) -> tuple[LabeledObject, LabeledObject]:
    first = int(rng.random() * len(objects))
    second = (first + 1 + int(rng.random() * (len(objects) - 1))) % len(objects)
    return objects[first], objects[second]


def _pixels(points: Array, label: LabeledImage) -> list[Pixel | None]:
    """Where points [n, 3] appear; None outside the image or behind the camera."""
    (fx, skew, cx), (_, fy, cy), _ = label.intrinsics.tolist()
    pixels: list[Pixel | None] = []
    for x, y, z in points.tolist():
        u = (fx * x + skew * y + cx * z) / (z * label.width) if z > 0 else -1.0
        v = (fy * y + cy * z) / (z * label.height) if z > 0 else -1.0
        pixels.append(Pixel(u, v) if 0 <= u < 1 and 0 <= v < 1 else None)
    return pixels


def _box_vertices(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = _pick(scene.solid, rng)
    assert o.box3d is not None
    return {"x": _noun(o.name, rng)}, o.box3d.vertices.ravel().tolist(), (o.name,)


def _keypoint(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = _pick(scene.solid, rng)
    point = _pick(tuple(POINTS), rng)
    return {"x": _noun(o.name, rng), "p": _pick(POINTS[point], rng)}, o.keypoints[point].tolist(), (o.name,)


def _offset(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if len(scene.solid) < 2:
        return None
    a, b = _two(scene.solid, rng)
    assert a.box3d is not None and b.box3d is not None
    return _nouns(a, b, rng), (b.box3d.center - a.box3d.center).tolist(), (a.name, b.name)


def _camera_distance(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = _pick(scene.solid, rng)
    return {"x": _noun(o.name, rng)}, [_distance(o)], (o.name,)


def _back_projection(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.solid:
        return None
    o = _pick(scene.solid, rng)
    assert o.box3d is not None
    pixels = [pixel for pixel in _pixels(o.box3d.vertices, scene.label) if pixel is not None]
    return ({"x": _noun(o.name, rng)}, [*pixels], (o.name,)) if len(pixels) == 8 else None


def _chain_of_thought(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if len(scene.solid) < 2:
        return None
    for _ in range(4):  # a near-tie is no reason to ask about something else
        a, b = _two(scene.solid, rng)
        first, second = _distance(a), _distance(b)
        if abs(first - second) >= NEAR_TIE * max(first, second):
            closer = a.name if first < second else b.name
            segments: Segments = [
                f"the {a.name} is ", first, f" and the {b.name} is ", second, f" so the {closer} is closer"
            ]  # fmt: skip
            return _nouns(a, b, rng), segments, (a.name, b.name)
    return None


def _nouns(a: LabeledObject, b: LabeledObject, rng: np.random.Generator) -> dict[str, str]:
    return {"x": _noun(a.name, rng), "y": _noun(b.name, rng)}


def _fraction(value: float, size: int) -> float:
    return min(max(value / size, 0.0), 1.0 - 1e-6)


def _where_2d(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.flat:
        return None
    o = _pick(scene.flat, rng)
    x0, y0, x1, y1 = o.box2d.tolist()
    w, h = scene.label.width, scene.label.height
    corners: Segments = [Pixel(_fraction(x0, w), _fraction(y0, h)), Pixel(_fraction(x1, w), _fraction(y1, h))]
    return {"x": _noun(o.name, rng)}, corners, (o.name,)


def _middle(o: LabeledObject, scene: _Scene) -> Pixel:
    x0, y0, x1, y1 = o.box2d.tolist()
    return Pixel(_fraction((x0 + x1) / 2, scene.label.width), _fraction((y0 + y1) / 2, scene.label.height))


def _centre_2d(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.flat:
        return None
    o = _pick(scene.flat, rng)
    return {"x": _noun(o.name, rng)}, [_middle(o, scene)], (o.name,)


def _what_at(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    """Which object is at a point: somewhere in the middle half of its 2D box."""
    if not scene.flat:
        return None
    o = _pick(scene.flat, rng)
    x0, y0, x1, y1 = o.box2d.tolist()
    u, v = 0.3 + 0.4 * rng.random(), 0.3 + 0.4 * rng.random()
    w, h = scene.label.width, scene.label.height
    place = Pixel(_fraction(x0 + u * (x1 - x0), w), _fraction(y0 + v * (y1 - y0), h))
    return {"p": str(place)}, [o.name], (o.name,)


def _exists(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    shown = [o.name for o in scene.label.objects]
    if shown and rng.random() < 0.5:
        name, answer = _pick(shown, rng), "yes"
    else:
        name, answer = _pick(scene.absent, rng), "no"
        if name in shown:
            return None
    return {"x": with_article(name, definite=False)}, [answer], (name,)


def _count(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    shown = [o.name for o in scene.label.objects]
    name = _pick(shown if shown and rng.random() < 0.8 else scene.absent, rng)
    return {"x": name}, [str(shown.count(name))], (name,)


def _which_side(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.flat:
        return None
    o = _pick(scene.flat, rng)
    x = _middle(o, scene).x
    if abs(x - 0.5) < NEAR_TIE:
        return None
    return {"x": _noun(o.name, rng)}, ["left" if x < 0.5 else "right"], (o.name,)


def _left_or_right(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    if len(scene.flat) < 2:
        return None
    a, b = _two(scene.flat, rng)
    gap = _middle(a, scene).x - _middle(b, scene).x
    if abs(gap) < NEAR_TIE:
        return None
    return _nouns(a, b, rng), ["left" if gap < 0 else "right"], (a.name, b.name)


def _list(scene: _Scene, rng: np.random.Generator) -> Answer | None:
    objects = sorted(scene.label.objects, key=lambda o: _middle(o, scene).x)
    places = [_middle(o, scene).x for o in objects]
    if not objects or any(b - a < NEAR_TIE / 2 for a, b in pairwise(places)):
        return None
    names = tuple(o.name for o in objects)
    return {}, [", ".join(names)], names


_MAKERS: Mapping[str, Callable[[_Scene, np.random.Generator], Answer | None]] = {
    "box_vertices": _box_vertices,
    "keypoint": _keypoint,
    "offset": _offset,
    "distance": _camera_distance,
    "back_projection": _back_projection,
    "chain_of_thought": _chain_of_thought,
    "what_at": _what_at,
    "where_2d": _where_2d,
    "centre_2d": _centre_2d,
    "exists": _exists,
    "count": _count,
    "which_side": _which_side,
    "left_or_right": _left_or_right,
    "list": _list,
}
