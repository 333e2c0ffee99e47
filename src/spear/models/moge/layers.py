"""What MoGe v1 and MoGe-2 share: the DINOv2 sizes, what a network returns, and their convolutions.

Written after MoGe (arXiv 2410.19115, 2507.02546); the modules are nested so that they carry the names of the
published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Dinov2Config

from spear.errors import SpearError, check_known

PATCH = 14
ENCODERS = {"dinov2_vits14": (384, 12, 6), "dinov2_vitb14": (768, 12, 12), "dinov2_vitl14": (1024, 24, 16)}
"""DINOv2's names -> (width, layers, attention heads)."""


@dataclass(frozen=True)
class MogeOutput:
    """What a network says of B images, before a camera is fitted (see `spear.models.moge.infer.infer`).

    points  [B, h, w, 3] float32, affine: z is off by a shift, and all by a scale.
    mask    [B, h, w] float32, over 0.5 where a point is known.
    scale   [B] float32 metres per unit of the points, or None.
    """

    points: torch.Tensor
    mask: torch.Tensor
    scale: torch.Tensor | None = None


def dinov2_config(encoder: str) -> Dinov2Config:
    """The config of one of `ENCODERS` as MoGe uses it. Raises `SpearError` for another name."""
    check_known("MoGe encoder", ENCODERS, encoder)
    width, layers, heads = ENCODERS[encoder]
    ours: dict[str, Any] = {"position_offset": 0.1, "attn_implementation": "sdpa"}
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        patch_size=PATCH,
        image_size=37 * PATCH,
        use_mask_token=False,
        **ours,
    )


def check_fixed(part: str, config: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Refuse a published config whose fields, where given, are not what is built here."""
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise SpearError(
                f"MoGe config not supported: {part}{key} is {config[key]!r}, only {value!r} is: "
                "use one of the published checkpoints"
            )


def conv3(width: int, out: int) -> nn.Conv2d:
    """A 3×3 convolution that repeats the edge outwards."""
    return nn.Conv2d(width, out, 3, padding=1, padding_mode="replicate")


class ResidualBlock(nn.Module):
    """x + conv(relu(norm(conv(relu(norm(x)))))), the norms over groups, or none. [B, width, h, w]."""

    def __init__(self, width: int, hidden: int, norms: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(1, width) if norms else nn.Identity(),
            nn.ReLU(),
            conv3(width, hidden),
            nn.GroupNorm(hidden // 32, hidden) if norms else nn.Identity(),
            nn.ReLU(),
            conv3(hidden, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, width, h, w] -> the same."""
        return x + self.layers(x)


def learned_upsample(width: int, out: int) -> nn.Sequential:
    """[B, width, h, w] -> [B, out, 2h, 2w], by a transposed convolution and a smoothing one."""
    return nn.Sequential(nn.ConvTranspose2d(width, out, 2, stride=2), conv3(out, out))


def bilinear_upsample(width: int, out: int) -> nn.Sequential:
    """[B, width, h, w] -> [B, out, 2h, 2w], bilinear, then a convolution."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv3(width, out))


def view_plane(
    width: int, height: int, aspect: float | None = None, device: torch.device | None = None
) -> torch.Tensor:
    """MoGe's uv grid: view-plane coordinates of a grid's cell centres, [height, width, 2] float32.

    MoGe measures the view plane in half diagonals of the image. u runs to the right and v down; both are 0 at
    the image's centre. aspect: width / height of the image that the grid covers, if cells are not square.
    """
    ratio = width / height if aspect is None else aspect
    diagonal = math.sqrt(1 + ratio**2)
    ends = [(n - 1) / n * span / diagonal for n, span in ((width, ratio), (height, 1.0))]
    u, v = (torch.linspace(-end, end, n, device=device) for end, n in zip(ends, (width, height), strict=True))
    return torch.stack(torch.meshgrid(u, v, indexing="xy"), dim=-1)


def uv_channels(batch: int, width: int, height: int, aspect: float, like: torch.Tensor) -> torch.Tensor:
    """`view_plane` as two channels [B, 2, height, width], of the type and device of another tensor;
    computed in float32 first: in float16 the errors of the steps would add up along a row."""
    uv = view_plane(width, height, aspect, like.device).to(like.dtype)
    return uv.permute(2, 0, 1).expand(batch, -1, -1, -1)


def resize(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Bilinear, without antialias. [B, c, h, w] -> [B, c, height, width]."""
    return nn.functional.interpolate(x, (height, width), mode="bilinear", align_corners=False)


def exponential_points(raw: torch.Tensor) -> torch.Tensor:
    """MoGe's "exp" output: (x / z, y / z, log z) [B, 3, h, w] -> points [B, h, w, 3]."""
    plane, log_z = raw.permute(0, 2, 3, 1).split([2, 1], dim=-1)
    z = log_z.exp()
    return torch.cat([plane * z, z], dim=-1)
