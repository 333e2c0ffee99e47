"""Normalised units: invertible, global, and kind to axes that do not move."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from data_tiny import make, stored
from refusals import refuses
from spear.data.normalize import STATE_VECTOR_DIM, Mode, Normalizer
from spear.data.store.episode_store import EpisodeStore
from spear.data.store.stats import QuantileSketch
from spear.train.tasks import encode_robot_batch
from spear.types import Action


def make_store(
    folder: Path, seed: int, spread: tuple[float, float, float], steps: int = 500
) -> EpisodeStore:
    """One episode, its logged translations uniform in ± spread; every other step is masked and absurd."""
    rng, action = np.random.default_rng(seed), np.zeros((steps, 8), np.float32)
    action[:, :3] = rng.uniform(-1, 1, (steps, 3)) * spread
    action[:, 3] = 1
    valid = np.arange(steps) % 2 == 0
    action[~valid, :3] = 1000
    position = rng.uniform(0, 1, (steps, 3)) * spread
    parts = {
        "images": {"external": [b"x"] * steps},
        "position": position,
        "gripper": np.ones(steps),
    }
    return stored([make(seed, steps, action=action, action_mask=valid, **parts)], folder)


def test_statistics_mean_what_they_say(tmp_path: Path) -> None:
    store = make_store(tmp_path, 0, (0.02, 0.05, 0.0))
    normalizer = Normalizer.fit([(store, 1.0)])
    truth = store[0].action[store[0].action_mask][:, :3].astype(np.float64)
    normal = normalizer.normalize_action(as_action(truth)).translation.numpy()
    ends = np.quantile(normal, [0.01, 0.99], axis=0)
    np.testing.assert_allclose(ends[:, :2], [[-1, -1], [1, 1]], atol=1e-5)
    np.testing.assert_array_equal(normal[:, 2], 0)  # the axis that does not move
    assert normalizer.samples == 250


def as_action(translation: np.ndarray) -> Action:
    vector = torch.zeros(len(translation), 8, dtype=torch.float64)
    vector[:, :3], vector[:, 3] = torch.as_tensor(translation), 1
    return Action.from_vector(vector)


@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("noise", [0.0, 1e-6, 3e-4])
def test_an_axis_that_stands_still_stays_small(tmp_path: Path, mode: Mode, noise: float) -> None:
    """Normalised its noise and a rare jump stay small, and in metres what a network predicts for it."""
    normalizer = Normalizer.fit([(make_store(tmp_path, 0, (0.05, 0.05, noise)), 1.0)], mode)
    seen = normalizer.normalize_action(
        as_action(np.array([[0, 0, noise], [0, 0, 0.02]]))
    ).translation[:, 2]
    assert abs(seen[0]) < 0.5 and abs(seen[1]) < 21
    assert (
        abs(normalizer.unnormalize_action(as_action(np.full((1, 3), 0.1))).translation[0][2]) < 2e-4
    )
    still = torch.tensor([[0.0, 0, 0.05]], dtype=torch.float64)
    turn = torch.tensor([[1.0, 0, 0, 0]], dtype=torch.float64)
    assert abs(normalizer.state_vector(still, turn, turn[:, :1])[0, 2]) < 6


@pytest.mark.parametrize("mode", get_args(Mode))
def test_a_dataset_counts_by_its_weight_not_by_its_size(tmp_path: Path, mode: Mode) -> None:
    """Translations and positions, against NumPy's weighted statistics of all rows."""
    stores = [make_store(tmp_path / f"{n}", n, (s, s, s), n) for n, s in ((400, 0.1), (4000, 0.01))]
    normalizer = Normalizer.fit(zip(stores, (3.0, 1.0), strict=True), mode)
    known = [
        np.concatenate([s[0].action[:, :3], s[0].position], 1)[s[0].action_mask] for s in stores
    ]
    rows, share = (
        np.concatenate(known).astype(np.float64),
        np.repeat([0.75 / 200, 0.25 / 2000], [200, 2000]),
    )
    middle = share @ rows
    ends = {
        "quantile": np.quantile(rows, [0.01, 0.99], axis=0, weights=share, method="inverted_cdf"),
        "minmax": np.stack([rows.min(0), rows.max(0)]),
        "meanstd": middle + np.sqrt(share @ (rows - middle) ** 2) * [[-1], [1]],
    }[mode]
    offset = [*normalizer.translation_offset, *normalizer.position_offset]
    found = [offset, [*normalizer.translation_scale, *normalizer.position_scale]]
    atol = (
        2e-3 if mode == "quantile" else 1e-6
    )  # NumPy has weights for quantiles that are not interpolated
    np.testing.assert_allclose(
        found, [ends.mean(0), np.diff(ends, axis=0)[0] / 2], rtol=1e-5, atol=atol
    )


