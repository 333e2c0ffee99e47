import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear.errors import SpearError
from spear.labels import rle


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
