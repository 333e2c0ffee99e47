"""Checks questions and answers by a second implementation, which shares no code with
`spear.labels`.

This module reads from the words of a prompt what is asked, as a person would. It then computes the
answer from the label: it rebuilds the boxes from their centers, sizes and axes, and projects points
without NumPy.

`CHECKED_TYPES`, at the end, has an entry for each question type.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spear.types import LabeledImage, LabeledObject, Pixel, Question

# Corners of a box: their offsets from its center along the box's axes (right, down, away from the
# camera), as fractions of the box's size.
NEAR, FAR = -0.5, 0.5
LEFT, RIGHT = -0.5, 0.5
TOP, BOTTOM = -0.5, 0.5
CORNERS = [
    (LEFT, TOP, NEAR),
    (RIGHT, TOP, NEAR),
    (RIGHT, TOP, FAR),
    (LEFT, TOP, FAR),
    (LEFT, BOTTOM, NEAR),
    (RIGHT, BOTTOM, NEAR),
    (RIGHT, BOTTOM, FAR),
    (LEFT, BOTTOM, FAR),
]

# An object is asked about only if its scores are at least these, and its "edge" score is at most
# `MAX_EDGE_SCORE`.
MIN_SCORES = {
    "visible": 0.7,
    "points": 30,
    "known": 0.8,
    "whole": 0.5,
    "stability": 0.6,
    "compact": 0.4,
}
MAX_EDGE_SCORE = 0.05
MIN_RELATIVE_DIFFERENCE = 0.05
"""Which of two objects is closer is asked only if their distances differ by this fraction."""

ComputeAnswer = Callable[[LabeledImage, list[LabeledObject], str], list[Any]]
"""The label, the objects in the order of their mention and the prompt -> the segments of the right
answer. A segment is a text, a number (float) or a location in the image (tuple x, y)."""


@dataclass(frozen=True)
class CheckedType:
    """How the questions of a type are recognized and answered.

    Attributes:
        wording: a regular expression that is found in prompts of the type.
        compute_answer: computes the right answer.
        num_objects: how many objects a prompt names.
        has_numbers: whether the answer has lengths, whose unit the prompt has to say if they are
            relative.
    """

    wording: str
    compute_answer: ComputeAnswer
    num_objects: int = 1
    has_numbers: bool = True


def find_answer_errors(label: LabeledImage, question: Question) -> list[str]:
    """Return what is wrong with a question about a labeled image; an empty list if it is right."""
    prompt = question.prompt
    question_type = _read_question_type(prompt)
    if question_type != question.question_type:
        return [f"reads like {question_type}, is {question.question_type}: {prompt}"]

    checked_type = CHECKED_TYPES[question_type]
    objects = _find_named_objects(label, prompt)
    names = [o.name for o in objects]
    if len(objects) != checked_type.num_objects:
        return [f"names {names}: {prompt}"]

    errors = []
    if sorted(names) != sorted(question.objects):
        errors.append(f"is said to be about {question.objects}: {prompt}")
    for o in objects:
        errors += [f"{o.name}: {reason}" for reason in _find_unfit_reasons(label, o)]
    if not _is_unit_right(label, question, checked_type):
        errors.append(f"unit {label.unit}: {prompt}")
    if question_type == "chain_of_thought" and _is_near_tie(objects):
        errors.append(f"a near-tie: {[_distance(o) for o in objects]}")

    expected_segments = checked_type.compute_answer(label, objects, prompt)
    segments = list(question.segments)
    if len(segments) != len(expected_segments):
        return [*errors, f"{len(segments)} segments instead of {len(expected_segments)}"]
    for segment, expected in zip(segments, expected_segments, strict=True):
        if not _is_same_segment(segment, expected):
            errors.append(f"{segment} instead of {expected}")
    return errors


def _is_unit_right(label: LabeledImage, question: Question, checked_type: CheckedType) -> bool:
    """Return whether the prompt and the question name the label's unit.

    The prompt must say that lengths are relative, exactly if they are and the answer has lengths.
    """
    says_relative = "relative" in question.prompt or "scale" in question.prompt
    should_say_relative = label.unit == "relative" and checked_type.has_numbers
    return (
        says_relative == should_say_relative
        and "metre" not in question.prompt
        and question.unit == label.unit
    )


def _is_near_tie(objects: list[LabeledObject]) -> bool:
    """Return whether two objects are too equally far away to ask which of them is closer."""
    near, far = sorted(_distance(o) for o in objects)
    return far - near < MIN_RELATIVE_DIFFERENCE * far


def _is_same_segment(segment: Any, expected: Any) -> bool:
    """Return whether a segment of an answer equals the expected one (see `ComputeAnswer`)."""
    if isinstance(expected, float):
        return isinstance(segment, float) and math.isclose(
            segment, expected, rel_tol=1e-4, abs_tol=1e-5
        )
    if isinstance(expected, tuple):
        if not isinstance(segment, Pixel):
            return False
        is_inside = 0 <= segment.x < 1 and 0 <= segment.y < 1
        return is_inside and math.dist((segment.x, segment.y), expected) < 1e-4
    return segment == expected


def _read_question_type(prompt: str) -> str:
    """Return the first of `CHECKED_TYPES` whose wording is found in a prompt."""
    return next(
        name
        for name, checked_type in CHECKED_TYPES.items()
        if re.search(checked_type.wording, prompt)
    )


def _find_named_objects(label: LabeledImage, prompt: str) -> list[LabeledObject]:
    """Return the objects that the prompt names, in the order of their mention."""
    mentions: dict[int, LabeledObject] = {}  # position in the prompt → object
    for o in sorted(label.objects, key=lambda o: -len(o.name)):  # longer names first
        # Before a number or more letters, the name would be the beginning of another one.
        for match in re.finditer(rf"\bthe {re.escape(o.name)}(?! \d)(?!\w)", prompt):
            if not _is_within_mention(match.start(), mentions):
                mentions[match.start()] = o
    return [mentions[position] for position in sorted(mentions)]


def _is_within_mention(position: int, mentions: dict[int, LabeledObject]) -> bool:
    """Return whether a position is inside one of the mentions, which are of longer names."""
    for start, o in mentions.items():
        end = start + len("the ") + len(o.name)
        if start <= position < end:
            return True
    return False


def _find_unfit_reasons(label: LabeledImage, o: LabeledObject) -> list[str]:
    """Return why an object should not be asked about; an empty list if it may be."""
    reasons = []
    if _is_ambiguous(label, o):
        reasons.append("could be another")
    if o.box3d is None:
        return [*reasons, "has no box"]
    u, v = _project(label, [float(c) for c in o.box3d.center])
    if not (0 <= u < 1 and 0 <= v < 1):
        reasons.append("is outside the image")
    # A score that the label does not have counts as high enough.
    has_low_score = any(
        name in o.scores and o.scores[name] < minimum for name, minimum in MIN_SCORES.items()
    )
    if has_low_score or o.scores.get("edge", 0) > MAX_EDGE_SCORE:
        reasons.append(f"is under the bar: {dict(o.scores)}")
    return reasons


def _is_ambiguous(label: LabeledImage, o: LabeledObject) -> bool:
    """Return whether the object's name fits several objects of the image."""
    words, addition = _split_name(o.name)
    num_fitting = 0
    for other_object in label.objects:
        other_words, other_addition = _split_name(other_object.name)
        ends_alike = other_words[-len(words) :] == words  # "cup" also fits a "red cup"
        if ends_alike and addition in ("", other_addition):
            num_fitting += 1
    return num_fitting > 1


