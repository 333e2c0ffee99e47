"""A model's answer is drawn on its image if it has a place there."""

from dataclasses import replace

import numpy as np
import pytest

from refusals import refuses
from spear.labels.questions.types import QUESTION_TYPE_BY_NAME
from spear.report import draw

IMAGE = np.zeros((40, 60, 3), np.uint8)
INTRINSICS = np.array([[50, 0, 30], [0, 50, 20], [0, 0, 1.0]])
POINT = [0.0, 0.0, 0.5]  # m, in the middle of the image


def test_a_point_is_drawn_where_it_is() -> None:
    drawing = draw.draw_answer_enlarged(POINT, IMAGE, INTRINSICS, "keypoint")

    rows, columns = np.nonzero(drawing.any(axis=-1))
    middle = np.array([20, 30]) * draw.ANSWER_SCALE
    np.testing.assert_allclose([rows.mean(), columns.mean()], middle, atol=1)


def test_a_displacement_is_refused_whatever_its_type_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied_type = replace(QUESTION_TYPE_BY_NAME["offset"])
    monkeypatch.setattr(draw, "QUESTION_TYPE_BY_NAME", {"push": copied_type})

    refuses(
        "no box, point or image location",
        draw.draw_answer_enlarged,
        POINT,
        IMAGE,
        INTRINSICS,
        "push",
    )
