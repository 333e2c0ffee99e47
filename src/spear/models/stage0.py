"""Stage 0, at nano size: what stands in for the pretraining of MoGe and SigLIP, of which no small ones exist.

All of it is our choice.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Dinov2Config, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from spear.models.layers import PortableConfig, choose_attention
from spear.models.vision import NUM_FEATURE_LAYERS, MogeEncoder, check_pixels
from spear.models.vlm import LossOutput, SpearVLMForConditionalGeneration

CELLS_PER_SIDE = 4
"""A patch is cut into so many cells a side."""


@strict
class MogeDepthConfig(PortableConfig):
    """A MoGe-style encoder with a depth head; `cells` × `cells` depths are predicted per patch."""

    model_type = "spear_moge_depth"
    sub_configs_defaults: ClassVar = {"moge_config": SubConfigSpec(config_class=Dinov2Config)}

    moge_config: Any = None
    cells: int = 8
    initializer_range: float | int = 0.02


class MogeForDepth(PreTrainedModel):
    """Metric depth from one image, to pretrain a small `MogeEncoder` for which no MoGe weights exist.

    Our choice. As in MoGe-2, shape and scale are two losses: most of depth is shape. The head on the
    encoder's features is a single linear layer, so that the encoder learns what depth needs.
    """

    config: MogeDepthConfig
    base_model_prefix = "moge"
    _supports_sdpa = True

    def __init__(self, config: MogeDepthConfig) -> None:
        super().__init__(choose_attention(config))
        self.moge = MogeEncoder(config.moge_config)
        self.head = nn.Linear(NUM_FEATURE_LAYERS * config.moge_config.hidden_size, config.cells**2)
        self.post_init()

    def forward(self, pixels: Tensor, depth: Tensor) -> LossOutput:
        """The loss of the predicted logarithm of depth, on a grid of `cells` × `cells` cells per patch: mean
        absolute error up to one scale per image, plus that of the scale's logarithm.

        pixels [B, 3, h, w] uint8. depth [B, h, w] (metres or a relative unit), 0, infinite or NaN where
        unknown: the target of a cell is the mean log depth of its known pixels, if it has any.
        """
        patch, cells = self.config.moge_config.patch_size, self.config.cells
        check_pixels("pixels", pixels, patch)
        rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
        grid = self.head(self.moge(pixels)).float().view(-1, rows, columns, cells, cells)
        log_depth = grid.transpose(2, 3).reshape(-1, rows * cells, columns * cells)
        known = (torch.isfinite(depth) & (depth > 0)).float()[:, None]
        logs = torch.where(known > 0, depth[:, None].float(), torch.ones_like(known)).log()
        size = log_depth.shape[1:]
        count = nn.functional.adaptive_avg_pool2d(known, size)[:, 0]
        target = nn.functional.adaptive_avg_pool2d(logs * known, size)[:, 0] / count.clamp_min(1e-6)
        seen = (count > 0).float()
        error = log_depth - target
        shift = (error * seen).sum((1, 2)) / seen.sum((1, 2)).clamp_min(1)
        shape = ((error - shift[:, None, None]).abs() * seen).sum() / seen.sum().clamp_min(1)
        return LossOutput(loss=shape + shift.abs().mean())


class PatchClassification(nn.Module):
    """Trains SPEAR-VLM's image encoder, its projection and the names' embeddings on labelled images.

    SigLIP's sigmoid loss, between patches and names: a patch's visual token shall point towards the text
    embeddings of what it shows. Two linear heads, thrown away afterwards, teach places finer than patches:
    how much of each object each of its `CELLS_PER_SIDE`² cells shows, and where the centre of its largest
    object lies. names: token ids of each object name.
    """

    def __init__(
        self, vlm: SpearVLMForConditionalGeneration, names: Sequence[Sequence[int]]
    ) -> None:
        super().__init__()
        self.vlm = vlm
        self.names = [torch.tensor(ids) for ids in names]
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        width = vlm.config.text_config.hidden_size
        self.centre = nn.Linear(width, 2)
        self.cells = nn.Linear(width, CELLS_PER_SIDE * CELLS_PER_SIDE * len(names))
        nn.init.constant_(self.cells.bias, -4.0)  # most cells show none of the objects

    def forward(
        self, pixels: Tensor, shown: Tensor, cells: Tensor, centre: Tensor, largest: Tensor
    ) -> LossOutput:
        """The loss of a batch and its parts: "names", "cells" (nats) and "centres" (mean error in patches).

        pixels   [B, 3, h, w] uint8.
        shown    [B, P, C] bool: patch p shows an object called c.
        cells    [B, P, CELLS_PER_SIDE², C] uint8: the share of each cell that shows it, 255 for all of it.
        centre   [B, P, 2]: x, y of the centre of the largest object in the patch's frame, in patches.
        largest  [B, P] bool: there is such an object.
        """
        tokens = self.vlm.encode_views(pixels)[0]
        embed = self.vlm.get_input_embeddings()
        names = torch.stack([embed(ids.to(tokens.device)).float().mean(0) for ids in self.names])
        directions = nn.functional.normalize(tokens.float(), dim=-1)
        logits = (
            self.scale.exp() * directions @ nn.functional.normalize(names, dim=-1).T + self.bias
        )
        naming = _sigmoid_loss(logits, shown.float())
        filling = _sigmoid_loss(self.cells(tokens).float().view(cells.shape), cells / 255)
        error = (self.centre(tokens).float() - centre).abs().mean(-1)
        placing = (error * largest).sum() / largest.sum().clamp_min(1)
        parts = {"names": naming.detach(), "centres": placing.detach(), "cells": filling.detach()}
        return LossOutput(loss=naming + placing + filling, parts=parts)


def _sigmoid_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed over classes, averaged over the rest."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(-1).mean()


AutoConfig.register(MogeDepthConfig.model_type, MogeDepthConfig, exist_ok=True)
AutoModel.register(MogeDepthConfig, MogeForDepth, exist_ok=True)
