"""Geometry in the image: the pinhole camera, and 2D boxes.

Camera frame: x right, y down, z forward; pixel centers at integer + 0.5. 2D boxes are x0, y0, x1,
y1 in pixels; x1 and y1 are exclusive.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from spear.types import Array

MIN_LIT_LEVEL = 24  # of 255; black bars of films, compressed as JPEG, stay below
MIN_LIT_FRACTION = 0.05  # of the pixels of a row or column that is in no black bar


@lru_cache(maxsize=8)
def _compute_rays(height: int, width: int, intrinsics: bytes) -> Array:
    """The ray [h, w, 3] float32 of each pixel, at depth 1."""
    inverse = np.linalg.inv(np.frombuffer(intrinsics, np.float64).reshape(3, 3))
    y, x = np.mgrid[:height, :width] + 0.5
    return (np.stack([x, y, np.ones_like(x)], axis=-1) @ inverse.T).astype(np.float32)


def unproject(depth: Array, intrinsics: Array) -> Array:
    """Compute the 3D point that each pixel shows.

    Args:
        depth: [h, w] along z.
        intrinsics: [3, 3] in pixels.

    Returns:
        Points [h, w, 3] float32 in the camera frame, in the unit of the depth.
    """
    height, width = depth.shape
    rays = _compute_rays(height, width, np.asarray(intrinsics, np.float64).tobytes())
    return rays * np.asarray(depth, np.float32)[..., None]


def project(points: Array, intrinsics: Array) -> Array:
    """Compute where points appear in the image.

    Args:
        points: [..., 3] in front of the camera, camera frame.
        intrinsics: [3, 3] in pixels.

    Returns:
        Pixels [..., 2], x and y.
    """
    image = points @ np.asarray(intrinsics).T
    return image[..., :2] / image[..., 2:]


def have_same_aspect(size: tuple[int, ...], other_size: tuple[int, ...]) -> bool:
    """Whether an image of one size (height, width) may be the other one resized, up to a pixel of
    rounding."""
    return abs(size[0] * other_size[1] - size[1] * other_size[0]) <= max(other_size)


def resize_nearest(image: Array, height: int, width: int) -> Array:
    """Resize an image [h, w]: each new pixel is the one of `image` in which its center lies."""
    rows = _nearest_indices(height, image.shape[0])
    columns = _nearest_indices(width, image.shape[1])
    return image[np.ix_(rows, columns)]


def _nearest_indices(new_size: int, size: int) -> Array:
    return ((np.arange(new_size) + 0.5) * size / new_size).astype(np.intp)


def shrink_image(image: Array, max_side_px: int | None) -> Array:
    """Make an image [h, w, 3] uint8 smaller until its longer side is `max_side_px` long; aspect
    kept.

    Smaller images stay as they are, and so do all images with None.
    """
    height, width = image.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return image
    scale = max_side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(resized)


def compute_iou_2d(a: Array, b: Array) -> Array:
    """Intersection over union of boxes [..., 4] with boxes [..., 4]: [...], 0 where both are
    empty."""
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = np.prod(np.maximum(sides, 0), axis=-1)
    area_a = np.prod(a[..., 2:] - a[..., :2], axis=-1)
    area_b = np.prod(b[..., 2:] - b[..., :2], axis=-1)
    union = area_a + area_b - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def compute_tight_box(mask: Array) -> Array:
    """The box [4] float32 around the pixels of a mask [h, w]; zeros when the mask is empty."""
    rows = np.flatnonzero(mask.any(axis=1))
    columns = np.flatnonzero(mask.any(axis=0))
    if len(rows) == 0:
        return np.zeros(4, np.float32)
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def find_lit_part(image: Array) -> Array:
    """Find the part of an image that is in no black bar, as films and padded pictures have.

    A row or column is lit where more than `MIN_LIT_FRACTION` of it is brighter than `MIN_LIT_LEVEL`
    (both our choice).

    Args:
        image: [h, w, 3] uint8.

    Returns:
        [2, 2]: the first and last lit row, then the first and last lit column.
    """
    is_lit = image.max(axis=2) > MIN_LIT_LEVEL
    ends = []
    for axis, size in enumerate(is_lit.shape):
        lit_lines = np.flatnonzero(is_lit.mean(axis=1 - axis) > MIN_LIT_FRACTION)
        ends.append(lit_lines[[0, -1]] if len(lit_lines) else (0, size - 1))
    return np.array(ends)


def clip_boxes(boxes: Array, height: int, width: int) -> Array:
    """The part of each box [n, 4] inside an image, [n, 4] float32."""
    return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)


def suppress_overlaps(boxes: Array, scores: Array, max_overlap: float) -> Array:
    """Non-maximum suppression: the indices [k] of the boxes [n, 4] to keep, best score [n] first.

    A box is dropped when a better one overlaps it by more than `max_overlap` (an IoU). Of equal
    scores the earlier box counts as the better one.
    """
    chosen: list[int] = []
    for i in np.argsort(-np.asarray(scores), kind="stable").tolist():
        if not chosen or float(compute_iou_2d(boxes[chosen], boxes[i]).max()) <= max_overlap:
            chosen.append(i)
    return np.array(chosen, np.intp)
