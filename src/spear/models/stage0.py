"""Stage 0: the pretraining of the image encoders of nano.

The paper starts from the weights of SigLIP and MoGe. These have no models of nano's size, so we
pretrain ours, with two tasks that are not from the paper: depth (`MogeForDepth`) and the names of
the objects in each patch (`PatchClassification`).
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, Dinov2Config, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec

from spear.models.layers import PortableConfig, set_default_attention
from spear.models.vision import NUM_FEATURE_LAYERS, MogeEncoder, check_pixels
from spear.models.vlm import LossOutput, SpearVLMForConditionalGeneration

CELLS_PER_SIDE = 4  # a patch of `PatchClassification` is divided into 4 × 4 cells


@strict
class MogeDepthConfig(PortableConfig):
    """The config of `MogeForDepth`, which predicts `cells` × `cells` depths per patch."""

    model_type = "spear_moge_depth"
    sub_configs_defaults: ClassVar = {"moge_config": SubConfigSpec(config_class=Dinov2Config)}

    moge_config: Any = None
    cells: int = 8
    initializer_range: float | int = 0.02


class MogeForDepth(PreTrainedModel):
    """Metric depth from one image, to pretrain a small `MogeEncoder`.

    As in MoGe-2, the shape (depth up to one scale per image) and the scale have separate losses,
    because most of the information in depth is the shape. The head is a single linear layer, so
    that the encoder has to learn the features that depth needs.
    """

    config: MogeDepthConfig
    base_model_prefix = "moge"
    _supports_sdpa = True

    def __init__(self, config: MogeDepthConfig) -> None:
        super().__init__(set_default_attention(config))
        self.moge = MogeEncoder(config.moge_config)
        self.head = nn.Linear(NUM_FEATURE_LAYERS * config.moge_config.hidden_size, config.cells**2)
        self.post_init()

    def forward(self, pixels: Tensor, depth: Tensor) -> LossOutput:
        """The loss of the predicted log depth, on a grid of `cells` × `cells` cells per patch.

        The loss is the mean absolute error of log depth after removing each image's scale error,
        plus the mean absolute scale error. An image's scale error is its mean error of log depth.

        Args:
            pixels: [B, 3, h, w] uint8.
            depth: [B, h, w] in meters or a relative unit. Unknown depths are 0, infinite or NaN.
                The target of a cell is the mean log depth of its pixels with known depth; cells
                without such pixels do not count.
        """
        patch = self.config.moge_config.patch_size
        cells = self.config.cells
        check_pixels("pixels", pixels, patch)
        rows = pixels.shape[2] // patch
        columns = pixels.shape[3] // patch

        # The prediction, as an image of cells: [B, rows · cells, columns · cells].
        patch_log_depth = self.head(self.moge(pixels)).float()  # [B, rows · columns, cells²]
        grid = patch_log_depth.view(-1, rows, columns, cells, cells)
        log_depth = grid.transpose(2, 3).reshape(-1, rows * cells, columns * cells)

        # The target: the mean log depth over the known pixels of each cell. A mean over all pixels,
        # in which unknown ones are 0, is divided by the fraction of known pixels. An unknown depth
        # becomes 1, whose log is 0.
        known_mask = (torch.isfinite(depth) & (depth > 0)).float()[:, None]  # [B, 1, h, w]
        depth_or_one = torch.where(
            known_mask > 0, depth[:, None].float(), torch.ones_like(known_mask)
        )
        grid_size = log_depth.shape[1:]  # rows · cells, columns · cells
        known_fraction = nn.functional.adaptive_avg_pool2d(known_mask, grid_size)[:, 0]
        known_log_depth = depth_or_one.log() * known_mask
        mean_log_depth = nn.functional.adaptive_avg_pool2d(known_log_depth, grid_size)[:, 0]
        target = mean_log_depth / known_fraction.clamp_min(1e-6)

        # The losses, over cells with a target.
        target_mask = (known_fraction > 0).float()
        error = log_depth - target
        num_targets = target_mask.sum((1, 2)).clamp_min(1)
        log_scale_error = (error * target_mask).sum((1, 2)) / num_targets  # [B]
        shape_error = (error - log_scale_error[:, None, None]).abs() * target_mask
        shape_loss = shape_error.sum() / target_mask.sum().clamp_min(1)
        return LossOutput(loss=shape_loss + log_scale_error.abs().mean())


class PatchClassification(nn.Module):
    """Trains SPEAR-VLM's image encoder, its projection and the embeddings of object names.

    The loss between patches and names is SigLIP's sigmoid loss: the visual token of a patch must
    have the direction of the text embeddings of the objects that the patch shows. Two linear heads,
    which are not used after the training, teach positions within a patch. The head `cells` predicts
    which fraction of each of the patch's `CELLS_PER_SIDE`² cells shows each object. The head
    `centre` predicts the center of the patch's largest object.
    """

    def __init__(
        self, vlm: SpearVLMForConditionalGeneration, names: Sequence[Sequence[int]]
    ) -> None:
        """Add the heads to a SPEAR-VLM.

        Args:
            vlm: The model to train.
            names: For each object name, the ids of its tokens.
        """
        super().__init__()
        self.vlm = vlm
        self.names = [torch.tensor(ids) for ids in names]  # token ids
        # Logarithm of SigLIP's logit scale, which begins at SigLIP's value, 10.
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        # SigLIP's bias. It begins negative, because a patch shows few of the objects (the value is
        # our choice).
        self.bias = nn.Parameter(torch.tensor(-4.0))
        width = vlm.config.text_config.hidden_size
        # Checkpoints of trainings contain this head by the name "centre", so its spelling stays.
        self.centre = nn.Linear(width, 2)
        self.cells = nn.Linear(width, CELLS_PER_SIDE * CELLS_PER_SIDE * len(names))
        nn.init.constant_(self.cells.bias, -4.0)  # most cells show none of the objects

    def forward(
        self,
        pixels: Tensor,
        is_shown: Tensor,
        cell_coverage: Tensor,
        center: Tensor,
        has_object: Tensor,
    ) -> LossOutput:
        """The loss of a batch, and its parts.

        The parts are "names" and "cells" (nats), and "centres" (mean error in patches).

        Args:
            pixels: [B, 3, h, w] uint8, images of P patches.
            is_shown: [B, P, C] bool, for each of C names whether the patch shows such an object.
            cell_coverage: [B, P, `CELLS_PER_SIDE`², C] uint8, for each name the fraction of a cell
                that shows such an object, where 255 is the whole cell.
            center: [B, P, 2], x and y from the patch's center to the center of the patch's largest
                object, in patch widths.
            has_object: [B, P] bool, True if the patch shows an object, so that `center` counts.
        """
        tokens = self.vlm.encode_views(pixels)[0]

        # Which objects each patch shows.
        embed = self.vlm.get_input_embeddings()
        name_embeddings = torch.stack(
            [embed(ids.to(tokens.device)).float().mean(0) for ids in self.names]
        )
        token_directions = nn.functional.normalize(tokens.float(), dim=-1)
        name_directions = nn.functional.normalize(name_embeddings, dim=-1)
        logits = self.scale.exp() * token_directions @ name_directions.T + self.bias  # [B, P, C]
        names_loss = _compute_loss_summed_over_names(logits, is_shown.float())

        # How much of each object each cell shows.
        cell_logits = self.cells(tokens).float().view(cell_coverage.shape)
        cells_loss = _compute_loss_summed_over_names(cell_logits, cell_coverage / 255)

        # Where the center of the largest object is.
        center_error = (self.centre(tokens).float() - center).abs().mean(-1)  # [B, P]
        centers_loss = (center_error * has_object).sum() / has_object.sum().clamp_min(1)

        loss_terms = {
            "names": names_loss.detach(),
            "centres": centers_loss.detach(),
            "cells": cells_loss.detach(),
        }
        return LossOutput(loss=names_loss + centers_loss + cells_loss, parts=loss_terms)


def _compute_loss_summed_over_names(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy, summed over the last axis (names) and averaged over the others."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(-1).mean()


AutoConfig.register(MogeDepthConfig.model_type, MogeDepthConfig, exist_ok=True)
AutoModel.register(MogeDepthConfig, MogeForDepth, exist_ok=True)
