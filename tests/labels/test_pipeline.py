"""Labels of ray-cast scenes: their boxes, their scores, and the images that are refused.

The scenes are boxes on a table (`labels_scenes`) in images of 192 × 128 pixels. A box is given by
its center (m), size (m) and yaw (rad); the table is at z = 0. The ground truth of a frame takes the
place of the three models, unless a test says otherwise.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from labels_scenes import TRUTH, make_random_frame, render_blocks
from refusals import refuses
from spear.labels.engine import STAGES, LabeledBatch, fit_boxes_of_packed_images
from spear.labels.fit.accuracy import compare_labels
from spear.labels.fit.image import project, unproject
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import label_images, label_with_ground_truth, make_checked_pending_image
from spear.labels.questions.generate import (
    find_exclusion_reasons,
    find_failed_scores,
    generate_questions,
)
from spear.types import Array, Frame, LabeledImage


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """20 frames of five boxes each, in instances 1 to 5."""
    rng = np.random.default_rng(0)
    return [make_random_frame(rng) for _ in range(20)]


@pytest.fixture
def cube_frame() -> Frame:
    """A frame of one cube of 6 cm, which is in rows 48 to 69 and columns 87 to 104 of the image."""
    return render_blocks([(np.array([0, 0, 0.03]), np.full(3, 0.06), 0.4)], ["cube"])


def label_estimated(frames: Sequence[Frame]) -> list[LabeledImage]:
    """Label frames as if their true masks and depth were estimates."""
    truth = GroundTruth()
    return list(label_images(frames, truth, truth, truth, inputs_are_exact=False))


def find_height(label: LabeledImage, name: str) -> float:
    """The height of an object's box: the size along the box's second axis, down."""
    (o,) = (o for o in label.objects if o.name == name)
    return float(o.box3d.size[1])


# Boxes


def test_boxes_agree_with_the_true_ones(frames: list[Frame]) -> None:
    accuracy = compare_labels(label_with_ground_truth(frames), frames)

    assert accuracy.n == 100  # five boxes in each of 20 frames
    assert accuracy.missed == 0
    assert accuracy.center < 0.002  # m
    assert accuracy.vertex < 0.005  # m
    assert accuracy.iou > 0.85


def test_boxes_of_estimates_do_not_shrink(frames: list[Frame]) -> None:
    """The correction of estimated outlines must not remove parts of the objects."""
    accuracy = compare_labels(label_estimated(frames[:6]), frames[:6])

    assert accuracy.iou > 0.75


def test_boxes_survive_noisy_depth(frames: list[Frame]) -> None:
    """Depth has noise of 0.3 %, and 1 % of the pixels are half as far again as they should be."""
    rng = np.random.default_rng(0)
    noisy_frames = []
    for frame in frames[:8]:
        depth = frame.depth * (1 + 0.003 * rng.normal(size=frame.depth.shape))
        is_outlier = rng.random(depth.shape) < 0.01
        noisy_depth = np.where(is_outlier, depth * 1.5, depth).astype(np.float32)
        noisy_frames.append(replace(frame, depth=noisy_depth))

    accuracy = compare_labels(label_with_ground_truth(noisy_frames), frames[:8])

    assert accuracy.vertex < 0.012  # m
    assert accuracy.iou > 0.65


def test_an_object_on_an_object_ends_where_it_stands() -> None:
    """The box of a cube on a block reaches down to the block, not to the table."""
    block = (np.array([0, 0, 0.03]), np.array([0.2, 0.2, 0.06]), 0.0)  # 6 cm high, on the table
    cube = (np.array([0, 0, 0.085]), np.array([0.05, 0.05, 0.05]), 0.0)  # 5 cm high, on the block

    (label,) = label_with_ground_truth([render_blocks([block, cube], ["block", "cube"])])

    assert find_height(label, "cube") == pytest.approx(0.05, abs=0.005)
    assert find_height(label, "block") == pytest.approx(0.06, abs=0.005)


@pytest.mark.parametrize("pitch", [80, 89, 95])
def test_an_object_seen_from_above_stands_on_the_table(pitch: float) -> None:
    """The camera looks down by about 90°, so it sees the top of the cube and hardly a side."""
    cube = (np.array([0, 0, 0.02]), np.array([0.04, 0.04, 0.04]), 0.3)
    frame = render_blocks([cube], ["cube"], pitch=pitch)

    accuracy = compare_labels(label_with_ground_truth([frame]), [frame])

    assert accuracy.iou > 0.7


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_table_that_was_detected_is_still_the_support(frames: list[Frame], index: int) -> None:
    """The pixels of the background become an object, the table."""
    frame = replace(frames[index], extrinsics=None)
    table_id = 9  # no box has this id
    is_box = frame.instances > 0
    instances = np.where(is_box, frame.instances, table_id)
    names = {**frame.names, table_id: "table"}
    with_table = replace(frame, instances=instances, names=names)

    error = compare_labels(label_with_ground_truth([frame]), [frame]).vertex
    error_with_table = compare_labels(label_with_ground_truth([with_table]), [frame]).vertex

    assert error_with_table == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(
    ("as_estimates", "max_vertex_error_m", "min_iou"),
    [
        (False, 0.008, 0.8),  # measured: 0.0059 m and 0.83
        (True, 0.0095, 0.7),  # measured: 0.0065 m and 0.81
    ],
)
def test_boxes_of_the_simulators_objects(
    renderer: Any, as_estimates: bool, max_vertex_error_m: float, min_iou: float
) -> None:
    """The simulator has bowls, spoons, cans, carrots, …; few of these are boxes.

    With `as_estimates`, masks and depth count as estimates, and the camera's pose is unknown.
    """
    from spear.sim.render import render_clutter_frame

    frames = []
    for seed in range(3000, 3012):
        frame = render_clutter_frame(seed, "external", (192, 128))
        names = {i: name for i, name in frame.names.items() if "gripper" not in name}
        frames.append(replace(frame, names=names))

    if as_estimates:
        without_pose = [replace(frame, extrinsics=None) for frame in frames]
        labels = label_images(without_pose, *TRUTH, inputs_are_exact=False)
    else:
        labels = label_images(frames, *TRUTH)
    accuracy = compare_labels(labels, frames)

    assert accuracy.vertex < max_vertex_error_m
    assert accuracy.iou > min_iou


def test_camera_pixel_centers_are_at_one_half() -> None:
    intrinsics = np.array([[100, 0, 16], [0, 100, 8], [0, 0, 1.0]])

    points = unproject(np.full((16, 32), 2.0), intrinsics)

    # The center of row 8, column 16 is half a pixel from the principal point in x and in y. At a
    # depth of 2 with a focal length of 100 pixels, half a pixel is 0.5 · 2 / 100.
    np.testing.assert_allclose(points[8, 16], [0.01, 0.01, 2], atol=1e-6)
    np.testing.assert_allclose(project(points[3, 5], intrinsics), [5.5, 3.5], atol=1e-4)  # x, y


# Poses


def finish_alone(frame: Frame) -> LabeledBatch:
    """Label a frame with the stages of the engines, in a batch with no other image."""
    image = make_checked_pending_image(frame)
    image.encoded = b"JPEG"  # the stages do not look at it
    for stage, model in zip(STAGES, TRUTH, strict=True):
        stage([image], model)
    return fit_boxes_of_packed_images([image])


def test_a_pose_in_another_convention_is_ignored_with_a_notice(frames: list[Frame]) -> None:
    """In a world with y up, the table is not level; the label is the same as without a pose."""
    y_up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    wrong_pose = y_up @ frames[0].extrinsics

    batch = finish_alone(replace(frames[0], extrinsics=None))
    batch_with_wrong_pose = finish_alone(replace(frames[0], extrinsics=wrong_pose))

    assert len(batch_with_wrong_pose.labels) == 1
    assert batch_with_wrong_pose.labels == batch.labels
    assert not batch.notices
    assert "camera to world" in batch_with_wrong_pose.notices[0]


# Scores and names that exclude objects from questions


class HalfMasks(GroundTruth):
    """Segments only the left half of the image, which shows 7 of the cube's 18 columns."""

    def segment(self, frames: Any, detections: Any) -> list[Array]:
        is_left = np.arange(192) < 94  # [w]
        return [masks & is_left for masks in super().segment(frames, detections)]


