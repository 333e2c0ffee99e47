"""Keys and values in buffers of a fixed size, and views of them for new tokens.

A *place* is the index of a token along the buffer: the tokens of the prefix have the first places,
and new tokens are written to the places that follow. A *block* consists of consecutive new tokens
that all see the same places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from spear.models.fast.linear import LayerEvents


class TokenBlock(NamedTuple):
    """A block of new tokens.

    num_tokens   Number of its tokens.
    visible_end  All its tokens see the places before this one.
    """

    num_tokens: int
    visible_end: int


class StaticKVCache:
    """Keys and values of every layer in buffers of a fixed size.

    Because a buffer never moves, a CUDA graph can write to it, and adding tokens needs no copy of
    the tokens before them.

    Args:
        num_layers: Number of layers.
        shape: (batch, kv heads, places, head_dim), the shape of one layer's keys, and also of its
            values.
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
        # Per layer a pair (keys, values), each [batch · kv heads, places, head_dim]. These are
        # views in the form that a batched matrix product takes.
        self._keys_and_values = [layer.flatten(1, 2).unbind(0) for layer in self.layers]

    def make_window(self, start: int, blocks: Sequence[TokenBlock]) -> "CacheWindow":
        """Return views for new tokens from place `start` on; see `CacheWindow`.

        Args:
            start: The place of the first new token.
            blocks: The blocks that the new tokens form, one after the other.
        """
        block_lengths = [block.num_tokens for block in blocks]
        end_of_window = start + sum(block_lengths)
        new_key_values = [layer[:, :, :, start:end_of_window] for layer in self.layers]
        visible = []
        for keys, values in self._keys_and_values:
            ends = [block.visible_end for block in blocks]
            visible.append([(keys[:, :end], values[:, :end]) for end in ends])
        return CacheWindow(new_key_values, block_lengths, visible)


@dataclass(frozen=True)
class CacheWindow:
    """Views of a `StaticKVCache` for S consecutive new tokens, made once for many flow steps.

    new_key_values  Per layer a view [2, B, kv heads, S, head_dim], to which the new tokens' keys
                    and values are written.
    block_lengths   Number of new tokens of each block.
    visible         Per layer and block a pair (keys, values) that the block's tokens see, each
                    [B · kv heads, places, head_dim].
    write_events    A list to which `write` appends one CUDA event per layer, recorded after the
                    layer's keys and values are written. None, if no other stream waits for them.
    await_events    The events, per layer, of the stream that fills the places before the new
                    tokens. None, if it is the same stream.
    """

    new_key_values: list[Tensor]
    block_lengths: list[int]
    visible: list[list[tuple[Tensor, Tensor]]]
    # `LayerEvents` includes None.
    write_events: LayerEvents = None
    await_events: LayerEvents = None

    def write(self, layer: int, key_values: Tensor) -> None:
        """Write a layer's new keys and values [2, B, kv heads, S, head_dim] to their places."""
        self.new_key_values[layer].copy_(key_values)
        if self.write_events is not None:
            self.write_events.append(torch.cuda.current_stream().record_event())

    def wait_for_prefix(self, layer: int) -> None:
        """Let the current stream wait until another one has written a layer's keys and values of
        the prefix. Do nothing if no other one writes them."""
        if self.await_events:
            torch.cuda.current_stream().wait_event(self.await_events[layer])
