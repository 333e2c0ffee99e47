"""Cameras that are exchanged, blank or slow are told apart."""

import numpy as np

from refusals import refuses
from spear.checks.cameras import View, are_blank, judge_camera_exchange, summarize_view
from spear.util.images import encode_jpeg

NUM_STEPS = 8
RATE_HZ = 5.0


def make_positions(num_steps: int) -> np.ndarray:
    """Positions [num_steps, 3] (m) of an arm that moves 3 cm along each axis in every step."""
    return np.arange(3.0 * num_steps).reshape(num_steps, 3) / 100


def make_background() -> np.ndarray:
    """An image of random colors, always the same."""
    return np.random.default_rng(0).integers(0, 255, (60, 80, 3)).astype(np.uint8)


def summarize_external_view() -> View:
    """Summarize images in which an arm, a black rectangle, moves before a background that stays."""
    images = []
    for step in range(NUM_STEPS):
        image = make_background()
        image[10:20, 5 * step : 5 * step + 20] = 0
        images.append(encode_jpeg(image))
    return summarize_view(images, make_positions(NUM_STEPS), RATE_HZ, "made")


def summarize_wrist_view() -> View:
    """Summarize images in which everything moves by 9 pixels per step."""
    images = [
        encode_jpeg(np.roll(make_background(), 9 * step, axis=1)) for step in range(NUM_STEPS)
    ]
    return summarize_view(images, make_positions(NUM_STEPS), RATE_HZ, "made")


def test_a_wrist_view_changes_more_than_an_external_one() -> None:
    external = summarize_external_view()
    wrist = summarize_wrist_view()

    assert external.changing_share < 0.2 < wrist.changing_share
    assert not external.is_blank
    assert not wrist.is_blank


def test_cameras_in_their_places_agree() -> None:
    check = judge_camera_exchange(
        external_views=[summarize_external_view()] * 6, wrist_views=[summarize_wrist_view()] * 6
    )

    assert check is not None
    assert check.verdict == "agrees"


def test_exchanged_cameras_are_wrong() -> None:
    check = judge_camera_exchange(
        external_views=[summarize_wrist_view()] * 6, wrist_views=[summarize_external_view()] * 6
    )

    assert check is not None
    assert check.verdict == "wrong"
    assert "exchange" in check.words


def test_another_number_of_images_than_steps_is_refused() -> None:
    images = [encode_jpeg(make_background())] * (NUM_STEPS - 1)

    refuses("images", summarize_view, images, make_positions(NUM_STEPS), RATE_HZ, "made")


def test_a_camera_that_is_slower_than_the_arm_is_not_called_exchanged() -> None:
    """At 30 steps per second, each image of a 5 Hz camera is repeated in six steps."""
    pictures = np.random.default_rng(0).integers(0, 255, (10, 96, 128, 3)).astype(np.uint8)
    images = [encode_jpeg(pictures[step // 6]) for step in range(60)]
    position = np.arange(180.0).reshape(60, 3) / 1000  # 0.16 m/s

    view = summarize_view(images, position, 30.0, "made")

    assert view.changing_share > 0.5
    assert judge_camera_exchange([view] * 6, [view] * 6) is None


def test_an_episode_too_short_to_compare_images_tells_nothing() -> None:
    """At 30 steps per second, images are compared with those six steps later."""
    images = [encode_jpeg(make_background())] * 4

    view = summarize_view(images, make_positions(4), 30.0, "made")

    assert np.isnan(view.changing_share)


def test_pictures_without_contrast_show_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 5, (24, 32, 3))
    covered = np.array([200, 40, 90]) + noise
    scene = make_background()[:24, :32]

    assert are_blank(np.stack([covered, scene])).tolist() == [True, False]
