"""Checks that compare a robot's observations with the training distribution summary."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch

from spear.geometry import quat_distance
from spear.monitor.distribution import (
    OPPOSITE_OPENING,
    TrainingDistribution,
    compute_thumbnails,
    match_transforms,
)
from spear.types import Array

POSITION_MARGIN_M = 0.1  # a position this far beyond the range of training is reported
ROTATION_MARGIN_RAD = np.pi / 4  # so is an orientation that is turned this much further
MIN_COLOR_SPREAD = 3.0  # of 255: a smaller difference between colors is noise
MIN_CORRELATION = 0.6  # a transformed image must be at least this similar to the mean image,
MIN_CORRELATION_GAIN = 0.2  # and gain this much more by the transform than any image of training


class Finding(NamedTuple):
    """One thing that a check found. Findings with the same key are reported once."""

    key: str
    message: str


def check_first_state(expected: TrainingDistribution, state: Array) -> Iterator[Finding]:
    """Compare the gripper of a robot's first state [8] with the beginnings of the episodes of
    training.
    """
    opening = state[7]
    mean_opening = expected.mean_initial_opening
    if abs(opening - mean_opening) > OPPOSITE_OPENING:
        yield Finding(
            "gripper",
            f"the gripper begins at {opening:.2f}, in training at {mean_opening:.2f} in the mean: "
            "inverted? 1 is open, 0 closed",
        )


def check_observations(
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
    yield from check_positions(expected, states[:, :3])
    yield from check_rotations(expected, states[:, 3:7])
    for camera, pixels in images.items():
        yield from check_color_order(expected, camera, pixels)
        if np.ptp(pixels) < MIN_COLOR_SPREAD:
            yield Finding(camera, f"camera {camera!r} shows nothing: is it covered, or off?")
        else:
            yield from check_image_transform(expected, camera, pixels)


def check_positions(expected: TrainingDistribution, positions: Array) -> Iterator[Finding]:
    """Report each axis along which positions [B, 3] (m) lie far outside the range of training."""
    limits = np.array([expected.min_position_m, expected.max_position_m])
    distance_from_middle = np.abs(positions - limits.mean(0))
    max_distance = 1.5 * np.ptp(limits, 0) + POSITION_MARGIN_M
    for axis in np.flatnonzero(distance_from_middle.max(0) > max_distance):
        farthest = positions[distance_from_middle[:, axis].argmax(), axis]
        yield Finding(
            f"state {axis}",
            f"{'xyz'[axis]} is {farthest:.2f} m, training had {limits[0, axis]:.2f} … "
            f"{limits[1, axis]:.2f}: another base frame or unit?",
        )


def check_rotations(expected: TrainingDistribution, rotations: Array) -> Iterator[Finding]:
    """Report orientations [B, 4] that are turned much further than any of training."""
    angles = quat_distance(torch.from_numpy(rotations), torch.tensor(expected.mean_rotation))
    max_angle = float(angles.max())
    if max_angle > expected.max_rotation_rad + ROTATION_MARGIN_RAD:
        yield Finding(
            "rotation",
            f"turned by {np.degrees(max_angle):.0f}° from the mean orientation, in training by "
            f"{np.degrees(expected.max_rotation_rad):.0f}° at most: another order of the "
            "quaternion, or another frame?",
        )


def check_color_order(
    expected: TrainingDistribution, camera: str, pixels: Array
) -> Iterator[Finding]:
    """Report images [B, 3, h, w] that match the colors of training only with red and blue
    exchanged.
    """
    mean_difference, std_difference = expected.red_minus_blue.get(camera, (0.0, 0.0))
    spread = max(std_difference, MIN_COLOR_SPREAD)
    red = pixels[:, 0].mean(dtype=np.float64)
    blue = pixels[:, 2].mean(dtype=np.float64)
    is_unlike = abs(red - blue - mean_difference) > 4 * spread
    is_like_when_exchanged = abs(blue - red - mean_difference) < 2 * spread
    if is_unlike and is_like_when_exchanged:
        yield Finding(
            camera, f"camera {camera!r}: red and blue are as if exchanged: send RGB, not BGR"
        )


def check_image_transform(
    expected: TrainingDistribution, camera: str, pixels: Array
) -> Iterator[Finding]:
    """Report images [B, 3, h, w] that are like those of training only when turned, flipped or
    exchanged.
    """
    if camera not in expected.mean_thumbnails:
        return
    thumbnails = compute_thumbnails(pixels.mean(1, dtype=np.float32))
    candidates = []
    for match in match_transforms(thumbnails, camera, expected.mean_thumbnails):
        gain = (match.correlation - match.plain_correlation).mean()
        max_gain = expected.max_mismatch[camera].get(match.transform, 2.0)  # 2: never reached
        if gain > max_gain + MIN_CORRELATION_GAIN:
            candidates.append((float(match.correlation.mean()), match.transform))
    if not candidates:
        return
    correlation, transform = max(candidates)
    if correlation > MIN_CORRELATION:
        yield Finding(camera, f"camera {camera!r} is as if {transform}")
