"""Stage 0 at nano size: pretraining instead of MoGe's and SigLIP's, which have no small models.

None of it is from the paper.
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

CELLS_PER_SIDE = 4  # a patch of `PatchClassification` is divided into 4 × 4 cells


@strict
class MogeDepthConfig(PortableConfig):
    """A MoGe-style encoder with a depth head, which predicts `cells` × `cells` depths per patch."""

    model_type = "spear_moge_depth"
    sub_configs_defaults: ClassVar = {"moge_config": SubConfigSpec(config_class=Dinov2Config)}

    moge_config: Any = None
    cells: int = 8
    initializer_range: float | int = 0.02


class MogeForDepth(PreTrainedModel):
    """Metric depth from one image, to pretrain a small `MogeEncoder`.

    There are no MoGe weights of that size.

    As in MoGe-2, shape and scale are two losses, because most of depth is shape. The head is a
    single linear layer, so that the encoder learns what depth needs.
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
        """The loss of the predicted log depth, on a grid of `cells` × `cells` cells per patch.

        It is the mean absolute error up to one scale per image, plus the mean absolute error of the
        log scale.

        Args:
            pixels: [B, 3, h, w] uint8.
            depth: [B, h, w] in meters or a relative unit; 0, infinite or NaN where it is unknown.
                The target of a cell is the mean log depth of its known pixels, if it has any.
        """
        patch = self.config.moge_config.patch_size
        cells = self.config.cells
        check_pixels("pixels", pixels, patch)
        rows = pixels.shape[2] // patch
        columns = pixels.shape[3] // patch

        # Prediction: [B, rows · columns, cells²] -> [B, rows · cells, columns · cells].
        grid = self.head(self.moge(pixels)).float().view(-1, rows, columns, cells, cells)
        log_depth = grid.transpose(2, 3).reshape(-1, rows * cells, columns * cells)

        # Target: the mean over the known pixels of each cell.
        is_known = (torch.isfinite(depth) & (depth > 0)).float()[:, None]
        target = torch.where(is_known > 0, depth[:, None].float(), torch.ones_like(is_known)).log()
        size = log_depth.shape[1:]
        known_fraction = nn.functional.adaptive_avg_pool2d(is_known, size)[:, 0]
        target = nn.functional.adaptive_avg_pool2d(target * is_known, size)[:, 0]
        target = target / known_fraction.clamp_min(1e-6)

        has_target = (known_fraction > 0).float()
        error = log_depth - target
        num_targets = has_target.sum((1, 2)).clamp_min(1)
        log_scale_error = (error * has_target).sum((1, 2)) / num_targets
        shape_error = (error - log_scale_error[:, None, None]).abs() * has_target
        shape_loss = shape_error.sum() / has_target.sum().clamp_min(1)
        return LossOutput(loss=shape_loss + log_scale_error.abs().mean())


class PatchClassification(nn.Module):
    """Trains SPEAR-VLM's image encoder, its projection and the names' embeddings on labeled images.

    The loss between patches and names is SigLIP's sigmoid loss: the visual token of a patch must
    point towards the text embeddings of what it shows. Two linear heads, which are thrown away
    afterwards, teach places finer than patches. They predict how much of each object each of a
    patch's `CELLS_PER_SIDE`² cells shows, and where the center of its largest object lies.
    """

    def __init__(
        self, vlm: SpearVLMForConditionalGeneration, names: Sequence[Sequence[int]]
    ) -> None:
        """names: Token ids of each object name."""
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
        """The loss of a batch, and its parts.

        The parts are "names" and "cells" (nats), and "centres" (mean error in patches).

        Args:
            pixels: [B, 3, h, w] uint8.
            shown: [B, P, C] bool, True if patch p shows an object called c.
            cells: [B, P, `CELLS_PER_SIDE`², C] uint8, the fraction of each cell that shows it; 255
                is all.
            centre: [B, P, 2] x, y of the center of the largest object in the patch's frame, in
                patches.
            largest: [B, P] bool, True if there is such an object.
        """
        tokens = self.vlm.encode_views(pixels)[0]

        # Which objects each patch shows.
        embed = self.vlm.get_input_embeddings()
        name_embeddings = torch.stack(
            [embed(ids.to(tokens.device)).float().mean(0) for ids in self.names]
        )
        token_directions = nn.functional.normalize(tokens.float(), dim=-1)
        name_directions = nn.functional.normalize(name_embeddings, dim=-1)
        logits = self.scale.exp() * token_directions @ name_directions.T + self.bias
        names_loss = _sigmoid_loss(logits, shown.float())

        # How much of each object each cell shows.
        cell_logits = self.cells(tokens).float().view(cells.shape)
        cells_loss = _sigmoid_loss(cell_logits, cells / 255)

        # Where the center of the largest object is.
        center_error = (self.centre(tokens).float() - centre).abs().mean(-1)
        centers_loss = (center_error * largest).sum() / largest.sum().clamp_min(1)

        loss_terms = {
            "names": names_loss.detach(),
            "centres": centers_loss.detach(),
            "cells": cells_loss.detach(),
        }
        return LossOutput(loss=names_loss + centers_loss + cells_loss, parts=loss_terms)


def _sigmoid_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, summed over classes and averaged over the rest."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(-1).mean()


AutoConfig.register(MogeDepthConfig.model_type, MogeDepthConfig, exist_ok=True)
AutoModel.register(MogeDepthConfig, MogeForDepth, exist_ok=True)
