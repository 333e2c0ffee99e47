"""Parts that SPEAR-VLM and SPEAR-1 share.

These are Gemma, attention and its masks, the KV cache, gradient checkpointing, and configs.

All masks are boolean, and True where attention is allowed. Their shape is [B, 1, queries, keys], as
`torch.nn.functional.scaled_dot_product_attention` (SDPA) takes it. Queries that are padding may
attend to the valid keys, although their output is not used. If they could attend to nothing, their
softmax would be NaN.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2Model,
    GemmaConfig,
    GemmaModel,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

ATTENTION_NAME = "spear"
"""The name under which Transformers knows `grouped_attention`. Our configs choose this attention by
default."""

CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(GemmaModel.forward).parameters else "past_key_values"
)
"""The name of the argument by which Gemma's layers take a KV cache: "past_key_values" in
Transformers before 5.24, "cache" since."""

POSITIVE_CONFIG_FIELDS = ("horizon", "min_period", "max_period", "coordinate_bins", "cells")
"""Numbers of a config that must be above 0; all others may be 0."""


class PortableConfig(PreTrainedConfig):
    """A config that is saved without the names of the folders that it was loaded from.

    A subclass with the decorator `strict` rejects values of a wrong type when it is made, and calls
    `validate_numbers`.
    """

    def validate_numbers(self) -> None:
        """Raise ValueError for a number that is negative, or 0 where it must be positive."""
        for name, value in vars(self).items():
            if not isinstance(value, int | float):
                continue
            is_valid = value > 0 if name in POSITIVE_CONFIG_FIELDS else value >= 0
            if not is_valid:
                raise ValueError(f"{name} is {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields of the config and of its sub-configs, without `_name_or_path`."""
        fields = super().to_dict()
        fields.pop("_name_or_path", None)
        for value in fields.values():
            if isinstance(value, dict):
                value.pop("_name_or_path", None)
        return fields


class BlockDiagonalMask(list[int]):
    """The lengths of sequences that are joined in one batch row, and do not see each other.

    The list of lengths stands for the mask, whose matrix is never made.
    """


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockDiagonalMask | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention that computes all query heads of one key-value head in one matrix product.

    The signature is that of Transformers' attention functions. On a CPU (bfloat16, 44 tokens, one
    key-value head) this product is seven times faster than PyTorch's flash kernel, forward and
    backward. On other devices, and for encoders that do not learn, the function calls Transformers'
    SDPA instead, unless `softcap` is given.

    Args:
        module: The attention layer. Transformers passes it, and SDPA reads its settings.
        query: [B, heads, S, head_dim].
        key: [B, kv heads, T, head_dim].
        value: [B, kv heads, T, head_dim].
        attention_mask: [B, 1, S, T] bool; or a `BlockDiagonalMask`; or None where all attention is
            allowed.
        scaling: Factor of the scores, 1 / √head_dim by default.
        softcap: If given, a score s becomes softcap · tanh(s / softcap) (Gemma 2), which SDPA
            cannot do.
        kwargs: Further arguments of Transformers, for SDPA.

    Returns:
        The output [B, S, heads, head_dim]; and None in place of the attention weights, which
        Transformers' interface includes.
    """
    if isinstance(attention_mask, BlockDiagonalMask):
        attend = partial(
            grouped_attention,
            module,
            attention_mask=None,
            scaling=scaling,
            softcap=softcap,
            **kwargs,
        )
        return _attend_within_sequences(attend, query, key, value, attention_mask), None

    # Image encoders are recognized by their heads: they have as many key-value heads as query
    # heads. The Gemmas of our presets have one key-value head.
    is_image_encoder = query.shape[1] == key.shape[1]
    does_not_learn = not torch.is_grad_enabled()
    should_use_sdpa = query.device.type != "cpu" or (is_image_encoder and does_not_learn)
    if softcap is None and should_use_sdpa:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    batch, num_heads, num_queries, width = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    dtype = value.dtype

    # The queries of all heads that share a key-value head become the rows of one matrix.
    scaled_query = (query * (scaling or width**-0.5)).to(dtype)
    query_rows = scaled_query.reshape(batch * num_kv_heads, -1, width)  # [B · kv heads, rows, d]
    key_rows = key.to(dtype).reshape(batch * num_kv_heads, num_keys, width)
    value_rows = value.reshape(batch * num_kv_heads, num_keys, width)

    scores = torch.bmm(query_rows, key_rows.transpose(1, 2))  # [B · kv heads, rows, T]
    scores = scores.view(batch, num_heads, num_queries, num_keys)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)

    weights = scores.softmax(-1, dtype=torch.float32).to(dtype)
    output = torch.bmm(weights.view(batch * num_kv_heads, -1, num_keys), value_rows)
    return output.view(batch, num_heads, num_queries, width).transpose(1, 2), None


def _attend_within_sequences(
    attend: Callable[..., tuple[Tensor, None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence_lengths: list[int],
) -> Tensor:
    """Attend within each sequence of a block-diagonal mask, one after the other.

    Args:
        attend: computes the attention of one sequence.
        query: [B, heads, S, head_dim], all sequences one behind the other, as key and value.
        key: [B, kv heads, S, head_dim].
        value: [B, kv heads, S, head_dim].
        sequence_lengths: how many tokens each sequence has, S in all.

    Returns:
        The output [B, S, heads, head_dim].
    """
    # Split along the tokens: dimension 2 of the inputs.
    sequences = zip(
        query.split(sequence_lengths, dim=2),
        key.split(sequence_lengths, dim=2),
        value.split(sequence_lengths, dim=2),
        strict=True,
    )
    # Join along the tokens again: dimension 1 of the outputs.
    outputs = [attend(query=q, key=k, value=v)[0] for q, k, v in sequences]
    return torch.cat(outputs, dim=1)


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def set_default_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a config choose `grouped_attention`, unless the user chose an attention; return it."""
    if config._attn_implementation is None:
        config._attn_implementation = ATTENTION_NAME
    return config


