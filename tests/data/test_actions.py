"""Canonical actions lead from state to state, and actions that are not known are masked."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from data_tiny import make_episode
from spear.data.actions import (
    ACTION_RULES_VERSION,
    extract_chunk_up_to_unknown,
    get_or_derive_actions,
    resample_episode,
    validate_episode,
)
from spear.geometry import apply_action, quat_distance
from spear.types import Episode


def make_smooth_episode(seed: int, num_steps: int, rate_hz: float = 5.0) -> Episode:
    """An episode of a random walk, in which the image of each step is the number of the step."""
    rng = np.random.default_rng(seed)
    first_rotation = Rotation.random(1, rng)
    rotation_vectors = np.cumsum(rng.normal(0, 0.3, (num_steps, 3)), axis=0)  # rad
    turns = Rotation.from_rotvec(rotation_vectors)
    episode = make_episode(
        seed,
        num_steps,
        images={"external": [b"%d" % step for step in range(num_steps)]},
        position=np.cumsum(rng.normal(0, 0.02, (num_steps, 3)), axis=0),  # m
        rotation=(first_rotation * turns).as_quat(scalar_first=True),
        gripper=rng.uniform(size=num_steps),
        rate_hz=rate_hz,
    )
    return validate_episode(episode)


def test_the_rules_have_the_version_that_these_tests_are_for() -> None:
    """If you change what these tests or those of grippers expect, raise the version."""
    assert ACTION_RULES_VERSION == 4


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(0, 11))
def test_following_a_chunk_reproduces_the_states(seed: int, num_steps: int, start: int) -> None:
    """Executing the chunk's five actions from the state at `start` leads to the next states."""
    episode = make_smooth_episode(seed, num_steps)
    start = start % num_steps
    actions, is_known = get_or_derive_actions(episode)

    chunk, mask = extract_chunk_up_to_unknown(actions, is_known, start)

    num_known_actions = num_steps - 1 - start  # from `start` on
    assert mask.sum() == min(5, num_known_actions)
    position = torch.as_tensor(episode.position[start]).double()
    rotation = torch.as_tensor(episode.rotation[start]).double()
    for offset in range(5):
        action = torch.as_tensor(chunk[offset]).double()
        position, rotation = apply_action(position, rotation, action[:3], action[3:7])
        reached_step = min(start + offset + 1, num_steps - 1)  # beyond the end the robot stays
        expected_rotation = torch.as_tensor(episode.rotation[reached_step]).double()
        np.testing.assert_allclose(position, episode.position[reached_step], atol=1e-6)
        assert float(quat_distance(rotation, expected_rotation)) < 1e-5


def test_translations_are_along_the_base_and_rotations_about_the_gripper() -> None:
    """A gripper yawed by 90° moves along the base's x, and turns about its own x."""
    first_rotation = Rotation.from_euler("z", 90, degrees=True)
    second_rotation = Rotation.from_euler("y", 10, degrees=True) * first_rotation
    episode = dataclasses.replace(
        make_smooth_episode(0, 2),
        position=np.array([[0.1, 0, 0], [0.15, 0, 0]]),
        rotation=np.stack(
            [first_rotation.as_quat(scalar_first=True), second_rotation.as_quat(scalar_first=True)]
        ),
    )

    actions, _ = get_or_derive_actions(validate_episode(episode))

    expected_turn = Rotation.from_euler("x", 10, degrees=True).as_quat(scalar_first=True)
    np.testing.assert_allclose(actions[0, :3], [0.05, 0, 0], atol=1e-6)
    np.testing.assert_allclose(actions[0, 3:7], expected_turn, atol=1e-6)


def test_derived_actions_have_the_commands_that_the_gripper_obeyed() -> None:
    """The gripper begins to close after step 1, and to open after step 5."""
    opening = np.array([1, 1, 0.9, 0.6, 0.3, 0.3, 0.6, 1], np.float32)
    episode = dataclasses.replace(make_smooth_episode(0, 8), gripper=opening)

    actions, _ = get_or_derive_actions(episode)

    np.testing.assert_array_equal(actions[:, 7], [1, 0, 0, 0, 0, 1, 1, 1])


NUMBERED_ACTIONS = np.arange(80, dtype=np.float32).reshape(10, 8)  # ten rows that all differ
KNOWN_BUT_STEP_4 = np.arange(10) != 4  # the mask of an episode whose action 4 is not known


def test_an_unknown_action_masks_the_rest_of_its_chunk() -> None:
    """From step 2 on, actions 2 and 3 are known. Further actions keep the last gripper command."""
    chunk, mask = extract_chunk_up_to_unknown(NUMBERED_ACTIONS, KNOWN_BUT_STEP_4, step=2, horizon=6)

    stay = [0, 0, 0, 1, 0, 0, 0, NUMBERED_ACTIONS[3, 7]]
    np.testing.assert_array_equal(mask, [True, True, False, False, False, False])
    np.testing.assert_array_equal(chunk[:2], NUMBERED_ACTIONS[2:4])
    np.testing.assert_array_equal(chunk[2:], [stay] * 4)


