"""Cameras from affine point maps: the reference's answers, and cameras that are known."""

from pathlib import Path

import pytest
import torch

from moge_reference import arrays, error
from spear.models.moge.infer import make_view_plane, recover_focal_shift, unproject


@pytest.fixture(scope="module")
def helpers(shared: Path) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(a) for name, a in arrays(shared, "helpers").items()}


def everywhere(points: torch.Tensor) -> torch.Tensor:
    return torch.ones(points.shape[:-1], dtype=torch.bool)


def test_focal_and_shift_are_the_references(helpers: dict[str, torch.Tensor]) -> None:
    batches = {case: helpers[f"{case}.points"][None] for case in ("exact", "masked_noisy")}
    batches["empty_mask_batch"] = helpers["focal_given_batch.points"]
    for case, points in batches.items():
        mask = helpers.get(f"{case}.mask", everywhere(points)).view(points.shape[:-1])
        for name, found in zip(("focal", "shift"), recover_focal_shift(points, mask), strict=True):
            torch.testing.assert_close(
                found, helpers[f"{case}.{name}"].view(-1), rtol=1e-5, atol=1e-6
            )


def test_view_plane_and_unprojection_are_the_references(helpers: dict[str, torch.Tensor]) -> None:
    assert error(make_view_plane(7, 5), helpers["uv.w7_h5_none"].numpy()) < 1e-6
    assert error(make_view_plane(6, 8, 1.3333), helpers["uv.w6_h8_1.3333"].numpy()) < 1e-6
    depth = helpers["unproject.depth"]
    size = torch.tensor([depth.shape[2], depth.shape[1], 1]).view(3, 1)
    intrinsics = helpers["unproject.intrinsics"] * size  # theirs are in image widths and heights
    assert error(unproject(depth, intrinsics), helpers["unproject.points"].numpy()) < 1e-6


def scene(focal: float, shift: float, width: int = 90, height: int = 60) -> torch.Tensor:
    """A wavy surface [1, h, w, 3] seen by a camera, its depth off by −shift."""
    uv = make_view_plane(width, height)
    depth = 2 + 0.5 * torch.sin(7 * uv[..., 0]) * torch.cos(5 * uv[..., 1])
    return torch.cat([uv / focal * depth[..., None], depth[..., None] - shift], dim=-1)[None]


@pytest.mark.parametrize(("focal", "shift"), [(0.6, 0.0), (1.0, 0.8), (2.4, -1.5)])
def test_a_known_camera_is_found(focal: float, shift: float) -> None:
    points = scene(focal, shift)
    found = recover_focal_shift(points, everywhere(points))
    assert found[0].item() == pytest.approx(focal, rel=2e-3)
    assert found[1].item() == pytest.approx(shift, abs=5e-3)


def test_unknown_points_do_not_matter() -> None:
    points = scene(1.0, 0.8)
    mask = everywhere(points)
    mask[:, :20] = False
    clean = recover_focal_shift(points, mask)
    points[:, :20] = 1e3
    points[:, 30, 5:40] = torch.nan
    points[:, 31, 5:40, 2] = 0
    points[:, 32, 5:40] = torch.inf
    dirty = recover_focal_shift(points, mask)
    torch.testing.assert_close(torch.stack(dirty), torch.stack(clean), rtol=5e-3, atol=5e-3)


def test_without_points_there_is_a_plain_answer() -> None:
    points = scene(1.0, 0.8).repeat(3, 1, 1, 1)
    points[1, ..., :2] = 0  # every point on the axis: any focal length fits
    mask = everywhere(points)
    mask[0] = False
    points[2] = torch.nan
    focal, shift = recover_focal_shift(points, mask)
    assert focal.tolist() == [1, 1, 1] and shift.tolist() == [0, 0, 0]
