"""Checks questions and answers by a second implementation, which shares no code with
`spear.labels`.

This module reads from the words of a prompt what is asked, as a person would. It then computes the
answer from the label: it rebuilds the boxes from their centers, sizes and axes, and projects points
without NumPy.
"""

import math
import re
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
TYPES_ABOUT_TWO_OBJECTS = ("offset", "chain_of_thought")


def find_answer_errors(label: LabeledImage, question: Question) -> list[str]:
    """Return what is wrong with a question about a labeled image; an empty list if it is right."""
    prompt = question.prompt
    question_type = _read_question_type(prompt)
    if question_type != question.question_type:
        return [f"reads like {question_type}, is {question.question_type}: {prompt}"]

    objects = _find_named_objects(label, prompt)
    names = [o.name for o in objects]
    expected_num_objects = 2 if question_type in TYPES_ABOUT_TWO_OBJECTS else 1
    if len(objects) != expected_num_objects:
        return [f"names {names}: {prompt}"]

    errors = []
    if sorted(names) != sorted(question.objects):
        errors.append(f"is said to be about {question.objects}: {prompt}")
    for o in objects:
        errors += [f"{o.name}: {reason}" for reason in _find_unfit_reasons(label, o)]
    if not _is_unit_right(label, question, question_type):
        errors.append(f"unit {label.unit}: {prompt}")
    if question_type == "chain_of_thought" and _is_near_tie(objects):
        errors.append(f"a near-tie: {[_distance(o) for o in objects]}")

    expected_segments = _compute_answer(label, question_type, objects, prompt)
    segments = list(question.segments)
    if len(segments) != len(expected_segments):
        return [*errors, f"{len(segments)} segments instead of {len(expected_segments)}"]
    for segment, expected in zip(segments, expected_segments, strict=True):
        if not _is_same_segment(segment, expected):
            errors.append(f"{segment} instead of {expected}")
    return errors


def _is_unit_right(label: LabeledImage, question: Question, question_type: str) -> bool:
    """Return whether the prompt and the question name the label's unit.

    The prompt must say that lengths are relative, exactly if they are and the answer has lengths.
    """
    has_numbers = question_type != "back_projection"
    says_relative = "relative" in question.prompt or "scale" in question.prompt
    should_say_relative = label.unit == "relative" and has_numbers
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
    """Return whether a segment of an answer equals the expected one.

    An expected segment is a text, a number (float) or a location in the image (tuple x, y).
    """
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
    """Return the question type that the words of a prompt suggest."""
    if "closer" in prompt:
        return "chain_of_thought"
    if re.search(r"image\b(?! is unknown)|pixels|2D", prompt):
        return "back_projection"
    if re.search(r"3D box|bounding box|box that encloses", prompt):
        return "box_vertices"
    if re.search(r"(est|visible|cent(re|er)) point", prompt):
        return "keypoint"
    if re.search(r"x, y|offset", prompt):
        return "offset"
    return "distance"


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


def _compute_answer(
    label: LabeledImage, question_type: str, objects: list[LabeledObject], prompt: str
) -> list[Any]:
    """Return the segments of the right answer; locations in the image are tuples (x, y)."""
    first = objects[0]
    if question_type == "box_vertices":
        coordinates = []
        for corner in _compute_corners(first):
            coordinates += corner
        return coordinates
    if question_type == "keypoint":
        return [float(c) for c in first.keypoints[_read_keypoint(prompt)]]
    if question_type == "back_projection":
        return [_project(label, corner) for corner in _compute_corners(first)]
    if question_type == "distance":
        return [_distance(first)]

    second = objects[1]
    if question_type == "offset":
        # In "how far is Y from X" the start is X, which comes after "from" and is mentioned last.
        is_reversed = re.search(r"How far is .* from", prompt)
        start, end = (second, first) if is_reversed else (first, second)
        pairs = zip(_compute_center(start), _compute_center(end), strict=True)
        return [end_coordinate - start_coordinate for start_coordinate, end_coordinate in pairs]
    closer = first if _distance(first) < _distance(second) else second
    return [
        f"the {first.name} is ",
        _distance(first),
        f" and the {second.name} is ",
        _distance(second),
        f" so the {closer.name} is closer",
    ]


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
    """Return the eight corners in the order of `CORNERS`, in the camera frame."""
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
