"""Naming patches: in place of SigLIP's own pretraining at nano size, where no SigLIP exists (our choice)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from spear.models.vlm import SpearVLMForConditionalGeneration, SpearVLMOutput

CELLS = 4
"""A patch is cut into so many cells a side."""


class PatchClassification(nn.Module):
    """Trains SPEAR-VLM's image encoder, its projection and the names' embeddings on labelled images.

    SigLIP's sigmoid loss, between patches and names: a patch's visual token shall point towards the text
    embeddings of what it shows. Two linear heads, thrown away afterwards, teach places finer than patches:
    how much of each object each of its `CELLS` × `CELLS` cells shows, and where the centre of its largest
    object lies. names: token ids of each object name.
    """

    def __init__(self, vlm: SpearVLMForConditionalGeneration, names: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.vlm = vlm
        self.names = [torch.tensor(ids) for ids in names]
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        width = vlm.config.text_config.hidden_size
        self.centre = nn.Linear(width, 2)
        self.cells = nn.Linear(width, CELLS * CELLS * len(names))
        nn.init.constant_(self.cells.bias, -4.0)  # most cells show none of the objects

    def forward(
        self,
        pixels: torch.Tensor,
        shown: torch.Tensor,
        cells: torch.Tensor,
        centre: torch.Tensor,
        largest: torch.Tensor,
    ) -> SpearVLMOutput:
        """The loss of a batch and its parts: "names", "cells" (nats) and "centres" (mean error in patches).

        pixels   [B, 3, h, w] uint8.
        shown    [B, P, C] bool: patch p shows an object called c.
        cells    [B, P, CELLS · CELLS, C] uint8: the share of each cell that shows it, 255 for all of it.
        centre   [B, P, 2]: x, y of the centre of the largest object in the patch's frame, in patches.
        largest  [B, P] bool: there is such an object.
        """
        tokens = self.vlm.image_features(pixels)
        embed = self.vlm.get_input_embeddings()
        names = torch.stack([embed(ids.to(tokens.device)).float().mean(0) for ids in self.names])
        directions = nn.functional.normalize(tokens.float(), dim=-1)
        logits = self.scale.exp() * directions @ nn.functional.normalize(names, dim=-1).T + self.bias
        naming = _sigmoid_loss(logits, shown.float())
        filling = _sigmoid_loss(self.cells(tokens).float().view(cells.shape), cells / 255)
        error = (self.centre(tokens).float() - centre).abs().mean(-1)
        placing = (error * largest).sum() / largest.sum().clamp_min(1)
        return SpearVLMOutput(
            loss=naming + placing + filling,
            parts={"names": naming.detach(), "centres": placing.detach(), "cells": filling.detach()},
        )


def _sigmoid_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed over classes, averaged over the rest."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return losses.sum(-1).mean()
