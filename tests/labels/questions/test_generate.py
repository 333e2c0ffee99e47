"""Generating questions about labels: 2D answers, exclusions, randomness, words, points and depth.

3D answers are tested in test_answers.py.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from labels_scenes import make_random_frame
from refusals import refuses
from spear.labels.fit.image import unproject
from spear.labels.fit.masks import encode_mask
from spear.labels.questions.generate import (
    find_askable_objects,
    generate_questions,
    iterate_tokenizer_texts,
)
from spear.labels.questions.templates import EVERYDAY_NAMES
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.labels.store import (
    read_images_with_coarse_depth,
    write_images_with_coarse_depth,
    write_labels,
)
from spear.models.processing import Processor
from spear.policy import locate_checkpoint
from spear.question_types import (
    ANSWER_FORMS,
    QUESTION_TYPES,
    QUESTION_TYPES_2D,
    QUESTION_TYPES_PIXEL,
)
from spear.train.options import QuestionMix
from spear.train.tasks import QuestionSamples, load_depth, load_labels
from spear.types import Array, Frame, LabeledImage, LabeledObject, Pixel, Question
from spear.util.images import encode_jpeg


def generate_for_seeds(
    label: LabeledImage, question_type: str, num_seeds: int, depth: Array | None = None
) -> list[Question]:
    """Generate one question of a type for each seed; some seeds allow none."""
    questions = []
    for seed in range(num_seeds):
        rng = np.random.default_rng(seed)
        questions += generate_questions(
            label, rng, questions_per_image=(1, 1), question_types=[question_type], depth=depth
        )
    return questions


@pytest.fixture(scope="module")
def questions(labels: list[LabeledImage]) -> list[tuple[LabeledImage, Question]]:
    """Many questions of all 3D and 2D types, each with the label of its image."""
    rng = np.random.default_rng(2)
    all_types = QUESTION_TYPES + QUESTION_TYPES_2D
    questions = []
    for _ in range(30):
        for label in labels:
            for question in generate_questions(label, rng, question_types=all_types):
                questions.append((label, question))
    return questions


def test_answers_have_the_form_of_their_question_type(
    questions: list[tuple[LabeledImage, Question]],
) -> None:
    for _, question in questions:
        answer_form = ANSWER_FORMS[question.question_type]
        pixels = [segment for segment in question.segments if isinstance(segment, Pixel)]
        words = [segment for segment in question.segments if isinstance(segment, str)]

        assert len(question.values) == answer_form.num_numbers
        assert len(pixels) == answer_form.num_pixels
        assert bool(words) == answer_form.has_words


@pytest.mark.parametrize("name", QUESTION_TYPES)
def test_answers_to_every_type_of_3d_question_about_objects_are_scored(name: str) -> None:
    question_type = QUESTION_TYPE_BY_NAME[name]
    has_numbers = ANSWER_FORMS[name].num_numbers > 0

    assert question_type.measure is not None
    assert (question_type.compute_error_scales is not None) == has_numbers


# Answers in 2D


def find_object(label: LabeledImage, name: str) -> LabeledObject:
    """The only object of an image with this name."""
    (o,) = (o for o in label.objects if o.name == name)
    return o


def find_relative_box(label: LabeledImage, name: str) -> list[float]:
    """The 2D box x0, y0, x1, y1 of an object, as fractions of the image's width and height."""
    size = [label.width, label.height, label.width, label.height]
    return (find_object(label, name).box2d / size).tolist()


def find_middle_x(label: LabeledImage, name: str) -> float:
    """The x coordinate of the middle of an object, as a fraction of the image's width."""
    x0, _, x1, _ = find_relative_box(label, name)
    return (x0 + x1) / 2


def read_location(prompt: str) -> tuple[float, float]:
    """x and y of the location tokens in a prompt, as fractions of the image."""
    y, x = (int(number) / 1024 for number in re.findall(r"<loc(\d{4})>", prompt))
    return x, y


