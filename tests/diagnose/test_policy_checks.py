"""Faults of a policy, or of its training episodes, are named, and a good policy has none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from data_tiny import make_png, write_store
from made_rollouts import make_episode
from spear.checks.rollout.case import Doubt, Finding, Result
from spear.data.normalize import Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.diagnose.policy_case import PolicyCase
from spear.diagnose.policy_checks.few_demonstrations import FewDemonstrationsCheck
from spear.diagnose.policy_checks.ignores_images import IgnoresImagesCheck
from spear.diagnose.policy_checks.ignores_words import IgnoresWordsCheck
from spear.diagnose.policy_checks.overfitting import OverfittingCheck
from spear.diagnose.policy_checks.wrong_statistics import WrongStatisticsCheck
from spear.models.weights.folders import write_provenance
from spear.policy import Spear1Policy
from spear.types import Array, Episode

INSTRUCTIONS = ("put the mug on the plate", "put the spoon on the towel")
HORIZON = 5


class WordCounter:
    """Counts words in place of a processor's tokens."""

    def encode_instructions(self, texts: Sequence[str], cut: bool) -> dict[str, torch.Tensor]:
        mask = torch.zeros(len(texts), 30)
        for row, text in enumerate(texts):
            mask[row, : len(text.split())] = 1
        return {"attention_mask": mask}


@dataclass
class StandInPolicy:
    """Moves by what it observes: along x by the first pixel, along y by the number of the
    instruction, and along z by the state's first number.

    picture_factor  how much pictures matter.
    word_factor     how much words matter.
    """

    normalizer: Normalizer
    picture_factor: float = 1.0
    word_factor: float = 1.0
    folder: Path | None = None
    processor: WordCounter = field(default_factory=WordCounter)
    image_sizes: Mapping[str, tuple[int, int]] = field(
        default_factory=lambda: {"external": (48, 32)}
    )

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Array]]:
        results = []
        for observation in observations:
            level = float(observation["observation/image"][0, 0, 0]) / 255
            instruction_number = INSTRUCTIONS.index(observation["prompt"])
            x = 0.02 * self.picture_factor * level
            y = 0.02 * self.word_factor * instruction_number
            z = 0.01 * observation["observation/state"][0]
            action = np.array([x, y, z, 1, 0, 0, 0, 1])
            results.append({"actions": np.tile(action, (HORIZON, 1)).astype(np.float32)})
        return results


def make_training(folder: Path, num_episodes: int = 12) -> EpisodeStore:
    """Write training episodes whose pictures are gray of another level in each."""
    return write_store([make_stored(seed) for seed in range(num_episodes)], folder)


def make_stored(seed: int) -> Episode:
    """Make an episode of a store."""
    rollout = make_episode(seed)
    picture = make_png(20 * (seed % 12))
    return Episode(
        images={"external": [picture] * len(rollout)},
        position=rollout.position,
        rotation=rollout.rotation,
        gripper=rollout.opening,
        instruction=INSTRUCTIONS[seed % 2],
        rate_hz=5.0,
        source=rollout.source,
        action=rollout.action.astype(np.float32),
    )


def make_case(store: EpisodeStore, **changes: Any) -> PolicyCase:
    """Make the case of a policy whose statistics are those of its training."""
    normalizer = changes.pop("normalizer", None) or Normalizer.fit([(store, 1.0)], "quantile")
    policy = StandInPolicy(normalizer, **changes)
    demonstrations = [make_episode(seed) for seed in range(len(store))]
    return PolicyCase(
        demonstrations=demonstrations,
        instructions=INSTRUCTIONS,
        policy=cast(Spear1Policy, policy),
        training=store,
    )


@pytest.mark.parametrize(("factor", "is_fault"), [(1.0, False), (0.0, True)])
def test_a_policy_that_ignores_pictures_is_named(
    factor: float, is_fault: bool, tmp_path: Path
) -> None:
    case = make_case(make_training(tmp_path / "train"), picture_factor=factor)

    result = IgnoresImagesCheck().examine(case)

    assert isinstance(result, Finding) == is_fault


