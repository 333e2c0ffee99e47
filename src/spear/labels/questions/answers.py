"""Drafts of questions of all types, 3D and 2D: what is asked about, and the answer from the label.

A *drafter* draws at random what to ask about and computes the answer. The module
`spear.labels.questions.generate` puts the draft into words. Most question types ask about one or
two objects. For these, `_about_one_object` and `_about_two_objects` make a drafter from a function
that computes the answer for given objects.

Random numbers are drawn in a fixed order, the objects first and their wording last, so that a seed
always gives the same questions.
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
"""No question compares two distances that differ by less than this fraction of the larger one, or
two locations that are nearer to each other than this fraction of the image's width (our choice)."""
NUM_PAIR_TRIES = 4
"""Questions of "chain_of_thought" draw up to this many pairs of objects, because many pairs are at
nearly the same distance."""
NUM_POINT_TRIES = 4
"""Questions of "what_at" draw up to this many points, because a point may be outside the object's
mask."""


@dataclass(frozen=True)
class QuestionScene:
    """What can be asked about in an image.

    Attributes:
        label: The image's label.
        objects_3d: The image's objects that 3D questions may be about.
        objects_2d: The image's objects that 2D questions may be about.
        depth: [rows, columns] the image's depth in the label's unit, 0 or not finite where it is
            unknown. It has one value for each square of `DEPTH_STRIDE_PX` × `DEPTH_STRIDE_PX`
            pixels, that of the square's middle pixel (`store.write_images_with_depth`). None if the
            image has no depth.
    """

    label: LabeledImage
    objects_3d: Sequence[LabeledObject]
    objects_2d: Sequence[LabeledObject]
    depth: Array | None = None


class Draft(NamedTuple):
    """A question before it has words.

    Attributes:
        words: The words for the gaps of a prompt template: {"x": "the mug", …}.
        segments: The answer, as in `Question.segments`.
        names: The names of the objects that the question is about.
    """

    words: dict[str, str]
    segments: Segments
    names: tuple[str, ...] = ()


T = TypeVar("T")
Random = np.random.Generator
Drafter = Callable[[QuestionScene, Random], Draft | None]
"""Draws what to ask about in a scene; None if the scene does not allow the question that was
drawn."""
ObjectChoice = Literal["objects_3d", "objects_2d"]
"""The attribute of `QuestionScene` from which objects are drawn."""


def draw_one(items: Sequence[T], rng: Random) -> T:
    """Draw one of `items`, all with equal chance."""
    return items[int(rng.random() * len(items))]


def _word_object(o: LabeledObject, rng: Random) -> str:
    """The words for an object in a question."""
    # Earlier versions drew the article here. The draw stays, so that seeds give the same questions.
    rng.random()
    return with_article(o.name)


def _about_one_object(
    choice: ObjectChoice, answer: Callable[[LabeledObject, LabeledImage], Segments | None]
) -> Drafter:
    """Make a drafter that asks about one object.

    Args:
        choice: Which objects of the scene may be drawn.
        answer: Computes the answer for an object; None if the object allows no answer.
    """

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
    """Make a drafter that asks about two objects.

    Args:
        choice: Which objects of the scene may be drawn.
        answer: Computes the answer for two objects; None if they allow no answer.
        num_tries: How many pairs to draw until one allows an answer.
    """

    def draft(scene: QuestionScene, rng: Random) -> Draft | None:
        objects: Sequence[LabeledObject] = getattr(scene, choice)
        if len(objects) < 2:
            return None
        for _ in range(num_tries):
            # The second object is 1 to n - 1 places after the first one, so it is another one.
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
    """Project points [n, 3] to the image; None for points outside it or behind the camera."""
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
    """The vector from the center of `a` to the center of `b`."""
    return (_get_box(b).center - _get_box(a).center).tolist()


def _answer_distance(o: LabeledObject, label: LabeledImage) -> Segments:
    return [compute_distance(o)]


def _answer_back_projection(o: LabeledObject, label: LabeledImage) -> Segments | None:
    """The image locations of the box's vertices; None unless all eight are inside the image."""
    locations = project_to_pixels(_get_box(o).vertices, label)
    visible_locations = [location for location in locations if location is not None]
    return [*visible_locations] if len(visible_locations) == 8 else None


def _answer_chain_of_thought(
    a: LabeledObject, b: LabeledObject, label: LabeledImage
) -> Segments | None:
    """Which of two objects is closer, in words; None if their distances are nearly equal."""
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
    """Ask where a keypoint, drawn at random, of an object is."""
    if not scene.objects_3d:
        return None
    o = draw_one(scene.objects_3d, rng)
    keypoint = draw_one(tuple(KEYPOINT_NAMES), rng)
    words = {"x": _word_object(o, rng), "p": draw_one(KEYPOINT_NAMES[keypoint], rng)}
    return Draft(words, o.keypoints[keypoint].tolist(), (o.name,))