def test_a_chunk_that_starts_at_an_unknown_action_has_no_targets() -> None:
    chunk, mask = extract_chunk_up_to_unknown(NUMBERED_ACTIONS, KNOWN_BUT_STEP_4, step=4)

    assert not mask.any()
    assert chunk[0, 7] == NUMBERED_ACTIONS[4, 7]


def test_the_end_of_the_episode_masks_the_rest_of_a_chunk() -> None:
    chunk, mask = extract_chunk_up_to_unknown(NUMBERED_ACTIONS, KNOWN_BUT_STEP_4, step=8)

    np.testing.assert_array_equal(mask, [True, True, False, False, False])
    np.testing.assert_array_equal(chunk[2:, 7], [NUMBERED_ACTIONS[9, 7]] * 3)


@given(st.integers(0, 1000), st.integers(2, 40), st.sampled_from([3.0, 10.0, 12.5, 15.0]))
def test_resampling_agrees_with_scipy(seed: int, num_steps: int, rate_hz: float) -> None:
    episode = make_smooth_episode(seed, num_steps, rate_hz)

    resampled = resample_episode(episode)

    validate_episode(resampled)
    assert resampled.rate_hz == 5.0

    # The last new step (of 0.2 s) is at or before the last state, and the next one would be behind.
    times_s = np.arange(num_steps) / rate_hz
    new_times_s = np.arange(len(resampled)) / 5.0
    last_time_s = times_s[-1]
    last_new_time_s = new_times_s[-1]
    rounding_s = 1e-6
    assert last_new_time_s <= last_time_s + rounding_s
    assert last_time_s < last_new_time_s + 0.2 + rounding_s

    new_times_s = np.minimum(new_times_s, last_time_s)
    slerp = Slerp(times_s, Rotation.from_quat(episode.rotation, scalar_first=True))
    rotation = Rotation.from_quat(resampled.rotation, scalar_first=True)
    difference = slerp(new_times_s).inv() * rotation
    assert difference.magnitude().max() < 1e-5
    for axis in range(3):
        expected = np.interp(new_times_s, times_s, episode.position[:, axis])
        np.testing.assert_allclose(resampled.position[:, axis], expected, atol=1e-6)
    expected_gripper = np.interp(new_times_s, times_s, episode.gripper)
    np.testing.assert_allclose(resampled.gripper, expected_gripper, atol=1e-5)


@given(st.integers(0, 1000), st.integers(2, 40), st.sampled_from([3.0, 10.0, 12.5, 15.0]))
def test_a_resampled_image_is_the_last_one_before_its_state(
    seed: int, num_steps: int, rate_hz: float
) -> None:
    resampled = resample_episode(make_smooth_episode(seed, num_steps, rate_hz))

    image_steps = np.array([int(image) for image in resampled.images["external"]])
    image_times_s = image_steps / rate_hz
    last_time_s = (num_steps - 1) / rate_hz
    times_s = np.minimum(np.arange(len(resampled)) / 5.0, last_time_s)
    ages_s = times_s - image_times_s
    assert (ages_s >= -1e-6).all()
    assert (ages_s < 1 / rate_hz + 1e-6).all()  # the next image would be too late


@pytest.fixture
def resampled_from_10_hz() -> Episode:
    """Nine steps at 10 Hz, of which step 5 is masked, resampled to five steps at 5 Hz.

    A new step covers two of the nine: 0 and 1, 2 and 3, and so on; the last one covers step 8.
    """
    action = np.zeros((9, 8), np.float32)
    action[:, 3] = 1
    action[:, 7] = [1, 1, 1, 0, 0, 0, 1, 1, 1]
    episode = dataclasses.replace(
        make_smooth_episode(seed=1, num_steps=9, rate_hz=10.0),
        action=action,
        action_mask=np.arange(9) != 5,
    )
    return resample_episode(episode)


def test_a_resampled_command_is_the_one_at_the_end_of_its_step(
    resampled_from_10_hz: Episode,
) -> None:
    """The commands of steps 1, 3, 5, 7 and 8."""
    assert resampled_from_10_hz.action is not None
    np.testing.assert_array_equal(resampled_from_10_hz.action[:, 7], [1, 0, 0, 1, 1])


def test_a_resampled_step_is_masked_if_any_step_that_it_covers_is(
    resampled_from_10_hz: Episode,
) -> None:
    """The third step covers step 5, and behind the last one the state is not known."""
    expected = [True, True, False, True, False]
    np.testing.assert_array_equal(resampled_from_10_hz.action_mask, expected)


def test_resampled_motions_lead_from_state_to_state(resampled_from_10_hz: Episode) -> None:
    assert resampled_from_10_hz.action is not None
    source = make_smooth_episode(seed=1, num_steps=9, rate_hz=10.0)
    every_second_position = source.position[::2]
    expected = np.diff(every_second_position, axis=0)
    np.testing.assert_allclose(resampled_from_10_hz.action[:4, :3], expected, atol=1e-6)


def test_an_episode_at_the_rate_is_not_resampled() -> None:
    episode = make_smooth_episode(seed=1, num_steps=9, rate_hz=5.0)

    assert resample_episode(episode) is episode
