"""The layers of a small Gemma on a CPU, where what is around the products takes as long as they do.

Half as many operations as in `LayerStack`, for the same numbers up to rounding: the norms' scales and
attention's are parts of the weights, the two numbers that a rotary embedding turns together are neighbours
and so one complex number, products add the residuals, and what is between them stays in the core's cache.
In float32: for a flow step or an answer's next token, products in bfloat16 cost more to set up than they
save.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Gemma2Model, GemmaModel
from transformers.activations import GELUTanh

from spear.models.fast.linear import MAX_CACHED_ELEMENTS, ModuleCache, is_plain_linear
from spear.models.fast.stack import LayerStack, StaticKVCache, Window, norm_scale

BLOCK = 128
"""Rows that an MLP runs at once: what is between its products stays in the cache (our choice)."""
A = math.sqrt(2 / math.pi)
TWO_A = torch.tensor(
    2 * A, device="cpu"
)  # as a tensor: a Python number would be made one at every use


class PairedKVCache(StaticKVCache):
    """A `StaticKVCache` in which the numbers that are turned together lie side by side."""

    def window(self, start: int, blocks: Sequence[tuple[int, int]]) -> Window:
        """As of its base, whose two places are complex numbers, each [B, tokens, kv heads, head_dim / 2]."""
        window = super().window(start, blocks)
        pairs = (place.unflatten(-1, (-1, 2)) for place in window.places)
        return replace(
            window, places=[torch.view_as_complex(pair).transpose(2, 3) for pair in pairs]
        )


class SmallLayerStack(LayerStack):
    """As `LayerStack`, with a copy of the weights and `PairedKVCache`s, all float32."""

    kind = PairedKVCache

    def __init__(self, model: GemmaModel | Gemma2Model) -> None:
        super().__init__(model)
        self._weights = [self._prepare(layer) for layer in model.layers]
        self.dtype, self.scale, root = torch.float32, 1.0, math.sqrt(len(self.norm))
        self.norm, self._floor = self.norm * root, torch.tensor(root * math.sqrt(self.eps))

    def _prepare(self, layer: Any) -> list[Tensor]:
        """q, k and v; o; gate and up; down: float32 [in, out], which MKL reads in 0.7 of the time."""
        names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        own = zip((layer.self_attn, layer.mlp), names, strict=True)
        linears = [getattr(part, name) for part, named in own for name in named]
        q, k, v, o, gate, up, down = (linear.weight.detach().float() for linear in linears)
        half = self.width // 2
        qkv = (
            torch.cat([q * self.scale, k, v])
            .unflatten(0, (-1, 2, half))
            .transpose(1, 2)
            .flatten(0, 2)
        )
        out = o.unflatten(1, (-1, 2, half)).transpose(2, 3).flatten(1)
        norms = layer.input_layernorm, layer.post_attention_layernorm
        before, after = (norm_scale(norm) * math.sqrt(q.shape[1]) for norm in norms)
        whole = qkv * before, out, torch.cat([gate, up]) * after, down
        return [weight.T.contiguous() for weight in whole]

    def adopt_cache(self, cache: StaticKVCache) -> StaticKVCache:
        """Itself, or a copy in pairs."""
        if isinstance(cache, PairedKVCache):
            return cache
        _, _, batch, _, places, _ = cache.whole.shape
        copy = self.cache(batch, places, torch.float32, cache.whole.device)
        copy.whole.unflatten(-1, (-1, 2)).copy_(
            cache.whole.unflatten(-1, (2, -1)).transpose(-1, -2)
        )
        return copy

    def rotations(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What turns the pairs of queries and keys at positions [B, S]: [B, S, 1, d / 2] complex."""
        cos, sin = (
            part[..., self.width // 2 :] for part in super().rotations(places, torch.float32)
        )
        return (torch.complex(cos.contiguous(), sin.contiguous()),)

    def __call__(
        self,
        x: Tensor,
        rotations: tuple[Tensor, ...],
        window: Window,
        bias: Tensor | None = None,
        keys_only: bool = False,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """As of `LayerStack`."""
        (batch, length, width), (turn,), queries = x.shape, rotations, window.queries
        x = x.reshape(-1, width)
        count = range(len(self.layers))[::-1]
        for left, weights, place, seen in zip(
            count, self._weights, window.places, window.seen, strict=True
        ):
            qkv, out, gate_up, down = weights
            found = torch.mm(self._unit(x), qkv).view(batch, length, -1, self.width // 2, 2)
            parts = (self.heads, self.groups, self.groups)
            query, key, value = torch.view_as_complex(found).split(parts, dim=2)
            torch.mul(key, turn, out=place[0])
            place[1].copy_(value)
            if not left and keys_only:
                break
            turned = query * turn
            if not left and wanted is not None:
                rows, length, queries = torch.arange(batch, device=x.device), 1, [1]
                x, turned = x.view(batch, -1, width)[rows, wanted], turned[rows, wanted]
            folded = torch.view_as_real(turned).view(batch, length, self.groups, -1, self.width)
            folded = folded.transpose(1, 2).reshape(batch * self.groups, -1, self.width)
            found = self._attend(folded, seen, queries, bias)
            found = found.view(batch, self.groups, length, -1, self.width).transpose(1, 2)
            x = self._mlp(torch.addmm(x, found.reshape(batch * length, -1), out), gate_up, down)
        else:
            x = self._unit(x) * self.norm
        return x.view(batch, length, width)

    def _mlp(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Rows [N, D], and what the MLP adds to them."""
        if len(x) > 2 * BLOCK:
            return torch.cat([self._mlp(part, gate_up, down) for part in x.split(BLOCK)])
        gate, up = torch.mm(self._unit(x), gate_up).chunk(2, dim=1)
        return torch.addmm(x, _gelu(gate).mul_(up), down)

    def _unit(self, x: Tensor) -> Tensor:
        """Rows [N, D] divided by √(‖x‖² + D·eps): of length 1, which √D in the weights makes up for."""
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(self._floor)


def _gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: ½ x (1 + tanh u) = x σ(2u), which takes half of PyTorch's time."""
    return torch.addcmul(TWO_A, x, x, value=2 * 0.044715 * A).mul_(x).sigmoid_().mul_(x)


def make_small_stack(model: GemmaModel | Gemma2Model) -> SmallLayerStack | None:
    """The layers of a Gemma, if they are small, plain, and on a CPU with MKL, whose products begin first."""
    layers: Any = model.layers
    weights = [p for p in layers.parameters() if p.dim() == 2]
    fitting = torch.backends.mkl.is_available() and not isinstance(model, Gemma2Model)
    here = all(w.device.type == "cpu" and not isinstance(w, FakeTensor) for w in weights)
    if not fitting or not here or max(map(torch.numel, weights)) >= MAX_CACHED_ELEMENTS:
        return None
    parts = [
        part
        for layer in layers
        for half in (layer.self_attn, layer.mlp)
        for part in half.children()
    ]
    return (
        SmallLayerStack(model)
        if all(isinstance(p, GELUTanh) or is_plain_linear(p) for p in parts)
        else None
    )


get_small_stack = ModuleCache(make_small_stack)
"""`get_small_stack(model)`: `make_small_stack`, kept."""