def test_each_dataset_by_itself_there_and_back(tmp_path: Path) -> None:
    small = make_store(tmp_path / "small", 0, (0.01, 0.01, 0.01))
    large = make_store(tmp_path / "large", 1, (0.1, 0.1, 0.1))
    Normalizer.fit_per_dataset([("small", small, 1.0), ("large", large, 1.0)]).save(
        tmp_path / "n.json"
    )
    both = Normalizer.load(tmp_path / "n.json")
    for name, store in (("small", small), ("large", large)):
        assert both.for_dataset(name) == Normalizer.fit([(store, 5.0)])
    np.testing.assert_allclose(both.for_dataset("small").translation_scale, 0.0098, rtol=0.05)
    refuses("say which one", both.for_dataset, None)
    refuses("did you mean 'small'", both.for_dataset, "smal")
    whole = Normalizer.fit([(small, 1.0), (large, 1.0)])
    assert dataclasses.replace(both, datasets={}) == whole and whole.for_dataset(None) is whole
    refuses("same name", Normalizer.fit_per_dataset, [("a", small, 1.0), ("a", large, 1.0)])


def test_training_rows_are_normalised_by_their_own_dataset() -> None:
    own = [Normalizer("minmax", (0.0,) * 3, (s,) * 3, (0.0,) * 3, (s,) * 3, 1) for s in (2.0, 4.0)]
    both = dataclasses.replace(own[0], datasets={"a": own[0], "b": own[1]})
    words = SimpleNamespace(
        encode_instructions=lambda texts, cut: {"input_ids": torch.zeros(len(texts), 1)}
    )
    image = np.zeros((3, 2, 4, 3), np.uint8)
    image[:, 1, 3, 0] = 9
    raw = {
        "images": {"external": image},
        "views": {"wrist": np.array([True, False, True])},
        "position": np.ones((3, 3), np.float32),
        "rotation": np.tile(np.float32([1, 0, 0, 0]), (3, 1)),
        "gripper": np.ones(3, np.float32),
        "action": np.ones((3, 5, 8), np.float32),
        "action_mask": np.arange(5) < np.array([[5], [2], [1]]),
        "instruction": ["go"] * 3,
        "dataset": np.array([1, 0, 1]),
    }
    batch = encode_robot_batch(words, both, raw)
    assert batch["pixel_values"]["external"].shape == (3, 3, 2, 4)
    assert (batch["pixel_values"]["external"][:, 0, 1, 3] == 9).all()
    np.testing.assert_allclose(batch["actions"][:, 2, 0], [0.25, 0.5, 0.25])
    np.testing.assert_allclose(batch["state"][:, 1], [0.25, 0.5, 0.25])
    np.testing.assert_array_equal(batch["view_mask"]["wrist"], raw["views"]["wrist"])
    np.testing.assert_array_equal(batch["action_mask"], raw["action_mask"])


def test_what_is_normalised_comes_back() -> None:
    rng = np.random.default_rng(0)
    for offset, scale in zip(
        rng.uniform(-2, 2, (20, 3)), rng.uniform(1e-3, 2, (20, 3)), strict=True
    ):
        normalizer = Normalizer("quantile", tuple(offset), tuple(scale), (0.0,) * 3, (1.0,) * 3, 1)
        action = as_action(rng.uniform(-2, 2, (5, 3)))
        action = dataclasses.replace(action, gripper=torch.rand(5, 1, dtype=torch.float64))
        normal = normalizer.normalize_action(action)
        assert float(normal.gripper.min()) >= -1 and float(normal.gripper.max()) <= 1
        back = normalizer.unnormalize_action(normal).to_vector()
        torch.testing.assert_close(back, action.to_vector(), atol=1e-12, rtol=0)


