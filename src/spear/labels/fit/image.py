"""Geometry in the image: the pinhole camera, and 2D boxes.

Camera frame: x right, y down, z forward; pixel centers at integer + 0.5. 2D boxes are x0, y0, x1,
y1 in pixels; x1 and y1 are exclusive.
"""

from functools import lru_cache

import numpy as np
from PIL import Image

from spear.types import Array

MIN_LIT_LEVEL = 24
"""Pixels brighter than this level (of 255) are lit. The noise that JPEG compression adds to the
black bars of films stays below this level."""
MIN_LIT_FRACTION = 0.05
"""A row or column belongs to a black bar if at most this fraction of its pixels is lit."""


@lru_cache(maxsize=8)
def _compute_rays_with_z_1(height: int, width: int, intrinsics: bytes) -> Array:
    """The ray [h, w, 3] float32 of each pixel, at depth 1."""
    # The intrinsics come as bytes because the cache needs a hashable argument.
    matrix = np.frombuffer(intrinsics, np.float64).reshape(3, 3)
    inverse = np.linalg.inv(matrix)
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([x, y, np.ones_like(x)], axis=-1)  # [h, w, 3] homogeneous
    return (pixels @ inverse.T).astype(np.float32)


def unproject(depth: Array, intrinsics: Array) -> Array:
    """Compute the 3D point that each pixel shows.

    Args:
        depth: [h, w] distance along the camera's z axis, any unit.
        intrinsics: [3, 3] in pixels.

    Returns:
        Points [h, w, 3] float32 in the camera frame, in the unit of the depth.
    """
    height, width = depth.shape
    matrix_bytes = np.asarray(intrinsics, np.float64).tobytes()  # bytes can be keys of a cache
    rays = _compute_rays_with_z_1(height, width, matrix_bytes)
    return rays * np.asarray(depth, np.float32)[..., None]


def project(points: Array, intrinsics: Array) -> Array:
    """Compute where points appear in the image.

    Args:
        points: [..., 3] in front of the camera, camera frame.
        intrinsics: [3, 3] in pixels.

    Returns:
        Pixels [..., 2], x and y.
    """
    homogeneous = points @ np.asarray(intrinsics).T  # [..., 3]
    return homogeneous[..., :2] / homogeneous[..., 2:]


def have_same_aspect(resized_shape: tuple[int, ...], original_shape: tuple[int, ...]) -> bool:
    """Whether two images may be the same image at two sizes.

    Args:
        resized_shape: (height, width) of an image that may have been resized.
        original_shape: (height, width) of the original. Resizing rounds sides to whole pixels, so
            the aspects may differ by as much as one pixel more or less in a side of the resized
            image changes the aspect.
    """
    height, width = resized_shape
    original_height, original_width = original_shape
    # The aspects are equal if `height * original_width` equals `width * original_height`. One pixel
    # more in `height` adds `original_width` to the first product, and one more in `width` adds
    # `original_height` to the second.
    return abs(height * original_width - width * original_height) <= max(original_shape)


def resize_nearest(image: Array, height: int, width: int) -> Array:
    """Resize an image [h, w] to [height, width].

    A new pixel takes the value of the pixel of `image` in which the new pixel's center lies.
    """
    rows = _compute_nearest_indices(height, image.shape[0])
    columns = _compute_nearest_indices(width, image.shape[1])
    return image[np.ix_(rows, columns)]


def _compute_nearest_indices(new_size: int, size: int) -> Array:
    """For each of `new_size` new rows (or columns), the index of the old row at its center."""
    return ((np.arange(new_size) + 0.5) * size / new_size).astype(np.intp)


def shrink_image(image: Array, max_side_px: int | None) -> Array:
    """Shrink an image [h, w, 3] uint8 so that its longer side has `max_side_px` pixels.

    The aspect ratio stays. An image that is not larger is returned unchanged. If `max_side_px` is
    None, every image is returned unchanged.
    """
    height, width = image.shape[:2]
    if max_side_px is None or max(height, width) <= max_side_px:
        return image
    scale = max_side_px / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)
    return np.asarray(resized)


def compute_elementwise_iou_2d(a: Array, b: Array) -> Array:
    """Intersection over union [...] of each 2D box in `a` [..., 4] with the one in `b` [..., 4].

    Leading dimensions are broadcast. It is 0 where both boxes are empty.
    """
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    lower_ends = np.maximum(a[..., :2], b[..., :2])
    upper_ends = np.minimum(a[..., 2:], b[..., 2:])
    sides = upper_ends - lower_ends  # [..., 2], negative where the boxes are apart
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


def find_first_and_last_lit_row_and_column(image: Array) -> Array:
    """Find the rows and columns of an image between the black bars of films and padded pictures.

    A row or column is lit when more than `MIN_LIT_FRACTION` of its pixels are brighter than
    `MIN_LIT_LEVEL` (both our choice).

    Args:
        image: [h, w, 3] uint8.

    Returns:
        [[first row, last row], [first column, last column]] that are lit. If no row is lit, all
        rows count as lit, and likewise for columns.
    """
    is_lit = image.max(axis=2) > MIN_LIT_LEVEL  # [h, w]
    ends = []
    for axis, size in enumerate(is_lit.shape):  # rows, then columns
        lit_fractions = is_lit.mean(axis=1 - axis)  # [size]
        lit_lines = np.flatnonzero(lit_fractions > MIN_LIT_FRACTION)
        ends.append(lit_lines[[0, -1]] if len(lit_lines) else (0, size - 1))
    return np.array(ends)


def clip_boxes(boxes: Array, height: int, width: int) -> Array:
    """Clip 2D boxes [n, 4] to an image of this size; returns [n, 4] float32."""
    return np.clip(boxes, 0, [width, height, width, height]).astype(np.float32)


def select_indices_by_nms(boxes: Array, scores: Array, max_iou: float) -> Array:
    """Non-maximum suppression of 2D boxes.

    A box is dropped when its IoU with a remaining box of a better score is more than `max_iou`. Of
    two boxes with equal scores the earlier one counts as the better one.

    Args:
        boxes: [n, 4] 2D boxes.
        scores: [n] their scores.
        max_iou: The largest IoU of two remaining boxes.

    Returns:
        The indices [k] of the remaining boxes, best score first.
    """
    chosen_indices: list[int] = []
    best_first = np.argsort(-np.asarray(scores), kind="stable").tolist()
    for i in best_first:
        overlaps = compute_elementwise_iou_2d(boxes[chosen_indices], boxes[i])
        if (overlaps <= max_iou).all():
            chosen_indices.append(i)
    return np.array(chosen_indices, np.intp)
