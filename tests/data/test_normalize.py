"""Normalization is invertible, has statistics of the whole mixture, and does not amplify the noise
of axes that do not move. The sketches of quantiles keep to their error bound."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_tiny import make_episode, write_store
from refusals import refuses
from spear.data.normalize import STATE_VECTOR_DIM, Mode, Normalizer
from spear.data.store.episode_store import EpisodeStore, WeightedStore
from spear.data.store.stats import QuantileSketch
from spear.train.tasks import encode_robot_batch
from spear.types import Action

ZEROS = (0.0, 0.0, 0.0)
ONES = (1.0, 1.0, 1.0)


def make_normalizer(**fields: Any) -> Normalizer:
    """Statistics that change nothing, except for `fields`, which replace their own."""
    defaults = {
        "mode": "minmax",
        "translation_offset": ZEROS,
        "translation_scale": ONES,
        "position_offset": ZEROS,
        "position_scale": ONES,
        "samples": 1,
    }
    return Normalizer(**{**defaults, **fields})


def make_store(
    folder: Path, seed: int, spread: tuple[float, float, float], num_steps: int = 500
) -> EpisodeStore:
    """Make a store of one episode, in which every other step is masked.

    Translations of known actions are uniform in ± spread (m, per axis), and positions uniform from
    0 to spread. Translations of masked actions are 1000 m, which would be seen in any statistics.
    """
    rng = np.random.default_rng(seed)
    action = np.zeros((num_steps, 8), np.float32)
    action[:, :3] = rng.uniform(-1, 1, (num_steps, 3)) * spread
    action[:, 3] = 1
    is_known = np.arange(num_steps) % 2 == 0
    action[~is_known, :3] = 1000
    episode = make_episode(
        seed,
        num_steps,
        images={"external": [b"x"] * num_steps},
        position=rng.uniform(0, 1, (num_steps, 3)) * spread,
        gripper=np.ones(num_steps),
        action=action,
        action_mask=is_known,
    )
    return write_store([episode], folder)


def make_action(translation: np.ndarray) -> Action:
    """Actions with these translations [N, 3], without rotation, with closed gripper."""
    vector = torch.zeros(len(translation), 8, dtype=torch.float64)
    vector[:, :3] = torch.as_tensor(translation)
    vector[:, 3] = 1
    return Action.from_vector(vector)


@pytest.fixture
def flat_store(tmp_path: Path) -> EpisodeStore:
    """A store whose actions never move along z."""
    return make_store(tmp_path, seed=0, spread=(0.02, 0.05, 0.0))


def test_the_1st_and_99th_percentile_become_minus_one_and_one(flat_store: EpisodeStore) -> None:
    normalizer = Normalizer.fit([(flat_store, 1.0)])

    episode = flat_store[0]
    known_actions = episode.action[episode.action_mask].astype(np.float64)
    action = make_action(known_actions[:, :3])
    normalized = normalizer.normalize_action(action).translation.numpy()  # [250, 3]
    percentiles = np.quantile(normalized[:, :2], [0.01, 0.99], axis=0)  # of x and y
    np.testing.assert_allclose(percentiles, [[-1, -1], [1, 1]], atol=1e-5)
    np.testing.assert_array_equal(normalized[:, 2], 0)


def test_statistics_count_known_steps_only(flat_store: EpisodeStore) -> None:
    """Half of the 500 steps are known."""
    assert Normalizer.fit([(flat_store, 1.0)]).samples == 250


@pytest.fixture(params=sorted({*get_args(Mode)} - {"bounds"}))
def mode(request: pytest.FixtureRequest) -> Mode:
    """Each mode that has statistics in turn: a test that uses it runs for all of them."""
    return request.param


@pytest.fixture(params=[0.0, 1e-6, 3e-4])
def noise_m(request: pytest.FixtureRequest) -> float:
    """Each size of noise in turn."""
    return request.param


@pytest.fixture
def still_axis_normalizer(tmp_path: Path, mode: Mode, noise_m: float) -> Normalizer:
    """Statistics of actions and positions whose z is only noise.

    This z is scaled by the smallest scales: 1 mm for translations, 10 mm for positions.
    """
    store = make_store(tmp_path, seed=0, spread=(0.05, 0.05, noise_m))
    return Normalizer.fit([(store, 1.0)], mode)


def test_noise_of_an_axis_that_does_not_move_stays_small(
    still_axis_normalizer: Normalizer, noise_m: float
) -> None:
    action = make_action(np.array([[0, 0, noise_m]]))

    normalized = still_axis_normalizer.normalize_action(action)

    assert abs(normalized.translation[0, 2]) < 0.5  # 0.3 mm / 1 mm, and an offset near 0


def test_a_rare_jump_of_an_axis_that_does_not_move_stays_bounded(
    still_axis_normalizer: Normalizer,
) -> None:
    action = make_action(np.array([[0, 0, 0.02]]))

    normalized = still_axis_normalizer.normalize_action(action)

    assert abs(normalized.translation[0, 2]) < 21  # 20 mm / 1 mm, and an offset near 0


def test_what_a_network_predicts_for_an_axis_that_does_not_move_stays_small(
    still_axis_normalizer: Normalizer,
) -> None:
    predicted = make_action(np.full((1, 3), 0.1))

    action = still_axis_normalizer.unnormalize_action(predicted)

    assert abs(action.translation[0, 2]) < 2e-4  # 0.1 · 1 mm, and an offset near 0


def test_a_position_on_an_axis_that_does_not_move_stays_bounded(
    still_axis_normalizer: Normalizer,
) -> None:
    position = torch.tensor([[0.0, 0, 0.05]], dtype=torch.float64)
    rotation = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    gripper = torch.ones(1, 1, dtype=torch.float64)

    state = still_axis_normalizer.encode_state(position, rotation, gripper)

    assert abs(state[0, 2]) < 6  # 50 mm / 10 mm, and an offset near 0


def read_known_rows(store: EpisodeStore) -> np.ndarray:
    """Translation and position of the known steps of a store's first episode, [N, 6] m."""
    episode = store[0]
    rows = np.concatenate([episode.action[:, :3], episode.position], axis=1)
    return rows[episode.action_mask].astype(np.float64)


