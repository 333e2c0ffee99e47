"""Scores of labelled objects mean what they say, and one rule says who is asked about."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from labels_scenes import TRUTH, render
from spear.labels.fit.box3d import fit_box
from spear.labels.fit.quality import compute_planarity, compute_stability
from spear.labels.pipeline import label_images
from spear.labels.questions.generate import (
    find_askable_objects,
    find_exclusion_reasons,
    generate_questions,
)


def test_planarity_of_a_sheet_a_ball_and_a_line() -> None:
    cube = np.random.default_rng(0).uniform(-1, 1, (4000, 3))
    assert compute_planarity(cube * [1, 1, 0]) == pytest.approx(1, abs=0.05)
    assert (
        compute_planarity(cube) == pytest.approx(0, abs=0.05)
        and compute_planarity(cube * [1, 0.01, 0.01]) < 0.02
    )
    assert (
        compute_planarity(cube * [2, 1, 0]) == pytest.approx(0.5, abs=0.03)
        and compute_planarity(np.ones((8, 3))) == 0.0
    )


def test_stability_tells_many_points_from_few_and_stray_ones() -> None:
    rng = np.random.default_rng(0)
    fit = partial(fit_box, up=np.array([0.0, -1.0, 0.0]), support=-0.1)
    corner = np.array([0.0, 0, 1.0])
    dense = corner + rng.uniform(-0.1, 0.1, (2000, 3))
    sparse = corner + rng.uniform(-0.1, 0.1, (10, 3))
    stray = np.concatenate([dense[:200], corner[None] + np.array([0.5, 0, 0.3])])
    values = [compute_stability(p, fit(p), fit) for p in (dense, stray, sparse)]
    assert values[0] > 0.97 > values[0] - 0.1 > max(values[1:]) and min(values) >= 0
    assert values == [compute_stability(p, fit(p), fit) for p in (dense, stray, sparse)]


def test_objects_under_the_bar_stay_but_are_not_asked_about() -> None:
    size = np.array([0.06, 0.06, 0.08])
    things = {
        "can": (np.array([0.1, -0.1, 0.04]), size, 0.3),
        "cup": (np.array([0.06, 0.1, 0.04]), size, 0.0),
        "box": (np.array([-0.04, 0.1, 0.06]), np.array([0.04, 0.1, 0.12]), 0.0),
        "bowl": (np.array([-0.1, -0.385, 0.04]), size, 0.0),
        "pea": (np.array([0.2, 0.02, 0.01]), np.array([0.015, 0.02, 0.02]), 0.0),
    }
    (image,) = label_images([render(list(things.values()), list(things))], *TRUTH)
    assert [o.name for o in image.objects] == list(things)
    every = {"visible", "edge", "points", "planarity", "stability"}
    assert all(every <= set(o.scores) for o in image.objects if o.box3d)
    reasons = dict(zip(things, find_exclusion_reasons(image), strict=True))
    assert reasons["can"] == reasons["box"] == ()
    assert "visible" in reasons["cup"] and "edge" in reasons["bowl"]
    assert reasons["pea"] in (("points",), ("no box",)) and [
        o.name for o in find_askable_objects(image)
    ] == [
        "can",
        "box",
    ]
    rng = np.random.default_rng(0)
    assert {
        name for _ in range(30) for q in generate_questions(image, rng) for name in q.objects
    } == {
        "can",
        "box",
    }


def test_every_reason_is_given() -> None:
    (image,) = label_images(
        [render([(np.array([0.0, 0, 0.04]), np.array([0.08] * 3), 0.3)], ["can"])], *TRUTH
    )
    (can,) = image.objects
    outside = replace(can, name="bottle", box3d=replace(can.box3d, center=np.array([9.0, 0, 1])))
    objects = [can, replace(can, name="Can 2"), replace(can, name="mug", box3d=None), outside]
    reasons = [("ambiguous",), ("ambiguous",), ("no box",), ("outside",)]
    assert find_exclusion_reasons(replace(image, objects=objects)) == reasons
