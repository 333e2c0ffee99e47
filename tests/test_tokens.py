"""3D tokens: equal use, round trips, bad values, and their place in a tokenizer and an embedding table."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from refusals import refuses
from spear.tokens import (
    NUM_BINS,
    TOKEN_FORMAT,
    CoordinateTokenizer,
    extend_tokenizer,
    init_new_embeddings,
)


def coordinates(n: int, seed: int) -> np.ndarray:
    """Camera-frame coordinates as labels have them: mostly around 0, depth skewed, metres."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(0, 0.3, 2 * n), rng.lognormal(0.2, 0.4, n)])


@pytest.fixture(scope="module")
def tokenizer() -> CoordinateTokenizer:
    return CoordinateTokenizer.fit(coordinates(100_000, seed=0))


def test_token_use_is_uniform_on_held_out_data(tokenizer: CoordinateTokenizer) -> None:
    held_out = coordinates(100_000, seed=1)
    counts = np.bincount(tokenizer.encode(held_out), minlength=NUM_BINS)
    expected = len(held_out) / NUM_BINS
    # Both the edges and the counts are samples of n values: the variance of a count is twice Poisson's.
    deviation = (counts - expected) / math.sqrt(2 * expected)
    assert abs(float(deviation.std()) - 1) < 0.1 and float(np.abs(deviation).max()) < 5
    assert tokenizer.num_bins == NUM_BINS


def test_decoding_lands_inside_the_bin(tokenizer: CoordinateTokenizer) -> None:
    x = coordinates(10_000, seed=2).clip(tokenizer.bin_edges[0], tokenizer.bin_edges[-1])
    ids = tokenizer.encode(x)
    decoded = tokenizer.decode(ids)
    assert (tokenizer.bin_edges[ids] <= decoded).all() and (
        decoded < tokenizer.bin_edges[ids + 1]
    ).all()
    assert (tokenizer.bin_edges[ids] <= x).all() and (x <= tokenizer.bin_edges[ids + 1]).all()
    assert (tokenizer.encode(decoded) == ids).all()
    assert (tokenizer.encode(tokenizer.decode(np.arange(NUM_BINS))) == np.arange(NUM_BINS)).all()


def test_a_representative_is_the_median_of_its_bin_and_values_out_of_range_clamp() -> None:
    fitted = CoordinateTokenizer.fit(np.array([0.0, 1, 1.5, 2, 3, 10, 11, 20, 29, 40]), bins=2)
    assert fitted.bin_edges.tolist() == [0, 6.5, 40] and fitted.bin_centers.tolist() == [1.5, 20]
    fitted = CoordinateTokenizer.fit(np.linspace(-1, 1, 5000))
    assert fitted.encode(np.array([-1.0, 0, 1.0])).tolist()[::2] == [0, NUM_BINS - 1]
    assert fitted.encode([[-1.001, -math.inf], [0.0, 2]]).tolist()[0] == [0, 0]
    assert fitted.encode(0.25).shape == () and fitted.encode(np.zeros((0, 3))).shape == (0, 3)


def test_bad_values_are_refused(tokenizer: CoordinateTokenizer) -> None:
    refuses("NaN", tokenizer.encode, np.array([0.1, math.nan]))
    for bad in (math.nan, math.inf):
        refuses("NaN or infinite", CoordinateTokenizer.fit, [0.0, 1.0, bad])
    refuses(
        "'unifrom': did you mean 'uniform'", CoordinateTokenizer.fit, [0.0, 1.0], spacing="unifrom"
    )
    for few in ([], [2.0], [2.0, 2.0, 2.0]):
        refuses("at least 2", CoordinateTokenizer.fit, few)
    for ids in ([-1], [0, NUM_BINS]):
        refuses("1023", tokenizer.decode, ids)


@given(
    hnp.arrays(
        np.float64,
        st.integers(2, 40),
        elements=st.one_of(st.sampled_from([0.0, 0.1, 0.25, -3.0]), st.floats(-1e3, 1e3)),
    ),
    st.integers(1, 64),
)
def test_any_values_with_ties_give_increasing_edges(values: np.ndarray, bins: int) -> None:
    if len(np.unique(values)) < 2:
        return
    fitted = CoordinateTokenizer.fit(values, bins)
    assert (np.diff(fitted.bin_edges) > 0).all()
    assert (fitted.encode(fitted.decode(np.arange(bins))) == np.arange(bins)).all()
    order = np.sort(values)
    assert (np.diff(fitted.encode(order)) >= 0).all()
    assert fitted.bin_edges[0] <= order[0] and order[-1] <= fitted.bin_edges[-1]


def test_repeated_values_count_as_often_as_they_occur() -> None:
    values = np.random.default_rng(0).normal(size=20_000).round(1)
    for i, edge in enumerate(CoordinateTokenizer.fit(values, bins=64).bin_edges[1:-1], start=1):
        # The tick that the edge was spread below holds the i-th share of the values.
        tick = np.ceil(edge * 10 - 1e-9) / 10
        assert (
            (values < tick - 0.01).mean() - 0.01 <= i / 64 <= (values < tick + 0.01).mean() + 0.01
        )


