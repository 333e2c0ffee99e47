"""A second opinion on 3D questions: every answer worked out again from the label and the words of the prompt.

It shares no code with `spear.labels`: boxes are rebuilt from centre, size and axes, points projected by hand,
and what is asked is read off the prompt as a person would.
"""

import math
import re
from typing import Any

from spear.types import LabeledImage, LabeledObject, Pixel, Question

NEAR, FAR, LEFT, RIGHT, TOP, BOTTOM = -0.5, 0.5, -0.5, 0.5, -0.5, 0.5
CORNERS = [
    (x, y, z)
    for y in (TOP, BOTTOM)
    for x, z in ((LEFT, NEAR), (RIGHT, NEAR), (RIGHT, FAR), (LEFT, FAR))
]


def find_answer_errors(label: LabeledImage, question: Question) -> list[str]:
    """What is wrong with a question about a label; empty when nothing is."""
    found: list[str] = []
    prompt = question.prompt
    family = _family(prompt)
    if family != question.family:
        return [f"reads like {family}, is {question.family}: {prompt}"]
    asked = _objects(label, prompt)
    if len(asked) != (2 if family in ("offset", "chain_of_thought") else 1):
        return [f"names {[o.name for o in asked]}: {prompt}"]
    if sorted(o.name for o in asked) != sorted(question.objects):
        found.append(f"is said to be about {question.objects}: {prompt}")
    found += [f"{o.name}: {reason}" for o in asked for reason in _unfit(label, o)]
    numeric = family != "back_projection"
    relative = "relative" in prompt or "scale" in prompt
    if (
        relative != (label.unit == "relative" and numeric)
        or "metre" in prompt
        or question.unit != label.unit
    ):
        found.append(f"unit {label.unit}: {prompt}")
    expected, got = _answer(label, family, asked, prompt), list(question.segments)
    if family == "chain_of_thought":
        near, far = sorted((expected[1], expected[3]))
        if far - near < 0.05 * far:
            found.append(f"a near-tie: {near} {far}")
    if len(got) != len(expected):
        return [*found, f"{len(got)} segments instead of {len(expected)}"]
    for g, e in zip(got, expected, strict=True):
        if isinstance(e, float):
            right = isinstance(g, float) and math.isclose(g, e, rel_tol=1e-4, abs_tol=1e-5)
        elif isinstance(e, tuple):
            right = (
                isinstance(g, Pixel)
                and math.dist((g.x, g.y), e) < 1e-4
                and 0 <= g.x < 1
                and 0 <= g.y < 1
            )
        else:
            right = g == e
        if not right:
            found.append(f"{g} instead of {e}")
    return found


def _family(prompt: str) -> str:
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


def _objects(label: LabeledImage, prompt: str) -> list[LabeledObject]:
    """The objects that the prompt names, in the order of their mention; longer names first."""
    mentions: dict[int, LabeledObject] = {}
    for o in sorted(label.objects, key=lambda o: -len(o.name)):
        for match in re.finditer(rf"\bthe {re.escape(o.name)}(?! \d)(?!\w)", prompt):
            if not any(
                s <= match.start() < s + len(other.name) + 4 for s, other in mentions.items()
            ):
                mentions[match.start()] = o
    return [mentions[s] for s in sorted(mentions)]


def _unfit(label: LabeledImage, o: LabeledObject) -> list[str]:
    def words(name: str) -> tuple[list[str], str]:
        name = name.lower().strip()
        name, _, aside = re.sub(r"[ _#-]*[0-9]+$", "", name).replace(" of ", " (").partition(" (")
        return name.removesuffix("s").replace("mug", "cup").split(" "), aside

    mine, my_aside = words(o.name)
    theirs = [words(other.name) for other in label.objects]
    alike = [
        aside for name, aside in theirs if name[-len(mine) :] == mine and my_aside in ("", aside)
    ]
    reasons = ["could be another"] if len(alike) > 1 else []
    if o.box3d is None:
        return [*reasons, "has no box"]
    u, v = _project(label, [float(c) for c in o.box3d.center])
    if not (0 <= u < 1 and 0 <= v < 1):
        reasons.append("is outside the image")
    s = o.scores
    least = {
        "visible": 0.7,
        "points": 30,
        "known": 0.8,
        "whole": 0.5,
        "stability": 0.6,
        "compact": 0.4,
    }
    if s.get("edge", 0) > 0.05 or any(s.get(name, 99) < bar for name, bar in least.items()):
        reasons.append(f"is under the bar: {dict(s)}")
    return reasons


def _answer(label: LabeledImage, family: str, asked: list[LabeledObject], prompt: str) -> list[Any]:
    x = asked[0]
    if family == "box_vertices":
        return [c for corner in _corners(x) for c in corner]
    if family == "keypoint":
        (word,) = re.findall(
            r"closest|nearest|furthest|farthest|centre|center", prompt.split(" point ")[0]
        )
        kind = {"nearest": "closest", "farthest": "furthest", "center": "centre"}.get(word, word)
        return [float(c) for c in x.keypoints[kind]]
    if family == "back_projection":
        return [_project(label, corner) for corner in _corners(x)]
    if family == "distance":
        return [_distance(x)]
    a, b = asked
    if family == "offset":
        # "how far is Y from X": the place one starts from comes after "from", and is mentioned last
        start, end = (b, a) if re.search(r"How far is .* from", prompt) else (a, b)
        return [float(e) - float(s) for s, e in zip(_middle(start), _middle(end), strict=True)]
    closer = a if _distance(a) < _distance(b) else b
    words = f"the {a.name} is ", f" and the {b.name} is ", f" so the {closer.name} is closer"
    return [words[0], _distance(a), words[1], _distance(b), words[2]]


def _middle(o: LabeledObject) -> list[float]:
    return [sum(c) / 8 for c in zip(*_corners(o), strict=True)]


def _distance(o: LabeledObject) -> float:
    return math.sqrt(sum(c * c for c in _middle(o)))


def _corners(o: LabeledObject) -> list[list[float]]:
    """The eight corners: top four first, each four near-left, near-right, far-right, far-left."""
    box = o.box3d
    right, down, away = ([float(box.rotation[i][k]) for i in range(3)] for k in range(3))
    w, h, d = (float(s) for s in box.size)
    return [
        [
            float(box.center[i]) + x * w * right[i] + y * h * down[i] + z * d * away[i]
            for i in range(3)
        ]
        for x, y, z in CORNERS
    ]


def _project(label: LabeledImage, point: list[float]) -> tuple[float, float]:
    k = label.intrinsics
    x, y, z = point
    if z <= 0:
        return -1.0, -1.0
    u = (float(k[0][0]) * x / z + float(k[0][1]) * y / z + float(k[0][2])) / label.width
    return u, ((float(k[1][1]) * y / z + float(k[1][2])) / label.height)
