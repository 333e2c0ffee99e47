"""MoGe-2 (arXiv 2507.02546): one image -> a point map up to a shift along z, its metric scale, normals, mask.

`spear.models.moge.checkpoint.load_moge` reads its published weights.
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
    bilinear_upsample,
    check_fixed,
    dinov2_config,
    exponential_points,
    learned_upsample,
    resize,
    uv_channels,
)
from spear.models.vision import IMAGENET_MEAN, IMAGENET_STD, standardize
from spear.types import Unit

HEADS = {"points_head": 3, "mask_head": 1, "normal_head": 3}
"""The heads that a MoGe-2 may have -> their output channels."""
RESAMPLERS = {"conv_transpose": learned_upsample, "bilinear": bilinear_upsample}
_FIXED_STACK = {
    "res_block_in_norm": "none",
    "res_block_hidden_norm": "none",
    "activation": "relu",
    "dim_times_res_block_hidden": 1,
}


@dataclass(frozen=True)
class Stack:
    """The numbers of a `ConvStack`, per level.

    Channels in, inside and out (None: as inside), residual blocks, and how the level is upsampled to the next
    (keys of `RESAMPLERS`; one fewer).
    """

    inputs: tuple[int, ...]
    widths: tuple[int, ...]
    outputs: tuple[int | None, ...]
    blocks: tuple[int, ...]
    resamplers: tuple[str, ...]

    @staticmethod
    def from_published(name: str, config: Mapping[str, Any]) -> Stack:
        """From a published config; a single value stands for all levels."""
        norms = {"res_block_in_norm": "layer_norm", "res_block_hidden_norm": "group_norm"}  # when not given
        check_fixed(f"{name}.", {**norms, **config}, _FIXED_STACK)
        widths = tuple(config["dim_res_blocks"])

        def each(value: Any, levels: int) -> tuple[Any, ...]:
            return tuple(value) if isinstance(value, list | tuple) else (value,) * levels

        stack = Stack(
            inputs=each(config["dim_in"], len(widths)),
            widths=widths,
            outputs=each(config.get("dim_out"), len(widths)),
            blocks=each(config.get("num_res_blocks", 1), len(widths)),
            resamplers=each(config["resamplers"], len(widths) - 1),
        )
        for kind in stack.resamplers:
            if kind not in RESAMPLERS:
                raise SpearError(
                    f"MoGe config not supported: {name}.resamplers has {kind!r}: use a published one"
                )
        return stack


@dataclass(frozen=True)
class MogeV2Config:
    """The numbers of a MoGe-2.

    encoder  one of `spear.models.moge.layers.ENCODERS`; layers: the indices of those that are read.
    project  channels that each of them is projected to.
    stacks   "neck", and those of `HEADS` that there are, "points_head" and "mask_head" always.
    scale    widths of the layers that give the metric scale, or None: then points are up to scale.
    tokens   the fewest and the most patches that an image should be cut into.
    """

    encoder: str
    layers: tuple[int, ...]
    project: int
    stacks: Mapping[str, Stack]
    scale: tuple[int, ...] | None
    tokens: tuple[int, int] = (1200, 3600)

    @staticmethod
    def from_published(config: Mapping[str, Any]) -> MogeV2Config:
        """From a published checkpoint's `model_config`. Raises `SpearError` for what is not supported."""
        check_fixed("", {"remap_output": "linear", **config}, {"remap_output": "exp"})
        for part in ("encoder", "neck", "points_head", "mask_head"):
            if config.get(part) is None:
                raise SpearError(f"MoGe config not supported: no {part}: use a published checkpoint")
        encoder = config["encoder"]
        layers, depth = encoder["intermediate_layers"], dinov2_config(encoder["backbone"]).num_hidden_layers
        tokens = config.get("num_tokens_range", (1200, 3600))
        return MogeV2Config(
            encoder=encoder["backbone"],
            layers=tuple(range(depth - layers, depth) if isinstance(layers, int) else layers),
            project=encoder["dim_out"],
            stacks={n: Stack.from_published(n, config[n]) for n in ("neck", *HEADS) if config.get(n)},
            scale=tuple(config["scale_head"]["dims"]) if config.get("scale_head") else None,
            tokens=(int(tokens[0]), int(tokens[1])),
        )


