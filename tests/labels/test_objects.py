"""The scores of labeled objects, and the rule that decides which objects questions are about."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from labels_scenes import render_blocks
from spear.labels.fit.box3d import fit_box
from spear.labels.objects import compute_planarity, compute_stability
from spear.labels.pipeline import label_with_ground_truth
from spear.labels.questions.generate import (
    find_askable_objects,
    find_exclusion_reasons,
    generate_questions,
)
from spear.types import LabeledImage

CUBE = np.random.default_rng(0).uniform(-1, 1, (4000, 3))  # points in a cube
SIZE_M = np.array([0.06, 0.06, 0.08])
BLOCKS = {  # name: center (m), size (m), yaw (rad)
    "can": (np.array([0.1, -0.1, 0.04]), SIZE_M, 0.3),
    "cup": (np.array([0.06, 0.1, 0.04]), SIZE_M, 0.0),  # behind the box
    "box": (np.array([-0.04, 0.1, 0.06]), np.array([0.04, 0.1, 0.12]), 0.0),
    "bowl": (np.array([-0.1, -0.385, 0.04]), SIZE_M, 0.0),  # at the edge of the image
    "pea": (np.array([0.2, 0.02, 0.01]), np.array([0.015, 0.02, 0.02]), 0.0),  # a few pixels
}


@pytest.mark.parametrize(
    ("scale", "planarity", "tolerance"),
    [
        ([1, 1, 0], 1, 0.05),  # a square sheet
        ([2, 1, 0], 0.5, 0.03),  # a sheet that is twice as long as wide
        ([1, 1, 1], 0, 0.05),  # a cube
        ([1, 0.01, 0.01], 0, 0.02),  # a line
    ],
)
def test_planarity_tells_sheets_from_cubes_and_lines(
    scale: list[float], planarity: float, tolerance: float
) -> None:
    assert compute_planarity(CUBE * scale) == pytest.approx(planarity, abs=tolerance)


def test_planarity_of_one_point_is_zero() -> None:
    assert compute_planarity(np.ones((8, 3))) == 0.0


def test_stability_tells_many_points_from_few_and_stray_ones() -> None:
    """Half of few points, or the half without a stray point, has another box than all points."""
    rng = np.random.default_rng(0)
    fit = partial(fit_box, up=np.array([0.0, -1.0, 0.0]), support_height=-0.1)
    center = np.array([0.0, 0, 1.0])  # of a cube with sides of 0.2 m
    dense = center + rng.uniform(-0.1, 0.1, (2000, 3))
    sparse = center + rng.uniform(-0.1, 0.1, (10, 3))
    stray_point = center + np.array([0.5, 0, 0.3])
    stray = np.concatenate([dense[:200], stray_point[None]])

    dense_stability = compute_stability(dense, fit(dense), fit)
    sparse_stability = compute_stability(sparse, fit(sparse), fit)
    stray_stability = compute_stability(stray, fit(stray), fit)

    assert dense_stability > 0.97
    assert sparse_stability >= 0
    assert sparse_stability < dense_stability - 0.1
    assert stray_stability >= 0
    assert stray_stability < dense_stability - 0.1


def test_stability_is_the_same_each_time() -> None:
    points = np.random.default_rng(0).uniform(-0.1, 0.1, (10, 3)) + np.array([0.0, 0, 1.0])

    stabilities = {compute_stability(points, fit_box(points), fit_box) for _ in range(2)}

    assert len(stabilities) == 1


@pytest.fixture(scope="module")
def label() -> LabeledImage:
    """The label of an image of all `BLOCKS`, with true masks and depth."""
    (label,) = label_with_ground_truth([render_blocks(list(BLOCKS.values()), list(BLOCKS))])
    return label


def test_all_objects_stay_in_the_label_with_their_scores(label: LabeledImage) -> None:
    assert [o.name for o in label.objects] == list(BLOCKS)
    for o in label.objects:
        if o.box3d is not None:
            assert {"visible", "edge", "points", "planarity", "stability"} <= set(o.scores)


def test_covered_cut_and_small_objects_are_excluded(label: LabeledImage) -> None:
    reasons = dict(zip(BLOCKS, find_exclusion_reasons(label), strict=True))

    assert reasons["can"] == ()
    assert reasons["box"] == ()
    assert "visible" in reasons["cup"]
    assert "edge" in reasons["bowl"]
    # The pea has too few points for questions, or even for a box.
    assert reasons["pea"] in (("points",), ("no box",))
    assert [o.name for o in find_askable_objects(label)] == ["can", "box"]


def test_questions_are_about_askable_objects_only(label: LabeledImage) -> None:
    rng = np.random.default_rng(0)

    names = set[str]()
    for _ in range(30):
        for question in generate_questions(label, rng):
            names.update(question.objects)

    assert names == {"can", "box"}


def test_ambiguous_names_missing_boxes_and_centers_outside_are_reasons() -> None:
    can_block = (np.array([0.0, 0, 0.04]), np.array([0.08, 0.08, 0.08]), 0.3)
    (label,) = label_with_ground_truth([render_blocks([can_block], ["can"])])
    (can,) = label.objects
    second_can = replace(can, name="Can 2")
    mug = replace(can, name="mug", box3d=None)
    box_outside = replace(can.box3d, center=np.array([9.0, 0, 1]))  # 9 m to the right, 1 m away
    bottle = replace(can, name="bottle", box3d=box_outside)

    reasons = find_exclusion_reasons(replace(label, objects=[can, second_can, mug, bottle]))

    assert reasons == [("ambiguous",), ("ambiguous",), ("no box",), ("outside",)]
