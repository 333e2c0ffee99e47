"""What may have happened to a camera's pictures on their way: the versions that are compared."""

import functools
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.ndimage import rotate

from spear.checks.rollout.episode import CameraPictures
from spear.types import Array
from spear.util.images import compute_placement

SMALL_TURN_DEG = 20  # of a camera that was bumped

Transform = Callable[[Array], Array]
"""A change of pictures [N, h, w, 3] float32."""


def _zoom(pictures: Array, share_x: float, share_y: float) -> Array:
    """Show the middle of pictures [N, h, w, 3] only, in the same size."""
    height, width = pictures.shape[1:3]
    crop_width = max(1, round(width * share_x))
    crop_height = max(1, round(height * share_y))
    left_px = (width - crop_width) // 2
    top_px = (height - crop_height) // 2
    cropped = pictures[:, top_px : top_px + crop_height, left_px : left_px + crop_width]
    return resize(cropped, width, height)


def resize(pictures: Array, width: int, height: int) -> Array:
    """Resize pictures [N, h, w, 3] by linear interpolation."""
    rows = _make_interpolation_matrix(pictures.shape[1], height)
    columns = _make_interpolation_matrix(pictures.shape[2], width)
    num, _, old_width, _ = pictures.shape
    # Two matrix products are many times faster than Pillow for thousands of small pictures.
    tall = rows @ pictures.reshape(num, pictures.shape[1], -1)  # [N, height, w · 3]
    wide = columns @ tall.reshape(num * height, old_width, 3)  # [N · height, width, 3]
    return wide.reshape(num, height, width, 3)


@functools.cache
def _make_interpolation_matrix(old_size: int, new_size: int) -> Array:
    """Return the matrix [new_size, old_size] that interpolates a row of pixels linearly."""
    positions = (np.arange(new_size) + 0.5) * old_size / new_size - 0.5
    positions = np.clip(positions, 0, old_size - 1)
    lower = np.floor(positions).astype(int)
    upper = np.minimum(lower + 1, old_size - 1)
    fraction = positions - lower
    matrix = np.zeros((new_size, old_size), np.float32)
    matrix[np.arange(new_size), lower] += 1 - fraction
    matrix[np.arange(new_size), upper] += fraction
    return matrix


def _squeeze(pictures: Array, share_x: float, share_y: float) -> Array:
    """Squeeze pictures [N, h, w, 3] into their middle, as a wider view shows them.

    What the wider view adds at the sides is taken to be like the border of the pictures.
    """
    height, width = pictures.shape[1:3]
    inner_width = max(1, round(width * share_x))
    inner_height = max(1, round(height * share_y))
    squeezed = resize(pictures, inner_width, inner_height)
    left_px = (width - inner_width) // 2
    top_px = (height - inner_height) // 2
    rows = (top_px, height - inner_height - top_px)
    columns = (left_px, width - inner_width - left_px)
    return np.pad(squeezed, ((0, 0), rows, columns, (0, 0)), mode="edge")


def _turn_quarter_and_stretch(pictures: Array, num_quarters: int) -> Array:
    """Turn pictures [N, h, w, 3] by quarters of a turn, fitted into their size without bars."""
    height, width = pictures.shape[1:3]
    return resize(np.rot90(pictures, num_quarters, axes=(1, 2)), width, height)


def _turn_quarter_with_bars(pictures: Array, num_quarters: int) -> Array:
    """Turn pictures by quarters of a turn, and fit them into their size with black bars."""
    num, height, width, _ = pictures.shape
    turned_width = max(1, round(height * height / width))
    turned = resize(np.rot90(pictures, num_quarters, axes=(1, 2)), turned_width, height)
    left_px = (width - turned_width) // 2
    barred = np.zeros((num, height, width, 3), np.float32)
    barred[:, :, left_px : left_px + turned_width] = turned
    return barred


