"""3D tokens: all are used equally often, coordinates survive a round trip, bad values are refused,
and the tokens have ids in a Hugging Face tokenizer and rows in an embedding table."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from refusals import refuses
from spear.tokens import (
    NUM_BINS,
    TOKEN_FORMAT,
    CoordinateTokenizer,
    extend_tokenizer,
    sample_new_embeddings,
)


def draw_coordinates(num_points: int, seed: int) -> np.ndarray:
    """Coordinates of random points in the camera frame (m), in one array [3 · num_points].

    x and y are distributed around 0, and the depth has a skewed distribution.
    """
    rng = np.random.default_rng(seed)
    x_and_y = rng.normal(0, 0.3, 2 * num_points)
    depth = rng.lognormal(0.2, 0.4, num_points)
    return np.concatenate([x_and_y, depth])


@pytest.fixture(scope="module")
def tokenizer() -> CoordinateTokenizer:
    return CoordinateTokenizer.fit(draw_coordinates(100_000, seed=0))


# Bins


def test_token_use_is_uniform_on_held_out_data(tokenizer: CoordinateTokenizer) -> None:
    held_out = draw_coordinates(100_000, seed=1)

    counts = np.bincount(tokenizer.encode(held_out), minlength=NUM_BINS)

    expected = len(held_out) / NUM_BINS
    # The variance of a count is its expected value. It doubles because the bin edges come from as
    # many samples, and vary as much.
    deviations = (counts - expected) / math.sqrt(2 * expected)
    assert float(deviations.std()) == pytest.approx(1, abs=0.1)
    assert float(np.abs(deviations).max()) < 5


def test_the_default_is_1024_bins(tokenizer: CoordinateTokenizer) -> None:
    assert tokenizer.num_bins == NUM_BINS == 1024


def test_bins_of_few_values_are_their_quantiles_and_medians() -> None:
    values = np.array([0.0, 1, 1.5, 2, 3, 10, 11, 20, 29, 40])

    fitted = CoordinateTokenizer.fit(values, bins=2)

    # The median 6.5 divides the values into two bins of five.
    assert fitted.bin_edges.tolist() == [0, 6.5, 40]
    assert fitted.bin_centers.tolist() == [1.5, 20]


# The few sampled values make ties likely.
@given(
    values=hnp.arrays(
        np.float64,
        st.integers(2, 40),
        elements=st.one_of(st.sampled_from([0.0, 0.1, 0.25, -3.0]), st.floats(-1e3, 1e3)),
    ),
    bins=st.integers(1, 64),
)
def test_any_values_with_ties_give_increasing_edges(values: np.ndarray, bins: int) -> None:
    assume(len(np.unique(values)) >= 2)

    fitted = CoordinateTokenizer.fit(values, bins)

    assert (np.diff(fitted.bin_edges) > 0).all()
    assert fitted.bin_edges[0] <= values.min()
    assert values.max() <= fitted.bin_edges[-1]
    ids = np.arange(bins)
    assert (fitted.encode(fitted.decode(ids)) == ids).all()
    ids_of_sorted_values = fitted.encode(np.sort(values))
    assert (np.diff(ids_of_sorted_values) >= 0).all()


def test_repeated_values_count_as_often_as_they_occur() -> None:
    """Edge i lies where i / 64 of the values are below it, as near as ties allow."""
    values = np.random.default_rng(0).normal(size=20_000).round(1)  # multiples of 0.1

    edges = CoordinateTokenizer.fit(values, bins=64).bin_edges

    for i, edge in enumerate(edges[1:-1], start=1):
        # `fit` spreads the occurrences of a value over the gap between it and the next smaller
        # value. So the edge lies in the gap below `value`, which is the edge rounded up to 0.1.
        value = np.ceil(edge * 10 - 1e-9) / 10
        fraction_below = (values < value - 0.01).mean()
        fraction_up_to = (values < value + 0.01).mean()
        assert fraction_below - 0.01 <= i / 64 <= fraction_up_to + 0.01


# Encoding and decoding


def test_decoded_coordinates_are_in_the_bin_of_the_encoded_ones(
    tokenizer: CoordinateTokenizer,
) -> None:
    edges = tokenizer.bin_edges
    coordinates = draw_coordinates(10_000, seed=2).clip(edges[0], edges[-1])

    ids = tokenizer.encode(coordinates)
    decoded = tokenizer.decode(ids)

    assert (edges[ids] <= coordinates).all()
    assert (coordinates <= edges[ids + 1]).all()  # equal where `clip` made them the last edge
    assert (edges[ids] <= decoded).all()
    assert (decoded < edges[ids + 1]).all()


def test_every_id_is_encoded_from_its_decoded_coordinate(tokenizer: CoordinateTokenizer) -> None:
    ids = np.arange(NUM_BINS)

    assert (tokenizer.encode(tokenizer.decode(ids)) == ids).all()


def test_the_smallest_and_largest_fitted_values_have_the_first_and_last_id() -> None:
    fitted = CoordinateTokenizer.fit(np.linspace(-1, 1, 5000))

    assert fitted.encode([-1.0, 1.0]).tolist() == [0, NUM_BINS - 1]


def test_values_out_of_range_have_the_first_or_last_id() -> None:
    fitted = CoordinateTokenizer.fit(np.linspace(-1, 1, 5000))

    assert fitted.encode([-1.001, -math.inf]).tolist() == [0, 0]
    assert fitted.encode([2, math.inf]).tolist() == [NUM_BINS - 1, NUM_BINS - 1]


@pytest.mark.parametrize("shape", [(), (0, 3), (2, 2)])
def test_ids_have_the_shape_of_the_coordinates(
    tokenizer: CoordinateTokenizer, shape: tuple[int, ...]
) -> None:
    ids = tokenizer.encode(np.zeros(shape))

    assert ids.shape == shape
    assert tokenizer.decode(ids).shape == shape


# Bad values


def test_nan_is_not_encoded(tokenizer: CoordinateTokenizer) -> None:
    refuses("NaN", tokenizer.encode, np.array([0.1, math.nan]))


@pytest.mark.parametrize("ids", [[-1], [0, NUM_BINS]])
def test_ids_out_of_range_are_not_decoded(tokenizer: CoordinateTokenizer, ids: list[int]) -> None:
    """The message names the largest id, 1023."""
    refuses("1023", tokenizer.decode, ids)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_fitting_refuses_values_that_are_not_finite(value: float) -> None:
    refuses("NaN or infinite", CoordinateTokenizer.fit, [0.0, 1.0, value])


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0, 2.0]])
def test_fitting_refuses_fewer_than_two_different_values(values: ArrayLike) -> None:
    refuses("at least 2", CoordinateTokenizer.fit, values)


def test_fitting_refuses_an_unknown_spacing() -> None:
    suggestion = "'unifrom'. Did you mean 'uniform'"

    refuses(suggestion, CoordinateTokenizer.fit, [0.0, 1.0], spacing="unifrom")


# Files


def test_saving_and_loading_is_exact(tmp_path: Path) -> None:
    fitted = CoordinateTokenizer.fit(draw_coordinates(2000, seed=3), unit="relative")
    path = tmp_path / "coordinates.json"

    fitted.save(path)
    loaded = CoordinateTokenizer.load(path)

    assert loaded.bin_edges.tobytes() == fitted.bin_edges.tobytes()
    assert loaded.bin_centers.tobytes() == fitted.bin_centers.tobytes()
    assert loaded.unit == "relative"
    assert [file.name for file in tmp_path.iterdir()] == ["coordinates.json"]


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    refuses(r"coordinates\.json", CoordinateTokenizer.load, tmp_path / "coordinates.json")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_file_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "coordinates.json"
    path.write_text(text)

    refuses(r"coordinates\.json", CoordinateTokenizer.load, path)


@pytest.mark.parametrize(
    "changes",
    [
        {"edges": None},
        {"edges": [3.0, 2.0, 1.0, 0.0]},
        {"representatives": [1.5, 2.5]},
        {"unit": "inch"},
        {"edges": [math.nan] * 4},
        {"edges": [0.0, 1.0, 2.0, math.inf]},
        {"edges": [0.0], "representatives": []},
        {"edges": [[0.0, 1.0, 2.0, 3.0]], "representatives": [[]]},
    ],
    ids=[
        "no edges",
        "decreasing edges",
        "too few centers",
        "unknown unit",
        "NaN edges",
        "infinite edge",
        "no bins",
        "two dimensions",
    ],
)
def test_a_file_with_bad_content_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """`changes` are keys of the file with other values; None removes the key.

    "edges" are the bin edges, and "representatives" the bin centers.
    """
    content = {"unit": "metre", "edges": [0.0, 1.0, 2.0, 3.0], "representatives": [0.5, 1.5, 2.5]}
    path = tmp_path / "coordinates.json"
    path.write_text(json.dumps(content))
    CoordinateTokenizer.load(path)  # the content is good without the changes
    changed = {key: value for key, value in (content | changes).items() if value is not None}
    path.write_text(json.dumps(changed))

    refuses(r"coordinates\.json", CoordinateTokenizer.load, path)


# Hugging Face tokenizers


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "the", "mug", "is", "at", "and", "."])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


TOKENS = [TOKEN_FORMAT.format(i) for i in range(NUM_BINS)]
# Words 1, 2, 3 and 4 of the vocabulary, three 3D tokens, and word 5.
TEXT = f"the mug is at {TOKENS[0]}{TOKENS[1023]} {TOKENS[512]} and"


def test_3d_tokens_are_numbered_names() -> None:
    assert TOKENS[7] == "<3d0007>"


def test_3d_tokens_follow_the_vocabulary() -> None:
    words = make_word_tokenizer()
    num_words = len(words)

    ids = extend_tokenizer(words)

    assert ids == range(num_words, num_words + NUM_BINS)
    assert len(words) == num_words + NUM_BINS
    expected = [1, 2, 3, 4, ids[0], ids[1023], ids[512], 5]
    assert words(TEXT)["input_ids"] == expected


def test_3d_tokens_are_not_skipped_as_special_tokens() -> None:
    words = make_word_tokenizer()
    extend_tokenizer(words)

    decoded = words.decode(words(TEXT)["input_ids"], skip_special_tokens=True)

    assert TOKENS[1023] in decoded


def test_extending_a_tokenizer_twice_changes_nothing() -> None:
    words = make_word_tokenizer()
    ids = extend_tokenizer(words)
    num_words = len(words)

    assert extend_tokenizer(words) == ids
    assert len(words) == num_words


def test_a_saved_tokenizer_has_the_same_3d_tokens(tmp_path: Path) -> None:
    words = make_word_tokenizer()
    ids = extend_tokenizer(words)
    words.save_pretrained(tmp_path)

    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)

    assert extend_tokenizer(loaded) == ids
    assert loaded(TEXT)["input_ids"] == words(TEXT)["input_ids"]


def test_a_tokenizer_with_scattered_3d_tokens_is_refused() -> None:
    scattered = make_word_tokenizer()
    scattered.add_tokens(["<3d0001>"])  # gets a lower id than the token <3d0000> added later

    refuses("3D tokens", extend_tokenizer, scattered)


# Embeddings


def test_new_embeddings_have_the_mean_and_covariance_of_the_existing_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    standard_normals = torch.randn(20_000, 6, generator=generator)
    mixing = torch.randn(6, 6, generator=generator)  # makes the columns depend on each other
    existing = standard_normals @ mixing + torch.arange(6)

    new_embeddings = sample_new_embeddings(existing, 50_000, generator)

    covariance = torch.cov(existing.T)
    max_variance = float(covariance.diag().max())
    max_deviation = max_variance**0.5
    torch.testing.assert_close(
        new_embeddings.mean(0), existing.mean(0), atol=0.03 * max_deviation, rtol=0
    )
    torch.testing.assert_close(
        torch.cov(new_embeddings.T), covariance, atol=0.03 * max_variance, rtol=0
    )


def test_the_same_generator_draws_the_same_embeddings() -> None:
    existing = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))

    first = sample_new_embeddings(existing, 5, torch.Generator().manual_seed(1))
    second = sample_new_embeddings(existing, 5, torch.Generator().manual_seed(1))

    assert torch.equal(first, second)


def test_new_embeddings_of_a_singular_covariance_stay_in_its_subspace() -> None:
    generator = torch.Generator().manual_seed(0)
    # Three embeddings lie in a plane, so their covariance has the rank 2.
    existing = torch.randn(3, 16, generator=generator).bfloat16()

    new_embeddings = sample_new_embeddings(existing, 8, generator)

    assert new_embeddings.dtype == torch.bfloat16
    assert new_embeddings.shape == (8, 16)
    plane_basis = torch.linalg.svd((existing - existing.mean(0)).float()).Vh[:2]  # [2, 16]
    offset = new_embeddings.float() - existing.float().mean(0)
    offset_in_plane = offset @ plane_basis.T @ plane_basis
    assert float((offset - offset_in_plane).abs().max()) < 0.02


def test_new_embeddings_of_equal_ones_are_the_same() -> None:
    existing = torch.full((10, 4), 0.5)

    new_embeddings = sample_new_embeddings(existing, 2, torch.Generator().manual_seed(0))

    torch.testing.assert_close(new_embeddings, existing[:2])


@pytest.fixture(scope="module")
def smooth_tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Existing embeddings [500, 12], and 400 smooth tables of new embeddings [400, 256, 12]."""
    generator = torch.Generator().manual_seed(0)
    standard_normals = torch.randn(500, 12, generator=generator, dtype=torch.float64)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    existing = standard_normals @ mixing + 3.0
    tables = [sample_new_embeddings(existing, 256, generator, smooth=True) for _ in range(400)]
    return existing, torch.stack(tables)


def test_smooth_embeddings_have_the_distribution_of_the_existing_ones(
    smooth_tables: tuple[torch.Tensor, torch.Tensor],
) -> None:
    existing, tables = smooth_tables
    rows = tables[:, ::64].reshape(-1, 12)  # 4 of each table, far from each other

    assert ((rows.mean(0) - existing.mean(0)).abs() < 0.15 * existing.std(0)).all()
    covariance = existing.T.cov()
    assert (rows.T.cov() - covariance).abs().max() < 0.15 * covariance.abs().max()


def test_smooth_embeddings_are_alike_if_their_rows_are_near(
    smooth_tables: tuple[torch.Tensor, torch.Tensor],
) -> None:
    existing, tables = smooth_tables
    standardized = (tables - existing.mean(0)) / existing.std(0)

    def compute_correlation(gap: int) -> float:
        """The correlation between embeddings that are `gap` rows apart."""
        return float((standardized[:, :-gap] * standardized[:, gap:]).mean())

    assert compute_correlation(1) > 0.95
    assert compute_correlation(1) > compute_correlation(16)
    assert compute_correlation(16) > compute_correlation(200)
