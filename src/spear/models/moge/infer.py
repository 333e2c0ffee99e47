"""From a MoGe network's affine point map to points in the camera frame, with the camera itself.

A predicted point map is correct up to a shift along z (and, for v1, up to scale). Focal lengths are
in half diagonals of the image, as MoGe measures them: a focal length f is f · √(w² + h²) / 2
pixels.
"""

import math
from dataclasses import dataclass

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

    It is in meters if the network has a metric scale, otherwise up to one scale per image.

    points      [B, h, w, 3] float32, also where the mask is False.
    mask        [B, h, w] bool, True where a point is known and in front of the camera.
    intrinsics  [B, 3, 3] float32, pixels; pixel centers are at integer + 0.5.
    """

    points: Tensor
    mask: Tensor
    intrinsics: Tensor


@torch.inference_mode()
def infer_geometry(
    model: MogeV1 | MogeV2, images: Tensor, dtype: torch.dtype = torch.float32
) -> Geometry:
    """Predict the geometry of a batch of images of one size.

    Each point lies on the ray of its pixel.

    Args:
        model: The network.
        images: [B, 3, h, w] uint8. They are cut into the most patches that the network was trained
            for.
        dtype: float16 or bfloat16 for automatic mixed precision.

    Raises:
        SpearError: For images of another type, and for one that is too thin for so few patches.
    """
    device = next(model.parameters()).device
    check_pixels("image", images, 1)
    images = images.to(device) / 255
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = model(images, model.max_tokens)

    mask = output.mask > 0.5
    focal, shift = recover_focal_shift(output.points, mask)
    height, width = images.shape[2:]
    intrinsics = make_centered_intrinsics(focal, width, height)
    depth = output.points[..., 2] + shift[:, None, None]
    points = unproject(depth, intrinsics)
    if output.scale is not None:
        points = points * output.scale[:, None, None, None]
    return Geometry(points, mask & (depth > 0), intrinsics)


def recover_focal_shift(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Find the focal length and the shift along z that make points project to their own pixels.

    Least squares over focal · xy / (z + shift) - uv on a subsampled map, as MoGe fits it. It
    assumes that the camera's axis passes through the image's center.

    Args:
        points: [B, h, w, 3] affine point maps.
        mask: [B, h, w] bool, False where a point is unknown. Points that are not finite are
            unknown, too.

    Returns:
        Focal lengths [B] in half diagonals and shifts [B] in the points' unit, float32. A map with
        fewer than two known points has focal length 1 and shift 0.
    """
    batch, height, width = points.shape[:3]
    uv = make_view_plane(width, height, device=points.device).permute(2, 0, 1)
    maps = torch.cat(
        [
            points.float().permute(0, 3, 1, 2),
            uv.expand(batch, -1, -1, -1),
            mask[:, None].float(),
        ],
        dim=1,
    )
    maps = nn.functional.interpolate(maps, (FIT_SIDE_PX, FIT_SIDE_PX), mode="nearest")
    rows_per_map = maps.flatten(2).transpose(1, 2).detach().cpu().numpy()
    fits = [_fit_focal_shift(rows) for rows in rows_per_map]
    focal_shift = torch.tensor(fits, device=points.device, dtype=torch.float32)
    return focal_shift[:, 0], focal_shift[:, 1]


def _fit_focal_shift(rows: Array) -> tuple[float, float]:
    """Focal length and shift of one map.

    rows: [n, 6], x, y, z, u, v and whether the point is known.
    """
    from scipy.optimize import least_squares

    is_known = rows[:, 5] > 0
    is_finite = np.isfinite(rows[:, :3]).all(axis=1)
    is_usable = is_known & is_finite & (rows[:, 2] != 0)
    xy = rows[is_usable, :2].astype(float)
    z = rows[is_usable, 2].astype(float)
    uv = rows[is_usable, 3:5]
    if len(z) < 2 or not xy.any():
        return 1.0, 0.0

    def project(shift: Array) -> tuple[Array, float]:
        """Projections at focal length 1, and the focal length that brings them nearest to uv."""
        projected = xy / (z + shift)[:, None]
        focal = float((projected * uv).sum() / (projected**2).sum())
        return projected, focal

    def residuals(shift: Array) -> Array:
        projected, focal = project(shift)
        return (focal * projected - uv).ravel()

    shift = least_squares(residuals, x0=0.0, method="lm", ftol=1e-3).x
    _, focal = project(shift)
    return focal, float(shift[0])


def make_centered_intrinsics(focal: Tensor, width: int, height: int) -> Tensor:
    """Focal lengths [B] in half diagonals -> intrinsics [B, 3, 3] in pixels.

    Pixel centers are at integer + 0.5.
    """
    focal_px = focal * math.hypot(width, height) / 2
    intrinsics = torch.eye(3, dtype=focal.dtype, device=focal.device).repeat(len(focal), 1, 1)
    intrinsics[:, 0, 0] = focal_px
    intrinsics[:, 1, 1] = focal_px
    intrinsics[:, 0, 2] = width / 2
    intrinsics[:, 1, 2] = height / 2
    return intrinsics


def unproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Unproject depth along z [B, h, w] to points [B, h, w, 3] in the camera frame.

    intrinsics: [B, 3, 3] in pixels.
    """
    height, width = depth.shape[1:]
    y_px = torch.arange(height, device=depth.device, dtype=torch.float32) + 0.5
    x_px = torch.arange(width, device=depth.device, dtype=torch.float32) + 0.5
    y, x = torch.meshgrid(y_px, x_px, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(depth.dtype)
    rays = pixels @ torch.linalg.inv(intrinsics).to(depth.dtype).mT[:, None]
    return rays * depth[..., None]
