"""An episode store returns the episodes that were written, and refuses bad episodes by name."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_tiny import assert_same, make_episode
from refusals import refuses
from spear.data.actions import with_canonical_actions
from spear.data.store.episode_store import EpisodeStore, append_episodes
from spear.types import Episode


def make_random_episode(
    seed: int = 0, num_steps: int = 6, cameras: tuple[str, ...] = ("external", "wrist")
) -> Episode:
    """An episode with images of random bytes, and random actions of which some are masked."""
    rng = np.random.default_rng(seed)
    images: dict[str, list[bytes]] = {}
    for camera in cameras:
        images[camera] = [rng.bytes(int(rng.integers(5, 90))) for _ in range(num_steps)]
    action = np.zeros((num_steps, 8), np.float32)
    action[:, :3] = rng.normal(size=(num_steps, 3))
    action[:, 3] = 1
    action[:, 7] = rng.uniform(size=num_steps)
    return make_episode(
        seed,
        num_steps,
        images=images,
        source=f"test {seed}",
        action=action,
        action_mask=rng.uniform(size=num_steps) > 0.2,
        success=bool(seed % 2),
    )


@pytest.fixture(scope="module")
def episodes() -> list[Episode]:
    """Seven episodes of 3 to 9 steps.

    Episode 2 has 6 steps and no wrist camera. Episode 4 has no actions, and its outcome is unknown.
    """
    episodes = [make_random_episode(number, num_steps=3 + number) for number in range(7)]
    episodes[2] = make_random_episode(2, cameras=("external",))
    episodes[4] = dataclasses.replace(episodes[4], action=None, success=None)
    return episodes


@pytest.fixture(scope="module")
def folder(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that two calls wrote: four episodes in two shards, then three in one shard."""
    folder = tmp_path_factory.mktemp("store")
    assert append_episodes(iter(episodes[:4]), folder, shard_size=3) == 4
    assert append_episodes(iter(episodes[4:]), folder, shard_size=3) == 3
    return folder


@pytest.fixture
def store(folder: Path) -> EpisodeStore:
    return EpisodeStore(folder)


def test_each_call_adds_shards_of_two_files(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())

    assert names == [
        "episodes-00000.arrow",
        "episodes-00000.images",
        "episodes-00001.arrow",
        "episodes-00001.images",
        "episodes-00002.arrow",
        "episodes-00002.images",
    ]


def test_a_store_gives_back_the_episodes_with_canonical_actions(
    store: EpisodeStore, episodes: list[Episode]
) -> None:
    assert len(store) == 7
    for episode, stored_episode in zip(episodes, store, strict=True):
        assert_same(stored_episode, with_canonical_actions(episode), atol=1e-7)


def test_a_store_knows_its_lengths_and_cameras(
    store: EpisodeStore, episodes: list[Episode]
) -> None:
    np.testing.assert_array_equal(store.lengths, [len(episode) for episode in episodes])
    assert store.cameras == ["external", "wrist"]


def test_single_images_are_read(store: EpisodeStore, episodes: list[Episode]) -> None:
    image = store.image(index=5, step=4, camera="wrist")

    assert image == episodes[5].images["wrist"][4]


@pytest.mark.parametrize("camera", ["wrist", "overhead"])
def test_an_image_of_an_absent_camera_is_none(store: EpisodeStore, camera: str) -> None:
    """Episode 2 has no wrist camera, and no episode has an overhead camera."""
    assert store.image(index=2, step=1, camera=camera) is None


def test_a_subset_has_its_episodes_in_its_order(
    store: EpisodeStore, episodes: list[Episode]
) -> None:
    subset = store.subset([6, 1])

    assert subset.source(0) == "test 6"
    assert subset.source(1) == "test 1"
    image = subset.image(index=0, step=8, camera="external")
    assert image == episodes[6].images["external"][8]


def test_an_episode_is_read_without_images(store: EpisodeStore, episodes: list[Episode]) -> None:
    episode = store.without_images(1)

    assert not episode.images
    np.testing.assert_array_equal(episode.position, episodes[1].position.astype(np.float32))


def test_an_episode_beyond_the_last_one_is_refused(store: EpisodeStore) -> None:
    with pytest.raises(IndexError):
        store[7]


def test_a_step_beyond_the_episode_is_not_the_next_episodes(store: EpisodeStore) -> None:
    """Episode 2 has 6 steps."""
    with pytest.raises(IndexError):
        store.image(index=2, step=6, camera="external")


IDENTITY_QUATERNIONS = np.tile([1.0, 0, 0, 0], (6, 1))
GROWING_NORMS = IDENTITY_QUATERNIONS * np.linspace(1, 1.0011, 6)[:, None]
"""Quaternions [6, 4] of which only the last one has a norm further from 1 than the tolerance."""
NAN_AT_STEP_4 = np.zeros((6, 3))
NAN_AT_STEP_4[4, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),  # change: fields of the episode that replace its own
    [
        ({"rotation": GROWING_NORMS}, r"of test 1 is a quaternion of norm 1\.001 at step 5"),
        ({"instruction": " "}, "an empty instruction"),
        ({"rate_hz": 0.0}, "no rate"),
        ({"images": {}}, "no camera"),
        ({"images": {"external": [b"x"] * 5}}, "camera 'external' of test 1 has 5 rows, but"),
        ({"images": {"external": [b"x"] * 5 + [b""]}}, "test 1 has an empty image at step 5"),
        ({"gripper": np.full(6, 1.5)}, "gripper of test 1 is 1.5 at step 0"),
        ({"rotation": np.zeros((6, 3))}, r"the shape \(6, 3\), not \(6, 4\)"),
        ({"position": np.zeros((0, 3))}, "has no steps"),
        ({"action_mask": np.ones(3, bool)}, "action_mask of test 1 has 3 rows"),
        ({"position": NAN_AT_STEP_4}, "position of test 1 is NaN or infinite at step 4"),
    ],
)
def test_a_bad_episode_is_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    bad_episode = dataclasses.replace(make_random_episode(1), **change)

    refuses(message, append_episodes, [make_random_episode(0), bad_episode], tmp_path)

    assert list(tmp_path.iterdir()) == []
