"""Open-loop errors: of a policy with a known mistake, and of the baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from data_tiny import make_episode, write_store
from refusals import Command, refuses
from spear.data.actions import extract_chunk_up_to_unknown, get_or_derive_actions
from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.data.store.lerobot_write import write_lerobot
from spear.evaluate.open_loop import (
    build_observations,
    compute_mean_action,
    measure_constant_mean_action_errors,
    measure_policy_errors,
    measure_repeated_action_errors,
)
from spear.report.comparison import make_open_loop_page
from spear.types import Array, Episode

NUM_STEPS = 12
NUM_KNOWN_ACTIONS = NUM_STEPS - 1  # the last step has no next state, so its action is not known


def make_moving_episode(seed: int) -> Episode:
    """Make an episode whose steps differ in length, and in whose middle the gripper closes."""
    steps_m = np.random.default_rng(seed).normal(0.01, 0.01, (NUM_STEPS, 3))
    position = steps_m.cumsum(0)
    gripper = (np.arange(NUM_STEPS) < 6).astype(float)
    return make_episode(seed, NUM_STEPS, position=position, gripper=gripper)


class ReplayPolicy:
    """A policy that predicts the recorded chunks of a store.

    Args:
        store: The episodes. A state is recognized by its exact numbers.
        error_m: Error that is added to each action's x. If it is not 0, the gripper is inverted,
            too.
    """

    def __init__(self, store: EpisodeStore, error_m: float = 0.0) -> None:
        self.error_m = error_m
        self.chunk_by_state: dict[bytes, Array] = {}
        for episode in store:
            actions, is_known = get_or_derive_actions(episode)
            for step, observation in enumerate(build_observations(episode)):
                chunk, _ = extract_chunk_up_to_unknown(actions, is_known, step)
                self.chunk_by_state[observation["observation/state"].tobytes()] = chunk

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        results = []
        for observation in observations:
            actions = self.chunk_by_state[observation["observation/state"].tobytes()].copy()
            actions[:, 0] += self.error_m
            if self.error_m:
                actions[:, 7] = 1 - actions[:, 7]
            results.append({"actions": actions})
        return results


@pytest.fixture
def stores(tmp_path: Path) -> tuple[EpisodeStore, EpisodeStore]:
    """Six training episodes and two held-out episodes."""
    store = write_store([make_moving_episode(seed) for seed in range(8)], tmp_path)
    return store.subset(range(6)), store.subset([6, 7])


@pytest.fixture
def held_out(stores: tuple[EpisodeStore, EpisodeStore]) -> EpisodeStore:
    """The two held-out episodes."""
    _, held_out_store = stores
    return held_out_store


# A `ReplayPolicy` with an error also inverts the gripper, so that no command is right.
@pytest.mark.parametrize(("error_m", "accuracy"), [(0.0, 1), (0.002, 0)])
def test_a_known_mistake_is_measured(
    held_out: EpisodeStore, error_m: float, accuracy: float
) -> None:
    policy = ReplayPolicy(held_out, error_m)

    summary = measure_policy_errors("replay", policy, held_out).estimate_mean_errors()

    error_mm = 1000 * error_m
    chunk_end_mm = 5 * error_mm  # the errors of the five actions of a chunk add up
    assert summary["translation_mm"].value == pytest.approx(error_mm, rel=1e-3, abs=1e-6)
    assert summary["chunk_end_mm"].value == pytest.approx(chunk_end_mm, rel=1e-3, abs=1e-6)
    assert summary["rotation_deg"].value == pytest.approx(0, abs=0.05)
    assert summary["gripper_accuracy"].value == accuracy
    assert summary["translation_mm"].n == 2  # episodes


def test_held_out_episodes_that_were_learned_from_are_refused(
    tmp_path: Path, run_refused_command: Command
) -> None:
    """Episode 2 is in both, with another folder, format and source. Its numbers give it away."""
    episodes = [make_moving_episode(seed) for seed in range(4)]
    renamed = [replace(episodes[seed], source=f"new#{seed}") for seed in (2, 3)]
    append_episodes(episodes[:3], tmp_path / "arm")
    write_lerobot(renamed, tmp_path / "new")

    message = run_refused_command(
        ["evaluate", "data", "--policy", "nano", "--episodes"],
        str(tmp_path / "new"),
        "--train",
        str(tmp_path / "arm"),
    )

    assert "1 of the episodes are in both" in message


# ---- Baselines.


def test_the_mean_rotation_is_the_same_for_both_signs() -> None:
    """A quaternion and its negative are the same rotation."""
    turns = Rotation.from_rotvec([[0, 0, 0.2], [0, 0, 0.5]]).as_quat(scalar_first=True)
    actions = np.concatenate([np.zeros((2, 3)), turns, np.ones((2, 1))], axis=1)
    flipped_actions = actions.copy()
    flipped_actions[1, 3:7] *= -1

    mean = compute_mean_action(actions)

    np.testing.assert_allclose(mean, compute_mean_action(flipped_actions), atol=1e-7)
    mean_turn = Rotation.from_quat(mean[3:7], scalar_first=True)
    assert mean_turn.magnitude() == pytest.approx((0.2 + 0.5) / 2)


def test_the_mean_action_is_that_of_the_training_episodes(
    stores: tuple[EpisodeStore, EpisodeStore],
) -> None:
    train, held_out = stores
    known_actions = []
    for episode in train:
        actions, _ = get_or_derive_actions(episode)
        known_actions.append(actions[:NUM_KNOWN_ACTIONS])
    mean_translation = np.concatenate(known_actions)[:, :3].mean(0)

    baseline = measure_constant_mean_action_errors(train, held_out)

    first_prediction = baseline.predicted[0][0]
    np.testing.assert_allclose(first_prediction[:3], mean_translation, rtol=1e-5)
    # Steps have a standard deviation of 10 mm along each axis, so no constant comes near them all.
    assert baseline.estimate_mean_errors()["translation_mm"].value > 5


def test_two_episodes_have_no_interval(stores: tuple[EpisodeStore, EpisodeStore]) -> None:
    summary = measure_constant_mean_action_errors(*stores).estimate_mean_errors()

    assert np.isnan(summary["rotation_deg"].low)


def test_the_page_shows_every_held_out_episode(
    stores: tuple[EpisodeStore, EpisodeStore],
) -> None:
    train, held_out = stores
    policy = measure_policy_errors("replay", ReplayPolicy(held_out), held_out)

    page = make_open_loop_page(policy, measure_constant_mean_action_errors(train, held_out))

    num_charts = 4  # per episode: x, y, z and gripper
    assert page.count("<svg") == num_charts * len(held_out)
    assert f"the first of {len(held_out)} held-out" in page


@pytest.mark.parametrize("horizon", [5, 9])
def test_baselines_are_compared_over_chunks_as_long_as_the_policys(
    held_out: EpisodeStore, horizon: int
) -> None:
    num_whole_chunks = NUM_KNOWN_ACTIONS - horizon + 1  # all actions of these are known

    last_action = measure_repeated_action_errors(held_out, horizon)
    constant = measure_constant_mean_action_errors(held_out, held_out, horizon)

    assert len(last_action.episodes[0]["chunk_end_mm"]) == num_whole_chunks
    assert len(constant.episodes[0]["chunk_end_mm"]) == num_whole_chunks


def test_the_last_action_is_what_was_done_a_step_before(held_out: EpisodeStore) -> None:
    baseline = measure_repeated_action_errors(held_out)

    for predicted, episode in zip(baseline.predicted, held_out, strict=True):
        actions, _ = get_or_derive_actions(episode)
        idle_action = [0, 0, 0, 1, 0, 0, 0, 1]
        np.testing.assert_array_equal(predicted, [idle_action, *actions[:-1]])


def test_errors_of_the_last_action_are_as_worked_out_by_hand(held_out: EpisodeStore) -> None:
    """The last known step has a chunk of a single known action, so its error is simple."""
    actions, _ = get_or_derive_actions(held_out[1])
    last_known = NUM_KNOWN_ACTIONS - 1
    difference_m = actions[last_known - 1, :3] - actions[last_known, :3]
    expected_mm = 1000 * np.linalg.norm(difference_m)

    errors = measure_repeated_action_errors(held_out).episodes[1]

    assert errors["translation_mm"][-1] == pytest.approx(expected_mm, rel=1e-4)
    # The gripper command changes once, so the last action is wrong around that change.
    assert 0.5 < errors["gripper_accuracy"].mean() < 1


# ---- Cameras.


@pytest.mark.parametrize(
    ("views", "image_keys"),
    [
        (("external",), {"observation/image"}),
        (("external", "left"), {"observation/image", "observation/left_image"}),
    ],
)
def test_a_policy_is_asked_about_its_own_cameras(
    tmp_path: Path, views: tuple[str, ...], image_keys: set[str]
) -> None:
    """The episode also has other cameras."""
    images = make_episode(0, 6).images["external"]
    episode = make_episode(0, 6, images=dict.fromkeys(("external", "wrist", "left"), images))
    store = write_store([episode], tmp_path)
    shown_keys: set[str] = set()

    class WatchingPolicy(ReplayPolicy):
        image_sizes = dict.fromkeys(views, (32, 32))

        def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
            for observation in observations:
                shown_keys.update(key for key in observation if key.endswith("image"))
            return super().infer_batch(observations)

    measure_policy_errors("watching", WatchingPolicy(store), store)

    assert shown_keys == image_keys


def test_a_policy_with_a_wrist_camera_alone_sees_through_it() -> None:
    episode = make_moving_episode(0)
    episode.images["wrist"] = episode.images.pop("external")

    observations = build_observations(episode, ["wrist"])

    assert all("observation/wrist_image" in observation for observation in observations)


def test_an_episode_without_the_policys_cameras_is_refused() -> None:
    episode = make_moving_episode(0)
    episode.images["wrist"] = episode.images.pop("external")

    refuses("external", build_observations, episode, ["external"])
