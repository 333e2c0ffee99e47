"""The answers to 2D questions, which a small VLM is pretrained on, worked out from a label."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from spear.labels.questions.answers import (
    NEAR_TIE,
    Answer,
    Maker,
    Scene,
    Segments,
    is_a,
    noun,
    nouns,
    pick,
    two,
)
from spear.labels.questions.templates import with_article
from spear.types import LabeledObject, Pixel


def _fraction(value: float, size: int) -> float:
    return min(max(value / size, 0.0), 1.0 - 1e-6)


def _where_2d(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.flat:
        return None
    o = pick(scene.flat, rng)
    x0, y0, x1, y1 = o.box2d.tolist()
    w, h = scene.label.width, scene.label.height
    corners: Segments = [Pixel(_fraction(x0, w), _fraction(y0, h)), Pixel(_fraction(x1, w), _fraction(y1, h))]
    return {"x": noun(o.name, rng)}, corners, (o.name,)


def _middle(o: LabeledObject, scene: Scene) -> Pixel:
    x0, y0, x1, y1 = o.box2d.tolist()
    return Pixel(_fraction((x0 + x1) / 2, scene.label.width), _fraction((y0 + y1) / 2, scene.label.height))


def _centre_2d(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.flat:
        return None
    o = pick(scene.flat, rng)
    return {"x": noun(o.name, rng)}, [_middle(o, scene)], (o.name,)


def _what_at(scene: Scene, rng: np.random.Generator) -> Answer | None:
    """Which object is at a point: somewhere in the middle half of its 2D box."""
    if not scene.flat:
        return None
    o = pick(scene.flat, rng)
    x0, y0, x1, y1 = o.box2d.tolist()
    u, v = 0.3 + 0.4 * rng.random(), 0.3 + 0.4 * rng.random()
    w, h = scene.label.width, scene.label.height
    place = Pixel(_fraction(x0 + u * (x1 - x0), w), _fraction(y0 + v * (y1 - y0), h))
    return {"p": str(place)}, [o.name], (o.name,)


def _exists(scene: Scene, rng: np.random.Generator) -> Answer | None:
    shown = [o.name for o in scene.label.objects]
    if shown and rng.random() < 0.5:
        name, answer = pick(shown, rng), "yes"
    else:
        name, answer = pick(scene.absent, rng), "no"
        if any(is_a(other, name) for other in shown):
            return None
    return {"x": with_article(name, definite=False)}, [answer], (name,)


def _count(scene: Scene, rng: np.random.Generator) -> Answer | None:
    shown = [o.name for o in scene.label.objects]
    name = pick(shown if shown and rng.random() < 0.8 else scene.absent, rng)
    return {"x": name}, [str(sum(is_a(other, name) for other in shown))], (name,)


def _which_side(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if not scene.flat:
        return None
    o = pick(scene.flat, rng)
    x = _middle(o, scene).x
    if abs(x - 0.5) < NEAR_TIE:
        return None
    return {"x": noun(o.name, rng)}, ["left" if x < 0.5 else "right"], (o.name,)


def _left_or_right(scene: Scene, rng: np.random.Generator) -> Answer | None:
    if len(scene.flat) < 2:
        return None
    a, b = two(scene.flat, rng)
    gap = _middle(a, scene).x - _middle(b, scene).x
    if abs(gap) < NEAR_TIE:
        return None
    return nouns(a, b, rng), ["left" if gap < 0 else "right"], (a.name, b.name)


def _list(scene: Scene, rng: np.random.Generator) -> Answer | None:
    objects = sorted(scene.label.objects, key=lambda o: _middle(o, scene).x)
    places = [_middle(o, scene).x for o in objects]
    if not objects or any(b - a < NEAR_TIE / 2 for a, b in pairwise(places)):
        return None
    names = tuple(o.name for o in objects)
    return {}, [", ".join(names)], names


MAKERS_2D: Mapping[str, Maker] = {
    "what_at": _what_at,
    "where_2d": _where_2d,
    "centre_2d": _centre_2d,
    "exists": _exists,
    "count": _count,
    "which_side": _which_side,
    "left_or_right": _left_or_right,
    "list": _list,
}
