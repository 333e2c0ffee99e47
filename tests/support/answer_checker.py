"""A second opinion on 3D questions: every answer is computed again from the label and the prompt's
words.

It shares no code with `spear.labels`. It rebuilds boxes from their center, size and axes, projects
points by hand, and reads off the prompt what is asked, as a person would.
"""

import math
import re
from typing import Any

from spear.types import LabeledImage, LabeledObject, Pixel, Question

# Corners in fractions of the box's sides from its center, along right, down and away from the
# camera.
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

MIN_SCORES = {
    "visible": 0.7,
    "points": 30,
    "known": 0.8,
    "whole": 0.5,
    "stability": 0.6,
    "compact": 0.4,
}
MAX_EDGE_SCORE = 0.05
MIN_RELATIVE_DIFFERENCE = 0.05  # of two distances, to ask which object is closer
TYPES_ABOUT_TWO_OBJECTS = ("offset", "chain_of_thought")


def find_answer_errors(label: LabeledImage, question: Question) -> list[str]:
    """What is wrong with a question about a label; empty if nothing is."""
    prompt = question.prompt
    question_type = _read_question_type(prompt)
    if question_type != question.question_type:
        return [f"reads like {question_type}, is {question.question_type}: {prompt}"]

    objects = _find_named_objects(label, prompt)
    names = [o.name for o in objects]
    if len(objects) != (2 if question_type in TYPES_ABOUT_TWO_OBJECTS else 1):
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
    """Whether the prompt says that numbers are relative, if they are, and the question has the
    label's unit."""
    has_numbers = question_type != "back_projection"
    says_relative = "relative" in question.prompt or "scale" in question.prompt
    should_say_relative = label.unit == "relative" and has_numbers
    return (
        says_relative == should_say_relative
        and "metre" not in question.prompt
        and question.unit == label.unit
    )


def _is_near_tie(objects: list[LabeledObject]) -> bool:
    near, far = sorted(_distance(o) for o in objects)
    return far - near < MIN_RELATIVE_DIFFERENCE * far


def _is_same_segment(segment: Any, expected: Any) -> bool:
    """Whether a segment is the expected text, number (float) or image location (tuple)."""
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
    """The objects that the prompt names, in the order of their mention."""
    mentions: dict[int, LabeledObject] = {}
    for o in sorted(label.objects, key=lambda o: -len(o.name)):  # longer names first
        for match in re.finditer(rf"\bthe {re.escape(o.name)}(?! \d)(?!\w)", prompt):
            if not _is_within_mention(match.start(), mentions):
                mentions[match.start()] = o
    return [mentions[position] for position in sorted(mentions)]


def _is_within_mention(position: int, mentions: dict[int, LabeledObject]) -> bool:
    """Whether a position is inside the mention of another, longer name."""
    ends = {start: start + len("the ") + len(o.name) for start, o in mentions.items()}
    return any(start <= position < end for start, end in ends.items())


def _find_unfit_reasons(label: LabeledImage, o: LabeledObject) -> list[str]:
    """Why an object should not be asked about."""
    reasons = []
    if _is_ambiguous(label, o):
        reasons.append("could be another")
    if o.box3d is None:
        return [*reasons, "has no box"]
    u, v = _project(label, [float(c) for c in o.box3d.center])
    if not (0 <= u < 1 and 0 <= v < 1):
        reasons.append("is outside the image")
    has_low_score = any(o.scores.get(name, 99) < minimum for name, minimum in MIN_SCORES.items())
    if has_low_score or o.scores.get("edge", 0) > MAX_EDGE_SCORE:
        reasons.append(f"is under the bar: {dict(o.scores)}")
    return reasons


def _is_ambiguous(label: LabeledImage, o: LabeledObject) -> bool:
    """Whether the object's name fits several objects of the image."""
    words, aside = _split_name(o.name)
    num_fitting = 0
    for other_object in label.objects:
        other_words, other_aside = _split_name(other_object.name)
        if other_words[-len(words) :] == words and aside in ("", other_aside):
            num_fitting += 1
    return num_fitting > 1


def _split_name(name: str) -> tuple[list[str], str]:
    """The words of a name without its number, in the singular, and what stands aside: "cup (of
    tea)"."""
    name = re.sub(r"[ _#-]*[0-9]+$", "", name.lower().strip())
    name, _, aside = name.replace(" of ", " (").partition(" (")
    return name.removesuffix("s").replace("mug", "cup").split(" "), aside


def _compute_answer(
    label: LabeledImage, question_type: str, objects: list[LabeledObject], prompt: str
) -> list[Any]:
    """The segments of the right answer; image locations are tuples."""
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
    """Which keypoint a prompt asks for, by its key in the label."""
    before_point = prompt.split(" point ")[0]
    (word,) = re.findall(r"closest|nearest|furthest|farthest|centre|center", before_point)
    synonyms = {"nearest": "closest", "farthest": "furthest", "center": "centre"}
    return synonyms.get(word, word)


def _compute_center(o: LabeledObject) -> list[float]:
    return [sum(coordinates) / 8 for coordinates in zip(*_compute_corners(o), strict=True)]


def _distance(o: LabeledObject) -> float:
    return math.sqrt(sum(c * c for c in _compute_center(o)))


def _compute_corners(o: LabeledObject) -> list[list[float]]:
    """The eight corners: top four first, each four near-left, near-right, far-right, far-left."""
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
    """Where a point is in the image, as fractions of its size; (-1, -1) if it is behind the
    camera."""
    k = label.intrinsics
    x, y, z = point
    if z <= 0:
        return -1.0, -1.0
    u_px = float(k[0][0]) * x / z + float(k[0][1]) * y / z + float(k[0][2])
    v_px = float(k[1][1]) * y / z + float(k[1][2])
    return u_px / label.width, v_px / label.height
