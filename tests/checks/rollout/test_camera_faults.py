"""What happened to a camera's pictures is recognized by those of training."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from made_rollouts import (
    change_external,
    change_pictures,
    exchange_cameras,
    learn_pictures,
    make_case,
    make_picture_case,
)
from spear.checks.rollout import pictures as picture_versions
from spear.checks.rollout.camera_bgr import CameraBgrCheck
from spear.checks.rollout.camera_cropped import CameraCroppedCheck
from spear.checks.rollout.camera_exposure import CameraExposureCheck
from spear.checks.rollout.camera_frozen import CameraFrozenCheck
from spear.checks.rollout.camera_late import CameraLateCheck
from spear.checks.rollout.camera_mirrored import CameraMirroredCheck
from spear.checks.rollout.camera_missing import CameraMissingCheck
from spear.checks.rollout.camera_stretched import CameraStretchedCheck
from spear.checks.rollout.camera_turned import CameraTurnedCheck
from spear.checks.rollout.cameras_exchanged import CamerasExchangedCheck
from spear.checks.rollout.case import Case, Finding, RolloutCheck
from spear.checks.rollout.episode import RecordedEpisode
from spear.checks.rollout.odds import PRIOR, VersionOdds
from spear.checks.rollout.padding_bars import PaddingBarsCheck
from spear.checks.rollout.picture_versions import SHAPE_VERSIONS
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
    CameraLateCheck(),
    CameraMissingCheck(),
    PaddingBarsCheck(),
)


def freeze(episode: RecordedEpisode) -> RecordedEpisode:
    """Send the first picture again and again."""
    external = episode.pictures["external"]
    first = np.zeros(len(episode), int)  # step → index of the picture that is sent
    frozen = replace(external, small=external.small[first], fingerprint=first)
    return replace(episode, pictures={**episode.pictures, "external": frozen})


def delay(episode: RecordedEpisode) -> RecordedEpisode:
    """Send the pictures of three steps ago."""
    external = episode.pictures["external"]
    # Step → index of the picture that is sent; the first one until there are older ones.
    steps = np.maximum(np.arange(len(episode)) - 3, 0)
    late = replace(external, small=external.small[steps], fingerprint=steps)
    return replace(episode, pictures={**episode.pictures, "external": late})


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
    "cameras-exchanged": exchange_cameras,
    "camera-mirrored": change_external("mirrored left to right"),
    "camera-turned": change_external("turned by 180°"),
    "camera-cropped": change_external("cropped to 60 %"),
    "camera-stretched": change_external("stretched in width"),
    "camera-bgr": change_external("with red and blue exchanged"),
    "camera-exposure": change_external("exposed for half as long"),
    "camera-frozen": freeze,
    "camera-late": delay,
    "camera-missing": remove_wrist,
    "padding-bars": add_bars,
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_and_no_other_one_is_surer(fault: str) -> None:
    case = make_picture_case(PLANTED[fault])

    findings = {}
    for check in CHECKS:
        result = check.examine(case)
        if isinstance(result, Finding):
            findings[check.fault] = (result.confidence, check)

    assert fault in findings
    confidence, check = findings[fault]
    unexplained = set(findings) - {fault} - set(check.causes)
    assert all(findings[fault][0] < confidence for fault in unexplained)


@pytest.mark.parametrize("axis", ["width", "height"])
def test_a_wider_picture_that_is_squeezed_is_stretched(axis: str) -> None:
    case = make_picture_case(change_external(f"squeezed in {axis}"))

    result = CameraStretchedCheck().examine(case)

    assert isinstance(result, Finding)
    assert f"squeezed in {axis}" in result.evidence


def test_pictures_like_those_of_training_have_no_fault() -> None:
    case = make_picture_case()

    for check in CHECKS:
        assert check.examine(case) is None, check.fault


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("corners", ["", ", with black corners"])
def test_a_camera_that_is_turned_by_a_small_angle_is_turned(side: str, corners: str) -> None:
    version = f"turned by 20° to the {side}{corners}"
    case = make_picture_case(change_external(version))

    result = CameraTurnedCheck().examine(case)

    assert isinstance(result, Finding)
    assert f"turned by 20° to the {side}" in result.evidence


def cut_to_ten_steps(episode: RecordedEpisode) -> RecordedEpisode:
    """Keep the first ten steps of an episode, without times."""
    pictures = {}
    for camera, recorded in episode.pictures.items():
        pictures[camera] = replace(
            recorded, small=recorded.small[:10], fingerprint=recorded.fingerprint[:10]
        )
    return replace(
        episode,
        position=episode.position[:10],
        rotation=episode.rotation[:10],
        opening=episode.opening[:10],
        action=episode.action[:10],
        is_known=episode.is_known[:10],
        pictures=pictures,
        served=None,
    )


def make_short_case(change: Callable[[RecordedEpisode], RecordedEpisode]) -> Case:
    """Make a case whose episodes, of the rollout and of training, have ten steps."""
    case = make_case(num_demonstrations=16)
    rollout = [change(cut_to_ten_steps(episode)) for episode in case.rollout]
    return Case(rollout, [cut_to_ten_steps(episode) for episode in case.demonstrations])


def test_a_late_camera_is_recognized_in_short_episodes_and_not_called_frozen() -> None:
    case = make_short_case(delay)

    late = CameraLateCheck().examine(case)
    frozen = CameraFrozenCheck().examine(case)

    assert isinstance(late, Finding)
    assert frozen is None


def stop_at_the_end(episode: RecordedEpisode) -> RecordedEpisode:
    """Repeat the last picture but one of the external camera."""
    external = episode.pictures["external"]
    steps = np.minimum(np.arange(len(episode)), len(episode) - 2)
    stopped = replace(external, small=external.small[steps], fingerprint=steps)
    return replace(episode, pictures={**episode.pictures, "external": stopped})


def test_a_camera_that_stops_just_before_each_episode_ends_is_frozen() -> None:
    result = CameraFrozenCheck().examine(make_short_case(stop_at_the_end))

    assert isinstance(result, Finding)
    assert "at the end of 6 of 6 episodes" in result.evidence


def repeat_first_picture_of_wrist(episode: RecordedEpisode) -> RecordedEpisode:
    """Send the wrist's pictures of the step before; the arm does not move in these pictures."""
    wrist = episode.pictures["wrist"]
    steps = np.maximum(np.arange(len(episode)) - 1, 0)
    late = replace(wrist, small=wrist.small[steps], fingerprint=steps)
    return replace(episode, pictures={**episode.pictures, "wrist": late})


