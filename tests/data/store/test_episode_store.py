"""The episode store: what goes in comes out, and what is broken is refused by name."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_tiny import assert_same, make_episode
from refusals import refuses
from spear.data.actions import add_actions
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.types import Episode


def make_random_episode(
    seed: int = 0, num_steps: int = 6, cameras: tuple[str, ...] = ("external", "wrist")
) -> Episode:
    """With images of random bytes, and random actions of which some are masked."""
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
    """Seven episodes of different lengths; some lack a camera, actions or an outcome."""
    episodes = [make_random_episode(number, num_steps=3 + number) for number in range(7)]
    episodes[2] = make_random_episode(2, cameras=("external",))
    episodes[4] = dataclasses.replace(episodes[4], action=None, success=None)
    return episodes


@pytest.fixture(scope="module")
def folder(episodes: list[Episode], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store written by two calls, of two shards and one."""
    folder = tmp_path_factory.mktemp("store")
    assert write_episodes(iter(episodes[:4]), folder, shard_size=3) == 4
    assert write_episodes(iter(episodes[4:]), folder, shard_size=3) == 3
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
        assert_same(add_actions(episode), stored_episode, 1e-7)


def test_a_store_knows_its_lengths_and_cameras(
    store: EpisodeStore, episodes: list[Episode]
) -> None:
    np.testing.assert_array_equal(store.lengths, [len(episode) for episode in episodes])
    assert store.cameras == ["external", "wrist"]


def test_single_images_are_read(store: EpisodeStore, episodes: list[Episode]) -> None:
    assert store.image(5, 4, "wrist") == episodes[5].images["wrist"][4]


@pytest.mark.parametrize("camera", ["wrist", "overhead"])
def test_an_image_of_an_absent_camera_is_none(store: EpisodeStore, camera: str) -> None:
    assert store.image(2, 1, camera) is None


def test_a_subset_has_its_episodes_in_its_order(
    store: EpisodeStore, episodes: list[Episode]
) -> None:
    subset = store.subset([6, 1])

    assert subset.source(0) == "test 6"
    assert subset.source(1) == "test 1"
    assert subset.image(0, 8, "external") == episodes[6].images["external"][8]


def test_an_episode_is_read_without_images(store: EpisodeStore, episodes: list[Episode]) -> None:
    episode = store.without_images(1)

    assert not episode.images
    np.testing.assert_array_equal(episode.position, episodes[1].position.astype(np.float32))


def test_an_episode_beyond_the_last_one_is_refused(store: EpisodeStore) -> None:
    with pytest.raises(IndexError):
        store[7]


def test_a_step_beyond_the_episode_is_not_the_next_episodes(store: EpisodeStore) -> None:
    with pytest.raises(IndexError):
        store.image(2, 6, "external")


GROWING_NORMS = np.eye(4)[[0] * 6] * np.linspace(1, 1.0011, 6)[:, None]
NAN_AT_STEP_4 = np.where(np.arange(18).reshape(6, 3) == 13, np.nan, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotation": GROWING_NORMS}, r"test 1 step 5: .*1\.001"),
        ({"instruction": " "}, "empty instruction"),
        ({"rate_hz": 0.0}, "bad rate"),
        ({"images": {}}, "no camera"),
        ({"images": {"external": [b"x"] * 5}}, "camera 'external' has 5 rows but there are 6"),
        ({"images": {"external": [b"x"] * 5 + [b""]}}, "empty image: test 1 step 5"),
        ({"gripper": np.full(6, 1.5)}, "out of range: test 1 step 0"),
        ({"rotation": np.zeros((6, 3))}, r"rotation is \(6, 3\), expected \(6, 4\)"),
        ({"position": np.zeros((0, 3))}, "empty episode"),
        ({"action_mask": np.ones(3, bool)}, "action_mask has 3 rows"),
        ({"position": NAN_AT_STEP_4}, "test 1 step 4: position"),
    ],
)
def test_a_bad_episode_is_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    bad_episode = dataclasses.replace(make_random_episode(1), **change)

    refuses(message, write_episodes, [make_random_episode(0), bad_episode], tmp_path)

    assert list(tmp_path.iterdir()) == []
