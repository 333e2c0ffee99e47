"""Jitter changes light only."""

from __future__ import annotations

import numpy as np

from spear.data.images import jitter


def test_jitter_is_photometric_and_bounded() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 11, 3)).astype(np.uint8)
    np.testing.assert_array_equal(jitter(image, np.full(5, 0.5), 1.0), image)
    brighter = jitter(image, np.array([1, 0.5, 0.5, 0.5, 0.5]), 1.0)
    np.testing.assert_array_equal(brighter, np.clip(np.rint(image + 25.5), 0, 255))
    flat = jitter(np.full((4, 4, 3), 100, np.uint8), np.random.default_rng(1).random(5), 1.0)
    assert (flat == flat[0, 0]).all() and np.abs(flat.astype(int) - 100).max() < 45
