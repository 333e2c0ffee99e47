"""The answers to all families of questions, 3D and 2D, worked out from a label.

Most families ask about one object or two, drawn at random; `_one` and `_two` make these from what is said
about the objects drawn. Random numbers are drawn in a fixed order: objects first, their wording last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal, TypeVar

import numpy as np

from spear.labels.questions.templates import EVERYDAY_NAMES, KEYPOINT_NAMES, is_a, with_article
from spear.labels.store import DEPTH_STRIDE_PX
from spear.types import Array, Box3D, LabeledImage, LabeledObject, Pixel, Segments

MIN_RELATIVE_GAP = 0.05
"""Distances that differ by less than this fraction of the larger are not compared, nor places nearer to each
other than this fraction of the image's width (our choice)."""


@dataclass(frozen=True)
class QuestionScene:
    """A label, and its objects fit for 3D questions (`solid`) and for 2D ones (`flat`).

    depth  of the image's pixels, where it is known, as `store.write_depth` keeps it: of the middle one of
           each square of `STRIDE` pixels, in the label's unit, 0 or not finite where unknown.
    """

    label: LabeledImage
    solid: Sequence[LabeledObject]
    flat: Sequence[LabeledObject]
    depth: Array | None = None


T = TypeVar("T")
Random = np.random.Generator
Draft = tuple[dict[str, str], Segments, tuple[str, ...]]
"""What fills a template ({"x": name, …}), the answer, and the names asked about."""
Maker = Callable[[QuestionScene, Random], Draft | None]
"""Asks about a scene at random; None when it does not allow the question drawn."""
Fit = Literal["solid", "flat"]


def draw_one(items: Sequence[T], rng: Random) -> T:
    """One of `items`, all alike likely."""
    return items[int(rng.random() * len(items))]


def _noun(o: LabeledObject, rng: Random) -> str:
    rng.random()  # once chose the article: without it every seed would give other questions
    return with_article(o.name)


def _one(fit: Fit, say: Callable[[LabeledObject, LabeledImage], Segments | None]) -> Maker:
    """Asks about one object what `say` answers."""

    def make(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, fit)
        if not objects:
            return None
        o = draw_one(objects, rng)
        said = say(o, scene.label)
        return None if said is None else ({"x": _noun(o, rng)}, said, (o.name,))

    return make


def _two(
    fit: Fit,
    say: Callable[[LabeledObject, LabeledObject, LabeledImage], Segments | None],
    tries: int = 1,
) -> Maker:
    """Asks about two objects what `say` answers; of other two when it says nothing, `tries` times in all."""

    def make(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, fit)
        for _ in range(tries if len(objects) > 1 else 0):
            first = int(rng.random() * len(objects))
            second = first + 1 + int(rng.random() * (len(objects) - 1))
            a, b = objects[first], objects[second % len(objects)]
            if (said := say(a, b, scene.label)) is not None:
                return {"x": _noun(a, rng), "y": _noun(b, rng)}, said, (a.name, b.name)
        return None

    return make


def _box(o: LabeledObject) -> Box3D:
    assert o.box3d is not None
    return o.box3d


def compute_distance(o: LabeledObject) -> float:
    """From the camera to the middle of the object's box, in the label's unit."""
    x, y, z = _box(o).center.tolist()
    return sqrt(x * x + y * y + z * z)


def project_to_pixels(points: Array, label: LabeledImage) -> list[Pixel | None]:
    """Where points [n, 3] appear; None outside the image or behind the camera."""
    (fx, skew, cx), (_, fy, cy), _ = label.intrinsics.tolist()
    found: list[Pixel | None] = []
    for x, y, z in points.tolist():
        u = (fx * x + skew * y + cx * z) / (z * label.width) if z > 0 else -1.0
        v = (fy * y + cy * z) / (z * label.height) if z > 0 else -1.0
        found.append(Pixel(u, v) if 0 <= u < 1 and 0 <= v < 1 else None)
    return found


def _keypoint(scene: QuestionScene, rng: Random) -> Draft | None:
    if not scene.solid:
        return None
    o, point = draw_one(scene.solid, rng), draw_one(tuple(KEYPOINT_NAMES), rng)
    return (
        {"x": _noun(o, rng), "p": draw_one(KEYPOINT_NAMES[point], rng)},
        o.keypoints[point].tolist(),
        (o.name,),
    )


def _back_projection(o: LabeledObject, label: LabeledImage) -> Segments | None:
    corners = [pixel for pixel in project_to_pixels(_box(o).vertices, label) if pixel is not None]
    return [*corners] if len(corners) == 8 else None


def _closer(a: LabeledObject, b: LabeledObject, label: LabeledImage) -> Segments | None:
    first, second = compute_distance(a), compute_distance(b)
    if abs(first - second) < MIN_RELATIVE_GAP * max(first, second):
        return None
    closer = a.name if first < second else b.name
    return [
        f"the {a.name} is ",
        first,
        f" and the {b.name} is ",
        second,
        f" so the {closer} is closer",
    ]


