"""Labels of ray-cast scenes: their boxes, what is refused, and what questions are not about."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from labels_scenes import TRUTH, make_random_frame, render_blocks
from refusals import refuses
from spear.labels.engine import STAGES, LabeledBatch, finish_batch
from spear.labels.fit.image import project, unproject
from spear.labels.fit.quality import compare_labels, find_failed_scores
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import admit_frame, label_images, label_with_ground_truth
from spear.labels.questions.generate import find_exclusion_reasons, generate_questions
from spear.types import Array, Frame, LabeledImage


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    rng = np.random.default_rng(0)
    return [make_random_frame(rng) for _ in range(20)]


@pytest.fixture
def cube_frame() -> Frame:
    return render_blocks([(np.array([0, 0, 0.03]), np.full(3, 0.06), 0.4)], ["cube"])


def label_estimated(frames: Sequence[Frame]) -> list[LabeledImage]:
    """Labels as if masks and depth were estimates."""
    truth = GroundTruth()
    return list(label_images(frames, truth, truth, truth, exact=False))


def find_height(label: LabeledImage, name: str) -> float:
    (o,) = (o for o in label.objects if o.name == name)
    return float(o.box3d.size[1])


# Boxes


def test_boxes_agree_with_the_true_ones(frames: list[Frame]) -> None:
    result = compare_labels(label_with_ground_truth(frames), frames)

    assert result.n == 100
    assert result.missed == 0
    assert result.center < 0.002
    assert result.vertex < 0.005
    assert result.iou > 0.85


def test_boxes_of_estimates_do_not_shrink(frames: list[Frame]) -> None:
    assert compare_labels(label_estimated(frames[:6]), frames[:6]).iou > 0.75


def test_boxes_survive_noisy_depth(frames: list[Frame]) -> None:
    rng = np.random.default_rng(0)
    noisy_frames = []
    for frame in frames[:8]:
        depth = frame.depth * (1 + 0.003 * rng.normal(size=frame.depth.shape))
        is_flying = rng.random(depth.shape) < 0.01
        noisy_depth = np.where(is_flying, depth * 1.5, depth).astype(np.float32)
        noisy_frames.append(replace(frame, depth=noisy_depth))

    result = compare_labels(label_with_ground_truth(noisy_frames), frames[:8])

    assert result.vertex < 0.012
    assert result.iou > 0.65


def test_an_object_on_an_object_ends_where_it_stands() -> None:
    block = (np.array([0, 0, 0.03]), np.array([0.2, 0.2, 0.06]), 0.0)
    cube = (np.array([0, 0, 0.085]), np.array([0.05, 0.05, 0.05]), 0.0)

    (label,) = label_with_ground_truth([render_blocks([block, cube], ["block", "cube"])])

    assert find_height(label, "cube") == pytest.approx(0.05, abs=0.005)
    assert find_height(label, "block") == pytest.approx(0.06, abs=0.005)


@pytest.mark.parametrize("pitch", [80, 89, 95])
def test_an_object_seen_from_above_stands_on_the_table(pitch: float) -> None:
    cube = (np.array([0, 0, 0.02]), np.array([0.04, 0.04, 0.04]), 0.3)
    frame = render_blocks([cube], ["cube"], pitch=pitch)

    assert compare_labels(label_with_ground_truth([frame]), [frame]).iou > 0.7


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_table_that_was_detected_still_holds_things_up(frames: list[Frame], index: int) -> None:
    frame = replace(frames[index], extrinsics=None)
    instances = np.where(frame.instances, frame.instances, 9)
    with_table = replace(frame, instances=instances, names={**frame.names, 9: "table"})

    error = compare_labels(label_with_ground_truth([frame]), [frame]).vertex
    error_with_table = compare_labels(label_with_ground_truth([with_table]), [frame]).vertex

    assert error_with_table == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(
    ("exact", "max_vertex_error", "min_iou"), [(None, 0.008, 0.8), (False, 0.0095, 0.7)]
)
def test_boxes_of_the_simulators_objects(
    renderer: Any, exact: bool | None, max_vertex_error: float, min_iou: float
) -> None:
    """Bowls, spoons, cans, carrots: shapes of which few are boxes; also as if they were
    estimates."""
    from spear.sim.render import render_clutter_frame

    frames = []
    for seed in range(3000, 3012):
        frame = render_clutter_frame(seed, "external", (192, 128))
        names = {i: name for i, name in frame.names.items() if "gripper" not in name}
        frames.append(replace(frame, names=names))
    inputs = frames
    if exact is not None:
        inputs = [replace(frame, extrinsics=None) for frame in frames]

    result = compare_labels(label_images(inputs, *TRUTH, exact=exact), frames)

    assert result.vertex < max_vertex_error
    assert result.iou > min_iou


def test_camera_pixel_centers_are_at_one_half() -> None:
    intrinsics = np.array([[100, 0, 16], [0, 100, 8], [0, 0, 1.0]])

    points = unproject(np.full((16, 32), 2.0), intrinsics)

    np.testing.assert_allclose(points[8, 16], [0.01, 0.01, 2], atol=1e-6)
    np.testing.assert_allclose(project(points[3, 5], intrinsics), [5.5, 3.5], atol=1e-4)


# Poses


def finish_alone(frame: Frame) -> LabeledBatch:
    """Take a frame through the stages of the engines."""
    image = admit_frame(frame)
    image.encoded = b"JPEG"
    for stage, model in zip(STAGES, TRUTH, strict=True):
        stage([image], model)
    return finish_batch([image])


def test_a_pose_in_another_convention_is_not_used_and_a_worker_says_so(
    frames: list[Frame],
) -> None:
    y_up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    wrong_pose = y_up @ frames[0].extrinsics

    batch = finish_alone(replace(frames[0], extrinsics=None))
    batch_with_wrong_pose = finish_alone(replace(frames[0], extrinsics=wrong_pose))

    assert len(batch_with_wrong_pose.labels) == 1
    assert batch_with_wrong_pose.labels == batch.labels
    assert not batch.notices
    assert "camera to world" in batch_with_wrong_pose.notices[0]


# What questions are not about


class HalfMasks(GroundTruth):
    """Masks of which the right half of the image is cut off."""

    def segment(self, frames: Any, detections: Any) -> list[Array]:
        is_left = np.arange(192) < 94
        return [masks & is_left for masks in super().segment(frames, detections)]


class NoSecondMask(GroundTruth):
    """Masks of which the second one is empty."""

    def segment(self, frames: Any, detections: Any) -> list[Array]:
        (masks,) = super().segment(frames, detections)
        masks[1] = False
        return [masks]


def test_a_whole_object_fails_in_no_score(cube_frame: Frame) -> None:
    (label,) = label_with_ground_truth([cube_frame])

    assert find_failed_scores(label.objects[0].scores) == ()


def test_an_object_of_whose_depth_half_is_unknown_fails(cube_frame: Frame) -> None:
    half_known = np.where(np.arange(192) < 97, cube_frame.depth, 0)

    (label,) = label_with_ground_truth([replace(cube_frame, depth=half_known)])

    assert find_failed_scores(label.objects[0].scores) == ("known",)


def test_an_object_whose_mask_covers_half_of_what_was_detected_fails(cube_frame: Frame) -> None:
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

    questions = generate_questions(label_of_two_mugs, rng, (9, 9), ("where_2d",))

    assert questions
    assert not any("mug" in question.objects for question in questions)


# Black bars and edges


def test_a_black_bar_cuts_an_object_as_the_edge_of_the_image_does(cube_frame: Frame) -> None:
    is_lit = np.arange(128)[:, None] < 66
    image = cube_frame.image * is_lit[..., None]
    instances = cube_frame.instances * is_lit
    barred = replace(cube_frame, image=image, instances=instances)
    cropped = replace(
        cube_frame, image=image[:66], instances=instances[:66], depth=cube_frame.depth[:66]
    )

    barred_label, cropped_label = label_with_ground_truth([barred, cropped])

    barred_scores = barred_label.objects[0].scores
    cropped_scores = cropped_label.objects[0].scores
    assert "edge" in find_failed_scores(barred_scores)
    assert barred_scores["edge"] == cropped_scores["edge"]
    assert barred_scores["visible"] == cropped_scores["visible"]


def test_an_estimated_outline_that_ends_a_little_before_the_image_is_cut(cube_frame: Frame) -> None:
    instances = cube_frame.instances[:66].copy()
    instances[-2:] = 0
    cropped = replace(
        cube_frame,
        image=cube_frame.image[:66],
        instances=instances,
        depth=cube_frame.depth[:66],
    )

    (label,) = label_estimated([cropped])

    assert "edge" in find_failed_scores(label.objects[0].scores)


# What is refused, and what has no box


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

    refuses(re.escape(reason), list, label_images([*frames[:5], bad_frame], *TRUTH))


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
