"""What each patch shows, against a picture whose objects are known."""

from __future__ import annotations

import dataclasses

import numpy as np

from spear.labels.fit.masks import decode_mask, encode_mask
from spear.train.tasks import patch_targets
from spear.types import LabeledImage, LabeledObject
from spear.util.images import encode_jpeg


def a_label() -> LabeledImage:
    """64 × 64: a cup of 20 × 20 pixels across two patches of 32, and a small spoon inside the last patch."""
    objects = []
    for name, (x0, y0, x1, y1) in {"cup": (20, 4, 40, 24), "spoon": (50, 50, 58, 54)}.items():
        mask = np.zeros((64, 64), bool)
        mask[y0:y1, x0:x1] = True
        box = np.array([x0, y0, x1, y1], np.float32)
        objects.append(LabeledObject(name, box, encode_mask(mask), None, {}))
    image = encode_jpeg(np.zeros((64, 64, 3), np.uint8))
    return LabeledImage(image, 64, 64, np.eye(3), objects, "metre", "test")


def test_targets_say_what_is_where() -> None:
    _, shown, cells, centre, largest = patch_targets(a_label(), ["cup", "fork", "spoon"], 32, (64, 64))
    np.testing.assert_array_equal(shown[:, 0], [True, True, False, False])
    assert not shown[:, 1].any()
    np.testing.assert_array_equal(shown[:, 2], [False, False, False, True])
    np.testing.assert_array_equal(largest, [True, True, False, True])
    # cells are 8 pixels wide: of patch 0 (columns 0, 8, 16, 24) the cup covers the right half of the third
    # column
    first = cells[0].reshape(4, 4, 3)[..., 0]
    np.testing.assert_array_equal(first[0], [0, 0, 64, 128])
    np.testing.assert_array_equal(first[1], [0, 0, 128, 255])
    np.testing.assert_array_equal(cells[3].reshape(4, 4, 3)[2:, 2:, 2], [[96, 32], [0, 0]])
    # the cup's centre is pixel (30, 14): seen from the middle of patch 0 (16, 16) and of patch 1 (48, 16)
    np.testing.assert_allclose(centre[0], [14 / 32, -2 / 32])
    np.testing.assert_allclose(centre[1], [-18 / 32, -2 / 32])
    np.testing.assert_allclose(centre[3], [6 / 32, 4 / 32])


def test_an_image_of_another_size_is_fitted_with_its_masks() -> None:
    """Three times as large, and with what becomes bars above and below cut off: the same targets."""
    small = a_label()
    bar = 16
    wide = small.height - 2 * bar
    objects = []
    for o in small.objects:
        mask = np.kron(decode_mask(o.mask, 64, 64)[bar : 64 - bar], np.ones((3, 3), bool))
        box = (np.asarray(o.box2d) - [0, bar, 0, bar]) * 3
        objects.append(dataclasses.replace(o, mask=encode_mask(mask), box2d=box.astype(np.float32)))
    large = dataclasses.replace(small, width=192, height=3 * wide, objects=objects)
    cut = np.zeros((64, 64), bool)
    cut[bar : 64 - bar] = True
    kept = [
        dataclasses.replace(o, mask=encode_mask(decode_mask(o.mask, 64, 64) & cut)) for o in small.objects
    ]
    expected = patch_targets(dataclasses.replace(small, objects=kept), ["cup", "spoon"], 32, (64, 64))
    _, shown, cells, centre, largest = patch_targets(large, ["cup", "spoon"], 32, (64, 64))
    np.testing.assert_array_equal(shown, expected[1])
    np.testing.assert_allclose(cells, expected[2].astype(int), atol=40)  # edges are antialiased
    np.testing.assert_allclose(centre, expected[3], atol=1e-6)
    np.testing.assert_array_equal(largest, expected[4])
