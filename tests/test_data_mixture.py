"""Sampling: a pure function of (seed, step), by weight, never a masked first action."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spear.data.episode import EpisodeStore, write_episodes
from spear.data.mixture import Mixture, TrainingSamples, split
from spear.errors import SpearError
from spear.types import Episode


def png(value: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size[::-1], (value, value // 2, 255 - value)).save(file, "PNG")
    return file.getvalue()


def make_store(folder: Path, name: str, episodes: int, wrist: bool, rate_hz: float = 5.0) -> EpisodeStore:
    """Episode e, step t: image value 10 e + t, x = e + t / 100, action x = t; step 2 is masked."""

    def make(e: int) -> Episode:
        steps = 5 + e
        action = np.zeros((steps, 8), np.float32)
        action[:, 0], action[:, 3], action[:, 7] = np.arange(steps), 1, np.arange(steps) % 2
        images = {"external": [png(10 * e + t, (12, 16)) for t in range(steps)]}
        if wrist:
            images["wrist"] = [png(200, (8, 8))] * steps
        position = np.stack([e + np.arange(steps) / 100, np.zeros(steps), np.zeros(steps)], axis=1)
        still = np.tile([0, 1, 0, 0], (steps, 1))
        mask = np.arange(steps) != 2
        gripper = np.full(steps, 0.5)
        return Episode(images, position, still, gripper, f"task {e}", rate_hz, f"{name} {e}", action, mask)

    write_episodes([make(e) for e in range(episodes)], folder, shard_size=2)
    return EpisodeStore(folder)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    a = make_store(tmp_path / "a", "a", 5, wrist=True)
    b = make_store(tmp_path / "b", "b", 2, wrist=False)
    return Mixture([("a", a, 3.0), ("b", b, 1.0)], seed=7)


def fit_by_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return image[:height, :width]


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, dict):
            assert_equal(value, b[key])
        else:
            np.testing.assert_array_equal(value, b[key])


VIEWS = {"external": (12, 16), "wrist": (6, 6)}


def test_a_batch_is_a_function_of_seed_and_step(mixture: Mixture) -> None:
    samples = TrainingSamples(mixture, VIEWS, fit_by_crop, augment=1.0)
    run = [samples.batch(step, 8) for step in range(6)]
    resumed = Mixture([("a", mixture.stores[0], 3.0), ("b", mixture.stores[1], 1.0)], seed=7)
    again = TrainingSamples(resumed, VIEWS, fit_by_crop, augment=1.0)
    for step in (5, 3, 4):  # any order: nothing is replayed
        assert_equal(again.batch(step, 8), run[step])
    other = Mixture([("a", mixture.stores[0], 3.0), ("b", mixture.stores[1], 1.0)], seed=8)
    assert [s.flat for s in other.draw(0, 64)] != [s.flat for s in mixture.draw(0, 64)]
    assert [s.flat for s in mixture.draw(1, 64)] != [s.flat for s in mixture.draw(0, 64)]


def test_a_batch_holds_what_the_episodes_hold(mixture: Mixture) -> None:
    batch = TrainingSamples(mixture, VIEWS, fit_by_crop).batch(0, 64)
    assert batch["images"]["external"].shape == (64, 12, 16, 3)
    assert batch["images"]["wrist"].shape == (64, 6, 6, 3)
    assert batch["action"].shape == (64, 5, 8) and batch["action_mask"].shape == (64, 5)
    episode = np.floor(batch["position"][:, 0] + 1e-4).astype(int)
    step = np.rint((batch["position"][:, 0] - episode) * 100).astype(int)
    np.testing.assert_array_equal(batch["images"]["external"][:, 3, 4, 0], 10 * episode + step)
    np.testing.assert_array_equal(batch["action"][:, 0, 0], step)
    assert batch["instruction"] == [f"task {e}" for e in episode]
    from_a = batch["dataset"] == 0
    assert 0 < from_a.sum() < 64 and batch["views"]["external"].all()
    np.testing.assert_array_equal(batch["views"]["wrist"], from_a)
    assert (batch["images"]["wrist"][from_a, ..., 0] == 200).all()
    assert (batch["images"]["wrist"][~from_a] == 0).all()
    for e, t, mask in zip(episode, step, batch["action_mask"], strict=True):
        targets = [t + h < 5 + e and 2 not in range(t, t + h + 1) for h in range(5)]
        np.testing.assert_array_equal(mask, targets)
    assert batch["action_mask"][:, 0].all()


def test_every_valid_step_is_drawn_and_weights_hold(mixture: Mixture) -> None:
    drawn = [s for step in range(40) for s in mixture.draw(step, 100)]
    share = np.mean([s.source == 0 for s in drawn])
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(drawn))
    seen = {(s.source, s.episode, s.step) for s in drawn}
    assert len(seen) == len(mixture) == (5 + 6 + 7 + 8 + 9 - 5) + (5 + 6 - 2)
    assert all(step != 2 for _, _, step in seen)
    counts = np.bincount([s.flat for s in drawn if s.source == 0])
    counts = counts[counts > 0]
    expected = counts.sum() / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 60  # chi-square, 29 degrees of freedom: p < 0.001


def test_bad_mixtures_are_refused(mixture: Mixture, tmp_path: Path) -> None:
    store = mixture.stores[0]
    with pytest.raises(SpearError, match="empty mixture"):
        Mixture([])
    for weight in (0.0, -1.0, float("nan")):
        with pytest.raises(SpearError, match="bad weight"):
            Mixture([("a", store, weight)])
    fast = make_store(tmp_path / "fast", "fast", 1, wrist=False, rate_hz=10.0)
    with pytest.raises(SpearError, match=r"wrong rate: dataset 'fast' \(fast 0\): 10 Hz"):
        Mixture([("fast", fast, 1.0)])


def test_split_is_disjoint_complete_and_stable(tmp_path: Path) -> None:
    make: Callable[[int], EpisodeStore] = lambda n: make_store(tmp_path / str(n), "x", n, wrist=False)  # noqa: E731
    train, held = split(make(20), 0.3)
    names = [[s.source(i) for i in range(len(s))] for s in (train, held)]
    assert len(held) > 0 and sorted(names[0] + names[1]) == sorted(f"x {i}" for i in range(20))
    _, held_of_more = split(make(24), 0.3)
    assert set(names[1]) <= {held_of_more.source(i) for i in range(len(held_of_more))}
    a, b = split(make(2), 0.01)
    assert len(a) == len(b) == 1
    with pytest.raises(SpearError, match="cannot split"):
        split(make(1), 0.5)
    with pytest.raises(SpearError, match="bad fraction"):
        split(train, 1.0)
