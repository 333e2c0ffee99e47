"""Geometry of MoGe's affine point maps: where pixels lie on the view plane, and which camera fits the points.

A predicted map is right up to a shift along z (and, for v1, up to scale). MoGe measures the view plane, and
focal lengths, in half diagonals of the image: a focal length f is f · √(w² + h²) / 2 pixels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from spear.types import Array

FIT_SIDE = 64
"""The camera is fitted to this many rows and columns of the map, as MoGe does."""


def view_plane(
    width: int, height: int, aspect: float | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """MoGe's uv grid: view-plane coordinates of a grid's cell centres [height, width, 2] float32, in half
    diagonals.

    u runs to the right and v down; both are 0 at the image's centre. aspect: width / height of the image that
    the grid covers, when its cells are not square.
    """
    ratio = width / height if aspect is None else aspect
    diagonal = math.sqrt(1 + ratio**2)
    ends = [(n - 1) / n * span / diagonal for n, span in ((width, ratio), (height, 1.0))]
    u, v = (torch.linspace(-end, end, n, device=device) for end, n in zip(ends, (width, height), strict=True))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def recover_focal_shift(
    points: torch.Tensor, mask: torch.Tensor | None = None, focal: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The focal length and the shift along z that make points project to their own pixels.

    Least squares over focal · xy / (z + shift) − uv on a subsampled map, as MoGe fits it. The camera's axis
    is taken to pass through the image's centre.

    Args:
        points: [B, h, w, 3] affine point maps.
        mask: [B, h, w] bool, False where a point is unknown; None for all known. Points that are not finite
            count as unknown.
        focal: [B] known focal lengths, in half diagonals; None to find them.

    Returns:
        focal [B] (in half diagonals) and shift [B] (in the points' unit), float32. A map of fewer than two
        known points has focal 1 (or the given one) and shift 0.
    """
    height, width = points.shape[1:3]
    if mask is None:
        mask = torch.ones_like(points[..., 0], dtype=torch.bool)
    uv = view_plane(width, height, device=points.device).permute(2, 0, 1).expand(len(points), -1, -1, -1)
    maps = torch.cat([points.float().permute(0, 3, 1, 2), uv, mask[:, None].float()], dim=1)
    maps = nn.functional.interpolate(maps, (FIT_SIDE, FIT_SIDE), mode="nearest")
    rows = maps.flatten(2).transpose(1, 2).detach().cpu().numpy()
    known = [None] * len(rows) if focal is None else focal.tolist()
    fits = torch.tensor([_fit(r, f) for r, f in zip(rows, known, strict=True)], device=points.device)
    return fits[:, 0], fits[:, 1]


def _fit(rows: Array, focal: float | None) -> tuple[float, float]:
    """Focal and shift of one map; rows [n, 6] are x, y, z, u, v, known."""
    from scipy.optimize import least_squares

    usable = (rows[:, 5] > 0) & np.isfinite(rows[:, :3]).all(axis=1) & (rows[:, 2] != 0)
    xy, z, uv = rows[usable, :2].astype(float), rows[usable, 2].astype(float), rows[usable, 3:5]
    if len(z) < 2 or not xy.any():
        return 1.0 if focal is None else focal, 0.0

    def project(shift: Array) -> tuple[Array, float]:
        plane = xy / (z + shift)[:, None]
        return plane, float((plane * uv).sum() / (plane**2).sum()) if focal is None else focal

    def error(shift: Array) -> Array:
        plane, scale = project(shift)
        return (scale * plane - uv).ravel()

    shift = least_squares(error, x0=0.0, method="lm", ftol=1e-3).x
    return project(shift)[1], float(shift[0])


def centred_intrinsics(focal: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Intrinsics [B, 3, 3], pixels (pixel centres at integer + 0.5), of focal lengths [B] in half
    diagonals."""
    intrinsics = torch.eye(3, dtype=focal.dtype, device=focal.device).repeat(len(focal), 1, 1)
    intrinsics[:, 0, 0] = intrinsics[:, 1, 1] = focal * math.hypot(width, height) / 2
    intrinsics[:, 0, 2], intrinsics[:, 1, 2] = width / 2, height / 2
    return intrinsics


def intrinsics_from_fov(fov_x: float, width: int, height: int) -> torch.Tensor:
    """Intrinsics [3, 3], pixels, of a camera with square pixels and a horizontal field of view in degrees."""
    focal = width / math.tan(math.radians(fov_x) / 2) / math.hypot(width, height)
    return centred_intrinsics(torch.tensor([focal]), width, height)[0]


def focal_of(intrinsics: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Intrinsics [B, 3, 3] in pixels -> focal lengths [B] in half diagonals, the mean of x and y."""
    return (intrinsics[:, 0, 0] + intrinsics[:, 1, 1]) / math.hypot(width, height)


def unproject(depth: torch.Tensor, intrinsics: torch.Tensor) -> torch.Tensor:
    """Depth along z [B, h, w] and intrinsics [B, 3, 3] in pixels -> points [B, h, w, 3], camera frame."""
    height, width = depth.shape[1:]
    y, x = torch.meshgrid(
        torch.arange(height, device=depth.device) + 0.5,
        torch.arange(width, device=depth.device) + 0.5,
        indexing="ij",
    )
    pixels = torch.stack([x, y, torch.ones_like(x)], dim=-1).to(depth.dtype)
    rays = pixels @ torch.linalg.inv(intrinsics).to(depth.dtype).mT[:, None]
    return rays * depth[..., None]
