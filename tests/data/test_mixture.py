"""Samples depend only on (seed, training step), are drawn by the datasets' weights, and never begin
at a masked action."""

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
from spear.data.actions import get_or_derive_actions
from spear.data.mixture import Mixture, Sample, TrainingSamples, jitter_colors
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.train import loop
from spear.types import Episode

VIEWS = {"external": (12, 16), "wrist": (6, 6)}  # height, width in a batch
BATCH_SIZE = 64
MASKED_STEP = 2
WRIST_LEVEL = 200  # gray level of all wrist images
NO_MOTION = np.array([0, 0, 0, 1, 0, 0, 0, 1], np.float32)


def make_numbered_episode(name: str, number: int, has_wrist: bool, rate_hz: float) -> Episode:
    """An episode of which every part tells its number e and step t; step 2 is masked.

    It has 5 + e steps. Its external images have the gray level 10 e + t, its positions x = e + t /
    100, and its actions the translation x = t.
    """
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
    """A store of the numbered episodes 0, 1, … of a dataset."""
    episodes = [
        make_numbered_episode(name, number, has_wrist, rate_hz) for number in range(num_episodes)
    ]
    return write_store(episodes, folder, shard_size=2)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """Dataset "a" has the weight 3 and five episodes with a wrist camera.

    Dataset "b" has the weight 1 and two episodes without one.
    """
    folder = tmp_path_factory.mktemp("mixture")
    store_a = make_store(folder / "a", "a", num_episodes=5, has_wrist=True)
    store_b = make_store(folder / "b", "b", num_episodes=2, has_wrist=False)
    return Mixture([WeightedStore("a", store_a, 3.0), WeightedStore("b", store_b, 1.0)], seed=7)


@pytest.fixture(scope="module")
def batch(mixture: Mixture) -> dict[str, Any]:
    return TrainingSamples(mixture, VIEWS).batch(0, BATCH_SIZE)


@pytest.fixture(scope="module")
def episode_numbers(batch: dict[str, Any]) -> np.ndarray:
    """The number of the episode of each sample of the batch, from its position's x."""
    return np.floor(batch["position"][:, 0] + 1e-4).astype(int)


@pytest.fixture(scope="module")
def step_numbers(batch: dict[str, Any], episode_numbers: np.ndarray) -> np.ndarray:
    """The step of each sample of the batch, from its position's x."""
    return np.rint((batch["position"][:, 0] - episode_numbers) * 100).astype(int)


def test_a_batch_has_the_documented_shapes(batch: dict[str, Any]) -> None:
    assert batch["images"]["external"].shape == (BATCH_SIZE, 12, 16, 3)
    assert batch["images"]["wrist"].shape == (BATCH_SIZE, 6, 6, 3)
    assert batch["action"].shape == (BATCH_SIZE, 5, 8)
    assert batch["action_mask"].shape == (BATCH_SIZE, 5)


def test_images_actions_and_instructions_are_of_the_same_step(
    batch: dict[str, Any], episode_numbers: np.ndarray, step_numbers: np.ndarray
) -> None:
    image_levels = batch["images"]["external"][:, 3, 4, 0]  # of any one pixel
    first_x_translations = batch["action"][:, 0, 0]

    np.testing.assert_array_equal(image_levels, 10 * episode_numbers + step_numbers)
    np.testing.assert_array_equal(first_x_translations, step_numbers)
    assert batch["instruction"] == [f"task {number}" for number in episode_numbers]


def test_a_camera_that_an_episode_lacks_is_black_and_masked(batch: dict[str, Any]) -> None:
    """Only dataset "a" has a wrist camera. The batch has samples of both datasets."""
    is_from_a = batch["dataset"] == 0
    num_from_a = is_from_a.sum()
    wrist_images = batch["images"]["wrist"]

    assert num_from_a > 0
    assert num_from_a < BATCH_SIZE
    assert batch["views"]["external"].all()
    np.testing.assert_array_equal(batch["views"]["wrist"], is_from_a)
    assert (wrist_images[is_from_a, ..., 0] == WRIST_LEVEL).all()
    assert (wrist_images[~is_from_a] == 0).all()