def _split_name(name: str) -> tuple[list[str], str]:
    """Split a name into its words and an addition: "red cup (tea)" or "red cup of tea".

    The words are in the singular, without a number at the end. A mug counts as a cup.
    """
    name = re.sub(r"[ _#-]*[0-9]+$", "", name.lower().strip())
    name, _, addition = name.replace(" of ", " (").partition(" (")
    words = name.removesuffix("s").replace("mug", "cup").split(" ")
    return words, addition


def _read_keypoint(prompt: str) -> str:
    """Return the key, in the label, of the keypoint that a prompt asks for."""
    before_point = prompt.split(" point ")[0]
    (word,) = re.findall(r"closest|nearest|furthest|farthest|centre|center", before_point)
    synonyms = {"nearest": "closest", "farthest": "furthest", "center": "centre"}
    return synonyms.get(word, word)


def _compute_center(o: LabeledObject) -> list[float]:
    """Return the mean of the eight corners."""
    corners = _compute_corners(o)
    return [sum(coordinates) / 8 for coordinates in zip(*corners, strict=True)]


def _distance(o: LabeledObject) -> float:
    """Return the distance of the object's center from the camera."""
    return math.sqrt(sum(c * c for c in _compute_center(o)))


def _compute_corners(o: LabeledObject) -> list[list[float]]:
    """Return the eight corners in the order of `CORNERS`, in the camera frame.

    An entry of `CORNERS` says by which fractions of the box's size the corner lies off the box's
    center, along each axis of the box.
    """
    box = o.box3d
    corners = []
    for fractions in CORNERS:
        corner = []
        for i in range(3):
            coordinate = float(box.center[i])
            for axis, fraction in enumerate(fractions):
                coordinate += fraction * float(box.size[axis]) * float(box.rotation[i][axis])
            corner.append(coordinate)
        corners.append(corner)
    return corners


