"""What happened to the external camera's pictures is undone before a SPEAR-VLM looks at them."""

import numpy as np
import pytest

from made_rollouts import (
    change_external,
    change_pictures,
    exchange_cameras,
    make_case,
    make_picture_case,
)
from spear.checks.rollout.episode import RecordedEpisode
from spear.diagnose.picture_repair import choose_repair_of_external_pictures
from spear.types import Array

EXACT = [
    "mirrored left to right",
    "mirrored upside down",
    "turned by 180°",
    "with red and blue exchanged",
]
"""Versions in which no pixel is lost."""


def read_first_picture(episode: RecordedEpisode, camera: str = "external") -> Array:
    return episode.pictures[camera].small[0]


@pytest.mark.parametrize("version", EXACT)
def test_pictures_that_lost_nothing_are_restored_exactly(version: str) -> None:
    plain = read_first_picture(make_case().rollout[0])
    case = make_picture_case(change_external(version))

    restored = choose_repair_of_external_pictures(case).apply(read_first_picture(case.rollout[0]))

    np.testing.assert_array_equal(restored, plain)


def test_dark_pictures_are_brightened() -> None:
    plain = read_first_picture(make_case().rollout[0])
    case = make_picture_case(change_external("exposed for half as long"))

    restored = choose_repair_of_external_pictures(case).apply(read_first_picture(case.rollout[0]))

    np.testing.assert_allclose(restored, plain, atol=1.01)  # halved gray levels are rounded


def test_the_external_pictures_are_read_from_the_camera_that_has_them() -> None:
    repair = choose_repair_of_external_pictures(make_picture_case(exchange_cameras))

    assert repair.camera == "wrist"
    assert not repair.changes


def test_bars_are_cut_off() -> None:
    def add_bars(small: Array) -> Array:
        barred = np.zeros_like(small)
        barred[:, 4:-4] = small[:, 4:-4]
        return barred

    case = make_picture_case(lambda episode: change_pictures(episode, "external", add_bars))
    picture = read_first_picture(case.rollout[0])

    restored = choose_repair_of_external_pictures(case).apply(picture)

    np.testing.assert_array_equal(restored, picture[4:-4])


@pytest.mark.parametrize("version", ["plain", "cropped to 60 %"])
def test_other_pictures_stay_as_they_are(version: str) -> None:
    """A crop cannot be undone."""
    case = make_picture_case(change_external(version))
    picture = read_first_picture(case.rollout[0])

    restored = choose_repair_of_external_pictures(case).apply(picture)

    np.testing.assert_array_equal(restored, picture)
