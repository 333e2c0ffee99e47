"""Sampling: a pure function of (seed, step), by weight, never a masked first action."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data_tiny import make, png, stored
from refusals import refuses
from spear.data.actions import canonicalize_actions
from spear.data.mixture import Mixture, TrainingSamples, jitter_colors
from spear.data.store.episode_store import EpisodeStore
from spear.train import loop

VIEWS = {"external": (12, 16), "wrist": (6, 6)}


def make_store(
    folder: Path, name: str, episodes: int, wrist: bool, rate_hz: float = 5.0
) -> EpisodeStore:
    """Episode e, step t: image value 10 e + t, x = e + t / 100, action x = t; step 2 is masked."""
    made = []
    for e in range(episodes):
        steps = 5 + e
        action = np.zeros((steps, 8), np.float32)
        action[:, 0], action[:, 3], action[:, 7] = np.arange(steps), 1, np.arange(steps) % 2
        images = {"external": [png(10 * e + t, 16, 12) for t in range(steps)]}
        if wrist:
            images["wrist"] = [png(200, 8, 8)] * steps
        position = np.stack([e + np.arange(steps) / 100, np.zeros(steps), np.zeros(steps)], axis=1)
        parts = {"images": images, "position": position, "action": action, "rate_hz": rate_hz}
        parts |= {
            "action_mask": np.arange(steps) != 2,
            "instruction": f"task {e}",
            "source": f"{name} {e}",
        }
        made.append(make(e, steps, **parts))
    return stored(made, folder, shard_size=2)


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    a = make_store(tmp_path / "a", "a", 5, wrist=True)
    return Mixture(
        [("a", a, 3.0), ("b", make_store(tmp_path / "b", "b", 2, wrist=False), 1.0)], seed=7
    )


def test_a_batch_holds_what_the_episodes_hold(mixture: Mixture) -> None:
    batch = TrainingSamples(mixture, VIEWS).batch(0, 64)
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
    assert np.mean([s.dataset == 0 for s in drawn]) == pytest.approx(
        0.75, abs=0.027
    )  # 4 deviations
    seen = {(s.dataset, s.episode, s.step) for s in drawn}
    assert len(seen) == len(mixture) == (5 + 6 + 7 + 8 + 9 - 5) + (5 + 6 - 2)
    assert all(step != 2 for _, _, step in seen)
    assert (
        chisquare([*Counter((s.episode, s.step) for s in drawn if s.dataset == 0).values()]).pvalue
        > 0.001
    )


def test_bad_mixtures_are_refused(mixture: Mixture, tmp_path: Path) -> None:
    refuses("empty mixture", Mixture, [])
    for weight in (0.0, -1.0, float("nan")):
        refuses("bad weight", Mixture, [("a", mixture.stores[0], weight)])
    fast = make_store(tmp_path / "fast", "fast", 1, wrist=False, rate_hz=10.0)
    refuses(r"wrong rate: dataset 'fast' \(fast 0\): 10 Hz", Mixture, [("fast", fast, 1.0)])


@settings(max_examples=12)
@given(
    lengths=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    batch=st.integers(1, 9),
    data=st.data(),
)
def test_the_order_depends_on_seed_and_step_alone(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    seed: int,
    first: int,
    batch: int,
    data: st.DataObject,
) -> None:
    """Any worker, any process, any number of them, resumed anywhere: the same steps, all of them valid."""
    folder, sources = tmp_path_factory.mktemp("mixture"), []
    for number, episodes in enumerate(lengths):
        made = []
        for e, steps in enumerate(episodes):
            mask = np.array(data.draw(st.lists(st.booleans(), min_size=steps, max_size=steps)))
            logged = data.draw(st.booleans())
            action = (
                np.tile(np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32), (steps, 1))
                if logged
                else None
            )
            made.append(make(e, steps, action=action, action_mask=mask))
        made.append(make(len(episodes), 2))  # with a valid step
        store = stored(made, folder / str(number), shard_size=2)
        sources.append((f"set {number}", store, data.draw(st.floats(0.01, 100))))

    mixture, steps = Mixture(sources, seed), list(range(first, first + 6))
    order = [mixture.draw(step, batch) for step in steps]
    for sample in (sample for drawn in order for sample in drawn):
        episode = sources[sample.dataset][1].without_images(sample.episode)
        assert canonicalize_actions(episode)[1][sample.step]
        state, action, mask = mixture.read_arrays(sample, 5)
        seen = [getattr(episode, part)[sample.step] for part in ("position", "rotation", "gripper")]
        np.testing.assert_array_equal(state, np.hstack(seen))
        assert mask[0] and action.shape == (5, 8)
    whole = [store.without_images(e) for _, store, _ in sources for e in range(len(store))]
    assert len(mixture) == sum(int(canonicalize_actions(episode)[1].sum()) for episode in whole)

    workers = data.draw(st.integers(1, 4))
    found = {}
    for worker in data.draw(st.permutations(range(workers))):
        own = Mixture(sources, seed)  # what each of them has
        for step in steps[worker::workers]:
            found[step] = own.draw(step, batch)
    resumed = Mixture(sources, seed)
    for step, drawn in zip(steps, order, strict=True):
        for other in (found[step], resumed.draw(step, batch)):
            for a, b in zip(other, drawn, strict=True):
                assert (a.source, a.episode, a.step) == (b.source, b.episode, b.step)
                np.testing.assert_array_equal(a.draws, b.draws)


def test_loader_processes_change_nothing(mixture: Mixture) -> None:
    """The batches of the training loop, made by none, one or two processes, and from the middle on."""
    samples = TrainingSamples(mixture, VIEWS, augment=1.0)
    task = SimpleNamespace(batch=lambda step: samples.batch(step, 3))
    runs = [list(loop.load_batches(task, 2, 7, workers)) for workers in (0, 1, 2)]
    runs.append(list(loop.load_batches(task, 2, 4, 2)) + list(loop.load_batches(task, 4, 7, 1)))
    for other in runs[1:]:
        np.testing.assert_equal(other, runs[0])


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(12, 32, slice(0, 12), slice(8, 24)), (18, 16, slice(3, 15), slice(0, 16))],
)
def test_jitter_leaves_what_pads_an_image_black(
    mixture: Mixture, height: int, width: int, rows: slice, columns: slice
) -> None:
    """A policy that acts sees black there, whatever the light."""
    views = {"external": (height, width)}
    plain, jittered = (TrainingSamples(mixture, views, augment=a).batch(3, 64) for a in (0.0, 1.0))
    for i, sample in enumerate(mixture.draw(3, 64)):
        expected = np.zeros((height, width, 3), np.uint8)
        expected[rows, columns] = jitter_colors(
            plain["images"]["external"][i, rows, columns], sample.draws, 1.0
        )
        np.testing.assert_array_equal(jittered["images"]["external"][i], expected)


def test_jitter_is_photometric_and_bounded() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 11, 3)).astype(np.uint8)
    np.testing.assert_array_equal(jitter_colors(image, np.full(5, 0.5), 1.0), image)
    brighter = jitter_colors(image, np.array([1, 0.5, 0.5, 0.5, 0.5]), 1.0)
    np.testing.assert_array_equal(brighter, np.clip(np.rint(image + 25.5), 0, 255))
    flat = jitter_colors(np.full((4, 4, 3), 100, np.uint8), np.random.default_rng(1).random(5), 1.0)
    assert (flat == flat[0, 0]).all() and np.abs(flat.astype(int) - 100).max() < 45
