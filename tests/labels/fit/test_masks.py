"""Correcting estimated masks and points, measuring noise, and encoding masks as run lengths.

Flying pixels are pixels on an outline whose depth is between the object's and the background's.
"""

import numpy as np
import pytest
from scipy import ndimage

from labels_scenes import render_blocks
from refusals import refuses
from spear.labels.fit.image import unproject
from spear.labels.fit.masks import (
    decode_mask,
    denoise_points_at_pixels,
    encode_mask,
    erode_keeping_image_edge,
    snap_outline,
)
from spear.labels.fit.points import Plane, estimate_relative_noise, fit_support_plane, mark_inliers
from spear.types import Array, Frame

BLOCKS = [  # center (m), size (m), yaw (rad)
    (np.array([0.05, -0.12, 0.04]), np.array([0.09, 0.07, 0.08]), 0.4),
    (np.array([0.1, 0.12, 0.05]), np.array([0.08, 0.1, 0.1]), -0.3),
]


@pytest.fixture(scope="module")
def frame() -> Frame:
    """A frame of two blocks on a table: the box is instance 1, the can is instance 2."""
    return render_blocks(BLOCKS, ["box", "can"])


@pytest.fixture(scope="module")
def points(frame: Frame) -> Array:
    """The true points [h, w, 3] of the frame."""
    return unproject(frame.depth, frame.intrinsics)


def fit_table(frame: Frame, points: Array) -> Plane | None:
    is_table = (frame.depth > 0) & (frame.instances == 0)
    return fit_support_plane(points[is_table])


def compute_overlap(a: Array, b: Array) -> float:
    """Intersection over union of two masks [h, w]."""
    return float((a & b).sum() / (a | b).sum())


def add_noise(points: Array, noise: float) -> Array:
    """Move points [h, w, 3] along their rays, by a random fraction of their distance.

    The fractions have the standard deviation `noise`.
    """
    factors = 1 + noise * np.random.default_rng(0).normal(size=points.shape[:2])
    return points * factors[..., None]


def clean(mask: Array, points: Array, erosion_px: int, noise: float) -> Array:
    """The points [h, w, 3] with those of the mask cleaned."""
    cleaned = points.astype(np.float64)
    cleaned[mask] = denoise_points_at_pixels(mask, points, np.argwhere(mask), erosion_px, noise)
    return cleaned


# Outlines


