"""Canonical actions: they lead from state to state, and what is not known is masked."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation, Slerp

from data_tiny import make
from spear.data import actions as rules
from spear.data.actions import canonicalize_actions, check_episode, extract_chunk, resample_episode
from spear.data.readers.formats import read_episodes
from spear.geometry import apply_action, quat_distance
from spear.gripper import binarize_commands, binarize_gripper, commands_from_motion
from spear.types import Episode


def smooth_episode(seed: int, steps: int, rate_hz: float = 5.0) -> Episode:
    rng = np.random.default_rng(seed)
    turns = Rotation.random(1, rng) * Rotation.from_rotvec(
        np.cumsum(rng.normal(0, 0.3, (steps, 3)), axis=0)
    )
    position, gripper = np.cumsum(rng.normal(0, 0.02, (steps, 3)), axis=0), rng.uniform(size=steps)
    parts = {"position": position, "rotation": turns.as_quat(scalar_first=True), "gripper": gripper}
    images = {"external": [b"%d" % i for i in range(steps)]}
    return check_episode(make(seed, steps, images=images, rate_hz=rate_hz, **parts))


@given(st.integers(0, 1000), st.integers(2, 12), st.integers(0, 11))
def test_following_a_chunk_reproduces_the_states(seed: int, steps: int, start: int) -> None:
    episode = smooth_episode(seed, steps)
    start = start % steps
    actions, valid = canonicalize_actions(episode)
    acts, mask = extract_chunk(actions, valid, start)
    assert mask.sum() == min(5, steps - 1 - start)
    position, rotation = (
        torch.as_tensor(x[start]).double() for x in (episode.position, episode.rotation)
    )
    for h in range(5):
        act = torch.as_tensor(acts[h]).double()
        position, rotation = apply_action(position, rotation, act[:3], act[3:7])
        reached = min(start + h + 1, steps - 1)  # beyond the end the robot stays
        np.testing.assert_allclose(position, episode.position[reached], atol=1e-6)
        assert (
            float(quat_distance(rotation, torch.as_tensor(episode.rotation[reached]).double()))
            < 1e-5
        )


def test_a_step_along_the_base_and_a_turn_about_the_gripper() -> None:
    """A gripper yawed by 90° moves along the base's x axis and turns about its own x, the base's y."""
    before = Rotation.from_euler("z", 90, degrees=True)
    after = Rotation.from_euler("y", 10, degrees=True) * before
    rotation = np.stack([r.as_quat(scalar_first=True) for r in (before, after)])
    position = np.array([[0.1, 0, 0], [0.15, 0, 0]])
    episode = dataclasses.replace(smooth_episode(0, 2), position=position, rotation=rotation)
    actions, _ = canonicalize_actions(check_episode(episode))
    np.testing.assert_allclose(actions[0, :3], [0.05, 0, 0], atol=1e-6)
    expected = Rotation.from_euler("x", 10, degrees=True).as_quat(scalar_first=True)
    np.testing.assert_allclose(actions[0, 3:7], expected, atol=1e-6)


def test_a_masked_step_masks_the_rest_of_its_chunks() -> None:
    actions = np.arange(80, dtype=np.float32).reshape(10, 8)
    valid = np.arange(10) != 4
    acts, mask = extract_chunk(actions, valid, 2, horizon=6)
    np.testing.assert_array_equal(mask, [True, True, False, False, False, False])
    np.testing.assert_array_equal(acts[:2], actions[2:4])
    np.testing.assert_array_equal(acts[2:], [[0, 0, 0, 1, 0, 0, 0, actions[3, 7]]] * 4)
    acts, mask = extract_chunk(actions, valid, 4)
    assert not mask.any() and acts[0, 7] == actions[4, 7]
    acts, mask = extract_chunk(actions, valid, 8)
    np.testing.assert_array_equal(mask, [True, True, False, False, False])
    np.testing.assert_array_equal(acts[2:, 7], actions[9, 7])


def test_gripper_commands_have_hysteresis_and_are_the_next_opening() -> None:
    opening = np.array([0.55, 0.45, 0.7, 0.5, 0.41, 0.39, 0.5, 0.59, 0.61, 0.45])
    np.testing.assert_array_equal(binarize_gripper(opening), [1, 1, 1, 1, 1, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(binarize_gripper(np.array([0.45, 0.55])), [0, 0])
    slow = (
        [1, 1, 0.9, 0.6, 0.3, 0.3, 0.6, 1],
        [1, 0, 0, 0, 0, 1, 1, 1],
    )  # told before it began to move
    wide = (
        [1, 1, 0.8, 0.56, 0.55, 0.55, 0.8, 1],
        [1, 0, 0, 0, 0, 1, 1, 1],
    )  # around something, half open
    twice = (
        [1, 0.7, 0.7, 0.71, 0.7, 0.7, 0.4, 0.41],
        [1, 1, 1, 1, 1, 0, 0, 0],
    )  # narrower, then closed
    held = [0.7, 0.72, 0.7, 1], [0, 0, 1, 1]
    for opening, told in (
        ([1, 1, 0.1, 0.1], [1, 0, 0, 0]),
        slow,
        wide,
        twice,
        held,
        ([0.6] * 4, [1] * 4),
    ):
        often = np.interp(np.arange(6 * len(told) - 5) / 6, np.arange(len(told)), opening)
        np.testing.assert_array_equal(commands_from_motion(often, 30.0)[3::6], told[:-1])
        episode = dataclasses.replace(
            smooth_episode(0, len(told)), gripper=np.array(opening, np.float32)
        )
        np.testing.assert_array_equal(canonicalize_actions(episode)[0][:, 7], told)
    trigger = np.array([1, 1, 0.9, 0.7, 0.5, 0.3, 0, 0, 0.2, 0.4, 0.6, 1])
    np.testing.assert_array_equal(binarize_commands(trigger, 10.0), [1] * 3 + [0] * 6 + [1] * 3)
    for half_open in (0.46 + 0.54 * trigger, 0.1 + 0.48 * trigger):
        np.testing.assert_array_equal(
            binarize_commands(half_open, 10.0), [1] * 2 + [0] * 6 + [1] * 4
        )
    pulses = np.array([1, 0, 1, 0, 0, 1])
    np.testing.assert_array_equal(binarize_commands(pulses, 30.0), pulses)
    # Whoever changes what is expected here, or of resampling, raises the version.
    assert rules.ACTION_RULES_VERSION == 4


def test_what_real_grippers_were_told_shows_in_their_openings(shared: Path) -> None:
    told = list(read_episodes(shared / "data" / "bridge_v2_sample"))
    found = [canonicalize_actions(dataclasses.replace(e, action=None))[0] for e in told]
    right = [a[:-1, 7] == b.action[:-1, 7] for a, b in zip(found, told, strict=True)]
    assert (
        np.concatenate(right).mean() > 0.95
    )  # 220 of 225; by the nearer end, open or closed, it is 190


@given(st.integers(0, 1000), st.integers(2, 40), st.sampled_from([3.0, 10.0, 12.5, 15.0]))
def test_resampling_agrees_with_scipy(seed: int, steps: int, rate: float) -> None:
    episode = smooth_episode(seed, steps, rate)
    slow = resample_episode(episode)
    times, new = np.arange(steps) / rate, np.arange(len(slow)) / 5.0
    assert slow.rate_hz == 5.0 and new[-1] <= times[-1] + 1e-6 < new[-1] + 0.2 + 2e-6
    new = np.minimum(new, times[-1])
    expected = Slerp(times, Rotation.from_quat(episode.rotation, scalar_first=True))(new)
    assert (
        expected.inv() * Rotation.from_quat(slow.rotation, scalar_first=True)
    ).magnitude().max() < 1e-5
    for axis in range(3):
        linear = np.interp(new, times, episode.position[:, axis])
        np.testing.assert_allclose(slow.position[:, axis], linear, atol=1e-6)
    np.testing.assert_allclose(slow.gripper, np.interp(new, times, episode.gripper), atol=1e-5)
    shown = np.array([int(image) for image in slow.images["external"]])
    late = new - shown / rate  # no image shows what comes after the state
    assert (late >= -1e-6).all() and (late < 1 / rate + 1e-6).all()
    check_episode(slow)


def test_resampling_keeps_commands_and_masks() -> None:
    """10 Hz to 5 Hz: the command at the end of each new step; masked when either of its two old steps is."""
    episode, action = smooth_episode(1, 9, 10.0), np.zeros((9, 8), np.float32)
    action[:, 3], action[:, 7] = 1, [1, 1, 1, 0, 0, 0, 1, 1, 1]
    mask = np.arange(9) != 5
    slow = resample_episode(dataclasses.replace(episode, action=action, action_mask=mask))
    assert slow.action is not None and slow.action_mask is not None and len(slow) == 5
    np.testing.assert_array_equal(slow.action[:, 7], [1, 0, 0, 1, 1])
    np.testing.assert_array_equal(slow.action_mask, [True, True, False, True, False])
    np.testing.assert_allclose(
        slow.action[:4, :3], np.diff(episode.position[::2], axis=0), atol=1e-6
    )
    same = dataclasses.replace(episode, rate_hz=5.0)
    assert resample_episode(same) is same
