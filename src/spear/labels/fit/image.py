"""Geometry in the image: the pinhole camera, and 2D boxes.

Camera frame: x right, y down, z forward; pixel centres at integer + 0.5. 2D boxes: x0, y0, x1, y1 in pixels,
the upper ends exclusive.
"""

from functools import lru_cache

import numpy as np

from spear.types import Array


@lru_cache(maxsize=8)
def _rays(height: int, width: int, intrinsics: bytes) -> Array:
    inverse = np.linalg.inv(np.frombuffer(intrinsics, np.float64).reshape(3, 3))
    y, x = np.mgrid[:height, :width] + 0.5
    return (np.stack([x, y, np.ones_like(x)], axis=-1) @ inverse.T).astype(np.float32)


def unproject(depth: Array, intrinsics: Array) -> Array:
    """Depth along z [h, w] and intrinsics [3, 3] → points [h, w, 3] float32, camera frame."""
    rays = _rays(*depth.shape, np.asarray(intrinsics, np.float64).tobytes())
    return rays * np.asarray(depth, np.float32)[..., None]


def project(points: Array, intrinsics: Array) -> Array:
    """Points [..., 3] in front of the camera and intrinsics [3, 3] → pixels [..., 2] (x, y)."""
    image = points @ np.asarray(intrinsics).T
    return image[..., :2] / image[..., 2:]


def have_same_aspect(size: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether images of these sizes (height, width) may be one resized, up to a pixel of rounding."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(other)


def resize_nearest(image: Array, height: int, width: int) -> Array:
    """An image [h, w] at another size: each pixel the one of `image` in which its centre lies."""
    sizes = zip((height, width), image.shape, strict=True)
    return image[np.ix_(*(((np.arange(n) + 0.5) * m / n).astype(np.intp) for n, m in sizes))]


def compute_iou_2d(a: Array, b: Array) -> Array:
    """Intersection over union of boxes [..., 4] with boxes [..., 4]: [...], 0 where both are empty."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(np.maximum(sides, 0), axis=-1)
    union = (
        np.prod(a[..., 2:] - a[..., :2], axis=-1)
        + np.prod(b[..., 2:] - b[..., :2], axis=-1)
        - shared
    )
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def compute_tight_box(mask: Array) -> Array:
    """The box [4] float32 around the pixels of a mask [h, w]; zeros when there are none."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def find_lit_part(image: Array) -> Array:
    """[2, 2] the first and last row and the first and last column of an image [h, w, 3] uint8 that are in no
    black bar, as films and padded pictures have: over 5 % of them is brighter than 24 (our choice)."""
    lit = image.max(axis=2) > 24
    bright = [np.flatnonzero(lit.mean(axis=1 - axis) > 0.05) for axis in (0, 1)]
    return np.array(
        [b[[0, -1]] if len(b) else (0, n - 1) for b, n in zip(bright, lit.shape, strict=True)]
    )


def clip_boxes(boxes: Array, height: int, width: int) -> Array:
    """The part of each box [n, 4] inside an image, [n, 4] float32."""
    return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)


def suppress_overlaps(boxes: Array, scores: Array, overlap: float) -> Array:
    """Non-maximum suppression: the numbers [k] of the boxes [n, 4] to keep, best score [n] first.

    A box goes when one that is kept overlaps it by more than this IoU. Of equal scores the earlier stays.
    """
    kept: list[int] = []
    for i in np.argsort(-np.asarray(scores), kind="stable").tolist():
        if not kept or float(compute_iou_2d(boxes[kept], boxes[i]).max()) <= overlap:
            kept.append(i)
    return np.array(kept, np.intp)