def _project(label: LabeledImage, point: list[float]) -> tuple[float, float]:
    """Return a point's location in the image, as fractions of the image's size.

    A point behind the camera gets (-1, -1).
    """
    intrinsics = label.intrinsics
    focal_x = float(intrinsics[0][0])
    skew = float(intrinsics[0][1])
    center_x = float(intrinsics[0][2])
    focal_y = float(intrinsics[1][1])
    center_y = float(intrinsics[1][2])
    x, y, z = point
    if z <= 0:
        return -1.0, -1.0
    u_px = focal_x * x / z + skew * y / z + center_x
    v_px = focal_y * y / z + center_y
    return u_px / label.width, v_px / label.height


def _list_vertices(label: LabeledImage, objects: list[LabeledObject], prompt: str) -> list[Any]:
    """Return the coordinates of the corners of an object's box."""
    (o,) = objects
    coordinates = []
    for corner in _compute_corners(o):
        coordinates += corner
    return coordinates


def _find_keypoint(label: LabeledImage, objects: list[LabeledObject], prompt: str) -> list[Any]:
    """Return the coordinates of the keypoint of an object that the prompt asks for."""
    (o,) = objects
    return [float(c) for c in o.keypoints[_read_keypoint(prompt)]]


def _project_corners(label: LabeledImage, objects: list[LabeledObject], prompt: str) -> list[Any]:
    """Return where in the image the corners of an object's box are."""
    (o,) = objects
    return [_project(label, corner) for corner in _compute_corners(o)]


def _measure_distance(label: LabeledImage, objects: list[LabeledObject], prompt: str) -> list[Any]:
    """Return the distance of an object from the camera."""
    (o,) = objects
    return [_distance(o)]


def _compute_offset(label: LabeledImage, objects: list[LabeledObject], prompt: str) -> list[Any]:
    """Return the displacement from one object to another.

    In "how far is Y from X" the start is X, which comes after "from" and is mentioned last.
    """
    start, end = objects
    if re.search(r"How far is .* from", prompt):
        start, end = end, start
    pairs = zip(_compute_center(start), _compute_center(end), strict=True)
    return [end_coordinate - start_coordinate for start_coordinate, end_coordinate in pairs]


def _compare_distances(label: LabeledImage, objects: list[LabeledObject], prompt: str) -> list[Any]:
    """Return a sentence with the distances of two objects and the name of the closer one."""
    first, second = objects
    closer = first if _distance(first) < _distance(second) else second
    return [
        f"the {first.name} is ",
        _distance(first),
        f" and the {second.name} is ",
        _distance(second),
        f" so the {closer.name} is closer",
    ]


CHECKED_TYPES = {
    "chain_of_thought": CheckedType("closer", _compare_distances, num_objects=2),
    "back_projection": CheckedType(
        r"image\b(?! is unknown)|pixels|2D", _project_corners, has_numbers=False
    ),
    "box_vertices": CheckedType(r"3D box|bounding box|box that encloses", _list_vertices),
    "keypoint": CheckedType(r"(est|visible|cent(re|er)) point", _find_keypoint),
    "offset": CheckedType(r"x, y|offset", _compute_offset, num_objects=2),
    "distance": CheckedType("", _measure_distance),  # all other prompts, so it stays the last one
}
"""Question type -> how its questions are checked. A prompt is of the first type whose wording is
found in it."""
