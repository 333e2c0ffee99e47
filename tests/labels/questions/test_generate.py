"""What is asked about a label, and how; every 2D answer, worked out again (3D: test_answers.py)."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labels_scenes import random_frame
from refusals import refuses
from spear.labels.fit.image import unproject
from spear.labels.fit.masks import encode_mask
from spear.labels.questions.generate import (
    find_askable_objects,
    generate_questions,
    iterate_tokenizer_texts,
)
from spear.labels.questions.templates import EVERYDAY_NAMES
from spear.labels.store import read_depth, write_depth, write_labels
from spear.models.processing import Processor
from spear.policy import locate
from spear.question_types import QUESTION_TYPES, QUESTION_TYPES_2D, QUESTION_TYPES_PIXEL
from spear.train.options import QuestionMix
from spear.train.tasks import QuestionSamples, load_depth, load_labels
from spear.types import LabeledImage, LabeledObject, Pixel, Question
from spear.util.images import encode_jpeg


@pytest.fixture(scope="module")
def questions(labels: list[LabeledImage]) -> list[tuple[LabeledImage, Question]]:
    rng, families = np.random.default_rng(2), QUESTION_TYPES + QUESTION_TYPES_2D
    return [
        (x, q)
        for _ in range(30)
        for x in labels
        for q in generate_questions(x, rng, families=families)
    ]


def one(image: LabeledImage, name: str) -> LabeledObject:
    (found,) = (o for o in image.objects if o.name == name)
    return found


def middle(image: LabeledImage, name: str) -> float:
    return float(one(image, name).box2d[::2].mean()) / image.width


def derived(image: LabeledImage, q: Question) -> list:
    """The answer, worked out again from the label and the words of the question alone."""
    names = [o.name for o in image.objects]
    match q.family:
        case "what_at":
            y, x = (int(n) / 1024 for n in re.findall(r"<loc(\d{4})>", q.prompt))
            (o,) = (o for o in image.objects if o.name == q.objects[0])
            x0, y0, x1, y1 = o.box2d / [image.width, image.height, image.width, image.height]
            assert abs(x - (x0 + x1) / 2) <= 0.2 * (x1 - x0) + 1 / 1024
            assert abs(y - (y0 + y1) / 2) <= 0.2 * (y1 - y0) + 1 / 1024
            return [o.name]
        case "where_2d" | "centre_2d":
            x0, y0, x1, y1 = one(image, q.objects[0]).box2d / np.tile(
                [image.width, image.height], 2
            )
            centre = Pixel((x0 + x1) / 2, (y0 + y1) / 2)
            return [centre] if q.family == "centre_2d" else [Pixel(x0, y0), Pixel(x1, y1)]
        case "exists":
            return ["yes" if q.objects[0] in names else "no"]
        case "count":
            return [str(names.count(q.objects[0]))]
        case "which_side":
            return ["left" if middle(image, q.objects[0]) < 0.5 else "right"]
        case "left_or_right":
            return [
                "left" if middle(image, q.objects[0]) < middle(image, q.objects[1]) else "right"
            ]
        case "list":
            return [
                ", ".join(
                    o.name for o in sorted(image.objects, key=lambda o: o.box2d[0] + o.box2d[2])
                )
            ]
    raise AssertionError(q.family)


def test_every_2d_answer_follows_from_the_label(
    questions: list[tuple[LabeledImage, Question]],
) -> None:
    assert {q.family for _, q in questions} == set(QUESTION_TYPES + QUESTION_TYPES_2D)
    for image, q in questions:
        if q.family in QUESTION_TYPES:
            continue
        for got, want in zip(q.segments, derived(image, q), strict=True):
            if isinstance(want, Pixel):
                assert (got.x, got.y) == pytest.approx((want.x, want.y), abs=1e-5)
                assert 0 <= got.x < 1 and 0 <= got.y < 1
            else:
                assert got == want


def test_what_a_name_speaks_of_is_not_said_to_be_absent(labels: list[LabeledImage]) -> None:
    image = replace(labels[0], objects=[replace(labels[0].objects[0], name="bowl_of apples")])
    asked = [
        generate_questions(image, np.random.default_rng(s), (1, 1), ["exists"]) for s in range(400)
    ]
    absent = {q.objects[0] for some in asked for q in some} & set(EVERYDAY_NAMES)
    assert "banana" in absent and not absent & {"apple", "bowl"}


def test_near_ties_are_not_compared_nor_boxes_off_the_image_projected(
    labels: list[LabeledImage],
) -> None:
    rng = np.random.default_rng(0)
    image = next(x for x in labels if len(find_askable_objects(x)) >= 2)
    a, b = find_askable_objects(image)[:2]
    for stretch, expected in ((1.03, False), (1.1, True)):
        moved = (
            a.box3d.center
            / np.linalg.norm(a.box3d.center)
            * np.linalg.norm(b.box3d.center)
            * stretch
        )
        pair = replace(image, objects=[replace(a, box3d=replace(a.box3d, center=moved)), b])
        assert bool(generate_questions(pair, rng, families=["chain_of_thought"])) is expected
    vertices = a.box3d.vertices.copy()
    vertices[0, 0] += 5
    wide = replace(image, objects=[replace(a, box3d=replace(a.box3d, vertices=vertices))])
    assert generate_questions(wide, np.random.default_rng(0), families=["back_projection"]) == []


def test_the_seed_decides_one_to_four_different_questions(labels: list[LabeledImage]) -> None:
    asked = [
        [generate_questions(x, rng) for x in labels]
        for rng in (np.random.default_rng(s) for s in (5, 5, 6))
    ]
    assert asked[0] == asked[1] != asked[2]
    rng = np.random.default_rng(0)
    image = max(labels, key=lambda x: len(find_askable_objects(x)))
    sizes, seen = Counter(), Counter()
    for _ in range(200):
        asked = generate_questions(image, rng)
        sizes[len(asked)] += 1
        seen.update(q.family for q in generate_questions(image, rng, pairs=(1, 1)))
        assert len({(q.family, q.objects, tuple(q.segments)) for q in asked}) == len(asked)
    assert set(sizes) == {1, 2, 3, 4} and min(sizes.values()) > 25
    assert min(seen[f] for f in QUESTION_TYPES) > 0.5 * max(seen.values())


def test_tokenizer_text_covers_every_word_used(
    questions: list[tuple[LabeledImage, Question]],
) -> None:
    names = {o.name for x, _ in questions for o in x.objects}
    known = {
        w for text in iterate_tokenizer_texts([*names, "mug"]) for w in re.findall(r"\w+", text)
    }
    answers = [s for _, q in questions for s in q.segments if isinstance(s, str)]
    used = {
        w for text in [q.prompt for _, q in questions] + answers for w in re.findall(r"\w+", text)
    }
    assert {w for w in used if not re.fullmatch(r"loc\d{4}", w)} - known <= set(EVERYDAY_NAMES)


def test_what_is_asked_to_be_named_is_seen_at_the_point(labels: list[LabeledImage]) -> None:
    image = next(x for x in labels if any(o.scores["visible"] == 1 for o in x.objects))
    o = next(o for o in image.objects if o.scores["visible"] == 1)
    mask = np.zeros((image.height, image.width), bool)
    mask[:, : image.width // 2] = True  # the right half shows something else
    box = np.array([0, 0, image.width, image.height], np.float32)
    halved = replace(image, objects=[replace(o, box2d=box, mask=encode_mask(mask))])
    asked = [
        generate_questions(halved, np.random.default_rng(s), (1, 1), ["what_at"]) for s in range(50)
    ]
    places = [int(re.findall(r"<loc(\d{4})>", q.prompt)[1]) for some in asked for q in some]
    assert len(places) > 40 and max(places) <= 512 and np.ptp(places) > 100
    mask[:, 2 * image.width // 5 :] = False  # what lies on it
    shirt = replace(o, name="shirt", box2d=box / 1000, mask=encode_mask(mask))
    both = replace(halved, objects=[*halved.objects, shirt])
    asked = [
        generate_questions(both, np.random.default_rng(s), (1, 1), ["what_at"]) for s in range(50)
    ]
    others = [q for some in asked for q in some if "shirt" not in q.objects]
    places = {int(re.findall(r"<loc(\d{4})>", q.prompt)[1]) for q in others}
    assert len(places) > 3 and 400 <= min(places) <= max(places) <= 512
    unseen = replace(halved, objects=[replace(halved.objects[0], mask=())])
    assert not generate_questions(unseen, np.random.default_rng(0), families=["what_at"])


@pytest.mark.parametrize("size", [(160, 120), (159, 119)])
def test_the_answer_is_the_point_that_the_pixel_shows(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    frame = random_frame(rng, width=size[0], height=size[1])
    height, width = frame.depth.shape
    image = encode_jpeg(frame.image)
    label = LabeledImage(image, width, height, frame.intrinsics, [], "metre", "made")
    write_depth([(image, frame.depth)], tmp_path / "depth/external/depth-00000.parquet")
    depth = load_depth([tmp_path], {"external": [label]})["external"][0][1]
    truth = unproject(frame.depth, frame.intrinsics)
    asked = [
        q
        for _ in range(50)
        for q in generate_questions(label, rng, (4, 4), QUESTION_TYPES_PIXEL, depth=depth)
    ]
    assert len(asked) == 200
    for question in asked:
        y, x = (int(n) / 1024 for n in re.findall(r"<loc(\d{4})>", question.prompt))
        near = truth[round(y * height - 0.5), round(x * width - 0.5)]
        assert question.values == pytest.approx(near.tolist(), abs=0.02)
    assert (
        generate_questions(label, rng, (4, 4), QUESTION_TYPES_PIXEL) == []
    )  # without depth there is nothing to ask
    assert (
        generate_questions(label, rng, (4, 4), QUESTION_TYPES_PIXEL, depth=np.zeros_like(depth))
        == []
    )


def test_labels_of_several_folders_come_together(tmp_path: Path) -> None:
    """By view, each image with its own depth; a folder need not have every view. Held-out scenes are told."""
    frames = {}
    for number, views in enumerate((("external", "wrist"), ("external",))):
        for view in views:
            frame = random_frame(np.random.default_rng(len(frames)))
            folder, image = tmp_path / f"{number}", encode_jpeg(frame.image)
            size, source = frame.image.shape[1::-1], f"sim:{9_999 + number}"
            label = LabeledImage(image, *size, frame.intrinsics, [], "metre", source)
            frames[view, number] = image
            write_labels([label], folder / view / "labels-00000.parquet")
            write_depth([(image, frame.depth)], folder / "depth" / view / "depth-00000.parquet")
    folders = [tmp_path / "0", tmp_path / "1"]
    with pytest.warns(match=r"^2 of 3 "):
        known = load_labels(folders, ["external", "wrist"])
    assert [one.image for one in known["external"]] == [
        frames["external", 0],
        frames["external", 1],
    ]
    assert [one.image for one in known["wrist"]] == [frames["wrist", 0]] and len(known) == 2
    for view, some in load_depth(folders, known).items():
        for number, (_, depth) in enumerate(some):
            ((_, alone),) = read_depth(folders[number] / "depth" / view)
            np.testing.assert_array_equal(depth, alone)
    refuses("of other images than the labels", load_depth, folders[::-1], known)


def test_labels_that_cannot_be_asked_about_end_the_training() -> None:
    """Instead of looking for another image for ever."""
    image = LabeledImage(
        encode_jpeg(np.zeros((8, 8, 3), np.uint8)), 8, 8, np.eye(3), [], "metre", "made"
    )
    folder = locate("nano")
    samples = QuestionSamples(
        {"external": [image]}, Processor.load(folder), QuestionMix(("offset",)), 2, 0
    )
    refuses("offset", samples.batch, 0)
