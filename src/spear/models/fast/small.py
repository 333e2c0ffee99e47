"""The layers of a small Gemma on a CPU.

In a small network, the operations around the matrix products take as long as the products. So
`SmallLayerStack` computes what `LayerStack` does, up to rounding, with half as many operations:

- The scales of norms and of attention are multiplied into the weights in advance.
- Rotary embedding rotates pairs of numbers. Here the two numbers of a pair are neighbors in memory,
  so that PyTorch can view them as one complex number a + bi, and the rotation is one complex
  product, (a + bi) · (cos θ + i sin θ). In Gemma the two are half a head apart.
- A matrix product and the addition of the residual, x + y W, are one call (`addmm`).
- The MLP runs `MLP_BLOCK_ROWS` rows at a time, whose intermediate results stay in the core's cache.

All numbers are float32. For the few rows of a flow step, or of an answer's next token, products in
bfloat16 take more time to set up than they save.

In the shapes, B is the batch size, S the number of tokens per batch row, N = B · S the number of
rows, D the width of the layers and d (`head_dim`) the width of a head.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Gemma2Model, GemmaModel
from transformers.activations import GELUTanh

from spear.models.fast.kv_cache import CacheWindow, StaticKVCache, TokenBlock
from spear.models.fast.linear import MAX_CACHED_ELEMENTS, ModuleCache, is_plain_linear
from spear.models.fast.stack import LayerStack, RotaryFactors, compute_norm_scale

MLP_BLOCK_ROWS = 128
"""Number of rows that an MLP runs at once, so that its hidden layer stays in the core's cache (our
choice)."""

GELU_FACTOR = math.sqrt(2 / math.pi)
TWICE_GELU_FACTOR = torch.tensor(2 * GELU_FACTOR, device="cpu", dtype=torch.float32)
"""2 √(2/π), as a tensor, because PyTorch would convert a Python number to a tensor at every use."""


class PairedKVCache(StaticKVCache):
    """A `StaticKVCache` in which the two numbers of a rotated pair are neighbors."""

    def make_window(self, start: int, blocks: Sequence[TokenBlock]) -> CacheWindow:
        """Make a window whose `new_key_values` are complex, [2, B, tokens, kv heads, d / 2]."""
        window = super().make_window(start, blocks)
        complex_views = []
        for key_values in window.new_key_values:
            pairs = key_values.unflatten(-1, (-1, 2))  # [2, B, kv heads, tokens, d / 2, 2]
            complex_views.append(torch.view_as_complex(pairs).transpose(2, 3))
        return replace(window, new_key_values=complex_views)


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer, float32 [in, out].

    Gemma's weights are [out, in]. Transposed, MKL reads them in 0.7 times as long.
    """

    qkv: Tensor  # of queries, keys and values, which contains the attention's norm and its scale
    out: Tensor
    gate_up: Tensor  # contains the MLP's norm
    down: Tensor


