"""The layers of a Gemma for inference, and the prefill of their KV cache with images and text.

The results are those of the model's own layers up to rounding. The layers here are faster for three
reasons: they write keys and values to buffers that are made once (`StaticKVCache`), they compute
linear layers with the same input as one product (`FusedLinear`), and on a GPU they compile the work
around attention.

In the shapes, B is the batch size, S the number of new tokens per batch row, D the width of the
layers and d (`head_dim`) the width of a head. A *place* is a token's index in the KV cache.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import Gemma2Model, GemmaModel

from spear.models.fast.cuda_graphs import CudaGraphCache
from spear.models.fast.kv_cache import CacheWindow, StaticKVCache, TokenBlock
from spear.models.fast.linear import FusedLinear, LayerEvents, ModuleCache
from spear.models.layers import compute_position_ids, mask_to_bias

MIN_RECOMPILE_LIMIT = 32
"""How many variants `torch.compile` may make of a function. There is one variant for the first
length and one for any length, each for the VLM and the expert, for prompts and single tokens, and
for several types. PyTorch's default of 8 is too small."""


RotaryFactors = tuple[Tensor, ...]
"""The factors of the rotary embedding, in the form that a stack of layers needs: two tensors with
cosines and signed sines (`LayerStack`), or one complex tensor (`SmallLayerStack`)."""


class ImageInputs(NamedTuple):
    """The images of a batch, and masks of the images that are present, both as view -> tensor."""

    pixels: dict[str, Tensor]
    present: dict[str, Tensor]


def select_image_inputs(inputs: Mapping[str, Tensor]) -> ImageInputs:
    """Return the inputs named "pixels/VIEW", and those named "present/VIEW", as view -> tensor."""
    pixels = _select_by_prefix(inputs, "pixels/")
    present = _select_by_prefix(inputs, "present/")
    return ImageInputs(pixels, present)


def _select_by_prefix(inputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, by the rest of the name."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in inputs.items()
        if name.startswith(prefix)
    }


