"""Cameras are recovered from affine point maps, like in the reference, and for known cameras."""

from pathlib import Path

import pytest
import torch

from moge_reference import load_arrays, relative_error
from spear.models.moge.infer import make_view_plane, recover_focal_and_shift, unproject


@pytest.fixture(scope="module")
def helpers(shared: Path) -> dict[str, torch.Tensor]:
    """Inputs and outputs of helper functions of the reference, by "case.name"."""
    return {name: torch.tensor(array) for name, array in load_arrays(shared, "helpers").items()}


def make_full_mask(points: torch.Tensor) -> torch.Tensor:
    """A mask [..., h, w] that says that all points [..., h, w, 3] are known."""
    return torch.ones(points.shape[:-1], dtype=torch.bool)


@pytest.mark.parametrize("case", ["exact", "masked_noisy", "empty_mask_batch"])
def test_focal_and_shift_are_the_references(helpers: dict[str, torch.Tensor], case: str) -> None:
    if case == "empty_mask_batch":
        points = helpers["focal_given_batch.points"]  # this case has no points of its own
    else:
        points = helpers[f"{case}.points"][None]
    mask = helpers.get(f"{case}.mask", make_full_mask(points)).view(points.shape[:-1])

    focal, shift = recover_focal_and_shift(points, mask)

    expected_focal = helpers[f"{case}.focal"].view(-1)
    expected_shift = helpers[f"{case}.shift"].view(-1)
    torch.testing.assert_close(focal, expected_focal, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shift, expected_shift, rtol=1e-5, atol=1e-6)


def test_view_planes_are_the_references(helpers: dict[str, torch.Tensor]) -> None:
    # The name of an expected array has the width, the height and the aspect.
    square_cells = make_view_plane(width=7, height=5)
    other_aspect = make_view_plane(width=6, height=8, aspect=1.3333)

    assert relative_error(square_cells, helpers["uv.w7_h5_none"].numpy()) < 1e-6
    assert relative_error(other_aspect, helpers["uv.w6_h8_1.3333"].numpy()) < 1e-6


def test_unprojection_is_the_references(helpers: dict[str, torch.Tensor]) -> None:
    depth = helpers["unproject.depth"]
    height, width = depth.shape[1:]
    # The reference's intrinsics are in image widths and heights.
    intrinsics = helpers["unproject.intrinsics"] * torch.tensor([[width], [height], [1]])

    points = unproject(depth, intrinsics)

    assert relative_error(points, helpers["unproject.points"].numpy()) < 1e-6


def make_wavy_surface(
    focal: float, shift: float, width: int = 90, height: int = 60
) -> torch.Tensor:
    """The points [1, h, w, 3] of a surface seen by a camera, with `shift` missing in their depth.

    The focal length is in half diagonals of the image.
    """
    uv = make_view_plane(width, height)
    depth = 2 + 0.5 * torch.sin(7 * uv[..., 0]) * torch.cos(5 * uv[..., 1])
    z = depth[..., None]
    points = torch.cat([uv / focal * z, z - shift], dim=-1)
    return points[None]


@pytest.mark.parametrize(("focal", "shift"), [(0.6, 0.0), (1.0, 0.8), (2.4, -1.5)])
def test_a_known_camera_is_recovered(focal: float, shift: float) -> None:
    points = make_wavy_surface(focal, shift)

    recovered_focal, recovered_shift = recover_focal_and_shift(points, make_full_mask(points))

    assert recovered_focal.item() == pytest.approx(focal, rel=2e-3)
    assert recovered_shift.item() == pytest.approx(shift, abs=5e-3)


def test_unknown_points_do_not_matter() -> None:
    """Unknown are points outside the mask, points that are not finite, and points with depth 0."""
    points = make_wavy_surface(1.0, 0.8)
    mask = make_full_mask(points)
    mask[:, :20] = False
    clean = recover_focal_and_shift(points, mask)

    points[:, :20] = 1e3
    points[:, 30, 5:40] = torch.nan
    points[:, 31, 5:40, 2] = 0
    points[:, 32, 5:40] = torch.inf
    dirty = recover_focal_and_shift(points, mask)

    torch.testing.assert_close(torch.stack(dirty), torch.stack(clean), rtol=5e-3, atol=5e-3)


def test_a_map_that_determines_no_camera_has_focal_1_and_shift_0() -> None:
    """Three such maps: no point is in the mask; all points are on the camera's axis, so that any
    focal length fits; and no point is finite."""
    points = make_wavy_surface(1.0, 0.8).repeat(3, 1, 1, 1)
    mask = make_full_mask(points)
    mask[0] = False
    points[1, ..., :2] = 0
    points[2] = torch.nan

    focal, shift = recover_focal_and_shift(points, mask)

    assert focal.tolist() == [1, 1, 1]
    assert shift.tolist() == [0, 0, 0]
