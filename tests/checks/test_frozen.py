"""A picture that stays the very same over a motion of the arm is frozen."""

import numpy as np

from spear.checks.frozen import RepeatedPicture, mark_frozen_steps

POSITIONS = np.array([[0.4 + 0.03 * step, 0.0, 0.2] for step in range(6)])
"""[6, 3] of an arm that moves 3 cm per step."""


def test_the_distance_is_that_since_the_picture_first_came() -> None:
    camera = RepeatedPicture()

    distances_m = [
        camera.add_step_and_measure_motion_m(picture, p)
        for picture, p in zip("aabbba", POSITIONS, strict=True)
    ]

    np.testing.assert_allclose(distances_m, [0, 0.03, 0, 0.03, 0.06, 0], atol=1e-9)


def test_a_picture_is_frozen_from_five_centimeters_on() -> None:
    is_frozen = mark_frozen_steps("aaabbb", POSITIONS)

    assert is_frozen.tolist() == [False, False, True, False, False, True]


def test_a_camera_that_repeats_its_picture_at_rest_is_not_frozen() -> None:
    assert not mark_frozen_steps("aaaaaa", np.zeros((6, 3))).any()
