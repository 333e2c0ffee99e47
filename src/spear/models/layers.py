"""Parts that both networks share.

Gemma, attention and its masks, the KV cache, gradient checkpointing, and configs.

All masks are boolean and True where attention is allowed. Their shape is [B, 1, queries, keys], as
`torch.nn.functional.scaled_dot_product_attention` (SDPA) takes it. Rows of padding may attend to
the valid keys, although nobody reads their output: so no row is empty as long as a sequence has one
valid token.
"""

import inspect
import math
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
"""The name under which Transformers knows `grouped_attention`; our configs ask for it by
default."""

CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(GemmaModel.forward).parameters else "past_key_values"
)
"""The name of the cache argument of Gemma's layers: "past_key_values" in Transformers before
5.24."""

POSITIVE_CONFIG_FIELDS = ("horizon", "min_period", "max_period", "coordinate_bins", "cells")
"""Numbers of a config that must be above 0; all others may be 0."""


class PortableConfig(PreTrainedConfig):
    """A config that is saved without the folders that it, or its parts, were loaded from.

    With the decorator `strict` it rejects values of a wrong type, and numbers that
    `validate_numbers` rejects.
    """

    def validate_numbers(self) -> None:
        """Raises ValueError for a number that is negative, or 0 where it must be positive."""
        for name, value in vars(self).items():
            if not isinstance(value, int | float):
                continue
            is_valid = value > 0 if name in POSITIVE_CONFIG_FIELDS else value >= 0
            if not is_valid:
                raise ValueError(f"{name} is {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields of the config and of its parts, without `_name_or_path`."""
        fields = super().to_dict()
        fields.pop("_name_or_path", None)
        for value in fields.values():
            if isinstance(value, dict):
                value.pop("_name_or_path", None)
        return fields


class BlockDiagonalMask(list[int]):
    """The lengths of sequences that lie side by side in one batch row; no sequence sees another."""


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

    The signature is the one that Transformers asks of an attention function. On a CPU (bfloat16, 44
    tokens, one key-value head) it is seven times faster than PyTorch's flash kernel, forward and
    backward. It calls Transformers' SDPA instead on other devices, and for encoders that do not
    learn, unless `softcap` is given.

    Args:
        query: [B, heads, S, d].
        key: [B, kv heads, T, d].
        value: [B, kv heads, T, d].
        attention_mask: [B, 1, S, T] bool, or None where all attention is allowed.
        scaling: Factor of the scores, 1 / √d by default.
        softcap: If given, a score s becomes softcap · tanh(s / softcap) (Gemma 2), which SDPA
            cannot do.

    Returns:
        [B, S, heads, d], and None for the attention weights, which Transformers' interface
        includes.
    """
    if isinstance(attention_mask, BlockDiagonalMask):
        outputs = []
        for block_query, block_key, block_value in zip(
            query.split(attention_mask, dim=2),
            key.split(attention_mask, dim=2),
            value.split(attention_mask, dim=2),
            strict=True,
        ):
            output, _ = grouped_attention(
                module, block_query, block_key, block_value, None, scaling, softcap, **kwargs
            )
            outputs.append(output)
        return torch.cat(outputs, dim=1), None

    has_ungrouped_heads = query.shape[1] == key.shape[1]
    is_frozen_encoder = has_ungrouped_heads and not torch.is_grad_enabled()
    if softcap is None and (is_frozen_encoder or query.device.type != "cpu"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )

    batch, num_heads, num_queries, width = query.shape
    num_kv_heads, num_keys = key.shape[1:3]
    dtype = value.dtype

    # The query heads of a key-value head become rows of one matrix.
    scaled_query = (query * (scaling or width**-0.5)).to(dtype)
    query_rows = scaled_query.reshape(batch * num_kv_heads, -1, width)
    key_rows = key.to(dtype).reshape(batch * num_kv_heads, num_keys, width)
    value_rows = value.reshape(batch * num_kv_heads, num_keys, width)

    scores = torch.bmm(query_rows, key_rows.transpose(1, 2))
    scores = scores.view(batch, num_heads, num_queries, num_keys)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)

    weights = scores.softmax(-1, dtype=torch.float32).to(dtype)
    output = torch.bmm(weights.view(batch * num_kv_heads, -1, num_keys), value_rows)
    return output.view(batch, num_heads, num_queries, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def choose_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """Make a config ask for `grouped_attention`, unless the user chose an attention."""
    if config._attn_implementation is None:
        config._attn_implementation = ATTENTION_NAME
    return config


def compute_position_ids(valid: Tensor) -> Tensor:
    """Position ids [B, S] of valid tokens [B, S] bool: how many valid tokens come before each.

    Padding takes no position.

    Example:
        >>> compute_position_ids(torch.tensor([[True, False, True, True]]))
        tensor([[0, 0, 1, 2]])
    """
    return (valid.long().cumsum(-1) - 1).clamp_min(0)


def make_prefix_lm_mask(valid: Tensor, causal: Tensor) -> Tensor:
    """PaliGemma's mask for a prefix and an answer.

    The prefix (images and prompt) sees all of itself; the answer sees all before it.

    Args:
        valid: [B, S] bool, False for padding.
        causal: [B, S] bool, True for tokens of the answer.

    Returns:
        [B, 1, S, S] bool.

    Example:
        Two tokens of prefix, then two of answer:

        >>> valid = torch.ones(1, 4, dtype=torch.bool)
        >>> make_prefix_lm_mask(valid, torch.tensor([[False, False, True, True]]))[0, 0].int()
        tensor([[1, 1, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 1, 1]], dtype=torch.int32)
    """
    order = torch.arange(valid.shape[1], device=valid.device)
    is_before = order[None, :] <= order[:, None]  # [S, S]
    return ((is_before | ~causal[:, None, :]) & valid[:, None, :])[:, None]


def make_suffix_mask(valid: Tensor, horizon: int, num_chunks: int) -> Tensor:
    """The paper's block-wise mask for [proprioception, `num_chunks` independent chunks of actions].

    The state sees the prefix and itself. The actions of a chunk see the prefix, the state and each
    other, never another chunk: several flow samples of one observation share its prefix and its
    state.

    Args:
        valid: [B, S] bool, the tokens of the prefix that are not padding.
        horizon: H, actions per chunk.
        num_chunks: K, chunks per observation.

    Returns:
        [B, 1, 1 + K·H, S + 1 + K·H] bool.
    """
    chunk = torch.arange(num_chunks * horizon, device=valid.device) // horizon
    chunk = torch.cat([chunk.new_full((1,), -1), chunk])  # [T], -1 is the state
    sees_suffix = (chunk[None, :] == -1) | (chunk[None, :] == chunk[:, None])  # [T, T]

    batch = valid.shape[0]
    num_tokens = sees_suffix.shape[0]
    sees_suffix = sees_suffix.expand(batch, num_tokens, num_tokens)
    sees_prefix = valid[:, None, :].expand(-1, num_tokens, -1)
    return torch.cat([sees_prefix, sees_suffix], dim=-1)[:, None]


def prepare_mask(model: GemmaModel | Gemma2Model, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask in the form that the model's attention takes.

    Transformers' "eager" attention adds it to scores; all others take it as it is.
    """
    if model.config._attn_implementation == "eager":
        return mask_to_bias(allowed, dtype)
    return allowed


def mask_to_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where attention is allowed, otherwise the type's lowest number."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def embed_flow_time(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """π0's embedding of the flow time, [...] -> [..., width] float32: first sines, then cosines.

    The periods of the waves are spaced geometrically from `min_period` to `max_period`.
    """
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float32, device=time.device)
    # Angles reach 1,600 rad. Rounded in another order than π0's, they would not fit its trained
    # weights.
    frequency = 1.0 / (min_period * (max_period / min_period) ** fraction) * 2 * math.pi
    angle_rad = frequency * time.float()[..., None]
    return torch.cat([angle_rad.sin(), angle_rad.cos()], dim=-1)


class KVCache:
    """Keys and values of a prefix.

    One tensor of each per layer, [B, kv heads, S, head_dim], in layer order.

    Gemma takes it as its cache, and gradients flow through it. While `frozen` is False, `update`
    stores new keys and values; the action expert reads a frozen cache. Inference uses
    `fast.stack.StaticKVCache` instead.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.frozen = False

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """All that new tokens attend to: the stored keys and values of `layer`, then their own.

        Transformers calls it, and passes further arguments that are not needed.
        """
        if layer < len(self.keys):
            keys = torch.cat([self.keys[layer].to(keys.dtype), keys], dim=2)
            values = torch.cat([self.values[layer].to(values.dtype), values], dim=2)
        if not self.frozen:
            self.keys[layer : layer + 1] = [keys]
            self.values[layer : layer + 1] = [values]
        return keys, values


def set_gradient_checkpointing(model: nn.Module, enabled: bool = True) -> None:
    """Turn gradient checkpointing of all transformer layers in `model` on or off.

    A checkpointed layer stores only its input and computes the rest again in the backward pass.
    Losses and gradients stay the same, bit for bit on a CPU. Transformers' own version drops the
    keys and values of a layer, which the action expert needs; here they are a result of the layer
    like any other.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            vars(layer).pop("forward", None)
            if enabled:
                layer.forward = partial(_run_checkpointed, layer.forward)


def _run_checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """Run one layer, and put its keys and values into the cache, but not again on recomputation."""
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
    cache.update(keys, values, len(cache.keys))
    return output


def build_language_model(config: GemmaConfig | Gemma2Config) -> GemmaModel | Gemma2Model:
    """Transformers' Gemma or Gemma 2 (PaliGemma 2's) with `FastRMSNorm`.

    Its parameters and results stay the same.

    Every layer of a Gemma 2 sees the whole sequence, because its window of 4,096 tokens is longer
    than any of our sequences.
    """
    model = Gemma2Model(config) if isinstance(config, Gemma2Config) else GemmaModel(config)
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm | Gemma2RMSNorm):
            module.__class__ = FastRMSNorm
    return model


class FastRMSNorm(GemmaRMSNorm):
    """Gemma's RMSNorm, x / rms(x) · (1 + weight), with few passes over memory for float32 on a CPU.

    Under autocast it returns the lower precision in which the linear layers behind it compute, so
    that its result is cast once and not once per layer. At [11264, 256], forward and backward take
    2.6 instead of 15 ms.
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
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        inverse_rms = (norm.square_() / width + eps).rsqrt_()
        ctx.save_for_backward(rows, scale, inverse_rms)
        return (rows * scale).mul_(inverse_rms).to(dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, inverse_rms = ctx.saved_tensors
        width = rows.shape[-1]
        grad_rows = grad.reshape(rows.shape).to(rows.dtype)

        # LayerNorm's fused backward, given a mean of 0, subtracts one term that an RMSNorm does not
        # have.
        output_mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        mean = torch.zeros_like(inverse_rms)
        grad_x, grad_scale, _ = torch.ops.aten.native_layer_norm_backward(
            grad_rows, rows, [width], mean, inverse_rms, scale, None, output_mask
        )
        if grad_x is not None:
            mean_term = inverse_rms * (grad_rows @ scale / width)[:, None]
            grad_x = grad_x.add_(mean_term).view(grad.shape)
        return grad_x, grad_scale, None, None
