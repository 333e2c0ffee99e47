"""What the networks share: Gemma, attention and its masks, keys and values, gradient checkpointing, configs.

All masks are boolean, True where attention is allowed, shaped [B, 1, queries, keys] for
`torch.nn.functional.scaled_dot_product_attention`. Rows of padding may attend to the valid keys (their output
is never read), so that no row is empty as long as a sequence has one valid token.
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
"""The name under which Transformers knows `grouped_attention`; our configs ask for it by default."""
CACHE_ARGUMENT = (
    "cache" if "cache" in inspect.signature(GemmaModel.forward).parameters else "past_key_values"
)
"""What Gemma and its layers call their cache: "past_key_values" in Transformers before 5.24."""


class PortableConfig(PreTrainedConfig):
    """A config that is saved without the folders that it, or its parts, were loaded from.

    With `strict`, fields of another type are refused, and what `validate_numbers` finds.
    """

    def validate_numbers(self) -> None:
        """Raises ValueError for a number that is negative, or 0 where there must be some."""
        for name, value in vars(self).items():
            least = name in ("horizon", "min_period", "max_period", "coordinate_bins", "cells")
            if isinstance(value, int | float) and not (value > 0 if least else value >= 0):
                raise ValueError(f"{name} is {value}")

    def to_dict(self) -> dict[str, Any]:
        """The fields of the config and of its parts, but for `_name_or_path`."""
        fields = super().to_dict()
        for part in (fields, *(value for value in fields.values() if isinstance(value, dict))):
            part.pop("_name_or_path", None)
        return fields


class BlockDiagonalMask(list[int]):
    """In place of a mask: lengths of sequences that lie side by side, none of which sees another."""


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
    """Softmax attention, with all query heads of a key-value head side by side in one matrix product.

    query [B, heads, S, d], key and value [B, kv heads, T, d], mask [B, 1, S, T] bool or None (all allowed).
    softcap: scores s become softcap · tanh(s / softcap) (Gemma 2), which SDPA cannot do.
    Returns [B, S, heads, d]. Measured against PyTorch's flash kernel on a CPU, bfloat16, 44 tokens, one
    key-value head: seven times faster, forward and backward. On other devices, and for the encoders when they
    do not learn, this is Transformers' SDPA, where that can do it.
    """
    if isinstance(attention_mask, BlockDiagonalMask):
        parts = zip(*(t.split(attention_mask, dim=2) for t in (query, key, value)), strict=True)
        found = [
            grouped_attention(module, q, k, v, None, scaling, softcap, **kwargs)[0]
            for q, k, v in parts
        ]
        return torch.cat(found, dim=1), None
    each = query.shape[1] == key.shape[1] and not torch.is_grad_enabled()
    if softcap is None and (each or query.device.type != "cpu"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    batch, heads, length, width = query.shape
    groups, keys = key.shape[1], key.shape[2]
    dtype = value.dtype
    folded = (query * (scaling or width**-0.5)).to(dtype).reshape(batch * groups, -1, width)
    scores = torch.bmm(folded, key.to(dtype).reshape(batch * groups, keys, width).transpose(1, 2))
    scores = scores.view(batch, heads, length, keys)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32).to(dtype).view(batch * groups, -1, keys)
    output = torch.bmm(weights, value.reshape(batch * groups, keys, width))
    return output.view(batch, heads, length, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION_NAME, grouped_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)


def choose_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, asking for `grouped_attention` in all its parts unless the user asked for another."""
    if config._attn_implementation is None:
        config._attn_implementation = ATTENTION_NAME
    return config


def compute_position_ids(valid: Tensor) -> Tensor:
    """[B, S] bool -> [B, S] position ids: how many valid tokens come before (padding takes no place)."""
    return (valid.long().cumsum(-1) - 1).clamp_min(0)


def make_prefix_lm_mask(valid: Tensor, causal: Tensor) -> Tensor:
    """PaliGemma's mask: the prefix (images and prompt) sees all of itself, the answer sees what came before.

    valid [B, S] bool: not padding. causal [B, S] bool: the token belongs to the answer. -> [B, 1, S, S].
    """
    order = torch.arange(valid.shape[1], device=valid.device)
    earlier = order[None, :] <= order[:, None]  # [S, S]
    return ((earlier | ~causal[:, None, :]) & valid[:, None, :])[:, None]


def make_suffix_mask(valid: Tensor, horizon: int, samples: int) -> Tensor:
    """The paper's block-wise mask for [proprioception, `samples` independent chunks of `horizon` actions].

    The state sees the prefix and itself; the actions of a chunk see the prefix, the state and each other,
    never another chunk: flow samples of one observation share its prefix and state.

    valid [B, S] bool of the prefix. -> [B, 1, 1 + samples·horizon, S + 1 + samples·horizon].
    """
    chunk = torch.arange(samples * horizon, device=valid.device) // horizon
    chunk = torch.cat([chunk.new_full((1,), -1), chunk])  # [T], -1 is the state
    own = (chunk[None, :] == -1) | (chunk[None, :] == chunk[:, None])  # [T, T]
    batch, tokens = valid.shape[0], own.shape[0]
    own = own.expand(batch, tokens, tokens)
    return torch.cat([valid[:, None, :].expand(-1, tokens, -1), own], dim=-1)[:, None]


