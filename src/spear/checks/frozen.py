"""Does a camera repeat its picture while the arm moves? The audit, the drift monitor and
`spear diagnose` use these functions.
"""

from collections.abc import Hashable, Sequence

import numpy as np

from spear.types import Array

MIN_FROZEN_MOTION_M = 0.05  # over a longer motion, no picture can stay the very same


class RepeatedPicture:
    """Follows one camera, and measures how far the arm moves while its picture stays the same."""

    def __init__(self) -> None:
        self._picture: Hashable = None
        self._first_position: Array | None = None  # where the arm was when this picture first came

    def add_step_and_measure_motion_m(self, picture: Hashable, position: Array) -> float:
        """Add a step, and measure how far the arm moved since its picture first came.

        Args:
            picture: the picture, or a checksum of it.
            position: [3] position of the end effector, m.

        Returns:
            How far the arm is from where it was when this picture first came, m. It is 0 for
            another picture than that of the step before.
        """
        if self._first_position is None or picture != self._picture:
            self._picture = picture
            self._first_position = np.array(position)
        return float(np.linalg.norm(position - self._first_position))


def mark_frozen_steps(
    pictures: Sequence[Hashable], position: Array, min_motion_m: float = MIN_FROZEN_MOTION_M
) -> Array:
    """Return whether each step's picture is still the very same although the arm moved.

    Args:
        pictures: [T] pictures of one camera, or checksums of them.
        position: [T, 3] positions of the end effector, m.
        min_motion_m: how far the arm must have moved since the picture first came.

    Returns:
        [T] bool.
    """
    camera = RepeatedPicture()
    distances_m = [
        camera.add_step_and_measure_motion_m(picture, xyz_m)
        for picture, xyz_m in zip(pictures, position, strict=True)
    ]
    return np.array(distances_m) > min_motion_m