def _turn_slightly(pictures: Array, angle_deg: float, has_black_corners: bool) -> Array:
    """Turn pictures [N, h, w, 3] counterclockwise by a small angle, in the same size.

    What a camera sees in the corners then is taken to be like the border of the pictures. A program
    that turns them leaves black corners instead.
    """
    mode = "constant" if has_black_corners else "nearest"
    return rotate(pictures, angle_deg, axes=(2, 1), reshape=False, order=1, mode=mode)


def scale_brightness(pictures: Array, factor: float) -> Array:
    """Brighten or darken pictures, as another exposure does."""
    return np.clip(pictures * factor, 0, 255)


SHAPE_VERSIONS: dict[str, Transform] = {
    "plain": lambda pictures: pictures,
    "mirrored left to right": lambda pictures: pictures[:, :, ::-1],
    "mirrored upside down": lambda pictures: pictures[:, ::-1],
    "turned by 180°": lambda pictures: pictures[:, ::-1, ::-1],
    "turned by 90° to the left": lambda pictures: _turn_quarter_and_stretch(pictures, 1),
    "turned by 90° to the right": lambda pictures: _turn_quarter_and_stretch(pictures, 3),
    "turned by 90° to the left, with bars": lambda pictures: _turn_quarter_with_bars(pictures, 1),
    "turned by 90° to the right, with bars": lambda pictures: _turn_quarter_with_bars(pictures, 3),
    "turned by 20° to the left": lambda pictures: _turn_slightly(pictures, SMALL_TURN_DEG, False),
    "turned by 20° to the right": lambda pictures: _turn_slightly(pictures, -SMALL_TURN_DEG, False),
    "turned by 20° to the left, with black corners": lambda pictures: _turn_slightly(
        pictures, SMALL_TURN_DEG, True
    ),
    "turned by 20° to the right, with black corners": lambda pictures: _turn_slightly(
        pictures, -SMALL_TURN_DEG, True
    ),
    "cropped to 80 %": lambda pictures: _zoom(pictures, 0.8, 0.8),
    "cropped to 60 %": lambda pictures: _zoom(pictures, 0.6, 0.6),
    "stretched in width": lambda pictures: _zoom(pictures, 0.7, 1.0),
    "stretched in width, slightly": lambda pictures: _zoom(pictures, 0.87, 1.0),
    "stretched in height": lambda pictures: _zoom(pictures, 1.0, 0.7),
    "stretched in height, slightly": lambda pictures: _zoom(pictures, 1.0, 0.87),
    "squeezed in width": lambda pictures: _squeeze(pictures, 0.75, 1.0),
    "squeezed in height": lambda pictures: _squeeze(pictures, 1.0, 0.75),
}
"""Changes that move the content of a picture; they are compared without colors and brightness."""

EXCHANGED = "exchanged with "
"""The version of pictures that are another camera's; the camera's name follows."""

EXPOSURE_FACTORS = {
    "exposed for half as long": 0.5,
    "exposed for 70 % as long": 0.7,
    "exposed for half as long again": 1.5,
    "exposed for twice as long": 2.0,
}
"""Version of pictures with another exposure → how much brighter they are."""

COLOR_VERSIONS: dict[str, Transform] = {
    "plain": lambda pictures: pictures,
    "with red and blue exchanged": lambda pictures: pictures[..., ::-1],
}
"""Changes of the colors; they are compared with colors and brightness."""
for _version, _factor in EXPOSURE_FACTORS.items():
    COLOR_VERSIONS[_version] = partial(scale_brightness, factor=_factor)


def change_content(pictures: Array, recorded: CameraPictures, transform: Transform) -> Array:
    """Change what a camera sees, and not the bars that fit pictures of another aspect.

    A program changes pictures before the policy fits them into its size with black bars. If the
    bars were changed, too, a cropped picture would have narrower bars than a real one has.

    Args:
        pictures: [N, h, w, 3] small pictures.
        recorded: what the camera recorded.
        transform: the change.
    """
    height, width = pictures.shape[1:3]
    placement = compute_placement(recorded.size, (width, height))
    rows = slice(placement.top, placement.top + placement.height)
    columns = slice(placement.left, placement.left + placement.width)
    changed = pictures.copy()
    changed[:, rows, columns] = transform(pictures[:, rows, columns])
    return changed