def test_actions_from_the_first_masked_one_on_are_no_targets(
    batch: dict[str, Any], episode_numbers: np.ndarray, step_numbers: np.ndarray
) -> None:
    """Action `offset` of a chunk is of step `step + offset` of the episode."""
    for number, step, mask in zip(episode_numbers, step_numbers, batch["action_mask"], strict=True):
        num_steps = 5 + number
        for offset in range(5):
            is_in_episode = step + offset < num_steps
            is_at_or_behind_masked_step = step <= MASKED_STEP <= step + offset
            assert mask[offset] == (is_in_episode and not is_at_or_behind_masked_step)
    assert batch["action_mask"][:, 0].all()


@pytest.fixture(scope="module")
def drawn_samples(mixture: Mixture) -> list[Sample]:
    """4000 samples of the mixture."""
    samples: list[Sample] = []
    for training_step in range(40):
        samples += mixture.sample(training_step, 100)
    return samples


def test_datasets_are_drawn_by_their_weights(drawn_samples: list[Sample]) -> None:
    share_of_a = np.mean([sample.dataset == 0 for sample in drawn_samples])

    # The tolerance is 4 standard deviations of the share of 4000 samples.
    assert share_of_a == pytest.approx(0.75, abs=0.027)


def test_every_valid_step_is_drawn_and_no_masked_one(
    mixture: Mixture, drawn_samples: list[Sample]
) -> None:
    """Each episode has one masked step."""
    drawn_steps = {(sample.dataset, sample.episode, sample.step) for sample in drawn_samples}

    num_valid_in_a = 5 + 6 + 7 + 8 + 9 - 5
    num_valid_in_b = 5 + 6 - 2
    assert len(mixture) == num_valid_in_a + num_valid_in_b
    assert len(drawn_steps) == len(mixture)
    assert all(step != MASKED_STEP for _, _, step in drawn_steps)


def test_steps_of_a_dataset_are_drawn_uniformly(drawn_samples: list[Sample]) -> None:
    counts = Counter(
        (sample.episode, sample.step) for sample in drawn_samples if sample.dataset == 0
    )

    # Uniform draws would fail this test in one of a thousand cases; the seed is fixed.
    assert chisquare(list(counts.values())).pvalue > 0.001


def test_an_empty_mixture_is_refused() -> None:
    refuses("mixture is empty", Mixture, [])


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_a_weight_that_is_not_positive_is_refused(mixture: Mixture, weight: float) -> None:
    refuses("the sampling weight", Mixture, [WeightedStore("a", mixture.stores[0], weight)])


def test_a_store_at_another_rate_is_refused(tmp_path: Path) -> None:
    fast_store = make_store(
        tmp_path / "fast", "fast", num_episodes=1, has_wrist=False, rate_hz=10.0
    )

    message = r"dataset 'fast' \(fast 0\) has 10 Hz"
    refuses(message, Mixture, [WeightedStore("fast", fast_store, 1.0)])


def draw_store(data: st.DataObject, lengths: list[int], folder: Path) -> EpisodeStore:
    """Make a store of episodes of these lengths, whose masks hypothesis draws.

    Some episodes have logged actions. One more episode is not masked, so that the store has a valid
    step.
    """
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
    """One process, several workers and a resumed run draw the same samples of each training step.

    All samples begin at a valid step.

    Args:
        tmp_path_factory: Makes folders for the stores.
        lengths: For each dataset, the lengths of its episodes.
        seed: The seed of the mixture.
        first: The first of six training steps.
        batch_size: The number of samples of a training step.
        data: Draws further values.
    """
    folder = tmp_path_factory.mktemp("mixture")
    sources: list[WeightedStore] = []
    for number, store_lengths in enumerate(lengths):
        store = draw_store(data, store_lengths, folder / str(number))
        sources.append(WeightedStore(f"set {number}", store, data.draw(st.floats(0.01, 100))))
    training_steps = list(range(first, first + 6))

    mixture = Mixture(sources, seed)
    drawn = {step: mixture.sample(step, batch_size) for step in training_steps}

    for samples in drawn.values():
        for sample in samples:
            episode = sources[sample.dataset].store.without_images(sample.episode)
            _, is_known = get_or_derive_actions(episode)
            assert is_known[sample.step]

    # Worker w of n draws every n-th training step from w on. The workers run in any order.
    num_workers = data.draw(st.integers(1, 4))
    for worker in data.draw(st.permutations(range(num_workers))):
        mixture_of_worker = Mixture(sources, seed)
        for step in training_steps[worker::num_workers]:
            assert_same_samples(mixture_of_worker.sample(step, batch_size), drawn[step])

    resumed_mixture = Mixture(sources, seed)
    for step in training_steps:
        assert_same_samples(resumed_mixture.sample(step, batch_size), drawn[step])


