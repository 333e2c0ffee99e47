"""The answers to all types of questions, 3D and 2D, worked out from a label.

Most types ask about one object or two, drawn at random; `_about_one_object` and
`_about_two_objects` make drafters of these from a function that answers for the objects drawn.
Random numbers are drawn in a fixed order: objects first, their wording last.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from spear.labels.questions.templates import EVERYDAY_NAMES, KEYPOINT_NAMES, is_a, with_article
from spear.labels.store import DEPTH_STRIDE_PX
from spear.types import Array, Box3D, LabeledImage, LabeledObject, Pixel, Segments

MIN_RELATIVE_GAP = 0.05
"""Distances that differ by less than this fraction of the larger are not compared, nor locations
nearer to each other than this fraction of the image's width (our choice)."""
NUM_PAIR_TRIES = 4  # of "chain_of_thought", for which many pairs are too close to compare
NUM_POINT_TRIES = 4  # of "what_at", whose points may fall beside the object


@dataclass(frozen=True)
class QuestionScene:
    """What can be asked about in an image.

    Attributes:
        label: The image's label.
        objects_3d: Its objects that 3D questions may be about.
        objects_2d: Its objects that 2D questions may be about.
        depth: The image's depth, where it is known, as `store.write_images_with_depth` stores it:
            that of the middle pixel of each square of `DEPTH_STRIDE_PX` pixels, in the label's
            unit, 0 or not finite where unknown.
    """

    label: LabeledImage
    objects_3d: Sequence[LabeledObject]
    objects_2d: Sequence[LabeledObject]
    depth: Array | None = None


class Draft(NamedTuple):
    """A question before it has words.

    Attributes:
        words: What fills the gaps of a template: {"x": name, …}.
        segments: The answer.
        names: The names asked about.
    """

    words: dict[str, str]
    segments: Segments
    names: tuple[str, ...] = ()


T = TypeVar("T")
Random = np.random.Generator
Drafter = Callable[[QuestionScene, Random], Draft | None]
"""Asks about a scene at random; None when it does not allow the question drawn."""
ObjectChoice = Literal["objects_3d", "objects_2d"]


def draw_one(items: Sequence[T], rng: Random) -> T:
    """Draw one of `items`, all with equal chance."""
    return items[int(rng.random() * len(items))]


def _word_object(o: LabeledObject, rng: Random) -> str:
    # Earlier versions drew the article here. The draw stays, so that seeds give the same questions.
    rng.random()
    return with_article(o.name)


def _about_one_object(
    choice: ObjectChoice, answer: Callable[[LabeledObject, LabeledImage], Segments | None]
) -> Drafter:
    """A drafter that asks about one object."""

    def draft(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, choice)
        if not objects:
            return None
        o = draw_one(objects, rng)
        segments = answer(o, scene.label)
        if segments is None:
            return None
        return Draft({"x": _word_object(o, rng)}, segments, (o.name,))

    return draft


def _about_two_objects(
    choice: ObjectChoice,
    answer: Callable[[LabeledObject, LabeledObject, LabeledImage], Segments | None],
    num_tries: int = 1,
) -> Drafter:
    """A drafter that asks about two objects; when they allow no answer it draws another two."""

    def draft(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, choice)
        if len(objects) < 2:
            return None
        for _ in range(num_tries):
            first = int(rng.random() * len(objects))
            second = first + 1 + int(rng.random() * (len(objects) - 1))
            a = objects[first]
            b = objects[second % len(objects)]
            segments = answer(a, b, scene.label)
            if segments is not None:
                words = {"x": _word_object(a, rng), "y": _word_object(b, rng)}
                return Draft(words, segments, (a.name, b.name))
        return None

    return draft


# 3D answers


def _get_box(o: LabeledObject) -> Box3D:
    assert o.box3d is not None
    return o.box3d


def compute_distance(o: LabeledObject) -> float:
    """The distance from the camera to the center of the object's box, in the label's unit."""
    x, y, z = _get_box(o).center.tolist()
    return sqrt(x * x + y * y + z * z)


