import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from labels_scenes import random_frame
from spear.errors import SpearError
from spear.labels.models.ground_truth import GroundTruthDetector, GroundTruthPointMap, GroundTruthSegmenter
from spear.labels.pipeline import label
from spear.labels.questions.generate import all_texts, askable, generate
from spear.labels.questions.templates import EVERYDAY, FAMILIES, FAMILIES_2D, FAMILIES_PIXEL, POINTS, PROMPTS
from spear.types import LabeledImage, LabeledObject, Pixel, Question

TRUTH = (GroundTruthDetector(), GroundTruthSegmenter(), GroundTruthPointMap())
NAMES = ("carrot", "green cube", "bowl", "plate", "eggplant", "spoon")


@pytest.fixture(scope="module")
def labels() -> list[LabeledImage]:
    rng = np.random.default_rng(1)
    frames = [random_frame(rng, objects=int(rng.integers(1, 7)), names=NAMES) for _ in range(12)]
    frames += [random_frame(rng, objects=6, names=NAMES[:4]) for _ in range(6)]
    return list(label(frames, *TRUTH))


@pytest.fixture(scope="module")
def questions(labels: list[LabeledImage]) -> list[tuple[LabeledImage, Question]]:
    rng = np.random.default_rng(2)
    families = FAMILIES + FAMILIES_2D
    return [(x, q) for _ in range(30) for x in labels for q in generate(x, rng, families=families)]


def one(image: LabeledImage, name: str) -> LabeledObject:
    (found,) = (o for o in image.objects if o.name == name)
    return found


def distance(image: LabeledImage, name: str) -> float:
    return float(np.linalg.norm(one(image, name).box3d.vertices.mean(axis=0)))


def pixels(image: LabeledImage, points: np.ndarray) -> list[Pixel]:
    uvw = image.intrinsics @ points.T
    return [Pixel(*row) for row in (uvw[:2] / uvw[2]).T / [image.width, image.height]]


def middle(image: LabeledImage, name: str) -> float:
    box = one(image, name).box2d
    return float(box[0] + box[2]) / 2 / image.width


def derived(image: LabeledImage, q: Question) -> list:
    """The answer, worked out again from the label and the words of the question alone."""
    names = [o.name for o in image.objects]
    match q.family:
        case "box_vertices":
            return [x for v in one(image, q.objects[0]).box3d.vertices for x in v]
        case "keypoint":
            (point,) = (p for p, words in POINTS.items() if any(w in q.prompt for w in words))
            return list(one(image, q.objects[0]).keypoints[point])
        case "offset":
            a, b = (one(image, n).box3d.vertices.mean(axis=0) for n in q.objects)
            return list(b - a)
        case "distance":
            return [distance(image, q.objects[0])]
        case "back_projection":
            return pixels(image, one(image, q.objects[0]).box3d.vertices)
        case "chain_of_thought":
            a, b = q.objects
            closer = min(q.objects, key=lambda n: distance(image, n))
            numbers = distance(image, a), distance(image, b)
            return [
                f"the {a} is ",
                numbers[0],
                f" and the {b} is ",
                numbers[1],
                f" so the {closer} is closer",
            ]
        case "what_at":
            # the only object, asked about, whose 2D box has the point in its middle (another may overlap
            # there)
            y, x = (int(n) / 1024 for n in re.findall(r"<loc(\d{4})>", q.prompt))
            (o,) = (o for o in image.objects if o.name == q.objects[0])
            x0, y0, x1, y1 = o.box2d / [image.width, image.height, image.width, image.height]
            assert abs(x - (x0 + x1) / 2) <= 0.2 * (x1 - x0) + 1 / 1024
            assert abs(y - (y0 + y1) / 2) <= 0.2 * (y1 - y0) + 1 / 1024
            return [o.name]
        case "where_2d":
            x0, y0, x1, y1 = one(image, q.objects[0]).box2d / np.tile([image.width, image.height], 2)
            return [Pixel(x0, y0), Pixel(x1, y1)]
        case "centre_2d":
            x0, y0, x1, y1 = one(image, q.objects[0]).box2d / np.tile([image.width, image.height], 2)
            return [Pixel((x0 + x1) / 2, (y0 + y1) / 2)]
        case "exists":
            return ["yes" if q.objects[0] in names else "no"]
        case "count":
            return [str(names.count(q.objects[0]))]
        case "which_side":
            return ["left" if middle(image, q.objects[0]) < 0.5 else "right"]
        case "left_or_right":
            return ["left" if middle(image, q.objects[0]) < middle(image, q.objects[1]) else "right"]
        case "list":
            return [", ".join(o.name for o in sorted(image.objects, key=lambda o: o.box2d[0] + o.box2d[2]))]
    raise AssertionError(q.family)


def test_every_answer_follows_from_the_label(questions: list[tuple[LabeledImage, Question]]) -> None:
    seen = Counter(q.family for _, q in questions)
    assert set(seen) == set(FAMILIES + FAMILIES_2D)
    for image, q in questions:
        expected = derived(image, q)
        assert len(q.segments) == len(expected)
        for got, want in zip(q.segments, expected, strict=True):
            if isinstance(want, str):
                assert got == want
            elif isinstance(want, Pixel):
                assert (got.x, got.y) == pytest.approx((want.x, want.y), abs=1e-5)
                assert 0 <= got.x < 1 and 0 <= got.y < 1
            else:
                assert type(got) is float
                assert got == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("family", "numbers", "points"),
    [
        ("box_vertices", 24, 0),
        ("keypoint", 3, 0),
        ("offset", 3, 0),
        ("distance", 1, 0),
        ("back_projection", 0, 8),
        ("chain_of_thought", 2, 0),
        ("where_2d", 0, 2),
    ],
)
def test_answers_have_a_fixed_grammar(
    questions: list[tuple[LabeledImage, Question]], family: str, numbers: int, points: int
) -> None:
    for _, q in questions:
        if q.family == family:
            assert len(q.values) == numbers
            assert sum(isinstance(s, Pixel) for s in q.segments) == points


