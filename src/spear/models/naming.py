"""Naming patches: what stands in for SigLIP's own pretraining at nano size, where no SigLIP exists (our choice)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from spear.models.vlm import SpearVLMForConditionalGeneration


@dataclass
class NamingOutput(ModelOutput):
    """loss and its parts: "names" (sigmoid loss, nats) and "centres" (mean absolute error, patches)."""

    loss: torch.Tensor | None = None
    parts: dict[str, torch.Tensor] | None = None


class PatchNaming(nn.Module):
    """Trains SPEAR-VLM's image encoder, its projection and the names' embeddings on labelled images.

    SigLIP's sigmoid loss, between patches and names instead of images and captions: a patch's visual token shall
    point towards the text embeddings of what the patch shows, as the language model will see both. A linear head,
    thrown away afterwards, tells where the centre of the patch's largest object lies, so that the token knows
    places finer than patches.

    names  token ids of each object name.
    """

    def __init__(self, vlm: SpearVLMForConditionalGeneration, names: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.vlm = vlm
        self.names = [torch.tensor(ids) for ids in names]
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-4.0))
        self.centre = nn.Linear(vlm.config.text_config.hidden_size, 2)

    def forward(
        self,
        view: str,
        pixels: torch.Tensor,
        shown: torch.Tensor,
        centre: torch.Tensor,
        largest: torch.Tensor,
    ) -> NamingOutput:
        """The loss of a batch.

        pixels   [B, 3, h, w] uint8 of one view.
        shown    [B, P, C] bool: patch p shows an object called c.
        centre   [B, P, 2]: x, y of the centre of the largest object in the patch's frame, in patches.
        largest  [B, P] bool: there is such an object.
        """
        tokens = self.vlm.image_features(view, pixels)
        embed = self.vlm.get_input_embeddings()
        names = torch.stack([embed(ids.to(tokens.device)).float().mean(0) for ids in self.names])
        directions = nn.functional.normalize(tokens.float(), dim=-1)
        logits = self.scale.exp() * directions @ nn.functional.normalize(names, dim=-1).T + self.bias
        naming = nn.functional.binary_cross_entropy_with_logits(logits, shown.float(), reduction="none")
        naming = naming.sum(-1).mean()
        error = (self.centre(tokens).float() - centre).abs().mean(-1)
        placing = (error * largest).sum() / largest.sum().clamp_min(1)
        return NamingOutput(
            loss=naming + placing, parts={"names": naming.detach(), "centres": placing.detach()}
        )
