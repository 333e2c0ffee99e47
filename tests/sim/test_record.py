"""Demonstrations: whole, masked where disturbed, and the same however many processes make them."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial.transform import Rotation

from data_tiny import assert_same
from spear.sim.record import Disturbance, InterveningPolicy, record_episode, record_episodes
from spear.sim.render import Renderer
from spear.sim.scene import FAMILIES
from spear.util.held_out import FIRST_TRAIN_SEED

SIZES = (96, 72), (48, 48)
NOTHING = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


def test_commands_are_what_the_poses_then_do(renderer: Renderer) -> None:
    episode = record_episode("spoon_on_towel", FIRST_TRAIN_SEED + 1, *SIZES, Disturbance(start=0))
    assert episode.success and episode.rate_hz == 5
    for name, size in zip(("external", "wrist"), SIZES, strict=True):
        assert len(episode.images[name]) == len(episode)
        assert Image.open(io.BytesIO(episode.images[name][-1])).size == size
    assert episode.action is not None and episode.action.shape == (len(episode), 8)
    assert episode.action_mask is not None and episode.action_mask.all()
    error = np.linalg.norm(np.diff(episode.position, axis=0) - episode.action[:-1, :3], axis=1)
    assert np.median(error) < 1e-3 and np.quantile(error, 0.9) < 5e-3
    poses = Rotation.from_quat(episode.rotation, scalar_first=True)
    wanted = Rotation.from_quat(episode.action[:-1, 3:7], scalar_first=True)
    assert np.median((wanted.inv() * poses[:-1].inv() * poses[1:]).magnitude()) < np.radians(0.5)


def test_disturbed_steps_are_masked_and_recovered_from(renderer: Renderer) -> None:
    tasks = [(family, FIRST_TRAIN_SEED + seed) for family in FAMILIES for seed in range(2)]
    episodes = [record_episode(*task, *SIZES, Disturbance(start=0.15)) for task in tasks]
    masks = np.concatenate([episode.action_mask for episode in episodes])
    assert 0.03 < (~masks).mean() < 0.4
    assert sum(bool(episode.success) for episode in episodes) >= len(episodes) - 1
    actions = np.concatenate([episode.action for episode in episodes])
    assert np.linalg.norm(actions[masks, :3], axis=1).max() < 0.0601
    # the gripper turns all along, near the object as well: there alone the wrist camera shows by how much
    turns = 2 * np.arccos(np.clip(actions[:, 3], -1, 1))
    late = np.concatenate([np.arange(len(episode)) >= 5 for episode in episodes])
    assert (turns[masks & late] > np.radians(5)).mean() > 0.2 and turns[masks].max() < np.radians(
        8.1
    )


def test_processes_share_the_work_without_changing_it(renderer: Renderer) -> None:
    tasks = [("stack_cube", FIRST_TRAIN_SEED), ("put_in_basket", FIRST_TRAIN_SEED + 3)]
    one = list(record_episodes(tasks, *SIZES, workers=1))
    two = list(record_episodes(tasks, *SIZES, workers=2))
    assert [episode.source for episode in one] == [f"sim/{family}/{seed}" for family, seed in tasks]
    for a, b in zip(
        [*one, record_episode("stack_cube", FIRST_TRAIN_SEED, *SIZES)], [*two, one[0]], strict=True
    ):
        assert_same(a, b)


def test_a_policy_takes_turns_and_is_never_a_target(renderer: Renderer) -> None:
    seeds = []

    def stay(
        folder: Path, observation: Mapping[str, Any], seed: int, step: int
    ) -> NDArray[np.float32]:
        assert folder == Path("weights") and observation["observation/image"].shape == (72, 96, 3)
        seeds.append((seed, step))
        return NOTHING

    episode = record_episode(
        "stack_cube", FIRST_TRAIN_SEED + 2, *SIZES, policy=InterveningPolicy(Path("weights"), stay)
    )
    assert episode.action is not None and episode.action_mask is not None and episode.success
    stayed = (episode.action == NOTHING).all(axis=1)
    assert (stayed == ~episode.action_mask).all() and 0.1 < stayed.mean() < 0.9
    assert len(set(seeds)) == stayed.sum()
    assert episode.source != record_episode("stack_cube", FIRST_TRAIN_SEED + 2, *SIZES).source