def test_the_length_is_the_number_of_valid_steps(mixture: Mixture) -> None:
    num_valid = 0
    for store in mixture.stores:
        for index in range(len(store)):
            _, is_known = get_or_derive_actions(store.without_images(index))
            num_valid += int(is_known.sum())

    assert len(mixture) == num_valid


def test_the_arrays_of_a_sample_are_those_of_its_step(mixture: Mixture) -> None:
    for sample in mixture.sample(training_step=5, batch_size=BATCH_SIZE):
        episode = mixture.stores[sample.dataset].without_images(sample.episode)

        state, action, mask = mixture.read_state_and_chunk(sample, horizon=5)

        np.testing.assert_array_equal(state[:3], episode.position[sample.step])
        np.testing.assert_array_equal(state[3:7], episode.rotation[sample.step])
        assert state[7] == episode.gripper[sample.step]
        assert action.shape == (5, 8)
        assert mask[0]


def test_loader_processes_change_nothing(mixture: Mixture) -> None:
    """The training loop gets the same batches of steps 2 to 6 from any number of processes."""
    samples = TrainingSamples(mixture, VIEWS, augment=1.0)
    stand_in_task = SimpleNamespace(batch=lambda step: samples.batch(step, batch_size=3))

    def load_batches(first: int, end: int, num_workers: int) -> list[Any]:
        return list(loop.load_pieces(stand_in_task, first, end, num_workers))

    without_workers = load_batches(2, 7, num_workers=0)
    with_one_worker = load_batches(2, 7, num_workers=1)
    with_two_workers = load_batches(2, 7, num_workers=2)
    resumed_at_4 = load_batches(2, 4, num_workers=2) + load_batches(4, 7, num_workers=1)

    np.testing.assert_equal(with_one_worker, without_workers)
    np.testing.assert_equal(with_two_workers, without_workers)
    np.testing.assert_equal(resumed_at_4, without_workers)


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(12, 32, slice(0, 12), slice(8, 24)), (18, 16, slice(3, 15), slice(0, 16))],
)
def test_jitter_leaves_the_bars_of_an_image_black(
    mixture: Mixture, height: int, width: int, rows: slice, columns: slice
) -> None:
    """A policy sees black bars when it acts, whatever the light.

    Images of 12 x 16 pixels get bars at their sides, or above and below. `rows` and `columns` are
    those of the picture between the bars.
    """
    views = {"external": (height, width)}

    plain = TrainingSamples(mixture, views, augment=0.0).batch(3, BATCH_SIZE)
    jittered = TrainingSamples(mixture, views, augment=1.0).batch(3, BATCH_SIZE)

    for index, sample in enumerate(mixture.sample(3, BATCH_SIZE)):
        picture = plain["images"]["external"][index, rows, columns]
        expected = np.zeros((height, width, 3), np.uint8)
        expected[rows, columns] = jitter_colors(picture, sample.draws, strength=1.0)
        np.testing.assert_array_equal(jittered["images"]["external"][index], expected)


@pytest.fixture
def noise() -> np.ndarray:
    """An image of random pixels."""
    return np.random.default_rng(0).integers(0, 256, (10, 11, 3)).astype(np.uint8)


def test_jitter_by_middle_draws_changes_nothing(noise: np.ndarray) -> None:
    jittered = jitter_colors(noise, np.full(5, 0.5), strength=1.0)

    np.testing.assert_array_equal(jittered, noise)


def test_jitter_makes_an_image_brighter_by_a_tenth_of_the_range(noise: np.ndarray) -> None:
    """The first of the five draws changes the brightness."""
    brighter = jitter_colors(noise, np.array([1, 0.5, 0.5, 0.5, 0.5]), strength=1.0)

    np.testing.assert_array_equal(brighter, np.clip(np.rint(noise + 25.5), 0, 255))


def test_jitter_changes_a_plain_image_everywhere_alike_and_within_bounds() -> None:
    """Brightness changes by up to 25.5 levels, contrast by 5.6, and a gain then by 5 %."""
    draws = np.random.default_rng(1).random(5)

    jittered = jitter_colors(np.full((4, 4, 3), 100, np.uint8), draws, strength=1.0)

    assert (jittered == jittered[0, 0]).all()
    # Together less than 38 levels, because 5 % of 131 are 7.
    assert np.abs(jittered.astype(int) - 100).max() < 45
