"""Keys and values that layers have computed, for later tokens to attend to."""

from __future__ import annotations

from typing import Any

import torch


class KeyValues:
    """One key and one value tensor per layer, [B, kv heads, S, head_dim], in the order of the layers.

    Passed to a Gemma model as its cache. While `frozen` is False new keys and values are kept (prefill and
    decoding); a frozen one lends what it holds to other tokens and stays as it is (the action expert reading
    the prefix, at every flow step). Gradients flow through what it holds.
    """

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.frozen = False

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the new tokens of `layer` attend to: the keys and values held, followed by their own."""
        if layer < len(self.keys):
            keys = torch.cat([self.keys[layer].to(keys.dtype), keys], dim=2)
            values = torch.cat([self.values[layer].to(values.dtype), values], dim=2)
        if not self.frozen:
            self.keys[layer : layer + 1] = [keys]
            self.values[layer : layer + 1] = [values]
        return keys, values
