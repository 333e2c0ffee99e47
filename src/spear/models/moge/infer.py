"""From a MoGe network's affine point map to points in the camera frame, with the camera itself.

A predicted map is right up to a shift along z (and, for v1, up to scale). Focal lengths are in half diagonals
of the image, as MoGe measures them: a focal length f is f · √(w² + h²) / 2 pixels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from spear.models.moge.networks import MogeV1, MogeV2, make_view_plane
from spear.models.vision import check_pixels
from spear.types import Array

FIT_SIDE_PX = 64
"""The camera is fitted to this many rows and columns of the map, as MoGe does."""


@dataclass(frozen=True)
class Geometry:
    """The geometry of B images; camera frame: x right, y down, z forward.

    In metres where the network has a metric scale, else up to one scale per image.

    points      [B, h, w, 3] float32, also where the mask is False.
    mask        [B, h, w] bool, True where a point is known and in front of the camera.
    intrinsics  [B, 3, 3] float32 pixels; pixel centres at integer + 0.5.
    """

    points: Tensor
    mask: Tensor
    intrinsics: Tensor


@torch.inference_mode()
def infer_geometry(
    model: MogeV1 | MogeV2, images: Tensor, dtype: torch.dtype = torch.float32
) -> Geometry:
    """Predict the geometry of a batch of images of one size; each point lies on the ray of its pixel.

    images  [B, 3, h, w] uint8, cut into the most patches that the network was trained for.
    dtype   float16 or bfloat16 for automatic mixed precision.

    Raises `SpearError` for other images, and for one that is too thin for so few patches.
    """
    device = next(model.parameters()).device
    check_pixels("image", images, 1)
    images = images.to(device) / 255
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = model(images, model.max_tokens)
    mask = output.mask > 0.5
    focal, shift = recover_focal_shift(output.points, mask)
    intrinsics = make_centered_intrinsics(focal, *images.shape[:1:-1])
    depth = output.points[..., 2] + shift[:, None, None]
    points = unproject(depth, intrinsics)
    if output.scale is not None:
        points = points * output.scale[:, None, None, None]
    return Geometry(points, mask & (depth > 0), intrinsics)


def recover_focal_shift(points: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The focal length and the shift along z that make points project to their own pixels.

    Least squares over focal · xy / (z + shift) − uv on a subsampled map, as MoGe fits it. The camera's axis
    is taken to pass through the image's centre.

    points [B, h, w, 3] affine point maps. mask [B, h, w] bool, False where a point is unknown, as points that
    are not finite are. Returns focal [B] (in half diagonals) and shift [B] (in the points' unit), float32. A
    map of fewer than two known points has focal 1 and shift 0.
    """
    height, width = points.shape[1:3]
    uv = (
        make_view_plane(width, height, device=points.device)
        .permute(2, 0, 1)
        .expand(len(points), -1, -1, -1)
    )
    maps = torch.cat([points.float().permute(0, 3, 1, 2), uv, mask[:, None].float()], dim=1)
    maps = nn.functional.interpolate(maps, (FIT_SIDE_PX, FIT_SIDE_PX), mode="nearest")
    rows = maps.flatten(2).transpose(1, 2).detach().cpu().numpy()
    fits = torch.tensor([_fit(row) for row in rows], device=points.device)
    return fits[:, 0], fits[:, 1]


def _fit(rows: Array) -> tuple[float, float]:
    """Focal and shift of one map; rows [n, 6] are x, y, z, u, v, known."""
    from scipy.optimize import least_squares

    usable = (rows[:, 5] > 0) & np.isfinite(rows[:, :3]).all(axis=1) & (rows[:, 2] != 0)
    xy, z, uv = rows[usable, :2].astype(float), rows[usable, 2].astype(float), rows[usable, 3:5]
    if len(z) < 2 or not xy.any():
        return 1.0, 0.0

    def project(shift: Array) -> tuple[Array, float]:
        plane = xy / (z + shift)[:, None]
        return plane, float((plane * uv).sum() / (plane**2).sum())

    def error(shift: Array) -> Array:
        plane, scale = project(shift)
        return (scale * plane - uv).ravel()

    shift = least_squares(error, x0=0.0, method="lm", ftol=1e-3).x
    return project(shift)[1], float(shift[0])


def make_centered_intrinsics(focal: Tensor, width: int, height: int) -> Tensor:
    """Focal lengths [B] in half diagonals -> intrinsics [B, 3, 3], pixels (centres at integer + 0.5)."""
    intrinsics = torch.eye(3, dtype=focal.dtype, device=focal.device).repeat(len(focal), 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal * math.hypot(width, height) / 2
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2
    return intrinsics


def unproject(depth: Tensor, intrinsics: Tensor) -> Tensor:
    """Depth along z [B, h, w] and intrinsics [B, 3, 3] in pixels -> points [B, h, w, 3], camera frame."""
    centres = (torch.arange(size, device=depth.device) + 0.5 for size in depth.shape[1:])
    y, x = torch.meshgrid(*centres, indexing="ij")
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(depth.dtype)
    rays = pixels @ torch.linalg.inv(intrinsics).to(depth.dtype).mT[:, None]
    return rays * depth[..., None]
