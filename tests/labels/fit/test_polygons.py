import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spear.errors import SpearError
from spear.labels.fit.polygons import fill

COORDINATE = st.one_of(st.integers(-6, 30).map(float), st.floats(-6, 30, allow_nan=False))


@given(st.lists(st.lists(st.tuples(COORDINATE, COORDINATE), min_size=3, max_size=8), min_size=1, max_size=3))
def test_as_pycocotools_fills_them(corners: list[list[tuple[float, float]]]) -> None:
    mask = pytest.importorskip("pycocotools.mask")
    polygons = [[v for corner in polygon for v in corner] for polygon in corners]
    height, width = 19, 23
    expected = mask.decode(mask.merge(mask.frPyObjects(polygons, height, width)))
    assert (fill(polygons, height, width) == expected.astype(bool)).all()


def test_a_rectangle_covers_its_pixels() -> None:
    expected = np.zeros((6, 8), bool)
    expected[1:4, 2:7] = True
    assert (fill([[2, 1, 7, 1, 7, 4, 2, 4]], 6, 8) == expected).all()
    assert (fill([[2, 1, 2, 4, 7, 4, 7, 1]], 6, 8) == expected).all()
    both = fill([[0, 0, 2, 0, 2, 6, 0, 6], [4, 0, 8, 0, 8, 6, 4, 6]], 6, 8)
    assert both.sum() == 36 and not both[:, 2:4].any()


@pytest.mark.parametrize("polygon", [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, float("nan")], []])
def test_what_is_no_polygon_is_refused(polygon: list[float]) -> None:
    with pytest.raises(SpearError, match="at least three points"):
        fill([polygon], 6, 8)