def test_saving_and_loading_is_exact(tokenizer: CoordinateTokenizer, tmp_path: Path) -> None:
    fitted = CoordinateTokenizer.fit(coordinates(2000, seed=3), unit="relative")
    path = tmp_path / "coordinates.json"
    fitted.save(path)
    loaded = CoordinateTokenizer.load(path)
    assert loaded.bin_edges.tobytes() == fitted.bin_edges.tobytes()
    assert loaded.bin_centers.tobytes() == fitted.bin_centers.tobytes()
    assert loaded.unit == "relative" and tokenizer.unit == "metre"
    assert [p.name for p in tmp_path.iterdir()] == ["coordinates.json"]


def test_bad_files_are_one_clear_line(tokenizer: CoordinateTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "coordinates.json"
    refuses(r"coordinates\.json", CoordinateTokenizer.load, path)
    tokenizer.save(path)
    good = json.loads(path.read_text())
    for text in (
        "{",
        "[]",
        json.dumps({k: v for k, v in good.items() if k != "edges"}),
        json.dumps(good | {"edges": good["edges"][::-1]}),
        json.dumps(good | {"representatives": good["representatives"][1:]}),
        json.dumps(good | {"unit": "inch"}),
        json.dumps(good | {"edges": [math.nan] * (NUM_BINS + 1)}),
        json.dumps(good | {"edges": [*good["edges"][:-1], math.inf]}),
        json.dumps(good | {"edges": [0.0], "representatives": []}),
        json.dumps(good | {"edges": [good["edges"]], "representatives": [[]]}),
    ):
        path.write_text(text)
        refuses(r"coordinates\.json", CoordinateTokenizer.load, path)


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "the", "mug", "is", "at", "and", "."])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_a_hugging_face_tokenizer_learns_the_names(tmp_path: Path) -> None:
    words = word_tokenizer()
    before, first = len(words), extend_tokenizer(words)
    assert first == before and len(words) == before + NUM_BINS
    names = [TOKEN_FORMAT.format(i) for i in range(NUM_BINS)]
    assert names[7] == "<3d0007>"
    text = f"the mug is at {names[0]}{names[1023]} {names[512]} and"
    ids = words(text)["input_ids"]
    assert ids == [1, 2, 3, 4, first, first + 1023, first + 512, 5]
    assert names[1023] in words.decode(ids, skip_special_tokens=True)
    assert extend_tokenizer(words) == first and len(words) == before + NUM_BINS

    words.save_pretrained(tmp_path)
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert extend_tokenizer(again) == first and again(text)["input_ids"] == ids
    scattered = word_tokenizer()
    scattered.add_tokens(["<3d0001>"])
    refuses("3D tokens", extend_tokenizer, scattered)


def test_new_embeddings_have_the_mean_and_covariance_of_the_existing_ones() -> None:
    g = torch.Generator().manual_seed(0)
    existing = torch.randn(20_000, 6, generator=g) @ torch.randn(6, 6, generator=g) + torch.arange(
        6
    )
    new = init_new_embeddings(existing, 50_000, g)
    scale = float(torch.cov(existing.T).diag().max())
    torch.testing.assert_close(new.mean(0), existing.mean(0), atol=0.03 * scale**0.5, rtol=0)
    torch.testing.assert_close(torch.cov(new.T), torch.cov(existing.T), atol=0.03 * scale, rtol=0)
    same = [init_new_embeddings(existing, 5, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*same)


def test_new_embeddings_of_a_singular_covariance_stay_in_its_subspace() -> None:
    g = torch.Generator().manual_seed(0)
    few = torch.randn(3, 16, generator=g).bfloat16()  # three rows span a plane around their mean
    new = init_new_embeddings(few, 8, g)
    assert new.dtype == torch.bfloat16 and new.shape == (8, 16) and bool(torch.isfinite(new).all())
    basis = torch.linalg.svd((few - few.mean(0)).float()).Vh[:2]
    offset = new.float() - few.float().mean(0)
    assert float((offset - offset @ basis.T @ basis).abs().max()) < 0.02
    constant = torch.full((10, 4), 0.5)
    torch.testing.assert_close(init_new_embeddings(constant, 2, g), constant[:2])


def test_smooth_embeddings_have_the_same_distribution_and_alike_neighbours() -> None:
    generator = torch.Generator().manual_seed(0)
    existing = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    existing = existing @ torch.randn(12, 12, generator=generator, dtype=torch.float64) + 3.0
    # [draws, rows, width]
    tables = torch.stack(
        [init_new_embeddings(existing, 256, generator, smooth=True) for _ in range(400)]
    )
    pooled, scale = tables[:, ::64].reshape(-1, 12), existing.std(0)
    assert ((pooled.mean(0) - existing.mean(0)).abs() < 0.15 * scale).all()
    assert (pooled.T.cov() - existing.T.cov()).abs().max() < 0.15 * existing.T.cov().abs().max()

    def likeness(gap: int) -> float:
        centred = (tables - existing.mean(0)) / scale
        return float((centred[:, :-gap] * centred[:, gap:]).mean())

    assert likeness(1) > 0.95 and likeness(1) > likeness(16) > likeness(200)
