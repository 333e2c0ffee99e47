import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear.errors import SpearError
from spear.labels.fit import rle


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**81 - 1))
def test_round_trip(height: int, width: int, bits: int) -> None:
    mask = np.array([bits >> i & 1 for i in range(height * width)], bool).reshape(height, width)
    assert (rle.decode(rle.encode(mask), height, width) == mask).all()


def test_is_column_major_and_starts_with_zeros() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert rle.encode(mask) == [2, 1, 1, 2]
    assert rle.encode(~mask) == [0, 2, 1, 1, 2]


@pytest.mark.parametrize("runs", [[3, 2], [7], [8, -2]])
def test_wrong_lengths_are_refused(runs: list[int]) -> None:
    with pytest.raises(SpearError, match="2×3"):
        rle.decode(runs, 2, 3)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.floats(0.02, 0.98))
def test_compressed_strings_are_those_of_pycocotools(
    height: int, width: int, seed: int, share: float
) -> None:
    coco = pytest.importorskip("pycocotools.mask")
    mask = np.random.default_rng(seed).random((height, width)) < share
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
    runs = rle.encode(mask)
    assert rle.to_string(runs) == expected
    assert rle.from_string(expected) == runs
    assert rle.from_string(expected.encode()) == runs


def test_long_runs_survive_compression() -> None:
    runs = [0, 5_000_000, 1, 3, 12_000_000, 2, 31, 32, 33, 1023, 1024]
    assert rle.from_string(rle.to_string(runs)) == runs
    assert rle.to_string([]) == "" and rle.from_string("") == []


@pytest.mark.parametrize("text", ["01 2", "0é", "0\x7f", "0P"])
def test_strings_that_are_no_masks_are_refused(text: str) -> None:
    with pytest.raises(SpearError, match="compressed mask"):
        rle.from_string(text)