def compute_expected_bounds(mode: Mode, rows: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Compute what becomes -1 and 1, by NumPy's weighted statistics.

    Args:
        mode: The mode of normalization.
        rows: [N, 6] the numbers of all steps.
        shares: [N] the weight of each step, summing to 1.

    Returns:
        [2, 6] the lower and the upper bound of each axis.
    """
    if mode == "quantile":
        return np.quantile(rows, [0.01, 0.99], axis=0, weights=shares, method="inverted_cdf")
    if mode == "minmax":
        return np.stack([rows.min(0), rows.max(0)])
    mean = shares @ rows
    deviation = np.sqrt(shares @ (rows - mean) ** 2)
    return np.stack([mean - deviation, mean + deviation])


def test_a_dataset_counts_by_its_weight_not_by_its_size(tmp_path: Path, mode: Mode) -> None:
    """A short and a long dataset, of which every other step is known, have the weights 3 and 1."""
    short = make_store(tmp_path / "short", seed=400, spread=(0.1, 0.1, 0.1), num_steps=400)
    long = make_store(tmp_path / "long", seed=4000, spread=(0.01, 0.01, 0.01), num_steps=4000)

    normalizer = Normalizer.fit([(short, 3.0), (long, 1.0)], mode)

    rows = np.concatenate([read_known_rows(short), read_known_rows(long)])
    share_of_short_step = 0.75 / 200
    share_of_long_step = 0.25 / 2000
    shares = np.repeat([share_of_short_step, share_of_long_step], [200, 2000])
    low, high = compute_expected_bounds(mode, rows, shares)
    offset = [*normalizer.translation_offset, *normalizer.position_offset]
    scale = [*normalizer.translation_scale, *normalizer.position_scale]
    # NumPy takes weights only for quantiles that are not interpolated, so these differ a little.
    atol = 2e-3 if mode == "quantile" else 1e-6
    np.testing.assert_allclose(offset, (low + high) / 2, rtol=1e-5, atol=atol)
    np.testing.assert_allclose(scale, (high - low) / 2, rtol=1e-5, atol=atol)


@pytest.fixture
def small_store(tmp_path: Path) -> EpisodeStore:
    """A store with small motions."""
    return make_store(tmp_path / "small", seed=0, spread=(0.01, 0.01, 0.01))


@pytest.fixture
def large_store(tmp_path: Path) -> EpisodeStore:
    """A store with large motions."""
    return make_store(tmp_path / "large", seed=1, spread=(0.1, 0.1, 0.1))


@pytest.fixture
def per_dataset(small_store: EpisodeStore, large_store: EpisodeStore) -> Normalizer:
    """Statistics of both stores, each with its own."""
    return Normalizer.fit_per_dataset(
        [WeightedStore("small", small_store, 1.0), WeightedStore("large", large_store, 1.0)]
    )


def test_each_dataset_has_its_own_statistics(
    per_dataset: Normalizer, small_store: EpisodeStore, large_store: EpisodeStore
) -> None:
    """The weight of a dataset does not matter to its own statistics."""
    assert per_dataset.resolve_for_dataset("small") == Normalizer.fit([(small_store, 5.0)])
    assert per_dataset.resolve_for_dataset("large") == Normalizer.fit([(large_store, 5.0)])
    small_scale = per_dataset.resolve_for_dataset("small").translation_scale
    # The 1st and 99th percentile of a uniform distribution in ± 0.01 m are ± 0.0098 m.
    np.testing.assert_allclose(small_scale, 0.0098, rtol=0.05)


def test_statistics_per_dataset_include_those_of_the_mixture(
    per_dataset: Normalizer, small_store: EpisodeStore, large_store: EpisodeStore
) -> None:
    over_mixture = Normalizer.fit([(small_store, 1.0), (large_store, 1.0)])

    assert dataclasses.replace(per_dataset, datasets={}) == over_mixture


def test_statistics_of_a_mixture_are_those_of_any_dataset() -> None:
    normalizer = make_normalizer()

    assert normalizer.resolve_for_dataset(None) is normalizer


def test_statistics_are_saved_and_loaded(per_dataset: Normalizer, tmp_path: Path) -> None:
    per_dataset.save(tmp_path / "normalizer.json")

    assert Normalizer.load(tmp_path / "normalizer.json") == per_dataset


def test_the_dataset_must_be_named_if_there_are_several(per_dataset: Normalizer) -> None:
    refuses("which one the robot is like", per_dataset.resolve_for_dataset, None)


def test_an_unknown_dataset_is_refused_with_a_suggestion(per_dataset: Normalizer) -> None:
    refuses("Did you mean 'small'", per_dataset.resolve_for_dataset, "smal")


def test_datasets_of_the_same_name_are_refused(
    small_store: EpisodeStore, large_store: EpisodeStore
) -> None:
    sources = [WeightedStore("a", small_store, 1.0), WeightedStore("a", large_store, 1.0)]

    refuses("same name", Normalizer.fit_per_dataset, sources)


@pytest.fixture
def raw_batch() -> dict[str, Any]:
    """A batch of three samples, as `TrainingSamples.batch` makes it, of datasets 1, 0 and 1."""
    images = np.zeros((3, 2, 4, 3), np.uint8)
    images[:, 1, 3, 0] = 9  # the red of the last pixel
    return {
        "images": {"external": images},
        "views": {"wrist": np.array([True, False, True])},
        "position": np.ones((3, 3), np.float32),
        "rotation": np.tile(np.float32([1, 0, 0, 0]), (3, 1)),
        "gripper": np.ones(3, np.float32),
        "action": np.ones((3, 5, 8), np.float32),
        "action_mask": np.arange(5) < np.array([[5], [2], [1]]),
        "instruction": ["go"] * 3,
        "dataset": np.array([1, 0, 1]),
    }


@pytest.fixture
def encoded_batch(raw_batch: dict[str, Any]) -> dict[str, Any]:
    """The batch normalized by a scale of 2 m for dataset 0 and of 4 m for dataset 1."""
    twos = (2.0, 2.0, 2.0)
    fours = (4.0, 4.0, 4.0)
    first = make_normalizer(translation_scale=twos, position_scale=twos)
    second = make_normalizer(translation_scale=fours, position_scale=fours)
    normalizer = dataclasses.replace(first, datasets={"a": first, "b": second})
    stand_in_processor = SimpleNamespace(
        encode_instructions=lambda texts, cut: {"input_ids": torch.zeros(len(texts), 1)}
    )
    return encode_robot_batch(stand_in_processor, normalizer, raw_batch)


def test_training_rows_are_normalized_by_their_own_dataset(encoded_batch: dict[str, Any]) -> None:
    """All translations and positions were 1 m."""
    x_translation = encoded_batch["actions"][:, 2, 0]  # of the third action of each chunk
    y_position = encoded_batch["state"][:, 1]
    np.testing.assert_allclose(x_translation, [0.25, 0.5, 0.25])
    np.testing.assert_allclose(y_position, [0.25, 0.5, 0.25])


def test_training_images_have_their_channels_first(encoded_batch: dict[str, Any]) -> None:
    images = encoded_batch["pixel_values"]["external"]  # [batch, channel, height, width]

    assert images.shape == (3, 3, 2, 4)
    assert (images[:, 0, 1, 3] == 9).all()


def test_training_masks_stay_unchanged(
    encoded_batch: dict[str, Any], raw_batch: dict[str, Any]
) -> None:
    np.testing.assert_array_equal(encoded_batch["view_mask"]["wrist"], raw_batch["views"]["wrist"])
    np.testing.assert_array_equal(encoded_batch["action_mask"], raw_batch["action_mask"])


@pytest.mark.parametrize("seed", range(20))
def test_normalized_actions_come_back(seed: int) -> None:
    rng = np.random.default_rng(seed)
    offset = tuple(rng.uniform(-2, 2, 3))
    scale = tuple(rng.uniform(1e-3, 2, 3))
    normalizer = make_normalizer(translation_offset=offset, translation_scale=scale)
    gripper = torch.as_tensor(rng.uniform(size=(5, 1)))
    action = dataclasses.replace(make_action(rng.uniform(-2, 2, (5, 3))), gripper=gripper)

    normalized = normalizer.normalize_action(action)

    assert float(normalized.gripper.min()) >= -1
    assert float(normalized.gripper.max()) <= 1
    restored = normalizer.unnormalize_action(normalized).to_vector()
    torch.testing.assert_close(restored, action.to_vector(), atol=1e-12, rtol=0)


STATE_NORMALIZER = make_normalizer(position_offset=(0.1, 0.2, 0.3), position_scale=(0.5, 0.5, 2.0))
# Six equal positions, which are normalized to (1, 0, 0), and six equal openings.
STATE_POSITIONS = torch.tensor([0.6, 0.2, 0.3], dtype=torch.float64).expand(6, 3)
STATE_GRIPPERS = torch.full((6, 1), 0.25, dtype=torch.float64)


def test_the_state_vector_is_position_rotation_columns_and_gripper() -> None:
    rotation = Rotation.random(6, random_state=0)
    quaternion = torch.as_tensor(rotation.as_quat(scalar_first=True))

    state = STATE_NORMALIZER.encode_state(STATE_POSITIONS, quaternion, STATE_GRIPPERS)

    assert state.shape == (6, STATE_VECTOR_DIM)
    two_columns = rotation.as_matrix()[:, :, :2]  # [6, 3, 2]
    two_columns_in_order = np.moveaxis(two_columns, 2, 1).reshape(6, 6)
    np.testing.assert_allclose(state[:, :3], np.tile([1.0, 0, 0], (6, 1)), atol=1e-12)
    np.testing.assert_allclose(state[:, 3:9], two_columns_in_order, atol=1e-9)
    np.testing.assert_allclose(state[:, 9], -0.5)  # the opening 0.25 in -1 … 1


def test_the_state_vector_does_not_depend_on_the_sign_of_the_quaternion() -> None:
    rotation = Rotation.random(6, random_state=0)
    quaternion = torch.as_tensor(rotation.as_quat(scalar_first=True))

    state = STATE_NORMALIZER.encode_state(STATE_POSITIONS, quaternion, STATE_GRIPPERS)
    negated = STATE_NORMALIZER.encode_state(STATE_POSITIONS, -quaternion, STATE_GRIPPERS)

    torch.testing.assert_close(negated, state)


def test_missing_statistics_are_refused(tmp_path: Path) -> None:
    refuses("cannot be read", Normalizer.load, tmp_path / "normalizer.json")


@pytest.mark.parametrize(
    "text", ["{}", "not json", '{"mode": "quantile", "translation_offset": [1, 2]}', "[1]"]
)
def test_broken_statistics_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "normalizer.json"
    path.write_text(text)

    refuses(r"normalizer\.json", Normalizer.load, path)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_is_not_positive_is_refused(tmp_path: Path, scale: float) -> None:
    path = tmp_path / "normalizer.json"
    make_normalizer(position_scale=(1.0, 1.0, scale)).save(path)

    refuses("position_scale", Normalizer.load, path)


def test_an_unknown_mode_is_refused_with_a_suggestion(tmp_path: Path) -> None:
    store = make_store(tmp_path, seed=0, spread=(0.1, 0.1, 0.1), num_steps=10)

    refuses("Did you mean 'quantile'", Normalizer.fit, [(store, 1.0)], "quantiles")


def test_a_store_without_known_actions_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", seed=0, spread=(0.1, 0.1, 0.1), num_steps=10)
    masked_episode = dataclasses.replace(store[0], action_mask=np.zeros(10, bool))
    masked_store = write_store([masked_episode], tmp_path / "b")

    refuses("no valid action", Normalizer.fit, [(masked_store, 1.0)])


STREAMS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "sorted": lambda rng, count: np.sort(rng.normal(size=count)),
    "reversed": lambda rng, count: -np.arange(count, dtype=float),
    "few values": lambda rng, count: rng.integers(0, 3, count).astype(float),
    "heavy tails": lambda rng, count: rng.standard_cauchy(count),
}
"""Name of a distribution -> a function that draws `count` values from it."""
CAPACITY = 256  # of a buffer of the sketch
MAX_LEVELS = 6
"""A sketch of 6000 values has at most this many buffers. A seventh one begins when the sixth is
full, which takes at least 256 · 2^5 = 8192 values."""


@settings(max_examples=25)
@given(st.sampled_from(list(STREAMS)), st.integers(1, 6000), st.lists(st.floats(0, 1), max_size=5))
def test_the_sketch_keeps_moments_exact_and_ranks_within_the_bound(
    kind: str, count: int, cuts: list[float]
) -> None:
    """The values come in several pieces, which end at the fractions `cuts` of the stream."""
    values = STREAMS[kind](np.random.default_rng(0), count)
    sketch = QuantileSketch(CAPACITY)

    piece_ends = sorted(int(count * cut) for cut in cuts)
    for piece in np.split(values, piece_ends):
        sketch.add(piece)

    # The moments are exact, and the size is bounded.
    sketch_values, weights = sketch.get_values_and_weights()
    assert sketch.count == count
    assert weights.sum() == count
    assert len(sketch_values) <= MAX_LEVELS * CAPACITY
    assert sketch.low == values.min()
    assert sketch.high == values.max()
    mean_tolerance = 1e-9 * np.abs(values).max()
    assert sketch.mean == pytest.approx(values.mean(), rel=1e-9, abs=mean_tolerance)
    assert sketch.variance == pytest.approx(values.var(), rel=1e-6, abs=1e-12)

    # The rank of a probe is the fraction of values at or below it: by the sketch, where values have
    # weights, and by the values themselves.
    probes = np.quantile(values, np.linspace(0, 1, 41), method="inverted_cdf")
    order = np.argsort(sketch_values)
    cumulative_weights = np.concatenate([[0], np.cumsum(weights[order])])
    num_sketch_values_below = np.searchsorted(sketch_values[order], probes, side="right")
    ranks = cumulative_weights[num_sketch_values_below] / count
    num_values_below = np.searchsorted(np.sort(values), probes, side="right")
    expected_ranks = num_values_below / count
    max_rank_error = MAX_LEVELS / CAPACITY if count > CAPACITY else 0
    assert np.abs(ranks - expected_ranks).max() <= max_rank_error + 1e-12


@pytest.mark.parametrize("frames", [{}, {"droid": 2, "kuka": 1}])
def test_statistics_are_saved_with_the_frames_of_their_data(
    flat_store: EpisodeStore, tmp_path: Path, frames: dict[str, int]
) -> None:
    normalizer = dataclasses.replace(Normalizer.fit([(flat_store, 1.0)]), frames=frames)

    normalizer.save(tmp_path / "normalizer.json")

    assert Normalizer.load(tmp_path / "normalizer.json").frames == frames


def test_statistics_without_frames_are_saved_as_before(
    flat_store: EpisodeStore, tmp_path: Path
) -> None:
    """The file has no key "frames", so that it is the one that earlier versions wrote."""
    Normalizer.fit_per_dataset([WeightedStore("it", flat_store, 1.0)]).save(
        tmp_path / "normalizer.json"
    )

    assert "frames" not in (tmp_path / "normalizer.json").read_text()