def test_a_late_camera_is_recognized_by_its_first_picture_if_its_changes_say_nothing() -> None:
    result = CameraLateCheck().examine(make_case(change=repeat_first_picture_of_wrist))

    assert isinstance(result, Finding)
    assert "camera wrist" in result.evidence
    assert "the first picture comes twice" in result.evidence


def add_bars_of_a_square_camera(episode: RecordedEpisode) -> RecordedEpisode:
    """Show the external pictures [24, 32] as those of a square camera, between black bars."""
    external = episode.pictures["external"]
    small = external.small.copy()
    small[:, :, :4] = 0
    small[:, :, -4:] = 0
    square = replace(external, small=small, size=(240, 240))
    return replace(episode, pictures={**episode.pictures, "external": square})


def crop_square(episode: RecordedEpisode) -> RecordedEpisode:
    """Crop the pictures of a square camera before they get their bars."""

    def crop(small: Array) -> Array:
        cropped = small.copy()
        content = small[:, :, 4:-4].astype(np.float32)
        cropped[:, :, 4:-4] = SHAPE_VERSIONS["cropped to 80 %"](content)
        return cropped

    return change_pictures(episode, "external", crop)


@pytest.mark.parametrize("is_cropped", [False, True])
def test_a_cropped_camera_keeps_the_bars_of_its_aspect(is_cropped: bool) -> None:
    case = make_case(num_demonstrations=16)
    demonstrations = [add_bars_of_a_square_camera(episode) for episode in case.demonstrations]
    rollout = [add_bars_of_a_square_camera(episode) for episode in case.rollout]
    if is_cropped:
        rollout = [crop_square(episode) for episode in rollout]

    result = CameraCroppedCheck().examine(Case(rollout, demonstrations))

    assert isinstance(result, Finding) == is_cropped