def compute_position_ids(valid: Tensor) -> Tensor:
    """Position ids [B, S]: for each token, the number of valid tokens before it.

    So padding takes no position. `valid` [B, S] bool is False for padding.

    Example:
        >>> compute_position_ids(torch.tensor([[True, False, True, True]]))
        tensor([[0, 0, 1, 2]])
    """
    return (valid.long().cumsum(-1) - 1).clamp_min(0)


def make_prefix_lm_mask(valid: Tensor, is_answer: Tensor) -> Tensor:
    """PaliGemma's mask for a prefix and an answer.

    The prefix (images and prompt) sees all tokens of the prefix. A token of the answer sees itself
    and all tokens before it.

    Args:
        valid: [B, S] bool, False for padding.
        is_answer: [B, S] bool, True for tokens of the answer.

    Returns:
        [B, 1, S, S] bool.

    Example:
        Two tokens of a prefix, then two of an answer. A row is a query, a column a key:

        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> make_prefix_lm_mask(valid, torch.tensor([[False, False, True, True]]))[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    index = torch.arange(valid.shape[1], device=valid.device)
    is_not_later = index[None, :] <= index[:, None]  # [S, S]
    is_prefix_key = ~is_answer[:, None, :]  # [B, 1, S]
    is_valid_key = valid[:, None, :]  # [B, 1, S]
    allowed = (is_not_later | is_prefix_key) & is_valid_key  # [B, S, S]
    return allowed[:, None]


def make_suffix_mask(valid: Tensor, horizon: int, num_chunks: int) -> Tensor:
    """The paper's block-wise mask for a suffix: the state token, then the actions of K chunks.

    The state sees the prefix and itself. The actions of a chunk see the prefix, the state and each
    other, but no other chunk. So several flow samples of one observation can share its prefix and
    its state.

    Args:
        valid: [B, S] bool, the tokens of the prefix that are not padding.
        horizon: H, actions per chunk.
        num_chunks: K, chunks per observation.

    Returns:
        [B, 1, 1 + K·H, S + 1 + K·H] bool.
    """
    # The number of each suffix token's chunk, -1 for the state: [T] with T = 1 + K·H.
    chunk = torch.arange(num_chunks * horizon, device=valid.device) // horizon
    chunk = torch.cat([chunk.new_full((1,), -1), chunk])
    is_state_key = chunk[None, :] == -1  # [1, T]
    is_same_chunk = chunk[None, :] == chunk[:, None]  # [T, T]
    sees_suffix = is_state_key | is_same_chunk

    batch = valid.shape[0]
    num_tokens = sees_suffix.shape[0]
    sees_suffix = sees_suffix.expand(batch, num_tokens, num_tokens)
    sees_prefix = valid[:, None, :].expand(-1, num_tokens, -1)  # [B, T, S]
    return torch.cat([sees_prefix, sees_suffix], dim=-1)[:, None]


def convert_mask_for_attention(
    model: GemmaModel | Gemma2Model, allowed: Tensor, dtype: torch.dtype
) -> Tensor:
    """Convert the boolean mask `allowed` to the form that the model's attention takes.

    Transformers' "eager" attention adds a mask to the scores, so it takes numbers. All others take
    a boolean mask.
    """
    if model.config._attn_implementation == "eager":
        return mask_to_bias(allowed, dtype)
    return allowed


def mask_to_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers to add to scores: 0 where attention is allowed, otherwise the lowest of the type."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def embed_flow_time(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """π0's embedding of the flow time, [...] -> [..., width] float32: first sines, then cosines.

    The periods of the waves are spaced geometrically from `min_period` to `max_period`.
    """
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float32, device=time.device)
    # Angles reach 1,600 rad, where rounding errors are large. So we compute in the same order as
    # π0, whose trained weights have seen its rounding.
    frequency = 1.0 / (min_period * (max_period / min_period) ** fraction) * 2 * math.pi
    angle_rad = frequency * time.float()[..., None]
    return torch.cat([angle_rad.sin(), angle_rad.cos()], dim=-1)


class KVCache:
    """Keys and values of a prefix, through which gradients flow.

    keys    One tensor per layer, [B, kv heads, S, head_dim].
    values  Likewise.
    frozen  While it is False, `update` stores new keys and values. The action expert reads a frozen
            cache, so that its own keys and values are not stored.

    Gemma's layers take it as their cache. Inference uses `fast.kv_cache.StaticKVCache` instead.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.frozen = False

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values that new tokens attend to: those stored for `layer`, then their own.

        Gemma's layers call this method, and pass further arguments that are not needed.
        """
        if layer < len(self.keys):
            keys = torch.cat([self.keys[layer].to(keys.dtype), keys], dim=2)
            values = torch.cat([self.values[layer].to(values.dtype), values], dim=2)
        if not self.frozen:
            # Replaces the layer's entry, or appends it if the layer is new.
            self.keys[layer : layer + 1] = [keys]
            self.values[layer : layer + 1] = [values]
        return keys, values


def set_gradient_checkpointing(model: nn.Module, enabled: bool = True) -> None:
    """Turn gradient checkpointing of all transformer layers in `model` on or off.

    A checkpointed layer stores only its input, and computes its intermediate results again in the
    backward pass. Losses and gradients stay the same, bit for bit on a CPU. Transformers' own
    checkpointing drops the keys and values of a layer, which the action expert needs. Here the keys
    and values are results of the checkpointed function.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            # Remove an earlier wrapper, which is an attribute of the instance.
            vars(layer).pop("forward", None)
            if enabled:
                layer.forward = partial(_run_checkpointed, layer.forward)


