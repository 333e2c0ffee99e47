"""Estimated masks and depth: pixels near an outline find their side, flying ones come home."""

import numpy as np
import pytest
from scipy import ndimage

from labels_scenes import render
from refusals import refuses
from spear.labels.fit.image import unproject
from spear.labels.fit.masks import clean_points, decode_mask, encode_mask, erode, snap_outline
from spear.labels.fit.points import estimate_noise, find_inliers, fit_support_plane
from spear.types import Array, Frame

BLOCKS = [
    (np.array([0.05, -0.12, 0.04]), np.array([0.09, 0.07, 0.08]), 0.4),
    (np.array([0.1, 0.12, 0.05]), np.array([0.08, 0.1, 0.1]), -0.3),
]


@pytest.fixture(scope="module")
def frame() -> Frame:
    return render(BLOCKS, ["box", "can"])


def parts(frame: Frame) -> tuple[Array, Array, Array]:
    return unproject(frame.depth, frame.intrinsics), frame.depth > 0, frame.instances


def overlap(a: Array, b: Array) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("pixels", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("blur", [0.0, 0.7])
def test_a_wrong_outline_finds_its_place(frame: Frame, pixels: int, blur: float) -> None:
    points, known, instances = parts(frame)
    points = unproject(ndimage.gaussian_filter(frame.depth, blur), frame.intrinsics)
    plane = fit_support_plane(points[known & (instances == 0)])
    for number in (1, 2):
        true = instances == number
        moved = ndimage.binary_dilation if pixels > 0 else ndimage.binary_erosion
        mask = moved(true, iterations=abs(pixels)) if pixels else true
        found = snap_outline(
            mask, points, known, (instances > 0) & ~mask, plane, max(abs(pixels), 1), 0.0
        )
        assert overlap(found, true) > (0.93 if blur == 0 else 0.86)
        if pixels:
            assert overlap(found, true) > overlap(mask, true)


def test_points_far_from_all_others_are_left_out() -> None:
    points = np.random.default_rng(0).uniform((-0.05, -0.05, 0.95), (0.05, 0.05, 1.05), (400, 3))
    lonely = points[:4] + np.array([[0.3, 0, 0], [0, 0.3, 0], [0, 0, 0.3], [0, 0, -0.3]])
    assert find_inliers(np.concatenate([points, lonely])).tolist() == [True] * 400 + [False] * 4
    assert find_inliers(np.concatenate([points[:12], lonely])).all()  # too few to tell


def test_a_mask_too_thin_to_have_an_inside_stays(frame: Frame) -> None:
    points, known, _ = parts(frame)
    thin = np.zeros_like(known)
    thin[60, 40:80] = True
    assert (snap_outline(thin, points, known, np.zeros_like(thin), None, 1, 0.0) == thin).all()


def test_a_sheet_on_the_table_keeps_its_mask() -> None:
    frame = render([(np.array([0, 0, 0.0005]), np.array([0.15, 0.15, 0.001]), 0.2)], ["towel"])
    points, known, instances = parts(frame)
    plane = fit_support_plane(points[known & (instances == 0)])
    mask = ndimage.binary_dilation(instances == 1)
    assert (
        overlap(snap_outline(mask, points, known, np.zeros_like(mask), plane, 1, 0.0), mask) > 0.99
    )


def cleaned(mask: Array, points: Array, erosion: int, noise: float) -> Array:
    lifted = points.astype(np.float64)
    lifted[mask] = clean_points(mask, points, np.argwhere(mask), erosion, noise)
    return lifted


def test_flying_pixels_come_home_and_the_others_stay(frame: Frame) -> None:
    points, _, instances = parts(frame)
    mask = instances == 2
    border = mask & ~erode(mask, 1)
    top = border & (np.arange(len(mask))[:, None] < np.argwhere(mask)[:, 0].min() + 3)
    depth = frame.depth.copy()
    depth[top] += 0.06
    off = np.linalg.norm(
        cleaned(mask, unproject(depth, frame.intrinsics), 1, 0.0) - points, axis=-1
    )
    assert top.sum() > 10 and off[top].max() < 0.01 and (off[erode(mask, 1)] < 1e-6).all()
    assert (cleaned(mask, points, 0, 0.0) == points).all() and np.median(off[border]) < 1e-6


def test_smoothing_takes_noise_and_leaves_shape(frame: Frame) -> None:
    points, _, instances = parts(frame)
    mask = instances == 1
    noisy = points * (1 + 0.003 * np.random.default_rng(0).normal(size=mask.shape))[..., None]
    smooth = cleaned(mask, noisy, 0, 0.003)
    before, after = ((np.linalg.norm(p - points, axis=-1)[mask]) for p in (noisy, smooth))
    assert after.mean() < 0.65 * before.mean()
    signed = (np.linalg.norm(smooth, axis=-1) - np.linalg.norm(points, axis=-1))[
        mask & ~erode(mask, 1)
    ]
    assert abs(signed.mean()) < 0.0007  # borders do not creep in


@pytest.mark.parametrize("noise", [0.0, 0.001, 0.005])
def test_noise_is_measured(frame: Frame, noise: float) -> None:
    points, known, _ = parts(frame)
    noisy = points * (1 + noise * np.random.default_rng(0).normal(size=known.shape))[..., None]
    assert estimate_noise(noisy, known) == pytest.approx(noise, rel=0.1, abs=1e-5)
    assert estimate_noise(noisy, np.zeros_like(known)) == 0.0


def test_run_lengths_go_column_by_column_and_start_with_zeros() -> None:
    mask = np.array([[0, 1, 1], [0, 0, 1]], bool)
    assert encode_mask(mask) == [2, 1, 1, 2] and encode_mask(~mask) == [0, 2, 1, 1, 2]
    for runs in ([3, 2], [7], [8, -2]):
        refuses("2×3", decode_mask, runs, 2, 3)