def project_to_pixels(points: Array, label: LabeledImage) -> list[Pixel | None]:
    """Where points [n, 3] appear in the image; None outside the image or behind the camera."""
    (fx, skew, cx), (_, fy, cy), _ = label.intrinsics.tolist()
    pixels: list[Pixel | None] = []
    for x, y, z in points.tolist():
        u = (fx * x + skew * y + cx * z) / (z * label.width) if z > 0 else -1.0
        v = (fy * y + cy * z) / (z * label.height) if z > 0 else -1.0
        is_inside = 0 <= u < 1 and 0 <= v < 1
        pixels.append(Pixel(u, v) if is_inside else None)
    return pixels


def _answer_box_vertices(o: LabeledObject, label: LabeledImage) -> Segments:
    return _get_box(o).vertices.ravel().tolist()


def _answer_offset(a: LabeledObject, b: LabeledObject, label: LabeledImage) -> Segments:
    return (_get_box(b).center - _get_box(a).center).tolist()


def _answer_distance(o: LabeledObject, label: LabeledImage) -> Segments:
    return [compute_distance(o)]


def _answer_back_projection(o: LabeledObject, label: LabeledImage) -> Segments | None:
    corners = [p for p in project_to_pixels(_get_box(o).vertices, label) if p is not None]
    return [*corners] if len(corners) == 8 else None


def _answer_chain_of_thought(
    a: LabeledObject, b: LabeledObject, label: LabeledImage
) -> Segments | None:
    distance_a = compute_distance(a)
    distance_b = compute_distance(b)
    if abs(distance_a - distance_b) < MIN_RELATIVE_GAP * max(distance_a, distance_b):
        return None
    closer = a.name if distance_a < distance_b else b.name
    return [
        f"the {a.name} is ",
        distance_a,
        f" and the {b.name} is ",
        distance_b,
        f" so the {closer} is closer",
    ]


def _draft_keypoint(scene: QuestionScene, rng: Random) -> Draft | None:
    if not scene.objects_3d:
        return None
    o = draw_one(scene.objects_3d, rng)
    keypoint = draw_one(tuple(KEYPOINT_NAMES), rng)
    words = {"x": _word_object(o, rng), "p": draw_one(KEYPOINT_NAMES[keypoint], rng)}
    return Draft(words, o.keypoints[keypoint].tolist(), (o.name,))