def prepare_mask(model: GemmaModel | Gemma2Model, allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as the attention that a model was asked to use takes it: Transformers' "eager" adds it."""
    return mask_to_bias(allowed, dtype) if model.config._attn_implementation == "eager" else allowed


def mask_to_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where attention is allowed, else the least number."""
    return torch.zeros_like(allowed, dtype=dtype).masked_fill_(~allowed, torch.finfo(dtype).min)


def embed_flow_time(time: Tensor, width: int, min_period: float, max_period: float) -> Tensor:
    """π0's embedding of the flow time, [...] -> [..., width] float32: sines, cosines; geometric periods."""
    fraction = torch.linspace(0, 1, width // 2, dtype=torch.float32, device=time.device)
    # Angles reach 1,600 rad: rounded in another order than π0's, they would differ from those of its weights.
    frequency = 1.0 / (min_period * (max_period / min_period) ** fraction) * 2 * math.pi
    angle = frequency * time.float()[..., None]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class KVCache:
    """One key and one value tensor per layer, [B, kv heads, S, head_dim], in the order of the layers.

    Passed to a Gemma model as its cache; gradients flow through it. While `frozen` is False, new keys and
    values are kept; the action expert reads a frozen one. Inference has `fast.stack.StaticKVCache` instead.
    """

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.frozen = False

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """What the new tokens of `layer` attend to: the keys and values held, followed by their own."""
        if layer < len(self.keys):
            keys = torch.cat([self.keys[layer].to(keys.dtype), keys], dim=2)
            values = torch.cat([self.values[layer].to(values.dtype), values], dim=2)
        if not self.frozen:
            self.keys[layer : layer + 1] = [keys]
            self.values[layer : layer + 1] = [values]
        return keys, values


def set_gradient_checkpointing(model: nn.Module, on: bool = True) -> None:
    """Turn gradient checkpointing of all transformer layers in `model` on or off.

    Layers then keep only their input, and compute the rest again on the way back: the same losses and
    gradients, bit for bit on a CPU. Transformers' own way drops the keys and values that a layer leaves for
    later tokens, which the action expert needs; here they are a result of the layer like any other.
    """
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            vars(layer).pop("forward", None)
            if on:
                layer.forward = partial(_run_checkpointed, layer.forward)


def _run_checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    """One layer. Its keys and values go into the cache here, once, and not when the layer runs again."""
    cache: KVCache | None = kwargs.get(CACHE_ARGUMENT)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if cache is None or cache.frozen:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def whole(*args: Any) -> tuple[Any, Tensor, Tensor]:
        own = KVCache()
        result = forward(*args, **{**kwargs, CACHE_ARGUMENT: own})
        return result, own.keys[0], own.values[0]

    result, keys, values = checkpoint(whole, *args, use_reentrant=False)
    cache.update(keys, values, len(cache.keys))
    return result


def build_language_model(config: GemmaConfig | Gemma2Config) -> GemmaModel | Gemma2Model:
    """Transformers' Gemma, or Gemma 2 (PaliGemma 2's), same parameters and results, with `FastRMSNorm`s.

    Every layer of a Gemma 2 sees the whole sequence: its window of 4,096 tokens is longer than any of ours.
    """
    model = Gemma2Model(config) if isinstance(config, Gemma2Config) else GemmaModel(config)
    for module in model.modules():
        if isinstance(module, GemmaRMSNorm | Gemma2RMSNorm):
            module.__class__ = FastRMSNorm
    return model


class FastRMSNorm(GemmaRMSNorm):
    """Gemma's RMSNorm, x / rms(x) · (1 + weight), in few passes over memory for float32 on a CPU.

    Under autocast its result is already in the lower precision that the linear layers after it compute in,
    so it is cast once instead of once per layer. At [11264, 256], there and back: 2.6 instead of 15 ms.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if x.device.type != "cpu" or x.dtype != torch.float32:
            return super().forward(x)
        lower = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if lower else x.dtype
        return _RMSNorm.apply(x, 1 + self.weight.float(), self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) · scale. [..., width], [width] -> [..., width] in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        width = x.shape[-1]
        rows = x.reshape(-1, width)
        norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
        inverse = (norm.square_() / width + eps).rsqrt_()
        ctx.save_for_backward(rows, scale, inverse)
        return (rows * scale).mul_(inverse).to(dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, scale, inverse = ctx.saved_tensors
        width = rows.shape[-1]
        flat = grad.reshape(rows.shape).to(rows.dtype)
        # LayerNorm's fused backward, told that the mean is zero, subtracts one term too many: add it again.
        needed = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        mean = torch.zeros_like(inverse)
        to_x, to_scale, _ = torch.ops.aten.native_layer_norm_backward(
            flat, rows, [width], mean, inverse, scale, None, needed
        )
        if to_x is not None:
            to_x = to_x.add_(inverse * (flat @ scale / width)[:, None]).view(grad.shape)
        return to_x, to_scale, None, None
