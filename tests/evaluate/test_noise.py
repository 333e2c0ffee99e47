"""A degraded image shows the same scene, and its noise depends only on seed and step."""

import numpy as np
import pytest

from spear.evaluate.noise import NOISE_LEVELS, degrade_image, degrade_images_of_observation


def make_striped_image() -> np.ndarray:
    """A dark image with a bright column every eight pixels."""
    image = np.full((64, 80, 3), 40, np.uint8)
    image[:, ::8] = 220
    return image


def test_noise_grows_with_the_level() -> None:
    image = make_striped_image()

    errors = []
    for level in NOISE_LEVELS.values():
        degraded = degrade_image(image, level, np.random.default_rng(0))
        errors.append(np.abs(degraded.astype(float) - image).mean())

    assert errors == sorted(errors)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_degraded_picture_keeps_its_shape_and_brightness(level: int) -> None:
    image = make_striped_image()

    degraded = degrade_image(image, NOISE_LEVELS[level], np.random.default_rng(0))

    assert degraded.shape == image.shape
    assert degraded.dtype == np.uint8
    assert abs(degraded.mean() - image.mean()) < 4


def test_only_pictures_are_degraded() -> None:
    state = np.arange(8, dtype=np.float32)
    observation = {
        "observation/image": make_striped_image(),
        "observation/state": state,
        "prompt": "go",
    }

    degraded = degrade_images_of_observation(observation, NOISE_LEVELS[2], seed=3, step=0)

    assert degraded["observation/state"] is state
    assert degraded["prompt"] == "go"
    assert not np.array_equal(degraded["observation/image"], observation["observation/image"])


def test_noise_depends_on_seed_and_step_only() -> None:
    observation = {"observation/image": make_striped_image()}

    first = degrade_images_of_observation(observation, NOISE_LEVELS[1], seed=3, step=5)
    same = degrade_images_of_observation(observation, NOISE_LEVELS[1], seed=3, step=5)
    later = degrade_images_of_observation(observation, NOISE_LEVELS[1], seed=3, step=6)

    assert np.array_equal(first["observation/image"], same["observation/image"])
    assert not np.array_equal(first["observation/image"], later["observation/image"])