@pytest.mark.parametrize("instance", [1, 2])
@pytest.mark.parametrize("shift_px", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize(("blur_px", "min_overlap"), [(0.0, 0.93), (0.7, 0.86)])
def test_a_wrong_outline_is_corrected(
    frame: Frame, instance: int, shift_px: int, blur_px: float, min_overlap: float
) -> None:
    """The given outline is `shift_px` pixels outside the true one (inside, if negative)."""
    true_mask = frame.instances == instance
    mask = true_mask
    if shift_px > 0:
        mask = ndimage.binary_dilation(true_mask, iterations=shift_px)
    elif shift_px < 0:
        mask = ndimage.binary_erosion(true_mask, iterations=-shift_px)
    blurred_depth = ndimage.gaussian_filter(frame.depth, blur_px)
    blurred_points = unproject(blurred_depth, frame.intrinsics)
    is_known = frame.depth > 0
    occupied = (frame.instances > 0) & ~mask
    plane = fit_table(frame, blurred_points)
    band_px = max(abs(shift_px), 1)

    snapped = snap_outline(
        mask, blurred_points, is_known, occupied, plane, band_px=band_px, noise=0.0
    )

    assert compute_overlap(snapped, true_mask) > min_overlap
    if shift_px:
        assert compute_overlap(snapped, true_mask) > compute_overlap(mask, true_mask)


def test_a_mask_too_thin_to_have_an_inside_is_not_changed(frame: Frame, points: Array) -> None:
    thin_mask = np.zeros(frame.depth.shape, bool)
    thin_mask[60, 40:80] = True
    occupied = np.zeros_like(thin_mask)

    snapped = snap_outline(
        thin_mask, points, frame.depth > 0, occupied, plane=None, band_px=1, noise=0.0
    )

    assert (snapped == thin_mask).all()


def test_a_sheet_on_the_table_keeps_its_mask() -> None:
    """A sheet is so flat that heights above the table cannot tell which pixels are the sheet's."""
    size = np.array([0.15, 0.15, 0.001])  # 1 mm thick
    towel = (np.array([0, 0, 0.0005]), size, 0.2)
    frame = render_blocks([towel], ["towel"])
    points = unproject(frame.depth, frame.intrinsics)
    mask = ndimage.binary_dilation(frame.instances == 1)
    occupied = np.zeros_like(mask)

    plane = fit_table(frame, points)
    snapped = snap_outline(mask, points, frame.depth > 0, occupied, plane, band_px=1, noise=0.0)

    assert compute_overlap(snapped, mask) > 0.99


# Points


def sample_cube(num_points: int) -> Array:
    """Random points in a cube with sides of 0.1 m, 1 m in front of the camera."""
    rng = np.random.default_rng(0)
    return rng.uniform((-0.05, -0.05, 0.95), (0.05, 0.05, 1.05), (num_points, 3))


def test_points_far_from_all_others_are_outliers() -> None:
    points = sample_cube(400)
    offsets = np.array([[0.3, 0, 0], [0, 0.3, 0], [0, 0, 0.3], [0, 0, -0.3]])
    distant_points = points[:4] + offsets

    is_inlier = mark_inliers(np.concatenate([points, distant_points]))

    assert is_inlier.tolist() == [True] * 400 + [False] * 4


def test_among_few_points_none_is_an_outlier() -> None:
    points = sample_cube(12)
    distant_points = points[:4] + np.array([0.3, 0, 0])

    # 16 points are twice the number of neighbors that a point is compared with: too few to judge.
    assert mark_inliers(np.concatenate([points, distant_points])).all()


def test_flying_pixels_get_the_depth_of_the_object_and_the_inside_keeps_its_own(
    frame: Frame, points: Array
) -> None:
    mask = frame.instances == 2
    border = mask & ~erode_keeping_image_edge(mask, 1)
    mask_rows = np.flatnonzero(mask.any(axis=1))
    is_top_row = np.arange(len(mask)) < mask_rows[0] + 3  # [h] above or in the mask's first 3 rows
    top_border = border & is_top_row[:, None]
    depth = frame.depth.copy()
    depth[top_border] += 0.06  # 6 cm behind the object
    flying_points = unproject(depth, frame.intrinsics)

    cleaned = clean(mask, flying_points, erosion_px=1, noise=0.0)

    error_m = np.linalg.norm(cleaned - points, axis=-1)
    assert top_border.sum() > 10
    assert error_m[top_border].max() < 0.01
    assert np.median(error_m[border]) < 1e-6
    assert (error_m[erode_keeping_image_edge(mask, 1)] < 1e-6).all()


def test_exact_points_are_not_moved(frame: Frame, points: Array) -> None:
    mask = frame.instances == 2

    assert (clean(mask, points, erosion_px=0, noise=0.0) == points).all()


def test_smoothing_takes_noise_and_moves_no_border(frame: Frame, points: Array) -> None:
    mask = frame.instances == 1
    noisy = add_noise(points, 0.003)

    smooth = clean(mask, noisy, erosion_px=0, noise=0.003)

    noisy_error = np.linalg.norm(noisy - points, axis=-1)[mask]
    smooth_error = np.linalg.norm(smooth - points, axis=-1)[mask]
    assert smooth_error.mean() < 0.65 * noisy_error.mean()
    border = mask & ~erode_keeping_image_edge(mask, 1)
    shift_m = np.linalg.norm(smooth, axis=-1) - np.linalg.norm(points, axis=-1)  # along the rays
    assert abs(shift_m[border].mean()) < 0.0007  # the noise is about 2.4 mm at 0.8 m


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.005])
def test_noise_is_measured(frame: Frame, points: Array, noise: float) -> None:
    estimate = estimate_relative_noise(add_noise(points, noise), frame.depth > 0)

    assert estimate == pytest.approx(noise, rel=0.1, abs=1e-5)


def test_without_known_points_there_is_no_noise(frame: Frame, points: Array) -> None:
    assert estimate_relative_noise(points, np.zeros(frame.depth.shape, bool)) == 0.0


# Run lengths


def test_run_lengths_go_column_by_column_and_start_with_zeros() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)

    # The columns are 00, 10, 11: two zeros, one 1, one 0, two ones.
    assert encode_mask(mask) == [2, 1, 1, 2]
    # The inverted mask begins with a one, so its first run has no zeros.
    assert encode_mask(~mask) == [0, 2, 1, 1, 2]


@pytest.mark.parametrize(
    "runs",
    [
        [3, 2],  # 5 pixels instead of 6
        [7],
        [8, -2],  # 6 pixels, but a negative run
    ],
)
def test_run_lengths_that_do_not_add_up_are_refused(runs: list[int]) -> None:
    refuses("2×3", decode_mask, runs, height=2, width=3)
