"""Estimated masks and depth: pixels near an outline find their side, flying ones come back."""

import numpy as np
import pytest
from scipy import ndimage

from labels_scenes import render_blocks
from refusals import refuses
from spear.labels.fit.image import unproject
from spear.labels.fit.masks import clean_points, decode_mask, encode_mask, erode, snap_outline
from spear.labels.fit.points import Plane, estimate_noise, find_inliers, fit_support_plane
from spear.types import Array, Frame

BLOCKS = [
    (np.array([0.05, -0.12, 0.04]), np.array([0.09, 0.07, 0.08]), 0.4),
    (np.array([0.1, 0.12, 0.05]), np.array([0.08, 0.1, 0.1]), -0.3),
]


@pytest.fixture(scope="module")
def frame() -> Frame:
    return render_blocks(BLOCKS, ["box", "can"])


@pytest.fixture(scope="module")
def points(frame: Frame) -> Array:
    return unproject(frame.depth, frame.intrinsics)


def fit_table(frame: Frame, points: Array) -> Plane | None:
    return fit_support_plane(points[(frame.depth > 0) & (frame.instances == 0)])


def compute_overlap(a: Array, b: Array) -> float:
    return float((a & b).sum() / (a | b).sum())


def add_noise(points: Array, noise: float) -> Array:
    factors = 1 + noise * np.random.default_rng(0).normal(size=points.shape[:2])
    return points * factors[..., None]


def clean(mask: Array, points: Array, erosion_px: int, noise: float) -> Array:
    """The points [h, w, 3] with those of the mask cleaned."""
    cleaned = points.astype(np.float64)
    cleaned[mask] = clean_points(mask, points, np.argwhere(mask), erosion_px, noise)
    return cleaned


# Outlines


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("shift_px", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize(("blur", "min_overlap"), [(0.0, 0.93), (0.7, 0.86)])
def test_a_wrong_outline_is_corrected(
    frame: Frame, number: int, shift_px: int, blur: float, min_overlap: float
) -> None:
    true_mask = frame.instances == number
    mask = true_mask
    if shift_px > 0:
        mask = ndimage.binary_dilation(true_mask, iterations=shift_px)
    elif shift_px < 0:
        mask = ndimage.binary_erosion(true_mask, iterations=-shift_px)
    blurred_points = unproject(ndimage.gaussian_filter(frame.depth, blur), frame.intrinsics)
    is_known = frame.depth > 0
    occupied = (frame.instances > 0) & ~mask
    plane = fit_table(frame, blurred_points)
    band_px = max(abs(shift_px), 1)

    snapped = snap_outline(mask, blurred_points, is_known, occupied, plane, band_px, 0.0)

    assert compute_overlap(snapped, true_mask) > min_overlap
    if shift_px:
        assert compute_overlap(snapped, true_mask) > compute_overlap(mask, true_mask)


def test_a_mask_too_thin_to_have_an_inside_stays(frame: Frame, points: Array) -> None:
    thin_mask = np.zeros(frame.depth.shape, bool)
    thin_mask[60, 40:80] = True
    occupied = np.zeros_like(thin_mask)

    snapped = snap_outline(thin_mask, points, frame.depth > 0, occupied, None, 1, 0.0)

    assert (snapped == thin_mask).all()


def test_a_sheet_on_the_table_keeps_its_mask() -> None:
    towel = (np.array([0, 0, 0.0005]), np.array([0.15, 0.15, 0.001]), 0.2)
    frame = render_blocks([towel], ["towel"])
    points = unproject(frame.depth, frame.intrinsics)
    mask = ndimage.binary_dilation(frame.instances == 1)
    occupied = np.zeros_like(mask)

    plane = fit_table(frame, points)
    snapped = snap_outline(mask, points, frame.depth > 0, occupied, plane, 1, 0.0)

    assert compute_overlap(snapped, mask) > 0.99


# Points


def test_points_far_from_all_others_are_outliers() -> None:
    points = np.random.default_rng(0).uniform((-0.05, -0.05, 0.95), (0.05, 0.05, 1.05), (400, 3))
    offsets = np.array([[0.3, 0, 0], [0, 0.3, 0], [0, 0, 0.3], [0, 0, -0.3]])
    distant_points = points[:4] + offsets

    is_inlier = find_inliers(np.concatenate([points, distant_points]))

    assert is_inlier.tolist() == [True] * 400 + [False] * 4


def test_among_few_points_none_is_an_outlier() -> None:
    points = np.random.default_rng(0).uniform((-0.05, -0.05, 0.95), (0.05, 0.05, 1.05), (12, 3))
    distant_points = points[:4] + np.array([0.3, 0, 0])

    assert find_inliers(np.concatenate([points, distant_points])).all()


def test_flying_pixels_come_back_and_the_inside_stays(frame: Frame, points: Array) -> None:
    mask = frame.instances == 2
    border = mask & ~erode(mask, 1)
    top_border = border & (np.arange(len(mask))[:, None] < np.argwhere(mask)[:, 0].min() + 3)
    depth = frame.depth.copy()
    depth[top_border] += 0.06
    flying_points = unproject(depth, frame.intrinsics)

    cleaned = clean(mask, flying_points, erosion_px=1, noise=0.0)

    error = np.linalg.norm(cleaned - points, axis=-1)
    assert top_border.sum() > 10
    assert error[top_border].max() < 0.01
    assert np.median(error[border]) < 1e-6
    assert (error[erode(mask, 1)] < 1e-6).all()


def test_exact_points_stay(frame: Frame, points: Array) -> None:
    mask = frame.instances == 2

    assert (clean(mask, points, erosion_px=0, noise=0.0) == points).all()


def test_smoothing_takes_noise_and_moves_no_border(frame: Frame, points: Array) -> None:
    mask = frame.instances == 1
    noisy = add_noise(points, 0.003)

    smooth = clean(mask, noisy, erosion_px=0, noise=0.003)

    noisy_error = np.linalg.norm(noisy - points, axis=-1)[mask]
    smooth_error = np.linalg.norm(smooth - points, axis=-1)[mask]
    assert smooth_error.mean() < 0.65 * noisy_error.mean()
    border = mask & ~erode(mask, 1)
    shift = np.linalg.norm(smooth, axis=-1) - np.linalg.norm(points, axis=-1)
    assert abs(shift[border].mean()) < 0.0007


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.005])
def test_noise_is_measured(frame: Frame, points: Array, noise: float) -> None:
    estimate = estimate_noise(add_noise(points, noise), frame.depth > 0)

    assert estimate == pytest.approx(noise, rel=0.1, abs=1e-5)


def test_without_known_points_there_is_no_noise(frame: Frame, points: Array) -> None:
    assert estimate_noise(points, np.zeros(frame.depth.shape, bool)) == 0.0


# Run lengths


def test_run_lengths_go_column_by_column_and_start_with_zeros() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)

    assert encode_mask(mask) == [2, 1, 1, 2]
    assert encode_mask(~mask) == [0, 2, 1, 1, 2]


@pytest.mark.parametrize("runs", [[3, 2], [7], [8, -2]])
def test_run_lengths_that_do_not_add_up_are_refused(runs: list[int]) -> None:
    refuses("2×3", decode_mask, runs, 2, 3)