def test_state_vector_is_position_rotation_columns_and_gripper() -> None:
    normalizer = Normalizer("minmax", (0.0,) * 3, (1.0,) * 3, (0.1, 0.2, 0.3), (0.5, 0.5, 2.0), 1)
    rotation = Rotation.random(6, random_state=0)
    quaternion = torch.as_tensor(rotation.as_quat(scalar_first=True))
    position = torch.tensor([0.6, 0.2, 0.3], dtype=torch.float64).expand(6, 3)
    state = normalizer.state_vector(
        position, quaternion, torch.full((6, 1), 0.25, dtype=torch.float64)
    )
    assert state.shape == (6, STATE_VECTOR_DIM)
    np.testing.assert_allclose(state[:, :3], np.tile([1.0, 0, 0], (6, 1)), atol=1e-12)
    columns = np.moveaxis(rotation.as_matrix()[:, :, :2], 2, 1).reshape(6, 6)
    np.testing.assert_allclose(state[:, 3:9], columns, atol=1e-9)
    np.testing.assert_allclose(state[:, 9], -0.5)
    other = normalizer.state_vector(position, -quaternion, state[:, 9:])
    torch.testing.assert_close(other[:, :9], state[:, :9])


def test_bad_statistics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "normalizer.json"
    refuses("cannot read normalisation statistics", Normalizer.load, path)
    for text in ("{}", "not json", '{"mode": "quantile", "translation_offset": [1, 2]}', "[1]"):
        path.write_text(text)
        refuses(r"normalizer\.json", Normalizer.load, path)
    for scale in (0.0, -1.0, np.nan, np.inf):
        Normalizer("quantile", (0.0,) * 3, (1.0,) * 3, (0.0,) * 3, (1.0, 1.0, scale), 9).save(path)
        refuses("position_scale", Normalizer.load, path)
    store = make_store(tmp_path / "a", 0, (0.1, 0.1, 0.1), steps=10)
    refuses("did you mean 'quantile'", Normalizer.fit, [(store, 1.0)], "quantiles")
    masked = dataclasses.replace(store[0], action_mask=np.zeros(10, bool))
    refuses("nothing to fit", Normalizer.fit, [(stored([masked], tmp_path / "b"), 1.0)])


STREAMS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "normal": lambda rng, count: rng.normal(size=count),
    "sorted": lambda rng, count: np.sort(rng.normal(size=count)),
    "reversed": lambda rng, count: -np.arange(count, dtype=float),
    "few values": lambda rng, count: rng.integers(0, 3, count).astype(float),
    "heavy tails": lambda rng, count: rng.standard_cauchy(count),
}


@settings(max_examples=25)
@given(st.sampled_from(list(STREAMS)), st.integers(1, 6000), st.lists(st.floats(0, 1), max_size=5))
def test_rank_error_is_within_the_bound(kind: str, count: int, cuts: list[float]) -> None:
    values = STREAMS[kind](np.random.default_rng(0), count)
    sketch = QuantileSketch(256)
    for piece in np.split(values, sorted(int(c * count) for c in cuts)):
        sketch.add(piece)
    kept, weights = sketch.weighted()
    assert sketch.count == count and weights.sum() == count
    # The rank of a value: the share at or below it, of the sketch and of the values.
    order, at = np.argsort(kept), np.quantile(values, np.linspace(0, 1, 41), method="inverted_cdf")
    below = np.concatenate([[0], np.cumsum(weights[order])])
    ranks = below[np.searchsorted(kept[order], at, side="right")] / count
    off = np.abs(ranks - np.searchsorted(np.sort(values), at, side="right") / count)
    assert off.max() <= (6 / 256 if count > 256 else 0) + 1e-12
    assert len(kept) <= 6 * 256 and (sketch.low, sketch.high) == (values.min(), values.max())
    assert sketch.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9 * np.abs(values).max())
    assert sketch.squares / count == pytest.approx(values.var(), rel=1e-6, abs=1e-12)