@pytest.mark.parametrize(("factor", "is_fault"), [(1.0, False), (0.0, True)])
def test_a_policy_that_ignores_words_is_named(
    factor: float, is_fault: bool, tmp_path: Path
) -> None:
    case = make_case(make_training(tmp_path / "train"), word_factor=factor)

    result = IgnoresWordsCheck().examine(case)

    assert isinstance(result, Finding) == is_fault


def test_one_instruction_does_not_show_whether_words_matter(tmp_path: Path) -> None:
    case = replace(make_case(make_training(tmp_path / "train")), instructions=INSTRUCTIONS[:1])

    assert isinstance(IgnoresWordsCheck().examine(case), Doubt)


def test_one_episode_has_no_other_pictures(tmp_path: Path) -> None:
    case = make_case(make_training(tmp_path / "train", num_episodes=1))

    assert isinstance(IgnoresImagesCheck().examine(case), Doubt)


@pytest.mark.parametrize(("num_episodes", "is_fault"), [(12, False), (4, True)])
def test_few_demonstrations_are_named(num_episodes: int, is_fault: bool, tmp_path: Path) -> None:
    case = make_case(make_training(tmp_path / "train", num_episodes))

    result = FewDemonstrationsCheck().examine(case)

    assert isinstance(result, Finding) == is_fault


def double_scale(normalizer: Normalizer) -> Normalizer:
    """Double the scale of translations."""
    x, y, z = normalizer.translation_scale
    return replace(normalizer, translation_scale=(2 * x, 2 * y, 2 * z))


def move_positions(normalizer: Normalizer) -> Normalizer:
    """Move the middle of positions by half a meter."""
    x, y, z = normalizer.position_offset
    return replace(normalizer, position_offset=(x + 0.5, y, z))


@pytest.mark.parametrize(
    ("change", "is_fault"),
    [(lambda normalizer: normalizer, False), (double_scale, True), (move_positions, True)],
    ids=["unchanged", "scale", "offset"],
)
def test_statistics_of_another_dataset_are_named(
    change: Callable[[Normalizer], Normalizer], is_fault: bool, tmp_path: Path
) -> None:
    store = make_training(tmp_path / "train")
    normalizer = change(Normalizer.fit([(store, 1.0)], "quantile"))

    result = WrongStatisticsCheck().examine(make_case(store, normalizer=normalizer))

    assert isinstance(result, Finding) == is_fault


class MemorizingPolicy(StandInPolicy):
    """Knows the actions of some episodes by heart, and guesses those of others."""

    answers: Mapping[bytes, Array]

    def infer_batch(self, observations: Sequence[Mapping[str, Any]]) -> list[dict[str, Array]]:
        guess = np.array([0.1, 0, 0, 1, 0, 0, 0, 1], np.float32)
        results = []
        for observation in observations:
            action = self.answers.get(observation["observation/state"].tobytes(), guess)
            results.append({"actions": action[None]})
        return results


def examine_overfitting(tmp_path: Path, num_known: int) -> Result:
    """Examine a policy that has learned 6 of 12 episodes, and knows the first ones by heart."""
    store = make_training(tmp_path / "train")
    folder = tmp_path / "policy"
    folder.mkdir()
    learned = " ".join(store.list_episode_fingerprints()[:6])
    write_provenance(folder, {"learned": learned})
    policy = MemorizingPolicy(Normalizer.fit([(store, 1.0)], "quantile"), folder=folder)
    answers = {}
    for index in range(num_known):
        episode = store.without_images(index)
        gripper = episode.gripper[:, None]
        states = np.hstack([episode.position, episode.rotation, gripper]).astype(np.float32)
        assert episode.action is not None
        answers.update(zip(map(bytes, states), episode.action, strict=True))
    policy.answers = answers
    case = PolicyCase(policy=cast(Spear1Policy, policy), training=store)
    return OverfittingCheck().examine(case)


def test_a_policy_that_knows_only_what_it_has_learned_overfits(tmp_path: Path) -> None:
    assert isinstance(examine_overfitting(tmp_path, num_known=6), Finding)


def test_a_policy_that_knows_other_episodes_too_does_not_overfit(tmp_path: Path) -> None:
    assert examine_overfitting(tmp_path, num_known=12) is None