def check_point_is_in_the_middle(label: LabeledImage, question: Question) -> None:
    """Check that the point of "what_at" is in the middle two fifths of its object's 2D box.

    Location tokens round coordinates to 1/1024 of the image.
    """
    x, y = read_location(question.prompt)
    x0, y0, x1, y1 = find_relative_box(label, question.objects[0])
    assert abs(x - (x0 + x1) / 2) <= 0.2 * (x1 - x0) + 1 / 1024
    assert abs(y - (y0 + y1) / 2) <= 0.2 * (y1 - y0) + 1 / 1024


def answer_again(label: LabeledImage, question: Question) -> list[str | Pixel]:
    """Compute the answer to a 2D question once more, from the label and the objects' names."""
    names = [o.name for o in label.objects]
    match question.question_type:
        case "what_at":
            return [question.objects[0]]
        case "where_2d":
            x0, y0, x1, y1 = find_relative_box(label, question.objects[0])
            return [Pixel(x0, y0), Pixel(x1, y1)]
        case "centre_2d":
            x0, y0, x1, y1 = find_relative_box(label, question.objects[0])
            return [Pixel((x0 + x1) / 2, (y0 + y1) / 2)]
        case "exists":
            return ["yes" if question.objects[0] in names else "no"]
        case "count":
            return [str(names.count(question.objects[0]))]
        case "which_side":
            return ["left" if find_middle_x(label, question.objects[0]) < 0.5 else "right"]
        case "left_or_right":
            first, second = (find_middle_x(label, name) for name in question.objects)
            return ["left" if first < second else "right"]
        case "list":
            from_left = sorted(label.objects, key=lambda o: o.box2d[0] + o.box2d[2])
            return [", ".join(o.name for o in from_left)]
    raise AssertionError(question.question_type)


@pytest.mark.parametrize("question_type", QUESTION_TYPES_2D)
def test_every_2d_answer_follows_from_the_label(
    questions: list[tuple[LabeledImage, Question]], question_type: str
) -> None:
    questions_2d = [(label, q) for label, q in questions if q.question_type == question_type]

    assert questions_2d
    for label, question in questions_2d:
        expected = answer_again(label, question)
        for segment, expected_segment in zip(question.segments, expected, strict=True):
            if isinstance(expected_segment, Pixel):
                expected_location = pytest.approx(
                    (expected_segment.x, expected_segment.y), abs=1e-5
                )
                assert (segment.x, segment.y) == expected_location
                assert 0 <= segment.x < 1
                assert 0 <= segment.y < 1
            else:
                assert segment == expected_segment
        if question_type == "what_at":
            check_point_is_in_the_middle(label, question)


def test_all_question_types_are_asked(questions: list[tuple[LabeledImage, Question]]) -> None:
    assert {q.question_type for _, q in questions} == set(QUESTION_TYPES + QUESTION_TYPES_2D)


def test_what_a_name_contains_is_not_said_to_be_absent(labels: list[LabeledImage]) -> None:
    # The underscore belongs to the test: names of datasets have such ones between words.
    bowl = replace(labels[0].objects[0], name="bowl_of apples")
    label = replace(labels[0], objects=[bowl])

    questions = generate_for_seeds(label, "exists", num_seeds=400)

    absent_names = {q.objects[0] for q in questions} & set(EVERYDAY_NAMES)
    assert "banana" in absent_names
    assert not absent_names & {"apple", "bowl"}


# What is not asked