def test_prompts_name_what_they_ask_about(questions: list[tuple[LabeledImage, Question]]) -> None:
    for _, q in questions:
        assert "{" not in q.prompt
        if q.family not in ("list", "what_at"):
            assert all(name in q.prompt for name in q.objects)
        for first in re.findall(r"\ban? (\w)", q.prompt.replace("an oriented", "").replace("a 2D box", "")):
            assert (f"an {first}" in q.prompt) == (first in "aeiou")


def test_several_objects_of_a_name_are_not_asked_about(
    questions: list[tuple[LabeledImage, Question]],
) -> None:
    repeated = 0
    for image, q in questions:
        counts = Counter(o.name for o in image.objects)
        repeated += max(counts.values()) > 1
        if q.family not in ("exists", "count", "list"):
            assert all(counts[name] == 1 for name in q.objects)
    assert repeated > 100


def test_near_ties_are_not_compared(labels: list[LabeledImage]) -> None:
    rng = np.random.default_rng(0)
    image = next(x for x in labels if len(askable(x)) >= 2)
    a, b = askable(image)[:2]
    for stretch, expected in ((1.03, False), (1.1, True)):
        moved = a.box3d.center / np.linalg.norm(a.box3d.center) * np.linalg.norm(b.box3d.center) * stretch
        pair = replace(image, objects=[replace(a, box3d=replace(a.box3d, center=moved)), b])
        assert bool(generate(pair, rng, families=["chain_of_thought"])) is expected


def test_unfit_objects_are_skipped(labels: list[LabeledImage]) -> None:
    image = next(x for x in labels if len(askable(x)) >= 1)
    good = askable(image)[0]
    outside = replace(good, box3d=replace(good.box3d, center=np.array([9, 0, 1], np.float32)))
    behind = replace(good, box3d=replace(good.box3d, center=-good.box3d.center))
    for bad in (
        replace(good, box3d=None, keypoints={}),
        replace(good, scores={"visible": 0.1}),
        outside,
        behind,
    ):
        assert askable(replace(image, objects=[bad])) == []
        assert generate(replace(image, objects=[bad]), np.random.default_rng(0)) == []


def test_a_box_that_leaves_the_image_is_not_projected(labels: list[LabeledImage]) -> None:
    image = next(x for x in labels if len(askable(x)) >= 1)
    o = askable(image)[0]
    vertices = o.box3d.vertices.copy()
    vertices[0, 0] += 5
    wide = replace(image, objects=[replace(o, box3d=replace(o.box3d, vertices=vertices))])
    assert generate(wide, np.random.default_rng(0), families=["back_projection"]) == []


def test_the_same_seed_asks_the_same(labels: list[LabeledImage]) -> None:
    asked = [[generate(x, rng) for x in labels] for rng in (np.random.default_rng(s) for s in (5, 5, 6))]
    assert asked[0] == asked[1]
    assert asked[0] != asked[2]


def test_one_to_four_different_questions(labels: list[LabeledImage]) -> None:
    rng = np.random.default_rng(0)
    image = max(labels, key=lambda x: len(askable(x)))
    sizes = Counter()
    for _ in range(200):
        asked = generate(image, rng)
        sizes[len(asked)] += 1
        assert len({(q.family, q.objects, tuple(q.segments)) for q in asked}) == len(asked)
    assert set(sizes) == {1, 2, 3, 4}
    assert min(sizes.values()) > 25


def test_families_are_balanced_where_all_apply(labels: list[LabeledImage]) -> None:
    rng = np.random.default_rng(0)
    image = max(labels, key=lambda x: len(askable(x)))
    seen = Counter(q.family for _ in range(600) for q in generate(image, rng, pairs=(1, 1)))
    assert min(seen[f] for f in FAMILIES) > 0.6 * max(seen.values())


def test_wording() -> None:
    assert set(PROMPTS) == set(FAMILIES + FAMILIES_2D + FAMILIES_PIXEL)
    assert all(len(set(templates)) >= 5 for templates in PROMPTS.values())
    texts = set(all_texts(["bowl", "mug", "spoon"]))
    assert "Provide the 3D bounding box coordinates of the bowl" in texts
    assert "Estimate the x, y, z distance between the mug and the spoon" in texts


def test_tokenizer_text_covers_every_word_used(questions: list[tuple[LabeledImage, Question]]) -> None:
    known = {w for text in all_texts([*NAMES, "mug"]) for w in re.findall(r"\w+", text)}
    texts = [q.prompt for _, q in questions] + [
        s for _, q in questions for s in q.segments if isinstance(s, str)
    ]
    used = {w for text in texts for w in re.findall(r"\w+", text)}
    assert {w for w in used if not re.fullmatch(r"loc\d{4}", w)} - known <= set(EVERYDAY)


def test_bad_arguments(labels: list[LabeledImage]) -> None:
    with pytest.raises(SpearError, match="did you mean 'distance'"):
        generate(labels[0], np.random.default_rng(0), families=["distence"])
    with pytest.raises(SpearError, match="fewest"):
        generate(labels[0], np.random.default_rng(0), pairs=(3, 2))
