"""One question about one image: what is said of the answer."""

from __future__ import annotations

import numpy as np
import pytest

from spear.evaluate.vqa.ask import words
from spear.policy import Answer
from spear.report.draw import draw_answer
from spear.types import Pixel, Unit

PICTURE = np.zeros((60, 80, 3), np.uint8)


@pytest.mark.parametrize(("unit", "said"), [("metre", "m"), ("relative", "units")])
def test_numbers_are_said_in_the_unit_of_the_model(unit: Unit, said: str) -> None:
    assert words(Answer(["the mug is ", 0.41251, " away"], unit), PICTURE) == f"the mug is 0.413 {said} away"
    box = words(Answer([0.25] * 24, unit), PICTURE).splitlines()
    assert box[0] == f"centre (+0.250, +0.250, +0.250) {said}; vertices:" and len(box) == 9


def test_places_are_said_in_pixels_and_drawn() -> None:
    answer = Answer([Pixel(0.5, 0.25)], "metre")
    assert words(answer, PICTURE) == "(40, 15) px"
    assert draw_answer(answer.segments, PICTURE, None).any()
    assert words(Answer([], "metre"), PICTURE) == "(no answer)"