def _pixel_point(scene: QuestionScene, rng: Random) -> Draft | None:
    """Where a pixel drawn at random is in 3D, whatever it shows."""
    if scene.depth is None:
        return None
    row, column = (int(rng.random() * size) for size in scene.depth.shape)
    z = float(scene.depth[row, column])
    if not (np.isfinite(z) and z > 0):
        return None
    label = scene.label
    x, y = (place * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5 for place in (column, row))
    point = z * np.linalg.solve(label.intrinsics, [x, y, 1.0])
    return {"p": str(Pixel(x / label.width, y / label.height))}, point.tolist(), ()


def _pixel(x: float, y: float, label: LabeledImage) -> Pixel:
    """A place given in pixels, cut at the image's edge."""
    return Pixel(
        *(min(max(p / n, 0.0), 1.0 - 1e-6) for p, n in ((x, label.width), (y, label.height)))
    )


def _corners(o: LabeledObject, label: LabeledImage) -> Segments:
    return [_pixel(x, y, label) for x, y in o.box2d.reshape(2, 2).tolist()]


def _middle(o: LabeledObject, label: LabeledImage) -> Pixel:
    x0, y0, x1, y1 = o.box2d.tolist()
    return _pixel((x0 + x1) / 2, (y0 + y1) / 2, label)


def _what_at(scene: QuestionScene, rng: Random) -> Draft | None:
    """Which object is at a point: one of its pixels in the middle of its 2D box, in no smaller mask."""
    if not scene.flat:
        return None
    o, label = draw_one(scene.flat, rng), scene.label
    x0, y0, x1, y1 = o.box2d.tolist()
    for _ in range(4):
        u, v = 0.3 + 0.4 * rng.random(), 0.3 + 0.4 * rng.random()
        place = _pixel(x0 + u * (x1 - x0), y0 + v * (y1 - y0), label)
        pixel = int(place.x * label.width) * label.height + int(place.y * label.height)
        there = [
            x for x in label.objects if np.searchsorted(np.cumsum(x.mask), pixel, side="right") % 2
        ]
        if min(there, key=lambda x: sum(x.mask[1::2]), default=None) is o:
            return {"p": str(place)}, [o.name], (o.name,)
    return None


def _exists(scene: QuestionScene, rng: Random) -> Draft | None:
    shown = [o.name for o in scene.label.objects]
    if shown and rng.random() < 0.5:
        name, answer = draw_one(shown, rng), "yes"
    else:
        name, answer = draw_one(EVERYDAY_NAMES, rng), "no"
        if any(
            is_a(part, name)
            for other in shown
            for part in (other, *other.replace("_", " ").split())
        ):
            return None
    return {"x": with_article(name, definite=False)}, [answer], (name,)


def _count(scene: QuestionScene, rng: Random) -> Draft | None:
    shown = [o.name for o in scene.label.objects]
    name = draw_one(shown if shown and rng.random() < 0.8 else EVERYDAY_NAMES, rng)
    called, meant = (sum(is_a(other, name, exact) for other in shown) for exact in (True, False))
    return ({"x": name}, [str(called)], (name,)) if called == meant else None


def _left_or_right(gap: float) -> Segments | None:
    """Which side something is on that is so far right of the other, in widths of the image."""
    return None if abs(gap) < MIN_RELATIVE_GAP else ["left" if gap < 0 else "right"]


def _list(scene: QuestionScene, rng: Random) -> Draft | None:
    objects = sorted(scene.label.objects, key=lambda o: _middle(o, scene.label).x)
    places = [_middle(o, scene.label).x for o in objects]
    if not objects or any(b - a < MIN_RELATIVE_GAP / 2 for a, b in pairwise(places)):
        return None
    names = tuple(o.name for o in objects)
    return {}, [", ".join(names)], names


DRAFTERS: Mapping[str, Maker] = {
    "box_vertices": _one("solid", lambda o, label: _box(o).vertices.ravel().tolist()),
    "keypoint": _keypoint,
    "offset": _two("solid", lambda a, b, label: (_box(b).center - _box(a).center).tolist()),
    "distance": _one("solid", lambda o, label: [compute_distance(o)]),
    "back_projection": _one("solid", _back_projection),
    # a near-tie is no reason to ask about something else
    "chain_of_thought": _two("solid", _closer, tries=4),
    "what_at": _what_at,
    "where_2d": _one("flat", _corners),
    "centre_2d": _one("flat", lambda o, label: [_middle(o, label)]),
    "exists": _exists,
    "count": _count,
    "which_side": _one("flat", lambda o, label: _left_or_right(_middle(o, label).x - 0.5)),
    "left_or_right": _two(
        "flat", lambda a, b, seen: _left_or_right(_middle(a, seen).x - _middle(b, seen).x)
    ),
    "list": _list,
    "pixel_point": _pixel_point,
}
"""Family of `templates` → what asks it. "pixel_point" knows of no object: it is the paper's ablation."""
