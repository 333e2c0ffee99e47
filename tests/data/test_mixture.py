"""Sampling: a pure function of (seed, step), by weight, never a masked first action."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data_tiny import make_episode, make_png, write_store
from refusals import refuses
from spear.data.actions import canonicalize_actions
from spear.data.mixture import Mixture, Sample, TrainingSamples, jitter_colors
from spear.data.store.episode_store import EpisodeStore
from spear.train import loop
from spear.types import Episode

VIEWS = {"external": (12, 16), "wrist": (6, 6)}
BATCH_SIZE = 64
MASKED_STEP = 2
WRIST_LEVEL = 200
NO_MOTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


def make_numbered_episode(name: str, number: int, has_wrist: bool, rate_hz: float) -> Episode:
    """Episode e, step t: image value 10 e + t, x = e + t / 100, action x = t; step 2 is masked."""
    num_steps = 5 + number
    steps = np.arange(num_steps)
    action = np.zeros((num_steps, 8), np.float32)
    action[:, 0] = steps
    action[:, 3] = 1
    action[:, 7] = steps % 2
    zeros = np.zeros(num_steps)
    images = {"external": [make_png(10 * number + step, 16, 12) for step in range(num_steps)]}
    if has_wrist:
        images["wrist"] = [make_png(WRIST_LEVEL, 8, 8)] * num_steps
    return make_episode(
        number,
        num_steps,
        images=images,
        position=np.stack([number + steps / 100, zeros, zeros], axis=1),
        action=action,
        action_mask=steps != MASKED_STEP,
        rate_hz=rate_hz,
        instruction=f"task {number}",
        source=f"{name} {number}",
    )


def make_store(
    folder: Path, name: str, num_episodes: int, has_wrist: bool, rate_hz: float = 5.0
) -> EpisodeStore:
    episodes = [
        make_numbered_episode(name, number, has_wrist, rate_hz) for number in range(num_episodes)
    ]
    return write_store(episodes, folder, shard_size=2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Dataset "a" has five episodes with a wrist camera, "b" has two without."""
    folder = tmp_path_factory.mktemp("mixture")
    a = make_store(folder / "a", "a", 5, has_wrist=True)
    b = make_store(folder / "b", "b", 2, has_wrist=False)
    return Mixture([("a", a, 3.0), ("b", b, 1.0)], seed=7)


@pytest.fixture(scope="module")
def batch(mixture: Mixture) -> dict[str, Any]:
    return TrainingSamples(mixture, VIEWS).batch(0, BATCH_SIZE)


@pytest.fixture(scope="module")
def episode_numbers(batch: dict[str, Any]) -> np.ndarray:
    """The episode of each sample of the batch, by its position."""
    return np.floor(batch["position"][:, 0] + 1e-4).astype(int)


@pytest.fixture(scope="module")
def step_numbers(batch: dict[str, Any], episode_numbers: np.ndarray) -> np.ndarray:
    """The step of each sample of the batch, by its position."""
    return np.rint((batch["position"][:, 0] - episode_numbers) * 100).astype(int)


def test_a_batch_has_the_documented_shapes(batch: dict[str, Any]) -> None:
    assert batch["images"]["external"].shape == (BATCH_SIZE, 12, 16, 3)
    assert batch["images"]["wrist"].shape == (BATCH_SIZE, 6, 6, 3)
    assert batch["action"].shape == (BATCH_SIZE, 5, 8)
    assert batch["action_mask"].shape == (BATCH_SIZE, 5)


def test_images_actions_and_instructions_are_of_the_same_step(
    batch: dict[str, Any], episode_numbers: np.ndarray, step_numbers: np.ndarray
) -> None:
    image_levels = batch["images"]["external"][:, 3, 4, 0]

    np.testing.assert_array_equal(image_levels, 10 * episode_numbers + step_numbers)
    np.testing.assert_array_equal(batch["action"][:, 0, 0], step_numbers)
    assert batch["instruction"] == [f"task {number}" for number in episode_numbers]


def test_a_camera_that_an_episode_lacks_is_black_and_masked(batch: dict[str, Any]) -> None:
    is_from_a = batch["dataset"] == 0
    wrist = batch["images"]["wrist"]

    assert 0 < is_from_a.sum() < BATCH_SIZE
    assert batch["views"]["external"].all()
    np.testing.assert_array_equal(batch["views"]["wrist"], is_from_a)
    assert (wrist[is_from_a, ..., 0] == WRIST_LEVEL).all()
    assert (wrist[~is_from_a] == 0).all()


