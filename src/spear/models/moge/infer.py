"""Points in the camera frame and the camera's intrinsics, from the point map of a MoGe network.

A predicted point map is affine: it is correct up to a shift along z and, for MoGe v1, a scale.
Focal lengths are in half diagonals of the image, as MoGe measures them. For images of w × h pixels,
a focal length f is f · √(w² + h²) / 2 pixels.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from spear.models.moge.networks import MogeV1, MogeV2, make_view_plane
from spear.models.vision import check_pixels
from spear.types import Array

FIT_SIDE_PX = 64  # the camera is fitted to this many rows and columns of the map, as in MoGe


@dataclass(frozen=True)
class Geometry:
    """The geometry of B images in the camera frame: x right, y down, z forward.

    The points are in meters if the network has a metric scale. Otherwise they are correct up to one
    scale per image.

    points      [B, h, w, 3] float32. They also have values where the mask is False.
    mask        [B, h, w] bool, True where a point is known and in front of the camera.
    intrinsics  [B, 3, 3] float32, in pixels. The centers of pixels have the coordinates integer +
                0.5.
    """

    points: Tensor
    mask: Tensor
    intrinsics: Tensor


@torch.inference_mode()
def infer_geometry(
    model: MogeV1 | MogeV2, pixels: Tensor, dtype: torch.dtype = torch.float32
) -> Geometry:
    """Predict the geometry of a batch of images of one size.

    Each point lies on the ray of its pixel.

    Args:
        model: The network.
        pixels: [B, 3, h, w] uint8. The images are cut into the largest number of patches for which
            the network was trained.
        dtype: float16 or bfloat16 compute in automatic mixed precision.

    Raises:
        SpearError: The images have another type, or they are too long and thin for this number of
            patches.
    """
    device = next(model.parameters()).device
    check_pixels("image", pixels, patch_px=1)  # the network resizes images of any size
    images = pixels.to(device) / 255
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = model(images, model.max_tokens)

    mask = output.mask > 0.5
    focal, shift = recover_focal_and_shift(output.points, mask)
    height, width = images.shape[2:]
    intrinsics = make_centered_intrinsics(focal, width, height)
    # Only the depth of the predicted points is used. x and y follow from the ray of the pixel.
    depth = output.points[..., 2] + shift[:, None, None]  # [B, h, w]
    points = unproject(depth, intrinsics)
    if output.scale is not None:
        points = points * output.scale[:, None, None, None]
    return Geometry(points, mask & (depth > 0), intrinsics)


class FocalAndShift(NamedTuple):
    """The camera of each of B point maps, float32.

    focal_in_half_diagonals  [B].
    shift                    [B] along z, in the points' unit.
    """

    focal_in_half_diagonals: Tensor
    shift: Tensor


def recover_focal_and_shift(points: Tensor, mask: Tensor) -> FocalAndShift:
    """Find the focal length and the shift along z that make points project to their own pixels.

    As MoGe does, we minimize the sum of squares of focal · xy / (z + shift) - uv over a subsampled
    map. This assumes that the camera's axis passes through the image's center.

    Args:
        points: [B, h, w, 3] affine point maps.
        mask: [B, h, w] bool, False where a point is unknown. Points that are not finite are
            unknown, too.

    Returns:
        The camera of each map. A map with fewer than two known points, or with all points on the
        camera's axis, has focal length 1 and shift 0.
    """
    batch, height, width = points.shape[:3]
    uv = make_view_plane(width, height, device=points.device).permute(2, 0, 1)
    # All that the fit needs of a pixel, in 6 channels [B, 6, h, w]: x, y, z, u, v and the mask.
    maps = torch.cat(
        [
            points.float().permute(0, 3, 1, 2),
            uv.expand(batch, -1, -1, -1),
            mask[:, None].float(),
        ],
        dim=1,
    )
    maps = nn.functional.interpolate(maps, (FIT_SIDE_PX, FIT_SIDE_PX), mode="nearest")
    maps_as_rows = maps.flatten(2).transpose(1, 2).detach().cpu().numpy()  # [B, n, 6]
    fits = [_fit_focal_and_shift(xyzuv_known) for xyzuv_known in maps_as_rows]
    focal_shift = torch.tensor(fits, device=points.device, dtype=torch.float32)
    return FocalAndShift(focal_shift[:, 0], focal_shift[:, 1])


def _fit_focal_and_shift(xyzuv_known: Array) -> tuple[float, float]:
    """Focal length (half diagonals) and shift of one map.

    `xyzuv_known` is [n, 6]: x, y, z, u, v and whether the point is known (1 or 0) of n pixels.
    """
    from scipy.optimize import least_squares

    is_known = xyzuv_known[:, 5] > 0
    is_finite = np.isfinite(xyzuv_known[:, :3]).all(axis=1)
    is_usable = is_known & is_finite & (xyzuv_known[:, 2] != 0)
    xy = xyzuv_known[is_usable, :2].astype(float)
    z = xyzuv_known[is_usable, 2].astype(float)
    uv = xyzuv_known[is_usable, 3:5]
    is_on_axis = not xy.any()  # then every focal length fits
    if len(z) < 2 or is_on_axis:
        return 1.0, 0.0

    def project(shift: Array) -> tuple[Array, float]:
        """Projections at focal length 1, and the focal length that brings them nearest to uv."""
        projected = xy / (z + shift)[:, None]
        # The solution of a linear least-squares problem with one unknown.
        focal = float((projected * uv).sum() / (projected**2).sum())
        return projected, focal

    def compute_residuals(shift: Array) -> Array:
        projected, focal = project(shift)
        return (focal * projected - uv).ravel()

    # Method and tolerance are MoGe's.
    shift = least_squares(compute_residuals, x0=0.0, method="lm", ftol=1e-3).x
    _, focal = project(shift)
    return focal, float(shift[0])


def make_centered_intrinsics(focal_in_half_diagonals: Tensor, width: int, height: int) -> Tensor:
    """Intrinsics [B, 3, 3] in pixels, from focal lengths [B] in half diagonals.

    The camera's axis passes through the image's center. The centers of pixels have the coordinates
    integer + 0.5.
    """
    focal_px = focal_in_half_diagonals * math.hypot(width, height) / 2
    identity = torch.eye(3, dtype=focal_px.dtype, device=focal_px.device)
    intrinsics = identity.repeat(len(focal_px), 1, 1)
    intrinsics[:, 0, 0] = focal_px
    intrinsics[:, 1, 1] = focal_px
    intrinsics[:, 0, 2] = width / 2
    intrinsics[:, 1, 2] = height / 2
    return intrinsics


def unproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Points [B, h, w, 3] in the camera frame, from depth along z [B, h, w].

    `intrinsics` are [B, 3, 3] in pixels.
    """
    height, width = depth.shape[1:]
    y_px = torch.arange(height, device=depth.device, dtype=torch.float32) + 0.5
    x_px = torch.arange(width, device=depth.device, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(y_px, x_px, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(depth.dtype)  # [h, w, 3]
    inverse_intrinsics = torch.linalg.inv(intrinsics).to(depth.dtype)
    # Rays with z = 1. As pixels are rows, they are multiplied by the transpose.
    rays = pixels @ inverse_intrinsics.mT[:, None]  # [B, h, w, 3]
    return rays * depth[..., None]
