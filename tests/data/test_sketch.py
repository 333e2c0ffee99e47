"""Quantile sketches: the error in rank stays within its bound, however the stream is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spear.data.normalize import QuantileSketch, weighted_quantile

PROBES = np.linspace(0, 1, 41)


def worst_rank(sketch: QuantileSketch, values: np.ndarray) -> float:
    """By how much the rank of any value is off: the share at or below it, of the sketch and of the values."""
    kept, weights = sketch.weighted()
    order = np.argsort(kept)
    at = np.quantile(values, PROBES, method="inverted_cdf")
    below = np.concatenate([[0], np.cumsum(weights[order])])
    ranks = below[np.searchsorted(kept[order], at, side="right")] / sketch.count
    truth = np.searchsorted(np.sort(values), at, side="right") / len(values)
    return float(np.abs(ranks - truth).max())


def made(kind: str, count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": rng.normal(size=count),
        "sorted": np.sort(rng.normal(size=count)),
        "reversed": -np.arange(count, dtype=float),
        "few values": rng.integers(0, 3, count).astype(float),
        "heavy tails": rng.standard_cauchy(count),
    }
    return values[kind]


KINDS = st.sampled_from(["normal", "sorted", "reversed", "few values", "heavy tails"])


@settings(max_examples=25)
@given(KINDS, st.integers(1, 6000), st.integers(0, 9), st.lists(st.floats(0, 1), max_size=5))
def test_rank_error_is_within_the_bound(kind: str, count: int, seed: int, cuts: list[float]) -> None:
    values = made(kind, count, seed)
    pieces = np.split(values, sorted(int(c * count) for c in cuts))
    sketch = QuantileSketch(256)
    for piece in pieces:
        sketch.add(piece)
    assert sketch.count == count and sketch.weighted()[1].sum() == count
    assert worst_rank(sketch, values) <= sketch.rank_error + 1e-12
    assert sketch.rank_error <= 6 / 256
    assert (sketch.low, sketch.high) == (values.min(), values.max())
    assert sketch.mean == pytest.approx(values.mean(), rel=1e-9, abs=1e-9 * np.abs(values).max())
    assert sketch.squares / count == pytest.approx(values.var(), rel=1e-6, abs=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60), st.floats(0, 1), st.integers(0, 60))
def test_nothing_is_lost_while_it_fits(values: list[float], q: float, cut: int) -> None:
    sketch = QuantileSketch(64)
    sketch.add(np.array(values[:cut]))
    sketch.add(np.array(values[cut:]))
    assert sketch.rank_error == 0
    assert weighted_quantile(*sketch.weighted(), q) == pytest.approx(np.quantile(values, q), abs=1e-9)


def test_a_million_values_to_a_thousandth_of_rank_in_little_memory() -> None:
    values = np.random.default_rng(0).normal(size=1_000_000).astype(np.float32)
    sketch = QuantileSketch()
    for piece in np.array_split(values, 80):
        sketch.add(piece)
    assert sketch.rank_error <= 1e-3
    assert worst_rank(sketch, values) <= 1e-3
    assert len(sketch.weighted()[0]) < 130_000
    assert weighted_quantile(*sketch.weighted(), 0.99) == pytest.approx(np.quantile(values, 0.99), abs=0.01)
