"""What happened to the external camera's pictures is undone before a SPEAR-VLM looks at them."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from made_rollouts import change_pictures, make_case
from spear.checks.rollout.case import Case
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.pictures import COLOR_VERSIONS, SHAPE_VERSIONS, PictureReferences
from spear.diagnose.picture_repair import find_picture_repair
from spear.types import Array

VERSIONS = {**SHAPE_VERSIONS, **COLOR_VERSIONS}
EXACT = [
    "mirrored left to right",
    "mirrored upside down",
    "turned by 180°",
    "with red and blue exchanged",
]
"""Versions in which no pixel is lost."""


@cache
def learn_pictures() -> PictureReferences:
    """What the pictures of the demonstrations say. It is computed once for all tests."""
    return PictureReferences(make_case().demonstrations)


def make_picture_case(change: Callable[[RecordedEpisode], RecordedEpisode]) -> Case:
    """Make a case whose rollout has changed pictures."""
    references = learn_pictures()
    rollout = make_case(change=change).rollout
    return Case(rollout, references.demonstrations, references=references)


def make_changed_case(version: str) -> Case:
    """Make a case whose rollout has pictures of the external camera in a version."""
    return make_picture_case(
        lambda episode: change_pictures(
            episode, "external", lambda small: VERSIONS[version](small.astype(np.float32))
        )
    )


def read_first_picture(episode: RecordedEpisode, camera: str = "external") -> Array:
    return episode.pictures[camera].small[0]


@pytest.mark.parametrize("version", EXACT)
def test_pictures_that_lost_nothing_are_restored_exactly(version: str) -> None:
    plain = read_first_picture(make_case().rollout[0])
    case = make_changed_case(version)

    restored = find_picture_repair(case).apply(read_first_picture(case.rollout[0]))

    np.testing.assert_array_equal(restored, plain)


def test_dark_pictures_are_brightened() -> None:
    plain = read_first_picture(make_case().rollout[0])
    case = make_changed_case("exposed for half as long")

    restored = find_picture_repair(case).apply(read_first_picture(case.rollout[0]))

    np.testing.assert_allclose(restored, plain, atol=1.01)  # halved gray levels are rounded


def test_the_external_pictures_are_read_from_the_camera_that_has_them() -> None:
    def exchange(episode: RecordedEpisode) -> RecordedEpisode:
        external = episode.pictures["external"]
        wrist = episode.pictures["wrist"]
        return replace(episode, pictures={"external": wrist, "wrist": external})

    repair = find_picture_repair(make_picture_case(exchange))

    assert repair.camera == "wrist"
    assert not repair.changes


def test_bars_are_cut_off() -> None:
    def add_bars(small: Array) -> Array:
        barred = np.zeros_like(small)
        barred[:, 4:-4] = small[:, 4:-4]
        return barred

    case = make_picture_case(lambda episode: change_pictures(episode, "external", add_bars))
    picture = read_first_picture(case.rollout[0])

    restored = find_picture_repair(case).apply(picture)

    np.testing.assert_array_equal(restored, picture[4:-4])


@pytest.mark.parametrize("version", ["plain", "cropped to 60 %"])
def test_other_pictures_stay_as_they_are(version: str) -> None:
    """A crop cannot be undone."""
    case = make_changed_case(version)
    picture = read_first_picture(case.rollout[0])

    restored = find_picture_repair(case).apply(picture)

    np.testing.assert_array_equal(restored, picture)