class SmallLayerStack(LayerStack):
    """A `LayerStack` with its own copy of the weights and with `PairedKVCache`s, all in float32."""

    cache_class = PairedKVCache

    def __init__(self, model: GemmaModel | Gemma2Model) -> None:
        super().__init__(model)
        self._weights = [self._prepare_weights(layer) for layer in model.layers]
        self.dtype = torch.float32
        self.scale = 1.0  # the query weights contain the scale of the attention scores

        # A norm divides x by its root mean square, ‖x‖ / √D. `_to_unit_length` divides by ‖x‖
        # instead, so the scales of norms get the factor √D.
        sqrt_width = math.sqrt(len(self.last_norm_scale))
        self.last_norm_scale = self.last_norm_scale * sqrt_width
        # The length √(D · eps), by which `eps` limits the division for short x.
        self._eps_length = torch.tensor(sqrt_width * math.sqrt(self.eps), dtype=torch.float32)

    def _prepare_weights(self, layer: Any) -> LayerWeights:
        """Copy a layer's weights, with the scales of norms and attention multiplied into them."""
        attention = layer.self_attn
        mlp = layer.mlp
        query = _get_weight(attention.q_proj)
        key = _get_weight(attention.k_proj)
        value = _get_weight(attention.v_proj)
        out = _get_weight(attention.o_proj)
        gate_up = torch.cat([_get_weight(mlp.gate_proj), _get_weight(mlp.up_proj)])

        # Rotary embedding rotates columns c and c + d / 2 of a head together. Here these columns
        # become neighbors, in what `qkv` computes and in what `out` reads.
        half = self.head_dim // 2
        qkv = torch.cat([query * self.scale, key, value])  # [heads · d, D]
        qkv = qkv.unflatten(0, (-1, 2, half))  # [heads, 2, d / 2, D]
        qkv = qkv.transpose(1, 2).flatten(0, 2)  # [heads · d, D]
        out = out.unflatten(1, (-1, 2, half))  # [D, heads, 2, d / 2]
        out = out.transpose(2, 3).flatten(1)  # [D, heads · d]

        # Inputs are divided by their Euclidean norm, which is √width times the rms of RMSNorm.
        sqrt_width = math.sqrt(query.shape[1])
        attention_norm_scale = compute_norm_scale(layer.input_layernorm) * sqrt_width
        mlp_norm_scale = compute_norm_scale(layer.post_attention_layernorm) * sqrt_width
        return LayerWeights(
            qkv=_transpose(qkv * attention_norm_scale),
            out=_transpose(out),
            gate_up=_transpose(gate_up * mlp_norm_scale),
            down=_transpose(_get_weight(mlp.down_proj)),
        )

    def convert_cache_if_needed(self, cache: StaticKVCache) -> StaticKVCache:
        """Return another stack's cache itself if it is a `PairedKVCache`, else a copy as one."""
        if isinstance(cache, PairedKVCache):
            return cache
        _, _, batch, _, num_places, _ = cache.buffer.shape  # [layers, 2, B, kv heads, places, d]
        copy = self.allocate_cache(batch, num_places, torch.float32, cache.buffer.device)
        halves = cache.buffer.unflatten(-1, (2, -1))  # [..., 2, d / 2]
        pairs = copy.buffer.unflatten(-1, (-1, 2))  # [..., d / 2, 2], a view
        pairs.copy_(halves.transpose(-1, -2))
        return copy

    def compute_rotary_factors(self, positions: Tensor, _dtype: torch.dtype) -> RotaryFactors:
        """Return the complex factors cos θ + i sin θ of queries and keys at positions [B, S].

        The result has one element, [B, S, 1, d / 2] complex64, whatever `_dtype` is.
        """
        cos, sin = super().compute_rotary_factors(positions, torch.float32)
        # The second halves have the sines without the sign
        # (`LayerStack.compute_rotary_factors`).
        half = self.head_dim // 2
        second_cos = cos[..., half:].contiguous()
        second_sin = sin[..., half:].contiguous()
        return (torch.complex(second_cos, second_sin),)

    def __call__(
        self,
        x: Tensor,
        rotations: RotaryFactors,
        window: CacheWindow,
        bias: Tensor | None = None,
        keys_only: bool = False,
        selected: Tensor | None = None,
    ) -> Tensor:
        """Run all layers. Arguments and result are those of `LayerStack.__call__`."""
        batch, length, width = x.shape
        (rotation,) = rotations
        block_lengths = window.block_lengths
        x = x.reshape(-1, width)  # rows of all tokens

        for index, weights in enumerate(self._weights):
            is_last = index + 1 == len(self._weights)
            query, key, value = self._project_to_complex_qkv(x, weights.qkv, batch, length)
            # Write the rotated keys and the values to the cache, of which these two are views.
            new_keys, new_values = window.new_key_values[index]
            torch.mul(key, rotation, out=new_keys)
            new_values.copy_(value)
            if is_last and keys_only:
                return x.view(batch, length, width)

            # From here on the last layer needs only the selected token of each batch row.
            query = query * rotation
            if is_last and selected is not None:
                batch_rows = torch.arange(batch, device=x.device)
                x = x.view(batch, -1, width)[batch_rows, selected]
                query = query[batch_rows, selected]
                length = 1
                block_lengths = [1]

            # `_attend` takes queries [B · kv heads, S · query heads per kv head, d], and returns
            # its result in the same shape.
            folded_query = torch.view_as_real(query)
            folded_query = folded_query.view(batch, length, self.num_kv_heads, -1, self.head_dim)
            folded_query = folded_query.transpose(1, 2)
            folded_query = folded_query.reshape(batch * self.num_kv_heads, -1, self.head_dim)
            attended = self._attend(folded_query, window.visible[index], block_lengths, bias)
            attended = attended.view(batch, self.num_kv_heads, length, -1, self.head_dim)
            attended = attended.transpose(1, 2).reshape(batch * length, -1)  # [N, heads · d]

            x = torch.addmm(x, attended, weights.out)
            x = self._add_mlp(x, weights.gate_up, weights.down)

        x = self._to_unit_length(x) * self.last_norm_scale
        return x.view(batch, length, width)

    def _project_to_complex_qkv(
        self, x: Tensor, qkv_weight: Tensor, batch: int, length: int
    ) -> Sequence[Tensor]:
        """Return queries, keys and values of rows x [N, D], before their rotation.

        Each is complex, [B, S, heads, d / 2].
        """
        qkv = torch.mm(self._to_unit_length(x), qkv_weight)
        pairs = qkv.view(batch, length, -1, self.head_dim // 2, 2)  # [B, S, heads, d / 2, 2]
        sizes = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        return torch.view_as_complex(pairs).split(sizes, dim=2)

    def _add_mlp(self, x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Rows x [N, D] plus the MLP's output for them."""
        if len(x) > 2 * MLP_BLOCK_ROWS:
            blocks = x.split(MLP_BLOCK_ROWS)
            return torch.cat([self._add_mlp(block, gate_up, down) for block in blocks])
        gate, up = torch.mm(self._to_unit_length(x), gate_up).chunk(2, dim=1)
        return torch.addmm(x, _gelu(gate).mul_(up), down)

    def _to_unit_length(self, x: Tensor) -> Tensor:
        """Rows x [N, D] divided by √(‖x‖² + D · eps). The weights contain a norm's factor √D."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / length.hypot_(self._eps_length)  # hypot(a, b) = √(a² + b²)


def _gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, in half of the time that PyTorch takes.

    ½ x (1 + tanh u) = x σ(2u), with u = √(2/π) (x + 0.044715 x³).
    """
    # 2u / x, then 2u, σ(2u) and x σ(2u).
    factor = torch.addcmul(TWICE_GELU_FACTOR, x, x, value=2 * 0.044715 * GELU_FACTOR)
    return factor.mul_(x).sigmoid_().mul_(x)


def _get_weight(layer: nn.Linear) -> Tensor:
    return layer.weight.detach().float()


def _transpose(weight: Tensor) -> Tensor:
    return weight.T.contiguous()


def make_small_stack(model: GemmaModel | Gemma2Model) -> SmallLayerStack | None:
    """Return a `SmallLayerStack` of a Gemma, or None if it cannot run the model or would be slower.

    The stack runs layers of Gemma (not Gemma 2) that are small, that no adapter or hook changes,
    and that are on a CPU with MKL, whose products take less time to start than oneDNN's.
    """
    if not torch.backends.mkl.is_available() or isinstance(model, Gemma2Model):
        return None
    layers: Any = model.layers
    for weight in layers.parameters():
        is_matrix = weight.dim() == 2  # the weights of norms are vectors
        if not is_matrix:
            continue
        if weight.device.type != "cpu" or isinstance(weight, FakeTensor):
            return None
        if weight.numel() >= MAX_CACHED_ELEMENTS:
            return None
    for layer in layers:
        for module in (*layer.self_attn.children(), *layer.mlp.children()):
            if not isinstance(module, GELUTanh) and not is_plain_linear(module):
                return None
    return SmallLayerStack(model)


get_small_stack = ModuleCache(make_small_stack)
"""`get_small_stack(model)`: the result of `make_small_stack`, which is kept until the weights
change."""