class NoSecondMask(GroundTruth):
    """Returns an empty mask for the second detection."""

    def segment(self, frames: Any, detections: Any) -> list[Array]:
        (masks,) = super().segment(frames, detections)
        masks[1] = False
        return [masks]


def test_a_whole_object_fails_in_no_score(cube_frame: Frame) -> None:
    (label,) = label_with_ground_truth([cube_frame])

    assert find_failed_scores(label.objects[0].scores) == ()


def test_an_object_of_whose_depth_half_is_unknown_fails(cube_frame: Frame) -> None:
    # Depth is known in the left half of the image, which shows 10 of the cube's 18 columns.
    half_known = np.where(np.arange(192) < 97, cube_frame.depth, 0)

    (label,) = label_with_ground_truth([replace(cube_frame, depth=half_known)])

    assert find_failed_scores(label.objects[0].scores) == ("known",)


def test_an_object_whose_mask_covers_half_of_its_2d_box_fails(cube_frame: Frame) -> None:
    (label,) = label_images([cube_frame], GroundTruth(), HalfMasks(), GroundTruth())

    assert find_failed_scores(label.objects[0].scores) == ("whole",)


@pytest.fixture
def label_of_two_mugs(frames: list[Frame]) -> LabeledImage:
    """An image with two mugs, of which the second one has no mask."""
    frame = replace(frames[0], names={**frames[0].names, 1: "mug", 2: "mug"})
    (label,) = label_images([frame], GroundTruth(), NoSecondMask(), GroundTruth())
    return label


