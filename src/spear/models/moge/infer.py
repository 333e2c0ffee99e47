"""From a MoGe network's affine point map to points in the camera frame, with the camera itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from spear.errors import SpearError
from spear.models.moge.geometry import centred_intrinsics, focal_of, recover_focal_shift, unproject
from spear.models.moge.v1 import MogeV1
from spear.models.moge.v2 import MogeV2

FINEST = 9
"""The highest resolution level."""


@dataclass(frozen=True)
class Geometry:
    """The geometry of B images; camera frame: x right, y down, z forward. Metres where the network has a
    metric scale, else up to one scale per image.

    points      [B, h, w, 3] float32; infinite where the mask is False.
    depth       [B, h, w] float32 along z; infinite where the mask is False.
    mask        [B, h, w] bool, True where a point is known and in front of the camera.
    intrinsics  [B, 3, 3] float32 pixels, found or as given; pixel centres at integer + 0.5.
    normal      [B, h, w, 3] float32 unit surface normals, 0 where the mask is False; None without a head.
    """

    points: torch.Tensor
    depth: torch.Tensor
    mask: torch.Tensor
    intrinsics: torch.Tensor
    normal: torch.Tensor | None


@torch.inference_mode()
def infer(
    model: MogeV1 | MogeV2,
    images: torch.Tensor,
    num_tokens: int | None = None,
    resolution_level: int = FINEST,
    intrinsics: torch.Tensor | None = None,
    project: bool = True,
    apply_mask: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Geometry:
    """Predict the geometry of a batch of images of one size.

    Args:
        model: the network, on any device.
        images: [B, 3, h, w], uint8 or float in 0 … 1.
        num_tokens: patches to cut an image into; None to take `resolution_level`.
        resolution_level: 0 … 9 in the range of tokens that the network was trained for.
        intrinsics: [B, 3, 3] pixels, when the cameras are known; None to find them. The shift along z is then
            fitted with the mean of both focal lengths and a centred axis, as MoGe was trained; points are
            unprojected with exactly these (our choice).
        project: put each point on the ray of its pixel, at its depth; else x and y stay as predicted.
        apply_mask: blank out what is not known, in points, depth and normals.
        dtype: float16 or bfloat16 for automatic mixed precision.

    Raises:
        SpearError: images, intrinsics, tokens or a level that do not fit.
    """
    device = next(model.parameters()).device
    if (
        images.dim() != 4
        or images.shape[1] != 3
        or not (images.dtype == torch.uint8 or images.is_floating_point())
    ):
        raise SpearError(
            f"wrong image type: {images.dtype} {tuple(images.shape)}: pass uint8 or float tensors [B, 3, h, w]"
        )
    batch, _, height, width = images.shape
    if intrinsics is not None and intrinsics.shape != (batch, 3, 3):
        raise SpearError(f"intrinsics are {tuple(intrinsics.shape)}: pass one [3, 3] matrix per image")
    if num_tokens is not None and num_tokens < 1:
        raise SpearError(
            f"num_tokens is {num_tokens}: give a positive number, MoGe was trained for about 2,000"
        )
    images = images.to(device) / 255 if images.dtype == torch.uint8 else images.to(device, torch.float32)
    tokens = tokens_at(model, resolution_level) if num_tokens is None else num_tokens
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        output = model(images, tokens)
    mask = output.mask > 0.5
    if intrinsics is None:
        focal, shift = recover_focal_shift(output.points, mask)
        intrinsics = centred_intrinsics(focal, width, height)
    else:
        intrinsics = intrinsics.to(device, torch.float32)
        _, shift = recover_focal_shift(output.points, mask, focal_of(intrinsics, width, height))
    depth = output.points[..., 2] + shift[:, None, None]
    mask = mask & (depth > 0)
    if project:
        points = unproject(depth, intrinsics)
    else:
        points = torch.cat([output.points[..., :2], depth[..., None]], dim=-1)
    if output.scale is not None:
        points, depth = points * output.scale[:, None, None, None], depth * output.scale[:, None, None]
    normal = output.normal
    if apply_mask:
        points = points.masked_fill(~mask[..., None], torch.inf)
        depth = depth.masked_fill(~mask, torch.inf)
        normal = None if normal is None else normal.masked_fill(~mask[..., None], 0)
    return Geometry(points, depth, mask, intrinsics, normal)


def tokens_at(model: MogeV1 | MogeV2, level: int) -> int:
    """How many patches a network looks at for a resolution level 0 … 9."""
    if not 0 <= level <= FINEST:
        raise SpearError(f"resolution level {level}: give one from 0 to {FINEST}")
    fewest, most = model.config.tokens
    return int(fewest + level / FINEST * (most - fewest))
