"""Keys and values in buffers of a fixed size, and views of them for tokens that come in blocks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spear.models.fast.linear import LayerEvents


class StaticKVCache:
    """Keys and values of every layer in buffers of a fixed size.

    A buffer that never moves lets a CUDA graph write to it, and needs no copy when tokens are
    added.

    Args:
        num_layers: Number of layers.
        shape: (batch, kv heads, places, head_dim) of the keys of one layer, and of its values.
        dtype: Precision of the buffers.
        device: Where the buffers are.
    """

    def __init__(
        self,
        num_layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.buffer = torch.empty(num_layers, 2, *shape, dtype=dtype, device=device)
        self.layers = self.buffer.unbind(0)
        # Per layer: keys and values, [batch · kv heads, places, head_dim] each.
        self._keys_and_values = [layer.flatten(1, 2).unbind(0) for layer in self.layers]

    def make_window(self, start: int, blocks: Sequence[tuple[int, int]]) -> "CacheWindow":
        """Return views for new tokens from place `start` on; see `CacheWindow`.

        Args:
            start: The place of the first new token.
            blocks: (number of tokens, end) per block of new tokens: its tokens see places < end.
        """
        block_lengths = [length for length, _ in blocks]
        end = start + sum(block_lengths)
        new_key_values = [layer[:, :, :, start:end] for layer in self.layers]
        visible = []
        for keys, values in self._keys_and_values:
            visible.append([(keys[:, :stop], values[:, :stop]) for _, stop in blocks])
        return CacheWindow(new_key_values, block_lengths, visible)


@dataclass(frozen=True)
class CacheWindow:
    """Views of a `StaticKVCache` for consecutive new tokens. They are made once for many steps.

    new_key_values  per layer: where the new tokens' keys and values go, [2, B, kv heads, S, d].
    block_lengths   new tokens per block.
    visible         per layer and block: the keys and values that the block's tokens see,
                    [B · kv heads, places, d] each.
    write_events    gets an event per layer, recorded when its keys and values are written; None:
                    nobody waits for them.
    await_events    events of the places before these, which another stream fills.
    """

    new_key_values: list[Tensor]
    block_lengths: list[int]
    visible: list[list[tuple[Tensor, Tensor]]]
    write_events: LayerEvents = None
    await_events: LayerEvents = None

    def write(self, layer: int, key_values: Tensor) -> None:
        """Write a layer's new keys and values [2, B, kv heads, S, d] to their places."""
        self.new_key_values[layer].copy_(key_values)
        if self.write_events is not None:
            self.write_events.append(torch.cuda.current_stream().record_event())

    def wait(self, layer: int) -> None:
        """Wait until the other stream has written a layer's keys and values, before they are
        read."""
        if self.await_events:
            torch.cuda.current_stream().wait_event(self.await_events[layer])
