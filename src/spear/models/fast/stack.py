"""The layers of a Gemma for inference, and the prefill of their key-value cache with images and
text.

The results are those of the model's own layers up to rounding. Keys and values go to buffers that
are made once (`StaticKVCache`), linear layers that read the same input are one product
(`FusedLinear`), and on a GPU the work around attention is compiled.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Gemma2Model, GemmaModel

from spear.models.fast.cuda_graphs import CudaGraphCache
from spear.models.fast.kv_cache import CacheWindow, StaticKVCache
from spear.models.fast.linear import FusedLinear, LayerEvents, ModuleCache
from spear.models.layers import compute_position_ids, mask_to_bias

MIN_RECOMPILE_LIMIT = 32
"""Variants that `torch.compile` may make of a function: one length, then any; the VLM and the
expert; prompts and single tokens. PyTorch's default of 8 is too few."""


def split_image_inputs(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the tensors "pixels/VIEW" and "present/VIEW" of the inputs, each by view."""
    pixels = _select_by_prefix(inputs, "pixels/")
    present = _select_by_prefix(inputs, "present/")
    return pixels, present


def _select_by_prefix(inputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in inputs.items()
        if name.startswith(prefix)
    }


class FusedLayer:
    """The weights of one layer.

    Norms are given by their scales, 1 + weight, in float32. Only Gemma 2 has norms after attention
    and after the MLP; otherwise these are None.
    """

    def __init__(self, layer: Any, packed: bool) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        is_gemma2 = hasattr(layer, "pre_feedforward_layernorm")
        self.before_attention = norm_scale(layer.input_layernorm)
        self.after_attention: Tensor | None = None
        self.after_mlp: Tensor | None = None
        if is_gemma2:
            self.after_attention = norm_scale(layer.post_attention_layernorm)
            self.before_mlp = norm_scale(layer.pre_feedforward_layernorm)
            self.after_mlp = norm_scale(layer.post_feedforward_layernorm)
        else:
            self.before_mlp = norm_scale(layer.post_attention_layernorm)

        self.qkv = FusedLinear(attention.q_proj, attention.k_proj, attention.v_proj, packed=packed)
        self.out = FusedLinear(attention.o_proj, packed=packed)
        self.gate_up = FusedLinear(mlp.gate_proj, mlp.up_proj, packed=packed)
        self.down = FusedLinear(mlp.down_proj, packed=packed)


class LayerStack:
    """All layers of a Gemma or Gemma 2, and its last norm.

    Args:
        model: The model, whose weights the stack reads.
        packed: Whether linear layers keep a copy of their weights in oneDNN's layout; see
            `FusedLinear`.
        compiled: Whether `torch.compile` makes kernels of what is before and after attention. They
            are made once for all layers.
    """

    cache_class = StaticKVCache

    def __init__(
        self, model: GemmaModel | Gemma2Model, packed: bool = False, compiled: bool = False
    ) -> None:
        config: Any = model.config
        first_layer: Any = model.layers[0]
        self.num_heads: int = config.num_attention_heads
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.eps: float = config.rms_norm_eps
        self._eps_tensor = torch.tensor(self.eps, dtype=torch.float32)
        self.dtype: torch.dtype = model.norm.weight.dtype
        self.scale: float = first_layer.self_attn.scaling
        self.softcap: float | None = getattr(first_layer.self_attn, "attn_logit_softcapping", None)
        self.activation: Any = first_layer.mlp.act_fn
        self.rotary_embedding = model.rotary_emb
        self.last_norm_scale = norm_scale(model.norm)
        self.layers = [FusedLayer(layer, packed) for layer in model.layers]
        self.run_as_graph = CudaGraphCache()

        self.few_rows: Any = None
        if compiled:
            self.few_rows = self._make_few_rows()
        # Functions, not bound methods: a stack that refers to itself would keep its weights and
        # graphs in memory when nobody uses it any more.
        self._run_before_attention: Any = type(self)._project_qkv
        self._run_after_attention: Any = type(self)._finish_layer
        if compiled:
            self._compile()

    def _make_few_rows(self) -> Any:
        from spear.models.fast.few_rows import FewRows  # needs Triton

        if not FewRows.supports_layers(
            self.layers, self.num_heads, self.head_dim, self.num_kv_heads
        ):
            return None
        return FewRows(self.layers, self.num_heads, self.head_dim, self.eps, self.scale)

    def _compile(self) -> None:
        """With few rows, small kernels take most of the time on a GPU; compiled, they become
        one."""
        # PyTorch recommends TensorFloat32, which is too inexact here.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        self._run_before_attention = torch.compile(self._run_before_attention)
        self._run_after_attention = torch.compile(self._run_after_attention)
        dynamo_config: Any = torch._dynamo.config
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MIN_RECOMPILE_LIMIT)

    def allocate_cache(
        self, batch: int, num_places: int, dtype: torch.dtype, device: torch.device
    ) -> StaticKVCache:
        """Return a cache with room for the keys and values of `num_places` tokens per batch row."""
        shape = (batch, self.num_kv_heads, num_places, self.head_dim)
        return self.cache_class(len(self.layers), shape, dtype, device)

    def adopt_cache(self, cache: StaticKVCache) -> StaticKVCache:
        """Return a cache that another stack filled, or a copy of it in this stack's precision."""
        if cache.buffer.dtype == self.dtype:
            return cache
        _, _, batch, _, num_places, _ = cache.buffer.shape
        copy = self.allocate_cache(batch, num_places, self.dtype, cache.buffer.device)
        copy.buffer.copy_(cache.buffer)
        return copy

    def compute_rotations(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return what rotates queries and keys at positions [B, S]: cosines and signed sines.

        Both are [B, S, 1, d]. With s the sines, the signed sines are [-s_first, s_second], so that
        rotary embedding is x · cos + roll(x, d / 2) · sin.
        """
        only_dtype_and_device = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self.rotary_embedding(only_dtype_and_device, positions)
        first, second = sin.chunk(2, dim=-1)
        return cos[:, :, None], torch.cat([-first, second], dim=-1)[:, :, None]

    def __call__(
        self,
        x: Tensor,
        rotations: tuple[Tensor, ...],
        window: CacheWindow,
        bias: Tensor | None = None,
        keys_only: bool = False,
        selected: Tensor | None = None,
    ) -> Tensor:
        """Run all layers, and leave the keys and values of the tokens in the cache.

        Args:
            x: [B, S, D] embeddings of the window's tokens.
            rotations: The result of `compute_rotations` for the tokens' positions.
            window: Where their keys and values go, and what they see.
            bias: [B · kv heads, 1, places] added to all scores, or None: see
                `PrefilledCache.make_bias`.
            keys_only: Stop in the last layer after its keys and values, and return its input.
            selected: [B] the one token of each row whose output is needed; the window must then
                have one block.

        Returns:
            [B, S, D] the last layer's output, after the last norm; [B, 1, D] with `selected`.
        """
        can_use_few_rows = self.few_rows is not None and selected is None and not keys_only
        if can_use_few_rows and self.few_rows.supports_input(x, window):
            with torch.cuda.device_of(x):  # Triton launches on a thread's current GPU
                x = self.few_rows(x, rotations, window, bias)
                return self._norm(x, self.last_norm_scale)

        for index, layer in enumerate(self.layers):
            is_last = index + 1 == len(self.layers)
            query, key_values = self._run_before_attention(self, layer, x, *rotations)
            window.write(index, key_values)
            window.wait(index)
            if is_last and keys_only:
                return x
            if is_last and selected is not None:
                query, x = self._select_tokens(selected, query, x)
                window = replace(window, block_lengths=[1])
            attended = self._attend(query, window.visible[index], window.block_lengths, bias)
            x = self._run_after_attention(self, layer, x, attended)
        return self._norm(x, self.last_norm_scale)

    def _project_qkv(
        self, layer: FusedLayer, x: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Norm, projections and rotary embedding of [B, S, D].

        Returns queries [B · kv heads, S · query heads per kv head, d], and keys and values
        [2, B, kv heads, S, d].
        """
        batch, length, _ = x.shape
        qkv = layer.qkv.concatenated(self._norm(x, layer.before_attention))
        qkv = qkv.view(batch, length, -1, self.head_dim)

        # Queries and keys are rotated together: [B, S, heads, d].
        query_key, value = qkv.tensor_split((self.num_heads + self.num_kv_heads,), dim=2)
        swapped = query_key.roll(self.head_dim // 2, dims=-1)
        rotated = torch.addcmul(query_key * cos, swapped, sin)
        query, key = rotated.tensor_split((self.num_heads,), dim=2)

        key_values = torch.stack([key, value.to(key.dtype)]).transpose(2, 3)
        query = query.unflatten(2, (self.num_kv_heads, -1)).transpose(1, 2)
        return query.reshape(batch * self.num_kv_heads, -1, self.head_dim), key_values

    def _select_tokens(self, selected: Tensor, query: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the queries, shaped as by `_project_qkv`, and the inputs [B, 1, D] of one token
        per row."""
        batch, length, _ = x.shape
        rows = torch.arange(batch, device=x.device)
        query = query.view(batch, self.num_kv_heads, length, -1, self.head_dim)
        selected_query = query[rows, :, selected]
        return (
            selected_query.reshape(batch * self.num_kv_heads, -1, self.head_dim),
            x[rows, selected][:, None],
        )

    def _finish_layer(self, layer: FusedLayer, x: Tensor, attended: Tensor) -> Tensor:
        """The layer after attention: output projection, residuals and MLP.

        x [B, S, D], attended [B · kv heads, S · query heads per kv head, d] -> [B, S, D].
        """
        batch, length, _ = x.shape
        attended = attended.view(batch, self.num_kv_heads, length, -1, self.head_dim)
        attended = attended.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        out = layer.out(attended)[0]
        x = x + self._norm(out, layer.after_attention)

        gate, up = layer.gate_up(self._norm(x, layer.before_mlp))
        down = layer.down(self.activation(gate) * up)[0]
        return x + self._norm(down, layer.after_mlp)

    def _attend(
        self,
        query: Tensor,
        visible: list[tuple[Tensor, Tensor]],
        block_lengths: list[int],
        bias: Tensor | None,
    ) -> Tensor:
        """Attention, block by block. The query heads of a key-value head are rows of one
        product."""
        heads_per_group = self.num_heads // self.num_kv_heads
        if len(block_lengths) == 1:
            ((keys, values),) = visible
            return self._attend_block(query, keys, values, bias)

        block_queries = query.split([n * heads_per_group for n in block_lengths], dim=1)
        outputs = []
        for block_query, (keys, values) in zip(block_queries, visible, strict=True):
            outputs.append(self._attend_block(block_query, keys, values, bias))
        return torch.cat(outputs, dim=1)

    def _attend_block(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        """softmax(scale · q Kᵀ + bias) V: [G, Q, d] with keys and values [G, places, d]."""
        if bias is not None:
            bias = bias[:, :, : keys.shape[1]]
        if query.device.type != "cpu" and self.softcap is None:
            # PyTorch's fused attention gets one head, so it needs no copies of keys and values.
            attended = nn.functional.scaled_dot_product_attention(
                query[:, None],
                keys[:, None],
                values[:, None],
                attn_mask=None if bias is None else bias[:, None],
                scale=self.scale,
            )
            return attended[:, 0]
        scores = self._compute_scores(query, keys.transpose(1, 2), bias)
        return torch.bmm(scores.softmax(-1), values)

    def _compute_scores(
        self, query: Tensor, transposed_keys: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Scores [G, Q, places] of queries [G, Q, d] and transposed keys [G, d, places]."""
        if self.softcap is not None:  # Gemma 2
            scores = torch.bmm(query * self.scale, transposed_keys)
            scores = self.softcap * (scores / self.softcap).tanh()
            return scores if bias is None else scores + bias
        if self.scale == 1 and bias is None:
            return torch.bmm(query, transposed_keys)
        addend = query.new_zeros(1) if bias is None else bias
        return torch.baddbmm(addend, query, transposed_keys, alpha=self.scale)

    def _norm(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Gemma's RMSNorm, x / rms(x) · scale, in float32; x itself where there is no norm."""
        if scale is None:
            return x
        full = x if x.dtype == torch.float32 else x.float()
        width = full.shape[-1]
        if x.device.type != "cpu":
            return nn.functional.rms_norm(full, (width,), scale, self.eps).to(x.dtype)
        norm = torch.linalg.vector_norm(full, dim=-1, keepdim=True)
        mean_square = torch.addcmul(self._eps_tensor, norm, norm, value=1 / width)
        inverse_rms = mean_square.rsqrt_()
        return (full * scale).mul_(inverse_rms).to(x.dtype)


@dataclass(frozen=True)
class PrefilledCache:
    """A prefix of S tokens after `prefill`.

    cache           keys and values of every layer, with room after them.
    valid           [B, S] bool, False for padding and missing images.
    is_padded       whether any of `valid` may be False.
    next_positions  [B] the position after the last valid token.
    hidden          [B, D] the last layer's output at the last valid token; None where only the
                    cache was wanted.
    write_events    see `CacheWindow`.
    """

    cache: StaticKVCache
    valid: Tensor
    is_padded: bool
    next_positions: Tensor
    hidden: Tensor | None
    write_events: LayerEvents

    def make_bias(
        self, num_new_places: int, num_kv_heads: int, dtype: torch.dtype
    ) -> Tensor | None:
        """Return what is added to scores of the prefix and of `num_new_places` places after it.

        [B · kv heads, 1, places]; None where all of the prefix is valid.
        """
        if not self.is_padded:
            return None
        batch = self.valid.shape[0]
        new_places = self.valid.new_ones(batch, num_new_places)
        bias = mask_to_bias(torch.cat([self.valid, new_places], dim=1), dtype)
        return bias.repeat_interleave(num_kv_heads, dim=0)[:, None]


def prefill(  # noqa: PLR0913  what it fills, from what, and for whom
    layers: LayerStack,
    features: Tensor,
    text: Tensor,
    image_valid: Tensor | None,
    text_valid: Tensor | None,
    room: int,
    keys_only: bool = False,
    write_events: LayerEvents = None,
) -> PrefilledCache:
    """Run visual tokens and text embeddings, which see each other, through the layers.

    Args:
        layers: The stack.
        features: [B, T, D] visual tokens.
        text: [B, L, D] text embeddings.
        image_valid: [B, T] bool, or None where all are valid, which saves masks.
        text_valid: [B, L] bool or integers, or None where all are valid.
        room: Number of tokens that will follow.
        keys_only: Compute the cache only; see `LayerStack`.
        write_events: See `CacheWindow`.
    """
    x = torch.cat([features.to(text.dtype), text], dim=1)
    batch, length = x.shape[:2]
    valid = torch.cat([_get_valid(image_valid, features), _get_valid(text_valid, text)], dim=1)
    is_padded = image_valid is not None or text_valid is not None
    # On a GPU, looking at the mask would mean waiting; a fake tensor, by which memory is planned,
    # has no values.
    if is_padded and x.device.type == "cpu" and not isinstance(valid, FakeTensor):
        is_padded = not bool(valid.all())

    cache = layers.allocate_cache(batch, length + room, x.dtype, x.device)
    positions = compute_position_ids(valid)
    prefix = PrefilledCache(
        cache=cache,
        valid=valid,
        is_padded=is_padded,
        next_positions=positions[:, -1] + 1,
        hidden=None,
        write_events=write_events,
    )
    window = replace(cache.make_window(0, [(length, length)]), write_events=write_events)
    rotations = layers.compute_rotations(positions, x.dtype)
    bias = prefix.make_bias(0, layers.num_kv_heads, x.dtype)
    if keys_only:
        layers(x, rotations, window, bias, keys_only=True)
        return prefix

    # Padding has the position of the token before it, so that the first token with the last
    # position is the last valid one.
    last_valid = positions.argmax(-1)
    hidden = layers(x, rotations, window, bias, selected=last_valid)
    return replace(prefix, hidden=hidden[:, 0])


def _get_valid(valid: Tensor | None, tokens: Tensor) -> Tensor:
    """Return which of the tokens [B, N, D] are valid: [B, N] bool."""
    if valid is not None:
        return valid.bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def norm_scale(norm: nn.Module) -> Tensor:
    """Return what Gemma's RMSNorm multiplies by, 1 + weight, in float32."""
    return 1 + norm.weight.detach().float()  # type: ignore[operator]


def can_compile(device: torch.device) -> bool:
    """Return whether layers are compiled: on a GPU that PyTorch's compiler can write kernels
    for."""
    return device.type == "cuda" and find_spec("triton") is not None


get_layer_stack = ModuleCache(LayerStack)
"""`get_layer_stack(model, packed, compiled)`: the layers of a Gemma, ready to run."""
