"""The episode store: what goes in comes out, and what is broken is refused by name."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_tiny import assert_same, make
from refusals import refuses
from spear.data.actions import add_actions
from spear.data.store.episode_store import EpisodeStore, write_episodes
from spear.types import Episode


def make_episode(
    seed: int = 0, steps: int = 6, cameras: tuple[str, ...] = ("external", "wrist")
) -> Episode:
    """With images of random bytes, and random actions of which some are masked."""
    rng = np.random.default_rng(seed)
    images = {
        camera: [rng.bytes(int(rng.integers(5, 90))) for _ in range(steps)] for camera in cameras
    }
    still = np.tile(np.float32([1, 0, 0, 0]), (steps, 1))
    action = np.hstack([rng.normal(size=(steps, 3)), still, rng.uniform(size=(steps, 1))]).astype(
        np.float32
    )
    known = {
        "action": action,
        "action_mask": rng.uniform(size=steps) > 0.2,
        "success": bool(seed % 2),
    }
    return make(seed, steps, images=images, source=f"test {seed}", **known)


def test_round_trip_over_shards_with_missing_parts(tmp_path: Path) -> None:
    episodes = [make_episode(i, steps=3 + i) for i in range(7)]
    episodes[2] = make_episode(2, cameras=("external",))
    episodes[4] = dataclasses.replace(episodes[4], action=None, success=None)
    assert write_episodes(iter(episodes[:4]), tmp_path, shard_size=3) == 4
    assert (
        write_episodes(iter(episodes[4:]), tmp_path, shard_size=3) == 3
    )  # a second call adds shards
    assert len(list(tmp_path.iterdir())) == 2 * 3  # numbers and images
    store = EpisodeStore(tmp_path)
    assert len(store) == 7 and store.cameras == ["external", "wrist"]
    np.testing.assert_array_equal(store.lengths, [len(e) for e in episodes])
    for before, after in zip(episodes, store, strict=True):
        assert_same(add_actions(before), after, 1e-7)
    assert store.image(5, 4, "wrist") == episodes[5].images["wrist"][4]
    assert store.image(2, 1, "wrist") is None and store.image(2, 1, "overhead") is None
    some = store.subset([6, 1])
    assert [some.source(i) for i in range(2)] == ["test 6", "test 1"]
    assert some.image(0, 8, "external") == episodes[6].images["external"][8]
    assert not some.without_images(1).images
    for beyond in (
        lambda: store[7],
        lambda: store.image(2, 6, "external"),
    ):  # not the next episode's
        with pytest.raises(IndexError):
            beyond()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rotation": np.eye(4)[[0] * 6] * np.linspace(1, 1.0011, 6)[:, None]},
            r"test 1 step 5: .*1\.001",
        ),
        ({"instruction": " "}, "empty instruction"),
        ({"rate_hz": 0.0}, "bad rate"),
        ({"images": {}}, "no camera"),
        ({"images": {"external": [b"x"] * 5}}, "camera 'external' has 5 rows but there are 6"),
        ({"images": {"external": [b"x"] * 5 + [b""]}}, "empty image: test 1 step 5"),
        ({"gripper": np.full(6, 1.5)}, "out of range: test 1 step 0"),
        ({"rotation": np.zeros((6, 3))}, r"rotation is \(6, 3\), expected \(6, 4\)"),
        ({"position": np.zeros((0, 3))}, "empty episode"),
        ({"action_mask": np.ones(3, bool)}, "action_mask has 3 rows"),
        (
            {"position": np.where(np.arange(18).reshape(6, 3) == 13, np.nan, 0)},
            "test 1 step 4: position",
        ),
    ],
)
def test_bad_episodes_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    bad = dataclasses.replace(make_episode(1), **change)
    refuses(message, write_episodes, [make_episode(0), bad], tmp_path)
    assert list(tmp_path.iterdir()) == []  # a failed write leaves nothing