def test_actions_from_the_first_masked_one_on_are_no_targets(
    batch: dict[str, Any], episode_numbers: np.ndarray, step_numbers: np.ndarray
) -> None:
    for number, step, mask in zip(episode_numbers, step_numbers, batch["action_mask"], strict=True):
        num_steps = 5 + number
        for offset in range(5):
            passes_masked_step = step <= MASKED_STEP <= step + offset
            assert mask[offset] == (step + offset < num_steps and not passes_masked_step)
    assert batch["action_mask"][:, 0].all()


@pytest.fixture(scope="module")
def drawn_samples(mixture: Mixture) -> list[Sample]:
    samples: list[Sample] = []
    for training_step in range(40):
        samples += mixture.draw(training_step, 100)
    return samples


def test_datasets_are_drawn_by_their_weights(drawn_samples: list[Sample]) -> None:
    share_of_a = np.mean([sample.dataset == 0 for sample in drawn_samples])

    assert share_of_a == pytest.approx(0.75, abs=0.027)  # 4 standard deviations


def test_every_valid_step_is_drawn_and_no_masked_one(
    mixture: Mixture, drawn_samples: list[Sample]
) -> None:
    distinct = {(sample.dataset, sample.episode, sample.step) for sample in drawn_samples}

    num_valid_in_a = 5 + 6 + 7 + 8 + 9 - 5
    num_valid_in_b = 5 + 6 - 2
    assert len(distinct) == len(mixture) == num_valid_in_a + num_valid_in_b
    assert all(step != MASKED_STEP for _, _, step in distinct)


def test_steps_of_a_dataset_are_drawn_uniformly(drawn_samples: list[Sample]) -> None:
    counts = Counter(
        (sample.episode, sample.step) for sample in drawn_samples if sample.dataset == 0
    )

    assert chisquare(list(counts.values())).pvalue > 0.001


def test_an_empty_mixture_is_refused() -> None:
    refuses("empty mixture", Mixture, [])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(mixture: Mixture, weight: float) -> None:
    refuses("bad weight", Mixture, [("a", mixture.stores[0], weight)])


def test_a_store_at_another_rate_is_refused(tmp_path: Path) -> None:
    fast = make_store(tmp_path / "fast", "fast", 1, has_wrist=False, rate_hz=10.0)

    refuses(r"wrong rate: dataset 'fast' \(fast 0\): 10 Hz", Mixture, [("fast", fast, 1.0)])


def draw_store(data: st.DataObject, lengths: list[int], folder: Path) -> EpisodeStore:
    """A store of episodes of these lengths with drawn masks, and one with a valid step."""
    episodes: list[Episode] = []
    for number, num_steps in enumerate(lengths):
        masks = st.lists(st.booleans(), min_size=num_steps, max_size=num_steps)
        mask = np.array(data.draw(masks))
        is_logged = data.draw(st.booleans())
        action = np.tile(NO_MOTION, (num_steps, 1)) if is_logged else None
        episodes.append(make_episode(number, num_steps, action=action, action_mask=mask))
    episodes.append(make_episode(len(lengths), 2))
    return write_store(episodes, folder, shard_size=2)


def assert_same_samples(samples: list[Sample], expected: list[Sample]) -> None:
    for sample, expected_sample in zip(samples, expected, strict=True):
        assert sample.dataset == expected_sample.dataset
        assert sample.episode == expected_sample.episode
        assert sample.step == expected_sample.step
        np.testing.assert_array_equal(sample.draws, expected_sample.draws)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=4), min_size=1, max_size=3),
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**40),
    batch_size=st.integers(1, 9),
    data=st.data(),
)
def test_the_order_depends_on_seed_and_step_alone(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[list[int]],
    seed: int,
    first: int,
    batch_size: int,
    data: st.DataObject,
) -> None:
    """Any number of workers, resumed anywhere, draw the same steps, all of them valid."""
    folder = tmp_path_factory.mktemp("mixture")
    sources: list[tuple[str, EpisodeStore, float]] = []
    for number, store_lengths in enumerate(lengths):
        store = draw_store(data, store_lengths, folder / str(number))
        sources.append((f"set {number}", store, data.draw(st.floats(0.01, 100))))
    training_steps = list(range(first, first + 6))

    mixture = Mixture(sources, seed)
    drawn = {step: mixture.draw(step, batch_size) for step in training_steps}

    for samples in drawn.values():
        for sample in samples:
            episode = sources[sample.dataset][1].without_images(sample.episode)
            _, is_known = canonicalize_actions(episode)
            assert is_known[sample.step]

    num_workers = data.draw(st.integers(1, 4))
    for worker in data.draw(st.permutations(range(num_workers))):
        workers_mixture = Mixture(sources, seed)
        for step in training_steps[worker::num_workers]:
            assert_same_samples(workers_mixture.draw(step, batch_size), drawn[step])

    resumed = Mixture(sources, seed)
    for step in training_steps:
        assert_same_samples(resumed.draw(step, batch_size), drawn[step])


