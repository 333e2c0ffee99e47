"""Images and text into buffers of keys and values, once, for many tokens to follow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch._subclasses.fake_tensor import FakeTensor

from spear.models.fast.stack import Memory, Stack, hidden_places
from spear.models.mask import positions

if TYPE_CHECKING:
    from spear.models.vlm import SpearVLMForConditionalGeneration


@dataclass(frozen=True)
class Reading:
    """A prefix of S tokens, read.

    memory  keys and values of every layer, with room behind them. valid [B, S] bool; padded: some are not.
    places [B]  the position after the last valid token.
    hidden [B, D]  the last layer's output at the last valid token; None where only keys and values were
                   wanted.
    """

    memory: Memory
    valid: torch.Tensor
    padded: bool
    places: torch.Tensor
    hidden: torch.Tensor | None

    def bias(self, room: int, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of tokens that see the prefix and `room` places after it; None for
        nothing."""
        if not self.padded:
            return None
        after = self.valid.new_ones(self.valid.shape[0], room)
        return hidden_places(torch.cat([self.valid, after], dim=1), groups, dtype)


def read(
    vlm: SpearVLMForConditionalGeneration,
    layers: Stack,
    features: torch.Tensor,
    image_valid: torch.Tensor | None,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    room: int,
    keys_only: bool = False,
) -> Reading:
    """Visual tokens [B, T, D] and text [B, L], which see each other, through the VLM's `layers`.

    image_valid [B, T] bool, attention_mask [B, L]: None where all are valid, which saves masks.
    room  tokens that are to follow. keys_only: see `Stack`.
    """
    text = vlm.language_model.embed_tokens(input_ids)
    if torch.is_autocast_enabled(text.device.type):
        text = text.float()
    x = torch.cat([features.to(text.dtype), text], dim=1)
    batch, length = x.shape[:2]
    parts = [
        torch.ones(batch, count, dtype=torch.bool, device=x.device) if known is None else known.bool()
        for known, count in ((image_valid, features.shape[1]), (attention_mask, input_ids.shape[1]))
    ]
    valid = torch.cat(parts, dim=1)
    padded = image_valid is not None or attention_mask is not None
    # On a GPU to look would be to wait; where memory is planned there is nothing to see.
    if padded and x.device.type == "cpu" and not isinstance(valid, FakeTensor):
        padded = not bool(valid.all())
    memory = layers.memory(batch, length + room, x.dtype, x.device)
    where = positions(valid)
    bias = hidden_places(valid, layers.groups, x.dtype) if padded else None
    window = memory.window(0, [(length, length)])
    rotations = layers.rotations(where, x.dtype)
    if keys_only:
        layers(x, rotations, window, bias, keys_only)
        return Reading(memory, valid, padded, where[:, -1] + 1, None)
    said = parts[1].sum(-1) if attention_mask is not None else input_ids.shape[1]
    last = torch.full_like(where[:, -1], features.shape[1] - 1) + said
    hidden = layers(x, rotations, window, bias, wanted=last)[:, 0]
    return Reading(memory, valid, padded, where[:, -1] + 1, hidden)
