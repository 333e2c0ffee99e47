import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from labels_scenes import TRUTH, random_frame, render
from refusals import refuses
from spear.labels.engine import STAGES, finish_batch
from spear.labels.fit.image import project, unproject
from spear.labels.fit.quality import compare_labels, find_failed_scores
from spear.labels.models.ground_truth import GroundTruth
from spear.labels.pipeline import admit_frame, label_images
from spear.labels.questions.generate import find_exclusion_reasons, generate_questions
from spear.types import Frame


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    rng = np.random.default_rng(0)
    return [random_frame(rng) for _ in range(20)]


def test_boxes_agree_with_the_true_ones(frames: list[Frame]) -> None:
    result = compare_labels(label_images(frames, *TRUTH), frames)
    assert result.n == 100 and result.missed == 0
    assert result.center < 0.002 and result.vertex < 0.005 and result.iou > 0.85
    assert (
        compare_labels(label_images(frames[:6], *TRUTH, exact=False), frames[:6]).iou > 0.75
    )  # the boxes do not shrink


def test_boxes_survive_noisy_depth(frames: list[Frame]) -> None:
    rng, noisy = np.random.default_rng(0), []
    for frame in frames[:8]:
        depth = frame.depth * (1 + 0.003 * rng.normal(size=frame.depth.shape))
        flying = rng.random(depth.shape) < 0.01
        noisy.append(replace(frame, depth=np.where(flying, depth * 1.5, depth).astype(np.float32)))
    result = compare_labels(label_images(noisy, *TRUTH), frames[:8])
    assert result.vertex < 0.012 and result.iou > 0.65


def test_a_thing_on_a_thing_ends_where_it_stands() -> None:
    block = (np.array([0, 0, 0.03]), np.array([0.2, 0.2, 0.06]), 0.0)
    cube = (np.array([0, 0, 0.085]), np.array([0.05, 0.05, 0.05]), 0.0)
    (result,) = label_images([render([block, cube], ["block", "cube"])], *TRUTH)
    tall = {o.name: float(o.box3d.size[1]) for o in result.objects if o.box3d}
    assert tall["cube"] == pytest.approx(0.05, abs=0.005) and tall["block"] == pytest.approx(
        0.06, abs=0.005
    )


@pytest.mark.parametrize("pitch", [80, 89, 95])
def test_a_thing_seen_from_above_stands_on_the_table(pitch: float) -> None:
    frame = render(
        [(np.array([0, 0, 0.02]), np.array([0.04, 0.04, 0.04]), 0.3)], ["cube"], pitch=pitch
    )
    assert compare_labels(label_images([frame], *TRUTH), [frame]).iou > 0.7


def test_a_table_that_was_detected_still_holds_things_up(frames: list[Frame]) -> None:
    for frame in frames[:3]:
        seen = replace(frame, extrinsics=None)
        table = replace(
            seen,
            instances=np.where(seen.instances, seen.instances, 9),
            names=seen.names | {9: "table"},
        )
        one, other = (
            compare_labels(label_images([f], *TRUTH), [frame]).vertex for f in (seen, table)
        )
        assert one == pytest.approx(other, abs=1e-5)


def test_a_pose_in_another_convention_is_not_used_and_said_also_of_a_worker(
    frames: list[Frame],
) -> None:
    y_up = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    works = [
        admit_frame(replace(frames[0], extrinsics=pose))
        for pose in (None, y_up @ frames[0].extrinsics)
    ]
    works = [replace(work, encoded=b"JPEG") for work in works]
    for stage, model in zip(STAGES, TRUTH, strict=True):
        stage(works, model)
    without, other = (finish_batch([work]) for work in works)
    assert without.labels == other.labels and len(other.labels) == 1
    assert not without.notices and "camera to world" in other.notices[0]


def test_half_an_object_is_not_asked_about() -> None:
    """Neither where half of its depth is unknown, nor where its mask covers half of what was detected."""

    class Part(GroundTruth):
        def segment(self, frames: Any, detections: Any) -> Any:
            return [mask & (np.arange(192) < 94) for mask in super().segment(frames, detections)]

    frame = render([(np.array([0, 0, 0.03]), np.full(3, 0.06), 0.4)], ["cube"])
    bare = replace(frame, depth=np.where(np.arange(192) < 97, frame.depth, 0))
    labels = [
        *label_images([frame, bare], *TRUTH),
        *label_images([frame], TRUTH[0], Part(), TRUTH[2]),
    ]
    assert [find_failed_scores(image.objects[0].scores) for image in labels] == [
        (),
        ("known",),
        ("whole",),
    ]


