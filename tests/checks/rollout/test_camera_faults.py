"""What happened to a camera's pictures is recognized by those of training."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from made_rollouts import change_pictures, make_case
from spear.checks.rollout import pictures as picture_versions
from spear.checks.rollout.camera_bgr import CameraBgrCheck
from spear.checks.rollout.camera_cropped import CameraCroppedCheck
from spear.checks.rollout.camera_exposure import CameraExposureCheck
from spear.checks.rollout.camera_frozen import CameraFrozenCheck
from spear.checks.rollout.camera_mirrored import CameraMirroredCheck
from spear.checks.rollout.camera_missing import CameraMissingCheck
from spear.checks.rollout.camera_stretched import CameraStretchedCheck
from spear.checks.rollout.camera_turned import CameraTurnedCheck
from spear.checks.rollout.cameras_exchanged import CamerasExchangedCheck
from spear.checks.rollout.case import Finding, RolloutCheck
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.padding_bars import PaddingBarsCheck
from spear.types import Array

CHECKS: tuple[RolloutCheck, ...] = (
    CamerasExchangedCheck(),
    CameraMirroredCheck(),
    CameraTurnedCheck(),
    CameraCroppedCheck(),
    CameraStretchedCheck(),
    CameraBgrCheck(),
    CameraExposureCheck(),
    CameraFrozenCheck(),
    CameraMissingCheck(),
    PaddingBarsCheck(),
)


def change_external(version: str) -> Callable[[RecordedEpisode], RecordedEpisode]:
    """Change the pictures of the external camera to a version."""
    versions = {**picture_versions.SHAPE_VERSIONS, **picture_versions.COLOR_VERSIONS}
    transform = versions[version]
    return lambda episode: change_pictures(
        episode, "external", lambda small: transform(small.astype(np.float32))
    )


def exchange(episode: RecordedEpisode) -> RecordedEpisode:
    """Exchange the two cameras."""
    external = episode.pictures["external"]
    wrist = episode.pictures["wrist"]
    return replace(episode, pictures={"external": wrist, "wrist": external})


def freeze(episode: RecordedEpisode) -> RecordedEpisode:
    """Send the first picture again and again."""
    external = episode.pictures["external"]
    first = np.zeros(len(episode), int)
    frozen = replace(external, small=external.small[first], fingerprint=first)
    return replace(episode, pictures={**episode.pictures, "external": frozen})


def remove_wrist(episode: RecordedEpisode) -> RecordedEpisode:
    """Send no pictures of the wrist camera."""
    return replace(episode, pictures={"external": episode.pictures["external"]})


def add_bars(episode: RecordedEpisode) -> RecordedEpisode:
    """Add black bars at top and bottom."""

    def blacken(small: Array) -> Array:
        barred = small.copy()
        barred[:, :3] = 0
        barred[:, -3:] = 0
        return barred

    return change_pictures(episode, "external", blacken)


PLANTED = {
    "cameras-exchanged": exchange,
    "camera-mirrored": change_external("mirrored left to right"),
    "camera-turned": change_external("turned by 180°"),
    "camera-cropped": change_external("cropped to 60 %"),
    "camera-stretched": change_external("stretched in width"),
    "camera-bgr": change_external("with red and blue exchanged"),
    "camera-exposure": change_external("exposed for half as long"),
    "camera-frozen": freeze,
    "camera-missing": remove_wrist,
    "padding-bars": add_bars,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_and_no_other_one_is_surer(fault: str) -> None:
    case = make_case(change=PLANTED[fault], num_demonstrations=16)

    findings = {}
    for check in CHECKS:
        result = check.examine(case)
        if isinstance(result, Finding):
            findings[check.fault] = (result.confidence, check)

    assert fault in findings
    confidence, check = findings[fault]
    unexplained = set(findings) - {fault} - set(check.causes)
    assert all(findings[fault][0] < confidence for fault in unexplained)


def test_pictures_like_those_of_training_have_no_fault() -> None:
    case = make_case(num_demonstrations=16)

    for check in CHECKS:
        assert check.examine(case) is None, check.fault