def _draft_pixel_point(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask for the 3D point that a pixel drawn at random shows, as in the paper's ablation."""
    if scene.depth is None:
        return None
    num_rows, num_columns = scene.depth.shape
    row = int(rng.random() * num_rows)
    column = int(rng.random() * num_columns)
    z = float(scene.depth[row, column])
    if not np.isfinite(z) or z <= 0:
        return None
    label = scene.label
    # The center of the middle pixel of the square for which the depth was stored
    x = column * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5
    y = row * DEPTH_STRIDE_PX + DEPTH_STRIDE_PX // 2 + 0.5
    point = z * np.linalg.solve(label.intrinsics, [x, y, 1.0])
    pixel = Pixel(x / label.width, y / label.height)
    return Draft({"p": str(pixel)}, point.tolist())


# 2D answers


def _to_pixel(x: float, y: float, label: LabeledImage) -> Pixel:
    """Convert pixel coordinates to a `Pixel` (fractions of the image), clipped to the image."""
    return Pixel(_clip_to_unit(x / label.width), _clip_to_unit(y / label.height))


def _clip_to_unit(fraction: float) -> float:
    """Clip to 0 <= fraction < 1, since a location of 1 is outside the image."""
    return min(max(fraction, 0.0), 1.0 - 1e-6)


def _find_center_2d(o: LabeledObject, label: LabeledImage) -> Pixel:
    """The center of an object's 2D box."""
    x0, y0, x1, y1 = o.box2d.tolist()
    return _to_pixel((x0 + x1) / 2, (y0 + y1) / 2, label)


def _answer_where_2d(o: LabeledObject, label: LabeledImage) -> Segments:
    """The top left and the bottom right corner of an object's 2D box."""
    corners = o.box2d.reshape(2, 2).tolist()
    return [_to_pixel(x, y, label) for x, y in corners]


def _answer_center_2d(o: LabeledObject, label: LabeledImage) -> Segments:
    return [_find_center_2d(o, label)]


def _answer_which_side(o: LabeledObject, label: LabeledImage) -> Segments | None:
    """The side of the image's middle on which an object is; None if it is near the middle."""
    return _name_side(_find_center_2d(o, label).x - 0.5)


def _answer_left_or_right(
    a: LabeledObject, b: LabeledObject, label: LabeledImage
) -> Segments | None:
    """The side of object `b` on which object `a` is; None if one is nearly above the other."""
    return _name_side(_find_center_2d(a, label).x - _find_center_2d(b, label).x)


def _name_side(gap: float) -> Segments | None:
    """The word for a horizontal distance, in image widths, that is positive to the right.

    It is None if the distance is too small to name a side.
    """
    if abs(gap) < MIN_RELATIVE_GAP:
        return None
    return ["left" if gap < 0 else "right"]


def _draft_what_at(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask which object is at a point.

    The point is drawn from the middle of an object's 2D box. Its object is the one with the
    smallest mask that contains the point, because a smaller object (an apple) may be inside the
    mask of a larger one (a plate).
    """
    if not scene.objects_2d:
        return None
    o = draw_one(scene.objects_2d, rng)
    label = scene.label
    x0, y0, x1, y1 = o.box2d.tolist()
    for _ in range(NUM_POINT_TRIES):
        u = 0.3 + 0.4 * rng.random()  # fraction of the box's width, from its left side
        v = 0.3 + 0.4 * rng.random()  # fraction of the box's height, from its top
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
        run = np.searchsorted(run_ends, index, side="right")  # the run that contains the pixel
        is_inside_mask = run % 2 == 1  # runs alternate and begin with zeros, so odd runs are ones
        if is_inside_mask:
            objects.append(o)
    return objects


def _count_mask_pixels(o: LabeledObject) -> int:
    return sum(o.mask_runs[1::2])  # the runs of ones


def _draft_exists(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask whether there is an object of some name; half of the time there is."""
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
    """Ask how many objects of some name there are; sometimes there are none."""
    visible_names = [o.name for o in scene.label.objects]
    is_visible = bool(visible_names) and rng.random() < 0.8
    name = draw_one(visible_names if is_visible else EVERYDAY_NAMES, rng)
    num_exact = sum(is_a(visible_name, name, exact=True) for visible_name in visible_names)
    num_meant = sum(is_a(visible_name, name) for visible_name in visible_names)
    # If there are objects with a synonym of the name, it is open whether they count.
    if num_exact != num_meant:
        return None
    return Draft({"x": name}, [str(num_exact)], (name,))


def _draft_list(scene: QuestionScene, rng: Random) -> Draft | None:
    """Ask for the names of all objects from left to right; None if two are nearly above another."""
    names_with_x = [(_find_center_2d(o, scene.label).x, o.name) for o in scene.label.objects]
    names_with_x.sort(key=_get_x)
    if not names_with_x:
        return None
    for (x, _), (next_x, _) in pairwise(names_with_x):
        if next_x - x < MIN_RELATIVE_GAP / 2:
            return None
    names = tuple(name for _, name in names_with_x)
    return Draft({}, [", ".join(names)], names)


def _get_x(x_and_name: tuple[float, str]) -> float:
    x, _ = x_and_name
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
"""Question type → the drafter of its questions."""