class MogeV2(nn.Module):
    """The network: DINOv2, projected and summed, a neck shared by all heads, one head per output."""

    def __init__(self, config: MogeV2Config) -> None:
        super().__init__()
        self.config = config
        self.encoder = MogeEncoder(dinov2_config(config.encoder))
        width = self.encoder.backbone.config.hidden_size
        self.output_projections = nn.ModuleList(nn.Conv2d(width, config.project, 1) for _ in config.layers)
        for name, stack in config.stacks.items():
            self.add_module(name, ConvStack(stack))
        self.scale_head: nn.Sequential | None = None
        if config.scale is not None:
            layers: list[nn.Module] = []
            for before, after in pairwise(config.scale):
                layers += [nn.Linear(before, after), nn.ReLU()]
            self.scale_head = nn.Sequential(*layers[:-1])

    @property
    def unit(self) -> Unit:
        """Of the points: "metre", or "relative" for a network without scale."""
        return "relative" if self.scale_head is None else "metre"

    def cut(self, images: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Images [B, 3, h, w] in 0 … 1 -> the encoder's input [B, 3, 14·rows, 14·columns].

        Raises `SpearError` when an image is too long and thin for so few tokens.
        """
        height, width = images.shape[2:]
        aspect = width / height
        rows, columns = round(math.sqrt(num_tokens / aspect)), round(math.sqrt(num_tokens * aspect))
        if min(rows, columns) < 1:
            raise SpearError(f"image of {width}×{height} is too thin for {num_tokens} MoGe tokens: crop it")
        size = (rows * PATCH, columns * PATCH)
        cut = nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
        return standardize(cut, IMAGENET_MEAN, IMAGENET_STD)

    def encode(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised [B, 3, 14·rows, 14·columns] -> features [B, project, rows, columns] and class token.

        The class token is that of the last layer that is read, [B, width].
        """
        tokens = self.encoder.layers(patches, self.config.layers)
        grid = (patches.shape[2] // PATCH, patches.shape[3] // PATCH)
        projected = [
            projection(layer[:, 1:].mT.unflatten(2, grid))
            for projection, layer in zip(self.output_projections, tokens, strict=True)
        ]
        return torch.stack(projected).sum(dim=0), tokens[-1][:, 0]

    def forward(self, images: torch.Tensor, num_tokens: int) -> MogeOutput:
        """What there are heads for, of images [B, 3, h, w] in 0 … 1, cut into about `num_tokens` patches."""
        features, token = self.encode(self.cut(images, num_tokens))
        batch, _, rows, columns = features.shape
        height, width = images.shape[2:]
        pyramid = [
            uv_channels(batch, columns << level, rows << level, width / height, features)
            for level in range(len(self.config.stacks["neck"].widths))
        ]
        pyramid[0] = torch.cat([features, pyramid[0]], dim=1)
        levels = self.get_submodule("neck")(pyramid)
        raw = {name: self.get_submodule(name)(levels)[-1] for name in HEADS if name in self.config.stacks}
        scale = None if self.scale_head is None else self.scale_head(token)
        with torch.autocast(images.device.type, enabled=False):
            raw = {name: resize(x.float(), height, width) for name, x in raw.items()}
            normal = raw["normal_head"].permute(0, 2, 3, 1) if "normal_head" in raw else None
            return MogeOutput(
                points=exponential_points(raw["points_head"]),
                mask=raw["mask_head"][:, 0].sigmoid(),
                normal=None if normal is None else nn.functional.normalize(normal, dim=-1),
                scale=None if scale is None else scale.float()[:, 0].exp(),
            )


class ConvStack(nn.Module):
    """A pyramid from coarse to fine: each level is the upsampled one before, plus its input, refined."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        self.input_blocks = nn.ModuleList(
            nn.Conv2d(before, width, 1) for before, width in zip(stack.inputs, stack.widths, strict=True)
        )
        self.resamplers = nn.ModuleList(
            RESAMPLERS[kind](*pair)
            for kind, pair in zip(stack.resamplers, pairwise(stack.widths), strict=True)
        )
        self.res_blocks = nn.ModuleList(
            nn.Sequential(*(ResidualBlock(width, width, False) for _ in range(count)))
            for width, count in zip(stack.widths, stack.blocks, strict=True)
        )
        self.output_blocks = nn.ModuleList(
            nn.Identity() if out is None else nn.Conv2d(width, out, 1)
            for out, width in zip(stack.outputs, stack.widths, strict=True)
        )

    def forward(self, pyramid: list[torch.Tensor]) -> list[torch.Tensor]:
        """[B, channels, h, w] per level, each twice the size of the one before -> the same, refined."""
        found: list[torch.Tensor] = []
        x: torch.Tensor | None = None
        for level, features in enumerate(pyramid):
            inside = self.input_blocks[level](features)
            x = inside if x is None else self.resamplers[level - 1](x) + inside
            x = self.res_blocks[level](x)
            found.append(self.output_blocks[level](x))
        return found