def test_an_object_without_a_mask_makes_its_name_ambiguous(label_of_two_mugs: LabeledImage) -> None:
    assert [o.name for o in label_of_two_mugs.objects[:2]] == ["mug", "mug"]
    assert label_of_two_mugs.objects[1].box3d is None
    assert find_exclusion_reasons(label_of_two_mugs)[0] == ("ambiguous",)


def test_no_2d_question_is_about_an_ambiguous_name(label_of_two_mugs: LabeledImage) -> None:
    rng = np.random.default_rng(0)

    questions = generate_questions(
        label_of_two_mugs, rng, questions_per_image=(9, 9), question_types=("where_2d",)
    )

    assert questions
    assert not any("mug" in question.objects for question in questions)


# Black bars and edges

NUM_ROWS = 66  # an image with only these rows lacks the last 4 of the cube's 22 rows


def test_a_black_bar_cuts_an_object_as_the_edge_of_the_image_does(cube_frame: Frame) -> None:
    """One image is black from row `NUM_ROWS` on, the other one ends there."""
    is_lit = np.arange(128)[:, None] < NUM_ROWS  # [h, 1]
    image = cube_frame.image * is_lit[..., None]
    instances = cube_frame.instances * is_lit
    barred = replace(cube_frame, image=image, instances=instances)
    cropped = replace(
        cube_frame,
        image=image[:NUM_ROWS],
        instances=instances[:NUM_ROWS],
        depth=cube_frame.depth[:NUM_ROWS],
    )

    barred_label, cropped_label = label_with_ground_truth([barred, cropped])

    barred_scores = barred_label.objects[0].scores
    cropped_scores = cropped_label.objects[0].scores
    assert "edge" in find_failed_scores(barred_scores)
    assert barred_scores["edge"] == cropped_scores["edge"]
    assert barred_scores["visible"] == cropped_scores["visible"]


def test_an_estimated_outline_that_ends_a_little_before_the_image_is_cut(cube_frame: Frame) -> None:
    """The image's edge cuts the cube, whose estimated mask ends two rows before the edge."""
    instances = cube_frame.instances[:NUM_ROWS].copy()
    instances[-2:] = 0
    cropped = replace(
        cube_frame,
        image=cube_frame.image[:NUM_ROWS],
        instances=instances,
        depth=cube_frame.depth[:NUM_ROWS],
    )

    (label,) = label_estimated([cropped])

    assert "edge" in find_failed_scores(label.objects[0].scores)


# Images that are refused, and objects without a box


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": np.zeros((128, 192), np.uint8)}, "uint8 (128, 192)"),
        ({"image": np.zeros((1, 1, 3), np.uint8)}, "1×1"),
        ({"instances": None}, "instance map"),
        ({"depth": None}, "depth"),
    ],
)
def test_a_bad_image_is_refused_with_its_reason(
    frames: list[Frame], changes: dict[str, Any], reason: str
) -> None:
    bad_frame = replace(frames[2], **changes)
    labels = label_images([*frames[:5], bad_frame], *TRUTH)

    refuses(re.escape(reason), list, labels)


def test_objects_without_known_depth_have_no_box(frames: list[Frame]) -> None:
    depth = frames[0].depth.copy()
    depth[frames[0].instances == 1] = np.nan
    depth[frames[0].instances == 2] = np.inf

    (label,) = label_with_ground_truth([replace(frames[0], depth=depth)])

    has_box = [o.box3d is not None for o in label.objects]
    assert has_box == [False, False, True, True, True]
    assert label.objects[0].keypoints == {}


def test_an_image_without_detections_has_a_label_without_objects(frames: list[Frame]) -> None:
    (label,) = label_with_ground_truth([replace(frames[0], names={})])

    assert label.objects == []
