"""Prefill: images and text into buffers of keys and values, once, for many tokens to follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensor

from spear.models.fast.stack import Stack, StaticKVCache, hidden_places
from spear.models.layers import positions


@dataclass(frozen=True)
class Prefilled:
    """A prefix of S tokens after `prefill`.

    cache   keys and values of every layer, with room behind them.
    valid   [B, S] bool, False for padding and missing images; padded: whether any is False.
    places  [B] the position after the last valid token.
    hidden  [B, D] the last layer's output at the last valid token; None where only keys and values were
            wanted.
    """

    cache: StaticKVCache
    valid: torch.Tensor
    padded: bool
    places: torch.Tensor
    hidden: torch.Tensor | None

    def bias(self, room: int, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What is added to the scores of tokens that see the prefix and `room` places after it; or None."""
        if not self.padded:
            return None
        after = self.valid.new_ones(self.valid.shape[0], room)
        return hidden_places(torch.cat([self.valid, after], dim=1), groups, dtype)


def prefill(
    layers: Stack,
    features: torch.Tensor,
    text: torch.Tensor,
    image_valid: torch.Tensor | None,
    text_valid: torch.Tensor | None,
    room: int,
    keys_only: bool = False,
) -> Prefilled:
    """Visual tokens [B, T, D] and text embeddings [B, L, D], which see each other, through the layers.

    image_valid [B, T] bool, text_valid [B, L]: None where all are valid, which saves masks.
    room: tokens that are to follow. keys_only: see `Stack`.
    """
    x = torch.cat([features.to(text.dtype), text], dim=1)
    batch, length = x.shape[:2]
    parts = [
        torch.ones(batch, count, dtype=torch.bool, device=x.device) if known is None else known.bool()
        for known, count in ((image_valid, features.shape[1]), (text_valid, text.shape[1]))
    ]
    valid = torch.cat(parts, dim=1)
    padded = image_valid is not None or text_valid is not None
    # On a GPU, looking at the mask would mean waiting; a fake tensor, which plans memory, has no contents.
    if padded and x.device.type == "cpu" and not isinstance(valid, FakeTensor):
        padded = not bool(valid.all())
    cache = layers.cache(batch, length + room, x.dtype, x.device)
    where = positions(valid)
    bias = hidden_places(valid, layers.groups, x.dtype) if padded else None
    window = cache.window(0, [(length, length)])
    rotations = layers.rotations(where, x.dtype)
    after = where[:, -1] + 1
    if keys_only:
        layers(x, rotations, window, bias, keys_only)
        return Prefilled(cache, valid, padded, after, None)
    tokens = parts[1].sum(-1) if text_valid is not None else text.shape[1]
    last = torch.full_like(after, features.shape[1] - 1) + tokens
    hidden = layers(x, rotations, window, bias, wanted=last)[:, 0]
    return Prefilled(cache, valid, padded, after, hidden)