def _draft_pixel_point(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask where a pixel drawn at random is in 3D, whatever it shows: the paper's ablation."""
    if scene.depth is None:
        return None
    num_rows, num_columns = scene.depth.shape
    row = int(rng.random() * num_rows)
    column = int(rng.random() * num_columns)
    z = float(scene.depth[row, column])
    if not np.isfinite(z) or z <= 0:
        return None
    label = scene.label
    x = column * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5
    y = row * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5
    point = z * np.linalg.solve(label.intrinsics, [x, y, 1.0])
    pixel = Pixel(x / label.width, y / label.height)
    return Draft({"p": str(pixel)}, point.tolist())


# 2D answers


def _to_pixel(x: float, y: float, label: LabeledImage) -> Pixel:
    """A location given in pixels, clipped to the image."""
    return Pixel(_clip_to_unit(x / label.width), _clip_to_unit(y / label.height))


def _clip_to_unit(fraction: float) -> float:
    return min(max(fraction, 0.0), 1.0 - 1e-6)


def _find_center_2d(o: LabeledObject, label: LabeledImage) -> Pixel:
    x0, y0, x1, y1 = o.box2d.tolist()
    return _to_pixel((x0 + x1) / 2, (y0 + y1) / 2, label)


def _answer_where_2d(o: LabeledObject, label: LabeledImage) -> Segments:
    return [_to_pixel(x, y, label) for x, y in o.box2d.reshape(2, 2).tolist()]


def _answer_center_2d(o: LabeledObject, label: LabeledImage) -> Segments:
    return [_find_center_2d(o, label)]


def _answer_which_side(o: LabeledObject, label: LabeledImage) -> Segments | None:
    return _name_side(_find_center_2d(o, label).x - 0.5)


def _answer_left_or_right(
    a: LabeledObject, b: LabeledObject, label: LabeledImage
) -> Segments | None:
    return _name_side(_find_center_2d(a, label).x - _find_center_2d(b, label).x)


def _name_side(gap: float) -> Segments | None:
    """The side of something that is `gap` image widths to the right; None when it is too close."""
    if abs(gap) < MIN_RELATIVE_GAP:
        return None
    return ["left" if gap < 0 else "right"]


def _draft_what_at(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask which object is at a point: one of its pixels in the middle of its 2D box, in no smaller
    mask."""
    if not scene.objects_2d:
        return None
    o = draw_one(scene.objects_2d, rng)
    label = scene.label
    x0, y0, x1, y1 = o.box2d.tolist()
    for _ in range(NUM_POINT_TRIES):
        u = 0.3 + 0.4 * rng.random()
        v = 0.3 + 0.4 * rng.random()
        pixel = _to_pixel(x0 + u * (x1 - x0), y0 + v * (y1 - y0), label)
        objects = _find_objects_at(pixel, label)
        if min(objects, key=_count_mask_pixels, default=None) is o:
            return Draft({"p": str(pixel)}, [o.name], (o.name,))
    return None


def _find_objects_at(pixel: Pixel, label: LabeledImage) -> list[LabeledObject]:
    """The objects whose masks contain a pixel."""
    column = int(pixel.x * label.width)
    row = int(pixel.y * label.height)
    index = column * label.height + row  # run lengths go column by column
    objects = []
    for o in label.objects:
        run_ends = np.cumsum(o.mask_runs)
        run = np.searchsorted(run_ends, index, side="right")
        is_inside_mask = run % 2 == 1  # runs alternate and begin with zeros, so odd runs are ones
        if is_inside_mask:
            objects.append(o)
    return objects


def _count_mask_pixels(o: LabeledObject) -> int:
    return sum(o.mask_runs[1::2])  # the runs of ones


def _draft_exists(scene: QuestionScene, rng: Random) -> Draft | None:
    visible_names = [o.name for o in scene.label.objects]
    if visible_names and rng.random() < 0.5:
        name = draw_one(visible_names, rng)
        answer = "yes"
    else:
        name = draw_one(EVERYDAY_NAMES, rng)
        answer = "no"
        if any(_may_mean(visible_name, name) for visible_name in visible_names):
            return None
    return Draft({"x": with_article(name, definite=False)}, [answer], (name,))


def _may_mean(visible_name: str, name: str) -> bool:
    """Whether an object's name, or a word of it, may mean what `name` asks for."""
    words = visible_name.replace("_", " ").split()
    return any(is_a(candidate, name) for candidate in (visible_name, *words))


def _draft_count(scene: QuestionScene, rng: Random) -> Draft | None:
    visible_names = [o.name for o in scene.label.objects]
    is_visible = bool(visible_names) and rng.random() < 0.8
    name = draw_one(visible_names if is_visible else EVERYDAY_NAMES, rng)
    num_exact = sum(is_a(visible_name, name, exact=True) for visible_name in visible_names)
    num_meant = sum(is_a(visible_name, name) for visible_name in visible_names)
    if num_exact != num_meant:  # whether synonyms count is open
        return None
    return Draft({"x": name}, [str(num_exact)], (name,))


def _draft_list(scene: QuestionScene, rng: Random) -> Draft | None:
    located = [(_find_center_2d(o, scene.label).x, o.name) for o in scene.label.objects]
    located.sort(key=_get_location)
    if not located:
        return None
    for (x, _), (next_x, _) in pairwise(located):
        if next_x - x < MIN_RELATIVE_GAP / 2:
            return None
    names = tuple(name for _, name in located)
    return Draft({}, [", ".join(names)], names)


def _get_location(located: tuple[float, str]) -> float:
    x, _ = located
    return x


DRAFTERS: Mapping[str, Drafter] = {
    "box_vertices": _about_one_object("objects_3d", _answer_box_vertices),
    "keypoint": _draft_keypoint,
    "offset": _about_two_objects("objects_3d", _answer_offset),
    "distance": _about_one_object("objects_3d", _answer_distance),
    "back_projection": _about_one_object("objects_3d", _answer_back_projection),
    # Two objects that are too close to compare are no reason to ask about something else.
    "chain_of_thought": _about_two_objects("objects_3d", _answer_chain_of_thought, NUM_PAIR_TRIES),
    "what_at": _draft_what_at,
    "where_2d": _about_one_object("objects_2d", _answer_where_2d),
    "centre_2d": _about_one_object("objects_2d", _answer_center_2d),
    "exists": _draft_exists,
    "count": _draft_count,
    "which_side": _about_one_object("objects_2d", _answer_which_side),
    "left_or_right": _about_two_objects("objects_2d", _answer_left_or_right),
    "list": _draft_list,
    "pixel_point": _draft_pixel_point,
}
"""Question type → what drafts such a question."""