@pytest.mark.parametrize(
    ("distance_ratio", "is_asked"),
    [
        (1.03, False),  # differ by less than 5 %
        (1.1, True),
    ],
)
def test_distances_that_are_nearly_equal_are_not_compared(
    labels: list[LabeledImage], distance_ratio: float, is_asked: bool
) -> None:
    """An object is moved along its ray, to `distance_ratio` times the distance of another one."""
    label = next(label for label in labels if len(find_askable_objects(label)) >= 2)
    a, b = find_askable_objects(label)[:2]
    direction = a.box3d.center / np.linalg.norm(a.box3d.center)
    center = direction * np.linalg.norm(b.box3d.center) * distance_ratio
    moved = replace(a, box3d=replace(a.box3d, center=center))
    pair = replace(label, objects=[moved, b])

    questions = generate_questions(
        pair, np.random.default_rng(0), question_types=["chain_of_thought"]
    )

    assert bool(questions) is is_asked


def test_boxes_that_reach_out_of_the_image_are_not_projected(labels: list[LabeledImage]) -> None:
    label = next(label for label in labels if find_askable_objects(label))
    o = find_askable_objects(label)[0]
    vertices = o.box3d.vertices.copy()
    vertices[0, 0] += 5  # 5 m to the right
    outside = replace(o, box3d=replace(o.box3d, vertices=vertices))
    label = replace(label, objects=[outside])

    questions = generate_questions(
        label, np.random.default_rng(0), question_types=["back_projection"]
    )

    assert questions == []


# Randomness


def test_equal_seeds_give_equal_questions(labels: list[LabeledImage]) -> None:
    questions_of_seeds = []
    for seed in (5, 5, 6):
        rng = np.random.default_rng(seed)
        questions_of_seeds.append([generate_questions(label, rng) for label in labels])

    assert questions_of_seeds[0] == questions_of_seeds[1]
    assert questions_of_seeds[0] != questions_of_seeds[2]


def test_one_to_four_different_questions_are_asked(labels: list[LabeledImage]) -> None:
    rng = np.random.default_rng(0)
    label = max(labels, key=lambda label: len(find_askable_objects(label)))

    num_questions = Counter[int]()
    for _ in range(200):
        questions = generate_questions(label, rng)
        num_questions[len(questions)] += 1
        distinct_questions = {(q.question_type, q.objects, tuple(q.segments)) for q in questions}
        assert len(distinct_questions) == len(questions)

    assert set(num_questions) == {1, 2, 3, 4}
    assert min(num_questions.values()) > 25  # about 50 of 200 are expected


def test_question_types_are_drawn_with_equal_chance(labels: list[LabeledImage]) -> None:
    rng = np.random.default_rng(0)
    label = max(labels, key=lambda label: len(find_askable_objects(label)))

    counts = Counter[str]()
    for _ in range(400):
        counts.update(
            q.question_type for q in generate_questions(label, rng, questions_per_image=(1, 1))
        )

    lowest_count = min(counts[question_type] for question_type in QUESTION_TYPES)
    assert lowest_count > 0.5 * max(counts.values())


# Words


def find_words(texts: Sequence[str]) -> set[str]:
    """All words in texts."""
    words = set[str]()
    for text in texts:
        words.update(re.findall(r"\w+", text))
    return words


def test_tokenizer_texts_contain_every_word_that_is_used(
    questions: list[tuple[LabeledImage, Question]],
) -> None:
    names = set[str]()
    used_texts = []
    for label, question in questions:
        names.update(o.name for o in label.objects)
        used_texts.append(question.prompt)
        used_texts += [segment for segment in question.segments if isinstance(segment, str)]

    tokenizer_words = find_words(list(iterate_tokenizer_texts([*names, "mug"])))

    # Location tokens need not be in the texts, and neither do names of absent objects.
    used_words = {word for word in find_words(used_texts) if not re.fullmatch(r"loc\d{4}", word)}
    assert used_words - tokenizer_words <= set(EVERYDAY_NAMES)


# What is at a point