def _run_checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one layer checkpointed, and put its keys and values into the cache once.

    The layer runs a second time in the backward pass. Both runs write their keys and values to a
    temporary cache, and those of the first run are copied to the real one.
    """
    cache: KVCache | None = kwargs.get(CACHE_ARGUMENT)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if cache is None or cache.frozen:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def forward_with_keys_and_values(*args: Any) -> tuple[Any, Tensor, Tensor]:
        layer_cache = KVCache()
        output = forward(*args, **{**kwargs, CACHE_ARGUMENT: layer_cache})
        return output, layer_cache.keys[0], layer_cache.values[0]

    output, keys, values = checkpoint(forward_with_keys_and_values, *args, use_reentrant=False)
    # Layers run in order, so the keys and values become the cache's next entry.
    cache.update(keys, values, layer=len(cache.keys))
    return output


def build_language_model(config: GemmaConfig | Gemma2Config) -> GemmaModel | Gemma2Model:
    """Transformers' Gemma, or Gemma 2 (of PaliGemma 2), with `FastRMSNorm` as its norms.

    The parameters and results are the same as with the norms of Transformers. Every layer of a
    Gemma 2 sees the whole sequence, because its window of 4,096 tokens is longer than any of our
    sequences.
    """
    model = Gemma2Model(config) if isinstance(config, Gemma2Config) else GemmaModel(config)
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm | Gemma2RMSNorm):
            module.__class__ = FastRMSNorm
    return model


class FastRMSNorm(GemmaRMSNorm):
    """Gemma's RMSNorm, x / rms(x) · (1 + weight), with few passes over memory for float32 on a CPU.

    Under autocast the norm returns the lower precision in which the next linear layers compute, so
    that its result is cast once, and not once by each of these layers. For 11,264 tokens of width
    256, forward and backward take 2.6 ms instead of 15 ms.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        is_autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if is_autocast else x.dtype
        return _RMSNorm.apply(x, 1 + self.weight.float(), self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · scale: [..., width] and [width] -> [..., width] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # [rows, 1]
        inverse_rms = (norm.square_() / width + eps).rsqrt_()
        ctx.save_for_backward(rows, scale, inverse_rms)
        return (rows * scale).mul_(inverse_rms).to(dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, inverse_rms = ctx.saved_tensors
        width = rows.shape[-1]
        grad_rows = grad.reshape(rows.shape).to(rows.dtype)

        # We use the fused backward of LayerNorm, with a mean of 0. It subtracts the gradient
        # through the mean, which is the mean over the width of grad · scale / rms. An RMSNorm has
        # no mean, so we add that term again.
        # Which gradients are needed: of x and of the scale. LayerNorm's bias does not exist here.
        output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        mean = torch.zeros_like(inverse_rms)
        grad_x, grad_scale, _ = torch.ops.aten.native_layer_norm_backward(
            grad_rows, rows, [width], mean, inverse_rms, scale, None, output_mask
        )
        if grad_x is not None:
            mean_term = inverse_rms * (grad_rows @ scale / width)[:, None]
            grad_x = grad_x.add_(mean_term).view(grad.shape)
        return grad_x, grad_scale, None, None
