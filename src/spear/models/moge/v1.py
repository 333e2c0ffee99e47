"""MoGe v1 (arXiv 2410.19115): one image -> a point map up to scale and shift along z, and where it is known.

What labelled SPEAR's images. `spear.models.moge.checkpoint.load_moge` reads its published weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from spear.errors import SpearError
from spear.models.moge.encoder import MogeEncoder
from spear.models.moge.layers import (
    PATCH,
    MogeOutput,
    ResidualBlock,
    check_fixed,
    conv3,
    dinov2_config,
    exponential_points,
    learned_upsample,
    resize,
    uv_channels,
)
from spear.models.vision import IMAGENET_MEAN, IMAGENET_STD, standardize
from spear.types import Unit

_FIXED = {
    "remap_output": "exp",
    "output_mask": True,
    "split_head": True,
    "res_block_norm": "group_norm",
    "last_res_blocks": 0,
    "last_conv_size": 1,
    "mask_threshold": 0.5,
}


@dataclass(frozen=True)
class MogeV1Config:
    """The numbers of a MoGe v1.

    encoder         one of `spear.models.moge.layers.ENCODERS`.
    layers          how many of the encoder's last layers are read.
    project         channels that each of them is projected to.
    widths          channels of the head's levels; each doubles the resolution.
    hidden_times    width of a residual block's inside, as a multiple of its own.
    blocks          residual blocks per level.
    last            channels before the output.
    tokens          the fewest and the most patches that an image should be cut into.
    """

    encoder: str = "dinov2_vitl14"
    layers: int = 4
    project: int = 512
    widths: tuple[int, ...] = (256, 128, 64)
    hidden_times: int = 2
    blocks: int = 2
    last: int = 32
    tokens: tuple[int, int] = (1275, 2551)

    @staticmethod
    def from_published(config: Mapping[str, Any]) -> MogeV1Config:
        """From a published checkpoint's `model_config`. Raises `SpearError` for what is not supported."""
        check_fixed("", {"remap_output": "linear", **config}, _FIXED)
        tokens = config.get("num_tokens_range", (1200, 2500))
        if "trained_area_range" in config:  # the released checkpoint's older field, in pixels
            tokens = [int(area) // PATCH**2 for area in config["trained_area_range"]]
        return MogeV1Config(
            encoder=config.get("encoder", "dinov2_vitb14"),
            layers=config.get("intermediate_layers", 4),
            project=config.get("dim_proj", 512),
            widths=tuple(config.get("dim_upsample", (256, 128, 128))),
            hidden_times=config.get("dim_times_res_block_hidden", 1),
            blocks=config.get("num_res_blocks", 1),
            last=config.get("last_conv_channels", 32),
            tokens=(int(tokens[0]), int(tokens[1])),
        )


class MogeV1(nn.Module):
    """The network: DINOv2's last layers, summed after a projection each, and a convolutional head."""

    unit: Unit = "relative"

    def __init__(self, config: MogeV1Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = MogeEncoder(dinov2_config(config.encoder))
        self.head = MogeV1Head(config, self.encoder.backbone.config.hidden_size)

    def cut(self, images: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """Images [B, 3, h, w] in 0 … 1 -> encoder input [B, 3, 14·rows, 14·columns], and the head's size.

        The size (height, width) lies between the image's and the encoder's. Raises `SpearError` when an image
        is too long and thin for so few tokens.
        """
        height, width = images.shape[2:]
        factor = math.sqrt(num_tokens * PATCH**2 / (height * width))
        size = int(height * factor), int(width * factor)
        if min(size) < PATCH:
            raise SpearError(f"image of {width}×{height} is too thin for {num_tokens} MoGe tokens: crop it")
        resized = nn.functional.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        patches = [side // PATCH * PATCH for side in size]
        normal = standardize(resized, IMAGENET_MEAN, IMAGENET_STD)
        cut = nn.functional.interpolate(normal, patches, mode="bilinear", antialias=True, align_corners=False)
        return cut, size

    def forward(self, images: torch.Tensor, num_tokens: int) -> MogeOutput:
        """Points and mask of images [B, 3, h, w] in 0 … 1, cut into about `num_tokens` patches."""
        patches, size = self.cut(images, num_tokens)
        count = len(self.encoder.backbone.encoder.layer)
        tokens = self.encoder.layers(patches, range(count - self.config.layers, count))
        grid = (patches.shape[2] // PATCH, patches.shape[3] // PATCH)
        raw = self.head([layer[:, 1:].mT.unflatten(2, grid) for layer in tokens], size)
        height, width = images.shape[2:]
        with torch.autocast(images.device.type, enabled=False):
            points, mask = (resize(x.float(), height, width) for x in raw)
            return MogeOutput(exponential_points(points), mask[:, 0])


class MogeV1Head(nn.Module):
    """From the encoder's patch features to raw points (x/z, y/z, log z) and raw mask."""

    def __init__(self, config: MogeV1Config, width: int) -> None:
        super().__init__()
        self.projects = nn.ModuleList(nn.Conv2d(width, config.project, 1) for _ in range(config.layers))
        self.upsample_blocks = nn.ModuleList(
            nn.Sequential(
                learned_upsample(before + 2, after),
                *(ResidualBlock(after, after * config.hidden_times, True) for _ in range(config.blocks)),
            )
            for before, after in pairwise((config.project, *config.widths))
        )
        self.output_block = nn.ModuleList(
            nn.Sequential(
                conv3(config.widths[-1] + 2, config.last), nn.ReLU(), nn.Conv2d(config.last, out, 1)
            )
            for out in (3, 1)
        )

    def forward(self, layers: list[torch.Tensor], size: tuple[int, int]) -> list[torch.Tensor]:
        """Features [B, width, rows, columns] of each layer -> [B, 3, height, width] and [B, 1, height, width]
        at size (height, width), whose aspect the uv channels have throughout."""
        height, width = size
        x = torch.stack([p(layer) for p, layer in zip(self.projects, layers, strict=True)]).sum(dim=0)
        for block in self.upsample_blocks:
            x = block(with_uv(x, width / height))
        x = with_uv(resize(x, height, width), width / height)
        return [block(x) for block in self.output_block]


def with_uv(x: torch.Tensor, aspect: float) -> torch.Tensor:
    """[B, c, h, w] -> [B, c + 2, h, w]: where each cell lies on the view plane of an image of that aspect."""
    batch, _, height, width = x.shape
    return torch.cat([x, uv_channels(batch, width, height, aspect, x)], dim=1)