def show_workplace(episode: RecordedEpisode, workplace: int) -> RecordedEpisode:
    """Show one of some workplaces in the external camera, with objects of the episode's own."""
    rng = make_rng_of(episode)
    block = np.ones((4, 4, 1))  # px
    table = np.kron(np.random.default_rng(workplace).uniform(60, 190, (6, 8, 3)), block)
    objects = np.kron(rng.uniform(-20, 20, (6, 8, 3)), block)

    def draw(small: Array) -> Array:
        return table + objects + rng.normal(0, 5, small.shape)

    return change_pictures(episode, "external", draw)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_few_demonstrations_at_two_workplaces_show_a_mirrored_camera(is_mirrored: bool) -> None:
    """Each half of the demonstrations is of one workplace, and so says nothing of the other."""
    case = make_case(num_demonstrations=12)
    demonstrations = [
        show_workplace(episode, index % 2) for index, episode in enumerate(case.demonstrations)
    ]
    rollout = [show_workplace(episode, 1) for episode in case.rollout]
    if is_mirrored:
        rollout = [change_pictures(e, "external", lambda small: small[:, :, ::-1]) for e in rollout]

    result = CameraMirroredCheck().examine(Case(rollout, demonstrations))

    assert isinstance(result, Finding) == is_mirrored


def test_no_other_camera_fault_is_found_in_black_pictures() -> None:
    case = make_picture_case(partial(change_pictures, camera="external", transform=np.zeros_like))

    faults = {check.fault for check in CHECKS if isinstance(check.examine(case), Finding)}

    assert "camera-missing" in faults
    assert faults <= {"camera-missing", *CameraMissingCheck.causes}


def make_rng_of(episode: RecordedEpisode) -> np.random.Generator:
    """Make a generator of random numbers that differs between episodes, by their first x."""
    return np.random.default_rng(int(1e6 * episode.position[0, 0]))


def show_own_table(episode: RecordedEpisode) -> RecordedEpisode:
    """Show a table of the episode's own pattern, which moves through the wrist's pictures.

    The table has 240 x 240 pixels, and 1 cm on it is 1 pixel. Pictures have 24 x 32 pixels.
    """
    rng = make_rng_of(episode)
    table = np.kron(rng.uniform(40, 200, (60, 60)), np.ones((4, 4)))
    for axis in (0, 1):  # smooth the pattern
        table = (np.roll(table, 2, axis) + table + np.roll(table, -2, axis)) / 3
    # The upper left corner of each picture on the table, [T, 2]
    corners = np.rint(100 + 100 * (episode.position[:, :2] - [0.4, 0.0])).astype(int)
    corners = np.clip(corners, 0, 200)
    views = [table[row : row + 24, column : column + 32] for row, column in corners]
    small = np.repeat(np.stack(views)[..., None], 3, axis=-1).astype(np.uint8)
    return change_pictures(episode, "wrist", lambda before: small)


def keep_orientation(episode: RecordedEpisode) -> RecordedEpisode:
    """Report one orientation in all steps."""
    rotation = np.tile([1.0, 0.0, 0.0, 0.0], (len(episode), 1))
    return replace(episode, rotation=rotation)


@pytest.mark.parametrize("is_mirrored", [False, True])
def test_a_mirrored_camera_is_recognized_by_how_its_pictures_move(is_mirrored: bool) -> None:
    case = make_case(num_demonstrations=16)
    demonstrations = [show_own_table(keep_orientation(e)) for e in case.demonstrations]
    rollout = [show_own_table(keep_orientation(e)) for e in case.rollout]
    if is_mirrored:
        rollout = [change_pictures(e, "wrist", lambda small: small[:, :, ::-1]) for e in rollout]

    result = CameraMirroredCheck().examine(Case(rollout, demonstrations))

    assert isinstance(result, Finding) == is_mirrored
    if isinstance(result, Finding):
        assert "camera wrist" in result.evidence
        assert "left to right" in result.evidence


def warm(episode: RecordedEpisode) -> RecordedEpisode:
    """Give both cameras the same color cast, another one in each episode."""
    warmth = make_rng_of(episode).normal(0, 40)  # red minus blue, gray levels
    cast = np.array([warmth / 2, 0, -warmth / 2])
    for camera in ("external", "wrist"):
        # A gray scene shows the cast only.
        episode = change_pictures(
            episode, camera, lambda small: np.clip(small.mean(-1, keepdims=True) + cast, 0, 255)
        )
    return episode