def test_a_name_is_not_alone_beside_an_object_without_a_mask(frames: list[Frame]) -> None:
    class Other(GroundTruth):
        def segment(self, frames: Any, detections: Any) -> Any:
            (masks,) = super().segment(frames, detections)
            return [masks * (np.arange(5) != 1)[:, None, None]]

    seen = replace(frames[0], names={**frames[0].names, 1: "mug", 2: "mug"})
    (image,) = label_images([seen], TRUTH[0], Other(), TRUTH[2])
    assert [o.name for o in image.objects[:2]] == ["mug", "mug"] and image.objects[1].box3d is None
    assert find_exclusion_reasons(image)[0] == ("ambiguous",)
    asked = generate_questions(image, np.random.default_rng(0), (9, 9), ("where_2d",))
    assert asked and not any("mug" in q.objects for q in asked)


def test_what_a_black_bar_cuts_is_cut() -> None:
    frame = render([(np.array([0, 0, 0.03]), np.full(3, 0.06), 0.4)], ["cube"])
    lit = np.arange(128)[:, None] < 66
    image, instances = frame.image * lit[..., None], frame.instances * lit
    barred = replace(frame, image=image, instances=instances)
    cropped = replace(frame, image=image[:66], instances=instances[:66], depth=frame.depth[:66])
    scores = [each.objects[0].scores for each in label_images([frame, barred, cropped], *TRUTH)]
    assert find_failed_scores(scores[0]) == () and "edge" in find_failed_scores(scores[1])
    assert scores[1]["edge"] == scores[2]["edge"] and scores[1]["visible"] == scores[2]["visible"]
    cropped.instances[-2:] = 0  # an outline that ends a little before the image
    assert "edge" in find_failed_scores(
        next(label_images([cropped], *TRUTH, exact=False)).objects[0].scores
    )


def test_a_bad_image_is_refused_with_its_reason(frames: list[Frame]) -> None:
    bad = [
        replace(frames[0], image=frames[0].image[..., 0], source="grey.png"),
        replace(frames[0], image=frames[0].image[:1, :1], source="tiny.png"),
        replace(frames[2], instances=None, source="photo.png"),
        replace(frames[2], depth=None, source="flat.png"),
    ]
    for frame, reason in zip(
        bad, ("uint8 (128, 192)", "1×1", "instance map", "depth"), strict=True
    ):
        refuses(re.escape(reason), list, label_images([*frames[:5], frame], *TRUTH))


def test_unknown_depth_leaves_objects_without_box(frames: list[Frame]) -> None:
    depth = frames[0].depth.copy()
    depth[frames[0].instances == 1] = np.nan
    depth[frames[0].instances == 2] = np.inf
    (result,) = label_images([replace(frames[0], depth=depth)], *TRUTH)
    assert [o.box3d is None for o in result.objects] == [True, True, False, False, False]
    assert result.objects[0].keypoints == {}
    (nothing,) = label_images([replace(frames[0], names={})], *TRUTH)
    assert nothing.objects == []


def test_camera_pixel_centres_are_at_one_half() -> None:
    k = np.array([[100, 0, 16], [0, 100, 8], [0, 0, 1.0]])
    points = unproject(np.full((16, 32), 2.0), k)
    np.testing.assert_allclose(points[8, 16], [0.01, 0.01, 2], atol=1e-6)
    np.testing.assert_allclose(project(points[3, 5], k), [5.5, 3.5], atol=1e-4)


@pytest.mark.parametrize(("aided", "vertex", "iou"), [(True, 0.008, 0.8), (False, 0.0095, 0.7)])
def test_boxes_of_the_simulators_things(
    renderer: Any, aided: bool, vertex: float, iou: float
) -> None:
    """Bowls, spoons, cans, carrots: shapes of which few are boxes; also as if they were estimates."""
    from spear.sim.render import render_clutter_frame

    frames = [render_clutter_frame(seed, "external", (192, 128)) for seed in range(3000, 3012)]
    frames = [
        replace(f, names={i: n for i, n in f.names.items() if "gripper" not in n}) for f in frames
    ]
    seen = frames if aided else [replace(frame, extrinsics=None) for frame in frames]
    result = compare_labels(label_images(seen, *TRUTH, exact=None if aided else False), frames)
    assert result.vertex < vertex and result.iou > iou, result
