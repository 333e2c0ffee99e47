"""The 3D encoder: MoGe's DINOv2 backbone, and a little depth model in place of its pretraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, Dinov2Config, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import ModelOutput

from spear.models.layers import PortableConfig, choose_attention
from spear.models.vision import IMAGENET_MEAN, IMAGENET_STD, DinoEncoder, check_pixels, normalize_pixels

LAST_LAYERS = 4
"""MoGe reads the last four layers of its backbone, and so does SPEAR-VLM (the paper, SPEAR-VLM)."""


class MogeEncoder(nn.Module):
    """MoGe's image encoder: [B, 3, h, w] uint8 -> [B, patches, 4·width].

    The patch features of the last four DINOv2 layers, each after the backbone's final LayerNorm, side by
    side, earliest layer first. Patches run row by row.
    """

    def __init__(self, config: Dinov2Config) -> None:
        super().__init__()
        self.backbone = DinoEncoder(config)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of uint8 images, normalised here with ImageNet's statistics."""
        return self.features(normalize_pixels(pixels, IMAGENET_MEAN, IMAGENET_STD))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """[B, 3, h, w] normalised images -> [B, patches, 4·width]."""
        count = len(self.backbone.encoder.layer)
        tokens = self.layers(images, range(count - LAST_LAYERS, count))
        return torch.cat([layer[:, 1:] for layer in tokens], dim=-1)

    def layers(self, images: torch.Tensor, indices: Sequence[int]) -> list[torch.Tensor]:
        """The outputs of the layers of these indices (from 0, rising), each after the final LayerNorm.

        images [B, 3, h, w] normalised. Each result is [B, 1 + patches, width], the class token first.
        """
        hidden = self.backbone.embeddings(images)
        found = []
        for index, layer in enumerate(self.backbone.encoder.layer):
            hidden = layer(hidden)
            if index in indices:
                found.append(self.backbone.layernorm(hidden))
        return found


class MogeDepthConfig(PortableConfig):
    """A MoGe-style encoder with a depth head; `cells` × `cells` depths are predicted per patch."""

    model_type = "spear_moge_depth"
    sub_configs_defaults: ClassVar = {"moge_config": SubConfigSpec(config_class=Dinov2Config)}

    moge_config: Any = None
    cells: int = 8
    initializer_range: float = 0.02


@dataclass
class DepthOutput(ModelOutput):
    """loss: mean absolute error of log depth up to one scale per image, plus that of the scale's logarithm.

    log_depth  [B, rows·cells, columns·cells].
    """

    loss: torch.Tensor | None = None
    log_depth: torch.Tensor | None = None


class MogeForDepth(PreTrainedModel):
    """Metric depth from one image, to pretrain a small `MogeEncoder` for which no MoGe weights exist.

    Our choice. As in MoGe-2, shape and scale are two losses: most of depth is shape. The head on the
    encoder's features is a single linear layer, so that the encoder learns what depth needs.
    """

    config: MogeDepthConfig
    config_class = MogeDepthConfig
    base_model_prefix = "moge"
    _supports_sdpa = True

    def __init__(self, config: MogeDepthConfig) -> None:
        super().__init__(choose_attention(config))
        self.moge = MogeEncoder(config.moge_config)
        self.head = nn.Linear(LAST_LAYERS * config.moge_config.hidden_size, config.cells**2)
        self.post_init()

    def forward(self, pixels: torch.Tensor, depth: torch.Tensor | None = None) -> DepthOutput:
        """Predict the logarithm of depth on a grid of `cells` × `cells` cells per patch.

        pixels [B, 3, h, w] uint8. depth [B, h, w] (metres or a relative unit), 0, infinite or NaN where
        unknown: the target of a cell is the mean log depth of its known pixels; cells without any are left
        out.
        """
        check_pixels("pixels", pixels)
        patch = self.config.moge_config.patch_size
        cells = self.config.cells
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        grid = self.head(self.moge(pixels)).float()
        grid = grid.view(-1, rows, columns, cells, cells).transpose(2, 3)
        log_depth = grid.reshape(-1, rows * cells, columns * cells)
        loss = None
        if depth is not None:
            known = (torch.isfinite(depth) & (depth > 0)).float()[:, None]
            logs = torch.where(known > 0, depth[:, None].float(), torch.ones_like(known)).log()
            size = log_depth.shape[1:]
            count = nn.functional.adaptive_avg_pool2d(known, size)[:, 0]
            target = nn.functional.adaptive_avg_pool2d(logs * known, size)[:, 0] / count.clamp_min(1e-6)
            seen = (count > 0).float()
            error = log_depth - target
            shift = (error * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
            shape = ((error - shift[:, None, None]).abs() * seen).sum() / seen.sum().clamp_min(1)
            loss = shape + shift.abs().mean()
        return DepthOutput(loss=loss, log_depth=log_depth)


AutoConfig.register(MogeDepthConfig.model_type, MogeDepthConfig, exist_ok=True)
AutoModel.register(MogeDepthConfig, MogeForDepth, exist_ok=True)