def test_the_length_is_the_number_of_valid_steps(mixture: Mixture) -> None:
    num_valid = 0
    for store in mixture.stores:
        for index in range(len(store)):
            _, is_known = canonicalize_actions(store.without_images(index))
            num_valid += int(is_known.sum())

    assert len(mixture) == num_valid


def test_the_arrays_of_a_sample_are_those_of_its_step(mixture: Mixture) -> None:
    for sample in mixture.draw(5, BATCH_SIZE):
        episode = mixture.stores[sample.dataset].without_images(sample.episode)

        state, action, mask = mixture.read_arrays(sample, 5)

        np.testing.assert_array_equal(state[:3], episode.position[sample.step])
        np.testing.assert_array_equal(state[3:7], episode.rotation[sample.step])
        assert state[7] == episode.gripper[sample.step]
        assert action.shape == (5, 8)
        assert mask[0]


def test_loader_processes_change_nothing(mixture: Mixture) -> None:
    """The batches of the training loop, made by none, one or two processes, and resumed."""
    samples = TrainingSamples(mixture, VIEWS, augment=1.0)
    task = SimpleNamespace(batch=lambda step: samples.batch(step, 3))

    without_workers = list(loop.load_batches(task, 2, 7, 0))
    with_one = list(loop.load_batches(task, 2, 7, 1))
    with_two = list(loop.load_batches(task, 2, 7, 2))
    resumed = list(loop.load_batches(task, 2, 4, 2)) + list(loop.load_batches(task, 4, 7, 1))

    np.testing.assert_equal(with_one, without_workers)
    np.testing.assert_equal(with_two, without_workers)
    np.testing.assert_equal(resumed, without_workers)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(12, 32, slice(0, 12), slice(8, 24)), (18, 16, slice(3, 15), slice(0, 16))],
)
def test_jitter_leaves_the_bars_of_an_image_black(
    mixture: Mixture, height: int, width: int, rows: slice, columns: slice
) -> None:
    """A policy that acts sees black there, whatever the light."""
    views = {"external": (height, width)}

    plain = TrainingSamples(mixture, views, augment=0.0).batch(3, BATCH_SIZE)
    jittered = TrainingSamples(mixture, views, augment=1.0).batch(3, BATCH_SIZE)

    for index, sample in enumerate(mixture.draw(3, BATCH_SIZE)):
        picture = plain["images"]["external"][index, rows, columns]
        expected = np.zeros((height, width, 3), np.uint8)
        expected[rows, columns] = jitter_colors(picture, sample.draws, 1.0)
        np.testing.assert_array_equal(jittered["images"]["external"][index], expected)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (10, 11, 3)).astype(np.uint8)


def test_jitter_by_middle_draws_changes_nothing(noise: np.ndarray) -> None:
    np.testing.assert_array_equal(jitter_colors(noise, np.full(5, 0.5), 1.0), noise)


def test_jitter_makes_an_image_brighter_by_a_tenth_of_the_range(noise: np.ndarray) -> None:
    brighter = jitter_colors(noise, np.array([1, 0.5, 0.5, 0.5, 0.5]), 1.0)

    np.testing.assert_array_equal(brighter, np.clip(np.rint(noise + 25.5), 0, 255))


def test_jitter_changes_a_plain_image_everywhere_alike_and_within_bounds() -> None:
    draws = np.random.default_rng(1).random(5)

    jittered = jitter_colors(np.full((4, 4, 3), 100, np.uint8), draws, 1.0)

    assert (jittered == jittered[0, 0]).all()
    assert np.abs(jittered.astype(int) - 100).max() < 45
