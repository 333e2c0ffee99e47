"""Demonstrations: complete, masked where disturbed, the same for any number of processes."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from data_tiny import assert_same
from spear.sim.record import Disturbance, InterveningPolicy, record_episode, record_episodes
from spear.sim.scene import FAMILIES
from spear.types import Episode
from spear.util.held_out import FIRST_TRAIN_SEED

IMAGE_SIZES = {"external": (96, 72), "wrist": (48, 48)}  # (width, height)
NO_MOTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)
MAX_EXPERT_STEP_M = 0.0601  # the expert moves by at most 0.06 m per step
MAX_EXPERT_TURN_RAD = np.radians(8.1)  # and turns by at most 8°

pytestmark = pytest.mark.usefixtures("renderer")


def record(family: str, seed: int, **options: Any) -> Episode:
    """Record the episode of a training scene, number `seed` of them."""
    return record_episode(family, FIRST_TRAIN_SEED + seed, IMAGE_SIZES, **options)


class TestUndisturbedEpisode:
    @pytest.fixture(scope="class")
    def episode(self) -> Episode:
        return record("spoon_on_towel", 1, disturbance=Disturbance(start=0))

    def test_succeeds_and_is_whole(self, episode: Episode) -> None:
        assert episode.success
        assert episode.rate_hz == 5
        assert episode.action is not None
        assert episode.action.shape == (len(episode), 8)
        assert episode.action_mask is not None
        assert episode.action_mask.all()

    @pytest.mark.parametrize(("camera", "size"), IMAGE_SIZES.items())
    def test_has_an_image_per_step(
        self, episode: Episode, camera: str, size: tuple[int, int]
    ) -> None:
        assert len(episode.images[camera]) == len(episode)
        assert Image.open(io.BytesIO(episode.images[camera][-1])).size == size

    def test_translations_are_what_the_positions_then_do(self, episode: Episode) -> None:
        assert episode.action is not None
        translations = episode.action[:-1, :3]

        error_m = np.linalg.norm(np.diff(episode.position, axis=0) - translations, axis=1)

        assert np.median(error_m) < 1e-3
        assert np.quantile(error_m, 0.9) < 5e-3

    def test_rotations_are_what_the_orientations_then_do(self, episode: Episode) -> None:
        assert episode.action is not None
        orientations = Rotation.from_quat(episode.rotation, scalar_first=True)
        expected = Rotation.from_quat(episode.action[:-1, 3:7], scalar_first=True)
        measured_turns = orientations[:-1].inv() * orientations[1:]

        error_rad = (expected.inv() * measured_turns).magnitude()

        assert np.median(error_rad) < np.radians(0.5)


class TestDisturbedEpisodes:
    @pytest.fixture(scope="class")
    def episodes(self) -> list[Episode]:
        disturbance = Disturbance(start=0.15)
        episodes = []
        for family in FAMILIES:
            for seed in range(2):
                episodes.append(record(family, seed, disturbance=disturbance))
        return episodes

    @pytest.fixture
    def actions(self, episodes: list[Episode]) -> np.ndarray:
        return np.concatenate([episode.action for episode in episodes])

    @pytest.fixture
    def masks(self, episodes: list[Episode]) -> np.ndarray:
        return np.concatenate([episode.action_mask for episode in episodes])

    def test_some_steps_are_masked(self, masks: np.ndarray) -> None:
        """A push begins with probability 0.15 per step, and lasts one to five steps."""
        assert 0.03 < (~masks).mean() < 0.4

    def test_the_expert_recovers(self, episodes: list[Episode]) -> None:
        num_successes = sum(bool(episode.success) for episode in episodes)

        assert num_successes >= len(episodes) - 1

    def test_unmasked_steps_are_the_experts(self, actions: np.ndarray, masks: np.ndarray) -> None:
        lengths_m = np.linalg.norm(actions[masks, :3], axis=1)

        assert lengths_m.max() < MAX_EXPERT_STEP_M

    def test_the_gripper_turns_also_near_the_object(
        self, episodes: list[Episode], actions: np.ndarray, masks: np.ndarray
    ) -> None:
        """Only near the object the wrist camera shows how far the gripper has to turn.

        Of the expert's steps after the first five, over a fifth turn by more than 5°.
        """
        # The real part of a quaternion is the cosine of half the angle.
        turns_rad = 2 * np.arccos(np.clip(actions[:, 3], -1, 1))
        is_late = np.concatenate([np.arange(len(episode)) >= 5 for episode in episodes])

        assert (turns_rad[masks & is_late] > np.radians(5)).mean() > 0.2
        assert turns_rad[masks].max() < MAX_EXPERT_TURN_RAD


@pytest.mark.slow
def test_processes_share_the_work_without_changing_it() -> None:
    tasks = [("stack_cube", FIRST_TRAIN_SEED), ("put_in_basket", FIRST_TRAIN_SEED + 3)]

    by_one = list(record_episodes(tasks, IMAGE_SIZES, workers=1))
    by_two = list(record_episodes(tasks, IMAGE_SIZES, workers=2))

    sources = [f"sim/{family}/{seed}" for family, seed in tasks]
    assert [episode.source for episode in by_one] == sources
    for first, second in zip(by_one, by_two, strict=True):
        assert_same(first, second)
    assert_same(record("stack_cube", 0), by_one[0])


class TestPolicyThatTakesTurns:
    @pytest.fixture
    def policy_steps(self) -> list[tuple[int, int]]:
        """A list to which the policy appends (seed, step) of each of its steps."""
        return []

    @pytest.fixture
    def episode(self, policy_steps: list[tuple[int, int]]) -> Episode:
        """An episode in which a policy that never moves takes turns with the expert."""

        def stay(
            folder: Path, observation: Mapping[str, Any], seed: int, step: int
        ) -> NDArray[np.float32]:
            assert folder == Path("weights")
            assert observation["observation/image"].shape == (72, 96, 3)
            policy_steps.append((seed, step))
            return NO_MOTION

        return record("stack_cube", 2, policy=InterveningPolicy(Path("weights"), stay))

    def test_its_steps_are_never_a_target(
        self, episode: Episode, policy_steps: list[tuple[int, int]]
    ) -> None:
        assert episode.action is not None
        assert episode.action_mask is not None
        is_policys = (episode.action == NO_MOTION).all(axis=1)

        assert episode.success
        np.testing.assert_array_equal(is_policys, ~episode.action_mask)
        assert 0.1 < is_policys.mean() < 0.9
        assert len(set(policy_steps)) == is_policys.sum()

    def test_the_source_says_that_there_were_turns(self, episode: Episode) -> None:
        assert episode.source != record("stack_cube", 2).source