class FusedLayer:
    """The weights of one layer.

    before_attention, after_attention, before_mlp and after_mlp are the scales of norms (1 + weight)
    [D], in float32. Only Gemma 2 has norms after attention and after the MLP. For Gemma their
    scales are None.

    qkv (queries, keys and values), out, gate_up and down are the linear layers.
    """

    def __init__(self, layer: Any, packed: bool) -> None:
        attention = layer.self_attn
        mlp = layer.mlp
        is_gemma2 = hasattr(layer, "pre_feedforward_layernorm")
        self.before_attention = compute_norm_scale(layer.input_layernorm)
        self.after_attention: Tensor | None = None
        self.after_mlp: Tensor | None = None
        if is_gemma2:
            self.after_attention = compute_norm_scale(layer.post_attention_layernorm)
            self.before_mlp = compute_norm_scale(layer.pre_feedforward_layernorm)
            self.after_mlp = compute_norm_scale(layer.post_feedforward_layernorm)
        else:
            self.before_mlp = compute_norm_scale(layer.post_attention_layernorm)

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
        compiled: Whether `torch.compile` compiles the parts of a layer before and after attention,
            once for all layers.
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
        self.last_norm_scale = compute_norm_scale(model.norm)
        self.layers = [FusedLayer(layer, packed) for layer in model.layers]
        self.run_as_graph = CudaGraphCache()

        self.few_rows: Any = None
        if compiled:
            self.few_rows = self._make_few_row_kernels()
        # These are functions, not bound methods. With bound methods the stack would refer to
        # itself, and its weights and graphs would stay in memory after its last use.
        self._run_before_attention: Any = type(self)._norm_and_project_qkv
        self._run_after_attention: Any = type(self)._finish_layer
        if compiled:
            self._compile()

    def _make_few_row_kernels(self) -> Any:
        """Return Triton kernels for these layers and few tokens, or None if they do not fit."""
        from spear.models.fast.few_rows import FewRows  # needs Triton

        if not FewRows.supports_layers(
            self.layers, self.num_heads, self.head_dim, self.num_kv_heads
        ):
            return None
        return FewRows(self.layers, self.num_heads, self.head_dim, self.eps, self.scale)

    def _compile(self) -> None:
        """Compile the parts of a layer before and after attention.

        With few tokens, a GPU spends most of the time on their small kernels. Compiled, each part
        is one kernel and the matrix products.
        """
        # Hide PyTorch's advice to use TensorFloat32, which is too inexact here.
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

    def convert_cache_if_needed(self, cache: StaticKVCache) -> StaticKVCache:
        """Return another stack's cache itself if it has our precision, else a converted copy."""
        if cache.buffer.dtype == self.dtype:
            return cache
        _, _, batch, _, num_places, _ = cache.buffer.shape  # [layers, 2, B, kv heads, places, d]
        copy = self.allocate_cache(batch, num_places, self.dtype, cache.buffer.device)
        copy.buffer.copy_(cache.buffer)
        return copy

    def compute_rotary_factors(self, positions: Tensor, dtype: torch.dtype) -> RotaryFactors:
        """Return cosines and signed sines of the rotary embedding at positions [B, S].

        Both are [B, S, 1, d]. The signed sines are the sines with the sign of their first half
        reversed, so that the rotary embedding of x is x · cos + roll(x, d / 2) · signed sines.
        """
        # The rotary embedding reads only the type and the device of its first argument.
        only_dtype_and_device = torch.empty(0, dtype=dtype, device=positions.device)
        cos, sin = self.rotary_embedding(only_dtype_and_device, positions)
        first_half, second_half = sin.chunk(2, dim=-1)
        signed_sin = torch.cat([-first_half, second_half], dim=-1)
        return cos[:, :, None], signed_sin[:, :, None]

    def __call__(
        self,
        x: Tensor,
        rotations: RotaryFactors,
        window: CacheWindow,
        bias: Tensor | None = None,
        keys_only: bool = False,
        selected: Tensor | None = None,
    ) -> Tensor:
        """Run all layers, and write the keys and values of the tokens to the cache.

        Args:
            x: [B, S, D] embeddings of new tokens.
            rotations: The result of `compute_rotary_factors` for the tokens' positions.
            window: The views of the cache that the tokens write and see.
            bias: [B · kv heads, 1, places] added to all scores, or None; see
                `PrefilledCache.make_bias`.
            keys_only: Whether the last layer computes only its keys and values. The result is then
                the last layer's input.
            selected: [B] the index of the one token of each batch row whose output is needed. The
                window must then have one block.

        Returns:
            [B, S, D] the last layer's output, after the last norm; [B, 1, D] with `selected`.
        """
        can_use_few_rows = self.few_rows is not None and selected is None and not keys_only
        if can_use_few_rows and self.few_rows.supports_input(x, window):
            with torch.cuda.device_of(x):  # Triton launches on the thread's current GPU
                x = self.few_rows(x, rotations, window, bias)
                return self._norm(x, self.last_norm_scale)

        for index, layer in enumerate(self.layers):
            is_last = index + 1 == len(self.layers)
            query, key_values = self._run_before_attention(self, layer, x, *rotations)
            window.write(index, key_values)
            window.wait_for_prefix(index)
            if is_last and keys_only:
                return x
            if is_last and selected is not None:
                query, x = self._select_one_token_per_row(selected, query, x)
                window = replace(window, block_lengths=[1])
            attended = self._attend(query, window.visible[index], window.block_lengths, bias)
            x = self._run_after_attention(self, layer, x, attended)
        return self._norm(x, self.last_norm_scale)

    def _norm_and_project_qkv(
        self, layer: FusedLayer, x: Tensor, cos: Tensor, signed_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The part of a layer before attention: norm, projections, rotary embedding of [B, S, D].

        Returns:
            Queries [B · kv heads, S · query heads per kv head, d], in which the queries of all
            heads that share a key-value head are the rows of one matrix; and keys and values
            [2, B, kv heads, S, d].
        """
        batch, length, _ = x.shape
        qkv = layer.qkv.project_all(self._norm(x, layer.before_attention))
        qkv = qkv.view(batch, length, -1, self.head_dim)

        # Rotary embedding of queries and keys together, [B, S, heads, d]. By the signs of the sines
        # (`compute_rotary_factors`), halves (a, b) become (a cos - b sin, b cos + a sin).
        query_key, value = qkv.tensor_split((self.num_heads + self.num_kv_heads,), dim=2)
        swapped = query_key.roll(self.head_dim // 2, dims=-1)
        rotated = torch.addcmul(query_key * cos, swapped, signed_sin)
        query, key = rotated.tensor_split((self.num_heads,), dim=2)

        key_values = torch.stack([key, value.to(key.dtype)]).transpose(2, 3)
        # Group the query heads: [B, S, kv heads, heads per kv head, d].
        query = query.unflatten(2, (self.num_kv_heads, -1))
        query = query.transpose(1, 2)  # [B, kv heads, S, heads per kv head, d]
        return query.reshape(batch * self.num_kv_heads, -1, self.head_dim), key_values

    def _select_one_token_per_row(
        self, token_indices: Tensor, query: Tensor, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Select one token per batch row from queries and the layer's inputs.

        Args:
            token_indices: [B], the tokens' indices.
            query: Queries of S tokens, in the shape that `_norm_and_project_qkv` returns.
            x: [B, S, D].

        Returns:
            Queries of one token, in the same shape with S = 1; and inputs [B, 1, D].
        """
        batch, length, _ = x.shape
        batch_rows = torch.arange(batch, device=x.device)
        query = query.view(batch, self.num_kv_heads, length, -1, self.head_dim)
        selected_query = query[batch_rows, :, token_indices]  # [B, kv heads, heads per kv head, d]
        selected_query = selected_query.reshape(batch * self.num_kv_heads, -1, self.head_dim)
        selected_x = x[batch_rows, token_indices]  # [B, D]
        return selected_query, selected_x[:, None]

    def _finish_layer(self, layer: FusedLayer, x: Tensor, attended: Tensor) -> Tensor:
        """The part of a layer after attention: output projection, residuals and MLP.

        Args:
            layer: The weights.
            x: [B, S, D], the layer's input.
            attended: [B · kv heads, S · query heads per kv head, d], the output of attention.

        Returns:
            [B, S, D], the layer's output.
        """
        batch, length, _ = x.shape
        attended = attended.view(batch, self.num_kv_heads, length, -1, self.head_dim)
        attended = attended.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim)
        # A `FusedLinear` returns a sequence with the output of each of its layers.
        (out,) = layer.out(attended)
        x = x + self._norm(out, layer.after_attention)

        gate, up = layer.gate_up(self._norm(x, layer.before_mlp))
        (down,) = layer.down(self.activation(gate) * up)
        return x + self._norm(down, layer.after_mlp)

    def _attend(
        self,
        query: Tensor,
        visible: list[tuple[Tensor, Tensor]],
        block_lengths: list[int],
        bias: Tensor | None,
    ) -> Tensor:
        """Attend block by block; see `CacheWindow` for `visible` and `block_lengths`.

        Queries and result are [B · kv heads, S · query heads per kv head, d].
        """
        if len(block_lengths) == 1:
            ((keys, values),) = visible
            return self._attend_block(query, keys, values, bias)

        heads_per_kv_head = self.num_heads // self.num_kv_heads
        rows_per_block = [length * heads_per_kv_head for length in block_lengths]
        block_queries = query.split(rows_per_block, dim=1)
        outputs = []
        for block_query, (keys, values) in zip(block_queries, visible, strict=True):
            outputs.append(self._attend_block(block_query, keys, values, bias))
        return torch.cat(outputs, dim=1)

    def _attend_block(
        self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None
    ) -> Tensor:
        """softmax(scale · q Kᵀ + bias) V, [G, Q, d], for the queries of one block.

        G is B · kv heads, and Q the block's tokens times the query heads per kv head. The queries
        are [G, Q, d], and keys and values [G, places, d].
        """
        if bias is not None:
            bias = bias[:, :, : keys.shape[1]]
        if query.device.type != "cpu" and self.softcap is None:
            # PyTorch's fused attention gets a single head per key-value head, so it does not have
            # to copy keys and values for each query head.
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
        if self.scale == 1 and bias is None:  # of a `SmallLayerStack`
            return torch.bmm(query, transposed_keys)
        addend = query.new_zeros(1) if bias is None else bias
        return torch.baddbmm(addend, query, transposed_keys, alpha=self.scale)

    def _norm(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Gemma's RMSNorm, x / rms(x) · scale, computed in float32; x itself if `scale` is None."""
        if scale is None:
            return x
        float32_x = x.float()
        width = float32_x.shape[-1]
        if x.device.type != "cpu":
            return nn.functional.rms_norm(float32_x, (width,), scale, self.eps).to(x.dtype)
        # On a CPU the operations below take less time than PyTorch's `rms_norm`.
        norm = torch.linalg.vector_norm(float32_x, dim=-1, keepdim=True)
        mean_square_plus_eps = torch.addcmul(self._eps_tensor, norm, norm, value=1 / width)
        inverse_rms = mean_square_plus_eps.rsqrt_()
        return (float32_x * scale).mul_(inverse_rms).to(x.dtype)


@dataclass(frozen=True)
class PrefilledCache:
    """A prefix of S tokens after `prefill`.

    cache           Keys and values of every layer, with free places after them.
    valid           [B, S] bool, False for padding and missing images.
    is_padded       Whether any of `valid` may be False.
    next_positions  [B] the position after the last valid token.
    hidden          [B, D] the last layer's output at the last valid token. None if `prefill`
                    computed only the cache.
    write_events    One CUDA event per layer, recorded after the layer's keys and values were
                    written, for which another stream can wait. None if no other stream waits.
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
        """Return numbers to add to attention scores, so that padding of the prefix is not seen.

        They are 0 for valid tokens and for `num_new_places` places after the prefix, otherwise the
        lowest number of the type.

        Returns:
            [B · kv heads, 1, S + num_new_places], or None if the prefix has no padding.
        """
        if not self.is_padded:
            return None
        batch = self.valid.shape[0]
        new_places = self.valid.new_ones(batch, num_new_places)
        bias = mask_to_bias(torch.cat([self.valid, new_places], dim=1), dtype)
        return bias.repeat_interleave(num_kv_heads, dim=0)[:, None]


def prefill(  # noqa: PLR0913  the layers, their inputs and masks, and what to compute
    layers: LayerStack,
    features: Tensor,
    text: Tensor,
    image_valid: Tensor | None,
    text_valid: Tensor | None,
    room: int,
    keys_only: bool = False,
    write_events: LayerEvents = None,
) -> PrefilledCache:
    """Run visual tokens and text embeddings through the layers, where all of them see each other.

    Args:
        layers: The stack.
        features: [B, T, D] visual tokens.
        text: [B, L, D] text embeddings.
        image_valid: [B, T] bool, False for missing images. None, if no image is missing, is faster.
        text_valid: [B, L] bool or integers, False or 0 for padding. None, if there is no padding,
            is faster.
        room: Number of free places in the cache for tokens after the prefix.
        keys_only: Whether to compute only the cache; see `LayerStack.__call__`.
        write_events: A list to which one CUDA event per layer is appended; see `PrefilledCache`.
    """
    x = torch.cat([features.to(text.dtype), text], dim=1)
    batch, length = x.shape[:2]
    valid = torch.cat(
        [_make_valid_if_none(image_valid, features), _make_valid_if_none(text_valid, text)], dim=1
    )
    is_padded = image_valid is not None or text_valid is not None
    # A given mask may still have no padding, and then no bias is needed. On a GPU we do not check
    # this, because reading the mask would mean waiting. Fake tensors, which only measure memory,
    # have no values.
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
    # One block with all tokens of the prefix, which see all of these tokens.
    block = TokenBlock(num_tokens=length, visible_end=length)
    window = replace(cache.make_window(0, [block]), write_events=write_events)
    rotations = layers.compute_rotary_factors(positions, x.dtype)
    bias = prefix.make_bias(0, layers.num_kv_heads, x.dtype)
    if keys_only:
        layers(x, rotations, window, bias, keys_only=True)
        return prefix

    # Positions count the valid tokens, and padding has the position of the token before it. So the
    # first token with the largest position, which `argmax` returns, is the last valid token.
    last_valid = positions.argmax(-1)
    hidden = layers(x, rotations, window, bias, selected=last_valid)
    return replace(prefix, hidden=hidden[:, 0])


def _make_valid_if_none(valid: Tensor | None, tokens: Tensor) -> Tensor:
    """Return the mask `valid` as [B, N] bool, or a mask of ones for `tokens` [B, N, D] if None."""
    if valid is not None:
        return valid.bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def compute_norm_scale(norm: nn.Module) -> Tensor:
    """Return the factor of Gemma's RMSNorm, 1 + weight, in float32."""
    return 1 + norm.weight.detach().float()  # type: ignore[operator]


def can_compile(device: torch.device) -> bool:
    """Return whether PyTorch can compile layers for this device, which needs a GPU and Triton."""
    return device.type == "cuda" and find_spec("triton") is not None


get_layer_stack = ModuleCache(LayerStack)
"""`get_layer_stack(model, packed, compiled)`: the `LayerStack` of a Gemma, which is kept until the
weights change."""
