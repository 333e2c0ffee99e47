"""Checks that compare a robot's observations with the training distribution summary."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from spear.checks.cameras import are_blank
from spear.checks.gripper import are_opposite
from spear.geometry import quat_distance
from spear.monitor.distribution import (
    TrainingDistribution,
    compute_thumbnails,
    correlate_under_transforms,
)
from spear.types import Array

POSITION_MARGIN_M = 0.1  # added to the range of positions in training before one is reported
ROTATION_MARGIN_RAD = np.pi / 4  # an orientation turned further than training by this is reported
MIN_COLOR_SPREAD = 3.0  # gray levels of 255; a smaller difference between colors is noise
# Red minus blue is unlike training beyond 4 standard deviations, and like training within 2.
MIN_UNLIKE_DEVIATIONS = 4
MAX_LIKE_DEVIATIONS = 2
# An image is reported as transformed if, once the transform is undone, it correlates this much with
# the mean image of training.
MIN_CORRELATION = 0.6
# Undoing the transform must also raise the correlation more than it does for any image of training,
# by at least this.
MIN_CORRELATION_GAIN = 0.2


class Finding(NamedTuple):
    """One difference that a check found. Findings with the same key are reported once."""

    key: str
    message: str


def examine_first_opening(expected: TrainingDistribution, opening: float) -> Iterator[Finding]:
    """Compare the gripper opening of a robot's first state with the first ones of training."""
    mean_opening = expected.mean_initial_opening
    if are_opposite(opening, mean_opening):
        yield Finding(
            "gripper",
            f"the gripper begins at {opening:.2f}, in training at {mean_opening:.2f} in the mean. "
            "Send 1 for open and 0 for closed.",
        )


def examine_observations(
    expected: TrainingDistribution, states: Array, images: Mapping[str, Array]
) -> Iterator[Finding]:
    """Compare observations of one robot with the training data.

    Args:
        expected: the summary of the training data.
        states: [B, 8] states as `spear.types.Policy` has them.
        images: camera → [B, 3, h, w] uint8 images as the model sees them.

    Yields:
        One finding for each thing that is unlike training.
    """
    yield from examine_ee_positions(expected, states[:, :3])
    yield from examine_ee_rotations(expected, states[:, 3:7])
    for camera, pixels in images.items():
        yield from examine_color_order(expected, camera, pixels)
        if are_blank(np.moveaxis(pixels, 1, -1)).all():
            message = f"camera {camera!r} shows nothing. Check that it is on and not covered."
            yield Finding(camera, message)
        else:
            yield from examine_image_transform(expected, camera, pixels)


def examine_ee_positions(expected: TrainingDistribution, positions: Array) -> Iterator[Finding]:
    """Report each axis along which positions [B, 3] (m) lie far outside the range of training."""
    limits = np.array([expected.min_position_m, expected.max_position_m])  # [2, 3]
    distance_from_middle = np.abs(positions - limits.mean(0))  # [B, 3]
    # A limit is half a range from the middle, so 1.5 ranges from it are one range beyond the limit.
    max_distance = 1.5 * np.ptp(limits, 0) + POSITION_MARGIN_M  # [3]
    is_axis_exceeded = distance_from_middle.max(0) > max_distance  # [3]
    for axis in np.flatnonzero(is_axis_exceeded):
        farthest_row = distance_from_middle[:, axis].argmax()
        farthest = positions[farthest_row, axis]
        yield Finding(
            f"state {axis}",
            f"the position's {'xyz'[axis]} is {farthest:.2f} m, in training {limits[0, axis]:.2f} "
            f"to {limits[1, axis]:.2f} m. Check the base frame and the unit.",
        )


def examine_ee_rotations(expected: TrainingDistribution, rotations: Array) -> Iterator[Finding]:
    """Report orientations that are much farther from the mean orientation than any of training.

    rotations: [B, 4], of which only the farthest one is reported.
    """
    angles = quat_distance(torch.from_numpy(rotations), torch.tensor(expected.mean_rotation))
    max_angle = float(angles.max())
    if max_angle > expected.max_rotation_rad + ROTATION_MARGIN_RAD:
        yield Finding(
            "rotation",
            f"the end-effector is turned by {np.degrees(max_angle):.0f}° from the mean "
            f"orientation, in training by at most {np.degrees(expected.max_rotation_rad):.0f}°. "
            "Check the order of the quaternion and the frame or, if it is computed from joint "
            "angles, their zeros and signs.",
        )


def examine_color_order(
    expected: TrainingDistribution, camera: str, pixels: Array
) -> Iterator[Finding]:
    """Report images [B, 3, h, w] whose colors match training only with red and blue exchanged."""
    # Without a mean, exchanging red and blue makes no difference, so nothing is reported.
    mean_difference, std_difference = expected.red_minus_blue.get(camera, (0.0, 0.0))
    spread = max(std_difference, MIN_COLOR_SPREAD)  # one standard deviation
    red = pixels[:, 0].mean(dtype=np.float64)
    blue = pixels[:, 2].mean(dtype=np.float64)
    is_unlike = abs(red - blue - mean_difference) > MIN_UNLIKE_DEVIATIONS * spread
    is_like_when_exchanged = abs(blue - red - mean_difference) < MAX_LIKE_DEVIATIONS * spread
    if is_unlike and is_like_when_exchanged:
        yield Finding(
            camera, f"red and blue of camera {camera!r} seem to be exchanged. Send RGB, not BGR."
        )


def examine_image_transform(
    expected: TrainingDistribution, camera: str, pixels: Array
) -> Iterator[Finding]:
    """Report images [B, 3, h, w] that match those of training better if a mistake is undone.

    The mistakes are that images are turned or flipped, or that two cameras are exchanged.
    """
    if camera not in expected.mean_thumbnails:
        return
    brightness = pixels.mean(1, dtype=np.float32)  # [B, h, w]
    thumbnails = compute_thumbnails(brightness)
    candidates = []  # (correlation, transform) of each transform that explains the images
    for match in correlate_under_transforms(thumbnails, camera, expected.mean_thumbnails):
        gain = (match.correlation - match.plain_correlation).mean()
        # 2 is the largest gain that two correlations (-1 … 1) allow, so that a transform without an
        # entry is never reported.
        max_gain = expected.max_mismatch[camera].get(match.transform, 2.0)
        if gain > max_gain + MIN_CORRELATION_GAIN:
            candidates.append((float(match.correlation.mean()), match.transform))
    if not candidates:
        return
    correlation, transform = max(candidates)
    if correlation > MIN_CORRELATION:
        yield Finding(camera, f"camera {camera!r} is as if {transform}. Correct its images.")