@pytest.fixture
def half_covered(labels: list[LabeledImage]) -> LabeledImage:
    """An image with one object, whose box is the whole image and whose mask is its left half."""
    for label in labels:
        for o in label.objects:
            if o.scores["visible"] == 1:
                mask = np.zeros((label.height, label.width), bool)
                mask[:, : label.width // 2] = True
                box2d = np.array([0, 0, label.width, label.height], np.float32)
                return replace(
                    label, objects=[replace(o, box2d=box2d, mask_runs=encode_mask(mask))]
                )
    raise AssertionError("no object is wholly visible")


def read_columns(questions: Sequence[Question]) -> list[int]:
    """The columns of the points in prompts, in 1024ths of the image's width.

    A point is written as two location tokens, y and x.
    """
    columns = []
    for question in questions:
        _, x_token = re.findall(r"<loc(\d{4})>", question.prompt)
        columns.append(int(x_token))
    return columns


def test_points_are_on_the_pixels_of_their_object(half_covered: LabeledImage) -> None:
    columns = read_columns(generate_for_seeds(half_covered, "what_at", num_seeds=50))

    assert len(columns) > 40  # for nearly all of 50 seeds
    assert max(columns) <= 512  # in the left half
    assert np.ptp(columns) > 100  # spread


def test_points_are_not_on_a_smaller_object(half_covered: LabeledImage) -> None:
    """A shirt has the left two fifths of the image, in the mask of the object in the left half.

    The shirt's 2D box is so small that no point is drawn for the shirt itself.
    """
    o = half_covered.objects[0]
    mask = np.zeros((half_covered.height, half_covered.width), bool)
    mask[:, : 2 * half_covered.width // 5] = True
    shirt = replace(o, name="shirt", box2d=o.box2d / 1000, mask_runs=encode_mask(mask))
    with_shirt = replace(half_covered, objects=[o, shirt])

    questions = generate_for_seeds(with_shirt, "what_at", num_seeds=50)

    # Points are between two fifths (409.6) and a half (512) of the width, up to the rounding of the
    # mask to whole pixels.
    columns = set(read_columns([q for q in questions if "shirt" not in q.objects]))
    assert len(columns) > 3  # in different columns
    assert min(columns) >= 400
    assert max(columns) <= 512


def test_nothing_is_at_a_point_of_an_object_without_a_mask(half_covered: LabeledImage) -> None:
    object_without_mask = replace(half_covered.objects[0], mask_runs=())
    without_mask = replace(half_covered, objects=[object_without_mask])

    rng = np.random.default_rng(0)
    assert not generate_questions(without_mask, rng, question_types=["what_at"])


# Which 3D point a pixel shows


def make_label(frame: Frame, image: bytes, source: str = "made") -> LabeledImage:
    """A label of a frame, without objects."""
    height, width = frame.image.shape[:2]
    return LabeledImage(image, width, height, frame.intrinsics, [], "metre", source)


@pytest.mark.parametrize(
    ("width", "height"),
    [
        (160, 120),
        (159, 119),  # no multiples of the stride of stored depth, 4 pixels
    ],
)
def test_the_answer_is_the_point_that_the_pixel_shows(
    tmp_path: Path, width: int, height: int
) -> None:
    """The depth is written and read as in training."""
    rng = np.random.default_rng(0)
    frame = make_random_frame(rng, width=width, height=height)
    assert frame.depth is not None
    image = encode_jpeg(frame.image)
    label = make_label(frame, image)
    write_images_with_coarse_depth(
        [(image, frame.depth)], tmp_path / "depth/external/depth-00000.parquet"
    )
    ((_, depth),) = load_depth([tmp_path], {"external": [label]})["external"]

    questions = []
    for _ in range(50):
        questions += generate_questions(
            label, rng, questions_per_image=(4, 4), question_types=QUESTION_TYPES_PIXEL, depth=depth
        )

    true_points = unproject(frame.depth, frame.intrinsics)  # [height, width, 3]
    assert len(questions) == 200
    for question in questions:
        x, y = read_location(question.prompt)
        row = round(y * height - 0.5)  # pixel centers are at integer + 0.5
        column = round(x * width - 0.5)
        assert question.values == pytest.approx(true_points[row, column].tolist(), abs=0.02)


@pytest.mark.parametrize("depth", [None, np.zeros((30, 40), np.float16)])
def test_without_depth_no_pixel_is_asked_about(depth: Array | None) -> None:
    """The image has no depth, or its depth is unknown (0) everywhere."""
    rng = np.random.default_rng(0)
    frame = make_random_frame(rng, width=160, height=120)
    label = make_label(frame, encode_jpeg(frame.image))

    questions = generate_questions(
        label, rng, questions_per_image=(4, 4), question_types=QUESTION_TYPES_PIXEL, depth=depth
    )

    assert questions == []


# Folders of labels in training


@pytest.fixture
def two_folders(tmp_path: Path) -> tuple[list[Path], dict[tuple[str, int], bytes]]:
    """Two folders of labels with depth, and their images: (view, number of the folder) → image.

    The second folder has no wrist images. The first one is of scene sim:9999, which is held out for
    testing.
    """
    images = {}
    for view, number in (("external", 0), ("wrist", 0), ("external", 1)):
        frame = make_random_frame(np.random.default_rng(len(images)))
        assert frame.depth is not None
        image = encode_jpeg(frame.image)
        images[view, number] = image
        folder = tmp_path / f"{number}"
        label = make_label(frame, image, source=f"sim:{9_999 + number}")
        write_labels([label], folder / view / "labels-00000.parquet")
        write_images_with_coarse_depth(
            [(image, frame.depth)], folder / "depth" / view / "depth-00000.parquet"
        )
    return [tmp_path / "0", tmp_path / "1"], images


def test_labels_of_several_folders_come_together_by_view(
    two_folders: tuple[list[Path], dict[tuple[str, int], bytes]],
) -> None:
    """A folder need not have every view, and a notice counts images of held-out scenes."""
    folders, images = two_folders

    with pytest.warns(match=r"^2 of 3 "):  # both views of sim:9999
        labels = load_labels(folders, ["external", "wrist"])

    assert set(labels) == {"external", "wrist"}
    external_images = [label.image for label in labels["external"]]
    assert external_images == [images["external", 0], images["external", 1]]
    assert [label.image for label in labels["wrist"]] == [images["wrist", 0]]


@pytest.mark.filterwarnings("ignore:2 of 3")
def test_each_image_of_several_folders_has_its_own_depth(
    two_folders: tuple[list[Path], dict[tuple[str, int], bytes]],
) -> None:
    folders, _ = two_folders
    labels = load_labels(folders, ["external", "wrist"])

    depths = load_depth(folders, labels)

    # The images of a view are in the order of the folders; the second folder has no wrist image.
    for view, depth_images in depths.items():
        for folder, (_, depth) in zip(folders, depth_images, strict=False):
            ((_, stored_depth),) = read_images_with_coarse_depth(folder / "depth" / view)
            np.testing.assert_array_equal(depth, stored_depth)


@pytest.mark.filterwarnings("ignore:2 of 3")
def test_depth_of_other_images_is_refused(
    two_folders: tuple[list[Path], dict[tuple[str, int], bytes]],
) -> None:
    folders, _ = two_folders
    labels = load_labels(folders, ["external", "wrist"])

    refuses("of other images than the labels", load_depth, folders[::-1], labels)


def test_labels_without_askable_objects_end_the_training() -> None:
    """Otherwise the search for an image with a question would never end."""
    image = encode_jpeg(np.zeros((8, 8, 3), np.uint8))
    label = LabeledImage(image, 8, 8, np.eye(3), [], "metre", "made")
    processor = Processor.load(locate_checkpoint("nano"))
    mix = QuestionMix(("offset",))
    samples = QuestionSamples({"external": [label]}, processor, mix, num_images=2, seed=0)

    refuses("offset", samples.batch, 0)