@pytest.mark.parametrize("is_exchanged", [False, True])
def test_a_camera_whose_colors_contradict_another_camera_sends_bgr(is_exchanged: bool) -> None:
    case = make_case(num_demonstrations=16)
    demonstrations = [warm(episode) for episode in case.demonstrations]
    rollout = [warm(episode) for episode in case.rollout]
    if is_exchanged:
        rollout = [change_pictures(e, "wrist", lambda small: small[..., ::-1]) for e in rollout]

    result = CameraBgrCheck().examine(Case(rollout, demonstrations))

    assert isinstance(result, Finding) == is_exchanged
    if isinstance(result, Finding):
        assert "different colors of the same scene" in result.evidence


def make_odds(log_ratio: float, version: str = "with red and blue exchanged") -> list[VersionOdds]:
    """Odds of a version; log_ratio: how much likelier it is than plain pictures."""
    log_odds = log_ratio + float(np.log(PRIOR))
    return [VersionOdds(version, log_odds, log_ratio, 1.0, 2.0, -2.0)]


@pytest.mark.parametrize(
    ("of_external", "of_wrist", "is_likely"),
    [
        (2.9, 3.2, True),  # 18 and 25 times as likely; a prior of 1/50 counts once
        (2.9, 1.8, False),  # not surely the same in both
        (2.9, -1.0, False),
    ],
)
def test_colors_may_be_exchanged_in_both_cameras(
    of_external: float, of_wrist: float, is_likely: bool
) -> None:
    references = learn_pictures()
    comparison = picture_versions.PictureComparison(
        make_case().rollout,
        references,
        {("external", "color"): make_odds(of_external), ("wrist", "color"): make_odds(of_wrist)},
    )

    best = comparison.find_best_color_version("external")

    assert (best is not None) == is_likely
    if best is not None:
        assert best.log_ratio == pytest.approx(of_external + of_wrist)


@pytest.mark.parametrize(
    ("by_pictures", "by_motion", "is_likely"),
    [
        (8.0, -1.0, True),
        (3.0, 3.0, True),
        (-10.0, 5.0, False),  # a blocked arm moves otherwise than in training
        (0.0, 5.0, True),  # symmetric pictures
    ],
)
def test_single_pictures_and_their_motion_both_count_for_a_turned_camera(
    by_pictures: float, by_motion: float, is_likely: bool
) -> None:
    turned = "turned by 180°"
    comparison = picture_versions.PictureComparison(
        make_case().rollout,
        learn_pictures(),
        {
            ("wrist", "shape"): make_odds(by_pictures, turned),
            ("wrist", "flow"): make_odds(by_motion, turned),
        },
    )

    best = comparison.find_best_shape_version("wrist")

    assert (best is not None) == is_likely


def test_motion_tells_a_mirrored_camera_from_a_turned_one() -> None:
    """Single pictures fit both equally well."""
    turned = "turned by 180°"
    mirrored = "mirrored upside down"
    comparison = picture_versions.PictureComparison(
        make_case().rollout,
        learn_pictures(),
        {
            ("wrist", "shape"): make_odds(11.4, mirrored) + make_odds(11.3, turned),
            ("wrist", "flow"): make_odds(2.5, mirrored) + make_odds(-1.9, turned),
        },
    )

    best = comparison.find_best_shape_version("wrist")

    assert best is not None
    assert best.version == mirrored


@pytest.mark.parametrize("have_both_bars", [False, True])
def test_exchanged_cameras_have_bars_in_both_or_in_none(have_both_bars: bool) -> None:
    def exchange_with_bars(episode: RecordedEpisode) -> RecordedEpisode:
        exchanged = add_bars(exchange_cameras(episode))
        if have_both_bars:
            exchanged = add_bars(exchange_cameras(exchanged))
            exchanged = exchange_cameras(exchanged)
        return exchanged

    case = make_picture_case(exchange_with_bars)

    result = CamerasExchangedCheck().examine(case)

    assert isinstance(result, Finding) == have_both_bars
